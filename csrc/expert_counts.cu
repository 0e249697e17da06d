// How many of the ids that the router has chosen name each expert.
//
// A block counts its ids in shared memory, then adds what is not zero to the counts: ids of the
// same expert, of which there are many, meet in shared memory and not all in the L2 cache.
#include <algorithm>

#include "check.h"
#include "expert_counts.h"
#include "launch.cuh"

namespace moe_engine {
namespace {

constexpr int kThreads = 256;
// Experts that one block counts: 16 KiB of shared memory, so that several blocks fit an SM.
constexpr int kTileExperts = 4096;
// Enough ids per thread to pay for the block's two passes over its histogram.
constexpr int kIdsPerThread = 8;

// Block (x, y) counts every gridDim.x-th slice of the ids, for the experts of tile y.
//
// Shapes: ids int32 or int64 [num_ids], those that are no expert's are not counted; counts
// [num_experts], zero before.
//
// Example: 5000 ids and 128 experts are 3 slices of up to 2048 ids to give a block and one tile, so
// the grid is (3, 1), and the blocks take 256 ids in turn: the first those from 0, 768, 1536 on.
// Ids [3, -1, 3, 128] make counts[3] = 2 and no other.
template <typename Id>
__global__ void __launch_bounds__(kThreads)
    expert_counts_kernel(const Id* __restrict__ ids, std::int64_t num_ids, int num_experts,
                         std::int32_t* __restrict__ counts) {
  extern __shared__ std::int32_t tile_counts[];
  const int first_expert = static_cast<int>(blockIdx.y) * kTileExperts;
  const int tile_size = min(kTileExperts, num_experts - first_expert);

  for (int e = threadIdx.x; e < tile_size; e += kThreads) tile_counts[e] = 0;
  __syncthreads();

  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * kThreads;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < num_ids;
       i += stride) {
    const std::int64_t expert = static_cast<std::int64_t>(ids[i]) - first_expert;
    if (expert >= 0 && expert < tile_size) atomicAdd(&tile_counts[expert], 1);
  }
  __syncthreads();

  for (int e = threadIdx.x; e < tile_size; e += kThreads) {
    if (tile_counts[e] != 0) atomicAdd(&counts[first_expert + e], tile_counts[e]);
  }
}

template <typename Id>
void launch(const ExpertCountsArgs& args, std::int64_t num_ids, int num_sms, cudaStream_t stream) {
  constexpr std::int64_t kIdsPerBlock = kThreads * kIdsPerThread;
  const std::int64_t num_slices = (num_ids + kIdsPerBlock - 1) / kIdsPerBlock;
  const dim3 grid(static_cast<unsigned>(std::min<std::int64_t>(num_slices, 2 * num_sms)),
                  (args.num_experts + kTileExperts - 1) / kTileExperts);
  const size_t shared_bytes = std::min(args.num_experts, kTileExperts) * sizeof(std::int32_t);
  expert_counts_kernel<<<grid, kThreads, shared_bytes, stream>>>(
      static_cast<const Id*>(args.topk_ids), num_ids, args.num_experts, args.counts);
  CHECK_LAUNCH("expert_counts_kernel");
}

}  // namespace

void expert_token_counts(const ExpertCountsArgs& args, cudaStream_t stream) {
  CHECK_CUDA(cudaMemsetAsync(args.counts, 0, args.num_experts * sizeof(std::int32_t), stream));
  const std::int64_t num_ids = args.num_tokens * args.top_k;
  if (num_ids == 0) return;

  const int num_sms = num_multiprocessors();
  if (args.ids_are_int64) {
    launch<std::int64_t>(args, num_ids, num_sms, stream);
  } else {
    launch<std::int32_t>(args, num_ids, num_sms, stream);
  }
}

}  // namespace moe_engine

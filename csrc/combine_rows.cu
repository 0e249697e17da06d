// Combine of many tokens, by rows (exchange_rows.cuh): one kernel sums what the experts made and
// sends it, another one waits and sums what comes back.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "exchange_rows.cuh"
#include "hopper.cuh"
#include "launch.cuh"
#include "row_sums.cuh"

namespace moe_engine {
namespace {

// Warps share a token's row.
constexpr int kWarpsPerToken = 2;
constexpr int kWarps = kWarpsPerToken * kChunkTokens;
constexpr int kThreads = 32 * kWarps;

struct SharedRows {
  RowStages of_warp[kWarps];
};

__device__ __forceinline__ SharedRows& init_rows() {
  extern __shared__ __align__(128) char memory[];
  auto& shared = *reinterpret_cast<SharedRows*>(memory);
  if (threadIdx.x == 0) {
    for (RowStages& stages : shared.of_warp) {
      for (std::uint64_t& barrier : stages.loaded) barrier_init(&barrier, 1);
    }
    barrier_init_fence();
  }
  __syncthreads();
  return shared;
}

// The choices of a slot that are of this rank, one after the other (see RowAdder).
struct Choices {
  unsigned rest;
  float weight;  // of this lane's choice

  __device__ __forceinline__ bool more() const { return rest != 0; }

  // Its row, counted from the slot's first.
  __device__ __forceinline__ int next(float& factor) {
    const int choice = __ffs(rest) - 1;
    rest &= rest - 1;
    factor = __shfl_sync(0xFFFFFFFF, weight, choice);
    return choice;
  }
};

// The ranks that have experts of a token, one after the other (see RowAdder).
struct Sources {
  int comes_from;  // of this lane's choice, or -1
  int step_tokens;
  int upcoming;

  __device__ __forceinline__ Sources(int comes_from, int step_tokens)
      : comes_from(comes_from), step_tokens(step_tokens), upcoming(next_rank(comes_from, -1)) {}

  __device__ __forceinline__ bool more() const { return upcoming < kMaxExchangeRanks; }

  // The row of its result, counted from that of rank 0.
  __device__ __forceinline__ int next(float& factor) {
    const int rank = upcoming;
    upcoming = next_rank(comes_from, rank);
    factor = 1;
    return rank * step_tokens;
  }
};

// This warp's token of a chunk, and which bytes of its row.
struct Share {
  int token;
  int first;
  int end;

  __device__ __forceinline__ Share(int chunk, int row_bytes) {
    constexpr int kUnit = RowStages::kPieceBytes;
    const int warp = threadIdx.x / 32;
    const int most = (row_bytes + kUnit * kWarpsPerToken - 1) / (kUnit * kWarpsPerToken) * kUnit;
    token = chunk * kChunkTokens + warp / kWarpsPerToken;
    first = warp % kWarpsPerToken * most;
    end = min(first + most, row_bytes);
  }
};

// A warp's share of a slot's weighted sum, to its row at home.
template <typename T>
__device__ __forceinline__ void send_result(const ExchangeState& state, const CombineArgs& args,
                                            RowAdder& adder, std::int64_t slot, const Share& share,
                                            char* to) {
  const ExchangeLayout& layout = state.layout;
  const int lane = threadIdx.x % 32;
  const std::int64_t first_choice = slot * layout.top_k;
  const bool is_choice = lane < layout.top_k;
  const int local = is_choice ? args.slots[first_choice + lane] : -1;
  const float weight = is_choice ? args.weights[first_choice + lane] : 0;
  const unsigned choices = __ballot_sync(0xFFFFFFFF, local >= 0);
  if (choices == 0) return;
  const auto* const y = static_cast<const char*>(args.y);
  if (args.is_summed) {
    const char* const row = y + slot * layout.row_bytes;
    for (int at = share.first + 16 * lane; at < share.end; at += 16 * 32) {
      *reinterpret_cast<uint4*>(to + at) = *reinterpret_cast<const uint4*>(row + at);
    }
    return;
  }
  adder.add_up<T>(y + first_choice * layout.row_bytes, layout.row_bytes, Choices{choices, weight},
                  share.first, share.end, to);
}

// Sums what this rank's experts have made of each token and writes it to the token's rank.
//
// Shapes as in combine_packets_kernel; results at every rank [N * m, H], by the rank whose experts
// made them. A block takes chunks of one rank's tokens after the other.
//
// Example, as for send_rows_kernel: rank 0 writes what expert 0 has made of c to row 0 of the
// results at rank 1, from where on the rows are those of rank 0.
template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
    send_results_kernel(const __grid_constant__ ExchangeState state,
                        const __grid_constant__ CombineArgs args) {
  SharedRows& shared = init_rows();
  wait_for_previous_kernels();
  if (state.next_may_start) let_next_kernel_start();
  const ExchangeLayout& layout = state.layout;
  const std::uint32_t epoch = state.counters[0];
  RowAdder adder(shared.of_warp[threadIdx.x / 32]);
  const int num_chunks = num_step_chunks(args.step_tokens);
  const int num_items = layout.num_ranks * num_chunks;
  const int at_once = chunks_at_once(num_items);
  for (int first = blockIdx.x * at_once; first < num_items; first += gridDim.x * at_once) {
    const int num = min(at_once, num_items - first);
    for (int item = first; item < first + num; ++item) {
      const int home = state.order[item / num_chunks];
      const Share share(item % num_chunks, layout.row_bytes);
      if (share.token >= args.step_tokens) continue;
      const std::int64_t made_here = std::int64_t{state.rank} * args.step_tokens + share.token;
      send_result<T>(
          state, args, adder, std::int64_t{home} * args.step_tokens + share.token, share,
          state.peers.buffers[home] + layout.results_at() + made_here * layout.row_bytes);
    }
    __syncthreads();
    if (threadIdx.x < num) {
      const int item = first + threadIdx.x;
      const int home = state.order[item / num_chunks];
      fence_for_peers();
      store_flag(flag(state, layout.combine_flags_at(), home, state.rank, item % num_chunks),
                 epoch);
    }
  }
}

__device__ __forceinline__ std::uint32_t* all_sent_flag(const ExchangeState& state, int at_rank,
                                                        int source) {
  return flag(state, state.layout.combine_flags_at(), at_rank, source, state.layout.num_chunks());
}

// The first block tells all ranks that this one's kernel before has ended, and waits until each has
// said the same.
__device__ __forceinline__ void tell_all_sent(const ExchangeState& state, std::uint32_t epoch) {
  if (blockIdx.x != 0 || threadIdx.x >= state.layout.num_ranks) return;
  fence_for_peers();
  store_flag(all_sent_flag(state, threadIdx.x, state.rank), epoch);
}

__device__ __forceinline__ void wait_for_all_sent(const ExchangeState& state, std::uint32_t epoch,
                                                  Patience& patience) {
  if (blockIdx.x != 0 || threadIdx.x >= state.layout.num_ranks) return;
  wait_for_flag(all_sent_flag(state, state.rank, threadIdx.x), epoch, patience, threadIdx.x);
}

// Adds up, for each of this rank's tokens, what the ranks of its experts have made of it.
//
// Shapes: ids int32 [num_tokens, K]; out [num_tokens, H], summed over the ranks in their order in
// float32 and rounded once.
//
// Example: of a token with experts at ranks 0 and 2, whose results are 1 and 3, out is 4; that of
// one without an expert is 0.
template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
    receive_results_kernel(const __grid_constant__ ExchangeState state,
                           const __grid_constant__ CombineArgs args) {
  SharedRows& shared = init_rows();
  wait_for_previous_kernels();
  if (state.next_may_start) let_next_kernel_start();
  const ExchangeLayout& layout = state.layout;
  const std::uint32_t epoch = state.counters[0];
  const int lane = threadIdx.x % 32;
  RowAdder adder(shared.of_warp[threadIdx.x / 32]);
  Patience patience(state, epoch, AbortRecord::kCombine);
  tell_all_sent(state, epoch);
  const int num_chunks = num_step_chunks(args.step_tokens);
  const int at_once = chunks_at_once(num_chunks);
  for (int first = blockIdx.x * at_once; first < num_chunks; first += gridDim.x * at_once) {
    const int num = min(at_once, num_chunks - first);
    // Of each chunk's token; they are on their way while others are waited for.
    int comes_from[kMostAtOnce];
#pragma unroll
    for (int i = 0; i < kMostAtOnce; ++i) {
      const Share share(first + i, layout.row_bytes);
      const bool is_real = i < num && share.token < args.num_tokens;
      const std::int32_t* const ids = args.ids + std::int64_t{share.token} * layout.top_k;
      comes_from[i] = is_real ? rank_of_choice(ids, layout.top_k, state.num_local, lane) : -1;
    }
    bool is_here = true;
    for (int i = threadIdx.x; i < layout.num_ranks * num && is_here; i += kThreads) {
      const int from = i / num;
      is_here =
          wait_for_flag(flag(state, layout.combine_flags_at(), state.rank, from, first + i % num),
                        epoch, patience, from);
    }
    if (!__syncthreads_and(is_here)) break;
    async_proxy_fence_global();
#pragma unroll
    for (int i = 0; i < kMostAtOnce; ++i) {
      const Share share(first + i, layout.row_bytes);
      if (i >= num || share.token >= args.num_tokens) break;
      const std::int64_t at = std::int64_t{share.token} * layout.row_bytes;
      adder.add_up<T>(state.peers.buffers[state.rank] + layout.results_at() + at, layout.row_bytes,
                      Sources(comes_from[i], args.step_tokens), share.first, share.end,
                      static_cast<char*>(args.out) + at);
    }
  }
  wait_for_all_sent(state, epoch, patience);
  end_exchange(state, state.counters);
}

template <typename T>
void launch_combine(const ExchangeState& state, const CombineArgs& args, cudaStream_t stream) {
  const auto launch = [&](const char* name, auto* kernel, int num_blocks) {
    CHECK_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    sizeof(SharedRows)));
    launch_dependent(name, kernel, dim3(num_blocks), kThreads, sizeof(SharedRows), stream, 1, state,
                     args);
  };
  const int num_chunks = num_step_chunks(args.step_tokens);
  launch("send_results_kernel", send_results_kernel<T>,
         sending_blocks(state.layout.num_ranks * num_chunks, 2));
  launch("receive_results_kernel", receive_results_kernel<T>,
         std::min(num_chunks, state.num_blocks));
}

}  // namespace

void combine_rows(const ExchangeState& state, const CombineArgs& args, cudaStream_t stream) {
  switch (state.type) {
    case ElementType::kBFloat16:
      return launch_combine<__nv_bfloat16>(state, args, stream);
    case ElementType::kFloat16:
      return launch_combine<__half>(state, args, stream);
    case ElementType::kFloat32:
      return launch_combine<float>(state, args, stream);
  }
}

}  // namespace moe_engine

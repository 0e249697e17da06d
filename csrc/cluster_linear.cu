// A linear layer of more tokens than one tile of the tensor cores has rows, split over its depth.
//
// A block takes some rows of the weight and 512 elements of their depth, all of which fit its
// shared memory: it asks for them before it waits for the kernel that makes x. Then x comes by in
// tiles of 64 tokens, through a ring. The blocks that share a tile of the output, one for each part
// of the depth, form a cluster and add their sums up.
//
// Two warpgroups take turns: one multiplies a tile of tokens while the other exchanges its sums, so
// that only the last exchange takes time of its own. Each block sums an equal share of the columns.
// The others send their sums from registers to its shared memory by stores that count their bytes
// at a barrier there (st.async): one way through the cluster, where sums that are left in one's own
// shared memory for others to read would take a barrier of the cluster and a way there and back.
// A thread's sums go to the thread of the same number, in the order of its registers: a warp writes
// and reads 512 bytes side by side, and no layout has to be changed. In its k-th step, block r
// exchanges with block r ^ k, so that everyone sends and receives all the time.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "cluster_linear.h"
#include "launch.cuh"
#include "ring.cuh"
#include "tensor_map.h"

// For other architectures than Hopper the kernel is empty, and nothing that it calls is used.
#pragma nv_diag_suppress 177

namespace moe_engine {
namespace {

constexpr int kTokens = 64;  // of a tile
constexpr int kAtoms = 8;    // of the depth, in a block
constexpr int kDepth = kAtoms * kAtom;
constexpr int kWarpgroups = 2;
constexpr int kThreads = 128 * kWarpgroups + 32;
constexpr int kStageBytes = kTokens * kAtomBytes;
constexpr int kGroupBytes = 128 * sizeof(float4);  // of the sums of 8 columns of a tile
constexpr int kMaxSharedBytes = 226 * 1024;        // and 1 KiB for the barriers

template <int kColumns_, int kCluster_>
struct Shape {
  static constexpr int kColumns = kColumns_;  // of the output, of a cluster
  static constexpr int kCluster = kCluster_;  // blocks, a power of 2

  static constexpr int kWeightAtomBytes = kColumns * kAtomBytes;
  static constexpr int kWeightBytes = kAtoms * kWeightAtomBytes;
  // Groups of 8 columns, and those that a block sums. If they are too few for all, the last blocks
  // sum none.
  static constexpr int kGroups = kColumns / 8;
  static constexpr int kShare = (kGroups + kCluster - 1) / kCluster;
  static constexpr int kSummingBlocks = kGroups / kShare;
  static_assert(kGroups % kShare == 0);
  static constexpr int kReceivedBytes = (kCluster - 1) * kShare * kGroupBytes;
  static constexpr int kStages =
      std::min(16, (kMaxSharedBytes - 1024 - kWeightBytes - kReceivedBytes) / kStageBytes);
  static constexpr int kSharedBytes = 1024 + kWeightBytes + kReceivedBytes + kStages * kStageBytes;
  static_assert(kStages >= 4);
};

// Of the pairs, the first is of warpgroup 0, whose tiles are 0, 2, ..., the second of warpgroup 1.
template <int kStages>
struct Barriers {
  std::uint64_t weights[kAtoms];
  std::uint64_t full[kStages];
  std::uint64_t empty[kStages];
  std::uint64_t multiplied[kWarpgroups];  // a tile; the other may begin with the next
  std::uint64_t received[kWarpgroups];    // the other blocks' sums of a tile
  std::uint64_t summed[kWarpgroups];      // by all blocks: the place of their sums is free
};

// The n-th stage of x, of which a tile takes kAtoms.
template <typename S>
struct Stage {
  int index;
  int parity;

  __device__ __forceinline__ explicit Stage(int n)
      : index(n % S::kStages), parity(n / S::kStages % 2) {}
};

// One thread.
template <typename S>
__device__ __forceinline__ void load_tokens(std::uint32_t ring, const CUtensorMap* x,
                                            Barriers<S::kStages>& barriers, int num_tiles,
                                            int first_element) {
  for (int n = 0; n < num_tiles * kAtoms; ++n) {
    const Stage<S> stage(n);
    if (n >= S::kStages) barrier_wait(&barriers.empty[stage.index], stage.parity ^ 1);
    barrier_arrive_expecting(&barriers.full[stage.index], kStageBytes);
    copy_box_2d(ring + stage.index * kStageBytes, x, &barriers.full[stage.index],
                first_element + n % kAtoms * kAtom, n / kAtoms * kTokens);
  }
}

// acc = a tile of tokens times the weights.
template <typename S>
__device__ __forceinline__ void multiply(std::uint32_t weights, std::uint32_t ring,
                                         Barriers<S::kStages>& barriers, float* acc, int tile,
                                         int warpgroup, int lane) {
  int previous = 0;
  for (int atom = 0; atom < kAtoms; ++atom) {
    const Stage<S> stage(tile * kAtoms + atom);
    barrier_wait(&barriers.weights[atom], 0);
    barrier_wait(&barriers.full[stage.index], stage.parity);
    const std::uint64_t a = matrix_descriptor(ring + stage.index * kStageBytes);
    const std::uint64_t b = matrix_descriptor(weights + atom * S::kWeightAtomBytes);
    wgmma_begin();
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      wgmma<S::kColumns>(acc, a + 2 * part, b + 2 * part, atom > 0 || part > 0);
    }
    wgmma_commit();
    if (atom > 0) {
      wgmma_wait<1>();
      if (lane == 0) barrier_arrive(&barriers.empty[previous]);
    }
    previous = stage.index;
  }
  // All is under way: the other warpgroup's products queue behind these. It must not look at the
  // stages of its tile before, as a barrier's parity tells only a phase from the next.
  if (lane == 0) barrier_arrive(&barriers.multiplied[warpgroup]);
  wgmma_wait<0>();
  if (lane == 0) barrier_arrive(&barriers.empty[previous]);
}

// Changes the order of the shares, so that the k-th is for block rank ^ k of the cluster, and the
// first this block's own; registers need numbers that the compiler knows.
template <typename S>
__device__ __forceinline__ void order_shares(float* acc, int rank) {
  constexpr int kRegisters = 4 * S::kShare;
#pragma unroll
  for (int bit = 1; bit < S::kCluster; bit *= 2) {
    const bool swap = (rank & bit) != 0;
#pragma unroll
    for (int block = 0; block < S::kCluster; ++block) {
      if ((block & bit) != 0) continue;
#pragma unroll
      for (int i = 0; i < kRegisters; ++i) {
        float& low = acc[block * kRegisters + i];
        float& high = acc[(block | bit) * kRegisters + i];
        const float was_low = low;
        low = swap ? high : low;
        high = swap ? was_low : high;
      }
    }
  }
}

__device__ __forceinline__ float4 group_of(const float* acc, int group) {
  return make_float4(acc[4 * group], acc[4 * group + 1], acc[4 * group + 2], acc[4 * group + 3]);
}

// Sends the others their shares of acc, and adds theirs to the first, this block's, in the order of
// the blocks. Tiles take turns at the place where sums are received.
template <typename S>
__device__ __forceinline__ void exchange(std::uint32_t received, Barriers<S::kStages>& barriers,
                                         float* acc, int tile, bool is_last, int rank,
                                         int warpgroup, int lane) {
  const int thread = threadIdx.x % 128;
  order_shares<S>(acc, rank);
  if (tile > 0) {
    barrier_wait_in_cluster(&barriers.summed[1 - warpgroup], (tile - 1) / kWarpgroups % 2);
  }
#pragma unroll
  for (int k = 1; k < S::kCluster; ++k) {
    if ((rank ^ k) >= S::kSummingBlocks) continue;
#pragma unroll
    for (int group = 0; group < S::kShare; ++group) {
      const int place = (k - 1) * S::kShare + group;
      send_to_block(received + place * kGroupBytes + thread * static_cast<int>(sizeof(float4)),
                    &barriers.received[warpgroup], rank ^ k, group_of(acc, k * S::kShare + group));
    }
  }
  if (rank < S::kSummingBlocks) {
    barrier_wait_in_cluster(&barriers.received[warpgroup], tile / kWarpgroups % 2);
    if (thread == 0) barrier_arrive_expecting(&barriers.received[warpgroup], S::kReceivedBytes);
#pragma unroll
    for (int group = 0; group < S::kShare; ++group) {
      float4 sum{};
#pragma unroll
      for (int block = 0; block < S::kCluster; ++block) {
        const int place = max((rank ^ block) - 1, 0) * S::kShare + group;
        const float4 other =
            load_shared(received + place * kGroupBytes + thread * static_cast<int>(sizeof(float4)));
        const float4 part = block == rank ? group_of(acc, group) : other;
        sum = block == 0
                  ? part
                  : make_float4(sum.x + part.x, sum.y + part.y, sum.z + part.z, sum.w + part.w);
      }
      acc[4 * group] = sum.x;
      acc[4 * group + 1] = sum.y;
      acc[4 * group + 2] = sum.z;
      acc[4 * group + 3] = sum.w;
    }
  }
  // Nobody waits after the last tile, and the others may have ended.
  if (is_last) return;
  __syncwarp();
  if (lane < S::kCluster) barrier_arrive_in_block(&barriers.summed[warpgroup], lane);
}

// Stores this block's share of the columns, 16 bytes a thread. Four lanes hold 8 columns, two each,
// of rows r and r + 8. Of two groups of columns the odd lanes store row r + 8, and the last two of
// the four the second group.
template <typename S>
__device__ __forceinline__ void store(const float* acc, __nv_bfloat16* out, int num_tokens,
                                      int out_features, int first_token, int first_column,
                                      int lane) {
  const bool is_odd = lane % 2 != 0;
  const bool is_second = lane % 4 >= 2;
  const int token = first_token + lane / 4 + (is_odd ? 8 : 0);
#pragma unroll
  for (int first = 0; first < S::kShare; first += 2) {
    std::uint32_t words[2][2] = {};  // of each group: 4 columns of this lane's row
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (first + i >= S::kShare) break;
      const float4 sums = group_of(acc, first + i);
      const std::uint32_t row = pack_bf16(sums.x, sums.y);
      const std::uint32_t other_row = pack_bf16(sums.z, sums.w);
      const std::uint32_t got = __shfl_xor_sync(~0u, is_odd ? row : other_row, 1);
      words[i][0] = is_odd ? got : row;
      words[i][1] = is_odd ? other_row : got;
    }
    const std::uint32_t got[2] = {__shfl_xor_sync(~0u, is_second ? words[0][0] : words[1][0], 2),
                                  __shfl_xor_sync(~0u, is_second ? words[0][1] : words[1][1], 2)};
    const uint4 row = is_second ? make_uint4(got[0], got[1], words[1][0], words[1][1])
                                : make_uint4(words[0][0], words[0][1], got[0], got[1]);
    const int group = first + (is_second ? 1 : 0);
    const int column = first_column + 8 * group;
    if (token < num_tokens && group < S::kShare && column < out_features) {
      *reinterpret_cast<uint4*>(out + std::int64_t{token} * out_features + column) = row;
    }
  }
}

// Block s of cluster c multiplies elements 512 s .. of the depth, of columns kColumns * c .., and
// sums its share of those.
//
// Example: 5120 rows of 2048 elements: 32 clusters of 4 blocks. A block has 160 rows and 512
// elements, 160 KiB of the weight, and a ring of 4 stages of 64 tokens and 64 elements of x. It
// receives, in 30 KiB, three others' sums of 64 tokens and 40 columns.
template <typename S>
__global__ void __launch_bounds__(kThreads, 1)
    cluster_linear_kernel(const __grid_constant__ CUtensorMap weight,
                          const __grid_constant__ CUtensorMap x, __nv_bfloat16* out, int num_tokens,
                          int out_features) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ char shared[];
  __shared__ Barriers<S::kStages> barriers;
  const std::uint32_t weights = shared_address(align_stages(shared));
  const std::uint32_t ring = weights + S::kWeightBytes;
  const std::uint32_t received = ring + S::kStages * kStageBytes;
  const int rank = block_in_cluster();
  const int first_element = rank * kDepth;
  const int first_column = blockIdx.x / S::kCluster * S::kColumns;
  const int num_tiles = (num_tokens + kTokens - 1) / kTokens;
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;

  let_next_kernel_start();
  if (threadIdx.x == 128 * kWarpgroups) {
    prefetch_tensor_map(&weight);
    prefetch_tensor_map(&x);
    for (int atom = 0; atom < kAtoms; ++atom) barrier_init(&barriers.weights[atom], 1);
    for (int stage = 0; stage < S::kStages; ++stage) {
      barrier_init(&barriers.full[stage], 1);
      barrier_init(&barriers.empty[stage], 4);
    }
    for (int warpgroup = 0; warpgroup < kWarpgroups; ++warpgroup) {
      barrier_init(&barriers.multiplied[warpgroup], 4);
      barrier_init(&barriers.received[warpgroup], 1);
      barrier_init(&barriers.summed[warpgroup], 4 * S::kCluster);
    }
    barrier_init_fence();
    for (int atom = 0; atom < kAtoms; ++atom) {
      barrier_arrive_expecting(&barriers.weights[atom], S::kWeightAtomBytes);
      copy_box_2d(weights + atom * S::kWeightAtomBytes, &weight, &barriers.weights[atom],
                  first_element + atom * kAtom, first_column);
    }
    for (std::uint64_t& barrier : barriers.received) {
      barrier_arrive_expecting(&barrier, S::kReceivedBytes);
    }
  }
  __syncthreads();
  if constexpr (S::kCluster > 1) cluster_arrive();
  wait_for_previous_kernels();
  if (warp == 4 * kWarpgroups) {
    if (lane == 0) load_tokens<S>(ring, &x, barriers, num_tiles, first_element);
    __syncwarp();
    if constexpr (S::kCluster > 1) cluster_wait();
    return;
  }

  if constexpr (S::kCluster > 1) cluster_wait();  // the others' barriers are ready
  const int warpgroup = warp / 4;
  float acc[4 * S::kShare * S::kCluster];
  for (int tile = warpgroup; tile < num_tiles; tile += kWarpgroups) {
    if (tile > 0) {
      barrier_wait(&barriers.multiplied[1 - warpgroup], (tile - 1) / kWarpgroups % 2);
    }
    multiply<S>(weights, ring, barriers, acc, tile, warpgroup, lane);
    if constexpr (S::kCluster > 1) {
      exchange<S>(received, barriers, acc, tile, tile + 1 == num_tiles, rank, warpgroup, lane);
    }
    if (rank < S::kSummingBlocks) {
      store<S>(acc, out, num_tokens, out_features, tile * kTokens + warp % 4 * 16,
               first_column + rank * S::kShare * 8, lane);
    }
  }
#else
  __trap();
#endif
}

// Columns of a cluster such that one round of blocks covers the layer; 0 if they are too many.
// Clusters lie within a GPC, and most of those have 16 multiprocessors, whatever the sum of all is.
int columns_per_cluster(int in_features, int out_features) {
  const int cluster_size = in_features / kDepth;
  const int most_clusters = num_multiprocessors() / 16 * 16 / cluster_size;
  if (most_clusters == 0) return 0;
  const int columns = (out_features + most_clusters - 1) / most_clusters;
  for (const int choice : {64, 96, 128, 144, 160}) {
    // Shares of which all have the same number of groups, and no block too many sums to receive.
    const bool is_compiled = cluster_size == 8   ? choice != 96 && choice != 160
                             : cluster_size == 4 ? choice != 144
                                                 : choice == 64 || choice == 160;
    if (is_compiled && columns <= choice) return choice;
  }
  return 0;
}

template <int kColumns, int kCluster>
void launch(const ClusterLinearArgs& args, cudaStream_t stream) {
  using S = Shape<kColumns, kCluster>;
  const auto in_features = static_cast<std::uint64_t>(args.in_features);
  const CUtensorMap weight = bf16_tensor_map(
      args.weight,
      {{in_features, 2, kAtom}, {std::uint64_t(args.out_features), 2 * in_features, kColumns}});
  const CUtensorMap x = bf16_tensor_map(
      args.x,
      {{in_features, 2, kAtom},
       {std::uint64_t(args.num_tokens), 2 * static_cast<std::uint64_t>(args.x_stride), kTokens}});
  CHECK_CUDA(cudaFuncSetAttribute(cluster_linear_kernel<S>,
                                  cudaFuncAttributeMaxDynamicSharedMemorySize, S::kSharedBytes));
  const int num_clusters = (args.out_features + kColumns - 1) / kColumns;
  launch_dependent("cluster_linear_kernel", cluster_linear_kernel<S>, dim3(num_clusters * kCluster),
                   kThreads, S::kSharedBytes, stream, kCluster, weight, x,
                   static_cast<__nv_bfloat16*>(args.out), args.num_tokens, args.out_features);
}

}  // namespace

bool cluster_linear_fits(int in_features, int out_features) {
  const int cluster_size = in_features / kDepth;
  const bool is_cluster =
      cluster_size == 1 || cluster_size == 2 || cluster_size == 4 || cluster_size == 8;
  return is_cluster && in_features % kDepth == 0 && out_features % 8 == 0 &&
         columns_per_cluster(in_features, out_features) > 0;
}

void cluster_linear(const ClusterLinearArgs& args, cudaStream_t stream) {
  if (args.num_tokens == 0) return;
  if (args.num_tokens > kClusterLinearMaxTokens ||
      !cluster_linear_fits(args.in_features, args.out_features)) {
    throw std::invalid_argument("a layer of " + std::to_string(args.out_features) + " x " +
                                std::to_string(args.in_features) + " for " +
                                std::to_string(args.num_tokens) +
                                " tokens does not fit the cluster kernel");
  }
  const int columns = columns_per_cluster(args.in_features, args.out_features);
  switch (args.in_features / kDepth * 1000 + columns) {
    case 1064:
      return launch<64, 1>(args, stream);
    case 1160:
      return launch<160, 1>(args, stream);
    case 2064:
      return launch<64, 2>(args, stream);
    case 2160:
      return launch<160, 2>(args, stream);
    case 4064:
      return launch<64, 4>(args, stream);
    case 4096:
      return launch<96, 4>(args, stream);
    case 4128:
      return launch<128, 4>(args, stream);
    case 4160:
      return launch<160, 4>(args, stream);
    case 8064:
      return launch<64, 8>(args, stream);
    case 8128:
      return launch<128, 8>(args, stream);
    default:
      return launch<144, 8>(args, stream);
  }
}

}  // namespace moe_engine

// Grouped matrix products for a mixture of experts.
//
// The weights are the M side of the tensor cores (64 rows per instruction) and the pairs, few of
// them in decode, the N side, so that a tile fits any number of pairs from 8 up. Blocks are
// persistent and share out the tiles as in expert_tiles.cuh. In each, producer warps keep a ring of
// stages in shared memory full, with the copy engine for weights and h and cp.async for gathered
// rows of x, across the borders of tiles; consumer warpgroups multiply and store. For many pairs
// two blocks form a cluster: they work on two halves of a group and the same rows of the weight, of
// which each loads half for both. Few pairs are sorted by every block for itself (pair_sort.cuh).
//
// gate and up rows alternate in groups of 8 within a tile (the copy engine does that while it
// loads), so that a thread holds the gate and the up value of the same element.
#include <algorithm>

#include "expert_load.cuh"
#include "expert_store.cuh"
#include "grouped_experts.h"
#include "launch.cuh"
#include "pair_sort.cuh"
#include "ring.cuh"
#include "tensor_map.h"

// For other architectures than Hopper the kernel is empty, and nothing that it calls is used.
#pragma nv_diag_suppress 177

namespace moe_engine {
namespace {

constexpr int kMaxSortedTile = 64;  // wider shapes have no shared memory to spare

template <bool kGateUp_, int kWarpgroups_, int kBlocks_, int kTokens_, int kStepAtoms_,
          int kStages_, int kProducerWarps_, int kCluster_>
struct Shape : RingShape<kWarpgroups_, kBlocks_, kTokens_, kStepAtoms_, kStages_, kCluster_,
                         /*kTokensByThreads_=*/kGateUp_> {
  static constexpr bool kGateUp = kGateUp_;
  static constexpr bool kSorts = kTokens_ <= kMaxSortedTile;
  static constexpr int kProducerWarps = kProducerWarps_;
  static constexpr int kLoadedRows = Shape::kRows / kCluster_;  // of the weights, by one block
  static constexpr int kThreads = 32 * (Shape::kConsumerWarps + kProducerWarps_);
  static constexpr bool kMovesRegisters = Shape::kAccumulators > 64;
  // What a warpgroup makes of one pair, in pieces of 16 bytes: 8 consecutive elements.
  static constexpr int kPieces = kBlocks_ * (kGateUp_ ? 4 : 8);
  static constexpr int kStoreBytes = kStoredAtOnce * kPieces * 16;  // of a warpgroup
  static constexpr int kTokenBox =  // pairs that one copy of h takes
      kTokens_ <= 64 ? kTokens_ : (kTokens_ % 64 == 0 ? 64 : 72);
};

struct Nothing {};

template <typename S>
struct SharedTail {
  RingBarriers<S::kStages> barriers;
  TileTable table;
  TileQueue<S> queue;
  std::conditional_t<S::kSorts, SortedPairs, Nothing> sorted;
};

template <typename S>
constexpr int shared_bytes() {
  return 1024 + S::kStages * S::kStageBytes + S::kWarpgroups * S::kStoreBytes +
         static_cast<int>(sizeof(SharedTail<S>));
}

template <typename S>
__device__ __forceinline__ void consume(const GroupedProduct& p, const Ring<S>& ring,
                                        const char* buffer, TileWalk<S> tile, int num_steps) {
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  RingPosition<S::kStages> at;
  float acc[S::kAccumulators] = {};
  Destinations<S> destinations;
  bool more = tile.find();
  if (more) destinations.load(p, tile, lane);
  while (more) {
    TileWalk<S> next = tile;
    Destinations<S> next_destinations;
    const auto look_ahead = [&] {
      more = next.next();
      if (more) next_destinations.load(p, next, lane);
    };
    if (S::kGateUp && S::kCluster == 1 && tile.num_pairs == 0) {
      for (int step = 0; step < min(S::kStages, num_steps); ++step) {
        barrier_wait(&ring.full[at.stage], at.parity);
        release(ring, at.stage, lane);
        at.advance();
      }
      look_ahead();
    } else {
      multiply_narrowly<S>(ring, at, acc, tile.num_pairs, num_steps, warp / 4, lane, look_ahead);
      store<S>(p, tile, acc, destinations, buffer);
    }
    tile = next;
    destinations = next_destinations;
  }
}

// One of the two products of all pairs with their experts' weights. A block walks over tiles, each
// a group of an expert's pairs by S::kRows rows of the expert's weight.
//
// Shapes, kGateUp: weights is gate_up, bfloat16 [num_experts, 2 * intermediate, hidden]; x bfloat16
// [rows, hidden] with a row stride; out is h, bfloat16 [num_pairs, intermediate], whose rows are in
// the order of `pairs`. Else weights is down, bfloat16 [num_experts, hidden, intermediate]; h as
// above; out bfloat16 [num_pairs, hidden], whose rows are numbered as pairs are. offsets int32
// [num_experts + 1] and pairs int32 [num_pairs], or instead expert_ids int32 [num_pairs].
//
// Example: gate_up with hidden 2048 and intermediate 768, tiles of 16 pairs by 64 rows (32 of gate
// and 32 of up). Expert 3 has 40 pairs, in groups of 14, 13 and 13, and expert 5 has 2, one group.
// Each group has 1536 / 64 = 24 tiles, 96 in all: the first 96 of 132 blocks take one each, in
// 2048 / 128 = 16 steps of the depth.
template <typename S>
__global__ void __launch_bounds__(S::kThreads, 1)
    grouped_gemm_kernel(const __grid_constant__ CUtensorMap weights,
                        const __grid_constant__ CUtensorMap h, GroupedProduct p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ char shared[];
  char* const stages = align_stages(shared);
  char* const buffers = stages + S::kStages * S::kStageBytes;
  auto& tail = *reinterpret_cast<SharedTail<S>*>(buffers + S::kWarpgroups * S::kStoreBytes);
  const Ring<S> ring{shared_address(stages), tail.barriers.full, tail.barriers.empty};
  const int warp = threadIdx.x / 32;
  const int num_steps = p.depth / (kAtom * S::kStepAtoms);
  constexpr int kGroup = TileWalk<S>::kGroup;
  TileWalk<S> walk{&tail.table,
                   &tail.queue,
                   p.num_row_tiles,
                   p.num_foreseen,
                   S::kCluster > 1 ? block_in_cluster() : 0,
                   static_cast<int>(blockIdx.x) / S::kCluster,
                   static_cast<int>(gridDim.x) / S::kCluster};

  if (threadIdx.x == 32 * S::kConsumerWarps) {
    prefetch_tensor_map(&weights);
    if constexpr (!S::kGateUp) prefetch_tensor_map(&h);
    for (std::uint64_t& barrier : tail.queue.dealt) barrier_init(&barrier, 1);
    init_ring<S>(tail.barriers, S::kGateUp ? 1 + 32 * S::kProducerWarps : 1);
    if constexpr (S::kGateUp) load_foreseen_weights(ring, &weights, walk, num_steps);
  }
  if constexpr (S::kGateUp) {
    wait_for_previous_kernels();
    let_next_kernel_start();
  }
  // down: gate_up let this kernel start when it could read the groups or ids itself.
  const int num_foreseen_experts = p.num_foreseen / p.num_row_tiles;
  const bool sorts = S::kSorts && p.expert_ids != nullptr;
  if constexpr (S::kSorts) {
    if (sorts) {
      p.pairs = sort_pairs<S::kThreads>(tail.sorted, tail.table, p.expert_ids, p.num_pairs,
                                        p.num_experts, kGroup, num_foreseen_experts);
    }
  }
  if (!sorts) {
    fill_tile_table(tail.table, p.offsets, p.num_experts, kGroup, num_foreseen_experts);
  }
  if constexpr (S::kCluster > 1) cluster_sync();  // nobody writes to barriers that are not ready
  walk.num_tiles = p.num_foreseen + tail.table.groups[p.num_experts] * p.num_row_tiles;

  if (warp >= S::kConsumerWarps) {
    if constexpr (S::kMovesRegisters) give_registers<72>();
    const TileDealer<S> dealer{&tail.queue, p.num_dealt, walk.stride, walk.num_tiles};
    if constexpr (S::kGateUp) {
      produce_gate_up<S>(p, ring, &weights, walk, dealer, num_steps);
    } else if (threadIdx.x == 32 * S::kConsumerWarps) {
      produce_down<S>(ring, &weights, &h, walk, dealer, num_steps);
    }
  } else {
    if constexpr (S::kMovesRegisters) take_registers<216>();
    if constexpr (!S::kGateUp) {
      wait_for_previous_kernels();
      let_next_kernel_start();
    }
    consume<S>(p, ring, buffers + warp / 4 * S::kStoreBytes, walk, num_steps);
  }
  if constexpr (S::kCluster > 1) {
    __syncwarp();
    cluster_sync();  // nobody ends while others still write to it
  }
#else
  __trap();
#endif
}

template <typename S>
void launch(const CUtensorMap& weights, const CUtensorMap& h, GroupedProduct p,
            cudaStream_t stream) {
  static_assert(shared_bytes<S>() <= 227 * 1024);
  CHECK_CUDA(cudaFuncSetAttribute(grouped_gemm_kernel<S>,
                                  cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes<S>()));
  const std::int64_t most_tiles = (p.num_pairs / (S::kTokens * S::kCluster) +
                                   std::min<std::int64_t>(p.num_pairs, p.num_experts)) *
                                  p.num_row_tiles;
  const int clusters =
      static_cast<int>(std::min<std::int64_t>(most_tiles, num_multiprocessors() / S::kCluster));
  // Every block foresees a tile if most experts have pairs and the weights take most of the time.
  if (S::kGateUp && S::kCluster == 1 && clusters == num_multiprocessors() &&
      p.num_pairs >= p.num_experts) {
    p.num_foreseen = std::min(clusters / p.num_row_tiles, p.num_experts) * p.num_row_tiles;
  }
  launch_dependent("grouped_gemm_kernel", grouped_gemm_kernel<S>, dim3(clusters * S::kCluster),
                   S::kThreads, shared_bytes<S>(), stream, S::kCluster, weights, h, p);
}

template <typename S>
void launch_gate_up(const ExpertFfnArgs& args, GroupedProduct p, cudaStream_t stream) {
  const std::uint64_t row_bytes = std::uint64_t{2} * args.hidden;
  const std::uint64_t intermediate = args.intermediate;
  const CUtensorMap weights = bf16_tensor_map(
      args.gate_up, {{std::uint64_t(args.hidden), 2, kAtom},
                     {8, row_bytes, 8},
                     {2, intermediate * row_bytes, 2},
                     {intermediate / 8, 8 * row_bytes, S::kLoadedRows / 16},
                     {std::uint64_t(args.num_experts), 2 * intermediate * row_bytes, 1}});
  p.out = static_cast<__nv_bfloat16*>(args.h);
  p.depth = args.hidden;
  p.num_dealt = args.counters;
  p.out_width = args.intermediate;
  p.num_row_tiles = (2 * args.intermediate + S::kRows - 1) / S::kRows;
  launch<S>(weights, weights, p, stream);
}

template <typename S>
void launch_down(const ExpertFfnArgs& args, GroupedProduct p, cudaStream_t stream) {
  const std::uint64_t row_bytes = std::uint64_t{2} * args.intermediate;
  const std::uint64_t hidden = args.hidden;
  const CUtensorMap weights =
      bf16_tensor_map(args.down, {{std::uint64_t(args.intermediate), 2, kAtom},
                                  {hidden, row_bytes, S::kLoadedRows},
                                  {std::uint64_t(args.num_experts), hidden * row_bytes, 1}});
  const CUtensorMap h =
      bf16_tensor_map(args.h, {{std::uint64_t(args.intermediate), 2, kAtom},
                               {std::uint64_t(args.num_pairs), row_bytes, S::kTokenBox}});
  p.out = static_cast<__nv_bfloat16*>(args.y);
  p.depth = args.intermediate;
  p.num_dealt = args.counters + 1;
  p.out_width = args.hidden;
  p.num_row_tiles = (args.hidden + S::kRows - 1) / S::kRows;
  launch<S>(weights, h, p, stream);
}

// kStages is the number of stages of 128 elements of K; narrower ones are used where K needs it.
template <int kTokens, int kStages>
void launch_narrow(const ExpertFfnArgs& args, const GroupedProduct& p, cudaStream_t stream) {
  if (args.hidden % 128 == 0) {
    launch_gate_up<Shape<true, 1, 1, kTokens, 2, kStages, 1, 1>>(args, p, stream);
  } else {
    launch_gate_up<Shape<true, 1, 1, kTokens, 1, 2 * kStages, 1, 1>>(args, p, stream);
  }
  if (args.intermediate % 128 == 0) {
    launch_down<Shape<false, 1, 1, kTokens, 2, kStages, 1, 1>>(args, p, stream);
  } else {
    launch_down<Shape<false, 1, 1, kTokens, 1, 2 * kStages, 1, 1>>(args, p, stream);
  }
}

template <int kBlocks, int kTokens, int kStages, int kCluster>
void launch_wide(const ExpertFfnArgs& args, const GroupedProduct& p, cudaStream_t stream) {
  launch_gate_up<Shape<true, 2, kBlocks, kTokens, 1, kStages, 4, kCluster>>(args, p, stream);
  launch_down<Shape<false, 2, kBlocks, kTokens, 1, kStages, 4, kCluster>>(args, p, stream);
}

}  // namespace

bool grouped_experts_sort(std::int64_t num_pairs, int num_experts, int tokens_per_tile) {
  return can_sort_pairs(num_pairs, num_experts) && tokens_per_tile <= kMaxSortedTile;
}

void grouped_expert_ffn(const ExpertFfnArgs& args, cudaStream_t stream) {
  if (args.num_experts > kMaxExperts) {
    throw std::invalid_argument("num_experts is " + std::to_string(args.num_experts) +
                                "; the limit is " + std::to_string(kMaxExperts));
  }
  if (args.expert_ids != nullptr &&
      !grouped_experts_sort(args.num_pairs, args.num_experts, args.tokens_per_tile)) {
    throw std::invalid_argument(std::to_string(args.num_pairs) + " pairs of " +
                                std::to_string(args.num_experts) + " experts in tiles of " +
                                std::to_string(args.tokens_per_tile) + " must be sorted before");
  }
  if (args.num_pairs == 0) return;
  GroupedProduct p{};
  p.expert_ids = args.expert_ids;
  p.offsets = args.offsets;
  p.pairs = args.pairs;
  p.x = static_cast<const __nv_bfloat16*>(args.x);
  p.x_stride = args.x_stride;
  p.num_pairs = args.num_pairs;
  p.num_experts = args.num_experts;
  p.top_k = args.top_k;
  switch (args.tokens_per_tile) {
    case 16:
      return launch_narrow<16, 9>(args, p, stream);
    case 32:
      return launch_narrow<32, 8>(args, p, stream);
    case 64:
      return launch_wide<1, 64, 8, 1>(args, p, stream);
    case 128:
      return launch_wide<1, 128, 6, 1>(args, p, stream);
    case 256:
      return launch_wide<2, 144, 4, 2>(args, p, stream);
  }
  throw std::invalid_argument("tokens_per_tile is " + std::to_string(args.tokens_per_tile) +
                              "; it is 16, 32, 64, 128 or 256");
}

}  // namespace moe_engine

// Prefill attention on Hopper's tensor cores.
//
// A block takes 128 rows, 64 for each of two warpgroups: some tokens' query heads of a KV head. It
// walks over the context from its end to its start, 128 tokens at a time. Of four more warps, two
// keep two stages of keys and two of values on their way, page by page, and two load the next
// queries, norm and rotate them. While the scores of the next tokens are computed, a warpgroup
// turns the last ones into weights in its registers, from where they are multiplied by the values;
// and the two warpgroups take turns, so that one's exponentials run beside the other's products.
// Blocks are persistent, and have their next rows loaded while they finish.
//
// Source: Shah et al., "FlashAttention-3", 2024; that what is summed up is only rescaled where the
// maximum has grown by much, from FlashAttention-4.
#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>

#include "launch.cuh"
#include "prefill_attention.h"
#include "prefill_rows.cuh"
#include "prefill_tiles.cuh"
#include "tensor_map.h"

// For other architectures than Hopper the kernel is empty, and nothing that it calls is used.
#pragma nv_diag_suppress 177

namespace moe_engine {
namespace {

// All tiles of this block, 64 rows a warpgroup.
__device__ __forceinline__ void consume(const PrefillProblem& p, Walk walk, Barriers& barriers,
                                        const Buffers& buffers) {
  const int warpgroup = __shfl_sync(0xFFFFFFFF, threadIdx.x / 128, 0);  // known to be uniform
  const int lane = threadIdx.x % 32;
  const int row = warpgroup * 64 + threadIdx.x / 32 % 4 * 16 + lane / 4;
  RingPosition<2> q_at;
  RingPosition<kStages> k_at, v_at;
  const auto release = [&](std::uint64_t* empty) {
    if (lane == 0) barrier_arrive(empty);
  };
  const auto await_keys = [&] { barrier_wait(&barriers.k_full[k_at.stage], k_at.parity); };
  const auto await_values = [&] { barrier_wait(&barriers.v_full[v_at.stage], v_at.parity); };
  const auto release_keys = [&] {
    release(&barriers.k_empty[k_at.stage]);
    k_at.advance();
  };
  const auto release_values = [&] {
    release(&barriers.v_empty[v_at.stage]);
    v_at.advance();
  };

  Item item;
  if (warpgroup == 1) give_turn(0);
  while (walk.next(item)) {
    Softmax softmax;
    float scores[kScores];
    float out[kOutputs];
    std::uint32_t weights[kScores / 2];
    float factor[2];
    const std::uint32_t q = buffers.q(q_at.stage);
    const std::uint32_t my_q = q + warpgroup * 8 * kEightBytes;
    const int first_position = min(item.position(warpgroup * 64), item.span.context_len - 1);

    int step = item.num_steps - 1;
    barrier_wait(&barriers.q_ready[q_at.stage][warpgroup], q_at.parity);
    await_keys();
    wgmma_begin();
    multiply_keys(scores, my_q, buffers.k(k_at.stage));
    wgmma_wait<0>();
    fence_registers<kScores>(scores);
    release_keys();
    mask(scores, item, step, row, lane);
    softmax.weigh(scores, p.scale_log2, factor);
    pack(weights, scores);
    const int num_values = item.span.context_len - step * kTokens;
    if (num_values < kTokens) {
      await_values();
      clear_values(buffers.v(v_at.stage), num_values, warpgroup);
    }

    bool accumulate = false;
    if (step > 0) await_keys();
    for (--step; step >= 0; --step) {
      await_turn(warpgroup);
      wgmma_begin();
      multiply_keys(scores, my_q, buffers.k(k_at.stage));
      await_values();
      multiply_values(out, weights, buffers.v(v_at.stage), accumulate);
      accumulate = true;
      give_turn(1 - warpgroup);
      wgmma_wait<1>();
      fence_registers<kScores>(scores);
      release_keys();
      if (step * kTokens + kTokens - 1 > first_position) mask(scores, item, step, row, lane);
      softmax.weigh(scores, p.scale_log2, factor);
      fence_registers<kScores>(scores);
      // For the next round. Without a branch here the assembler puts all that behind the wait.
      if (step > 0) await_keys();
      wgmma_wait<0>();
      fence_registers<kOutputs>(out);
      release_values();
      if (__any_sync(0xFFFFFFFF, factor[0] != 1.0f || factor[1] != 1.0f)) {
#pragma unroll
        for (int i = 0; i < kOutputs; ++i) out[i] *= factor[i / 2 % 2];
      }
      pack(weights, scores);
    }

    await_values();
    wgmma_begin();
    multiply_values(out, weights, buffers.v(v_at.stage), accumulate);
    wgmma_wait<0>();
    fence_registers<kOutputs>(out);
    release_values();
    store(p, item, out, softmax, q, warpgroup, lane);
    async_proxy_fence();  // what was stored in the queries' place, before they are loaded there
    __syncwarp();
    release(&barriers.q_empty[q_at.stage][warpgroup]);
    q_at.advance();
  }
}

// Grid: any number of blocks, one on a multiprocessor.
//
// Example: 300 tokens at the end of a context of 1000, 32 query heads and 4 KV heads. A tile is 8
// heads of 16 tokens, so there are 19 tiles, the last one of 12 tokens, and four items of each.
// Tile 0 is of positions 700 to 715 and takes 6 steps over the context, tile 18 of positions 988 to
// 999 takes 8. Of 132 blocks, 76 take an item each.
__global__ void __launch_bounds__(kThreads, 1)
    prefill_attention_kernel(const __grid_constant__ Maps maps, const PrefillProblem p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ char shared[];
  char* const aligned = align_stages(shared);
  const Buffers buffers{shared_address(aligned)};
  auto& tail = *reinterpret_cast<Tail*>(aligned + (2 + 2 * kStages) * kTileBytes);
  auto& barriers = tail.barriers;
  const int warp = threadIdx.x / 32;
  if (threadIdx.x == 32 * kConsumerWarps) {
    prefetch_tensor_map(&maps.q);
    prefetch_tensor_map(&maps.k);
    prefetch_tensor_map(&maps.v);
    for (int i = 0; i < 2 * kWarpgroups; ++i) {
      barrier_init(barriers.q_full[0] + i, 1);
      barrier_init(barriers.q_ready[0] + i, 1);
      barrier_init(barriers.q_empty[0] + i, kConsumerWarps / kWarpgroups);
    }
    for (int i = 0; i < kStages; ++i) {
      barrier_init(&barriers.k_full[i], 1);
      barrier_init(&barriers.k_empty[i], kConsumerWarps);
      barrier_init(&barriers.v_full[i], 1);
      barrier_init(&barriers.v_empty[i], kConsumerWarps);
    }
    barrier_init_fence();
  }
  const Walk walk{p, tail.items, *p.num_tiles * (p.num_heads >> p.log2_heads)};
  walk.list(tail.items);
  __syncthreads();
  wait_for_previous_kernels();
  let_next_kernel_start();
  if (warp >= kConsumerWarps) {
    give_registers<104>();
    if (warp == kConsumerWarps) produce<true>(p, walk, barriers, buffers, maps);
    if (warp == kConsumerWarps + 1) produce<false>(p, walk, barriers, buffers, maps);
    if (warp >= kConsumerWarps + 2) {
      produce_queries(p, walk, barriers, buffers, maps, warp - (kConsumerWarps + 2));
    }
  } else {
    take_registers<200>();
    consume(p, walk, barriers, buffers);
  }
#else
  __trap();
#endif
}

// Query heads of a tile.
int heads_of_tile(int num_heads, int num_kv_heads) { return std::gcd(num_heads / num_kv_heads, 8); }

// Queries, [num_rows, num_heads, 128], in boxes of 8 rows of a tile.
CUtensorMap map_of_queries(const PrefillAttentionArgs& args) {
  constexpr std::uint64_t kHeadBytes = 2 * kDim;
  const std::uint64_t row_bytes = 2 * args.q_stride;
  const std::uint64_t num_rows = args.num_rows;
  const std::uint32_t heads = heads_of_tile(args.num_heads, args.num_kv_heads);
  return bf16_tensor_map(args.q, {{64, 2, 64},
                                  {std::uint64_t(args.num_heads), kHeadBytes, heads},
                                  {num_rows, row_bytes, 8 / heads},
                                  {2, kHeadBytes / 2, 2},
                                  {1, num_rows * row_bytes, 1}});
}

// A cache, [num_slots, num_kv_heads, 128], in boxes of a block's tokens of a head.
CUtensorMap map_of_cache(const void* cache, const PrefillAttentionArgs& args) {
  constexpr std::uint64_t kHeadBytes = 2 * kDim;
  const std::uint64_t row_bytes = args.num_kv_heads * kHeadBytes;
  const std::uint32_t box = std::min(args.block_size, kTokens);
  return bf16_tensor_map(cache, {{64, 2, 64},
                                 {8, row_bytes, 8},
                                 {2, kHeadBytes / 2, 2},
                                 {std::uint64_t(args.num_slots) / 8, 8 * row_bytes, box / 8},
                                 {std::uint64_t(args.num_kv_heads), kHeadBytes, 1}});
}

}  // namespace

bool prefill_attention_fits(int num_heads, int num_kv_heads, int head_dim, int block_size) {
  return head_dim == kDim && num_heads % num_kv_heads == 0 && block_size % 8 == 0 &&
         (kTokens % block_size == 0 || block_size % kTokens == 0);
}

void prefill_attention(const PrefillAttentionArgs& args, cudaStream_t stream) {
  if (args.num_slots >= INT32_MAX) {
    throw std::invalid_argument("num_slots is " + std::to_string(args.num_slots) +
                                "; the limit is " + std::to_string(INT32_MAX - 1));
  }
  if (!prefill_attention_fits(args.num_heads, args.num_kv_heads, kDim, args.block_size)) {
    throw std::invalid_argument("no prefill attention for " + std::to_string(args.num_heads) +
                                " query heads, " + std::to_string(args.num_kv_heads) +
                                " KV heads and blocks of " + std::to_string(args.block_size));
  }
  if (args.max_tiles == 0) return;
  const Maps maps{map_of_queries(args), map_of_cache(args.k_cache, args),
                  map_of_cache(args.v_cache, args)};
  PrefillProblem p{};
  p.spans = args.spans;
  p.tiles = args.tiles;
  p.num_tiles = args.num_tiles;
  p.block_tables = args.block_tables;
  p.block_tables_stride = args.block_tables_stride;
  p.q_weight = static_cast<const __nv_bfloat16*>(args.q_weight);
  p.cos = args.cos;
  p.sin = args.sin;
  p.eps = args.eps;
  p.out = static_cast<__nv_bfloat16*>(args.out);
  p.scale_log2 = args.scale * 1.44269504f;
  const int heads = heads_of_tile(args.num_heads, args.num_kv_heads);
  while (1 << p.log2_heads < heads) ++p.log2_heads;
  p.num_heads = args.num_heads;
  p.num_kv_heads = args.num_kv_heads;
  p.block_size = args.block_size;
  p.num_slots = static_cast<int>(args.num_slots);
  CHECK_CUDA(cudaFuncSetAttribute(prefill_attention_kernel,
                                  cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
  const int blocks = std::min(args.max_tiles * (args.num_heads / heads), num_multiprocessors());
  launch_dependent("prefill_attention_kernel", prefill_attention_kernel, dim3(blocks), kThreads,
                   kSharedBytes, stream, /*cluster_size=*/1, maps, p);
}

}  // namespace moe_engine

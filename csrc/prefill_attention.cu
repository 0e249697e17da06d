// Prefill attention on Hopper's tensor cores.
//
// A block takes 128 rows of a query head, 64 for each of two warpgroups, and walks over the context
// from its end to its start, 128 tokens at a time. One more warp keeps two stages of keys and two of
// values on their way, page by page. While the scores of the next tokens are computed, a warpgroup
// turns the last ones into weights in its registers, from where they are multiplied by the values;
// and the two warpgroups take turns, so that one's exponentials run beside the other's products.
// Two blocks form a cluster where two query heads share a KV head: each loads half of the tokens for
// both. Blocks are persistent, and have their next rows loaded while they finish.
//
// Source: Shah et al., "FlashAttention-3", 2024.
#include "prefill_attention.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "hopper.cuh"
#include "launch.cuh"
#include "ring.cuh"
#include "tensor_map.h"

// For other architectures than Hopper the kernel is empty, and nothing that it calls is used.
#pragma nv_diag_suppress 177

namespace moe_engine {
namespace {

constexpr int kDim = 128;     // of a head
constexpr int kTokens = 128;  // of the context, in a stage
constexpr int kWarpgroups = 2;
constexpr int kConsumerWarps = 4 * kWarpgroups;
constexpr int kThreads = 32 * (kConsumerWarps + 4);  // registers move between warpgroups only
constexpr int kStages = 2;
// Rows of 128 elements are two columns of 64, one after the other.
constexpr int kColumnBytes = 128 * kAtomBytes;
constexpr int kTileBytes = 2 * kColumnBytes;  // of queries, keys or values
constexpr int kSharedBytes = 1024 + 6 * kTileBytes + 256;
constexpr int kScores = kTokens / 2;  // registers of a thread
constexpr int kOutputs = kDim / 2;

struct Tiles {
  PrefillSpan spans[kPrefillMaxSpans];
  std::uint32_t order[kPrefillMaxTiles];
};

struct Problem {
  const std::int32_t* block_tables;
  std::int64_t block_tables_stride;
  __nv_bfloat16* out;
  float scale_log2;  // of the scores, whose exponentials are powers of 2
  int num_tiles;
  int num_heads;
  int num_kv_heads;
  int block_size;
  int num_slots;
};

struct Barriers {
  std::uint64_t q_full[2], q_empty[2];
  std::uint64_t k_full[kStages], k_empty[kStages];
  std::uint64_t v_full[kStages], v_empty[kStages];
};

struct Buffers {
  std::uint32_t base;
  __device__ __forceinline__ std::uint32_t q(int i) const { return base + i * kTileBytes; }
  __device__ __forceinline__ std::uint32_t k(int i) const { return base + (2 + i) * kTileBytes; }
  __device__ __forceinline__ std::uint32_t v(int i) const { return base + (4 + i) * kTileBytes; }
};

// 128 rows of a span and a query head.
struct Item {
  PrefillSpan span;
  int first_row;  // in the span
  int head;
  int num_steps;  // over the context

  __device__ __forceinline__ int position(int row) const {
    return span.context_len - span.query_len + first_row + row;
  }
};

// The items of a cluster: there and back over the clusters, so that all get as much work when items
// come in order of their lengths.
struct Walk {
  const Tiles& tiles;
  int num_items;
  int heads_per_item;  // blocks of a cluster
  int head_groups;
  int rank;
  int cluster;
  int num_clusters;
  int round = 0;

  __device__ __forceinline__ bool next(Item& item) {
    const int in_round = round % 2 == 0 ? cluster : num_clusters - 1 - cluster;
    const int number = round * num_clusters + in_round;
    ++round;
    if (number >= num_items) return false;
    const std::uint32_t tile = tiles.order[number / head_groups];
    item.span = tiles.spans[tile >> 16];
    item.first_row = static_cast<int>(tile & 0xFFFF) * kPrefillTile;
    item.head = number % head_groups * heads_per_item + rank;
    const int rows = min(kPrefillTile, item.span.query_len - item.first_row);
    item.num_steps = (item.position(rows - 1) + kTokens) / kTokens;
    return true;
  }
};

// One warp: queries, keys and values of all items.
template <int kCluster>
__device__ __forceinline__ void produce(const Problem& p, Walk walk, Barriers& barriers,
                                        const Buffers& buffers, const CUtensorMap* q_map,
                                        const CUtensorMap* k_map, const CUtensorMap* v_map) {
  constexpr int kLoaded = kTokens / kCluster;  // tokens that this block loads
  constexpr std::uint16_t kAll = (1 << kCluster) - 1;
  const int lane = threadIdx.x % 32;
  const int box = min(p.block_size, kLoaded);  // tokens of a copy
  const int num_copies = 2 * (kLoaded / box);
  // Of a lane: a column of the tokens from here on.
  const int column = lane % 2;
  const int token = walk.rank * kLoaded + lane / 2 * box;
  const std::uint32_t offset = column * kColumnBytes + token * kAtomBytes;
  RingPosition<2> q_at;
  RingPosition<kStages> at;
  Item item;
  while (walk.next(item)) {
    barrier_wait(&barriers.q_empty[q_at.stage], q_at.parity ^ 1);
    if (lane == 0) {
      barrier_arrive_expecting(&barriers.q_full[q_at.stage], kTileBytes);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        copy_box_3d(buffers.q(q_at.stage) + half * kColumnBytes, q_map,
                    &barriers.q_full[q_at.stage], kEvictFirst, 64 * half, item.head,
                    item.span.first_row + item.first_row);
      }
    }
    q_at.advance();
    const int kv_head = item.head / (p.num_heads / p.num_kv_heads);
    const std::int32_t* table = p.block_tables + item.span.table_row * p.block_tables_stride;
    // Tokens past the context read as zeros: their slot lies outside the cache.
    const auto find_slot = [&](int step) {
      const int position = step * kTokens + token;
      if (lane >= num_copies || step < 0 || position >= item.span.context_len) return p.num_slots;
      return table[position / p.block_size] * p.block_size + position % p.block_size;
    };
    int slot = find_slot(item.num_steps - 1);
    for (int step = item.num_steps - 1; step >= 0; --step) {
      const int next_slot = find_slot(step - 1);
      const auto load = [&](std::uint64_t* full, std::uint64_t* empty, std::uint32_t to,
                            const CUtensorMap* map) {
        barrier_wait(&empty[at.stage], at.parity ^ 1);
        if (lane == 0) barrier_arrive_expecting(&full[at.stage], kTileBytes);
        __syncwarp();
        if (lane < num_copies) {
          if constexpr (kCluster > 1) {
            multicast_box_3d(to + offset, map, &full[at.stage], kAll, kEvictNormal, 64 * column,
                             kv_head, slot);
          } else {
            copy_box_3d(to + offset, map, &full[at.stage], kEvictNormal, 64 * column, kv_head,
                        slot);
          }
        }
      };
      load(barriers.k_full, barriers.k_empty, buffers.k(at.stage), k_map);
      load(barriers.v_full, barriers.v_empty, buffers.v(at.stage), v_map);
      at.advance();
      slot = next_slot;
    }
  }
}

// What a thread knows of its two rows, r = lane / 4 and r + 8 of its warp's 16.
struct Softmax {
  float most[2] = {-INFINITY, -INFINITY};  // of the scores so far, unscaled
  float sum[2] = {};                       // of this thread's columns

  // Turns scores into weights, and gives the factors of what was summed up before.
  __device__ __forceinline__ void weigh(float* scores, float scale_log2, float (&factor)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float top = most[i];
#pragma unroll
      for (int j = 0; j < kScores; j += 4) {
        top = fmaxf(top, fmaxf(scores[j + 2 * i], scores[j + 2 * i + 1]));
      }
      top = fmaxf(top, __shfl_xor_sync(0xFFFFFFFF, top, 1));
      top = fmaxf(top, __shfl_xor_sync(0xFFFFFFFF, top, 2));
      const float base = top == -INFINITY ? 0.0f : top * scale_log2;
      factor[i] = exp2f(most[i] * scale_log2 - base);
      most[i] = top;
      float added = 0.0f;
#pragma unroll
      for (int j = 0; j < kScores; j += 4) {
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          float& score = scores[j + 2 * i + k];
          asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(score) : "f"(fmaf(score, scale_log2, -base)));
          added += score;
        }
      }
      sum[i] = fmaf(sum[i], factor[i], added);
    }
  }

  // 1 / sum of all columns; 0 for a row without any.
  __device__ __forceinline__ float inverse(int i) {
    float total = sum[i];
    total += __shfl_xor_sync(0xFFFFFFFF, total, 1);
    total += __shfl_xor_sync(0xFFFFFFFF, total, 2);
    return total > 0.0f ? 1.0f / total : 0.0f;
  }
};

// scores = queries x keys^T; committed, not awaited.
__device__ __forceinline__ void multiply_keys(float* scores, std::uint32_t q, std::uint32_t k) {
  const std::uint64_t a = matrix_descriptor(q);
  const std::uint64_t b = matrix_descriptor(k);
#pragma unroll
  for (int part = 0; part < kDim / 16; ++part) {
    const int offset = part / 4 * (kColumnBytes / 16) + part % 4 * 2;
    wgmma<kTokens>(scores, a + offset, b + offset, part > 0);
  }
  wgmma_commit();
}

// out = (accumulate ? out : 0) + weights x values; committed, not awaited.
__device__ __forceinline__ void multiply_values(float* out, const std::uint32_t* weights,
                                                std::uint32_t v, bool accumulate) {
  const std::uint64_t b = transposed_descriptor(v, kColumnBytes);
#pragma unroll
  for (int part = 0; part < kTokens / 16; ++part) {
    wgmma_transposed<kDim>(out, weights + 4 * part, b + part * (16 * kAtomBytes / 16),
                           accumulate || part > 0);
  }
  wgmma_commit();
}

// The scores of a step whose tokens come after the row's position, or after the context.
__device__ __forceinline__ void mask(float* scores, const Item& item, int step, int row, int lane) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int last = min(item.position(row + 8 * i), item.span.context_len - 1) - step * kTokens;
#pragma unroll
    for (int j = 0; j < kScores; j += 4) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        if (2 * j + 2 * (lane % 4) + k > last) scores[j + 2 * i + k] = -INFINITY;
      }
    }
  }
}

__device__ __forceinline__ void pack(std::uint32_t* weights, const float* scores) {
#pragma unroll
  for (int i = 0; i < kScores / 2; ++i) weights[i] = pack_bf16(scores[2 * i], scores[2 * i + 1]);
}

// Zeros for the values past the context, of which a page may hold anything: 0 x NaN is NaN. Every
// warpgroup does this for itself, although it is the same memory.
__device__ __forceinline__ void clear_values(std::uint32_t v, int first_token, int warpgroup) {
  const int thread = threadIdx.x % 128;
  for (int i = thread; i < (kTokens - first_token) * 16; i += 128) {
    const std::uint32_t to =
        v + i % 2 * kColumnBytes + (first_token + i / 16) * kAtomBytes + i / 2 % 8 * 16;
    asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(to), "r"(0) : "memory");
  }
  async_proxy_fence();
  sync_warpgroup(warpgroup);
}

// The warpgroups take turns with the tensor cores.
__device__ __forceinline__ void await_turn(int warpgroup) {
  asm volatile("bar.sync %0, 256;" ::"r"(3 + warpgroup) : "memory");
}
__device__ __forceinline__ void give_turn(int warpgroup) {
  asm volatile("bar.arrive %0, 256;" ::"r"(3 + warpgroup) : "memory");
}

// Through the shared memory of the rows' queries, which nobody needs any more.
__device__ __forceinline__ void store(const Problem& p, const Item& item, const float* out,
                                      Softmax& softmax, std::uint32_t q, int warpgroup, int lane) {
  const int row = warpgroup * 64 + threadIdx.x / 32 % 4 * 16;  // the warp's first
  const float factors[2] = {softmax.inverse(0), softmax.inverse(1)};
  sync_warpgroup(warpgroup);  // all have read the queries
  const int my_row = row + lane % 16;
#pragma unroll
  for (int j = 0; j < kDim / 8; j += 2) {
    const float* d = out + 4 * j;
    const int chunk = j + lane / 16;
    store_matrices_x4(
        q + chunk / 8 * kColumnBytes + my_row * kAtomBytes + (chunk % 8 ^ my_row % 8) * 16,
        pack_bf16(d[0] * factors[0], d[1] * factors[0]),
        pack_bf16(d[2] * factors[1], d[3] * factors[1]),
        pack_bf16(d[4] * factors[0], d[5] * factors[0]),
        pack_bf16(d[6] * factors[1], d[7] * factors[1]));
  }
  __syncwarp();
  const int chunk = lane % 16;
#pragma unroll
  for (int i = 0; i < 16; i += 2) {
    const int at = row + i + lane / 16;
    const std::uint32_t from =
        q + chunk / 8 * kColumnBytes + at * kAtomBytes + (chunk % 8 ^ at % 8) * 16;
    uint4 piece;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(piece.x), "=r"(piece.y), "=r"(piece.z), "=r"(piece.w)
                 : "r"(from)
                 : "memory");
    if (item.first_row + at < item.span.query_len) {
      const std::int64_t to = item.span.first_row + item.first_row + at;
      *reinterpret_cast<uint4*>(p.out + (to * p.num_heads + item.head) * kDim + 8 * chunk) = piece;
    }
  }
}

template <int kCluster>
__device__ __forceinline__ void consume(const Problem& p, Walk walk, Barriers& barriers,
                                        const Buffers& buffers) {
  const int warpgroup = __shfl_sync(0xFFFFFFFF, threadIdx.x / 128, 0);  // known to be uniform
  const int lane = threadIdx.x % 32;
  const int row = warpgroup * 64 + threadIdx.x / 32 % 4 * 16 + lane / 4;
  const auto release = [&](std::uint64_t* empty) {
    if constexpr (kCluster > 1) {
      if (lane < kCluster) barrier_arrive_in_block(empty, lane);
    } else {
      if (lane == 0) barrier_arrive(empty);
    }
  };
  RingPosition<2> q_at;
  RingPosition<kStages> k_at, v_at;
  Item item;
  if (warpgroup == 1) give_turn(0);
  while (walk.next(item)) {
    Softmax softmax;
    float scores[kScores];
    float out[kOutputs];
    std::uint32_t weights[kScores / 2];
    float factor[2];
    const std::uint32_t q = buffers.q(q_at.stage);
    const std::uint32_t my_q = q + warpgroup * 64 * kAtomBytes;
    const int first_position = min(item.position(warpgroup * 64), item.span.context_len - 1);
    int step = item.num_steps - 1;
    barrier_wait(&barriers.q_full[q_at.stage], q_at.parity);
    barrier_wait(&barriers.k_full[k_at.stage], k_at.parity);
    wgmma_begin();
    multiply_keys(scores, my_q, buffers.k(k_at.stage));
    wgmma_wait<0>();
    fence_registers<kScores>(scores);
    release(&barriers.k_empty[k_at.stage]);
    k_at.advance();
    mask(scores, item, step, row, lane);
    softmax.weigh(scores, p.scale_log2, factor);
    pack(weights, scores);
    const int num_values = item.span.context_len - step * kTokens;
    if (num_values < kTokens) {
      barrier_wait(&barriers.v_full[v_at.stage], v_at.parity);
      clear_values(buffers.v(v_at.stage), num_values, warpgroup);
    }
    bool accumulate = false;
    if (step > 0) barrier_wait(&barriers.k_full[k_at.stage], k_at.parity);
    for (--step; step >= 0; --step) {
      await_turn(warpgroup);
      wgmma_begin();
      multiply_keys(scores, my_q, buffers.k(k_at.stage));
      barrier_wait(&barriers.v_full[v_at.stage], v_at.parity);
      multiply_values(out, weights, buffers.v(v_at.stage), accumulate);
      accumulate = true;
      give_turn(1 - warpgroup);
      wgmma_wait<1>();
      fence_registers<kScores>(scores);
      release(&barriers.k_empty[k_at.stage]);
      k_at.advance();
      if (step * kTokens + kTokens - 1 > first_position) mask(scores, item, step, row, lane);
      softmax.weigh(scores, p.scale_log2, factor);
      fence_registers<kScores>(scores);
      // For the next round. Without a branch here the assembler puts all that behind the wait.
      if (step > 0) barrier_wait(&barriers.k_full[k_at.stage], k_at.parity);
      wgmma_wait<0>();
      fence_registers<kOutputs>(out);
      release(&barriers.v_empty[v_at.stage]);
      v_at.advance();
#pragma unroll
      for (int i = 0; i < kOutputs; ++i) out[i] *= factor[i / 2 % 2];
      pack(weights, scores);
    }
    barrier_wait(&barriers.v_full[v_at.stage], v_at.parity);
    wgmma_begin();
    multiply_values(out, weights, buffers.v(v_at.stage), accumulate);
    wgmma_wait<0>();
    fence_registers<kOutputs>(out);
    release(&barriers.v_empty[v_at.stage]);
    v_at.advance();
    store(p, item, out, softmax, q, warpgroup, lane);
    async_proxy_fence();
    __syncwarp();
    if (lane == 0) barrier_arrive(&barriers.q_empty[q_at.stage]);
    q_at.advance();
  }
}

// Grid: clusters of kCluster blocks, which share KV heads; any number of them.
//
// Example: 300 rows at the end of a context of 1000 tokens are tiles of 128, 128 and 44 rows, which
// attend to 8 steps each, from 1000 on (tile 2), 956 (tile 1) and 828 (7 steps). With 32 query
// heads and clusters of 2 there are 48 items, and as many clusters take one each.
template <int kCluster>
__global__ void __launch_bounds__(kThreads, 1)
    prefill_attention_kernel(const __grid_constant__ CUtensorMap q_map,
                             const __grid_constant__ CUtensorMap k_map,
                             const __grid_constant__ CUtensorMap v_map,
                             const __grid_constant__ Tiles tiles, const Problem p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ char shared[];
  char* const aligned = align_stages(shared);
  const Buffers buffers{shared_address(aligned)};
  auto& barriers = *reinterpret_cast<Barriers*>(aligned + 6 * kTileBytes);
  if (threadIdx.x == 32 * kConsumerWarps) {
    prefetch_tensor_map(&q_map);
    prefetch_tensor_map(&k_map);
    prefetch_tensor_map(&v_map);
    for (int i = 0; i < 2; ++i) {
      barrier_init(&barriers.q_full[i], 1);
      barrier_init(&barriers.q_empty[i], kConsumerWarps);
      barrier_init(&barriers.k_full[i], 1);
      barrier_init(&barriers.k_empty[i], kConsumerWarps * kCluster);
      barrier_init(&barriers.v_full[i], 1);
      barrier_init(&barriers.v_empty[i], kConsumerWarps * kCluster);
    }
    barrier_init_fence();
  }
  __syncthreads();
  if constexpr (kCluster > 1) cluster_sync();  // nobody writes to barriers that are not ready
  wait_for_previous_kernels();
  let_next_kernel_start();
  const int head_groups = p.num_heads / kCluster;
  const Walk walk{tiles,
                  p.num_tiles * head_groups,
                  kCluster,
                  head_groups,
                  kCluster > 1 ? block_in_cluster() : 0,
                  static_cast<int>(blockIdx.x) / kCluster,
                  static_cast<int>(gridDim.x) / kCluster};
  if (threadIdx.x >= 32 * kConsumerWarps) {
    give_registers<40>();
    if (threadIdx.x < 32 * (kConsumerWarps + 1)) {
      produce<kCluster>(p, walk, barriers, buffers, &q_map, &k_map, &v_map);
    }
  } else {
    take_registers<232>();
    consume<kCluster>(p, walk, barriers, buffers);
  }
  if constexpr (kCluster > 1) {
    __syncwarp();
    cluster_sync();  // nobody ends while others still write to it
  }
#else
  __trap();
#endif
}

template <int kCluster>
void launch(const PrefillAttentionArgs& args, cudaStream_t stream) {
  constexpr std::uint64_t kHeadBytes = 2 * kDim;
  const auto map_of = [](const void* data, int num_heads, std::int64_t num_rows, int box) {
    return bf16_tensor_map(data, {{kDim, 2, kAtom},
                                  {std::uint64_t(num_heads), kHeadBytes, 1},
                                  {std::uint64_t(num_rows), num_heads * kHeadBytes,
                                   static_cast<std::uint32_t>(box)}});
  };
  const int box = std::min(args.block_size, kTokens / kCluster);
  const CUtensorMap q = map_of(args.q, args.num_heads, args.num_rows, kPrefillTile);
  const CUtensorMap k = map_of(args.k_cache, args.num_kv_heads, args.num_slots, box);
  const CUtensorMap v = map_of(args.v_cache, args.num_kv_heads, args.num_slots, box);
  Tiles tiles;
  std::memcpy(tiles.spans, args.spans, args.num_spans * sizeof(PrefillSpan));
  std::memcpy(tiles.order, args.tiles, args.num_tiles * sizeof(std::uint32_t));
  Problem p{};
  p.block_tables = args.block_tables;
  p.block_tables_stride = args.block_tables_stride;
  p.out = static_cast<__nv_bfloat16*>(args.out);
  p.scale_log2 = args.scale * 1.44269504f;
  p.num_tiles = args.num_tiles;
  p.num_heads = args.num_heads;
  p.num_kv_heads = args.num_kv_heads;
  p.block_size = args.block_size;
  p.num_slots = static_cast<int>(args.num_slots);
  CHECK_CUDA(cudaFuncSetAttribute(prefill_attention_kernel<kCluster>,
                                  cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
  const int clusters =
      std::min(args.num_tiles * (args.num_heads / kCluster), num_multiprocessors() / kCluster);
  launch_dependent("prefill_attention_kernel", prefill_attention_kernel<kCluster>,
                   dim3(clusters * kCluster), kThreads, kSharedBytes, stream, kCluster, q, k, v,
                   tiles, p);
}

}  // namespace

bool prefill_attention_fits(int num_heads, int num_kv_heads, int head_dim, int block_size) {
  return head_dim == kDim && num_heads % num_kv_heads == 0 && block_size % 8 == 0 &&
         (kAtom % block_size == 0 || block_size % kTokens == 0);
}

void prefill_attention(const PrefillAttentionArgs& args, cudaStream_t stream) {
  const auto refuse = [](const std::string& what, std::int64_t value, std::int64_t limit) {
    throw std::invalid_argument(what + " is " + std::to_string(value) + "; the limit is " +
                                std::to_string(limit));
  };
  if (args.num_spans > kPrefillMaxSpans) refuse("num_spans", args.num_spans, kPrefillMaxSpans);
  if (args.num_tiles > kPrefillMaxTiles) refuse("num_tiles", args.num_tiles, kPrefillMaxTiles);
  if (args.num_slots >= INT32_MAX) refuse("num_slots", args.num_slots, INT32_MAX - 1);
  if (!prefill_attention_fits(args.num_heads, args.num_kv_heads, kDim, args.block_size)) {
    throw std::invalid_argument("no prefill attention of " + std::to_string(args.num_heads) +
                                " query heads, " + std::to_string(args.num_kv_heads) +
                                " KV heads and blocks of " + std::to_string(args.block_size));
  }
  if (args.num_tiles == 0) return;
  if (args.num_heads / args.num_kv_heads % 2 == 0) {
    launch<2>(args, stream);
  } else {
    launch<1>(args, stream);
  }
}

}  // namespace moe_engine

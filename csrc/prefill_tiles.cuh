// How the blocks of prefill attention share out its tiles, load what these need, and prepare the
// queries.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "hopper.cuh"
#include "prefill_attention.h"
#include "prepared_head.cuh"
#include "ring.cuh"

namespace moe_engine {

constexpr int kTokens = 128;  // of the context, in a stage
constexpr int kWarpgroups = 2;
constexpr int kConsumerWarps = 4 * kWarpgroups;
constexpr int kThreads = 32 * (kConsumerWarps + 4);  // registers move between warpgroups only
constexpr int kStages = 2;
// Rows of 128 elements are two halves of 64. Eight rows' first halves are followed by their second
// halves, and these by the next eight rows, so that a copy brings any multiple of 8 whole rows.
constexpr int kHalfBytes = 8 * kAtomBytes;
constexpr int kEightBytes = 2 * kHalfBytes;
constexpr int kTileBytes = 128 / 8 * kEightBytes;  // of queries, keys or values

constexpr int kListed = 128;  // items of a block that it looks up beforehand

struct PrefillProblem {
  const PrefillSpan* spans;
  const std::uint32_t* tiles;
  const std::int32_t* num_tiles;
  const std::int32_t* block_tables;
  std::int64_t block_tables_stride;
  const __nv_bfloat16* q_weight;
  const float* cos;
  const float* sin;
  __nv_bfloat16* out;
  float eps;
  float scale_log2;  // of the scores, whose exponentials are powers of 2
  int log2_heads;    // query heads of a tile
  int num_heads;
  int num_kv_heads;
  int block_size;
  int num_slots;
};

struct Maps {
  CUtensorMap q, k, v;
};

struct Barriers {
  std::uint64_t q_full[2][2], q_ready[2][2], q_empty[2][2];  // [buffer][warpgroup]
  std::uint64_t k_full[kStages], k_empty[kStages];
  std::uint64_t v_full[kStages], v_empty[kStages];
};

// Shared addresses.
struct Buffers {
  std::uint32_t base;
  __device__ __forceinline__ std::uint32_t q(int i) const { return base + i * kTileBytes; }
  __device__ __forceinline__ std::uint32_t k(int stage) const { return q(2 + stage); }
  __device__ __forceinline__ std::uint32_t v(int stage) const { return k(kStages + stage); }
};

// Of 16 bytes, chunk 0 to 15 of a row, in a tile.
__device__ __forceinline__ std::uint32_t chunk_offset(int row, int chunk) {
  return row / 8 * kEightBytes + chunk / 8 * kHalfBytes + row % 8 * kAtomBytes +
         (chunk % 8 ^ row % 8) * 16;
}

// A tile of a span and some query heads of a KV head. Row r is of head first_head + r % heads and
// of the span's token first_token + r / heads, where heads is 1 << log2_heads.
struct Item {
  PrefillSpan span;
  int first_head;
  int first_token;
  int num_steps;  // over the context
  int log2_heads;

  __device__ __forceinline__ int token(int row) const { return first_token + (row >> log2_heads); }
  __device__ __forceinline__ int position(int row) const {
    return span.context_len - span.query_len + token(row);
  }
  __device__ __forceinline__ int head(int row) const {
    return first_head + (row & ((1 << log2_heads) - 1));
  }
};

// Behind the stages in shared memory. To look up an item takes reads of device memory one after the
// other, which nobody waits for where they are done before the kernel's turn comes.
struct Tail {
  Item items[kListed];
  Barriers barriers;
};

constexpr int kSharedBytes = 1024 + (2 + 2 * kStages) * kTileBytes + static_cast<int>(sizeof(Tail));

// The items of a block: there and back over the blocks, so that all get as much work when items
// come in the order of their lengths.
struct Walk {
  const PrefillProblem& p;
  const Item* listed;
  int num_items;  // of all blocks
  int round = 0;

  // This block's item of a round, if there is one.
  __device__ __forceinline__ bool find(int its_round, Item& item) const {
    const int blocks = gridDim.x;
    const int block = blockIdx.x;
    const int number = its_round * blocks + (its_round % 2 == 0 ? block : blocks - 1 - block);
    if (number >= num_items) return false;
    const int items_of_tile = p.num_heads >> p.log2_heads;
    const std::uint32_t tile = p.tiles[number / items_of_tile];
    item.span = p.spans[tile >> 16];
    item.log2_heads = p.log2_heads;
    item.first_head = number % items_of_tile << p.log2_heads;
    const int tokens = kPrefillRows >> p.log2_heads;
    item.first_token = static_cast<int>(tile & 0xFFFF) * tokens;
    const int last = min(item.position(kPrefillRows - 1), item.span.context_len - 1);
    item.num_steps = last / kTokens + 1;
    return true;
  }

  // The first kListed items, by all threads; num_steps is 0 behind the last.
  __device__ __forceinline__ void list(Item* items) const {
    for (int i = threadIdx.x; i < kListed; i += kThreads) {
      Item item;
      if (!find(i, item)) item.num_steps = 0;
      items[i] = item;
    }
  }

  __device__ __forceinline__ bool next(Item& item) {
    if (round >= kListed) return find(round++, item);
    item = listed[round++];
    item.log2_heads = p.log2_heads;  // no register for what is a parameter
    return item.num_steps > 0;
  }
};

// One warp: the keys of all items, or their values.
template <bool kKeys>
__device__ __forceinline__ void produce(const PrefillProblem& p, Walk walk, Barriers& barriers,
                                        const Buffers& buffers, const Maps& maps) {
  const int lane = threadIdx.x % 32;
  const int box = min(p.block_size, kTokens);  // tokens of a copy
  const int token = lane * box;                // this lane's first of a stage
  RingPosition<kStages> at;
  Item item;
  while (walk.next(item)) {
    const int kv_head = item.first_head / (p.num_heads / p.num_kv_heads);
    const std::int32_t* table = p.block_tables + item.span.table_row * p.block_tables_stride;
    // Tokens past the context read as zeros: their slot lies outside the cache.
    const auto find_slot = [&](int step) {
      const int position = step * kTokens + token;
      if (token >= kTokens || step < 0 || position >= item.span.context_len) return p.num_slots;
      return table[position / p.block_size] * p.block_size + position % p.block_size;
    };
    int slot = find_slot(item.num_steps - 1);
    for (int step = item.num_steps - 1; step >= 0; --step) {
      const int next_slot = find_slot(step - 1);
      std::uint64_t* full = kKeys ? &barriers.k_full[at.stage] : &barriers.v_full[at.stage];
      std::uint64_t* empty = kKeys ? &barriers.k_empty[at.stage] : &barriers.v_empty[at.stage];
      barrier_wait(empty, at.parity ^ 1);
      if (lane == 0) barrier_arrive_expecting(full, kTileBytes);
      __syncwarp();
      if (token < kTokens) {
        const std::uint32_t to = kKeys ? buffers.k(at.stage) : buffers.v(at.stage);
        copy_box_5d(to + token / 8 * kEightBytes, kKeys ? &maps.k : &maps.v, full, kEvictNormal, 0,
                    0, 0, slot / 8, kv_head);
      }
      at.advance();
      slot = next_slot;
    }
  }
}

// cos and sin of 8 elements of a row.
struct Angles {
  float cos[8], sin[8];

  __device__ __forceinline__ void load(const PrefillProblem& p, int position, int eighth) {
    const std::int64_t vector = std::int64_t{position} * 16 + 2 * eighth;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      *reinterpret_cast<float4*>(cos + 4 * i) =
          __ldg(reinterpret_cast<const float4*>(p.cos) + vector + i);
      *reinterpret_cast<float4*>(sin + 4 * i) =
          __ldg(reinterpret_cast<const float4*>(p.sin) + vector + i);
    }
  }
};

// Norms and rotates the queries of a warpgroup where they lie, one warp. Eight threads take a row,
// and two rows at a time, which are of one token if kOneToken. Rows past the span are there, too,
// and nobody looks at them.
template <bool kOneToken>
__device__ __forceinline__ void prepare_queries(const PrefillProblem& p, const Item& item,
                                                std::uint64_t* full, int parity, std::uint32_t q,
                                                int first_row, const Head& weight) {
  constexpr int kTokensAtOnce = kOneToken ? 1 : 2;
  const int eighth = threadIdx.x % 8;
  const int last_row = first_row + kPrefillRows / 2 - 8;
  const auto load = [&](Angles(&angles)[kTokensAtOnce], int row) {
#pragma unroll
    for (int i = 0; i < kTokensAtOnce; ++i) {
      angles[i].load(p, min(item.position(row + 4 * i), item.span.context_len - 1), eighth);
    }
  };
  Angles angles[kTokensAtOnce];
  load(angles, first_row);
  barrier_wait(full, parity);
#pragma unroll 1
  for (int row = first_row; row <= last_row; row += 8) {
    Head heads[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      heads[i] = {load_shared(q + chunk_offset(row + 4 * i, eighth)),
                  load_shared(q + chunk_offset(row + 4 * i, 8 + eighth))};
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Angles& angle = angles[i % kTokensAtOnce];
      heads[i] = norm_and_rotate(heads[i], weight, angle.cos, angle.sin, p.eps);
    }
    load(angles, min(row + 8, last_row));
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      store_shared(q + chunk_offset(row + 4 * i, eighth), heads[i].first);
      store_shared(q + chunk_offset(row + 4 * i, 8 + eighth), heads[i].second);
    }
  }
  async_proxy_fence();
}

// One warp: the queries of a warpgroup, for all items.
__device__ __forceinline__ void produce_queries(const PrefillProblem& p, Walk walk,
                                                Barriers& barriers, const Buffers& buffers,
                                                const Maps& maps, int warpgroup) {
  constexpr int kRows = kPrefillRows / 2;
  const int lane = threadIdx.x % 32;
  const int first_row = warpgroup * kRows + lane / 8;
  Head weight{};
  if (p.q_weight != nullptr) {
    const uint4* const vectors = reinterpret_cast<const uint4*>(p.q_weight);
    weight = {vectors[lane % 8], vectors[8 + lane % 8]};
  }
  RingPosition<2> at;
  Item item;
  while (walk.next(item)) {
    const std::uint32_t q = buffers.q(at.stage);
    std::uint64_t* full = &barriers.q_full[at.stage][warpgroup];
    barrier_wait(&barriers.q_empty[at.stage][warpgroup], at.parity ^ 1);
    if (lane == 0) barrier_arrive_expecting(full, kTileBytes / 2);
    __syncwarp();
    if (lane < kRows / 8) {
      const int row = warpgroup * kRows + 8 * lane;
      copy_box_5d(q + row / 8 * kEightBytes, &maps.q, full, kEvictFirst, 0, item.head(row),
                  item.span.first_row + item.token(row), 0, 0);
    }
    if (p.q_weight == nullptr) {
      barrier_wait(full, at.parity);
    } else if (p.log2_heads == 3) {
      prepare_queries<true>(p, item, full, at.parity, q, first_row, weight);
    } else {
      prepare_queries<false>(p, item, full, at.parity, q, first_row, weight);
    }
    __syncwarp();
    if (lane == 0) barrier_arrive(&barriers.q_ready[at.stage][warpgroup]);
    at.advance();
  }
}

}  // namespace moe_engine

// What the kernels of decode attention share: the preparation of a sequence's heads, and how parts
// of an output are put together.
#pragma once

#include <cuda_bf16.h>

#include <stdexcept>
#include <string>

#include "context_pieces.cuh"
#include "decode_attention.h"
#include "hopper.cuh"
#include "prepared_head.cuh"

namespace moe_engine {

constexpr int kPartPitch = kDim + 4;  // floats

// DecodeAttentionArgs as the kernels take them.
struct Problem {
  const void* qkv;
  std::int64_t qkv_stride;
  std::int64_t qkv_part_stride;
  int num_parts;
  const __nv_bfloat16* q_weight;
  const __nv_bfloat16* k_weight;
  const float* cos;
  const float* sin;
  const std::int64_t* positions;
  const std::int64_t* slots;
  __nv_bfloat16* k_cache;
  __nv_bfloat16* v_cache;
  const std::int32_t* block_tables;
  std::int64_t block_tables_stride;
  const std::int32_t* context_lens;
  __nv_bfloat16* out;
  float* parts;
  Stats* stats;
  std::int32_t* arrivals;
  float eps;
  float scale_log2;  // of the scores, whose exponentials are powers of 2
  int num_heads;
  int num_kv_heads;
  int block_size;
  int max_shares;
  int min_pieces;  // of a share

  __device__ __forceinline__ int num_shares(int num_pieces) const {
    return max(1, min(max_shares, num_pieces / min_pieces));
  }

  // Of one KV head of a sequence, whose new token is not in the cache yet.
  __device__ __forceinline__ Context context(int sequence, int kv_head, int context_len) const {
    return {block_tables + sequence * block_tables_stride, block_size, num_kv_heads * kVectors,
            kv_head * kVectors, context_len - 1};
  }
};

inline Problem make_problem(const DecodeAttentionArgs& args) {
  if (!decode_attention_fits(args.num_heads, args.num_kv_heads, kDim, args.block_size)) {
    throw std::invalid_argument("attention of " + std::to_string(args.num_heads) +
                                " query heads to " + std::to_string(args.num_kv_heads) +
                                " KV heads in blocks of " + std::to_string(args.block_size) +
                                " tokens does not fit the kernel");
  }
  constexpr float kLog2E = 1.4426950408889634f;
  return {args.qkv,
          args.qkv_stride,
          args.qkv_part_stride,
          args.num_parts,
          static_cast<const __nv_bfloat16*>(args.q_weight),
          static_cast<const __nv_bfloat16*>(args.k_weight),
          args.cos,
          args.sin,
          args.positions,
          args.slots,
          static_cast<__nv_bfloat16*>(args.k_cache),
          static_cast<__nv_bfloat16*>(args.v_cache),
          args.block_tables,
          args.block_tables_stride,
          args.context_lens,
          static_cast<__nv_bfloat16*>(args.out),
          args.parts,
          reinterpret_cast<Stats*>(args.stats),
          args.arrivals,
          args.eps,
          args.scale * kLog2E,
          args.num_heads,
          args.num_kv_heads,
          args.block_size,
          args.max_shares,
          (args.min_tokens + kPiece - 1) / kPiece};
}

// Head `number` of a sequence's row of the projection, by eight threads.
__device__ __forceinline__ Head load_head(const Problem& p, int sequence, int number, int part) {
  const std::int64_t first = sequence * p.qkv_stride + number * kDim + 8 * part;
  if (p.num_parts == 0) {
    const auto* const from =
        reinterpret_cast<const uint4*>(static_cast<const __nv_bfloat16*>(p.qkv) + first);
    return {from[0], from[8]};
  }
  float4 sums[4] = {};
#pragma unroll 2
  for (int i = 0; i < p.num_parts; ++i) {
    const auto* const from = reinterpret_cast<const float4*>(static_cast<const float*>(p.qkv) +
                                                             i * p.qkv_part_stride + first);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float4 more = from[j % 2 + j / 2 * (kHalf / 4)];
      sums[j].x += more.x;
      sums[j].y += more.y;
      sums[j].z += more.z;
      sums[j].w += more.w;
    }
  }
  std::uint32_t packed[8];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    packed[2 * j] = pack_bf16(sums[j].x, sums[j].y);
    packed[2 * j + 1] = pack_bf16(sums[j].z, sums[j].w);
  }
  return {make_uint4(packed[0], packed[1], packed[2], packed[3]),
          make_uint4(packed[4], packed[5], packed[6], packed[7])};
}

// Waits for the projection and prepares the queries of a KV head of a sequence, and, if `has_new`,
// the key and the value of its new token, which also go to the cache. Called by all threads of a
// block: eight prepare a head, so the first 8 * (kHeads + 2) have something to do.
template <int kHeads>
__device__ __forceinline__ void prepare_heads(const Problem& p, int sequence, int kv_head,
                                              bool has_new,
                                              __nv_bfloat16 (&queries)[kHeads][kQueryPitch],
                                              __nv_bfloat16 (&fresh)[2][kDim]) {
  const int group = p.num_heads / p.num_kv_heads;
  const int row = threadIdx.x / 8;
  const int part = threadIdx.x % 8;
  const bool is_key = row == kHeads;
  const bool is_value = row == kHeads + 1;
  const bool is_new = (is_key || is_value) && has_new;
  const bool is_query = row < group;
  const std::int64_t slot = p.slots[sequence];
  const std::int64_t angle = p.positions[sequence] * kHalf + 8 * part;
  wait_for_previous_kernels();
  if (threadIdx.x / 32 * 4 >= kHeads + 2) return;  // whole warps

  Head head{};
  if (is_query || is_new) {
    const int number =
        is_query ? kv_head * group + row : p.num_heads + (is_key ? 0 : p.num_kv_heads) + kv_head;
    head = load_head(p, sequence, number, part);
  }
  // Asked for only now, for want of registers.
  const auto* const norm_weight =
      reinterpret_cast<const uint4*>(is_key ? p.k_weight : p.q_weight) + part;
  const Head weight{norm_weight[0], norm_weight[8]};
  float cos[8];
  float sin[8];
#pragma unroll
  for (int i = 0; i < 8; i += 4) {
    *reinterpret_cast<float4*>(cos + i) = *reinterpret_cast<const float4*>(p.cos + angle + i);
    *reinterpret_cast<float4*>(sin + i) = *reinterpret_cast<const float4*>(p.sin + angle + i);
  }
  const Head rotated = norm_and_rotate(head, weight, cos, sin, p.eps);
  if (!is_value) head = rotated;
  if (row < kHeads) {
    auto* const to = reinterpret_cast<uint4*>(queries[row]) + part;
    to[0] = head.first;
    to[8] = head.second;
  } else if (is_new) {
    auto* const to = reinterpret_cast<uint4*>(fresh[is_value]) + part;
    to[0] = head.first;
    to[8] = head.second;
    if (slot >= 0) {
      auto* const cached = reinterpret_cast<uint4*>(is_value ? p.v_cache : p.k_cache) +
                           (slot * p.num_kv_heads + kv_head) * kVectors + part;
      cached[0] = head.first;
      cached[8] = head.second;
    }
  }
}

// What a warp has found, for every head: the softmax, and the sums of values, not divided.
template <int kHeadTiles>
struct WarpParts {
  alignas(16) float parts[8 * kHeadTiles][kPartPitch];
  Stats stats[8 * kHeadTiles];

  __device__ __forceinline__ void store(const Found<kHeadTiles>& found, int lane) {
#pragma unroll
    for (int tile = 0; tile < kHeadTiles; ++tile) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        Stats all = found.stats[tile][j];
#pragma unroll
        for (int distance = 4; distance < 32; distance *= 2) {
          all.sum += __shfl_xor_sync(0xFFFFFFFF, all.sum, distance);
        }
        const int query = 8 * tile + 2 * (lane % 4) + j;
        if (lane < 4) stats[query] = all;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          auto* const to = reinterpret_cast<float4*>(parts[query] + kHalf * half) + 2 * (lane / 4);
          const auto& acc = found.acc[tile];
          const int i = 2 * half + j;
          to[0] = make_float4(acc[0][i], acc[1][i], acc[2][i], acc[3][i]);
          to[1] = make_float4(acc[4][i], acc[5][i], acc[6][i], acc[7][i]);
        }
      }
    }
  }
};

// Puts the parts of one head together, in order: four dimensions for each thread of a warp.
template <typename LoadStats, typename LoadPart>
__device__ __forceinline__ Stats fold(int count, float4& sum, LoadStats load_stats,
                                      LoadPart load_part) {
  Stats all{-INFINITY, 0.0f};
#pragma unroll 8
  for (int i = 0; i < count; ++i) all.max = fmaxf(all.max, load_stats(i).max);
  sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 8
  for (int i = 0; i < count; ++i) {
    const float4 part = load_part(i);
    const Stats stats = load_stats(i);
    const float scale = stats.max == -INFINITY ? 0.0f : exp2f(stats.max - all.max);
    all.sum = fmaf(stats.sum, scale, all.sum);
    sum.x = fmaf(part.x, scale, sum.x);
    sum.y = fmaf(part.y, scale, sum.y);
    sum.z = fmaf(part.z, scale, sum.z);
    sum.w = fmaf(part.w, scale, sum.w);
  }
  return all;
}

__device__ __forceinline__ void write_output(const Problem& p, int head, int lane,
                                             const Stats& stats, const float4& sum) {
  const float scale = stats.sum == 0.0f ? 0.0f : 1.0f / stats.sum;
  *reinterpret_cast<uint2*>(p.out + std::int64_t{head} * kDim + 4 * lane) =
      make_uint2(pack_bf16(sum.x * scale, sum.y * scale), pack_bf16(sum.z * scale, sum.w * scale));
}

// The output of a head, counted over all sequences, from what a warp has of one share of its
// context. Of the warps with the head's shares the last that arrives puts them together.
__device__ __forceinline__ void store_share(const Problem& p, int head, int share, int num_shares,
                                            int lane, const Stats& stats, const float4& sum) {
  if (num_shares == 1) return write_output(p, head, lane, stats, sum);
  Stats* const all_stats = p.stats + std::int64_t{head} * p.max_shares;
  float4* const all_parts =
      reinterpret_cast<float4*>(p.parts + std::int64_t{head} * p.max_shares * kDim) + lane;
  all_parts[share * (kDim / 4)] = sum;
  if (lane == 0) all_stats[share] = stats;
  __threadfence();
  __syncwarp();
  int arrived = 0;
  if (lane == 0) arrived = atomicAdd(p.arrivals + head, 1);
  if (__shfl_sync(0xFFFFFFFF, arrived, 0) != num_shares - 1) return;
  if (lane == 0) p.arrivals[head] = 0;
  __threadfence();
  float4 total;
  const Stats whole = fold(
      num_shares, total,
      [&](int i) {
        const float2 pair = __ldcg(reinterpret_cast<const float2*>(all_stats + i));
        return Stats{pair.x, pair.y};
      },
      [&](int i) { return __ldcg(all_parts + i * (kDim / 4)); });
  write_output(p, head, lane, whole, total);
}

}  // namespace moe_engine

// What a warpgroup of prefill attention does with the scores and outputs of its 64 rows. Of a
// tile's products, a thread holds what wgmma.cuh says.
#pragma once

#include <cmath>

#include "prefill_tiles.cuh"

namespace moe_engine {

constexpr int kScores = kTokens / 2;  // registers of a thread
constexpr int kOutputs = kDim / 2;
// What is summed up is rescaled where a row's maximum has grown by so many powers of 2; else its
// weights may be larger than 1 by as many.
constexpr float kMaxGrowth = 8.0f;

__device__ __forceinline__ float power_of_2(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}

// What a thread knows of its two rows, r = lane / 4 and r + 8 of its warp's 16.
struct Softmax {
  float top[2] = {-INFINITY, -INFINITY};  // what weights are relative to, unscaled
  float sum[2] = {};                      // of this thread's columns

  // Turns scores into weights, and gives the factors of what was summed up before.
  __device__ __forceinline__ void weigh(float* scores, float scale_log2, float (&factor)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float most = top[i];
#pragma unroll
      for (int j = 0; j < kScores; j += 4) {
        most = fmaxf(most, fmaxf(scores[j + 2 * i], scores[j + 2 * i + 1]));
      }
      most = fmaxf(most, __shfl_xor_sync(0xFFFFFFFF, most, 1));
      most = fmaxf(most, __shfl_xor_sync(0xFFFFFFFF, most, 2));
      factor[i] = 1.0f;
      if ((most - top[i]) * scale_log2 > kMaxGrowth) {  // also where top is -infinity
        factor[i] = exp2f((top[i] - most) * scale_log2);
        top[i] = most;
      }
      const float base = top[i] == -INFINITY ? 0.0f : top[i] * scale_log2;
      float added = 0.0f;
#pragma unroll
      for (int j = 0; j < kScores; j += 4) {
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          float& score = scores[j + 2 * i + k];
          score = power_of_2(fmaf(score, scale_log2, -base));
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
  const std::uint64_t a = matrix_descriptor(q, kEightBytes);
  const std::uint64_t b = matrix_descriptor(k, kEightBytes);
#pragma unroll
  for (int part = 0; part < kDim / 16; ++part) {
    const int offset = part / 4 * (kHalfBytes / 16) + part % 4 * 2;
    wgmma<kTokens>(scores, a + offset, b + offset, part > 0);
  }
  wgmma_commit();
}

// out = (accumulate ? out : 0) + weights x values; committed, not awaited.
__device__ __forceinline__ void multiply_values(float* out, const std::uint32_t* weights,
                                                std::uint32_t v, bool accumulate) {
  const std::uint64_t b = transposed_descriptor(v, kEightBytes, kHalfBytes);
#pragma unroll
  for (int part = 0; part < kTokens / 16; ++part) {
    wgmma_transposed<kDim>(out, weights + 4 * part, b + part * (2 * kEightBytes / 16),
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
    store_shared(v + chunk_offset(first_token + i / 16, i % 16), uint4{});
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
__device__ __forceinline__ void store(const PrefillProblem& p, const Item& item, const float* out,
                                      Softmax& softmax, std::uint32_t q, int warpgroup, int lane) {
  const int row = warpgroup * 64 + threadIdx.x / 32 % 4 * 16;  // the warp's first
  const float factors[2] = {softmax.inverse(0), softmax.inverse(1)};
  sync_warpgroup(warpgroup);  // all have read the queries
  const int my_row = row + lane % 16;
#pragma unroll
  for (int j = 0; j < kDim / 8; j += 2) {
    const float* d = out + 4 * j;
    const int chunk = j + lane / 16;
    store_matrices_x4(q + chunk_offset(my_row, chunk),
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
    const uint4 piece = load_shared(q + chunk_offset(at, chunk));
    if (item.token(at) < item.span.query_len) {
      const std::int64_t token = item.span.first_row + item.token(at);
      const std::int64_t to = (token * p.num_heads + item.head(at)) * kDim + 8 * chunk;
      *reinterpret_cast<uint4*>(p.out + to) = piece;
    }
  }
}

}  // namespace moe_engine

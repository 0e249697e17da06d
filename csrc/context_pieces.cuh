// Attention of a warp to a piece of a context: 16 tokens, whose keys and values go from the cache
// to registers in the layout that the tensor cores take.
//
// mma.m16n8k16 with tokens, then dimensions, as its 16 rows and query heads as its 8 columns. See
// mma.cuh for how the elements of K are dealt out to the threads. In the comments, thread l of the
// warp has g = l / 4 and t = l % 4.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "decode_attention.h"
#include "hopper.cuh"
#include "mma.cuh"

namespace moe_engine {

constexpr int kVectors = kDim / 8;      // of 16 bytes, in a row of a cache
constexpr int kQueryPitch = kDim + 32;  // elements: two rows' 64 bytes fill all banks

// A softmax's running maximum and sum.
struct Stats {
  float max;
  float sum;
};

// A piece of a context in the registers of a warp.
struct Piece {
  uint4 k[2][4];  // tokens g and g + 8; of every 32 dimensions the 8 from 8 t on
  uint4 v[4][2];  // tokens 2 t, 2 t + 1, 2 t + 8, 2 t + 9; dimensions from 8 g and 64 + 8 g on
};

// Calls visit(i, j, token, vector) for each k[i][j] of a lane: which token of the piece, which of
// its 16 vectors.
template <typename Visit>
__device__ __forceinline__ void for_keys(int lane, Visit visit) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) visit(i, j, lane / 4 + 8 * i, 4 * j + lane % 4);
  }
}

// The same for each v[i][j].
template <typename Visit>
__device__ __forceinline__ void for_values(int lane, Visit visit) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      visit(i, j, 2 * (lane % 4) + i % 2 + i / 2 * 8, lane / 4 + 8 * j);
    }
  }
}

// A piece in shared memory. A lane copies what it reads back itself, so it need wait for no other.
struct Slot {
  uint4 k[2][4][32];
  uint4 v[4][2][32];

  __device__ __forceinline__ void load_keys(int lane, uint4 (&to)[2][4]) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) to[i][j] = k[i][j][lane];
    }
  }

  __device__ __forceinline__ void load_values(int lane, uint4 (&to)[4][2]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 2; ++j) to[i][j] = v[i][j][lane];
    }
  }
};

// Where one sequence and one KV head lie in the caches.
struct Context {
  const std::int32_t* table;
  int block_size;
  int row_vectors;  // from a token to the next
  int head_vector;
  int num_cached;  // tokens

  // The block that the piece lies in.
  __device__ __forceinline__ int block(int number) const {
    const int token = number * kPiece;
    return token < num_cached ? table[token / block_size] : 0;
  }

  // First vector of the piece.
  __device__ __forceinline__ std::int64_t vector(int block, int number) const {
    return (std::int64_t{block} * block_size + number * kPiece % block_size) * row_vectors +
           head_vector;
  }

  // Whether the cache has the token of the piece.
  __device__ __forceinline__ bool has(int number, int token) const {
    return number * kPiece + token < num_cached;
  }

  __device__ __forceinline__ const uint4* address(const __nv_bfloat16* cache, std::int64_t first,
                                                  int token, int vector) const {
    return reinterpret_cast<const uint4*>(cache) + first + token * row_vectors + vector;
  }

  // Tokens that are not cached are zero.
  __device__ __forceinline__ uint4 load(const __nv_bfloat16* cache, std::int64_t first, int number,
                                        int token, int vector) const {
    if (!has(number, token)) return make_uint4(0, 0, 0, 0);
    return __ldcg(address(cache, first, token, vector));
  }

  __device__ __forceinline__ void copy(const __nv_bfloat16* cache, std::int64_t first, int number,
                                       int token, int vector, uint4* to_shared) const {
    copy_16_bytes_or_zeros(shared_address(to_shared), address(cache, first, token, vector),
                           has(number, token));
  }

  __device__ __forceinline__ void load_keys(const __nv_bfloat16* cache, std::int64_t first,
                                            int number, int lane, uint4 (&k)[2][4]) const {
    for_keys(lane, [&](int i, int j, int token, int vector) {
      k[i][j] = load(cache, first, number, token, vector);
    });
  }

  __device__ __forceinline__ void load_values(const __nv_bfloat16* cache, std::int64_t first,
                                              int number, int lane, uint4 (&v)[4][2]) const {
    for_values(lane, [&](int i, int j, int token, int vector) {
      v[i][j] = load(cache, first, number, token, vector);
    });
  }

  __device__ __forceinline__ void copy_keys(const __nv_bfloat16* cache, std::int64_t first,
                                            int number, int lane, Slot& slot) const {
    for_keys(lane, [&](int i, int j, int token, int vector) {
      copy(cache, first, number, token, vector, &slot.k[i][j][lane]);
    });
  }

  __device__ __forceinline__ void copy_values(const __nv_bfloat16* cache, std::int64_t first,
                                              int number, int lane, Slot& slot) const {
    for_values(lane, [&](int i, int j, int token, int vector) {
      copy(cache, first, number, token, vector, &slot.v[i][j][lane]);
    });
  }
};

// Puts the new token, number `token` of the piece, where the cache had nothing yet.
__device__ __forceinline__ void insert_key(uint4 (&k)[2][4], const __nv_bfloat16 (&fresh)[kDim],
                                           int token, int lane) {
  for_keys(lane, [&](int i, int j, int row, int vector) {
    if (row == token) k[i][j] = reinterpret_cast<const uint4*>(fresh)[vector];
  });
}

__device__ __forceinline__ void insert_value(uint4 (&v)[4][2], const __nv_bfloat16 (&fresh)[kDim],
                                             int token, int lane) {
  for_values(lane, [&](int i, int j, int row, int vector) {
    if (row == token) v[i][j] = reinterpret_cast<const uint4*>(fresh)[vector];
  });
}

// What a warp has found so far: of head 8 i + 2 t + j the softmax in stats[i][j], its sum only over
// the tokens of this thread, and the sums of values acc[i][d]: of dimension 8 g + d (first two) and
// 64 + 8 g + d (last two).
template <int kHeadTiles>
struct Found {
  Stats stats[kHeadTiles][2];
  float acc[kHeadTiles][8][4];

  static __device__ __forceinline__ Found nothing() {
    Found found{};
#pragma unroll
    for (int i = 0; i < kHeadTiles; ++i) found.stats[i][0].max = found.stats[i][1].max = -INFINITY;
    return found;
  }
};

// Adds a piece, of which the first num_tokens exist. The keys' registers are free once `then()` is
// called.
template <int kHeadTiles, typename Then>
__device__ __forceinline__ void attend(Found<kHeadTiles>& found, Piece& piece,
                                       const __nv_bfloat16 (&queries)[8 * kHeadTiles][kQueryPitch],
                                       int num_tokens, float scale, int lane, Then then) {
  const int g = lane / 4;
  const int t = lane % 4;
  float scores[kHeadTiles][4] = {};
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const uint4& a = piece.k[0][j];
    const uint4& b = piece.k[1][j];
#pragma unroll
    for (int tile = 0; tile < kHeadTiles; ++tile) {
      const uint4 q = reinterpret_cast<const uint4*>(queries[8 * tile + g])[4 * j + t];
      mma(scores[tile], a.x, b.x, a.y, b.y, q.x, q.y);
      mma(scores[tile], a.z, b.z, a.w, b.w, q.z, q.w);
    }
  }
  then();
  std::uint32_t weights[kHeadTiles][2];  // of tokens 2 t and 2 t + 1, and 8 more, for head g
#pragma unroll
  for (int tile = 0; tile < kHeadTiles; ++tile) {
    float* const s = scores[tile];
    float p[4];
#pragma unroll
    for (int j = 0; j < 2; ++j) {  // heads 2 t and 2 t + 1, tokens g and g + 8
      s[j] = g < num_tokens ? s[j] * scale : -INFINITY;
      s[2 + j] = g + 8 < num_tokens ? s[2 + j] * scale : -INFINITY;
      float most = fmaxf(s[j], s[2 + j]);
#pragma unroll
      for (int distance = 4; distance < 32; distance *= 2) {
        most = fmaxf(most, __shfl_xor_sync(0xFFFFFFFF, most, distance));
      }
      Stats& stats = found.stats[tile][j];
      most = fmaxf(most, stats.max);
      const float old = exp2f(stats.max - most);
      p[j] = exp2f(s[j] - most);
      p[2 + j] = exp2f(s[2 + j] - most);
      stats.sum = fmaf(stats.sum, old, p[j] + p[2 + j]);
      stats.max = most;
#pragma unroll
      for (int d = 0; d < 8; ++d) {
        found.acc[tile][d][j] *= old;
        found.acc[tile][d][2 + j] *= old;
      }
    }
    weights[tile][0] = transpose_8x8(pack_bf16(p[0], p[1]));
    weights[tile][1] = transpose_8x8(pack_bf16(p[2], p[3]));
  }
#pragma unroll
  for (int d = 0; d < 8; ++d) {
    std::uint32_t a[2][2];  // [half][tokens]: the values of dimension d of two neighbouring tokens
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        const auto* const even = reinterpret_cast<const std::uint32_t*>(&piece.v[2 * pair][half]);
        const auto* const odd =
            reinterpret_cast<const std::uint32_t*>(&piece.v[2 * pair + 1][half]);
        a[half][pair] = __byte_perm(even[d / 2], odd[d / 2], d % 2 ? 0x7632 : 0x5410);
      }
    }
#pragma unroll
    for (int tile = 0; tile < kHeadTiles; ++tile) {
      mma(found.acc[tile][d], a[0][0], a[1][0], a[0][1], a[1][1], weights[tile][0],
          weights[tile][1]);
    }
  }
}

}  // namespace moe_engine

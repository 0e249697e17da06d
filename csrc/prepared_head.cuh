// A query or key head of a new token: its norm and its rotation, by eight threads.
#pragma once

#include <cuda_bf16.h>

#include "decode_attention.h"
#include "hopper.cuh"

namespace moe_engine {

constexpr int kHalf = kDim / 2;

// Eight threads' head in two halves: thread i has elements 8 i .. 8 i + 7 of each.
struct Head {
  uint4 first;
  uint4 second;
};

// The norm and the rotation of a head by its eight threads. The roundings and the order of the sum
// are those of kernels/norm_rope.py, so that the cache gets the same bits from both.
__device__ __forceinline__ Head norm_and_rotate(const Head& head, const Head& weight,
                                                const float (&cos)[8], const float (&sin)[8],
                                                float eps) {
  float2 first[4];
  float2 second[4];
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    first[i] = pair_of(head.first, i);
    second[i] = pair_of(head.second, i);
    squares += fmaf(first[i].x, first[i].x, __fmul_rn(second[i].x, second[i].x));
    squares += fmaf(first[i].y, first[i].y, __fmul_rn(second[i].y, second[i].y));
  }
#pragma unroll
  for (int distance = 4; distance > 0; distance /= 2) {
    squares += __shfl_xor_sync(0xFFFFFFFF, squares, distance);
  }
  const float scale = rsqrtf(squares / kDim + eps);
  std::uint32_t rotated[2][4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 first_weight = pair_of(weight.first, i);
    const float2 second_weight = pair_of(weight.second, i);
    const float2 a{__fmul_rn(__fmul_rn(first[i].x, scale), first_weight.x),
                   __fmul_rn(__fmul_rn(first[i].y, scale), first_weight.y)};
    const float2 b{__fmul_rn(__fmul_rn(second[i].x, scale), second_weight.x),
                   __fmul_rn(__fmul_rn(second[i].y, scale), second_weight.y)};
    const float2 c{cos[2 * i], cos[2 * i + 1]};
    const float2 s{sin[2 * i], sin[2 * i + 1]};
    rotated[0][i] =
        pack_bf16(fmaf(a.x, c.x, -__fmul_rn(b.x, s.x)), fmaf(a.y, c.y, -__fmul_rn(b.y, s.y)));
    rotated[1][i] =
        pack_bf16(fmaf(b.x, c.x, __fmul_rn(a.x, s.x)), fmaf(b.y, c.y, __fmul_rn(a.y, s.y)));
  }
  return {make_uint4(rotated[0][0], rotated[0][1], rotated[0][2], rotated[0][3]),
          make_uint4(rotated[1][0], rotated[1][1], rotated[1][2], rotated[1][3])};
}

}  // namespace moe_engine

// Rows in 8 bits: groups of 128 elements as e4m3 (float8_e4m3fn), each followed by its scale.
//
// A group is 33 words of 4 bytes: 32 of four elements each, and the scale, float32. The scale makes
// the group's largest element 448, e4m3's largest: element = e4m3 * scale. So a group fills 11
// packets of 3 words, and four groups a multiple of 16 bytes.
//
// Source: Open Compute Project, "OCP 8-bit Floating Point Specification" 1.0, for e4m3.
#pragma once

#include <cuda_fp8.h>

#include <cstdint>

#include "element.cuh"
#include "exchange_layout.h"

namespace moe_engine {

constexpr int kGroup = 128;  // elements
constexpr int kGroupWords = kGroup / 4 + 1;
constexpr int kGroupPackets = kGroupWords / Packet::kWords;
constexpr float kLargestE4m3 = 448;
static_assert(kGroupWords % Packet::kWords == 0);

// Four elements of 16 bits.
template <typename T>
__device__ __forceinline__ float4 unpack_four(const uint2& words) {
  const float2 low = unpack<T>(words.x);
  const float2 high = unpack<T>(words.y);
  return make_float4(low.x, low.y, high.x, high.y);
}

// The scale of a group of which each lane of the warp has four elements.
__device__ __forceinline__ float group_scale(const float4& four) {
  float largest = fmaxf(fmaxf(fabsf(four.x), fabsf(four.y)), fmaxf(fabsf(four.z), fabsf(four.w)));
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(0xFFFFFFFF, largest, distance));
  }
  return largest > 0 ? __fdiv_rn(largest, kLargestE4m3) : 1;
}

__device__ __forceinline__ std::uint32_t quantized(const float4& four, float scale) {
  const auto byte = [&](float value) {
    return std::uint32_t{__nv_cvt_float_to_fp8(__fdiv_rn(value, scale), __NV_SATFINITE, __NV_E4M3)};
  };
  return byte(four.x) | byte(four.y) << 8 | byte(four.z) << 16 | byte(four.w) << 24;
}

// The four elements of a word, in 16 bits each.
template <typename T>
__device__ __forceinline__ uint2 restored(std::uint32_t word, float scale) {
  float values[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const auto byte = static_cast<__nv_fp8_storage_t>(word >> 8 * i);
    const __half half{__nv_cvt_fp8_to_halfraw(byte, __NV_E4M3)};
    values[i] = __fmul_rn(__half2float(half), scale);
  }
  return make_uint2(pack<T>(&values[0]), pack<T>(&values[2]));
}

}  // namespace moe_engine

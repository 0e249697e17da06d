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

// Groups of smaller elements lose some of their bits: the inverse of the scale stays finite.
constexpr float kSmallestLargest = 1e-30f;

// A lane's part of a group, half a warp's: eight elements, and the scale of all.
struct QuantizedEight {
  uint2 words;
  float scale;
};

// For two groups at a time, by the halves of a warp. Elements times 448 / largest, rounded; the
// scale is largest / 448.
template <typename T>
__device__ __forceinline__ QuantizedEight quantize_eight(const uint4& elements) {
  const float2 pairs[4] = {unpack<T>(elements.x), unpack<T>(elements.y), unpack<T>(elements.z),
                           unpack<T>(elements.w)};
  float largest = kSmallestLargest;
#pragma unroll
  for (const float2& pair : pairs) largest = fmaxf(largest, fmaxf(fabsf(pair.x), fabsf(pair.y)));
#pragma unroll
  for (int distance = 8; distance > 0; distance /= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(0xFFFFFFFF, largest, distance));
  }
  const float inverse = __fdiv_rn(kLargestE4m3, largest);
  const auto two_bytes = [&](const float2& pair) {
    const float2 scaled = make_float2(__fmul_rn(pair.x, inverse), __fmul_rn(pair.y, inverse));
    return std::uint32_t{__nv_cvt_float2_to_fp8x2(scaled, __NV_SATFINITE, __NV_E4M3)};
  };
  return {make_uint2(two_bytes(pairs[0]) | two_bytes(pairs[1]) << 16,
                     two_bytes(pairs[2]) | two_bytes(pairs[3]) << 16),
          __fdiv_rn(largest, kLargestE4m3)};
}

// The four elements of a word, in 16 bits each.
template <typename T>
__device__ __forceinline__ uint2 restored(std::uint32_t word, float scale) {
  const auto pair = [&](std::uint32_t two_bytes) {
    const __half2 halves{
        __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(two_bytes), __NV_E4M3)};
    const float2 of_group = __half22float2(halves);
    const float values[2] = {__fmul_rn(of_group.x, scale), __fmul_rn(of_group.y, scale)};
    return pack<T>(values);
  };
  return make_uint2(pair(word & 0xFFFF), pair(word >> 16));
}

}  // namespace moe_engine

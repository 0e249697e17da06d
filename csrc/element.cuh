// Words of 4 bytes as one or two elements of a type, in float32 while they are added up.
//
// Products and sums are rounded one by one (no fused multiply-add), so that PyTorch can compute the
// same bits.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace moe_engine {

template <typename T>
__device__ __forceinline__ float2 unpack(std::uint32_t word);

template <>
__device__ __forceinline__ float2 unpack<__nv_bfloat16>(std::uint32_t word) {
  return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xFFFF0000));
}

template <>
__device__ __forceinline__ float2 unpack<__half>(std::uint32_t word) {
  return __half22float2(*reinterpret_cast<const __half2*>(&word));
}

template <>
__device__ __forceinline__ float2 unpack<float>(std::uint32_t word) {
  return make_float2(__uint_as_float(word), 0);
}

// The elements of a word, to 4 / sizeof(T) sums.
template <typename T>
__device__ __forceinline__ void add(float* sums, std::uint32_t word) {
  const float2 values = unpack<T>(word);
  sums[0] = __fadd_rn(sums[0], values.x);
  if constexpr (sizeof(T) == 2) sums[1] = __fadd_rn(sums[1], values.y);
}

template <typename T>
__device__ __forceinline__ void add_scaled(float* sums, std::uint32_t word, float factor) {
  const float2 values = unpack<T>(word);
  sums[0] = __fadd_rn(sums[0], __fmul_rn(values.x, factor));
  if constexpr (sizeof(T) == 2) sums[1] = __fadd_rn(sums[1], __fmul_rn(values.y, factor));
}

// 4 / sizeof(T) sums, rounded, as a word.
template <typename T>
__device__ __forceinline__ std::uint32_t pack(const float* sums) {
  if constexpr (sizeof(T) == 4) {
    return __float_as_uint(sums[0]);
  } else if constexpr (std::is_same_v<T, __half>) {
    const __half2 pair = __floats2half2_rn(sums[0], sums[1]);
    return *reinterpret_cast<const std::uint32_t*>(&pair);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(sums[0], sums[1]);
    return *reinterpret_cast<const std::uint32_t*>(&pair);
  }
}

}  // namespace moe_engine

// Descriptions of tensors in device memory for Hopper's copy engine (TMA).
#pragma once

#include <cuda.h>

#include <cstdint>
#include <initializer_list>

namespace moe_engine {

struct TensorMapAxis {
  std::uint64_t size;          // elements
  std::uint64_t stride_bytes;  // of the innermost axis: the element size
  std::uint32_t box;           // elements that one copy takes
};

// A tensor of bfloat16 whose copies are laid out in shared memory with the 128-byte swizzle; the
// innermost axis comes first and its box is 64 elements. What lies outside reads as 0.
// Throws std::runtime_error if the driver refuses it or does not have the function.
CUtensorMap bf16_tensor_map(const void* data, std::initializer_list<TensorMapAxis> axes);

}  // namespace moe_engine

// A sum over the lanes of a warp.
#pragma once

namespace moe_engine {

// By all lanes, which all get it.
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(0xFFFFFFFF, value, distance);
  }
  return value;
}

}  // namespace moe_engine

#include "tensor_map.h"

#include <array>
#include <stdexcept>
#include <string>

#include "check.h"

namespace moe_engine {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

// Looked up at run time, so that the module also loads where libcuda does not exist.
Encode find_encode() {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found;
  CHECK_CUDA(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000,
                                              cudaEnableDefault, &found));
  if (found != cudaDriverEntryPointSuccess) {
    throw std::runtime_error("the NVIDIA driver has no cuTensorMapEncodeTiled: it is too old");
  }
  return reinterpret_cast<Encode>(entry);
}

}  // namespace

CUtensorMap bf16_tensor_map(const void* data, std::initializer_list<TensorMapAxis> axes) {
  static const Encode encode = find_encode();
  std::array<cuuint64_t, 5> sizes{};
  std::array<cuuint64_t, 5> strides{};
  std::array<cuuint32_t, 5> box{};
  std::array<cuuint32_t, 5> steps{};
  int rank = 0;
  for (const TensorMapAxis& axis : axes) {
    sizes.at(rank) = axis.size;
    if (rank > 0) strides.at(rank - 1) = axis.stride_bytes;
    box.at(rank) = axis.box;
    steps.at(rank) = 1;
    ++rank;
  }
  CUtensorMap map;
  const CUresult status =
      encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, rank, const_cast<void*>(data), sizes.data(),
             strides.data(), box.data(), steps.data(), CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    throw std::runtime_error("cuTensorMapEncodeTiled failed with CUresult " +
                             std::to_string(static_cast<int>(status)));
  }
  return map;
}

}  // namespace moe_engine

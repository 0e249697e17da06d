// Kernel launches that may begin before the previous kernel of the stream has ended.
#pragma once

#include <cuda_runtime.h>

#include "check.h"

namespace moe_engine {

// Multiprocessors of the current device.
inline int num_multiprocessors() {
  int device = 0;
  int count = 0;
  CHECK_CUDA(cudaGetDevice(&device));
  CHECK_CUDA(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

// Launches with programmatic dependent launch: the kernel must call wait_for_previous_kernels()
// in every thread that reads or writes what earlier kernels touch. Blocks form clusters of
// cluster_size along x.
template <typename... Parameters, typename... Arguments>
void launch_dependent(const char* name, void (*kernel)(Parameters...), dim3 grid, int block_size,
                      int shared_bytes, cudaStream_t stream, int cluster_size,
                      Arguments&&... arguments) {
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = cluster_size;
  attributes[1].val.clusterDim.y = 1;
  attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(block_size);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = cluster_size > 1 ? 2 : 1;
  check_cuda(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), name);
}

}  // namespace moe_engine

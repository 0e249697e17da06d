// Kernel launches that may begin before the previous kernel of the stream has ended.
#pragma once

#include <cuda_runtime.h>

#include "check.h"

namespace moe_engine {

// Launches with programmatic dependent launch: the kernel must call wait_for_previous_kernels()
// in every thread that reads or writes what earlier kernels touch.
template <typename... Parameters, typename... Arguments>
void launch_dependent(const char* name, void (*kernel)(Parameters...), dim3 grid, int block_size,
                      int shared_bytes, cudaStream_t stream, Arguments&&... arguments) {
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(block_size);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  check_cuda(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), name);
}

}  // namespace moe_engine

// Turns CUDA return codes into C++ exceptions that name the failed call.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace moe_engine {

// Reaches Python as RuntimeError.
inline void check_cuda(cudaError_t status, const char* call) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // else CHECK_LAUNCH would report it once more, of a launch that is all right
  std::string message = std::string(call) + " failed: " + cudaGetErrorName(status) + " (" +
                        cudaGetErrorString(status) + ")";
  if (status == cudaErrorNoDevice || status == cudaErrorInsufficientDriver) {
    message += "; this machine has no NVIDIA GPU with a driver that fits this build";
  }
  throw std::runtime_error(message);
}

}  // namespace moe_engine

#define CHECK_CUDA(call) ::moe_engine::check_cuda((call), #call)

// After a <<<>>> launch, which has no return code of its own.
#define CHECK_LAUNCH(kernel) ::moe_engine::check_cuda(cudaGetLastError(), "launch of " kernel)

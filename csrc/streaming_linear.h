// A linear layer of very few tokens, whose weight waits in shared memory for them.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace moe_engine {

struct StreamingLinearArgs {
  const void* x;          // bfloat16 [num_tokens, in_features], rows aligned to 16 bytes
  std::int64_t x_stride;  // elements from row to row
  const void* weight;     // bfloat16 [out_features, in_features], aligned to 16 bytes
  void* out;              // bfloat16 [num_tokens, out_features]
  int num_tokens;         // at most 16
  int in_features;        // a multiple of 256
  int out_features;
};

// out = x weight^T. Enqueues one kernel on `stream` and returns; a CUDA graph can capture it. It
// reads the weight before the kernels before it have ended. Throws std::invalid_argument for sizes
// whose share of the weight does not fit shared memory: see streaming_linear_fits.
void streaming_linear(const StreamingLinearArgs& args, cudaStream_t stream);

// Whether every multiprocessor's share of the weight fits its shared memory.
bool streaming_linear_fits(int in_features, int out_features);

}  // namespace moe_engine

// A linear layer of up to 256 tokens, split over its depth among the blocks of clusters.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace moe_engine {

constexpr int kClusterLinearMaxTokens = 256;

struct ClusterLinearArgs {
  const void* x;          // bfloat16 [num_tokens, in_features], rows aligned to 16 bytes
  std::int64_t x_stride;  // elements from row to row
  const void* weight;     // bfloat16 [out_features, in_features], aligned to 16 bytes
  void* out;              // bfloat16 [num_tokens, out_features], aligned to 16 bytes
  int num_tokens;         // at most kClusterLinearMaxTokens
  int in_features;
  int out_features;
};

// out = x weight^T, summed in float32; a token's bits do not depend on the others. Enqueues one
// kernel on `stream` and returns; a CUDA graph can capture it. It reads the weight before the
// kernels before it have ended. Throws std::invalid_argument for sizes that do not fit.
void cluster_linear(const ClusterLinearArgs& args, cudaStream_t stream);

// Whether every multiprocessor's share of the weight fits its shared memory, and the depth can be
// cut into 1, 2, 4 or 8 such shares.
bool cluster_linear_fits(int in_features, int out_features);

}  // namespace moe_engine

// A linear layer of few tokens, whose sums over parts of its depth are left to the kernel that
// reads them.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace moe_engine {

constexpr int kSplitLinearMaxTokens = 64;

struct SplitLinearArgs {
  const void* x;          // bfloat16 [num_tokens, in_features], rows aligned to 16 bytes
  std::int64_t x_stride;  // elements from row to row
  const void* weight;     // bfloat16 [out_features, in_features], aligned to 16 bytes
  float* parts;           // [num_splits, num_tokens, out_features]
  int num_tokens;         // at most kSplitLinearMaxTokens
  int in_features;
  int out_features;
};

// parts[s] = x weight^T over the s-th of the equal parts of the depth; the sum of them, in order,
// is the layer's output. Enqueues one kernel on `stream` and returns; a CUDA graph can capture it.
// It reads the weight before the kernels before it have ended. Throws std::invalid_argument for
// sizes that do not fit.
void split_linear(const SplitLinearArgs& args, cudaStream_t stream);

// Parts of the depth, such that every multiprocessor's share of the weight fits its shared memory;
// 0 if there is no such number.
int split_linear_splits(int in_features, int out_features);

}  // namespace moe_engine

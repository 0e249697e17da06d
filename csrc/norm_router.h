// The residual addition, the norm and the router of a mixture of experts, for few tokens.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace moe_engine {

struct NormRouterArgs {
  // What is added to the residual: bfloat16 [num_tokens, hidden] if num_parts is 0, else the sum,
  // in order and rounded to bfloat16, of float32 [num_parts, num_tokens, hidden].
  const void* x;
  int num_parts;
  const void* residual;            // bfloat16 [num_tokens, hidden]
  const void* norm_weight;         // bfloat16 [hidden]
  const void* gate;                // bfloat16 [num_experts, hidden]
  const std::int32_t* num_real_1;  // how many rows are tokens; null: all
  void* normed;                    // bfloat16 [num_tokens, hidden]
  void* new_residual;              // bfloat16 [num_tokens, hidden]
  std::int32_t* expert_ids;        // [num_tokens, top_k]
  float* expert_weights;           // [num_tokens, top_k]
  float eps;
  int num_tokens;
  int num_experts;
  int hidden;
  int top_k;
  bool normalize;  // whether the weights of a token sum to 1
};

// Whether the kernel takes these sizes.
bool norm_router_fits(int num_experts, int hidden, int top_k);

// new_residual = x + residual; normed = its RMS norm; then the top_k experts by the product of the
// norm and gate^T, best first and the lower number among equals, and their softmax weights. The
// product takes the norm scaled after it, so it is not the one of the rounded `normed`. Rows that
// are no tokens get ids -1 and weights 0. Everything contiguous and aligned to 16 bytes. Enqueues
// one kernel on `stream` and returns; a CUDA graph can capture it. Throws std::invalid_argument for
// other sizes.
void norm_router(const NormRouterArgs& args, cudaStream_t stream);

}  // namespace moe_engine

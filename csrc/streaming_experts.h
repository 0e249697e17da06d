// Matrix products for so few tokens that reading the weights is all that takes time.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace moe_engine {

struct StreamingExpertFfnArgs {
  const std::int32_t* expert_ids;  // [num_tokens, top_k]; below 0: none
  const float* expert_weights;     // [num_tokens, top_k]
  const void* x;                   // bfloat16 [num_tokens, hidden], rows aligned to 16 bytes
  std::int64_t x_stride;           // elements from row to row
  const void* gate_up;             // bfloat16 [experts, 2 * intermediate, hidden], gate rows first
  const void* down;                // bfloat16 [experts, hidden, intermediate]
  void* h;                         // bfloat16 [num_tokens * top_k, intermediate], scratch
  void* out;                       // bfloat16 [num_tokens, hidden]
  int num_tokens;
  int top_k;
  int hidden;        // a multiple of 32
  int intermediate;  // a multiple of 32
};

// out[t] = sum over the choices of weight * down[e] (silu(gate[e] x[t]) * (up[e] x[t])), each token
// for itself: experts that tokens share are read once per token. Enqueues two kernels on `stream`
// and returns; a CUDA graph can capture them.
void streaming_expert_ffn(const StreamingExpertFfnArgs& args, cudaStream_t stream);

}  // namespace moe_engine

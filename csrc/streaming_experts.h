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
  std::int32_t* counters;          // [2 * num_tokens], zero before and after
  int num_tokens;
  int top_k;
  int hidden;
  int intermediate;
};

// Whether the kernel takes these sizes on the current device.
bool streaming_experts_fit(int num_tokens, int top_k, int hidden, int intermediate);

// out[t] = sum over the choices of weight * down[e] (silu(gate[e] x[t]) * (up[e] x[t])), each token
// for itself: experts that tokens share are read once per token. Enqueues one kernel on `stream`
// and returns; a CUDA graph can capture it. Its blocks wait for each other, so whatever else holds
// multiprocessors must not wait for this kernel.
//
// Throws std::invalid_argument if the sizes do not fit.
void streaming_expert_ffn(const StreamingExpertFfnArgs& args, cudaStream_t stream);

}  // namespace moe_engine

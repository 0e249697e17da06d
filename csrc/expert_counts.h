// Tokens routed to each expert: a histogram of the router's top-k choices.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace moe_engine {

struct ExpertCountsArgs {
  const void* topk_ids;  // [num_tokens, top_k], row-major, int32 or int64
  bool ids_are_int64;
  std::int64_t num_tokens;
  int top_k;
  int num_experts;
  std::int32_t* counts;  // [num_experts], overwritten
};

// Enqueues on `stream` and returns; needs no other memory and can be captured in a CUDA graph.
// Ids below 0 are padding. An id of num_experts or more is the caller's bug: it is not counted, and
// nothing outside `counts` is written.
void expert_token_counts(const ExpertCountsArgs& args, cudaStream_t stream);

}  // namespace moe_engine

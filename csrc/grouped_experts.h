// The feed-forward of the experts over rows grouped by expert, on Hopper's tensor cores.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace moe_engine {

struct ExpertFfnArgs {
  // Either the pairs' experts, [num_pairs], below 0 for none, for the kernels to sort; or, if that
  // is null, the two below.
  const std::int32_t* expert_ids;
  const std::int32_t* offsets;  // [num_experts + 1], first pair of each expert, then their number
  const std::int32_t* pairs;    // pair numbers row * top_k + choice, grouped by expert
  const void* x;                // bfloat16 [rows, hidden], rows aligned to 16 bytes
  std::int64_t x_stride;        // elements from row to row
  const void* gate_up;          // bfloat16 [num_experts, 2 * intermediate, hidden], gate rows first
  const void* down;             // bfloat16 [num_experts, hidden, intermediate]
  void* h;                      // bfloat16 [num_pairs, intermediate], scratch
  void* y;                      // bfloat16 [num_pairs, hidden]
  std::int32_t* counters;       // [2], 0 before and after; see TileDealer
  std::int64_t num_pairs;       // rows * top_k, a bound on offsets[num_experts]
  int num_experts;
  int top_k;
  int hidden;        // a multiple of 64
  int intermediate;  // a multiple of 64
  // 16, 32, 64, 128 or 256 (288 in fact, in two halves): how many pairs of an expert share a read
  // of its weights, at most.
  int tokens_per_tile;
};

// Whether the kernels sort so many pairs themselves.
bool grouped_experts_sort(std::int64_t num_pairs, int num_experts, int tokens_per_tile);

// y[pair] = down[e] (silu(gate[e] x) * (up[e] x)) for every pair of an expert e and a row x; rows
// of y whose pair is in no group are not written.
//
// Enqueues two kernels on `stream` and returns; no count is needed on the host, and a CUDA graph
// can capture them. Needs a GPU of compute capability 9.0; throws std::runtime_error otherwise, and
// std::invalid_argument for sizes that the kernels do not take.
void grouped_expert_ffn(const ExpertFfnArgs& args, cudaStream_t stream);

}  // namespace moe_engine

// What both halves of the exchange by rows share (dispatch_rows.cu, combine_rows.cu).
//
// Whole rows go straight to their slots in the buffers of other ranks, and a flag says when a chunk
// of a source's tokens is complete. Two launches each way: the first sends and never waits; the
// second waits, of dispatch in one block, of combine in those that also sum.
//
// A rank's combine ends when all ranks have said that they have sent all results: then nobody reads
// anything that it has sent to them, and it may send the next.
#pragma once

#include <algorithm>
#include <cstdint>

#include "exchange_memory.cuh"
#include "launch.cuh"

namespace moe_engine {

inline __device__ __host__ int num_step_chunks(int step_tokens) {
  return (step_tokens + kChunkTokens - 1) / kChunkTokens;
}

// Blocks of a kernel that never waits for another rank, for so many chunks.
inline int sending_blocks(int num_chunks, int per_multiprocessor) {
  return std::min(num_chunks, per_multiprocessor * num_multiprocessors());
}

// Chunks that a block handles between two fences or waits, which take as long as a chunk: several,
// where there are more of them than blocks.
constexpr int kMostAtOnce = 4;
__device__ __forceinline__ int chunks_at_once(int num_chunks) {
  return min(kMostAtOnce, (num_chunks + gridDim.x - 1) / gridDim.x);
}

// The flag that `source` sets at `at_rank` when it has written `chunk`; behind the last chunk's, of
// combine, when it has sent all results to all ranks.
__device__ __forceinline__ std::uint32_t* flag(const ExchangeState& state, std::int64_t flags_at,
                                               int at_rank, int source, int chunk) {
  auto* const flags = reinterpret_cast<std::uint32_t*>(state.peers.buffers[at_rank] + flags_at);
  return flags + source * (state.layout.num_chunks() + 1) + chunk;
}

}  // namespace moe_engine

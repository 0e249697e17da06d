// What both halves of the exchange by packets share (dispatch_packets.cu, combine_packets.cu).
//
// Packets carry the exchange's number, so that nothing has to be ordered, counted or waited for but
// the data itself. Each warp takes pieces of rows. It first sends all of its pieces, then waits for
// those that it has to receive; as all blocks run side by side, nobody waits for a piece that
// cannot be sent.
#pragma once

#include <algorithm>
#include <cstdint>

#include "exchange_memory.cuh"

namespace moe_engine {

constexpr int kPacketThreads = 256;
constexpr int kPacketWarps = kPacketThreads / 32;

// Blocks for so many pieces, a warp each; no more than may wait at once.
inline int packet_blocks(const ExchangeState& state, std::int64_t num_pieces) {
  const std::int64_t wanted = (num_pieces + kPacketWarps - 1) / kPacketWarps;
  return static_cast<int>(std::clamp<std::int64_t>(wanted, 1, state.num_blocks));
}

// This warp's number among the grid's. Those of a row's pieces are in different blocks, so that one
// token is moved by many multiprocessors.
__device__ __forceinline__ int warp_of_grid() { return threadIdx.x / 32 * gridDim.x + blockIdx.x; }

}  // namespace moe_engine

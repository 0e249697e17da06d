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

// Of a block; the larger one where there are pieces for all warps of as many blocks as may wait at
// once. Two of these fit on a multiprocessor.
constexpr int kFewPacketThreads = 256;
constexpr int kPacketThreads = 512;

struct PacketGrid {
  int blocks;
  int threads;
};

// For so many pieces, a warp each.
inline PacketGrid packet_grid(const ExchangeState& state, std::int64_t num_pieces) {
  constexpr int kWarps = kFewPacketThreads / 32;
  const std::int64_t blocks = std::max<std::int64_t>(1, (num_pieces + kWarps - 1) / kWarps);
  if (blocks > state.num_blocks) return {state.num_blocks, kPacketThreads};
  return {static_cast<int>(blocks), kFewPacketThreads};
}

// This warp's number among the grid's. Those of a row's pieces are in different blocks, so that one
// token is moved by many multiprocessors.
__device__ __forceinline__ int warp_of_grid() { return threadIdx.x / 32 * gridDim.x + blockIdx.x; }
__device__ __forceinline__ int warps_of_grid() { return blockDim.x / 32 * gridDim.x; }

}  // namespace moe_engine

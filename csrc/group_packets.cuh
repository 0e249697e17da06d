// What the collectives of a group of ranks share (all_reduce_packets.cu, all_gather_packets.cu).
//
// They have inboxes and numbers of their own, so they may come between any two exchanges. In each
// of them every rank of the group sends something to every other one and waits for what these send.
// A place is written again two of them later: behind the one in between, for which everybody has
// sent something after the first one.
#pragma once

#include <cstdint>

#include "exchange_packets.cuh"

namespace moe_engine {

// Of a rank, see ExchangeState.
__device__ __forceinline__ std::uint32_t* group_counters(const ExchangeState& state) {
  return state.counters + 2;
}

// Packets that `from_rank` puts at `at_rank`.
__device__ __forceinline__ Packet* group_inbox(const ExchangeState& state, int at_rank,
                                               std::uint32_t epoch, int from_rank) {
  const ExchangeLayout& layout = state.layout;
  char* const buffer = state.peers.buffers[at_rank] + layout.reduce_inbox_at() +
                       (epoch & 1) * layout.reduce_inbox_bytes();
  const std::int64_t first = std::int64_t{from_rank} * layout.reduced_rows;
  return reinterpret_cast<Packet*>(buffer) + first * layout.combine_packets();
}

// A packet's words of `from`, which has `num_words`; zeros behind them.
__device__ __forceinline__ void load_words(const void* from, int num_words, int packet,
                                           std::uint32_t* words) {
#pragma unroll
  for (int w = 0; w < Packet::kWords; ++w) {
    const int word = packet * Packet::kWords + w;
    words[w] = word < num_words ? static_cast<const std::uint32_t*>(from)[word] : 0;
  }
}

__device__ __forceinline__ void store_words(void* to, int num_words, int packet,
                                            const std::uint32_t* words) {
#pragma unroll
  for (int w = 0; w < Packet::kWords; ++w) {
    const int word = packet * Packet::kWords + w;
    if (word < num_words) static_cast<std::uint32_t*>(to)[word] = words[w];
  }
}

// To all other ranks of the group, those first that this rank visits first.
__device__ __forceinline__ void send_to_group(const ExchangeState& state, const RankGroup& group,
                                              std::uint32_t epoch, std::int64_t place,
                                              const Packet& packet) {
  for (int i = 0; i < state.layout.num_ranks; ++i) {
    const int to = state.order[i];
    if (to < group.first || to >= group.first + group.size || to == state.rank) continue;
    store_packet(group_inbox(state, to, epoch, state.rank) + place, packet);
  }
}

}  // namespace moe_engine

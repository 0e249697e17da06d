// What the kernels share that combine few tokens by packets: with the norm that follows
// (combine_norm_packets.cu) and without (combine_packets.cu).
#pragma once

#include "element.cuh"
#include "exchange_packets.cuh"

namespace moe_engine {

// Pieces of a row, of a packet of each lane.
inline __device__ __host__ int pieces_of(int num_packets) { return (num_packets + 31) / 32; }

__device__ __forceinline__ Packet* result_row(const ExchangeState& state, int at_rank,
                                              int from_rank, int token) {
  const ExchangeLayout& layout = state.layout;
  char* const inbox = state.peers.buffers[at_rank] + layout.combine_inbox_at();
  const std::int64_t row = std::int64_t{from_rank} * layout.packet_tokens + token;
  return reinterpret_cast<Packet*>(inbox) + row * layout.combine_packets();
}

// Sums, for each slot with experts here, what they have made of it, and sends it home.
template <typename T>
__device__ __forceinline__ void send_results(const ExchangeState& state, const CombineArgs& args,
                                             std::uint32_t epoch, int warp, int num_warps) {
  constexpr int kPerWord = 4 / sizeof(T);
  constexpr int kAtOnce = 4;  // rows of which a lane's packets are on their way together
  const ExchangeLayout& layout = state.layout;
  const int lane = threadIdx.x % 32;
  const int top_k = layout.top_k;
  const int num_words = layout.combine_words();
  const int num_packets = layout.combine_packets();
  const int num_pieces = pieces_of(num_packets);
  const auto* const y = reinterpret_cast<const std::uint32_t*>(args.y);
  const int num_slots = layout.num_ranks * args.step_tokens;
  for (int item = warp; item < num_slots * num_pieces; item += num_warps) {
    const int slot = item / num_pieces;
    const int packet = item % num_pieces * 32 + lane;
    const std::int64_t first_choice = std::int64_t{slot} * top_k;
    const int local = lane < top_k ? args.slots[first_choice + lane] : -1;
    const float weight = lane < top_k ? args.weights[first_choice + lane] : 0;
    unsigned choices = __ballot_sync(0xFFFFFFFF, local >= 0);
    if (choices == 0) continue;
    const auto load = [&](std::int64_t row, std::uint32_t* words) {
#pragma unroll
      for (int w = 0; w < Packet::kWords; ++w) {
        const int word = packet * Packet::kWords + w;
        words[w] = word < num_words ? y[row * num_words + word] : 0;
      }
    };
    Packet out{{0, 0, 0}, epoch};
    if (args.is_summed) {
      load(slot, out.words);
    } else {
      float sums[Packet::kWords * kPerWord] = {};
      while (choices != 0) {
        std::uint32_t words[kAtOnce][Packet::kWords];
        float factors[kAtOnce];
        int num_rows = 0;
#pragma unroll
        for (int n = 0; n < kAtOnce; ++n) {
          if (choices == 0) break;
          const int choice = __ffs(choices) - 1;
          choices &= choices - 1;
          factors[n] = __shfl_sync(0xFFFFFFFF, weight, choice);
          load(first_choice + choice, words[n]);
          ++num_rows;
        }
#pragma unroll
        for (int n = 0; n < kAtOnce; ++n) {
          if (n >= num_rows) break;
#pragma unroll
          for (int w = 0; w < Packet::kWords; ++w) {
            add_scaled<T>(&sums[w * kPerWord], words[n][w], factors[n]);
          }
        }
      }
#pragma unroll
      for (int w = 0; w < Packet::kWords; ++w) out.words[w] = pack<T>(&sums[w * kPerWord]);
    }
    if (packet < num_packets) {
      const int home = slot / args.step_tokens;
      store_packet(result_row(state, home, state.rank, slot % args.step_tokens) + packet, out);
    }
  }
}

// The sums of a packet's elements.
template <typename T>
struct PacketSums {
  static constexpr int kPerWord = 4 / sizeof(T);
  float values[Packet::kWords * kPerWord] = {};

  __device__ __forceinline__ void add(const Packet& packet) {
#pragma unroll
    for (int w = 0; w < Packet::kWords; ++w) {
      moe_engine::add<T>(&values[w * kPerWord], packet.words[w]);
    }
  }

  // A word of them, rounded.
  __device__ __forceinline__ std::uint32_t packed(int w) const {
    return pack<T>(&values[w * kPerWord]);
  }
};

// Waits for what all ranks have made of a token of this rank, and adds it up in their order: a
// thread's packets `first`, `first + stride` and so on, kPackets of them if the row has as many. By
// a whole warp; packets of kAtOnce ranks are on their way together. Returns whether this thread has
// given up, with which the sums are worthless.
template <typename T, int kPackets, int kAtOnce>
__device__ __forceinline__ bool add_results(const ExchangeState& state, const CombineArgs& args,
                                            std::uint32_t epoch, int token, int first, int stride,
                                            Patience& patience, PacketSums<T> (&sums)[kPackets]) {
  const ExchangeLayout& layout = state.layout;
  const int num_packets = layout.combine_packets();
  const int comes_from = rank_of_choice(args.ids + std::int64_t{token} * layout.top_k, layout.top_k,
                                        state.num_local, threadIdx.x % 32);
  bool is_given_up = false;
  int last = -1;
  while (last < layout.num_ranks) {
    int sources[kAtOnce];
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) sources[n] = last = next_rank(comes_from, last);
    const auto is_awaited = [&](int n, int i) {
      return sources[n] < layout.num_ranks && first + i * stride < num_packets;
    };
    Packet parts[kAtOnce][kPackets];
    bool all_here = false;
    while (!all_here && !is_given_up) {
      int missing = -1;
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {
        const Packet* const row = result_row(state, state.rank, sources[n], token) + first;
#pragma unroll
        for (int i = 0; i < kPackets; ++i) {
          if (!is_awaited(n, i)) continue;
          parts[n][i] = load_packet(row + i * stride);
          if (parts[n][i].epoch != epoch) missing = sources[n];
        }
      }
      all_here = missing < 0;
      if (!all_here) is_given_up = patience.gives_up(missing);
    }
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) {
#pragma unroll
      for (int i = 0; i < kPackets; ++i) {
        if (is_awaited(n, i)) sums[i].add(parts[n][i]);
      }
    }
  }
  return is_given_up;
}

}  // namespace moe_engine

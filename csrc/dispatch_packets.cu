// Dispatch of few tokens, by packets (exchange_packets.cuh), in one launch.
#include "exchange_packets.cuh"
#include "hopper.cuh"
#include "launch.cuh"

namespace moe_engine {
namespace {

__device__ __forceinline__ Packet* inbox_row(const ExchangeState& state, int at_rank,
                                             std::uint32_t epoch, int from_rank, int token) {
  const ExchangeLayout& layout = state.layout;
  char* const inbox = state.peers.buffers[at_rank] + layout.dispatch_inbox_at() +
                      (epoch & 1) * layout.dispatch_inbox_bytes();
  const std::int64_t row = std::int64_t{from_rank} * layout.packet_tokens + token;
  return reinterpret_cast<Packet*>(inbox) + row * layout.dispatch_packets();
}

// Word `index` of the message of a token that comes.
__device__ __forceinline__ std::uint32_t message_word(const DispatchArgs& args,
                                                      const ExchangeLayout& layout, int token,
                                                      int index) {
  if (index == 0) return 1;
  const std::int64_t first_choice = std::int64_t{token} * layout.top_k;
  if (index < layout.header_words()) {
    const int choice = index - 1;
    return choice < layout.top_k
               ? static_cast<std::uint32_t>(args.ids[first_choice + choice])
               : __float_as_uint(args.weights[first_choice + choice - layout.top_k]);
  }
  const int word = index - layout.header_words();
  const std::int64_t row_words = layout.row_bytes / 4;
  if (word >= row_words) return 0;
  return reinterpret_cast<const std::uint32_t*>(args.x)[token * row_words + word];
}

// Puts word `index` of a message where it belongs in slot `slot`.
__device__ __forceinline__ void place_word(const ExchangeState& state, const DispatchArgs& args,
                                           std::int64_t slot, int index, std::uint32_t word) {
  const ExchangeLayout& layout = state.layout;
  if (index == 0) return;
  if (index < layout.header_words()) {
    const int choice = index - 1;
    if (choice < layout.top_k) {
      const int local = static_cast<int>(word) - state.rank * state.num_local;
      args.received_slots[slot * layout.top_k + choice] =
          local >= 0 && local < state.num_local ? local : -1;
    } else {
      args.received_weights[slot * layout.top_k + choice - layout.top_k] = __uint_as_float(word);
    }
    return;
  }
  const int at = index - layout.header_words();
  const std::int64_t row_words = layout.row_bytes / 4;
  if (at >= row_words) return;
  reinterpret_cast<std::uint32_t*>(args.received_x)[slot * row_words + at] = word;
}

template <int kPerLane>
__device__ __forceinline__ void send_tokens(const ExchangeState& state, const DispatchArgs& args,
                                            std::uint32_t epoch, int warp, int num_warps) {
  const ExchangeLayout& layout = state.layout;
  const int lane = threadIdx.x % 32;
  const int num_packets = layout.dispatch_packets();
  const int num_pieces = Piece<kPerLane>::count(num_packets);
  for (int item = warp; item < args.step_tokens * num_pieces; item += num_warps) {
    const int token = item / num_pieces;
    const int first = item % num_pieces * Piece<kPerLane>::kPackets + lane;
    const bool is_real = token < args.num_tokens;
    const int goes_to = is_real ? rank_of_choice(args.ids + std::int64_t{token} * layout.top_k,
                                                 layout.top_k, state.num_local, lane)
                                : -1;
    Packet packets[kPerLane];
    if (is_real) {  // before it is known where the token goes, which takes as long
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        const int packet = first + 32 * i;
        packets[i].epoch = epoch;
#pragma unroll
        for (int w = 0; w < Packet::kWords; ++w) {
          packets[i].words[w] = packet < num_packets
                                    ? message_word(args, layout, token, packet * Packet::kWords + w)
                                    : 0;
        }
      }
    }
    for (int i = 0; i < layout.num_ranks; ++i) {
      const int to = state.order[i];
      Packet* const row = inbox_row(state, to, epoch, state.rank, token);
      if (__any_sync(0xFFFFFFFF, goes_to == to)) {
#pragma unroll
        for (int j = 0; j < kPerLane; ++j) {
          if (first + 32 * j < num_packets) store_packet(row + first + 32 * j, packets[j]);
        }
      } else if (first == 0) {
        store_packet(row, Packet{{0, 0, 0}, epoch});
      }
    }
  }
}

// If the exchange is given up, what has not come counts as if nobody had sent it: what follows may
// rely on the slots.
template <int kPerLane>
__device__ __forceinline__ void receive_tokens(const ExchangeState& state, const DispatchArgs& args,
                                               std::uint32_t epoch, int warp, int num_warps) {
  const ExchangeLayout& layout = state.layout;
  const int lane = threadIdx.x % 32;
  const int num_packets = layout.dispatch_packets();
  const int num_pieces = Piece<kPerLane>::count(num_packets);
  Patience patience(state, epoch, AbortRecord::kDispatch);
  const int num_slots = layout.num_ranks * args.step_tokens;
  bool is_given_up = false;
  for (int item = warp; item < num_slots * num_pieces; item += num_warps) {
    const int slot = item / num_pieces;
    const int piece = item % num_pieces;
    const int first = piece * Piece<kPerLane>::kPackets + lane;
    const int source = slot / args.step_tokens;
    const Packet* const row = inbox_row(state, state.rank, epoch, source, slot % args.step_tokens);
    Packet packets[kPerLane];
    bool comes = true;
    while (!is_given_up) {
      // Both at once: whether the token comes, and the packets in case it does.
      const Packet header = load_packet(row);
      bool all_here = header.epoch == epoch;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        if (first + 32 * i < num_packets) {
          packets[i] = load_packet(row + first + 32 * i);
          all_here = all_here && packets[i].epoch == epoch;
        }
      }
      comes = header.epoch != epoch || header.words[0] != 0;
      if (all_here || !comes) break;
      is_given_up = patience.gives_up(source);
    }
    is_given_up = __any_sync(0xFFFFFFFF, is_given_up);
    if (comes && !is_given_up) {
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        if (first + 32 * i < num_packets) {
#pragma unroll
          for (int w = 0; w < Packet::kWords; ++w) {
            place_word(state, args, slot, (first + 32 * i) * Packet::kWords + w,
                       packets[i].words[w]);
          }
        }
      }
    } else if (piece == 0 && lane < layout.top_k) {
      args.received_slots[std::int64_t{slot} * layout.top_k + lane] = -1;
      args.received_weights[std::int64_t{slot} * layout.top_k + lane] = 0;
    }
  }
}

// Sends this rank's tokens and receives those for its experts.
//
// Shapes, N ranks, m tokens of a step, K choices: x [num_tokens, H], ids int32 and weights float32
// [num_tokens, K]; received_x [N * m, H], received_slots int32 and received_weights float32
// [N * m, K], all rows of these two written.
//
// Example, 2 ranks with 2 experts each, m = 2, K = 1; rank 0 brings tokens a and b for experts 3
// and 0, rank 1 brings c for expert 1. Rank 0 receives slots [-1, 0, 1, -1], with b and c in rows 1
// and 2 of x; rank 1 receives [1, -1, -1, -1], with a in row 0.
template <int kPerLane>
__global__ void __launch_bounds__(kPacketThreads)
    dispatch_packets_kernel(const __grid_constant__ ExchangeState state,
                            const __grid_constant__ DispatchArgs args) {
  wait_for_previous_kernels();
  if (state.next_may_start) let_next_kernel_start();
  const std::uint32_t epoch = state.counters[0];
  const int warp = warp_of_grid();
  const int num_warps = kPacketWarps * gridDim.x;
  send_tokens<kPerLane>(state, args, epoch, warp, num_warps);
  receive_tokens<kPerLane>(state, args, epoch, warp, num_warps);
}

template <int kPerLane>
void launch_dispatch(const ExchangeState& state, const DispatchArgs& args, cudaStream_t stream) {
  const std::int64_t pieces = Piece<kPerLane>::count(state.layout.dispatch_packets());
  const int blocks = packet_blocks(state, pieces * state.layout.num_ranks * args.step_tokens);
  launch_dependent("dispatch_packets_kernel", dispatch_packets_kernel<kPerLane>, dim3(blocks),
                   kPacketThreads, 0, stream, 1, state, args);
}

}  // namespace

void dispatch_packets(const ExchangeState& state, const DispatchArgs& args, cudaStream_t stream) {
  // Few packets a lane as long as there are warps for all.
  const std::int64_t slots = std::int64_t{state.layout.num_ranks} * args.step_tokens;
  const std::int64_t pieces = slots * Piece<1>::count(state.layout.dispatch_packets());
  if (pieces <= std::int64_t{2} * state.num_blocks * kPacketWarps) {
    launch_dispatch<1>(state, args, stream);
  } else {
    launch_dispatch<4>(state, args, stream);
  }
}

}  // namespace moe_engine

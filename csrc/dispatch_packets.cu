// Dispatch of few tokens, by packets (exchange_packets.cuh), in one launch.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "exchange_fp8.cuh"
#include "exchange_packets.cuh"
#include "hopper.cuh"
#include "launch.cuh"
#include "replicas.cuh"

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

// --- what a warp sends at once: the header, or a piece of the row --------------------------------

// Words of this lane's packet of the header; `id` is that of this lane's choice.
__device__ __forceinline__ void fill_header(const ExchangeLayout& layout, const DispatchArgs& args,
                                            int token, int id, int lane, Packet& out) {
  const std::int64_t first_choice = std::int64_t{token} * layout.top_k;
#pragma unroll
  for (int w = 0; w < Packet::kWords; ++w) {
    const int choice = lane * Packet::kWords + w;
    const int id_of_choice = __shfl_sync(0xFFFFFFFF, id, choice % 32);
    if (choice < layout.top_k) {
      out.words[w] = static_cast<std::uint32_t>(id_of_choice);
    } else if (choice < 2 * layout.top_k) {
      out.words[w] = __float_as_uint(args.weights[first_choice + choice - layout.top_k]);
    } else {
      out.words[w] = 0;
    }
  }
}

__device__ __forceinline__ void place_header(const ExchangeState& state, const DispatchArgs& args,
                                             std::int64_t slot, int packet, const Packet& in) {
  const int top_k = state.layout.top_k;
#pragma unroll
  for (int w = 0; w < Packet::kWords; ++w) {
    const int choice = packet * Packet::kWords + w;
    if (choice < top_k) {
      const int local = static_cast<int>(in.words[w]) - state.rank * state.num_local;
      const bool is_here = local >= 0 && local < state.num_local;
      args.received_slots[slot * top_k + choice] = is_here ? local : -1;
    } else if (choice < 2 * top_k) {
      args.received_weights[slot * top_k + choice - top_k] = __uint_as_float(in.words[w]);
    }
  }
}

// Rows as they are: kPerLane_ packets of each lane.
template <int kPerLane_>
struct PlainPiece {
  static constexpr int kPerLane = kPerLane_;
  static constexpr int kPackets = 32 * kPerLane;

  // Of the row's packets, this lane's i-th.
  static __device__ __forceinline__ int packet(int piece, int i, int lane) {
    return piece * kPackets + 32 * i + lane;
  }

  static __device__ __forceinline__ void fill(const ExchangeLayout& layout,
                                              const DispatchArgs& args, int token, int piece,
                                              int lane, Packet* out) {
    const int num_words = layout.row_bytes / 4;
    const auto* const row =
        reinterpret_cast<const std::uint32_t*>(args.x) + std::int64_t{token} * num_words;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
#pragma unroll
      for (int w = 0; w < Packet::kWords; ++w) {
        const int word = packet(piece, i, lane) * Packet::kWords + w;
        out[i].words[w] = word < num_words ? row[word] : 0;
      }
    }
  }

  static __device__ __forceinline__ void place(const ExchangeLayout& layout,
                                               const DispatchArgs& args, std::int64_t slot,
                                               int piece, int lane, const Packet* in) {
    const int num_words = layout.row_bytes / 4;
    auto* const row = reinterpret_cast<std::uint32_t*>(args.received_x) + slot * num_words;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
#pragma unroll
      for (int w = 0; w < Packet::kWords; ++w) {
        const int word = packet(piece, i, lane) * Packet::kWords + w;
        if (word < num_words) row[word] = in[i].words[w];
      }
    }
  }
};

// Rows of T in 8 bits: two groups, a packet of each of 22 lanes.
template <typename T>
struct Fp8Piece {
  static constexpr int kPerLane = 1;
  static constexpr int kPackets = 2 * kGroupPackets;

  static __device__ __forceinline__ int packet(int piece, int, int lane) {
    // The other lanes have none: beyond any row.
    return lane < kPackets ? piece * kPackets + lane : 1 << 30;
  }

  static __device__ __forceinline__ void fill(const ExchangeLayout& layout,
                                              const DispatchArgs& args, int token, int piece,
                                              int lane, Packet* out) {
    const auto* const row =
        static_cast<const char*>(args.x) + std::int64_t{token} * layout.row_bytes;
    const auto mine = quantize_eight<T>(reinterpret_cast<const uint4*>(row)[piece * 32 + lane]);
    const int half = lane / kGroupPackets;
    const int in_group = lane % kGroupPackets;
#pragma unroll
    for (int w = 0; w < Packet::kWords; ++w) {
      const int word = in_group * Packet::kWords + w;
      const int holder = (16 * half + word / 2 % 16) % 32;
      const std::uint32_t even = __shfl_sync(0xFFFFFFFF, mine.words.x, holder);
      const std::uint32_t odd = __shfl_sync(0xFFFFFFFF, mine.words.y, holder);
      const float scale = __shfl_sync(0xFFFFFFFF, mine.scale, holder);
      if (word == kGroupWords - 1) {
        out->words[w] = __float_as_uint(scale);
      } else {
        out->words[w] = word % 2 == 0 ? even : odd;
      }
    }
  }

  static __device__ __forceinline__ void place(const ExchangeLayout& layout,
                                               const DispatchArgs& args, std::int64_t slot,
                                               int piece, int lane, const Packet* in) {
    const int num_groups = layout.row_bytes / (2 * kGroup);
    const int in_group = lane % kGroupPackets;
    // The last word of the group's last packet.
    const int last = min(lane - in_group + kGroupPackets - 1, 31);
    const float scale = __uint_as_float(__shfl_sync(0xFFFFFFFF, in->words[2], last));
    const int group = 2 * piece + lane / kGroupPackets;
    if (lane >= kPackets || group >= num_groups) return;
    char* const row = static_cast<char*>(args.received_x) + slot * layout.row_bytes;
    auto* const out = reinterpret_cast<uint2*>(row + group * 2 * kGroup);
#pragma unroll
    for (int w = 0; w < Packet::kWords; ++w) {
      const int word = in_group * Packet::kWords + w;
      if (word < kGroupWords - 1) out[word] = restored<T>(in->words[w], scale);
    }
  }
};

// --- the two halves of the kernel ----------------------------------------------------------------

template <typename Piece>
__device__ __forceinline__ int pieces_of_row(const ExchangeLayout& layout) {
  return (layout.row_packets() + Piece::kPackets - 1) / Piece::kPackets;
}

// Items are (token, 0) for its header, and (token, 1 + p) for piece p of its row.
template <typename Piece>
__device__ __forceinline__ void send_tokens(const ExchangeState& state, const DispatchArgs& args,
                                            const std::int32_t* replicas, std::uint32_t epoch,
                                            int warp, int num_warps) {
  const ExchangeLayout& layout = state.layout;
  const int lane = threadIdx.x % 32;
  const int num_items = 1 + pieces_of_row<Piece>(layout);
  for (int item = warp; item < args.step_tokens * num_items; item += num_warps) {
    const int token = item / num_items;
    const int piece = item % num_items - 1;
    const bool is_header = piece < 0;
    const int id = physical_choice(args, replicas, layout.top_k, token, lane);
    const int goes_to = id >= 0 ? id / state.num_local : -1;
    Packet packets[Piece::kPerLane] = {};
    if (token < args.num_tokens) {  // before it is known where it goes, which takes as long
      if (is_header) {
        fill_header(layout, args, token, id, lane, packets[0]);
        note_choices(args, layout.top_k, token, lane, id);
      } else {
        Piece::fill(layout, args, token, piece, lane, packets);
      }
    }
    for (int i = 0; i < layout.num_ranks; ++i) {
      const int to = state.order[i];
      Packet* const row = inbox_row(state, to, epoch, state.rank, token);
      const bool comes = __any_sync(0xFFFFFFFF, goes_to == to);
      if (is_header) {
        packets[0].epoch = comes ? epoch : epoch | Packet::kNothing;
        if (lane < (comes ? layout.header_packets() : 1)) store_packet(row + lane, packets[0]);
      } else if (comes) {
#pragma unroll
        for (int j = 0; j < Piece::kPerLane; ++j) {
          const int packet = Piece::packet(piece, j, lane);
          packets[j].epoch = epoch;
          if (packet < layout.row_packets()) {
            store_packet(row + layout.header_packets() + packet, packets[j]);
          }
        }
      }
    }
  }
}

// If the exchange is given up, what has not come counts as if nobody had sent it: what follows may
// rely on the slots.
template <typename Piece>
__device__ __forceinline__ void receive_tokens(const ExchangeState& state, const DispatchArgs& args,
                                               std::uint32_t epoch, int warp, int num_warps) {
  const ExchangeLayout& layout = state.layout;
  const int lane = threadIdx.x % 32;
  const int num_items = 1 + pieces_of_row<Piece>(layout);
  Patience patience(state, epoch, AbortRecord::kDispatch);
  const int num_slots = layout.num_ranks * args.step_tokens;
  bool is_given_up = false;
  for (int item = warp; item < num_slots * num_items; item += num_warps) {
    const int slot = item / num_items;
    const int piece = item % num_items - 1;
    const bool is_header = piece < 0;
    const int source = slot / args.step_tokens;
    const Packet* const row = inbox_row(state, state.rank, epoch, source, slot % args.step_tokens);
    // Of each lane: its packets, counted from the row's first, or -1.
    int at[Piece::kPerLane];
#pragma unroll
    for (int i = 0; i < Piece::kPerLane; ++i) {
      if (is_header) {
        at[i] = i == 0 && lane < layout.header_packets() ? lane : -1;
      } else {
        const int packet = Piece::packet(piece, i, lane);
        at[i] = packet < layout.row_packets() ? layout.header_packets() + packet : -1;
      }
    }
    Packet packets[Piece::kPerLane] = {};
    bool comes = true;
    while (!is_given_up) {
      // Both at once: whether the token comes, and the packets in case it does.
      const std::uint32_t header = load_epoch(row);
      comes = header != (epoch | Packet::kNothing);
      bool all_here = header == epoch;
#pragma unroll
      for (int i = 0; i < Piece::kPerLane; ++i) {
        if (at[i] >= 0) {
          packets[i] = load_packet(row + at[i]);
          all_here = all_here && packets[i].epoch == epoch;
        }
      }
      if (all_here || !comes) break;
      is_given_up = patience.gives_up(source);
    }
    is_given_up = __any_sync(0xFFFFFFFF, is_given_up);
    if (comes && !is_given_up) {
      if (!is_header) {
        Piece::place(layout, args, slot, piece, lane, packets);
      } else if (at[0] >= 0) {
        place_header(state, args, slot, lane, packets[0]);
      }
    } else if (is_header && lane < layout.top_k) {
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
template <typename Piece>
__global__ void __launch_bounds__(kPacketThreads, 2)
    dispatch_packets_kernel(const __grid_constant__ ExchangeState state,
                            const __grid_constant__ DispatchArgs args) {
  extern __shared__ std::int32_t table[];
  const std::int32_t* const replicas = stage_replicas(args.replicas, table);
  wait_for_previous_kernels();
  if (state.next_may_start) let_next_kernel_start();
  const std::uint32_t epoch = state.counters[0];
  const int num_warps = warps_of_grid();
  send_tokens<Piece>(state, args, replicas, epoch, warp_of_grid(), num_warps);
  receive_tokens<Piece>(state, args, epoch, warp_of_grid(), num_warps);
}

template <typename Piece>
std::int64_t num_items(const ExchangeState& state, const DispatchArgs& args) {
  const int pieces = (state.layout.row_packets() + Piece::kPackets - 1) / Piece::kPackets;
  return std::int64_t{state.layout.num_ranks} * args.step_tokens * (1 + pieces);
}

template <typename Piece>
void launch(const ExchangeState& state, const DispatchArgs& args, cudaStream_t stream) {
  const PacketGrid grid = packet_grid(state, num_items<Piece>(state, args));
  launch_dependent("dispatch_packets_kernel", dispatch_packets_kernel<Piece>, dim3(grid.blocks),
                   grid.threads, replica_bytes(args.replicas), stream, 1, state, args);
}

}  // namespace

void dispatch_packets(const ExchangeState& state, const DispatchArgs& args, cudaStream_t stream) {
  if (state.wire == Wire::kFp8) {
    return state.type == ElementType::kBFloat16
               ? launch<Fp8Piece<__nv_bfloat16>>(state, args, stream)
               : launch<Fp8Piece<__half>>(state, args, stream);
  }
  // Few packets a lane as long as there are warps for all.
  const std::int64_t num_warps = std::int64_t{state.num_blocks} * kPacketThreads / 32;
  if (num_items<PlainPiece<1>>(state, args) <= num_warps) {
    launch<PlainPiece<1>>(state, args, stream);
  } else {
    launch<PlainPiece<4>>(state, args, stream);
  }
}

}  // namespace moe_engine

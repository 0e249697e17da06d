// A sum of few rows over the ranks of a group, by packets (group_packets.cuh), in one launch.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "element.cuh"
#include "group_packets.cuh"
#include "hopper.cuh"
#include "launch.cuh"

namespace moe_engine {
namespace {

constexpr int kAtOnce = 4;  // ranks of which a lane's packets are on their way together

// A lane's packet of a row.
struct Piece {
  int row;
  int packet;

  __device__ __forceinline__ Piece(int item, int num_packets) {
    const int num_pieces = (num_packets + 31) / 32;
    row = item / num_pieces;
    packet = item % num_pieces * 32 + threadIdx.x % 32;
  }
};

// Sends this rank's rows to all others of the group and adds up what all have sent.
//
// Shapes: x, out [num_rows, H]. Sums are in float32, in the order of the ranks, and rounded once,
// so all ranks get the same bits.
//
// Example, a group of ranks 2 and 3 of 4, one row each, [1, 2] and [10, 20]: both get [11, 22], and
// ranks 0 and 1 have no part in it.
template <typename T>
__global__ void __launch_bounds__(kPacketThreads, 2)
    all_reduce_packets_kernel(const __grid_constant__ ExchangeState state,
                              const __grid_constant__ AllReduceArgs args) {
  constexpr int kPerWord = 4 / sizeof(T);
  wait_for_previous_kernels();
  if (state.next_may_start) let_next_kernel_start();
  const std::uint32_t epoch = group_counters(state)[0];
  const ExchangeLayout& layout = state.layout;
  const int num_words = layout.combine_words();
  const int num_packets = layout.combine_packets();
  const int num_items = args.num_rows * ((num_packets + 31) / 32);
  const int end_rank = args.group.first + args.group.size;
  const auto place_of = [&](const Piece& piece) {
    return std::int64_t{piece.row} * num_packets + piece.packet;
  };
  const auto load_own = [&](const Piece& piece, std::uint32_t* words) {
    const auto* const x = static_cast<const std::uint32_t*>(args.x);
    load_words(x + std::int64_t{piece.row} * num_words, num_words, piece.packet, words);
  };
  for (int item = warp_of_grid(); item < num_items; item += warps_of_grid()) {
    const Piece piece(item, num_packets);
    if (piece.packet >= num_packets) continue;
    Packet packet{{}, epoch};
    load_own(piece, packet.words);
    send_to_group(state, args.group, epoch, place_of(piece), packet);
  }
  Patience patience(state, epoch, AbortRecord::kAllReduce);
  bool is_given_up = false;
  for (int item = warp_of_grid(); item < num_items && !is_given_up; item += warps_of_grid()) {
    const Piece piece(item, num_packets);
    if (piece.packet >= num_packets) continue;  // no lane waits for another one
    float sums[Packet::kWords * kPerWord] = {};
    for (int first = args.group.first; first < end_rank; first += kAtOnce) {
      Packet parts[kAtOnce];
      bool all_here = false;
      while (!all_here && !is_given_up) {
        int missing = -1;
#pragma unroll
        for (int n = 0; n < kAtOnce; ++n) {
          const int from = first + n;
          if (from >= end_rank) continue;
          if (from == state.rank) {
            load_own(piece, parts[n].words);
          } else {
            parts[n] = load_packet(group_inbox(state, state.rank, epoch, from) + place_of(piece));
            if (parts[n].epoch != epoch) missing = from;
          }
        }
        all_here = missing < 0;
        if (!all_here) is_given_up = patience.gives_up(missing);
      }
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {
        if (first + n >= end_rank) continue;
#pragma unroll
        for (int w = 0; w < Packet::kWords; ++w) add<T>(&sums[w * kPerWord], parts[n].words[w]);
      }
    }
    if (is_given_up) break;
    std::uint32_t words[Packet::kWords];
#pragma unroll
    for (int w = 0; w < Packet::kWords; ++w) words[w] = pack<T>(&sums[w * kPerWord]);
    auto* const out = static_cast<std::uint32_t*>(args.out);
    store_words(out + std::int64_t{piece.row} * num_words, num_words, piece.packet, words);
  }
  end_exchange(state, group_counters(state));
}

template <typename T>
void launch(const ExchangeState& state, const AllReduceArgs& args, cudaStream_t stream) {
  const std::int64_t pieces = (state.layout.combine_packets() + 31) / 32;
  const PacketGrid grid = packet_grid(state, pieces * args.num_rows);
  launch_dependent("all_reduce_packets_kernel", all_reduce_packets_kernel<T>, dim3(grid.blocks),
                   grid.threads, 0, stream, 1, state, args);
}

}  // namespace

void all_reduce_packets(const ExchangeState& state, const AllReduceArgs& args,
                        cudaStream_t stream) {
  switch (state.type) {
    case ElementType::kBFloat16:
      return launch<__nv_bfloat16>(state, args, stream);
    case ElementType::kFloat16:
      return launch<__half>(state, args, stream);
    case ElementType::kFloat32:
      return launch<float>(state, args, stream);
  }
}

}  // namespace moe_engine

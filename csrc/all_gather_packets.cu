// What the ranks of a group bring, side by side at each of them, by packets (group_packets.cuh).
#include "group_packets.cuh"
#include "hopper.cuh"
#include "launch.cuh"

namespace moe_engine {
namespace {

// Who brings nothing sends a packet all the same, as everybody has to.
__device__ __host__ __forceinline__ int packets_of(int num_words) {
  return num_words == 0 ? 1 : (num_words + Packet::kWords - 1) / Packet::kWords;
}
__device__ __host__ __forceinline__ int pieces_of(int num_words) {
  return (packets_of(num_words) + 31) / 32;
}

// Words of the rank that brings a piece, while all pieces are gone through in their order.
struct Part {
  int member = 0;       // of the group
  int first_piece = 0;  // of all
  std::int64_t first_word = 0;

  // To the one that has this piece.
  __device__ __forceinline__ void advance(const AllGatherArgs& args, int piece) {
    while (piece >= first_piece + pieces_of(args.num_words[member])) {
      first_piece += pieces_of(args.num_words[member]);
      first_word += args.num_words[member];
      ++member;
    }
  }
};

// Sends this rank's words to all others of the group and receives theirs.
//
// Shapes, w[i] words of the group's rank i: x [w of this rank], out [sum of w].
//
// Example, ranks 2 and 3 of 4 with words [a, b] and [c]: both get [a, b, c], and ranks 0 and 1 have
// no part in it.
__global__ void __launch_bounds__(kPacketThreads, 2)
    all_gather_packets_kernel(const __grid_constant__ ExchangeState state,
                              const __grid_constant__ AllGatherArgs args) {
  wait_for_previous_kernels();
  if (state.next_may_start) let_next_kernel_start();
  const std::uint32_t epoch = group_counters(state)[0];
  const int lane = threadIdx.x % 32;
  const int own_words = args.num_words[state.rank - args.group.first];
  for (int piece = warp_of_grid(); piece < pieces_of(own_words); piece += warps_of_grid()) {
    const int place = piece * 32 + lane;
    if (place >= packets_of(own_words)) continue;
    Packet packet{{}, epoch};
    load_words(args.x, own_words, place, packet.words);
    send_to_group(state, args.group, epoch, place, packet);
  }
  Patience patience(state, epoch, AbortRecord::kAllGather);
  int num_pieces = 0;
  for (int i = 0; i < args.group.size; ++i) num_pieces += pieces_of(args.num_words[i]);
  Part part;
  bool is_given_up = false;
  for (int piece = warp_of_grid(); piece < num_pieces && !is_given_up; piece += warps_of_grid()) {
    part.advance(args, piece);
    const int num_words = args.num_words[part.member];
    const int place = (piece - part.first_piece) * 32 + lane;
    if (place >= packets_of(num_words)) continue;  // no lane waits for another one
    const int from = args.group.first + part.member;
    Packet packet;
    if (from == state.rank) {
      load_words(args.x, num_words, place, packet.words);
    } else {
      const Packet* const inbox = group_inbox(state, state.rank, epoch, from);
      while ((packet = load_packet(inbox + place)).epoch != epoch) {
        is_given_up = patience.gives_up(from);
        if (is_given_up) break;
      }
      if (is_given_up) break;
    }
    store_words(static_cast<std::uint32_t*>(args.out) + part.first_word, num_words, place,
                packet.words);
  }
  end_exchange(state, group_counters(state));
}

}  // namespace

void all_gather_packets(const ExchangeState& state, const AllGatherArgs& args,
                        cudaStream_t stream) {
  std::int64_t num_pieces = 0;
  for (int i = 0; i < args.group.size; ++i) num_pieces += pieces_of(args.num_words[i]);
  const PacketGrid grid = packet_grid(state, num_pieces);
  launch_dependent("all_gather_packets_kernel", all_gather_packets_kernel, dim3(grid.blocks),
                   grid.threads, 0, stream, 1, state, args);
}

}  // namespace moe_engine

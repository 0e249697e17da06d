// Combine of few tokens, by packets (exchange_packets.cuh), in one launch.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "element.cuh"
#include "exchange_packets.cuh"
#include "hopper.cuh"
#include "launch.cuh"

namespace moe_engine {
namespace {

constexpr int kAtOnce = 4;  // rows of which a lane's packets are on their way together

// Pieces of a row, of a packet of each lane.
__device__ __host__ __forceinline__ int pieces_of(int num_packets) {
  return (num_packets + 31) / 32;
}

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

// Waits for what all ranks have made of this rank's tokens, and adds it up in their order. Ends
// early if the exchange is given up.
template <typename T>
__device__ __forceinline__ void receive_results(const ExchangeState& state, const CombineArgs& args,
                                                std::uint32_t epoch, int warp, int num_warps) {
  constexpr int kPerWord = 4 / sizeof(T);
  const ExchangeLayout& layout = state.layout;
  const int lane = threadIdx.x % 32;
  const int num_words = layout.combine_words();
  const int num_packets = layout.combine_packets();
  const int num_pieces = pieces_of(num_packets);
  Patience patience(state, epoch, AbortRecord::kCombine);
  for (int item = warp; item < args.num_tokens * num_pieces; item += num_warps) {
    const int token = item / num_pieces;
    const int packet = item % num_pieces * 32 + lane;
    const bool has_packet = packet < num_packets;
    const int comes_from = rank_of_choice(args.ids + std::int64_t{token} * layout.top_k,
                                          layout.top_k, state.num_local, lane);
    float sums[Packet::kWords * kPerWord] = {};
    bool is_given_up = false;
    int last = -1;
    while (last < layout.num_ranks) {
      int sources[kAtOnce];
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) sources[n] = last = next_rank(comes_from, last);
      Packet parts[kAtOnce];
      bool all_here = !has_packet;
      while (!all_here && !is_given_up) {
        int missing = -1;
#pragma unroll
        for (int n = 0; n < kAtOnce; ++n) {
          if (sources[n] >= layout.num_ranks) continue;
          parts[n] = load_packet(result_row(state, state.rank, sources[n], token) + packet);
          if (parts[n].epoch != epoch) missing = sources[n];
        }
        all_here = missing < 0;
        if (!all_here) is_given_up = patience.gives_up(missing);
      }
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {
        if (sources[n] >= layout.num_ranks) continue;
#pragma unroll
        for (int w = 0; w < Packet::kWords; ++w) {
          add<T>(&sums[w * kPerWord], parts[n].words[w]);
        }
      }
    }
    if (__any_sync(0xFFFFFFFF, is_given_up)) return;
#pragma unroll
    for (int w = 0; w < Packet::kWords; ++w) {
      const int word = packet * Packet::kWords + w;
      if (has_packet && word < num_words) {
        reinterpret_cast<std::uint32_t*>(args.out)[std::int64_t{token} * num_words + word] =
            pack<T>(&sums[w * kPerWord]);
      }
    }
  }
}

// Sums what this rank's experts have made of each token, sends it home, and sums what comes back.
//
// Shapes, N ranks, m tokens of a step, K choices: y [N * m * K, H], or [N * m, H] if summed
// already; slots int32 and weights float32 [N * m, K] as dispatch received them; ids int32
// [num_tokens, K] as it sent them; out [num_tokens, H]. Sums are in float32, over a rank's choices
// in their order, rounded to the type of y, then over the ranks in theirs, rounded once.
//
// Example, as for dispatch_packets_kernel, with weights 0.5 and experts that double: rank 0 sends
// b and c back to ranks 0 and 1, rank 1 sends a to rank 0, whose out is [a, b].
template <typename T>
__global__ void __launch_bounds__(kPacketThreads, 2)
    combine_packets_kernel(const __grid_constant__ ExchangeState state,
                           const __grid_constant__ CombineArgs args) {
  wait_for_previous_kernels();
  if (state.next_may_start) let_next_kernel_start();
  const std::uint32_t epoch = state.counters[0];
  const int warp = warp_of_grid();
  const int num_warps = warps_of_grid();
  send_results<T>(state, args, epoch, warp, num_warps);
  receive_results<T>(state, args, epoch, warp, num_warps);
  end_exchange(state, state.counters);
}

template <typename T>
void launch_combine(const ExchangeState& state, const CombineArgs& args, cudaStream_t stream) {
  const std::int64_t pieces = pieces_of(state.layout.combine_packets());
  const PacketGrid grid = packet_grid(state, pieces * state.layout.num_ranks * args.step_tokens);
  launch_dependent("combine_packets_kernel", combine_packets_kernel<T>, dim3(grid.blocks),
                   grid.threads, 0, stream, 1, state, args);
}

}  // namespace

void combine_packets(const ExchangeState& state, const CombineArgs& args, cudaStream_t stream) {
  switch (state.type) {
    case ElementType::kBFloat16:
      return launch_combine<__nv_bfloat16>(state, args, stream);
    case ElementType::kFloat16:
      return launch_combine<__half>(state, args, stream);
    case ElementType::kFloat32:
      return launch_combine<float>(state, args, stream);
  }
}

}  // namespace moe_engine

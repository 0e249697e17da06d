// Combine of few tokens, by packets (exchange_packets.cuh), in one launch.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "combine_packets.cuh"
#include "hopper.cuh"
#include "launch.cuh"

namespace moe_engine {
namespace {

// Sums what comes back of this rank's tokens. Ends early if the exchange is given up.
template <typename T>
__device__ __forceinline__ void receive_results(const ExchangeState& state, const CombineArgs& args,
                                                std::uint32_t epoch, int warp, int num_warps) {
  constexpr int kAtOnce = 4;
  const int num_words = state.layout.combine_words();
  const int num_pieces = pieces_of(state.layout.combine_packets());
  Patience patience(state, epoch, AbortRecord::kCombine);
  for (int item = warp; item < args.num_tokens * num_pieces; item += num_warps) {
    const int token = item / num_pieces;
    const int packet = item % num_pieces * 32 + threadIdx.x % 32;
    PacketSums<T> sums[1];
    const bool is_given_up =
        add_results<T, 1, kAtOnce>(state, args, epoch, token, packet, 0, patience, sums);
    if (__any_sync(0xFFFFFFFF, is_given_up)) return;
#pragma unroll
    for (int w = 0; w < Packet::kWords; ++w) {
      const int word = packet * Packet::kWords + w;
      if (word < num_words) {
        reinterpret_cast<std::uint32_t*>(args.out)[std::int64_t{token} * num_words + word] =
            sums[0].packed(w);
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

// Combine of few tokens, the residual addition and the RMSNorm that follows, by packets
// (exchange_packets.cuh), in one launch.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "combine_packets.cuh"
#include "hopper.cuh"
#include "launch.cuh"
#include "warp_sum.cuh"

namespace moe_engine {
namespace {

constexpr int kWarps = kPacketThreads / 32;
constexpr int kMaxPackets = 3;  // of a thread

// What a block shares. The copy engine brings the rows while packets are on their way; behind a row
// are zeros, up to the words of kPackets packets of each thread.
template <int kPackets>
struct Shared {
  static constexpr int kWords = kPackets * kPacketThreads * Packet::kWords;
  alignas(128) std::uint32_t weight[kWords];
  alignas(128) std::uint32_t residual[kWords];  // of one token after the other
  float squares[2][kWarps];                     // of a token, and the one before
  std::uint64_t loaded;                         // barrier
};

// By one thread. The first of a block's tokens waits for the weight, too.
template <int kPackets>
__device__ __forceinline__ void load_residual(const ExchangeState& state, const NextNorm& norm,
                                              Shared<kPackets>& shared, int token,
                                              int awaited_bytes) {
  const int row_bytes = state.layout.row_bytes;
  barrier_arrive_expecting(&shared.loaded, awaited_bytes);
  copy_row(shared_address(shared.residual),
           static_cast<const char*>(norm.residual) + std::int64_t{token} * row_bytes, row_bytes,
           &shared.loaded);
}

// Sums what comes back of this rank's tokens, a block for each token, adds that to the residual
// stream and normalises it. All threads of a block end early if one of them gives up; nothing that
// was copied to shared memory is on its way then.
template <typename T, int kPackets>
__device__ __forceinline__ void receive_normed(const ExchangeState& state, const CombineArgs& args,
                                               const NextNorm& norm, std::uint32_t epoch,
                                               Shared<kPackets>& shared) {
  constexpr int kPerWord = 4 / sizeof(T);
  constexpr int kAtOnce = 4 / kPackets;  // a thread's registers hold four packets
  const auto word_of = [](int i, int w) {
    return (static_cast<int>(threadIdx.x) + i * kPacketThreads) * Packet::kWords + w;
  };
  const int num_words = state.layout.combine_words();
  Patience patience(state, epoch, AbortRecord::kCombine);
  int phase = 0;
  for (int token = blockIdx.x; token < args.num_tokens; token += gridDim.x, ++phase) {
    const int parity = phase % 2;
    PacketSums<T> sums[kPackets];
    const bool is_given_up = add_results<T, kPackets, kAtOnce>(
        state, args, epoch, token, threadIdx.x, kPacketThreads, patience, sums);
    barrier_wait(&shared.loaded, parity);
    const std::int64_t first_word = std::int64_t{token} * num_words;
    auto* const new_residual = static_cast<std::uint32_t*>(norm.new_residual) + first_word;
    std::uint32_t stream[kPackets][Packet::kWords];
    float squares = 0;
#pragma unroll
    for (int i = 0; i < kPackets; ++i) {
#pragma unroll
      for (int w = 0; w < Packet::kWords; ++w) {
        const int word = word_of(i, w);
        const float2 combined = unpack<T>(sums[i].packed(w));
        const float2 residual = unpack<T>(shared.residual[word]);
        const float added[2] = {__fadd_rn(combined.x, residual.x),
                                __fadd_rn(combined.y, residual.y)};
        stream[i][w] = pack<T>(added);
        const float2 rounded = unpack<T>(stream[i][w]);
        squares = fmaf(rounded.x, rounded.x, fmaf(rounded.y, rounded.y, squares));
        if (word < num_words) new_residual[word] = stream[i][w];
      }
    }
    squares = warp_sum(squares);
    if (threadIdx.x % 32 == 0) shared.squares[parity][threadIdx.x / 32] = squares;
    if (__syncthreads_or(is_given_up)) return;
    const int next_token = token + gridDim.x;
    if (threadIdx.x == 0 && next_token < args.num_tokens) {
      load_residual(state, norm, shared, next_token, state.layout.row_bytes);
    }
    float total = 0;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) total += shared.squares[parity][warp];
    const float scale = rsqrtf(total / (num_words * kPerWord) + norm.eps);
    auto* const normed = static_cast<std::uint32_t*>(norm.normed) + first_word;
#pragma unroll
    for (int i = 0; i < kPackets; ++i) {
#pragma unroll
      for (int w = 0; w < Packet::kWords; ++w) {
        const int word = word_of(i, w);
        const float2 values = unpack<T>(stream[i][w]);
        const float scaled[2] = {values.x * scale, values.y * scale};
        const float2 rounded = unpack<T>(pack<T>(scaled));
        const float2 weight = unpack<T>(shared.weight[word]);
        const float products[2] = {rounded.x * weight.x, rounded.y * weight.y};
        if (word < num_words) normed[word] = pack<T>(products);
      }
    }
  }
}

// combine_packets_kernel, and the residual addition and RMSNorm of what comes back.
//
// Shapes, beside those of combine_packets_kernel: residual, normed, new_residual [num_tokens, H];
// weight [H]. What is combined is rounded as `out` would be; the residual is added in float32 and
// rounded; the mean of the squares is that of the rounded sum, in float32; the sum is divided by
// its root, rounded, multiplied by the weight, and rounded.
//
// Example, H = 2, eps = 0, a token whose experts at two ranks have made [1, 1] and [1, 0]:
// combined [2, 1]; with residual [1, 3] and weight [1, 10] new_residual is [3, 4], the mean of its
// squares 12.5, normed [0.849, 11.314].
template <typename T, int kPackets>
__global__ void __launch_bounds__(kPacketThreads, 2)
    combine_norm_packets_kernel(const __grid_constant__ ExchangeState state,
                                const __grid_constant__ CombineArgs args,
                                const __grid_constant__ NextNorm norm) {
  __shared__ Shared<kPackets> shared;
  const int row_bytes = state.layout.row_bytes;
  const int first_token = blockIdx.x;
  const bool loads = threadIdx.x == 0 && first_token < args.num_tokens;
  if (loads) {
    barrier_init(&shared.loaded, 1);
    barrier_init_fence();
    copy_row(shared_address(shared.weight), norm.weight, row_bytes, &shared.loaded);
  }
  for (int word = row_bytes / 4 + threadIdx.x; word < shared.kWords; word += kPacketThreads) {
    shared.weight[word] = shared.residual[word] = 0;
  }
  __syncthreads();
  wait_for_previous_kernels();
  if (state.next_may_start) let_next_kernel_start();
  if (loads) load_residual(state, norm, shared, first_token, 2 * row_bytes);
  const std::uint32_t epoch = state.counters[0];
  send_results<T>(state, args, epoch, warp_of_grid(), warps_of_grid());
  receive_normed<T, kPackets>(state, args, norm, epoch, shared);
  end_exchange(state, state.counters);
}

template <typename T>
void launch(const ExchangeState& state, const CombineArgs& args, const NextNorm& norm,
            cudaStream_t stream) {
  const int num_packets = state.layout.combine_packets();
  const std::int64_t pieces = pieces_of(num_packets);
  const PacketGrid grid = packet_grid(state, pieces * state.layout.num_ranks * args.step_tokens);
  auto* kernel = combine_norm_packets_kernel<T, 1>;
  if (num_packets > kPacketThreads) kernel = combine_norm_packets_kernel<T, 2>;
  if (num_packets > 2 * kPacketThreads) kernel = combine_norm_packets_kernel<T, 3>;
  launch_dependent("combine_norm_packets_kernel", kernel, dim3(grid.blocks), kPacketThreads, 0,
                   stream, 1, state, args, norm);
}

}  // namespace

bool combine_norm_fits(const ExchangeLayout& layout) {
  return layout.combine_packets() <= kMaxPackets * kPacketThreads;
}

void combine_norm_packets(const ExchangeState& state, const CombineArgs& args, const NextNorm& norm,
                          cudaStream_t stream) {
  switch (state.type) {
    case ElementType::kBFloat16:
      return launch<__nv_bfloat16>(state, args, norm, stream);
    case ElementType::kFloat16:
      return launch<__half>(state, args, norm, stream);
    case ElementType::kFloat32:
      return launch<float>(state, args, norm, stream);
  }
}

}  // namespace moe_engine

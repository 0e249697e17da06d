// Combine of many tokens, by rows (exchange_rows.cuh): one kernel sends, another one waits and
// sums.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "element.cuh"
#include "exchange_rows.cuh"
#include "hopper.cuh"
#include "launch.cuh"

namespace moe_engine {
namespace {

// The last flag of a source for combine says that it has sent all results, to everybody.
__device__ __forceinline__ std::uint32_t* done_flag(const ExchangeState& state, int at_rank,
                                                    int source) {
  return flag(state, state.layout.combine_flags_at(), at_rank, source, state.layout.num_chunks());
}

// The sums of 16 bytes' elements.
template <typename T>
struct Sums {
  static constexpr int kPerWord = 4 / sizeof(T);
  float values[4 * kPerWord] = {};

  __device__ __forceinline__ void add(const uint4& piece) {
    moe_engine::add<T>(&values[0], piece.x);
    moe_engine::add<T>(&values[kPerWord], piece.y);
    moe_engine::add<T>(&values[2 * kPerWord], piece.z);
    moe_engine::add<T>(&values[3 * kPerWord], piece.w);
  }

  __device__ __forceinline__ void add_scaled(const uint4& piece, float factor) {
    moe_engine::add_scaled<T>(&values[0], piece.x, factor);
    moe_engine::add_scaled<T>(&values[kPerWord], piece.y, factor);
    moe_engine::add_scaled<T>(&values[2 * kPerWord], piece.z, factor);
    moe_engine::add_scaled<T>(&values[3 * kPerWord], piece.w, factor);
  }

  __device__ __forceinline__ uint4 packed() const {
    return make_uint4(pack<T>(&values[0]), pack<T>(&values[kPerWord]),
                      pack<T>(&values[2 * kPerWord]), pack<T>(&values[3 * kPerWord]));
  }
};

// One slot's weighted sum, to its row at home; a warp.
template <typename T>
__device__ __forceinline__ void send_result(const ExchangeState& state, const CombineArgs& args,
                                            std::int64_t slot, uint4* to, int lane) {
  constexpr int kAtOnce = 4;  // choices whose rows are on their way together
  const ExchangeLayout& layout = state.layout;
  const int num_pieces = layout.row_bytes / 16;
  const auto* const y = static_cast<const uint4*>(args.y);
  const std::int64_t first_choice = slot * layout.top_k;
  const bool is_choice = lane < layout.top_k;
  const int local = is_choice ? args.slots[first_choice + lane] : -1;
  const float weight = is_choice ? args.weights[first_choice + lane] : 0;
  const unsigned choices = __ballot_sync(0xFFFFFFFF, local >= 0);
  if (choices == 0) return;
  if (args.is_summed) {
    for (int i = lane; i < num_pieces; i += 32) to[i] = y[slot * num_pieces + i];
    return;
  }
  for (int first = 0; first < num_pieces; first += 32) {
    const int i = first + lane;
    Sums<T> sums;
    unsigned rest = choices;
    while (rest != 0) {
      uint4 pieces[kAtOnce];
      float factors[kAtOnce];
      int num = 0;
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {
        const bool more = rest != 0;
        const int choice = more ? __ffs(rest) - 1 : 0;
        rest &= rest - 1;
        factors[n] = __shfl_sync(0xFFFFFFFF, weight, choice);
        num += more;
        if (more && i < num_pieces) pieces[n] = y[(first_choice + choice) * num_pieces + i];
      }
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {
        if (n < num && i < num_pieces) sums.add_scaled(pieces[n], factors[n]);
      }
    }
    if (i < num_pieces) to[i] = sums.packed();
  }
}

// Sums what this rank's experts have made of each token and writes it to the token's rank.
//
// Shapes as in combine_packets_kernel; results at every rank [N * m, H], by the rank whose experts
// made them. A block takes chunks of one source's tokens.
//
// Example, as for send_rows_kernel: rank 0 writes what expert 0 has made of c to row 0 of the
// results at rank 1, from where on the rows are those of rank 0.
template <typename T>
__global__ void __launch_bounds__(kRowThreads)
    send_results_kernel(const __grid_constant__ ExchangeState state,
                        const __grid_constant__ CombineArgs args) {
  wait_for_previous_kernels();
  if (state.next_may_start) let_next_kernel_start();
  const ExchangeLayout& layout = state.layout;
  const std::uint32_t epoch = state.counters[0];
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int num_chunks = num_step_chunks(args.step_tokens);
  for (int item = blockIdx.x; item < layout.num_ranks * num_chunks; item += gridDim.x) {
    const int home = state.order[item / num_chunks];
    const int chunk = item % num_chunks;
    char* const results = state.peers.buffers[home] + layout.results_at();
    for (int i = 0; i < kTokensPerWarp; ++i) {
      const int token = chunk * kChunkTokens + warp * kTokensPerWarp + i;
      if (token >= args.step_tokens) break;
      const std::int64_t made_here = std::int64_t{state.rank} * args.step_tokens + token;
      send_result<T>(state, args, std::int64_t{home} * args.step_tokens + token,
                     reinterpret_cast<uint4*>(results + made_here * layout.row_bytes), lane);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      fence_for_peers();
      store_flag(flag(state, layout.combine_flags_at(), home, state.rank, chunk), epoch);
    }
  }
}

// Adds up, for each of this rank's tokens, what the ranks of its experts have made of it.
//
// Shapes: ids int32 [num_tokens, K]; out [num_tokens, H], summed over the ranks in their order in
// float32 and rounded once.
//
// Example: of a token with experts at ranks 0 and 2, whose results are 1 and 3, out is 4; that of
// one without an expert is 0.
template <typename T>
__global__ void __launch_bounds__(kRowThreads)
    receive_results_kernel(const __grid_constant__ ExchangeState state,
                           const __grid_constant__ CombineArgs args) {
  wait_for_previous_kernels();
  if (state.next_may_start) let_next_kernel_start();
  const ExchangeLayout& layout = state.layout;
  const std::uint32_t epoch = state.counters[0];
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int num_pieces = layout.row_bytes / 16;
  const char* const results = state.peers.buffers[state.rank] + layout.results_at();
  Patience patience(state, epoch, AbortRecord::kCombine);
  if (blockIdx.x == 0) {  // the kernel before this one has sent all results
    for (int to = threadIdx.x; to < layout.num_ranks; to += kRowThreads) {
      fence_for_peers();
      store_flag(done_flag(state, to, state.rank), epoch);
    }
  }
  for (int chunk = blockIdx.x; chunk < num_step_chunks(args.step_tokens); chunk += gridDim.x) {
    bool is_here = true;
    for (int from = threadIdx.x; from < layout.num_ranks && is_here; from += kRowThreads) {
      is_here = wait_for_flag(flag(state, layout.combine_flags_at(), state.rank, from, chunk),
                              epoch, patience, from);
    }
    if (!__syncthreads_and(is_here)) break;
    for (int t = 0; t < kTokensPerWarp; ++t) {
      const int token = chunk * kChunkTokens + warp * kTokensPerWarp + t;
      if (token >= args.num_tokens) break;
      const int id = lane < layout.top_k ? args.ids[std::int64_t{token} * layout.top_k + lane] : -1;
      const int comes_from = id >= 0 ? id / state.num_local : -1;
      auto* const out = static_cast<uint4*>(args.out) + std::int64_t{token} * num_pieces;
      for (int first = 0; first < num_pieces; first += 32) {
        const int i = first + lane;
        Sums<T> sums;
        for (int from = 0; from < layout.num_ranks; ++from) {
          if (!__any_sync(0xFFFFFFFF, comes_from == from) || i >= num_pieces) continue;
          const std::int64_t row = std::int64_t{from} * args.step_tokens + token;
          sums.add(reinterpret_cast<const uint4*>(results + row * layout.row_bytes)[i]);
        }
        if (i < num_pieces) out[i] = sums.packed();
      }
    }
  }
  if (blockIdx.x == 0) {
    for (int from = threadIdx.x; from < layout.num_ranks; from += kRowThreads) {
      if (!wait_for_flag(done_flag(state, state.rank, from), epoch, patience, from)) break;
    }
  }
  end_exchange(state);
}

template <typename T>
void launch_combine(const ExchangeState& state, const CombineArgs& args, cudaStream_t stream) {
  launch_dependent("send_results_kernel", send_results_kernel<T>,
                   dim3(chunk_blocks(state, args.step_tokens, state.layout.num_ranks)), kRowThreads,
                   0, stream, 1, state, args);
  launch_dependent("receive_results_kernel", receive_results_kernel<T>,
                   dim3(chunk_blocks(state, args.step_tokens, 1)), kRowThreads, 0, stream, 1, state,
                   args);
}

}  // namespace

void combine_rows(const ExchangeState& state, const CombineArgs& args, cudaStream_t stream) {
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

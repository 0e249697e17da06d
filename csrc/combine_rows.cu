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

// Warps share a token's row.
constexpr int kWarpsPerToken = 4;
constexpr int kThreads = 32 * kWarpsPerToken * kChunkTokens;
// Chunks that a block waits for at once, where there are more than blocks.
constexpr int kChunksAtOnce = 4;

// The sums of 16 bytes' elements.
template <typename T>
struct Sums {
  static constexpr int kPerWord = 4 / sizeof(T);
  float values[4 * kPerWord] = {};

  __device__ __forceinline__ void add(const uint4& piece, float factor) {
    add_scaled<T>(&values[0], piece.x, factor);
    add_scaled<T>(&values[kPerWord], piece.y, factor);
    add_scaled<T>(&values[2 * kPerWord], piece.z, factor);
    add_scaled<T>(&values[3 * kPerWord], piece.w, factor);
  }

  __device__ __forceinline__ uint4 packed() const {
    return make_uint4(pack<T>(&values[0]), pack<T>(&values[kPerWord]),
                      pack<T>(&values[2 * kPerWord]), pack<T>(&values[3 * kPerWord]));
  }
};

// The choices of a slot that are of this rank, one after the other.
struct Choices {
  unsigned rest;
  float weight;  // of this lane's choice

  // The next one's row, counted from the slot's first, or -1; by a warp.
  __device__ __forceinline__ int next(float& factor) {
    if (rest == 0) return -1;
    const int choice = __ffs(rest) - 1;
    rest &= rest - 1;
    factor = __shfl_sync(0xFFFFFFFF, weight, choice);
    return choice;
  }
};

// The ranks that have experts of a token, one after the other.
struct Sources {
  int comes_from;  // of this lane's choice, or -1
  int step_tokens;
  int last = -1;

  // The row of the next one's result, counted from that of rank 0, or -1; by a warp.
  __device__ __forceinline__ int next(float& factor) {
    last = next_rank(comes_from, last);
    factor = 1;
    return last < kMaxExchangeRanks ? last * step_tokens : -1;
  }
};

// Adds up rows of `from`, scaled, in float32; a warp, pieces [first, end) of 16 bytes.
template <typename T, typename Rows>
__device__ __forceinline__ void sum_rows(const uint4* from, int num_pieces, const Rows& rows,
                                         int first, int end, uint4* to) {
  // What is on its way together.
  constexpr int kRows = 2;
  constexpr int kPieces = 2;
  for (; first < end; first += 32 * kPieces) {
    const int piece = first + threadIdx.x % 32;
    Sums<T> sums[kPieces];
    Rows rest = rows;
    bool more = true;
    while (more) {
      float factors[kRows];
      uint4 pieces[kRows][kPieces];
      int num_rows = 0;
#pragma unroll
      for (int n = 0; n < kRows; ++n) {
        const int row = rest.next(factors[n]);
        more = row >= 0;
        num_rows += more;
#pragma unroll
        for (int p = 0; p < kPieces; ++p) {
          if (more && piece + 32 * p < end) {
            pieces[n][p] = from[std::int64_t{row} * num_pieces + piece + 32 * p];
          }
        }
      }
#pragma unroll
      for (int n = 0; n < kRows; ++n) {
        if (n >= num_rows) break;
#pragma unroll
        for (int p = 0; p < kPieces; ++p) sums[p].add(pieces[n][p], factors[n]);
      }
    }
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
      if (piece + 32 * p < end) to[piece + 32 * p] = sums[p].packed();
    }
  }
}

// This warp's token of a chunk, and which pieces of its row.
struct Share {
  int token;
  int first;
  int end;

  __device__ __forceinline__ Share(int chunk, int num_pieces) {
    const int warp = threadIdx.x / 32;
    const int most = (num_pieces + 32 * kWarpsPerToken - 1) / (32 * kWarpsPerToken) * 32;
    token = chunk * kChunkTokens + warp / kWarpsPerToken;
    first = warp % kWarpsPerToken * most;
    end = min(first + most, num_pieces);
  }
};

// A warp's share of a slot's weighted sum, to its row at home.
template <typename T>
__device__ __forceinline__ void send_result(const ExchangeState& state, const CombineArgs& args,
                                            std::int64_t slot, const Share& share, uint4* to) {
  const ExchangeLayout& layout = state.layout;
  const int lane = threadIdx.x % 32;
  const int num_pieces = layout.row_bytes / 16;
  const auto* const y = static_cast<const uint4*>(args.y);
  const std::int64_t first_choice = slot * layout.top_k;
  const bool is_choice = lane < layout.top_k;
  const int local = is_choice ? args.slots[first_choice + lane] : -1;
  const float weight = is_choice ? args.weights[first_choice + lane] : 0;
  const unsigned choices = __ballot_sync(0xFFFFFFFF, local >= 0);
  if (choices == 0) return;
  if (args.is_summed) {
    const uint4* const row = y + slot * num_pieces;
    for (int i = share.first + lane; i < share.end; i += 32) to[i] = row[i];
    return;
  }
  sum_rows<T>(y + first_choice * num_pieces, num_pieces, Choices{choices, weight}, share.first,
              share.end, to);
}

// Sums what this rank's experts have made of each token and writes it to the token's rank.
//
// Shapes as in combine_packets_kernel; results at every rank [N * m, H], by the rank whose experts
// made them. A block takes chunks of one source's tokens.
//
// Example, as for send_rows_kernel: rank 0 writes what expert 0 has made of c to row 0 of the
// results at rank 1, from where on the rows are those of rank 0.
template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
    send_results_kernel(const __grid_constant__ ExchangeState state,
                        const __grid_constant__ CombineArgs args) {
  wait_for_previous_kernels();
  if (state.next_may_start) let_next_kernel_start();
  const ExchangeLayout& layout = state.layout;
  const std::uint32_t epoch = state.counters[0];
  const int num_pieces = layout.row_bytes / 16;
  const int num_chunks = num_step_chunks(args.step_tokens);
  for (int item = blockIdx.x; item < layout.num_ranks * num_chunks; item += gridDim.x) {
    const int home = state.order[item / num_chunks];
    const int chunk = item % num_chunks;
    const Share share(chunk, num_pieces);
    if (share.token < args.step_tokens) {
      auto* const results =
          reinterpret_cast<uint4*>(state.peers.buffers[home] + layout.results_at());
      const std::int64_t made_here = std::int64_t{state.rank} * args.step_tokens + share.token;
      send_result<T>(state, args, std::int64_t{home} * args.step_tokens + share.token, share,
                     results + made_here * num_pieces);
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
__global__ void __launch_bounds__(kThreads, 2)
    receive_results_kernel(const __grid_constant__ ExchangeState state,
                           const __grid_constant__ CombineArgs args) {
  wait_for_previous_kernels();
  if (state.next_may_start) let_next_kernel_start();
  const ExchangeLayout& layout = state.layout;
  const std::uint32_t epoch = state.counters[0];
  const int lane = threadIdx.x % 32;
  const int num_pieces = layout.row_bytes / 16;
  const auto* const results =
      reinterpret_cast<const uint4*>(state.peers.buffers[state.rank] + layout.results_at());
  Patience patience(state, epoch, AbortRecord::kCombine);
  if (blockIdx.x == 0) {  // the kernel before this one has sent all results
    for (int to = threadIdx.x; to < layout.num_ranks; to += kThreads) {
      fence_for_peers();
      store_flag(done_flag(state, to, state.rank), epoch);
    }
  }
  const int num_chunks = num_step_chunks(args.step_tokens);
  const int at_once = min(kChunksAtOnce, (num_chunks + gridDim.x - 1) / gridDim.x);
  for (int first = blockIdx.x * at_once; first < num_chunks; first += gridDim.x * at_once) {
    const int num = min(at_once, num_chunks - first);
    int comes_from[kChunksAtOnce];
#pragma unroll
    for (int i = 0; i < kChunksAtOnce; ++i) {
      const Share share(first + i, num_pieces);
      comes_from[i] = -1;
      if (i < num && share.token < args.num_tokens) {
        comes_from[i] = rank_of_choice(args.ids + std::int64_t{share.token} * layout.top_k,
                                       layout.top_k, state.num_local, lane);
      }
    }
    bool is_here = true;
    for (int i = threadIdx.x; i < layout.num_ranks * num && is_here; i += kThreads) {
      const int from = i / num;
      is_here =
          wait_for_flag(flag(state, layout.combine_flags_at(), state.rank, from, first + i % num),
                        epoch, patience, from);
    }
    if (!__syncthreads_and(is_here)) break;
#pragma unroll
    for (int i = 0; i < kChunksAtOnce; ++i) {
      const Share share(first + i, num_pieces);
      if (i >= num || share.token >= args.num_tokens) break;
      const std::int64_t at = std::int64_t{share.token} * num_pieces;
      sum_rows<T>(results + at, num_pieces, Sources{comes_from[i], args.step_tokens}, share.first,
                  share.end, static_cast<uint4*>(args.out) + at);
    }
  }
  if (blockIdx.x == 0) {
    for (int from = threadIdx.x; from < layout.num_ranks; from += kThreads) {
      if (!wait_for_flag(done_flag(state, state.rank, from), epoch, patience, from)) break;
    }
  }
  end_exchange(state);
}

template <typename T>
void launch_combine(const ExchangeState& state, const CombineArgs& args, cudaStream_t stream) {
  const int num_chunks = num_step_chunks(args.step_tokens);
  launch_dependent("send_results_kernel", send_results_kernel<T>,
                   dim3(sending_blocks(state.layout.num_ranks * num_chunks, 2)), kThreads, 0,
                   stream, 1, state, args);
  launch_dependent("receive_results_kernel", receive_results_kernel<T>,
                   dim3(std::min(num_chunks, state.num_blocks)), kThreads, 0, stream, 1, state,
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

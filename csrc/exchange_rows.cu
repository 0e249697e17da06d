// The exchange of many tokens: whole rows go straight to their slots in the buffers of other ranks,
// and a flag says when a chunk of a source's tokens is complete. Two launches each way: the first
// sends and never waits, the second waits and takes little of the GPU.
//
// A rank writes into its peers' buffers for the next exchange only when all have given back what
// they received in this one: its combine waits for a flag from each that it has sent all results.
#include <algorithm>

#include "element.cuh"
#include "exchange_memory.cuh"
#include "hopper.cuh"
#include "launch.cuh"

namespace moe_engine {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kTokensPerWarp = kChunkTokens / kWarps;
constexpr int kPieceBytes = 4096;  // of a row, that is on its way through shared memory at once
constexpr int kStages = 3;         // pieces of a warp

__device__ __forceinline__ int num_step_chunks(int step_tokens) {
  return (step_tokens + kChunkTokens - 1) / kChunkTokens;
}

// The flag that `source` sets at `at_rank` when it has written `chunk`.
__device__ __forceinline__ std::uint32_t* flag(const ExchangeState& state, std::int64_t flags_at,
                                               int at_rank, int source, int chunk) {
  auto* const flags = reinterpret_cast<std::uint32_t*>(state.peers.buffers[at_rank] + flags_at);
  return flags + source * state.layout.flags_of_rank() + chunk;
}

// False if the exchange was given up. A flag may be of the next exchange already, of no later one.
__device__ __forceinline__ bool wait_for_flag(const std::uint32_t* from, std::uint32_t epoch,
                                              Patience& patience, int source) {
  while (load_flag(from) - epoch > 1) {  // as they go round, and are 0 at first
    if (patience.gives_up(source)) return false;
  }
  return true;
}

// The last flag of a source for combine says that it has sent all results, to everybody.
__device__ __forceinline__ std::uint32_t* done_flag(const ExchangeState& state, int at_rank,
                                                    int source) {
  return flag(state, state.layout.combine_flags_at(), at_rank, source, state.layout.num_chunks());
}

// Hands a piece in shared memory to the copy engine, which writes it to global memory of any rank.
__device__ __forceinline__ void copy_out(void* to, std::uint32_t from_shared, int num_bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(
                   __cvta_generic_to_global(to)),
               "r"(from_shared), "r"(num_bytes)
               : "memory");
}

__device__ __forceinline__ void commit_copies_out() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Until, of this thread's groups, all but the last kNum have been read from shared memory.
template <int kNum>
__device__ __forceinline__ void wait_until_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kNum) : "memory");
}

// Until all of this thread's copies have been written.
__device__ __forceinline__ void wait_until_written() {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

// --- dispatch ------------------------------------------------------------------------------------

struct SendShared {
  alignas(128) char pieces[kWarps][kStages][kPieceBytes];
  std::uint64_t loaded[kWarps][kStages];  // barriers
};

// Expert slots and weights of slot `me * step_tokens + token` at all ranks; -1 and 0 where a choice
// is not of the rank.
__device__ __forceinline__ void send_choices(const ExchangeState& state, const DispatchArgs& args,
                                             int token, int lane) {
  const ExchangeLayout& layout = state.layout;
  if (lane >= layout.top_k) return;
  const std::int64_t source = std::int64_t{token} * layout.top_k + lane;
  const bool is_real = token < args.num_tokens;
  const int id = is_real ? args.ids[source] : -1;
  const float weight = is_real ? args.weights[source] : 0;
  const std::int64_t slot = std::int64_t{state.rank} * args.step_tokens + token;
  for (int i = 0; i < layout.num_ranks; ++i) {
    const int to = state.order[i];
    char* const buffer = state.peers.buffers[to];
    const int local = id - to * state.num_local;
    const bool is_there = id >= 0 && local >= 0 && local < state.num_local;
    const std::int64_t at = slot * layout.top_k + lane;
    reinterpret_cast<std::int32_t*>(buffer + layout.slots_at())[at] = is_there ? local : -1;
    reinterpret_cast<float*>(buffer + layout.weights_at())[at] = is_there ? weight : 0;
  }
}

// A warp's tokens of a chunk, piece by piece: memory to shared memory, and from there to each rank
// that has an expert of the token. `turn` counts the warp's pieces since the kernel began.
__device__ __forceinline__ void send_rows(const ExchangeState& state, const DispatchArgs& args,
                                          SendShared& shared, int first_token, int& turn) {
  const ExchangeLayout& layout = state.layout;
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  // Of the two tokens those that go somewhere, one after the other.
  static_assert(kTokensPerWarp == 2);
  const auto rank_of_choice = [&](int token) {
    const bool is_real = token < args.num_tokens && lane < layout.top_k;
    const int id = is_real ? args.ids[std::int64_t{token} * layout.top_k + lane] : -1;
    return id >= 0 ? id / state.num_local : -1;
  };
  int goes_to = rank_of_choice(first_token);
  int next_goes_to = rank_of_choice(first_token + 1);
  const bool has_first = __any_sync(0xFFFFFFFF, goes_to >= 0);
  const bool has_second = __any_sync(0xFFFFFFFF, next_goes_to >= 0);
  if (!has_first) {
    ++first_token;
    goes_to = next_goes_to;
  }
  const int per_row = (layout.row_bytes + kPieceBytes - 1) / kPieceBytes;
  const int num_pieces = (has_first + has_second) * per_row;
  const auto piece_bytes = [&](int piece) {
    return min(kPieceBytes, layout.row_bytes - piece % per_row * kPieceBytes);
  };
  const auto load = [&](int piece) {
    if (lane != 0 || piece >= num_pieces) return;
    const int stage = (turn + piece) % kStages;
    std::uint64_t* const barrier = &shared.loaded[warp][stage];
    const char* const row = static_cast<const char*>(args.x) +
                            std::int64_t{first_token + piece / per_row} * layout.row_bytes;
    barrier_arrive_expecting(barrier, piece_bytes(piece));
    copy_row(shared_address(shared.pieces[warp][stage]), row + piece % per_row * kPieceBytes,
             piece_bytes(piece), barrier);
  };
  for (int piece = 0; piece < kStages - 1; ++piece) load(piece);
  for (int piece = 0; piece < num_pieces; ++piece) {
    const int stage = (turn + piece) % kStages;
    barrier_wait(&shared.loaded[warp][stage], (turn + piece) / kStages % 2);
    if (piece == per_row) goes_to = next_goes_to;
    const int token = first_token + piece / per_row;
    const std::int64_t slot = std::int64_t{state.rank} * args.step_tokens + token;
    for (int i = 0; i < layout.num_ranks; ++i) {
      const int to = state.order[i];
      if (__any_sync(0xFFFFFFFF, goes_to == to) && lane == 0) {
        char* const row = state.peers.buffers[to] + layout.rows_at() + slot * layout.row_bytes;
        copy_out(row + piece % per_row * kPieceBytes, shared_address(shared.pieces[warp][stage]),
                 piece_bytes(piece));
      }
    }
    if (lane == 0) {
      commit_copies_out();
      wait_until_read<1>();  // the piece before this one: the next load takes its place
    }
    __syncwarp();
    load(piece + kStages - 1);
  }
  turn += num_pieces;
  if (lane == 0) wait_until_written();
}

// Writes this rank's tokens into the buffers of the ranks that have their experts.
//
// Shapes, N ranks, m tokens of a step, K choices: x [num_tokens, H], ids int32 and weights float32
// [num_tokens, K]; at every rank rows [N * m, H], slots and weights [N * m, K], of which this rank
// writes m. Rows that none of a rank's experts wants are left as they are.
//
// Example, 2 ranks with 2 experts each, m = 2, K = 1; rank 1 brings token c for expert 0. Rank 0
// gets c in row 2, and slots [0, -1] from row 2 on; rank 1 gets slots [-1, -1] there.
__global__ void __launch_bounds__(kThreads)
    send_rows_kernel(const __grid_constant__ ExchangeState state,
                     const __grid_constant__ DispatchArgs args) {
  extern __shared__ __align__(128) char memory[];
  auto& shared = *reinterpret_cast<SendShared*>(memory);
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (auto& of_warp : shared.loaded) {
      for (std::uint64_t& barrier : of_warp) barrier_init(&barrier, 1);
    }
    barrier_init_fence();
  }
  __syncthreads();
  wait_for_previous_kernels();
  if (state.next_may_start) let_next_kernel_start();
  const std::uint32_t epoch = state.counters[0];
  int turn = 0;
  for (int chunk = blockIdx.x; chunk < num_step_chunks(args.step_tokens); chunk += gridDim.x) {
    const int first_token = chunk * kChunkTokens + warp * kTokensPerWarp;
    for (int i = 0; i < kTokensPerWarp; ++i) {
      if (first_token + i < args.step_tokens) send_choices(state, args, first_token + i, lane);
    }
    send_rows(state, args, shared, first_token, turn);
    __syncthreads();
    for (int to = threadIdx.x; to < state.layout.num_ranks; to += kThreads) {
      fence_for_peers();
      store_flag(flag(state, state.layout.dispatch_flags_at(), to, state.rank, chunk), epoch);
    }
  }
}

constexpr int kWaitThreads = 1024;

// Ends when every rank's tokens of the step are here. One block.
//
// Example, 2 ranks and a step of 20 tokens, 16 to a flag: 4 flags, of chunks 0 and 1 of each rank.
__global__ void __launch_bounds__(kWaitThreads)
    wait_for_rows_kernel(const __grid_constant__ ExchangeState state, int step_tokens) {
  wait_for_previous_kernels();
  if (state.next_may_start) let_next_kernel_start();
  const std::uint32_t epoch = state.counters[0];
  Patience patience(state, epoch, AbortRecord::kDispatch);
  const int num_chunks = num_step_chunks(step_tokens);
  for (int i = threadIdx.x; i < state.layout.num_ranks * num_chunks; i += kWaitThreads) {
    const int source = i / num_chunks;
    const std::uint32_t* const from =
        flag(state, state.layout.dispatch_flags_at(), state.rank, source, i % num_chunks);
    if (!wait_for_flag(from, epoch, patience, source)) return;
  }
}

// --- combine -------------------------------------------------------------------------------------

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
__global__ void __launch_bounds__(kThreads)
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
__global__ void __launch_bounds__(kThreads)
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
    for (int to = threadIdx.x; to < layout.num_ranks; to += kThreads) {
      fence_for_peers();
      store_flag(done_flag(state, to, state.rank), epoch);
    }
  }
  for (int chunk = blockIdx.x; chunk < num_step_chunks(args.step_tokens); chunk += gridDim.x) {
    bool is_here = true;
    for (int from = threadIdx.x; from < layout.num_ranks && is_here; from += kThreads) {
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
    for (int from = threadIdx.x; from < layout.num_ranks; from += kThreads) {
      if (!wait_for_flag(done_flag(state, state.rank, from), epoch, patience, from)) break;
    }
  }
  end_exchange(state);
}

int chunk_blocks(const ExchangeState& state, int step_tokens, int num_parts) {
  const int chunks = (step_tokens + kChunkTokens - 1) / kChunkTokens;
  return std::clamp(chunks * num_parts, 1, state.num_blocks);
}

template <typename T>
void launch_combine(const ExchangeState& state, const CombineArgs& args, cudaStream_t stream) {
  launch_dependent("send_results_kernel", send_results_kernel<T>,
                   dim3(chunk_blocks(state, args.step_tokens, state.layout.num_ranks)), kThreads, 0,
                   stream, 1, state, args);
  launch_dependent("receive_results_kernel", receive_results_kernel<T>,
                   dim3(chunk_blocks(state, args.step_tokens, 1)), kThreads, 0, stream, 1, state,
                   args);
}

}  // namespace

void dispatch_rows(const ExchangeState& state, const DispatchArgs& args, cudaStream_t stream) {
  constexpr int kSharedBytes = sizeof(SendShared);
  CHECK_CUDA(cudaFuncSetAttribute(send_rows_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  kSharedBytes));
  launch_dependent("send_rows_kernel", send_rows_kernel,
                   dim3(chunk_blocks(state, args.step_tokens, 1)), kThreads, kSharedBytes, stream,
                   1, state, args);
  launch_dependent("wait_for_rows_kernel", wait_for_rows_kernel, dim3(1), kWaitThreads, 0, stream,
                   1, state, args.step_tokens);
}

void combine_rows(const ExchangeState& state, const CombineArgs& args, cudaStream_t stream) {
  switch (args.type) {
    case ElementType::kBFloat16:
      return launch_combine<__nv_bfloat16>(state, args, stream);
    case ElementType::kFloat16:
      return launch_combine<__half>(state, args, stream);
    case ElementType::kFloat32:
      return launch_combine<float>(state, args, stream);
  }
}

}  // namespace moe_engine

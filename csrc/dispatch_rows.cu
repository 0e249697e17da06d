// Dispatch of many tokens, by rows (exchange_rows.cuh): one kernel sends, another one waits. Rows
// in 8 bits are restored by a third.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "exchange_fp8.cuh"
#include "exchange_rows.cuh"
#include "hopper.cuh"
#include "launch.cuh"
#include "replicas.cuh"

namespace moe_engine {
namespace {

constexpr int kRowWarps = kChunkTokens;  // a token each
constexpr int kRowThreads = 32 * kRowWarps;
constexpr int kPieceBytes = 4096;  // of a row, that is on its way through shared memory at once
constexpr int kStages = 3;         // pieces of a warp

// What the pieces of a row become on the wire: what they are.
struct PlainWire {
  static constexpr int kBlocks = 4;          // of a multiprocessor, as shared memory allows
  static constexpr int kWirePieceBytes = 0;  // they are sent from where they have been loaded

  static __device__ __forceinline__ int wire_bytes(int piece_bytes) { return piece_bytes; }
};

// Groups of T in 8 bits, with their scales.
template <typename T>
struct Fp8Wire {
  static constexpr int kBlocks = 3;
  static constexpr int kGroupBytes = 4 * kGroupWords;
  static constexpr int kWirePieceBytes = kPieceBytes / (2 * kGroup) * kGroupBytes;

  static __device__ __forceinline__ int wire_bytes(int piece_bytes) {
    return piece_bytes / (2 * kGroup) * kGroupBytes;
  }

  // A warp, two groups at a time; several times at once, as each takes a chain of shuffles.
  static __device__ __forceinline__ void quantize(const char* piece, int piece_bytes, char* out) {
    constexpr int kAtOnce = 4;
    const int lane = threadIdx.x % 32;
    const auto* const elements = reinterpret_cast<const uint4*>(piece) + lane;
    const int num_pairs = piece_bytes / (4 * kGroup);
    for (int first = 0; first < num_pairs; first += kAtOnce) {
      QuantizedEight eights[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        eights[i] = quantize_eight<T>(elements[min(first + i, num_pairs - 1) * 32]);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (first + i >= num_pairs) break;
        const int group = 2 * (first + i) + lane / 16;
        auto* const to = reinterpret_cast<std::uint32_t*>(out + group * kGroupBytes);
        to[lane % 16 * 2] = eights[i].words.x;
        to[lane % 16 * 2 + 1] = eights[i].words.y;
        if (lane % 16 == 0) to[kGroupWords - 1] = __float_as_uint(eights[i].scale);
      }
    }
    async_proxy_fence();  // the copy engine reads it next
    __syncwarp();
  }
};

template <typename W>
struct SendShared {
  alignas(128) char pieces[kRowWarps][kStages][kPieceBytes];
  alignas(128) char wire[kRowWarps][kStages][W::kWirePieceBytes > 0 ? W::kWirePieceBytes : 16];
  std::uint64_t loaded[kRowWarps][kStages];  // barriers
};

// Where a warp loads and sends its next piece.
struct SendRing {
  RingPosition<kStages> load_at;
  RingPosition<kStages> send_at;
};

// Of a lane: its choice of a token.
struct Choice {
  int id;  // of the expert, or -1
  float weight;
};

__device__ __forceinline__ Choice load_choice(const DispatchArgs& args,
                                              const std::int32_t* replicas, int top_k, int token,
                                              int lane) {
  const bool is_choice = token < args.num_tokens && lane < top_k;
  return {physical_choice(args, replicas, top_k, token, lane),
          is_choice ? args.weights[std::int64_t{token} * top_k + lane] : 0};
}

// Expert slots and weights of slot `me * step_tokens + token` at all ranks; -1 and 0 where a choice
// is not of the rank.
__device__ __forceinline__ void send_choice(const ExchangeState& state, const DispatchArgs& args,
                                            int token, const Choice& choice, int lane) {
  const ExchangeLayout& layout = state.layout;
  note_choices(args, layout.top_k, token, lane, choice.id);
  if (lane >= layout.top_k) return;
  const std::int64_t slot = std::int64_t{state.rank} * args.step_tokens + token;
  for (int i = 0; i < layout.num_ranks; ++i) {
    const int to = state.order[i];
    char* const buffer = state.peers.buffers[to];
    const int local = choice.id - to * state.num_local;
    const bool is_there = choice.id >= 0 && local >= 0 && local < state.num_local;
    const std::int64_t at = slot * layout.top_k + lane;
    reinterpret_cast<std::int32_t*>(buffer + layout.slots_at())[at] = is_there ? local : -1;
    reinterpret_cast<float*>(buffer + layout.weights_at())[at] = is_there ? choice.weight : 0;
  }
}

// A warp's tokens, one of each of `num` chunks, piece by piece: memory to shared memory, and from
// there to each rank that has an expert of it. What comes next is on its way meanwhile: pieces, and
// choices. The copies to the ranks are still on their way at the end.
template <typename W>
__device__ __forceinline__ void send_tokens(const ExchangeState& state, const DispatchArgs& args,
                                            const std::int32_t* replicas, SendShared<W>& shared,
                                            int first_chunk, int num, SendRing& ring) {
  const ExchangeLayout& layout = state.layout;
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int num_pieces = (layout.row_bytes + kPieceBytes - 1) / kPieceBytes;
  const auto piece_bytes = [&](int piece) {
    return min(kPieceBytes, layout.row_bytes - piece * kPieceBytes);
  };
  const auto token_of = [&](int i) { return (first_chunk + i) * kChunkTokens + warp; };
  Choice next = load_choice(args, replicas, layout.top_k, token_of(0), lane);
  int ahead = 0;
  int piece_ahead = 0;
  const auto load = [&] {
    if (ahead == num || token_of(ahead) >= args.num_tokens) return;
    if (lane == 0) {
      std::uint64_t* const barrier = &shared.loaded[warp][ring.load_at.stage];
      const char* const row =
          static_cast<const char*>(args.x) + std::int64_t{token_of(ahead)} * layout.row_bytes;
      barrier_arrive_expecting(barrier, piece_bytes(piece_ahead));
      copy_row(shared_address(shared.pieces[warp][ring.load_at.stage]),
               row + piece_ahead * kPieceBytes, piece_bytes(piece_ahead), barrier);
    }
    ring.load_at.advance();
    if (++piece_ahead == num_pieces) {
      piece_ahead = 0;
      ++ahead;
    }
  };
  for (int i = 0; i < kStages - 1; ++i) load();
  for (int n = 0; n < num; ++n) {
    const int token = token_of(n);
    const Choice choice = next;
    if (n + 1 < num) next = load_choice(args, replicas, layout.top_k, token_of(n + 1), lane);
    if (token >= args.step_tokens) break;
    send_choice(state, args, token, choice, lane);
    if (token >= args.num_tokens) continue;
    const int goes_to = choice.id >= 0 ? choice.id / state.num_local : -1;
    const std::int64_t slot = std::int64_t{state.rank} * args.step_tokens + token;
    for (int piece = 0; piece < num_pieces; ++piece) {
      const int stage = ring.send_at.stage;
      barrier_wait(&shared.loaded[warp][stage], ring.send_at.parity);
      ring.send_at.advance();
      const char* out = shared.pieces[warp][stage];
      if constexpr (W::kWirePieceBytes > 0) {
        W::quantize(out, piece_bytes(piece), shared.wire[warp][stage]);
        out = shared.wire[warp][stage];
      }
      const std::int64_t at = slot * layout.wire_bytes + piece * W::wire_bytes(kPieceBytes);
      for (int i = 0; i < layout.num_ranks; ++i) {
        const int to = state.order[i];
        if (__any_sync(0xFFFFFFFF, goes_to == to) && lane == 0) {
          copy_out(state.peers.buffers[to] + layout.rows_at() + at, shared_address(out),
                   W::wire_bytes(piece_bytes(piece)));
        }
      }
      if (lane == 0) {
        commit_copies_out();
        wait_until_read<1>();  // the piece before this one: the next load takes its place
      }
      __syncwarp();
      load();
    }
  }
}

// Writes this rank's tokens into the buffers of the ranks that have their experts.
//
// Shapes, N ranks, m tokens of a step, K choices: x [num_tokens, H], ids int32 and weights float32
// [num_tokens, K]; at every rank rows [N * m, H], slots and weights [N * m, K], of which this rank
// writes m. Rows that none of a rank's experts wants are left as they are.
//
// Example, 2 ranks with 2 experts each, m = 2, K = 1; rank 1 brings token c for expert 0. Rank 0
// gets c in row 2, and slots [0, -1] from row 2 on; rank 1 gets slots [-1, -1] there.
template <typename W>
__global__ void __launch_bounds__(kRowThreads)
    send_rows_kernel(const __grid_constant__ ExchangeState state,
                     const __grid_constant__ DispatchArgs args) {
  extern __shared__ __align__(128) char memory[];
  auto& shared = *reinterpret_cast<SendShared<W>*>(memory);
  if (threadIdx.x == 0) {
    for (auto& of_warp : shared.loaded) {
      for (std::uint64_t& barrier : of_warp) barrier_init(&barrier, 1);
    }
    barrier_init_fence();
  }
  const std::int32_t* const replicas = stage_replicas(
      args.replicas, reinterpret_cast<std::int32_t*>(memory + sizeof(SendShared<W>)));
  __syncthreads();
  wait_for_previous_kernels();
  let_next_kernel_start();  // the block that waits
  const std::uint32_t epoch = state.counters[0];
  SendRing ring;
  const int num_chunks = num_step_chunks(args.step_tokens);
  const int at_once = chunks_at_once(num_chunks);
  for (int first = blockIdx.x * at_once; first < num_chunks; first += gridDim.x * at_once) {
    const int num = min(at_once, num_chunks - first);
    send_tokens(state, args, replicas, shared, first, num, ring);
    if (threadIdx.x % 32 == 0) wait_until_written();
    __syncthreads();
    for (int i = threadIdx.x; i < state.layout.num_ranks * num; i += kRowThreads) {
      fence_for_peers();
      store_flag(
          flag(state, state.layout.dispatch_flags_at(), i / num, state.rank, first + i % num),
          epoch);
    }
  }
}

constexpr int kWaitThreads = 1024;

// Ends when every rank's tokens of the step are here. One block.
//
// Example, 2 ranks and a step of 6 tokens, 4 to a flag: 4 flags, of chunks 0 and 1 of each rank.
__global__ void __launch_bounds__(kWaitThreads)
    wait_for_rows_kernel(const __grid_constant__ ExchangeState state, int step_tokens) {
  if (state.next_may_start) let_next_kernel_start();
  // Set by a kernel that ended before the one that sends let this one start.
  const std::uint32_t epoch = load_flag(&state.counters[0]);
  Patience patience(state, epoch, AbortRecord::kDispatch);
  const int num_chunks = num_step_chunks(step_tokens);
  for (int i = threadIdx.x; i < state.layout.num_ranks * num_chunks; i += kWaitThreads) {
    const int source = i / num_chunks;
    const std::uint32_t* const from =
        flag(state, state.layout.dispatch_flags_at(), state.rank, source, i % num_chunks);
    if (!wait_for_flag(from, epoch, patience, source)) break;
  }
  wait_for_previous_kernels();  // as others write what that one reads
}

// Rows in 8 bits as rows of T, a warp each; those that no expert here wants are left out.
//
// Shapes, R = N * m: rows in the buffer [R, wire_bytes]; slots int32 [R, K]; x [R, H].
//
// Example: a group whose scale is 0.5 and whose first byte is 0x40, 2 in e4m3, begins with 1.
template <typename T>
__global__ void __launch_bounds__(kRowThreads)
    restore_rows_kernel(const __grid_constant__ ExchangeState state,
                        const __grid_constant__ DispatchArgs args) {
  wait_for_previous_kernels();
  let_next_kernel_start();
  const ExchangeLayout& layout = state.layout;
  const char* const buffer = state.peers.buffers[state.rank];
  const auto* const slots = reinterpret_cast<const std::int32_t*>(buffer + layout.slots_at());
  constexpr int kAtOnce = 4;  // pairs of groups whose words are on their way together
  const int lane = threadIdx.x % 32;
  const int num_slots = layout.num_ranks * args.step_tokens;
  const int num_warps = kRowWarps * gridDim.x;
  for (int slot = blockIdx.x * kRowWarps + threadIdx.x / 32; slot < num_slots; slot += num_warps) {
    const std::int64_t row = slot;
    const int local = lane < layout.top_k ? slots[row * layout.top_k + lane] : -1;
    if (!__any_sync(0xFFFFFFFF, local >= 0)) continue;
    const auto* const words =
        reinterpret_cast<const std::uint32_t*>(buffer + layout.rows_at() + row * layout.wire_bytes);
    auto* const out =
        reinterpret_cast<uint4*>(static_cast<char*>(args.received_x) + row * layout.row_bytes);
    const int num_pairs = layout.row_bytes / (4 * kGroup);
    for (int first = 0; first < num_pairs; first += kAtOnce) {
      uint2 of_lane[kAtOnce];
      float scales[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int group = 2 * min(first + i, num_pairs - 1) + lane / 16;
        const std::uint32_t* const of_group = words + group * kGroupWords;
        of_lane[i] = make_uint2(of_group[lane % 16 * 2], of_group[lane % 16 * 2 + 1]);
        scales[i] = __uint_as_float(of_group[kGroupWords - 1]);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (first + i >= num_pairs) break;
        const uint2 low = restored<T>(of_lane[i].x, scales[i]);
        const uint2 high = restored<T>(of_lane[i].y, scales[i]);
        out[(first + i) * 32 + lane] = make_uint4(low.x, low.y, high.x, high.y);
      }
    }
  }
}

template <typename W>
void launch_send(const ExchangeState& state, const DispatchArgs& args, cudaStream_t stream) {
  const int shared_bytes = sizeof(SendShared<W>) + replica_bytes(args.replicas);
  // Of any launch, so that it stays the same for those that a graph holds.
  constexpr int kMostBytes = sizeof(SendShared<W>) + kMostReplicaBytes;
  CHECK_CUDA(cudaFuncSetAttribute(send_rows_kernel<W>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  kMostBytes));
  launch_dependent("send_rows_kernel", send_rows_kernel<W>,
                   dim3(sending_blocks(num_step_chunks(args.step_tokens), W::kBlocks)), kRowThreads,
                   shared_bytes, stream, 1, state, args);
}

template <typename T>
void launch_restore(const ExchangeState& state, const DispatchArgs& args, cudaStream_t stream) {
  const int num_slots = state.layout.num_ranks * args.step_tokens;
  const int blocks = std::min((num_slots + kRowWarps - 1) / kRowWarps, 16 * num_multiprocessors());
  launch_dependent("restore_rows_kernel", restore_rows_kernel<T>, dim3(blocks), kRowThreads, 0,
                   stream, 1, state, args);
}

}  // namespace

void dispatch_rows(const ExchangeState& state, const DispatchArgs& args, cudaStream_t stream) {
  const bool is_fp8 = state.wire == Wire::kFp8;
  const bool is_half = state.type == ElementType::kFloat16;
  if (!is_fp8) {
    launch_send<PlainWire>(state, args, stream);
  } else if (is_half) {
    launch_send<Fp8Wire<__half>>(state, args, stream);
  } else {
    launch_send<Fp8Wire<__nv_bfloat16>>(state, args, stream);
  }
  launch_dependent("wait_for_rows_kernel", wait_for_rows_kernel, dim3(1), kWaitThreads, 0, stream,
                   1, state, args.step_tokens);
  if (is_fp8)
    (is_half ? launch_restore<__half> : launch_restore<__nv_bfloat16>)(state, args, stream);
}

}  // namespace moe_engine

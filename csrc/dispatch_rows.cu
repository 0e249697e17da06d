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
  static constexpr int kWirePieceBytes = 0;  // they are sent from where they have been loaded

  static __device__ __forceinline__ int wire_bytes(int piece_bytes) { return piece_bytes; }
};

// Groups of T in 8 bits, with their scales.
template <typename T>
struct Fp8Wire {
  static constexpr int kGroupBytes = 4 * kGroupWords;
  static constexpr int kWirePieceBytes = kPieceBytes / (2 * kGroup) * kGroupBytes;

  static __device__ __forceinline__ int wire_bytes(int piece_bytes) {
    return piece_bytes / (2 * kGroup) * kGroupBytes;
  }

  // A warp; several groups at once, as each takes a chain of shuffles.
  static __device__ __forceinline__ void quantize(const char* piece, int piece_bytes, char* out) {
    constexpr int kAtOnce = 4;
    const int lane = threadIdx.x % 32;
    const int num_groups = piece_bytes / (2 * kGroup);
    for (int first = 0; first < num_groups; first += kAtOnce) {
      float4 fours[kAtOnce];
      std::uint32_t words[kAtOnce];
      float scales[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int group = min(first + i, num_groups - 1);
        fours[i] = unpack_four<T>(reinterpret_cast<const uint2*>(piece + group * 2 * kGroup)[lane]);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) scales[i] = group_scale(fours[i]);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) words[i] = quantized(fours[i], scales[i]);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (first + i >= num_groups) break;
        auto* const to = reinterpret_cast<std::uint32_t*>(out + (first + i) * kGroupBytes);
        to[lane] = words[i];
        if (lane == 0) to[kGroupWords - 1] = __float_as_uint(scales[i]);
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

// Expert slots and weights of slot `me * step_tokens + token` at all ranks; -1 and 0 where a choice
// is not of the rank. `id` is that of this lane's choice.
__device__ __forceinline__ void send_choices(const ExchangeState& state, const DispatchArgs& args,
                                             int token, int id, int lane) {
  const ExchangeLayout& layout = state.layout;
  note_choices(args, layout.top_k, token, lane, id);
  if (lane >= layout.top_k) return;
  const std::int64_t source = std::int64_t{token} * layout.top_k + lane;
  const float weight = token < args.num_tokens ? args.weights[source] : 0;
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

// A warp's token, piece by piece: memory to shared memory, and from there to each rank that has an
// expert of it. Its copies are still on their way at the end.
template <typename W>
__device__ __forceinline__ void send_row(const ExchangeState& state, const DispatchArgs& args,
                                         SendShared<W>& shared, int token, int id, SendRing& ring) {
  const ExchangeLayout& layout = state.layout;
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int goes_to = id >= 0 ? id / state.num_local : -1;
  if (!__any_sync(0xFFFFFFFF, goes_to >= 0)) return;
  const int num_pieces = (layout.row_bytes + kPieceBytes - 1) / kPieceBytes;
  const auto piece_bytes = [&](int piece) {
    return min(kPieceBytes, layout.row_bytes - piece * kPieceBytes);
  };
  const char* const row = static_cast<const char*>(args.x) + std::int64_t{token} * layout.row_bytes;
  const std::int64_t slot = std::int64_t{state.rank} * args.step_tokens + token;
  int num_loaded = 0;
  const auto load = [&] {
    if (num_loaded == num_pieces) return;
    if (lane == 0) {
      std::uint64_t* const barrier = &shared.loaded[warp][ring.load_at.stage];
      barrier_arrive_expecting(barrier, piece_bytes(num_loaded));
      copy_row(shared_address(shared.pieces[warp][ring.load_at.stage]),
               row + num_loaded * kPieceBytes, piece_bytes(num_loaded), barrier);
    }
    ring.load_at.advance();
    ++num_loaded;
  };
  for (int i = 0; i < kStages - 1; ++i) load();
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
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
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
    for (int chunk = first; chunk < first + num; ++chunk) {
      const int token = chunk * kChunkTokens + warp;
      const int id = physical_choice(args, replicas, state.layout.top_k, token, lane);
      if (token < args.step_tokens) send_choices(state, args, token, id, lane);
      send_row(state, args, shared, token, id, ring);
    }
    if (lane == 0) wait_until_written();
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
  constexpr int kAtOnce = 8;  // groups whose words are on their way together
  const int lane = threadIdx.x % 32;
  const int num_slots = layout.num_ranks * args.step_tokens;
  const int num_warps = kRowWarps * gridDim.x;
  for (int slot = blockIdx.x * kRowWarps + threadIdx.x / 32; slot < num_slots; slot += num_warps) {
    const std::int64_t row = slot;
    const int local = lane < layout.top_k ? slots[row * layout.top_k + lane] : -1;
    if (!__any_sync(0xFFFFFFFF, local >= 0)) continue;
    const auto* const words =
        reinterpret_cast<const std::uint32_t*>(buffer + layout.rows_at() + row * layout.wire_bytes);
    auto* const out = static_cast<char*>(args.received_x) + row * layout.row_bytes;
    const int num_groups = layout.row_bytes / (2 * kGroup);
    for (int first = 0; first < num_groups; first += kAtOnce) {
      std::uint32_t of_lane[kAtOnce];
      float scales[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const std::uint32_t* const group = words + min(first + i, num_groups - 1) * kGroupWords;
        of_lane[i] = group[lane];
        scales[i] = __uint_as_float(group[kGroupWords - 1]);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (first + i >= num_groups) break;
        reinterpret_cast<uint2*>(out + (first + i) * 2 * kGroup)[lane] =
            restored<T>(of_lane[i], scales[i]);
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
                   dim3(sending_blocks(num_step_chunks(args.step_tokens), 4)), kRowThreads,
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

// A sum of many rows over all ranks, which the switches between the GPUs add up, in one launch.
//
// A multicast address stands for the same place in every rank's buffer: what is loaded from it is
// the sum of what all have there, and what is stored to it goes to all. So a row crosses a rank's
// link about once each way, however many ranks there are.
//
// It compiles, and it has never been run.
//
// Source: PTX ISA 8.8, "multimem.ld_reduce, multimem.st, multimem.red", and of the "Memory
// Consistency Model" the proxy-preserved base causality order.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "group_packets.cuh"
#include "hopper.cuh"
#include "launch.cuh"

namespace moe_engine {
namespace {

constexpr int kThreads = 512;
constexpr int kAtOnce = 4;  // pieces of 16 bytes of a thread that are on their way together

// --- multicast addresses -------------------------------------------------------------------------

// Sixteen bytes of elements of a type, each the sum of all ranks', in float32 and rounded once; in
// the order that the switches choose.
template <typename T>
__device__ __forceinline__ uint4 load_sum(const char* from);

template <>
__device__ __forceinline__ uint4 load_sum<__nv_bfloat16>(const char* from) {
  uint4 sum;
  asm volatile(
      "multimem.ld_reduce.relaxed.sys.global.add.acc::f32.v4.bf16x2 {%0, %1, %2, %3}, [%4];"
      : "=r"(sum.x), "=r"(sum.y), "=r"(sum.z), "=r"(sum.w)
      : "l"(__cvta_generic_to_global(from))
      : "memory");
  return sum;
}

template <>
__device__ __forceinline__ uint4 load_sum<__half>(const char* from) {
  uint4 sum;
  asm volatile("multimem.ld_reduce.relaxed.sys.global.add.acc::f32.v4.f16x2 {%0, %1, %2, %3}, [%4];"
               : "=r"(sum.x), "=r"(sum.y), "=r"(sum.z), "=r"(sum.w)
               : "l"(__cvta_generic_to_global(from))
               : "memory");
  return sum;
}

template <>
__device__ __forceinline__ uint4 load_sum<float>(const char* from) {
  uint4 sum;
  asm volatile("multimem.ld_reduce.relaxed.sys.global.add.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=r"(sum.x), "=r"(sum.y), "=r"(sum.z), "=r"(sum.w)
               : "l"(__cvta_generic_to_global(from))
               : "memory");
  return sum;
}

// Sixteen bytes, of whatever type.
__device__ __forceinline__ void store_to_all(char* to, const uint4& piece) {
  asm volatile("multimem.st.relaxed.sys.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(
                   __cvta_generic_to_global(to)),
               "r"(piece.x), "r"(piece.y), "r"(piece.z), "r"(piece.w)
               : "memory");
}

// fence_for_peers() where a peer reads by another address of the same memory than was written by,
// or writes by another one than was read by.
__device__ __forceinline__ void fence_for_other_addresses() {
  asm volatile("fence.proxy.alias;" ::: "memory");
  fence_for_peers();
}

// --- rows and their flags ------------------------------------------------------------------------

// Rows first, first + step and so on, below end.
struct Rows {
  int first;
  int step;
  int num;

  __device__ __forceinline__ Rows(int first, int step, int end)
      : first(first), step(step), num(first < end ? (end - first - 1) / step + 1 : 0) {}

  __device__ __forceinline__ int operator[](int i) const { return first + i * step; }
};

// The rank that adds up a row.
__device__ __forceinline__ int owner_of(const ExchangeState& state, int row) {
  return row % state.layout.num_ranks;
}

// At the owner of a row, which waits for it: `source` has written the row into its own buffer.
__device__ __forceinline__ std::uint32_t* written_flag(const ExchangeState& state, int source,
                                                       int row, int at_rank) {
  const ExchangeLayout& layout = state.layout;
  char* const flags = state.peers.buffers[at_rank] + layout.written_flags_at();
  return reinterpret_cast<std::uint32_t*>(flags) + source * layout.multicast_rows + row;
}

// At every rank: the owner of a row has written the sum.
__device__ __forceinline__ std::uint32_t* summed_flag(const ExchangeState& state, int row,
                                                      int at_rank) {
  char* const flags = state.peers.buffers[at_rank] + state.layout.summed_flags_at();
  return reinterpret_cast<std::uint32_t*>(flags) + row;
}

// By a block, each of the rows' pieces of 16 bytes from `load` to `store`, which take its offset
// among all rows.
template <typename Load, typename Store>
__device__ __forceinline__ void move_rows(const Rows& rows, int row_bytes, const Load& load,
                                          const Store& store) {
  const int pieces_per_row = row_bytes / 16;
  const int num_pieces = rows.num * pieces_per_row;
  for (int first = threadIdx.x; first < num_pieces; first += kAtOnce * kThreads) {
    std::int64_t at[kAtOnce];
    uint4 pieces[kAtOnce];
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) {
      const int i = first + n * kThreads;
      at[n] = std::int64_t{rows[i / pieces_per_row]} * row_bytes + i % pieces_per_row * 16;
      if (i < num_pieces) pieces[n] = load(at[n]);
    }
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) {
      if (first + n * kThreads < num_pieces) store(at[n], pieces[n]);
    }
  }
}

// --- the kernel ----------------------------------------------------------------------------------

// Writes this rank's rows where the multicast address reaches them, adds up every N-th row, and
// takes the sums of all.
//
// Shapes: x, out [num_rows, H]; in every buffer rows [num_rows, H], which become the sums. A flag
// for each row and source says to the row's owner, rank row % N, that the source has written it,
// and one for each row says to all that its sum is there. First no block waits, then those that
// wait run side by side.
//
// Nothing is overwritten that is still read. Of a row in sum e:
// - the owner stores its sum when all ranks have written it, so when they have ended sum e - 1,
//   which they copied out; it loads each piece before it stores it, and nobody else loads it there;
// - a rank writes it for sum e + 1 when its sum e has ended, for which the owner had loaded it
//   and stored its sum;
// - a flag goes on to e + 1 after that, so whoever waits for e sees it.
// Whoever ends a sum knows that all ranks have begun it, as its rows were added up, so all have
// ended the one before: what collectives by packets need of whatever is between two of them.
//
// Example, N = 2, three rows of one element: rank 0 brings [1, 2, 3], rank 1 [10, 20, 30]. Rank 0
// loads 11 and 33 from rows 0 and 2 and stores them to both, rank 1 does so with 22; out is
// [11, 22, 33] on both.
template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
    all_reduce_multicast_kernel(const __grid_constant__ ExchangeState state,
                                const __grid_constant__ AllReduceArgs args) {
  wait_for_previous_kernels();
  if (state.next_may_start) let_next_kernel_start();
  const std::uint32_t epoch = group_counters(state)[0];
  const ExchangeLayout& layout = state.layout;
  const int num_ranks = layout.num_ranks;
  const auto* const x = static_cast<const char*>(args.x);
  auto* const out = static_cast<char*>(args.out);
  char* const here = state.peers.buffers[state.rank] + layout.multicast_rows_at();
  char* const everywhere = state.multicast + layout.multicast_rows_at();
  const auto load_from = [](const char* rows) {
    return [=](std::int64_t at) { return *reinterpret_cast<const uint4*>(rows + at); };
  };
  const auto store_into = [](char* rows) {
    return
        [=](std::int64_t at, const uint4& piece) { *reinterpret_cast<uint4*>(rows + at) = piece; };
  };

  const Rows brought(blockIdx.x, gridDim.x, args.num_rows);
  move_rows(brought, layout.row_bytes, load_from(x), store_into(here));
  __syncthreads();
  if (threadIdx.x < brought.num) fence_for_other_addresses();
  for (int i = threadIdx.x; i < brought.num; i += kThreads) {
    const int row = brought[i];
    store_flag(written_flag(state, state.rank, row, owner_of(state, row)), epoch);
  }

  Patience patience(state, epoch, AbortRecord::kAllReduce);
  const Rows owned(state.rank + blockIdx.x * num_ranks, gridDim.x * num_ranks, args.num_rows);
  const int num_told = owned.num * num_ranks;
  bool is_here = true;
  for (int i = threadIdx.x; i < num_told && is_here; i += kThreads) {
    const int source = i % num_ranks;
    is_here = wait_for_flag(written_flag(state, source, owned[i / num_ranks], state.rank), epoch,
                            patience, source);
  }
  is_here = __syncthreads_and(is_here);
  if (is_here) {
    move_rows(
        owned, layout.row_bytes, [=](std::int64_t at) { return load_sum<T>(everywhere + at); },
        [=](std::int64_t at, const uint4& piece) { store_to_all(everywhere + at, piece); });
    __syncthreads();
    if (threadIdx.x < num_told) fence_for_other_addresses();
    for (int i = threadIdx.x; i < num_told; i += kThreads) {
      store_flag(summed_flag(state, owned[i / num_ranks], i % num_ranks), epoch);
    }
  }

  for (int i = threadIdx.x; i < brought.num && is_here; i += kThreads) {
    const int row = brought[i];
    is_here =
        wait_for_flag(summed_flag(state, row, state.rank), epoch, patience, owner_of(state, row));
  }
  if (__syncthreads_and(is_here)) {
    move_rows(brought, layout.row_bytes, load_from(here), store_into(out));
  }
  end_exchange(state, group_counters(state));
}

template <typename T>
void launch(const ExchangeState& state, const AllReduceArgs& args, cudaStream_t stream) {
  launch_dependent("all_reduce_multicast_kernel", all_reduce_multicast_kernel<T>,
                   dim3(std::min(args.num_rows, state.num_blocks)), kThreads, 0, stream, 1, state,
                   args);
}

}  // namespace

void all_reduce_multicast(const ExchangeState& state, const AllReduceArgs& args,
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

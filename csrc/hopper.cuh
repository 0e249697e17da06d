// The PTX of Hopper's asynchronous units, one wrapper per instruction.
//
// Source: PTX ISA 8.8, "Parallel Synchronization and Communication Instructions: mbarrier",
// "Data Movement: cp.async, cp.async.bulk.tensor", "Asynchronous Warpgroup Level Matrix
// Instructions" and "griddepcontrol".
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>

#include <cstdint>

namespace moe_engine {

__device__ __forceinline__ std::uint32_t shared_address(const void* pointer) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}

// --- programmatic dependent launch ---------------------------------------------------------------

// Waits until the kernels that this one depends on have ended and their writes are visible.
__device__ __forceinline__ void wait_for_previous_kernels() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel start once all blocks have said so. If it is called after
// wait_for_previous_kernels(), the next kernel may read, before its own wait, whatever this kernel
// could read; else only what nothing before it in the step writes.
__device__ __forceinline__ void let_next_kernel_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// --- mbarrier ------------------------------------------------------------------------------------

__device__ __forceinline__ void barrier_init(std::uint64_t* barrier, int num_arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(num_arrivals)
               : "memory");
}

// After barrier_init and before a block-wide barrier: makes the barriers known to the copy engine.
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(std::uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

__device__ __forceinline__ void barrier_arrive_expecting(std::uint64_t* barrier, int num_bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(num_bytes)
      : "memory");
}

// Arrives once the cp.async copies that this thread has issued so far have landed.
__device__ __forceinline__ void barrier_arrive_after_copies(std::uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

__device__ __forceinline__ void barrier_wait(std::uint64_t* barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// Which stage of a ring comes next, and the parity of its barrier's phase.
template <int kStages>
struct RingPosition {
  int stage = 0;
  int parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// Arrives at the barrier that lies at the same place in the shared memory of the cluster's block.
__device__ __forceinline__ void barrier_arrive_in_block(std::uint64_t* barrier, int block) {
  asm volatile(
      "{\n"
      ".reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(block)
      : "memory");
}

__device__ __forceinline__ int block_in_cluster() {
  int rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// A barrier for the 128 threads of a warpgroup of the block.
__device__ __forceinline__ void sync_warpgroup(int warpgroup) {
  asm volatile("bar.sync %0, 128;" ::"r"(1 + warpgroup) : "memory");
}

// A barrier for all threads of the cluster.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// The two halves of a barrier for all threads of the cluster that orders no memory: all have begun.
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}

__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
}

// Stores at the same place in the shared memory of the cluster's block.
__device__ __forceinline__ void store_to_block(const float* to, int block, float value) {
  asm volatile(
      "{\n"
      ".reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "st.shared::cluster.f32 [there], %2;\n"
      "}\n" ::"r"(shared_address(to)),
      "r"(block), "f"(value)
      : "memory");
}

__device__ __forceinline__ void store_to_block(const float* to, int block, float4 values) {
  asm volatile(
      "{\n"
      ".reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "st.shared::cluster.v4.f32 [there], {%2, %3, %4, %5};\n"
      "}\n" ::"r"(shared_address(to)),
      "r"(block), "f"(values.x), "f"(values.y), "f"(values.z), "f"(values.w)
      : "memory");
}

// --- copies into shared memory -------------------------------------------------------------------

__device__ __forceinline__ void copy_16_bytes(std::uint32_t to_shared, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to_shared), "l"(from) : "memory");
}

// Zeros if the source is not there; its address is valid all the same.
__device__ __forceinline__ void copy_16_bytes_or_zeros(std::uint32_t to_shared, const void* from,
                                                       bool is_there) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to_shared), "l"(from),
               "r"(is_there ? 16 : 0)
               : "memory");
}

// Ends a group of this thread's cp.async copies.
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until, of this thread's groups, all but the last kNum have landed, for itself to see.
template <int kNum>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kNum) : "memory");
}

// One row of a multiple of 16 bytes, at addresses that are multiples of 16, by the copy engine.
__device__ __forceinline__ void copy_row(std::uint32_t to_shared, const void* from, int num_bytes,
                                         std::uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(to_shared),
      "l"(from), "r"(num_bytes), "r"(shared_address(barrier))
      : "memory");
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

__device__ __forceinline__ void prefetch_tensor_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Cache policies of the copy engine, as createpolicy makes them: data read once, and data that
// other blocks read soon.
constexpr std::uint64_t kEvictFirst = 0x12F0000000000000;
constexpr std::uint64_t kEvictNormal = 0x1000000000000000;

__device__ __forceinline__ void copy_box_2d(std::uint32_t to_shared, const CUtensorMap* map,
                                            std::uint64_t* barrier, int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4}], [%2];" ::"r"(to_shared),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y)
      : "memory");
}

__device__ __forceinline__ void copy_box_3d(std::uint32_t to_shared, const CUtensorMap* map,
                                            std::uint64_t* barrier, std::uint64_t policy, int x,
                                            int y, int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".L2::cache_hint [%0], [%1, {%4, %5, %6}], [%2], %3;" ::"r"(to_shared),
      "l"(map), "r"(shared_address(barrier)), "l"(policy), "r"(x), "r"(y), "r"(z)
      : "memory");
}

__device__ __forceinline__ void copy_box_5d(std::uint32_t to_shared, const CUtensorMap* map,
                                            std::uint64_t* barrier, std::uint64_t policy, int x,
                                            int y, int z, int u, int v) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".L2::cache_hint [%0], [%1, {%4, %5, %6, %7, %8}], [%2], %3;" ::"r"(to_shared),
      "l"(map), "r"(shared_address(barrier)), "l"(policy), "r"(x), "r"(y), "r"(z), "r"(u), "r"(v)
      : "memory");
}

// copy_box_3d and copy_box_5d, into the same place of several blocks of the cluster, whose barriers
// are all told; `blocks` has a bit for each.
__device__ __forceinline__ void multicast_box_3d(std::uint32_t to_shared, const CUtensorMap* map,
                                                 std::uint64_t* barrier, std::uint16_t blocks,
                                                 std::uint64_t policy, int x, int y, int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster.L2::cache_hint [%0], [%1, {%5, %6, %7}], [%2], %3, %4;" ::"r"(to_shared),
      "l"(map), "r"(shared_address(barrier)), "h"(blocks), "l"(policy), "r"(x), "r"(y), "r"(z)
      : "memory");
}

__device__ __forceinline__ void multicast_box_5d(std::uint32_t to_shared, const CUtensorMap* map,
                                                 std::uint64_t* barrier, std::uint16_t blocks,
                                                 std::uint64_t policy, int x, int y, int z, int u,
                                                 int v) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster.L2::cache_hint [%0], [%1, {%5, %6, %7, %8, %9}], [%2], %3, %4;" ::"r"(
          to_shared),
      "l"(map), "r"(shared_address(barrier)), "h"(blocks), "l"(policy), "r"(x), "r"(y), "r"(z),
      "r"(u), "r"(v)
      : "memory");
}

// Orders ordinary writes to shared memory that this thread has seen before its own use of the
// asynchronous units.
__device__ __forceinline__ void async_proxy_fence() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// What this thread has seen in global memory comes before what it hands to the copy engine.
__device__ __forceinline__ void async_proxy_fence_global() {
  asm volatile("fence.proxy.async.global;" ::: "memory");
}

// --- accesses to shared memory by its address ----------------------------------------------------

__device__ __forceinline__ uint4 load_shared(std::uint32_t address) {
  uint4 piece;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(piece.x), "=r"(piece.y), "=r"(piece.z), "=r"(piece.w)
               : "r"(address)
               : "memory");
  return piece;
}

__device__ __forceinline__ void store_shared(std::uint32_t address, const uint4& piece) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(piece.x),
               "r"(piece.y), "r"(piece.z), "r"(piece.w)
               : "memory");
}

// --- registers -----------------------------------------------------------------------------------

template <int kRegisters>
__device__ __forceinline__ void take_registers() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

template <int kRegisters>
__device__ __forceinline__ void give_registers() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

// --- pairs of 16-bit elements --------------------------------------------------------------------

__device__ __forceinline__ std::uint32_t pack_bf16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const std::uint32_t*>(&pair);
}

__device__ __forceinline__ float2 unpack_bf16(std::uint32_t pair) {
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xFFFF0000));
}

// Elements 2 i and 2 i + 1 of eight.
__device__ __forceinline__ float2 pair_of(const uint4& eight, int i) {
  const std::uint32_t words[4] = {eight.x, eight.y, eight.z, eight.w};
  return unpack_bf16(words[i]);
}

// Stores four 8x8 matrices of 16-bit elements, transposed: lane l gives the address of row l % 8 of
// matrix l / 8, and holds elements 2 * (l % 4) and the next of column l / 4 of each.
__device__ __forceinline__ void store_transposed_x4(std::uint32_t address, std::uint32_t a,
                                                    std::uint32_t b, std::uint32_t c,
                                                    std::uint32_t d) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
      "r"(a), "r"(b), "r"(c), "r"(d)
      : "memory");
}

// Stores four 8x8 matrices of 16-bit elements as they are: lane l gives the address of row l % 8 of
// matrix l / 8, and holds elements 2 * (l % 4) and the next of row l / 4 of each.
__device__ __forceinline__ void store_matrices_x4(std::uint32_t address, std::uint32_t a,
                                                  std::uint32_t b, std::uint32_t c,
                                                  std::uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
               "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}

}  // namespace moe_engine

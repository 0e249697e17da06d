// wgmma: D[64, N] += A[64, 16] x B[N, 16]^T by the four warps of a warpgroup, bf16 in, float32 out.
//
// A and B lie in shared memory, rows of 64 elements (128 bytes) with the copy engine's 128-byte
// swizzle. Thread t of the warpgroup holds of D the rows r = 16 * (t / 32) + (t % 32) / 4 and
// r + 8, and of every group j of 8 columns the columns c = 8 * j + 2 * (t % 4) and c + 1:
//   d[4j] = D[r][c], d[4j + 1] = D[r][c + 1], d[4j + 2] = D[r + 8][c], d[4j + 3] = D[r + 8][c + 1]
// Source: PTX ISA 8.8, "Asynchronous Warpgroup Level Matrix Multiply-Accumulate".
#pragma once

#include <cstdint>

namespace moe_engine {

// Describes a matrix of 128-byte rows, swizzled in groups of 8 rows (1024 bytes), group_bytes from
// one to the next. Adding bytes / 16 moves it: 2 to the next 16 elements of the rows.
__device__ __forceinline__ std::uint64_t matrix_descriptor(std::uint32_t address,
                                                           int group_bytes = 1024) {
  constexpr std::uint64_t kSwizzle128 = 1;
  return (address & 0x3FFFF) / 16 | static_cast<std::uint64_t>(group_bytes / 16) << 32 |
         kSwizzle128 << 62;
}

// Describes the transpose B[N, K]^T of a matrix of K rows, whose N columns lie in parts of 64, part
// by part as above, part_bytes apart.
__device__ __forceinline__ std::uint64_t transposed_descriptor(std::uint32_t address,
                                                               int group_bytes, int part_bytes) {
  return matrix_descriptor(address, group_bytes) | static_cast<std::uint64_t>(part_bytes / 16)
                                                       << 16;
}

__device__ __forceinline__ void wgmma_begin() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most kPending committed groups are still running.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps what follows from using the registers of a product before it has been awaited.
template <int N>
__device__ __forceinline__ void fence_registers(float* d) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// d: N / 2 registers; overwritten if accumulate is 0.
template <int N>
__device__ __forceinline__ void wgmma(float* d, std::uint64_t a, std::uint64_t b, int accumulate);

#define WGMMA_LIST_4 "%0, %1, %2, %3"
#define WGMMA_LIST_8 \
  WGMMA_LIST_4       \
  ", %4, %5, %6, %7"
#define WGMMA_LIST_16 \
  WGMMA_LIST_8        \
  ", %8, %9, %10, %11, %12, %13, %14, %15"
#define WGMMA_LIST_32                                            \
  WGMMA_LIST_16                                                  \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27" \
  ", %28, %29, %30, %31"
#define WGMMA_LIST_36 \
  WGMMA_LIST_32       \
  ", %32, %33, %34, %35"
#define WGMMA_LIST_40 \
  WGMMA_LIST_32       \
  ", %32, %33, %34, %35, %36, %37, %38, %39"
#define WGMMA_LIST_48                                            \
  WGMMA_LIST_32                                                  \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43" \
  ", %44, %45, %46, %47"
#define WGMMA_LIST_52 \
  WGMMA_LIST_48       \
  ", %48, %49, %50, %51"
#define WGMMA_LIST_56 \
  WGMMA_LIST_48       \
  ", %48, %49, %50, %51, %52, %53, %54, %55"
#define WGMMA_LIST_60 \
  WGMMA_LIST_56       \
  ", %56, %57, %58, %59"
#define WGMMA_LIST_64 \
  WGMMA_LIST_56       \
  ", %56, %57, %58, %59, %60, %61, %62, %63"
#define WGMMA_LIST_68 \
  WGMMA_LIST_64       \
  ", %64, %65, %66, %67"
#define WGMMA_LIST_72 \
  WGMMA_LIST_64       \
  ", %64, %65, %66, %67, %68, %69, %70, %71"

#define WGMMA_REGISTERS_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define WGMMA_REGISTERS_8(i) WGMMA_REGISTERS_4(i), WGMMA_REGISTERS_4(i + 4)
#define WGMMA_REGISTERS_16(i) WGMMA_REGISTERS_8(i), WGMMA_REGISTERS_8(i + 8)
#define WGMMA_REGISTERS_32(i) WGMMA_REGISTERS_16(i), WGMMA_REGISTERS_16(i + 16)
#define WGMMA_REGISTERS_36(i) WGMMA_REGISTERS_32(i), WGMMA_REGISTERS_4(i + 32)
#define WGMMA_REGISTERS_40(i) WGMMA_REGISTERS_32(i), WGMMA_REGISTERS_8(i + 32)
#define WGMMA_REGISTERS_48(i) WGMMA_REGISTERS_32(i), WGMMA_REGISTERS_16(i + 32)
#define WGMMA_REGISTERS_52(i) WGMMA_REGISTERS_48(i), WGMMA_REGISTERS_4(i + 48)
#define WGMMA_REGISTERS_56(i) WGMMA_REGISTERS_48(i), WGMMA_REGISTERS_8(i + 48)
#define WGMMA_REGISTERS_60(i) WGMMA_REGISTERS_56(i), WGMMA_REGISTERS_4(i + 56)
#define WGMMA_REGISTERS_64(i) WGMMA_REGISTERS_32(i), WGMMA_REGISTERS_32(i + 32)
#define WGMMA_REGISTERS_68(i) WGMMA_REGISTERS_64(i), WGMMA_REGISTERS_4(i + 64)
#define WGMMA_REGISTERS_72(i) WGMMA_REGISTERS_64(i), WGMMA_REGISTERS_8(i + 64)

// kA, kB and kFlag are the numbers of the operands that follow the registers.
#define WGMMA_SHAPE(kN, kRegisters, kA, kB, kFlag)                                      \
  template <>                                                                           \
  __device__ __forceinline__ void wgmma<kN>(float* d, std::uint64_t a, std::uint64_t b, \
                                            int accumulate) {                           \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #kFlag                            \
                 ", 0;\n"                                                               \
                 "wgmma.mma_async.sync.aligned.m64n" #kN                                \
                 "k16.f32.bf16.bf16 {" WGMMA_LIST_##kRegisters "}, %" #kA ", %" #kB     \
                                                               ", p, 1, 1, 0, 0;\n}\n"  \
                 : WGMMA_REGISTERS_##kRegisters(0)                                      \
                 : "l"(a), "l"(b), "r"(accumulate));                                    \
  }

// The same with A in registers and B transposed. Thread t holds of A the rows r and r + 8 as of D,
// and the columns c = 2 * (t % 4), c + 1, c + 8 and c + 9:
//   a[0] = A[r][c, c + 1], a[1] = A[r + 8][c, c + 1], a[2] = A[r][c + 8, c + 9], a[3] = A[r +
//   8][..]
template <int N>
__device__ __forceinline__ void wgmma_transposed(float* d, const std::uint32_t* a, std::uint64_t b,
                                                 int accumulate);

#define WGMMA_TRANSPOSED_SHAPE(kN, kRegisters, kA0, kA1, kA2, kA3, kB, kFlag)                  \
  template <>                                                                                  \
  __device__ __forceinline__ void wgmma_transposed<kN>(float* d, const std::uint32_t* a,       \
                                                       std::uint64_t b, int accumulate) {      \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #kFlag                                   \
                 ", 0;\n"                                                                      \
                 "wgmma.mma_async.sync.aligned.m64n" #kN                                       \
                 "k16.f32.bf16.bf16 {" WGMMA_LIST_##kRegisters                                 \
                 "}, {%" #kA0 ", %" #kA1 ", %" #kA2 ", %" #kA3 "}, %" #kB ", p, 1, 1, 1;\n}\n" \
                 : WGMMA_REGISTERS_##kRegisters(0)                                             \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));       \
  }

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
WGMMA_TRANSPOSED_SHAPE(128, 64, 64, 65, 66, 67, 68, 69)
WGMMA_SHAPE(8, 4, 4, 5, 6)
WGMMA_SHAPE(16, 8, 8, 9, 10)
WGMMA_SHAPE(32, 16, 16, 17, 18)
WGMMA_SHAPE(64, 32, 32, 33, 34)
WGMMA_SHAPE(72, 36, 36, 37, 38)
WGMMA_SHAPE(80, 40, 40, 41, 42)
WGMMA_SHAPE(96, 48, 48, 49, 50)
WGMMA_SHAPE(104, 52, 52, 53, 54)
WGMMA_SHAPE(112, 56, 56, 57, 58)
WGMMA_SHAPE(120, 60, 60, 61, 62)
WGMMA_SHAPE(128, 64, 64, 65, 66)
WGMMA_SHAPE(136, 68, 68, 69, 70)
WGMMA_SHAPE(144, 72, 72, 73, 74)
#endif

}  // namespace moe_engine

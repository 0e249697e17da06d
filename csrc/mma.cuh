// mma.m16n8k16: D[16, 8] += A[16, 16] x B[16, 8] by one warp, bf16 in, float32 out.
//
// It pairs elements 2t, 2t + 1, 2t + 8 and 2t + 9 of both operands in thread t of four. The order
// of K within a product is free, so a thread may feed it the 8 consecutive elements of one 16-byte
// load: 4 to one instruction, 4 to the next, the same ones of both operands.
#pragma once

#include <cstdint>

namespace moe_engine {

// Thread l holds, with g = l / 4 and t = l % 4: of A rows g (a0, a2) and g + 8 (a1, a3), columns 2t
// and the next (a0, a1), 2t + 8 and the next (a2, a3); of B column g, the same elements (b0, b1);
// of D rows g (d[0], d[1]) and g + 8 (d[2], d[3]), columns 2t and the next. Source: PTX ISA 8.8,
// "Matrix Fragments for mma.m16n8k16 with floating point type".
__device__ __forceinline__ void mma(float (&d)[4], std::uint32_t a0, std::uint32_t a1,
                                    std::uint32_t a2, std::uint32_t a3, std::uint32_t b0,
                                    std::uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
      " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// An 8x8 matrix of 16-bit elements, transposed: thread l holds elements 2t and the next of row g.
__device__ __forceinline__ std::uint32_t transpose_8x8(std::uint32_t pair) {
  std::uint32_t transposed;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(pair));
  return transposed;
}

}  // namespace moe_engine

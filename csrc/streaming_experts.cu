// The experts of a single token, or of very few: weight streaming.
//
// Every warp reads rows of a weight straight into registers, all its loads at once, and multiplies
// them on the tensor cores. There is no shared-memory pipeline and no loop to fill one; the warps
// of a block split the depth K, or the experts, between them and add up their parts at the end.
//
// mma.m16n8k16 pairs elements 2t, 2t + 1, 2t + 8 and 2t + 9 of both operands in thread t of four.
// The order of K within a product is free, so a thread feeds it the 8 consecutive elements of one
// 16-byte load: 4 to one instruction, 4 to the next, the same ones of weight and token.
#include <cuda_bf16.h>

#include "hopper.cuh"
#include "launch.cuh"
#include "mma.cuh"
#include "streaming_experts.h"

namespace moe_engine {
namespace {

constexpr int kStep = 32;  // elements of K that a warp takes at once: 8 for each of 4 threads

// Not through the read-only path, whose loads the compiler would move down to their uses, past the
// barrier that keeps them together.
__device__ __forceinline__ uint4 load_once(const __nv_bfloat16* from) {
  uint4 value;
  asm volatile("ld.global.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(from)
               : "memory");
  return value;
}

// kSteps loads of one row, its elements 8 t .. 8 t + 7 of each step in thread t of four. Steps from
// num_steps on are left out: they multiply as 0.
template <int kSteps>
__device__ __forceinline__ void load_row(uint4 (&values)[kSteps], const __nv_bfloat16* row,
                                         int num_steps) {
  if (num_steps >= kSteps) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) values[step] = load_once(row + step * kStep);
  } else {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      values[step] = step < num_steps ? load_once(row + step * kStep) : make_uint4(0, 0, 0, 0);
    }
  }
}

// Copies rows that lie one after the other, a multiple of 16 bytes, to shared memory.
__device__ __forceinline__ void copy_to_shared(uint4* to, const __nv_bfloat16* from,
                                               int num_elements) {
  for (int i = threadIdx.x; i < num_elements / 8; i += blockDim.x) {
    to[i] = reinterpret_cast<const uint4*>(from)[i];
  }
}

// The token's elements of one step, for the threads that hold row or column 0; 0 for the others.
__device__ __forceinline__ uint4 token_step(const uint4* token, int step, int num_steps, int lane) {
  return lane < 4 && step < num_steps ? token[step * (kStep / 8) + lane] : make_uint4(0, 0, 0, 0);
}

__device__ __forceinline__ float silu(float x) { return x / (1.0f + __expf(-x)); }

constexpr int kWarps = 8;
constexpr int kGateUpSteps = 8;
constexpr int kDownSteps = 24;

// Block (b, pair) computes elements 8 b .. 8 b + 7 of h[pair]. A warp multiplies 8 gate rows and 8
// up rows, the 16 rows of the instruction's left operand, by the token in column 0 of 8.
//
// Example: hidden 2048: each of 8 warps reads 256 elements of 16 rows, 8 KiB.
__global__ void __launch_bounds__(32 * kWarps, 3)
    streaming_gate_up_kernel(const std::int32_t* expert_ids, const __nv_bfloat16* x,
                             std::int64_t x_stride, const __nv_bfloat16* weights, __nv_bfloat16* h,
                             int top_k, int hidden, int intermediate) {
  extern __shared__ uint4 token[];  // [hidden / 8]
  __shared__ float parts[kWarps][16];
  wait_for_previous_kernels();
  let_next_kernel_start();
  const int pair = blockIdx.y;
  const int expert = expert_ids[pair];
  if (expert < 0) return;
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int element = blockIdx.x * 8 + lane / 4;
  const __nv_bfloat16* gate_row =
      weights + (std::int64_t{expert} * 2 * intermediate + element) * hidden + lane % 4 * 8;
  const __nv_bfloat16* up_row = gate_row + std::int64_t{intermediate} * hidden;
  const int num_steps = hidden / kStep;
  int step = num_steps * warp / kWarps;
  const int end_step = num_steps * (warp + 1) / kWarps;

  uint4 gate[kGateUpSteps];
  uint4 up[kGateUpSteps];
  load_row(gate, gate_row + step * kStep, end_step - step);
  load_row(up, up_row + step * kStep, end_step - step);
  copy_to_shared(token, x + pair / top_k * x_stride, hidden);
  __syncthreads();
  float d[4] = {};
  for (;;) {
#pragma unroll
    for (int i = 0; i < kGateUpSteps; ++i) {
      const uint4 value = token_step(token + step * (kStep / 8), i, end_step - step, lane);
      mma(d, gate[i].x, up[i].x, gate[i].y, up[i].y, value.x, value.y);
      mma(d, gate[i].z, up[i].z, gate[i].w, up[i].w, value.z, value.w);
    }
    step += kGateUpSteps;
    if (step >= end_step) break;
    load_row(gate, gate_row + step * kStep, end_step - step);
    load_row(up, up_row + step * kStep, end_step - step);
    __syncwarp();
  }
  if (lane % 4 == 0) {
    parts[warp][lane / 4] = d[0];
    parts[warp][lane / 4 + 8] = d[2];
  }
  __syncthreads();
  if (threadIdx.x < 8) {
    float gate_sum = 0.0f;
    float up_sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      gate_sum += parts[w][threadIdx.x];
      up_sum += parts[w][threadIdx.x + 8];
    }
    h[std::int64_t{pair} * intermediate + blockIdx.x * 8 + threadIdx.x] =
        __float2bfloat16(silu(gate_sum) * up_sum);
  }
}

// Block (b, t) computes elements 8 b .. 8 b + 7 of out[t], summed over the token's experts. A warp
// multiplies the token, row 0 of the instruction's left operand, by 8 rows of an expert.
//
// Example: top_k 8, intermediate 768: each of 8 warps reads 8 whole rows of one expert, 12 KiB.
__global__ void __launch_bounds__(32 * kWarps, 2)
    streaming_down_kernel(const std::int32_t* expert_ids, const float* expert_weights,
                          const __nv_bfloat16* h, const __nv_bfloat16* weights, __nv_bfloat16* out,
                          int top_k, int hidden, int intermediate) {
  extern __shared__ uint4 values[];  // [top_k, intermediate / 8]
  __shared__ float parts[kWarps][8];
  const int first_pair = blockIdx.y * top_k;
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int num_steps = intermediate / kStep;
  const int row = blockIdx.x * 8 + lane / 4;

  uint4 loaded[kDownSteps];
  const auto load = [&](int expert, int step) {
    load_row(loaded,
             weights + (std::int64_t{expert} * hidden + row) * intermediate + step * kStep +
                 lane % 4 * 8,
             num_steps - step);
  };
  // Experts were chosen before the kernel before this one began, which then let this one start.
  int expert = warp < top_k ? expert_ids[first_pair + warp] : -1;
  if (expert >= 0) load(expert, 0);
  wait_for_previous_kernels();
  let_next_kernel_start();
  copy_to_shared(values, h + std::int64_t{first_pair} * intermediate, top_k * intermediate);
  __syncthreads();

  float sum[2] = {};
  for (int choice = warp; choice < top_k; choice += kWarps) {
    if (choice != warp) {
      expert = expert_ids[first_pair + choice];
      if (expert >= 0) {
        load(expert, 0);
        __syncwarp();
      }
    }
    if (expert < 0) continue;
    const uint4* token = values + choice * (intermediate / 8);
    float d[4] = {};
    for (int step = 0;;) {
#pragma unroll
      for (int i = 0; i < kDownSteps; ++i) {
        const uint4 value = token_step(token + step * (kStep / 8), i, num_steps - step, lane);
        mma(d, value.x, 0, value.y, 0, loaded[i].x, loaded[i].y);
        mma(d, value.z, 0, value.w, 0, loaded[i].z, loaded[i].w);
      }
      step += kDownSteps;
      if (step >= num_steps) break;
      load(expert, step);
      __syncwarp();
    }
    const float weight = expert_weights[first_pair + choice];
    sum[0] += weight * d[0];
    sum[1] += weight * d[1];
  }
  if (lane < 4) {
    parts[warp][2 * lane] = sum[0];
    parts[warp][2 * lane + 1] = sum[1];
  }
  __syncthreads();
  if (threadIdx.x < 8) {
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total += parts[w][threadIdx.x];
    out[std::int64_t{blockIdx.y} * hidden + blockIdx.x * 8 + threadIdx.x] = __float2bfloat16(total);
  }
}

}  // namespace

void streaming_expert_ffn(const StreamingExpertFfnArgs& args, cudaStream_t stream) {
  if (args.num_tokens == 0) return;
  const auto* x = static_cast<const __nv_bfloat16*>(args.x);
  auto* h = static_cast<__nv_bfloat16*>(args.h);
  launch_dependent("streaming_gate_up_kernel", streaming_gate_up_kernel,
                   dim3(args.intermediate / 8, args.num_tokens * args.top_k), 32 * kWarps,
                   2 * args.hidden, stream, 1, args.expert_ids, x, args.x_stride,
                   static_cast<const __nv_bfloat16*>(args.gate_up), h, args.top_k, args.hidden,
                   args.intermediate);
  launch_dependent(
      "streaming_down_kernel", streaming_down_kernel, dim3(args.hidden / 8, args.num_tokens),
      32 * kWarps, 2 * args.top_k * args.intermediate, stream, 1, args.expert_ids,
      args.expert_weights, h, static_cast<const __nv_bfloat16*>(args.down),
      static_cast<__nv_bfloat16*>(args.out), args.top_k, args.hidden, args.intermediate);
}

}  // namespace moe_engine

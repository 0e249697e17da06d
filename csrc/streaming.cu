// Weight streaming: every warp reads 16 rows of a weight straight into registers, many loads at a
// time, and multiplies them on the tensor cores by up to 8 tokens per instruction. There is no
// shared-memory pipeline and no loop to fill one; the warps of a block split the depth K between
// them and add up their parts at the end.
//
// mma.m16n8k16 pairs elements 2t, 2t + 1, 2t + 8 and 2t + 9 of both operands in thread t of four.
// The order of K within a product is free, so a thread feeds it the 8 consecutive elements of one
// 16-byte load: 4 to one instruction, 4 to the next, the same ones of weight and token.
#include <cuda_bf16.h>

#include <algorithm>
#include <stdexcept>

#include "hopper.cuh"
#include "launch.cuh"
#include "streaming.h"

namespace moe_engine {
namespace {

constexpr int kStep = 32;  // elements of K that a warp takes at once: 8 for each of 4 threads
constexpr int kSlab = 16;  // rows of a weight that a warp takes

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

__device__ __forceinline__ void mma(float (&d)[4], std::uint32_t a0, std::uint32_t a1,
                                    std::uint32_t a2, std::uint32_t a3, std::uint32_t b0,
                                    std::uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
      " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// 32 elements of K: rows `low` and `high` of the slab, 8 apart, times the token of this thread.
__device__ __forceinline__ void multiply_step(float (&d)[4], const uint4& low, const uint4& high,
                                              const uint4& token) {
  mma(d, low.x, high.x, low.y, high.y, token.x, token.y);
  mma(d, low.z, high.z, low.w, high.w, token.z, token.w);
}

// A warp's loads: thread t of a group of 4 has elements 8 t .. 8 t + 7 of each step of two rows.
template <int kSteps>
struct Slab {
  uint4 low[kSteps];
  uint4 high[kSteps];

  // Steps from num_steps on are left out: they multiply as 0.
  __device__ __forceinline__ void load(const __nv_bfloat16* low_row, const __nv_bfloat16* high_row,
                                       int num_steps) {
    if (num_steps >= kSteps) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        low[step] = load_once(low_row + step * kStep);
        high[step] = load_once(high_row + step * kStep);
      }
    } else {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        low[step] = high[step] = make_uint4(0, 0, 0, 0);
        if (step < num_steps) {
          low[step] = load_once(low_row + step * kStep);
          high[step] = load_once(high_row + step * kStep);
        }
      }
    }
  }
};

__device__ __forceinline__ uint4 load_if(bool wanted, const __nv_bfloat16* from) {
  return wanted ? *reinterpret_cast<const uint4*>(from) : make_uint4(0, 0, 0, 0);
}

__device__ __forceinline__ float silu(float x) { return x / (1.0f + __expf(-x)); }

// --- linear --------------------------------------------------------------------------------------

constexpr int kLinearSteps = 8;  // a warp's loads in flight: 8 steps x 2 rows x 16 bytes a thread

// Block b computes rows 16 b .. 16 b + 15 of the weight for all tokens, 8 per tile.
//
// Example: in_features 2048, 8 warps: each warp reads 256 elements of 16 rows, 8 KiB.
template <int kTokenTiles>
__global__ void __launch_bounds__(512)
    streaming_linear_kernel(const __nv_bfloat16* x, std::int64_t x_stride,
                            const __nv_bfloat16* weight, __nv_bfloat16* out, int num_tokens,
                            int in_features, int out_features) {
  extern __shared__ float parts[];  // [warps][kTokenTiles * 8 tokens][16 rows]
  const int warp = threadIdx.x / 32;
  const int num_warps = blockDim.x / 32;
  const int lane = threadIdx.x % 32;
  const int group = lane / 4;
  const int first_row = blockIdx.x * kSlab;
  // Whole steps, dealt out evenly; a warp's share is contiguous.
  const int num_steps = in_features / kStep;
  const int first_step = num_steps * warp / num_warps;
  const int end_step = num_steps * (warp + 1) / num_warps;

  const int last = out_features - 1;
  const int within = lane % 4 * 8;
  const __nv_bfloat16* low = weight + std::int64_t{min(first_row + group, last)} * in_features;
  const __nv_bfloat16* high = weight + std::int64_t{min(first_row + group + 8, last)} * in_features;
  Slab<kLinearSteps> slab;
  slab.load(low + first_step * kStep + within, high + first_step * kStep + within,
            end_step - first_step);
  // Weights do not depend on the kernels before this one.
  wait_for_previous_kernels();
  let_next_kernel_start();

  float d[kTokenTiles][4] = {};
  for (int step = first_step; step < end_step; step += kLinearSteps) {
    const int k = step * kStep + within;
    if (step > first_step) {
      slab.load(low + k, high + k, end_step - step);
      __syncwarp();
    }
#pragma unroll
    for (int tile = 0; tile < kTokenTiles; ++tile) {
      const int token = tile * 8 + group;
      const bool real = token < num_tokens;
      const __nv_bfloat16* row = x + (real ? token : 0) * x_stride + k;
      uint4 values[kLinearSteps];
#pragma unroll
      for (int i = 0; i < kLinearSteps; ++i) {
        values[i] = load_if(real && step + i < end_step, row + i * kStep);
      }
#pragma unroll
      for (int i = 0; i < kLinearSteps; ++i) {
        multiply_step(d[tile], slab.low[i], slab.high[i], values[i]);
      }
    }
  }
  float* own = parts + warp * kTokenTiles * 8 * kSlab;
#pragma unroll
  for (int tile = 0; tile < kTokenTiles; ++tile) {
    float* column = own + (tile * 8 + lane % 4 * 2) * kSlab + group;
    column[0] = d[tile][0];
    column[kSlab] = d[tile][1];
    column[8] = d[tile][2];
    column[kSlab + 8] = d[tile][3];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < num_tokens * kSlab; i += blockDim.x) {
    float sum = 0.0f;
    for (int w = 0; w < num_warps; ++w) sum += parts[w * kTokenTiles * 8 * kSlab + i];
    const int row = first_row + i % kSlab;
    if (row < out_features) {
      out[static_cast<std::int64_t>(i / kSlab) * out_features + row] = __float2bfloat16(sum);
    }
  }
}

// --- experts -------------------------------------------------------------------------------------

constexpr int kGateUpWarps = 8;
constexpr int kGateUpSteps = 8;
constexpr int kDownWarps = 16;
constexpr int kDownSteps = 12;

// Copies rows that lie one after the other, a multiple of 16 bytes, to shared memory.
__device__ __forceinline__ void copy_to_shared(uint4* to, const __nv_bfloat16* from,
                                               int num_elements) {
  for (int i = threadIdx.x; i < num_elements / 8; i += blockDim.x) {
    to[i] = reinterpret_cast<const uint4*>(from)[i];
  }
}

// Multiplies the steps of a slab by one token, as column 0 of 8, from shared memory.
template <int kSteps>
__device__ __forceinline__ void multiply_one_token(float (&d)[4], const Slab<kSteps>& slab,
                                                   const uint4* token, int num_steps, int lane) {
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    uint4 value = make_uint4(0, 0, 0, 0);
    if (lane < 4 && i < num_steps) value = token[i * (kStep / 8) + lane];
    multiply_step(d, slab.low[i], slab.high[i], value);
  }
}

// Block (b, pair) computes elements 8 b .. 8 b + 7 of h[pair]: 8 gate rows and 8 up rows.
//
// Example: hidden 2048: each of 8 warps reads 256 elements of 16 rows, 8 KiB.
__global__ void __launch_bounds__(32 * kGateUpWarps, 3)
    streaming_gate_up_kernel(const std::int32_t* expert_ids, const __nv_bfloat16* x,
                             std::int64_t x_stride, const __nv_bfloat16* weights, __nv_bfloat16* h,
                             int top_k, int hidden, int intermediate) {
  extern __shared__ uint4 token[];  // [hidden / 8]
  __shared__ float parts[kGateUpWarps][kSlab];
  wait_for_previous_kernels();
  let_next_kernel_start();
  const int pair = blockIdx.y;
  const int expert = expert_ids[pair];
  if (expert < 0) return;
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int group = lane / 4;
  const int element = blockIdx.x * 8 + group;
  const __nv_bfloat16* gate =
      weights + (std::int64_t{expert} * 2 * intermediate + element) * hidden + lane % 4 * 8;
  const __nv_bfloat16* up = gate + std::int64_t{intermediate} * hidden;
  const int num_steps = hidden / kStep;
  const int first_step = num_steps * warp / kGateUpWarps;
  const int end_step = num_steps * (warp + 1) / kGateUpWarps;

  Slab<kGateUpSteps> slab;
  slab.load(gate + first_step * kStep, up + first_step * kStep, end_step - first_step);
  copy_to_shared(token, x + pair / top_k * x_stride, hidden);
  __syncthreads();
  float d[4] = {};
  for (int step = first_step;;) {
    multiply_one_token(d, slab, token + step * (kStep / 8), end_step - step, lane);
    step += kGateUpSteps;
    if (step >= end_step) break;
    slab.load(gate + step * kStep, up + step * kStep, end_step - step);
    __syncwarp();
  }
  if (lane % 4 == 0) {
    parts[warp][group] = d[0];
    parts[warp][group + 8] = d[2];
  }
  __syncthreads();
  if (threadIdx.x < 8) {
    float gate_sum = 0.0f;
    float up_sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kGateUpWarps; ++w) {
      gate_sum += parts[w][threadIdx.x];
      up_sum += parts[w][threadIdx.x + 8];
    }
    h[std::int64_t{pair} * intermediate + blockIdx.x * 8 + threadIdx.x] =
        __float2bfloat16(silu(gate_sum) * up_sum);
  }
}

// Block (b, t) computes elements 16 b .. 16 b + 15 of out[t], summed over the token's experts.
//
// Example: top_k 8, intermediate 768: two warps per expert, each reading 384 elements of 16 rows.
__global__ void __launch_bounds__(32 * kDownWarps, 1)
    streaming_down_kernel(const std::int32_t* expert_ids, const float* expert_weights,
                          const __nv_bfloat16* h, const __nv_bfloat16* weights, __nv_bfloat16* out,
                          int top_k, int hidden, int intermediate, int splits) {
  extern __shared__ uint4 values[];  // [top_k, intermediate / 8]
  __shared__ float parts[kDownWarps][kSlab];
  const int first_pair = blockIdx.y * top_k;
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int num_steps = intermediate / kStep;
  const int first_row = blockIdx.x * kSlab;
  const int low_row = min(first_row + lane / 4, hidden - 1);
  const int high_row = min(first_row + lane / 4 + 8, hidden - 1);

  // An item is one of `splits` shares of the depth of one of the token's experts.
  struct Item {
    int expert;
    int step;
    int end_step;
  };
  const auto get_item = [&](int number) {
    const int share = number % splits;
    // Written before the kernel before this one began: that one let this one start after that.
    const int expert = number < top_k * splits ? expert_ids[first_pair + number / splits] : -1;
    return Item{expert, num_steps * share / splits, num_steps * (share + 1) / splits};
  };
  Slab<kDownSteps> slab;
  const auto load = [&](const Item& item) {
    const __nv_bfloat16* rows = weights + std::int64_t{item.expert} * hidden * intermediate +
                                item.step * kStep + lane % 4 * 8;
    slab.load(rows + std::int64_t{low_row} * intermediate,
              rows + std::int64_t{high_row} * intermediate, item.end_step - item.step);
  };

  int number = warp;
  Item item = get_item(number);
  if (item.expert >= 0) load(item);
  wait_for_previous_kernels();
  let_next_kernel_start();
  copy_to_shared(values, h + std::int64_t{first_pair} * intermediate, top_k * intermediate);
  __syncthreads();

  float sum[2] = {};
  while (number < top_k * splits) {
    if (item.expert >= 0) {
      const int choice = number / splits;
      const uint4* row = values + choice * (intermediate / 8);
      float d[4] = {};
      for (;;) {
        multiply_one_token(d, slab, row + item.step * (kStep / 8), item.end_step - item.step, lane);
        item.step += kDownSteps;
        if (item.step >= item.end_step) break;
        load(item);
        __syncwarp();
      }
      const float weight = expert_weights[first_pair + choice];
      sum[0] += weight * d[0];
      sum[1] += weight * d[2];
    }
    number += kDownWarps;
    item = get_item(number);
    if (item.expert >= 0) {
      load(item);
      __syncwarp();
    }
  }
  if (lane % 4 == 0) {
    parts[warp][lane / 4] = sum[0];
    parts[warp][lane / 4 + 8] = sum[1];
  }
  __syncthreads();
  if (threadIdx.x < kSlab && first_row + static_cast<int>(threadIdx.x) < hidden) {
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < kDownWarps; ++w) total += parts[w][threadIdx.x];
    out[std::int64_t{blockIdx.y} * hidden + first_row + threadIdx.x] = __float2bfloat16(total);
  }
}

}  // namespace

void streaming_linear(const StreamingLinearArgs& args, cudaStream_t stream) {
  if (args.num_tokens == 0) return;
  // As many warps as give each one round of loads, if that many fit a block.
  const int num_steps = args.in_features / kStep;
  const int num_warps = std::clamp((num_steps + kLinearSteps - 1) / kLinearSteps, 4, 16);
  const dim3 grid((args.out_features + kSlab - 1) / kSlab);
  const auto start = [&](auto kernel, int token_tiles) {
    const int shared = num_warps * token_tiles * 8 * kSlab * static_cast<int>(sizeof(float));
    launch_dependent("streaming_linear_kernel", kernel, grid, 32 * num_warps, shared, stream, 1,
                     static_cast<const __nv_bfloat16*>(args.x), args.x_stride,
                     static_cast<const __nv_bfloat16*>(args.weight),
                     static_cast<__nv_bfloat16*>(args.out), args.num_tokens, args.in_features,
                     args.out_features);
  };
  if (args.num_tokens <= 8) {
    start(streaming_linear_kernel<1>, 1);
  } else if (args.num_tokens <= 16) {
    start(streaming_linear_kernel<2>, 2);
  } else {
    throw std::invalid_argument("num_tokens is " + std::to_string(args.num_tokens) +
                                "; the limit is 16");
  }
}

void streaming_expert_ffn(const StreamingExpertFfnArgs& args, cudaStream_t stream) {
  if (args.num_tokens == 0) return;
  const auto* x = static_cast<const __nv_bfloat16*>(args.x);
  auto* h = static_cast<__nv_bfloat16*>(args.h);
  launch_dependent("streaming_gate_up_kernel", streaming_gate_up_kernel,
                   dim3(args.intermediate / 8, args.num_tokens * args.top_k), 32 * kGateUpWarps,
                   2 * args.hidden, stream, 1, args.expert_ids, x, args.x_stride,
                   static_cast<const __nv_bfloat16*>(args.gate_up), h, args.top_k, args.hidden,
                   args.intermediate);
  const int splits = std::max(1, kDownWarps / args.top_k);
  launch_dependent("streaming_down_kernel", streaming_down_kernel,
                   dim3((args.hidden + kSlab - 1) / kSlab, args.num_tokens), 32 * kDownWarps,
                   2 * args.top_k * args.intermediate, stream, 1, args.expert_ids,
                   args.expert_weights, h, static_cast<const __nv_bfloat16*>(args.down),
                   static_cast<__nv_bfloat16*>(args.out), args.top_k, args.hidden,
                   args.intermediate, splits);
}

}  // namespace moe_engine

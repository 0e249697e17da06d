// A linear layer of very few tokens.
//
// Every block takes a few rows of the weight, as many as spread the layer over all multiprocessors,
// and its warps split their depth K. A warp asks the copy engine for its part of all rows at once,
// before it waits for the kernel that makes x; nothing but the last sum needs the other warps.
//
// mma.m16n8k16 with the tokens as its 16 rows and 8 rows of the weight as its columns. See
// mma.cuh for how the elements of K are dealt out to the threads.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "hopper.cuh"
#include "launch.cuh"
#include "mma.cuh"
#include "streaming_linear.h"

namespace moe_engine {
namespace {

constexpr int kWarps = 8;
constexpr int kStep = 32;        // elements of K that a warp multiplies at once
constexpr int kStepsAtOnce = 8;  // of x in registers
// Rows of a warp's part lie apart by an odd multiple of 64 bytes: 8 of them fill all banks.
constexpr int kPadding = 64;
constexpr int kMaxSlabs = 8;  // of 8 rows, in a block
constexpr int kMaxSharedBytes = 220 * 1024;

__host__ __device__ constexpr int part_row_bytes(int in_features) {
  const int bytes = in_features / kWarps * 2;
  return bytes % 128 == 0 ? bytes + kPadding : bytes;
}

// Example: 5120 rows of 2048 elements over 132 multiprocessors: 128 blocks of 40 rows. Each of 8
// warps has 256 elements of all 40 rows, 20 KiB, in shared memory.
template <int kTokenHalves>
__global__ void __launch_bounds__(32 * kWarps)
    streaming_linear_kernel(const __nv_bfloat16* x, std::int64_t x_stride,
                            const __nv_bfloat16* weight, __nv_bfloat16* out, int num_tokens,
                            int in_features, int out_features, int rows_per_block) {
  extern __shared__ __align__(128) char shared[];
  __shared__ std::uint64_t landed[kWarps];
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int first_row = blockIdx.x * rows_per_block;
  const int num_rows = min(rows_per_block, out_features - first_row);
  const int depth = in_features / kWarps;  // of this warp
  const int row_bytes = part_row_bytes(in_features);
  char* const part = shared + warp * rows_per_block * row_bytes;

  let_next_kernel_start();
  if (lane == 0) {
    barrier_init(&landed[warp], 1);
    barrier_init_fence();
    barrier_arrive_expecting(&landed[warp], num_rows * depth * 2);
  }
  __syncwarp();
  for (int row = lane; row < num_rows; row += 32) {
    copy_row(shared_address(part + row * row_bytes),
             weight + std::int64_t{first_row + row} * in_features + warp * depth, depth * 2,
             &landed[warp]);
  }
  wait_for_previous_kernels();

  // This thread's elements of x: tokens lane / 4 and lane / 4 + 8.
  const int within = warp * depth + lane % 4 * 8;
  const int num_steps = depth / kStep;
  const __nv_bfloat16* tokens[kTokenHalves];
  bool real[kTokenHalves];
#pragma unroll
  for (int half = 0; half < kTokenHalves; ++half) {
    const int token = lane / 4 + 8 * half;
    real[half] = token < num_tokens;
    tokens[half] = x + (real[half] ? token : 0) * x_stride + within;
  }
  const int num_slabs = rows_per_block / 8;
  float d[kMaxSlabs][4] = {};
  for (int step = 0; step < num_steps; step += kStepsAtOnce) {
    uint4 values[kTokenHalves][kStepsAtOnce];
#pragma unroll
    for (int half = 0; half < kTokenHalves; ++half) {
#pragma unroll
      for (int i = 0; i < kStepsAtOnce; ++i) {
        values[half][i] = make_uint4(0, 0, 0, 0);
        if (real[half] && step + i < num_steps) {
          values[half][i] = *reinterpret_cast<const uint4*>(tokens[half] + (step + i) * kStep);
        }
      }
    }
    if (step == 0) barrier_wait(&landed[warp], 0);
#pragma unroll
    for (int slab = 0; slab < kMaxSlabs; ++slab) {
      if (slab >= num_slabs) break;
      const char* row = part + (slab * 8 + lane / 4) * row_bytes + lane % 4 * 16;
#pragma unroll
      for (int i = 0; i < kStepsAtOnce; ++i) {
        if (step + i < num_steps) {
          const uint4 w = *reinterpret_cast<const uint4*>(row + (step + i) * kStep * 2);
          const uint4 low = values[0][i];
          const uint4 high =
              kTokenHalves > 1 ? values[kTokenHalves - 1][i] : make_uint4(0, 0, 0, 0);
          mma(d[slab], low.x, high.x, low.y, high.y, w.x, w.y);
          mma(d[slab], low.z, high.z, low.w, high.w, w.z, w.w);
        }
      }
    }
  }
  // The warp's sums take the place of its weights: [token][row].
  __syncwarp();
  float* const sums = reinterpret_cast<float*>(part);
  const int stride = rows_per_block;
#pragma unroll
  for (int slab = 0; slab < kMaxSlabs; ++slab) {
    if (slab >= num_slabs) break;
    float* at = sums + lane / 4 * stride + slab * 8 + lane % 4 * 2;
    at[0] = d[slab][0];
    at[1] = d[slab][1];
    if constexpr (kTokenHalves > 1) {
      at[8 * stride] = d[slab][2];
      at[8 * stride + 1] = d[slab][3];
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < num_tokens * num_rows; i += 32 * kWarps) {
    const int token = i / num_rows;
    const int row = i % num_rows;
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const char* other = shared + w * rows_per_block * row_bytes;
      sum += reinterpret_cast<const float*>(other)[token * stride + row];
    }
    out[std::int64_t{token} * out_features + first_row + row] = __float2bfloat16(sum);
  }
}

// Rows of a block, a multiple of 8, such that one round of blocks covers the layer.
int rows_per_block(int out_features) {
  const int num_sms = num_multiprocessors();
  const int slabs = (out_features + 7) / 8;
  return (slabs + num_sms - 1) / num_sms * 8;
}

int shared_bytes(int in_features, int out_features) {
  return kWarps * rows_per_block(out_features) * part_row_bytes(in_features);
}

}  // namespace

bool streaming_linear_fits(int in_features, int out_features) {
  return in_features % (kWarps * kStep) == 0 && rows_per_block(out_features) <= 8 * kMaxSlabs &&
         shared_bytes(in_features, out_features) <= kMaxSharedBytes;
}

void streaming_linear(const StreamingLinearArgs& args, cudaStream_t stream) {
  if (args.num_tokens == 0) return;
  if (args.num_tokens > 16 || !streaming_linear_fits(args.in_features, args.out_features)) {
    throw std::invalid_argument("a layer of " + std::to_string(args.out_features) + " x " +
                                std::to_string(args.in_features) + " for " +
                                std::to_string(args.num_tokens) +
                                " tokens does not fit the streaming kernel");
  }
  const int rows = rows_per_block(args.out_features);
  const auto kernel =
      args.num_tokens <= 8 ? streaming_linear_kernel<1> : streaming_linear_kernel<2>;
  CHECK_CUDA(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMaxSharedBytes));
  launch_dependent("streaming_linear_kernel", kernel, dim3((args.out_features + rows - 1) / rows),
                   32 * kWarps, shared_bytes(args.in_features, args.out_features), stream, 1,
                   static_cast<const __nv_bfloat16*>(args.x), args.x_stride,
                   static_cast<const __nv_bfloat16*>(args.weight),
                   static_cast<__nv_bfloat16*>(args.out), args.num_tokens, args.in_features,
                   args.out_features, rows);
}

}  // namespace moe_engine

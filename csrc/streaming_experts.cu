// The experts of very few tokens: one kernel that never stops reading weights.
//
// Every token has its own blocks, one on each multiprocessor it gets. A warp owns a ring of stages
// in shared memory, which the copy engine fills with pieces of rows: first of gate and up, whose
// products are elements of h, then of down. Between the two the blocks of a token wait for each
// other, because each needs all of h; by then their rings are full of down's rows, so the memory
// stays busy.
//
// The products are plain float32 sums of a lane's elements: with a single column the tensor cores
// would save nothing, and any row can go to any warp.
#include <cuda_bf16.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "hopper.cuh"
#include "launch.cuh"
#include "streaming_experts.h"
#include "warp_sum.cuh"

namespace moe_engine {
namespace {

constexpr int kWarps = 16;
constexpr int kStages = 4;
constexpr int kStageElements = 1536;
constexpr int kStageBytes = 2 * kStageElements;
constexpr int kPieceElements = kStageElements / 2;  // of a gate row, beside as many of the up row
constexpr int kRingBytes = kWarps * kStages * kStageBytes;
constexpr int kMaxSharedBytes = 224 * 1024;
constexpr int kMaxTopK = 32;

// With the correctly rounded division, unlike expert_store.cuh: here one lane of a warp divides,
// once for an element of h, which costs nothing beside its rows of weights.
__device__ __forceinline__ float silu(float x) { return x / (1.0f + __expf(-x)); }

// Of 8 elements each: sum + a . b.
__device__ __forceinline__ float dot(float sum, uint4 a, uint4 b) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    sum = fmaf(pair_of(a, i).x, pair_of(b, i).x, sum);
    sum = fmaf(pair_of(a, i).y, pair_of(b, i).y, sum);
  }
  return sum;
}

// A token's choices that have an expert here.
struct Choices {
  std::int32_t expert[kMaxTopK];
  float weight[kMaxTopK];
  int count;
};

// What one warp computes: elements of h, numbered choice * intermediate + element, then rows of
// out; of both every kWarps-th of the block's share.
struct Share {
  int first_element;
  int end_element;
  int first_row;
  int end_row;
};

// The pieces of weights that a warp reads, in order.
struct Pieces {
  const __nv_bfloat16* gate_up;
  const __nv_bfloat16* down;
  const Choices* choices;
  Share share;
  int hidden;
  int intermediate;
  int element;     // present element of h
  int row;         // present row of out, once there are no more elements
  int within = 0;  // first element of the row of gate, or first choice

  // Asks for the present piece and moves on; nothing if there are no more. One lane.
  __device__ __forceinline__ void load_next(std::uint32_t to, std::uint64_t* landed) {
    if (element < share.end_element) {
      const int choice = element / intermediate;
      const std::int64_t gate_row = std::int64_t{choices->expert[choice]} * 2 * intermediate +
                                    (element - choice * intermediate);
      const int num_elements = min(kPieceElements, hidden - within);
      const __nv_bfloat16* const gate = gate_up + gate_row * hidden + within;
      barrier_arrive_expecting(landed, 4 * num_elements);
      copy_row(to, gate, 2 * num_elements, landed);
      copy_row(to + 2 * kPieceElements, gate + std::int64_t{intermediate} * hidden,
               2 * num_elements, landed);
      within += kPieceElements;
      if (within >= hidden) {
        within = 0;
        element += kWarps;
      }
    } else if (row < share.end_row) {
      const int end = min(within + kStageElements / intermediate, choices->count);
      barrier_arrive_expecting(landed, 2 * (end - within) * intermediate);
      for (; within < end; ++within, to += 2 * intermediate) {
        const std::int64_t down_row = std::int64_t{choices->expert[within]} * hidden + row;
        copy_row(to, down + down_row * intermediate, 2 * intermediate, landed);
      }
      if (within == choices->count) {
        within = 0;
        row += kWarps;
      }
    }
  }
};

// A warp's stages, the present one and the pieces to come.
struct WarpRing {
  char* stages;
  std::uint64_t* landed;  // [kStages]
  Pieces pieces;
  int lane;
  int stage = 0;
  int parity = 0;

  __device__ __forceinline__ void fill() {
    if (lane == 0) {
      for (int i = 0; i < kStages; ++i) load_into(i);
    }
  }

  // The present piece, once it is there.
  __device__ __forceinline__ const char* wait() {
    barrier_wait(&landed[stage], parity);
    return stages + stage * kStageBytes;
  }

  // All lanes have read the present piece.
  __device__ __forceinline__ void next() {
    __syncwarp();
    if (lane == 0) load_into(stage);
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }

  __device__ __forceinline__ void load_into(int i) {
    pieces.load_next(shared_address(stages + i * kStageBytes), &landed[i]);
  }
};

// Copies the token's choices with an expert to shared memory, in order; one warp.
__device__ __forceinline__ void find_choices(Choices& choices, const std::int32_t* ids,
                                             const float* weights, int top_k, int lane) {
  const std::int32_t expert = lane < top_k ? ids[lane] : -1;
  const unsigned there = __ballot_sync(0xFFFFFFFF, expert >= 0);
  if (expert >= 0) {
    const int place = __popc(there & ((1u << lane) - 1));
    choices.expert[place] = expert;
    choices.weight[place] = weights[lane];
  }
  if (lane == 0) choices.count = __popc(there);
}

// Waits for the num_blocks blocks that share the two counters, which are 0 before and after.
__device__ __forceinline__ void wait_for_blocks(std::int32_t* counters, int num_blocks) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    atomicAdd(&counters[0], 1);
    int arrived;
    do {
      asm volatile("ld.acquire.gpu.global.s32 %0, [%1];"
                   : "=r"(arrived)
                   : "l"(counters)
                   : "memory");
    } while (arrived < num_blocks);
  }
  __syncthreads();
}

// Of every block, some time after it has waited: the last one sets the counters back.
__device__ __forceinline__ void leave_counters(std::int32_t* counters, int num_blocks) {
  if (threadIdx.x == 0 && atomicAdd(&counters[1], 1) == num_blocks - 1) {
    counters[0] = 0;
    counters[1] = 0;
  }
}

struct Problem {
  const std::int32_t* expert_ids;
  const float* expert_weights;
  const __nv_bfloat16* x;
  std::int64_t x_stride;
  const __nv_bfloat16* gate_up;
  const __nv_bfloat16* down;
  __nv_bfloat16* h;
  __nv_bfloat16* out;
  std::int32_t* counters;  // [num_tokens, 2]
  int top_k;
  int hidden;
  int intermediate;
};

// Block (b, t) computes its share of the elements of h of token t, and of the rows of out[t].
//
// Example: one token, 132 blocks, top_k 8, intermediate 768, hidden 2048: 6144 elements of h, 46 or
// 47 for a block, 2 or 3 for a warp, each in three pieces of up to 2 x 768 weights; then 2048 rows
// of out, 15 or 16 for a block, one for a warp, in four pieces of two experts' 768 weights, all of
// which are on their way while the block waits.
__global__ void __launch_bounds__(32 * kWarps, 1) streaming_experts_kernel(const Problem p) {
  extern __shared__ __align__(128) char shared[];
  __shared__ std::uint64_t landed[kWarps][kStages];
  __shared__ Choices choices;
  uint4* const token = reinterpret_cast<uint4*>(shared + kRingBytes);  // x, then h
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int block = blockIdx.x;
  const int num_blocks = gridDim.x;
  const std::int64_t t = blockIdx.y;
  if (lane < kStages) barrier_init(&landed[warp][lane], 1);
  if (lane == 0) barrier_init_fence();

  wait_for_previous_kernels();
  let_next_kernel_start();
  if (warp == 0) {
    find_choices(choices, p.expert_ids + t * p.top_k, p.expert_weights + t * p.top_k, p.top_k,
                 lane);
  }
  __syncthreads();
  const int num_elements = choices.count * p.intermediate;
  const Share share{num_elements * block / num_blocks + warp,
                    num_elements * (block + 1) / num_blocks, p.hidden * block / num_blocks + warp,
                    p.hidden * (block + 1) / num_blocks};
  if (num_elements == 0) {
    for (int row = share.first_row; row < share.end_row; row += kWarps) {
      if (lane == 0) p.out[t * p.hidden + row] = __float2bfloat16(0.0f);
    }
    return;
  }
  WarpRing ring{shared + warp * kStages * kStageBytes, landed[warp],
                Pieces{p.gate_up, p.down, &choices, share, p.hidden, p.intermediate,
                       share.first_element, share.first_row},
                lane};
  ring.fill();
  const uint4* const x = reinterpret_cast<const uint4*>(p.x + t * p.x_stride);
  for (int i = threadIdx.x; i < p.hidden / 8; i += 32 * kWarps) token[i] = x[i];
  __syncthreads();

  __nv_bfloat16* const h = p.h + t * p.top_k * p.intermediate;
  for (int element = share.first_element; element < share.end_element; element += kWarps) {
    float gate = 0.0f;
    float up = 0.0f;
    for (int first = 0; first < p.hidden; first += kPieceElements) {
      const uint4* const piece = reinterpret_cast<const uint4*>(ring.wait());
      const int num_chunks = min(kPieceElements, p.hidden - first) / 8;
#pragma unroll
      for (int i = 0; i < kPieceElements / 8; i += 32) {
        if (i + lane < num_chunks) {
          const uint4 value = token[first / 8 + i + lane];
          gate = dot(gate, piece[i + lane], value);
          up = dot(up, piece[kPieceElements / 8 + i + lane], value);
        }
      }
      ring.next();
    }
    gate = warp_sum(gate);
    up = warp_sum(up);
    // h of a choice lies where its place among those with an expert is: only this kernel reads it.
    if (lane == 0) h[element] = __float2bfloat16(silu(gate) * up);
  }

  wait_for_blocks(p.counters + 2 * t, num_blocks);
  for (int i = threadIdx.x; i < num_elements / 8; i += 32 * kWarps) {
    token[i] = __ldcg(reinterpret_cast<const uint4*>(h) + i);
  }
  __syncthreads();
  const int num_chunks = p.intermediate / 8;
  const int choices_at_once = kStageElements / p.intermediate;
  for (int row = share.first_row; row < share.end_row; row += kWarps) {
    float sum = 0.0f;
    for (int first = 0; first < choices.count; first += choices_at_once) {
      const uint4* piece = reinterpret_cast<const uint4*>(ring.wait());
      const int end = min(first + choices_at_once, choices.count);
      for (int choice = first; choice < end; ++choice, piece += num_chunks) {
        float part = 0.0f;
#pragma unroll 4
        for (int i = lane; i < num_chunks; i += 32) {
          part = dot(part, piece[i], token[choice * num_chunks + i]);
        }
        sum = fmaf(choices.weight[choice], part, sum);
      }
      ring.next();
    }
    sum = warp_sum(sum);
    if (lane == 0) p.out[t * p.hidden + row] = __float2bfloat16(sum);
  }
  leave_counters(p.counters + 2 * t, num_blocks);
}

int shared_bytes(int top_k, int hidden, int intermediate) {
  return kRingBytes + 2 * std::max(hidden, top_k * intermediate);
}

}  // namespace

bool streaming_experts_fit(int num_tokens, int top_k, int hidden, int intermediate) {
  return num_tokens <= num_multiprocessors() && top_k <= kMaxTopK && hidden % 8 == 0 &&
         intermediate % 8 == 0 && intermediate <= kStageElements &&
         shared_bytes(top_k, hidden, intermediate) <= kMaxSharedBytes;
}

void streaming_expert_ffn(const StreamingExpertFfnArgs& args, cudaStream_t stream) {
  if (args.num_tokens == 0) return;
  if (!streaming_experts_fit(args.num_tokens, args.top_k, args.hidden, args.intermediate)) {
    throw std::invalid_argument(
        "experts of " + std::to_string(args.hidden) + " x " + std::to_string(args.intermediate) +
        ", " + std::to_string(args.top_k) + " for each of " + std::to_string(args.num_tokens) +
        " tokens, do not fit the streaming kernel");
  }
  const Problem p{args.expert_ids,
                  args.expert_weights,
                  static_cast<const __nv_bfloat16*>(args.x),
                  args.x_stride,
                  static_cast<const __nv_bfloat16*>(args.gate_up),
                  static_cast<const __nv_bfloat16*>(args.down),
                  static_cast<__nv_bfloat16*>(args.h),
                  static_cast<__nv_bfloat16*>(args.out),
                  args.counters,
                  args.top_k,
                  args.hidden,
                  args.intermediate};
  CHECK_CUDA(cudaFuncSetAttribute(streaming_experts_kernel,
                                  cudaFuncAttributeMaxDynamicSharedMemorySize, kMaxSharedBytes));
  // No more blocks than multiprocessors, because they wait for each other.
  launch_dependent("streaming_experts_kernel", streaming_experts_kernel,
                   dim3(num_multiprocessors() / args.num_tokens, args.num_tokens), 32 * kWarps,
                   shared_bytes(args.top_k, args.hidden, args.intermediate), stream, 1, p);
}

}  // namespace moe_engine

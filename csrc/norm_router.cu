// The residual addition, the norm and the router of few tokens, whose time is all latency.
//
// A cluster of blocks takes 8 tokens, each block an equal part of the hidden dimension: its part
// of the gate matrix waits in shared memory before the tokens are there. The blocks wait for each
// other only once. The router needs the normed tokens, and they the sum of all squares; but a norm
// only scales a token, so the blocks multiply tokens that are not scaled yet, and send their parts
// of the logits along with their sums of squares. Parts of logits go to the block that selects the
// token's experts, which adds them up in order.
#include <cuda_bf16.h>

#include <stdexcept>
#include <string>

#include "hopper.cuh"
#include "launch.cuh"
#include "mma.cuh"
#include "norm_router.h"

namespace moe_engine {
namespace {

constexpr int kBlocks = 8;        // of a cluster
constexpr int kTokens = kBlocks;  // each block selects the experts of one
constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kThreadsPerToken = kThreads / kTokens;
constexpr int kStep = 32;  // elements of the depth that a warp multiplies at once
constexpr int kMaxRoutedExperts = 256;
constexpr int kMaxColumns = 512;                                // of a block
constexpr int kMaxPieces = kMaxColumns / 8 / kThreadsPerToken;  // of 8 elements, of a thread
constexpr int kMaxSharedBytes = 220 * 1024;

// Rows of shared memory lie apart by an odd multiple of 64 bytes: 8 of them fill all banks.
__host__ __device__ constexpr int row_bytes(int columns) {
  return (2 * columns + 127) / 128 * 128 + 64;
}

int shared_bytes(int num_experts, int hidden) {
  return (num_experts + kTokens) * row_bytes(hidden / kBlocks) +
         kBlocks * num_experts * static_cast<int>(sizeof(float));
}

__device__ __forceinline__ float rounded(float value) {
  return __bfloat162float(__float2bfloat16(value));
}

// An unsigned integer that sorts like the float, NaN as -inf; never 0.
__device__ __forceinline__ std::uint32_t sort_key(float value) {
  const std::uint32_t bits = __float_as_uint(value == value ? value + 0.0f : -INFINITY);
  return bits & 0x80000000 ? ~bits : bits | 0x80000000;
}

__device__ __forceinline__ float from_sort_key(std::uint32_t key) {
  return __uint_as_float(key & 0x80000000 ? key & 0x7FFFFFFF : ~key);
}

struct Problem {
  const void* x;
  const __nv_bfloat16* residual;
  const __nv_bfloat16* norm_weight;
  const __nv_bfloat16* gate;
  const std::int32_t* num_real_1;
  __nv_bfloat16* normed;
  __nv_bfloat16* new_residual;
  std::int32_t* expert_ids;
  float* expert_weights;
  float eps;
  int num_parts;
  int num_tokens;
  int num_experts;
  int hidden;
  int top_k;
  bool normalize;
};

// 8 elements of x, from `offset` on.
__device__ __forceinline__ void load_x(const Problem& p, std::int64_t offset, float (&values)[8]) {
  if (p.num_parts == 0) {
    const uint4 raw =
        *reinterpret_cast<const uint4*>(static_cast<const __nv_bfloat16*>(p.x) + offset);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = pair_of(raw, i);
      values[2 * i] = pair.x;
      values[2 * i + 1] = pair.y;
    }
    return;
  }
  const std::int64_t part_elements = std::int64_t{p.num_tokens} * p.hidden;
  const float* const parts = static_cast<const float*>(p.x) + offset;
#pragma unroll
  for (int i = 0; i < 8; ++i) values[i] = 0.0f;
#pragma unroll 8
  for (int part = 0; part < p.num_parts; ++part) {
    const auto* const from = reinterpret_cast<const float4*>(parts + part * part_elements);
    const float4 low = from[0];
    const float4 high = from[1];
    values[0] += low.x;
    values[1] += low.y;
    values[2] += low.z;
    values[3] += low.w;
    values[4] += high.x;
    values[5] += high.y;
    values[6] += high.z;
    values[7] += high.w;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) values[i] = rounded(values[i]);
}

__device__ __forceinline__ uint4 pack(const float (&values)[8]) {
  return make_uint4(pack_bf16(values[0], values[1]), pack_bf16(values[2], values[3]),
                    pack_bf16(values[4], values[5]), pack_bf16(values[6], values[7]));
}

// One warp: the best top_k of the scaled logits, with their softmax over all or over the best.
template <int kMaxExpertsPerLane>
__device__ __forceinline__ void select(const Problem& p, int token, const float* logits,
                                       float scale, int lane) {
  std::uint32_t keys[kMaxExpertsPerLane];
#pragma unroll
  for (int i = 0; i < kMaxExpertsPerLane; ++i) {
    const int expert = 32 * i + lane;
    keys[i] = 0;
    if (expert < p.num_experts) {
      float sum = 0.0f;
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        sum += logits[block * p.num_experts + expert];
      }
      keys[i] = sort_key(sum * scale);
    }
  }
  float largest = 0.0f;
  float total = 0.0f;
  float weight = 0.0f;  // of choice `lane`
  int id = -1;
  for (int choice = 0; choice < p.top_k; ++choice) {
    std::uint32_t best = 0;
#pragma unroll
    for (int i = 0; i < kMaxExpertsPerLane; ++i) best = max(best, keys[i]);
    best = __reduce_max_sync(0xFFFFFFFF, best);
    int expert = kMaxRoutedExperts;
#pragma unroll
    for (int i = kMaxExpertsPerLane - 1; i >= 0; --i) {
      if (keys[i] == best) expert = 32 * i + lane;
    }
    expert = __reduce_min_sync(0xFFFFFFFF, expert);
    const float logit = from_sort_key(best);
    if (choice == 0) {
      largest = logit;
      if (!p.normalize) {
#pragma unroll
        for (int i = 0; i < kMaxExpertsPerLane; ++i) {
          if (keys[i] != 0) total += __expf(from_sort_key(keys[i]) - largest);
        }
        for (int distance = 16; distance > 0; distance /= 2) {
          total += __shfl_xor_sync(0xFFFFFFFF, total, distance);
        }
      }
    }
    const float unscaled = __expf(logit - largest);
    if (p.normalize) total += unscaled;
    if (lane == choice) {
      weight = unscaled;
      id = expert;
    }
#pragma unroll
    for (int i = 0; i < kMaxExpertsPerLane; ++i) {
      if (32 * i + lane == expert) keys[i] = 0;
    }
  }
  if (lane < p.top_k) {
    const std::int64_t pair = std::int64_t{token} * p.top_k + lane;
    const bool real = p.num_real_1 == nullptr || token < *p.num_real_1;
    p.expert_ids[pair] = real ? id : -1;
    p.expert_weights[pair] = real ? weight / total : 0.0f;
  }
}

// Cluster c takes tokens 8 c .. 8 c + 7.
//
// Example: hidden 2048, 128 experts: a block has 256 columns, 64 KiB of the gate matrix; each of 8
// warps makes 8 tokens' parts of 16 logits; the block then selects the experts of one token.
__global__ void __launch_bounds__(kThreads) __cluster_dims__(kBlocks, 1, 1)
    norm_router_kernel(const Problem p) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) char shared[];
  __shared__ std::uint64_t landed;
  __shared__ float squares[kBlocks][kTokens];
  const int columns = p.hidden / kBlocks;
  const int pitch = row_bytes(columns);
  char* const gate = shared;
  char* const tokens = gate + p.num_experts * pitch;
  float* const logits = reinterpret_cast<float*>(tokens + kTokens * pitch);  // [block][expert]
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int rank = block_in_cluster();
  const int first_token = blockIdx.x / kBlocks * kTokens;
  const int first_column = rank * columns;

  let_next_kernel_start();
  cluster_arrive();
  if (threadIdx.x == 0) {
    barrier_init(&landed, 1);
    barrier_init_fence();
    barrier_arrive_expecting(&landed, p.num_experts * columns * 2);
  }
  __syncthreads();
  for (int expert = threadIdx.x; expert < p.num_experts; expert += kThreads) {
    copy_row(shared_address(gate + expert * pitch),
             p.gate + std::int64_t{expert} * p.hidden + first_column, 2 * columns, &landed);
  }
  // This thread's token, and its pieces of 8 columns.
  const int slot = threadIdx.x / kThreadsPerToken;
  const int token = first_token + slot;
  const int part = threadIdx.x % kThreadsPerToken;
  const int num_pieces = columns / 8;
  uint4 weights[kMaxPieces];
#pragma unroll
  for (int i = 0; i < kMaxPieces; ++i) {
    const int piece = part + i * kThreadsPerToken;
    if (piece < num_pieces) {
      weights[i] = reinterpret_cast<const uint4*>(p.norm_weight + first_column)[piece];
    }
  }
  wait_for_previous_kernels();

  float values[kMaxPieces][8];
  float square = 0.0f;
#pragma unroll
  for (int i = 0; i < kMaxPieces; ++i) {
    const int piece = part + i * kThreadsPerToken;
    if (piece >= num_pieces || token >= p.num_tokens) continue;
    const std::int64_t offset = std::int64_t{token} * p.hidden + first_column + 8 * piece;
    const uint4 raw = *reinterpret_cast<const uint4*>(p.residual + offset);
    load_x(p, offset, values[i]);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float2 pair = pair_of(raw, j);
      values[i][2 * j] = rounded(values[i][2 * j] + pair.x);
      values[i][2 * j + 1] = rounded(values[i][2 * j + 1] + pair.y);
      square = fmaf(values[i][2 * j], values[i][2 * j], square);
      square = fmaf(values[i][2 * j + 1], values[i][2 * j + 1], square);
    }
    *reinterpret_cast<uint4*>(p.new_residual + offset) = pack(values[i]);
  }
#pragma unroll
  for (int distance = kThreadsPerToken / 2; distance > 0; distance /= 2) {
    square += __shfl_xor_sync(0xFFFFFFFF, square, distance);
  }
  __syncwarp();
  cluster_wait();  // the others have begun: their shared memory may be written to
  if (part < kBlocks) store_to_block(&squares[rank][slot], part, square);
#pragma unroll
  for (int i = 0; i < kMaxPieces; ++i) {
    const int piece = part + i * kThreadsPerToken;
    if (piece >= num_pieces) continue;
    float products[8] = {};
    if (token < p.num_tokens) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 weight = pair_of(weights[i], j);
        products[2 * j] = values[i][2 * j] * weight.x;
        products[2 * j + 1] = values[i][2 * j + 1] * weight.y;
      }
    }
    *reinterpret_cast<uint4*>(tokens + slot * pitch + 16 * piece) = pack(products);
  }
  __syncthreads();
  barrier_wait(&landed, 0);

  // See mma.cuh for how the elements of the depth are dealt out. Tokens are the upper half of an
  // mma's rows. The two halves of a step are added up by themselves: chains half as long.
  const char* const token_row = tokens + lane / 4 * pitch + lane % 4 * 16;
  for (int first = 8 * warp; first < p.num_experts; first += 8 * kWarps) {
    const char* const gate_row = gate + (first + lane / 4) * pitch + lane % 4 * 16;
    float d[2][4] = {};
#pragma unroll 8
    for (int step = 0; step < columns / kStep; ++step) {
      const uint4 token_part = *reinterpret_cast<const uint4*>(token_row + step * kStep * 2);
      const uint4 gate_part = *reinterpret_cast<const uint4*>(gate_row + step * kStep * 2);
      mma(d[0], token_part.x, 0, token_part.y, 0, gate_part.x, gate_part.y);
      mma(d[1], token_part.z, 0, token_part.w, 0, gate_part.z, gate_part.w);
    }
    // Block s selects the experts of token s.
    const int s = lane / 4;
    if (first_token + s < p.num_tokens) {
      float* const to = logits + rank * p.num_experts + first + lane % 4 * 2;
      store_to_block(to, s, d[0][0] + d[1][0]);
      store_to_block(to + 1, s, d[0][1] + d[1][1]);
    }
  }
  __syncwarp();
  cluster_sync();

  const auto scale_of = [&](int s) {
    float sum = 0.0f;
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) sum += squares[block][s];
    return rsqrtf(sum / p.hidden + p.eps);
  };
  // The last warp, which holds the token that is there least often.
  if (warp == kWarps - 1 && first_token + rank < p.num_tokens) {
    if (p.num_experts <= 128) {
      select<4>(p, first_token + rank, logits, scale_of(rank), lane);
    } else {
      select<kMaxRoutedExperts / 32>(p, first_token + rank, logits, scale_of(rank), lane);
    }
  }
  if (token >= p.num_tokens) return;
  const float scale = scale_of(slot);
#pragma unroll
  for (int i = 0; i < kMaxPieces; ++i) {
    const int piece = part + i * kThreadsPerToken;
    if (piece >= num_pieces) continue;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float2 weight = pair_of(weights[i], j);
      values[i][2 * j] = rounded(values[i][2 * j] * scale) * weight.x;
      values[i][2 * j + 1] = rounded(values[i][2 * j + 1] * scale) * weight.y;
    }
    const std::int64_t offset = std::int64_t{token} * p.hidden + first_column + 8 * piece;
    *reinterpret_cast<uint4*>(p.normed + offset) = pack(values[i]);
  }
#endif
}

}  // namespace

bool norm_router_fits(int num_experts, int hidden, int top_k) {
  return num_experts % 8 == 0 && num_experts <= kMaxRoutedExperts && top_k <= 32 &&
         top_k <= num_experts && hidden % (kBlocks * kStep) == 0 &&
         hidden <= kBlocks * kMaxColumns && shared_bytes(num_experts, hidden) <= kMaxSharedBytes;
}

void norm_router(const NormRouterArgs& args, cudaStream_t stream) {
  if (args.num_tokens == 0) return;
  if (!norm_router_fits(args.num_experts, args.hidden, args.top_k)) {
    throw std::invalid_argument("a router for " + std::to_string(args.top_k) + " of " +
                                std::to_string(args.num_experts) + " experts of width " +
                                std::to_string(args.hidden) + " does not fit the kernel");
  }
  const Problem p{args.x,
                  static_cast<const __nv_bfloat16*>(args.residual),
                  static_cast<const __nv_bfloat16*>(args.norm_weight),
                  static_cast<const __nv_bfloat16*>(args.gate),
                  args.num_real_1,
                  static_cast<__nv_bfloat16*>(args.normed),
                  static_cast<__nv_bfloat16*>(args.new_residual),
                  args.expert_ids,
                  args.expert_weights,
                  args.eps,
                  args.num_parts,
                  args.num_tokens,
                  args.num_experts,
                  args.hidden,
                  args.top_k,
                  args.normalize};
  CHECK_CUDA(cudaFuncSetAttribute(norm_router_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  kMaxSharedBytes));
  launch_dependent("norm_router_kernel", norm_router_kernel,
                   dim3((args.num_tokens + kTokens - 1) / kTokens * kBlocks), kThreads,
                   shared_bytes(args.num_experts, args.hidden), stream, 1, p);
}

}  // namespace moe_engine

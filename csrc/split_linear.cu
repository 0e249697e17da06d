// A linear layer of few tokens, split over its depth.
//
// A block takes some rows of the weight and 512 elements of their depth, all of which fit its
// shared memory: it asks for them before it waits for the kernel that makes x. What is left to do
// then is to fetch as many elements of 64 tokens, a quarter or an eighth of x, to multiply, and to
// store. Nobody adds up the parts here, because blocks that wait for each other would take longer
// than the product.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "launch.cuh"
#include "ring.cuh"
#include "split_linear.h"
#include "tensor_map.h"

// For other architectures than Hopper the kernel is empty, and nothing that it calls is used.
#pragma nv_diag_suppress 177

namespace moe_engine {
namespace {

constexpr int kTokens = kSplitLinearMaxTokens;
constexpr int kAtoms = 8;  // of the depth, in a block
constexpr int kDepth = kAtoms * kAtom;
constexpr int kWarpgroups = 2;
constexpr int kThreads = 128 * kWarpgroups + 32;
constexpr int kTokenAtomBytes = kTokens * kAtomBytes;

template <int kColumns>  // rows of the weight, of a warpgroup
__host__ __device__ constexpr int weight_atom_bytes() {
  return kWarpgroups * kColumns * kAtomBytes;
}

template <int kColumns>
constexpr int shared_bytes() {
  return 1024 + kAtoms * (weight_atom_bytes<kColumns>() + kTokenAtomBytes);
}

// Block (b, s) computes kWarpgroups * kColumns columns of parts[s].
//
// Example: 5120 rows of 2048 elements: 32 x 4 blocks of 160 rows and 512 elements, 160 KiB of the
// weight, and 64 KiB of x.
template <int kColumns>
__global__ void __launch_bounds__(kThreads, 1)
    split_linear_kernel(const __grid_constant__ CUtensorMap weight,
                        const __grid_constant__ CUtensorMap x, float* parts, int num_tokens,
                        int out_features) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ char shared[];
  __shared__ std::uint64_t landed[kAtoms];
  constexpr int kWeightAtomBytes = weight_atom_bytes<kColumns>();
  const std::uint32_t weights = shared_address(align_stages(shared));
  const std::uint32_t tokens = weights + kAtoms * kWeightAtomBytes;
  const int first_column = blockIdx.x * kWarpgroups * kColumns;
  const int first_element = blockIdx.y * kDepth;
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;

  let_next_kernel_start();
  if (threadIdx.x == 128 * kWarpgroups) {
    prefetch_tensor_map(&weight);
    prefetch_tensor_map(&x);
    for (int atom = 0; atom < kAtoms; ++atom) barrier_init(&landed[atom], 1);
    barrier_init_fence();
    for (int atom = 0; atom < kAtoms; ++atom) {
      barrier_arrive_expecting(&landed[atom], kWeightAtomBytes + kTokenAtomBytes);
      copy_box_2d(weights + atom * kWeightAtomBytes, &weight, &landed[atom],
                  first_element + atom * kAtom, first_column);
    }
  }
  __syncthreads();
  wait_for_previous_kernels();
  if (warp == 4 * kWarpgroups) {
    if (lane == 0) {
      for (int atom = 0; atom < kAtoms; ++atom) {
        copy_box_2d(tokens + atom * kTokenAtomBytes, &x, &landed[atom],
                    first_element + atom * kAtom, 0);
      }
    }
    return;
  }

  const int warpgroup = warp / 4;
  const std::uint64_t a = matrix_descriptor(tokens);
  const std::uint64_t b = matrix_descriptor(weights + warpgroup * kColumns * kAtomBytes);
  float acc[kColumns / 2];
#pragma unroll
  for (int atom = 0; atom < kAtoms; ++atom) {
    barrier_wait(&landed[atom], 0);
    wgmma_begin();
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      wgmma<kColumns>(acc, a + atom * (kTokenAtomBytes / 16) + 2 * part,
                      b + atom * (kWeightAtomBytes / 16) + 2 * part, atom > 0 || part > 0);
    }
    wgmma_commit();
  }
  wgmma_wait<0>();

  const int token = warp % 4 * 16 + lane / 4;
  const int column = first_column + warpgroup * kColumns + lane % 4 * 2;
  float* const out =
      parts + (std::int64_t{blockIdx.y} * num_tokens + token) * out_features + column;
#pragma unroll
  for (int j = 0; j < kColumns / 8; ++j) {
    if (column + 8 * j >= out_features) break;
    if (token < num_tokens) {
      *reinterpret_cast<float2*>(out + 8 * j) = make_float2(acc[4 * j], acc[4 * j + 1]);
    }
    if (token + 8 < num_tokens) {
      *reinterpret_cast<float2*>(out + 8 * (out_features + j)) =
          make_float2(acc[4 * j + 2], acc[4 * j + 3]);
    }
  }
#else
  __trap();
#endif
}

// Columns of a warpgroup such that one round of blocks covers the layer; 0 if they are too many.
int columns_per_warpgroup(int in_features, int out_features) {
  const int num_splits = in_features / kDepth;
  const int most_blocks = num_splits > 0 ? num_multiprocessors() / num_splits : 0;
  if (most_blocks == 0) return 0;
  const int columns = (out_features + most_blocks - 1) / most_blocks;
  for (const int choice : {64, 72, 80}) {
    if (columns <= kWarpgroups * choice) return choice;
  }
  return 0;
}

template <int kColumns>
void launch(const SplitLinearArgs& args, cudaStream_t stream) {
  const auto in_features = static_cast<std::uint64_t>(args.in_features);
  constexpr std::uint32_t kRows = kWarpgroups * kColumns;
  const CUtensorMap weight = bf16_tensor_map(
      args.weight,
      {{in_features, 2, kAtom}, {std::uint64_t(args.out_features), 2 * in_features, kRows}});
  const CUtensorMap x = bf16_tensor_map(
      args.x,
      {{in_features, 2, kAtom},
       {std::uint64_t(args.num_tokens), 2 * static_cast<std::uint64_t>(args.x_stride), kTokens}});
  CHECK_CUDA(cudaFuncSetAttribute(split_linear_kernel<kColumns>,
                                  cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  shared_bytes<kColumns>()));
  launch_dependent("split_linear_kernel", split_linear_kernel<kColumns>,
                   dim3((args.out_features + kRows - 1) / kRows, args.in_features / kDepth),
                   kThreads, shared_bytes<kColumns>(), stream, 1, weight, x, args.parts,
                   args.num_tokens, args.out_features);
}

}  // namespace

int split_linear_splits(int in_features, int out_features) {
  const bool fits = in_features % kDepth == 0 && out_features % 8 == 0 &&
                    columns_per_warpgroup(in_features, out_features) > 0;
  return fits ? in_features / kDepth : 0;
}

void split_linear(const SplitLinearArgs& args, cudaStream_t stream) {
  if (args.num_tokens == 0) return;
  if (args.num_tokens > kTokens || split_linear_splits(args.in_features, args.out_features) == 0) {
    throw std::invalid_argument("a layer of " + std::to_string(args.out_features) + " x " +
                                std::to_string(args.in_features) + " for " +
                                std::to_string(args.num_tokens) +
                                " tokens does not fit the split kernel");
  }
  switch (columns_per_warpgroup(args.in_features, args.out_features)) {
    case 64:
      return launch<64>(args, stream);
    case 72:
      return launch<72>(args, stream);
    default:
      return launch<80>(args, stream);
  }
}

}  // namespace moe_engine

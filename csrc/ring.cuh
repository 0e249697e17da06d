// A ring of stages in shared memory, between the warps that load a tile's operands and those that
// multiply them.
#pragma once

#include "hopper.cuh"
#include "wgmma.cuh"

namespace moe_engine {

constexpr int kAtom = 64;              // elements of a swizzled row of shared memory
constexpr int kAtomBytes = kAtom * 2;  // 128

// Compile-time shape of a tile and its ring. A stage holds kStepAtoms * 64 elements of K of the
// weights' kRows rows, then of kTokens tokens, both as atoms of 64.
template <int kWarpgroups_, int kBlocks_, int kTokens_, int kStepAtoms_, int kStages_,
          int kCluster_, bool kTokensByThreads_>
struct RingShape {
  static constexpr int kWarpgroups = kWarpgroups_;  // that multiply
  static constexpr int kBlocks = kBlocks_;          // of 64 rows in a warpgroup
  static constexpr int kTokens = kTokens_;
  static constexpr int kStepAtoms = kStepAtoms_;
  static constexpr int kStages = kStages_;
  static constexpr int kCluster = kCluster_;  // blocks that share the weights they load
  static constexpr bool kTokensByThreads = kTokensByThreads_;  // and not by the copy engine

  static constexpr int kRows = 64 * kBlocks * kWarpgroups;
  static constexpr int kWeightAtomBytes = kRows * kAtomBytes;
  static constexpr int kTokenAtomBytes = kTokens * kAtomBytes;
  static constexpr int kWeightBytes = kWeightAtomBytes * kStepAtoms;
  static constexpr int kStageBytes = kWeightBytes + kTokenAtomBytes * kStepAtoms;
  static constexpr int kConsumerWarps = 4 * kWarpgroups;
  static constexpr int kAccumulators = kBlocks * kTokens / 2;  // registers of a thread
};

template <int kStages>
struct RingBarriers {
  std::uint64_t full[kStages];   // loaders tell consumers
  std::uint64_t empty[kStages];  // consumers, of all blocks of the cluster, tell loaders
};

template <typename S>
struct Ring {
  std::uint32_t base;  // shared address of stage 0
  std::uint64_t* full;
  std::uint64_t* empty;

  __device__ __forceinline__ std::uint32_t weights(int stage) const {
    return base + stage * S::kStageBytes;
  }
  __device__ __forceinline__ std::uint32_t tokens(int stage) const {
    return weights(stage) + S::kWeightBytes;
  }
};

// One thread; a barrier of the block, or of the cluster, must follow.
template <typename S>
__device__ __forceinline__ void init_ring(RingBarriers<S::kStages>& barriers, int num_loaders) {
  for (int stage = 0; stage < S::kStages; ++stage) {
    barrier_init(&barriers.full[stage], num_loaders);
    barrier_init(&barriers.empty[stage], S::kConsumerWarps * S::kCluster);
  }
  barrier_init_fence();
}

// Swizzled matrices need addresses that are multiples of 1024: shared memory is asked for with that
// much to spare.
__device__ __forceinline__ char* align_stages(char* shared) {
  return shared + (1024 - shared_address(shared) % 1024) % 1024;
}

// Tells the producers of all blocks of the cluster that this warp is done with the stage.
template <typename S>
__device__ __forceinline__ void release(const Ring<S>& ring, int stage, int lane) {
  if constexpr (S::kCluster > 1) {
    if (lane < S::kCluster) barrier_arrive_in_block(&ring.empty[stage], lane);
  } else {
    if (lane == 0) barrier_arrive(&ring.empty[stage]);
  }
}

// Multiplies num_steps stages by kN columns: block b of 64 rows into acc[b * kTokens / 2 ..].
// meanwhile() runs beside the last of the products where these take the time. Where the memory
// does, it runs behind them, so as not to keep their stage from the loaders.
template <typename S, int kN, typename Meanwhile>
__device__ __forceinline__ void multiply(const Ring<S>& ring, RingPosition<S::kStages>& at,
                                         float* acc, int num_steps, int warpgroup, int lane,
                                         Meanwhile meanwhile) {
  int previous = 0;
  for (int step = 0; step < num_steps; ++step) {
    barrier_wait(&ring.full[at.stage], at.parity);
    if constexpr (S::kTokensByThreads) async_proxy_fence();
    const std::uint64_t a =
        matrix_descriptor(ring.weights(at.stage) + warpgroup * S::kBlocks * 64 * kAtomBytes);
    const std::uint64_t b = matrix_descriptor(ring.tokens(at.stage));
    wgmma_begin();
#pragma unroll
    for (int atom = 0; atom < S::kStepAtoms; ++atom) {
#pragma unroll
      for (int part = 0; part < 4; ++part) {
#pragma unroll
        for (int block = 0; block < S::kBlocks; ++block) {
          wgmma<kN>(acc + block * (S::kTokens / 2),
                    a + (atom * S::kWeightAtomBytes + block * 64 * kAtomBytes) / 16 + 2 * part,
                    b + atom * (S::kTokenAtomBytes / 16) + 2 * part,
                    step > 0 || atom > 0 || part > 0);
        }
      }
    }
    wgmma_commit();
    if (step > 0) {
      wgmma_wait<1>();
      release(ring, previous, lane);
    }
    previous = at.stage;
    at.advance();
  }
  if constexpr (S::kCluster > 1) meanwhile();
  wgmma_wait<0>();
  release(ring, previous, lane);
  if constexpr (S::kCluster == 1) meanwhile();
}

// Multiplies with the narrowest product that covers num_tokens columns. All use the same registers.
template <typename S, typename Meanwhile>
__device__ __forceinline__ void multiply_narrowly(const Ring<S>& ring, RingPosition<S::kStages>& at,
                                                  float* acc, int num_tokens, int num_steps,
                                                  int warpgroup, int lane, Meanwhile meanwhile) {
  if constexpr (S::kTokens > 64) {
    if constexpr (S::kTokens > 128) {
      if (num_tokens > 136)
        return multiply<S, 144>(ring, at, acc, num_steps, warpgroup, lane, meanwhile);
      if (num_tokens > 128)
        return multiply<S, 136>(ring, at, acc, num_steps, warpgroup, lane, meanwhile);
    }
    if (num_tokens > 120)
      return multiply<S, 128>(ring, at, acc, num_steps, warpgroup, lane, meanwhile);
    if (num_tokens > 112)
      return multiply<S, 120>(ring, at, acc, num_steps, warpgroup, lane, meanwhile);
    if (num_tokens > 104)
      return multiply<S, 112>(ring, at, acc, num_steps, warpgroup, lane, meanwhile);
    if (num_tokens > 96)
      return multiply<S, 104>(ring, at, acc, num_steps, warpgroup, lane, meanwhile);
    if (num_tokens > 64)
      return multiply<S, 96>(ring, at, acc, num_steps, warpgroup, lane, meanwhile);
  }
  if constexpr (S::kTokens > 32) {
    if (num_tokens > 32)
      return multiply<S, 64>(ring, at, acc, num_steps, warpgroup, lane, meanwhile);
  }
  if constexpr (S::kTokens > 16) {
    if (num_tokens > 16)
      return multiply<S, 32>(ring, at, acc, num_steps, warpgroup, lane, meanwhile);
  }
  if constexpr (S::kTokens > 8) {
    if (num_tokens > 8)
      return multiply<S, 16>(ring, at, acc, num_steps, warpgroup, lane, meanwhile);
  }
  multiply<S, 8>(ring, at, acc, num_steps, warpgroup, lane, meanwhile);
}

}  // namespace moe_engine

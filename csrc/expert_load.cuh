// How the producer warps of a grouped product keep its ring full: the weights and h by the copy
// engine, rows of x gathered by cp.async, across the borders of tiles.
#pragma once

#include "expert_tiles.cuh"
#include "grouped_product.cuh"
#include "hopper.cuh"
#include "ring.cuh"

namespace moe_engine {

// One thread. The blocks of a cluster each load their share of the rows, for all.
template <typename S>
__device__ __forceinline__ void load_weights(const Ring<S>& ring, const CUtensorMap* map,
                                             const TileWalk<S>& tile, int step, int stage) {
  const int first_row =
      tile.row_tile * S::kRows + (S::kCluster > 1 ? tile.rank : 0) * S::kLoadedRows;
#pragma unroll
  for (int atom = 0; atom < S::kStepAtoms; ++atom) {
    std::uint32_t to = ring.weights(stage) + atom * S::kWeightAtomBytes;
    const int k = (step * S::kStepAtoms + atom) * kAtom;
    std::uint64_t* full = &ring.full[stage];
    if constexpr (S::kCluster > 1) {
      constexpr std::uint16_t kAll = (1 << S::kCluster) - 1;
      to += tile.rank * S::kLoadedRows * kAtomBytes;
      if constexpr (S::kGateUp) {
        multicast_box_5d(to, map, full, kAll, kEvictNormal, k, 0, 0, first_row / 16, tile.expert);
      } else {
        multicast_box_3d(to, map, full, kAll, kEvictNormal, k, first_row, tile.expert);
      }
    } else if constexpr (S::kGateUp) {
      copy_box_5d(to, map, full, kEvictFirst, k, 0, 0, first_row / 16, tile.expert);
    } else {
      copy_box_3d(to, map, full, kEvictFirst, k, first_row, tile.expert);
    }
  }
}

// One thread: weights and rows of h, both through the copy engine.
template <typename S>
__device__ void produce_down(const Ring<S>& ring, const CUtensorMap* weights, const CUtensorMap* h,
                             TileWalk<S> tile, TileDealer<S> dealer, int num_steps) {
  bool more = tile.find();
  if (more) dealer.ask();
  // The weights do not depend on the kernel before this one: a ring full of them is on its way
  // while that one ends.
  TileWalk<S> ahead = tile;
  bool more_ahead = more;
  int ahead_step = 0;
  int num_ahead = 0;  // tiles dealt to it before `tile` comes to them
  for (int stage = 0; stage < S::kStages && more_ahead; ++stage) {
    barrier_arrive_expecting(&ring.full[stage], S::kStageBytes);
    load_weights(ring, weights, ahead, ahead_step, stage);
    if (++ahead_step == num_steps) {
      ahead_step = 0;
      dealer.deal();
      ++num_ahead;
      more_ahead = ahead.template next<true>();
    }
  }
  wait_for_previous_kernels();

  RingPosition<S::kStages> at;
  int used = 0;
  while (more) {
    for (int step = 0; step < num_steps; ++step) {
      if (used < S::kStages) {
        ++used;
      } else {
        barrier_wait(&ring.empty[at.stage], at.parity ^ 1);
        barrier_arrive_expecting(&ring.full[at.stage], S::kStageBytes);
        load_weights(ring, weights, tile, step, at.stage);
      }
#pragma unroll
      for (int atom = 0; atom < S::kStepAtoms; ++atom) {
        const int k = (step * S::kStepAtoms + atom) * kAtom;
#pragma unroll
        for (int token = 0; token < S::kTokens; token += S::kTokenBox) {
          copy_box_2d(ring.tokens(at.stage) + atom * S::kTokenAtomBytes + token * kAtomBytes, h,
                      &ring.full[at.stage], k, tile.first_pair + token);
        }
      }
      at.advance();
    }
    if (num_ahead > 0) {
      --num_ahead;
    } else {
      dealer.deal();
    }
    more = tile.template next<true>();
  }
}

// One thread, before it is known who chose what: a ring full of the weights of a foreseen tile.
template <typename S>
__device__ void load_foreseen_weights(const Ring<S>& ring, const CUtensorMap* weights,
                                      TileWalk<S> tile, int num_steps) {
  if (!tile.is_foreseen()) return;
  tile.find_rows();
  for (int stage = 0; stage < min(S::kStages, num_steps); ++stage) {
    barrier_arrive_expecting(&ring.full[stage], S::kWeightBytes);
    load_weights(ring, weights, tile, stage, stage);
  }
}

// All producer warps: weights through the copy engine, rows of x gathered 16 bytes at a time.
template <typename S>
__device__ void produce_gate_up(const GroupedProduct& p, const Ring<S>& ring,
                                const CUtensorMap* weights, TileWalk<S> tile, TileDealer<S> dealer,
                                int num_steps) {
  constexpr int kThreads = 32 * S::kProducerWarps;
  constexpr int kRowsAtOnce = kThreads / 8;
  constexpr int kRowsPerThread = (S::kTokens + kRowsAtOnce - 1) / kRowsAtOnce;
  const int thread = threadIdx.x - 32 * S::kConsumerWarps;
  const int chunk = thread % 8;
  const int first_row = thread / 8;
  const uint4* const x = reinterpret_cast<const uint4*>(p.x);
  const std::uint32_t x_stride_chunks = p.x_stride / 8;
  RingPosition<S::kStages> at;
  bool filled = false;
  int num_loaded = tile.is_foreseen() ? min(S::kStages, num_steps) : 0;
  bool more = tile.find();
  if (thread == 0 && more) dealer.ask();
  const auto next_tile = [&] {
    if (thread == 0) dealer.deal();
    more = tile.next();
  };
  while (more) {
    if (S::kCluster == 1 && tile.num_pairs == 0) {
      for (; num_loaded > 0; --num_loaded) {
        barrier_arrive(&ring.full[at.stage]);
        at.advance();
        filled = filled || at.stage == 0;
      }
      next_tile();
      continue;
    }
    std::uint32_t rows[kRowsPerThread];  // in units of 16 bytes
#pragma unroll
    for (int i = 0; i < kRowsPerThread; ++i) {
      // Columns past the last pair are computed and not stored.
      const int pair = max(0, min(first_row + i * kRowsAtOnce, tile.num_pairs - 1));
      rows[i] = p.pairs[tile.first_pair + pair] / p.top_k * x_stride_chunks + chunk;
    }
    const int num_rows = (tile.num_pairs + 7) / 8 * 8;
    for (int step = 0; step < num_steps; ++step) {
      if (filled) barrier_wait(&ring.empty[at.stage], at.parity ^ 1);
      if (num_loaded > 0) {
        --num_loaded;
      } else if (thread == 0) {
        barrier_arrive_expecting(&ring.full[at.stage], S::kWeightBytes);
        load_weights(ring, weights, tile, step, at.stage);
      }
#pragma unroll
      for (int i = 0; i < kRowsPerThread; ++i) {
        const int row = first_row + i * kRowsAtOnce;
        if (row < num_rows) {
          const std::uint32_t to =
              ring.tokens(at.stage) + row * kAtomBytes + ((chunk ^ (row % 8)) * 16);
#pragma unroll
          for (int atom = 0; atom < S::kStepAtoms; ++atom) {
            copy_16_bytes(to + atom * S::kTokenAtomBytes,
                          x + rows[i] + (step * S::kStepAtoms + atom) * (kAtomBytes / 16));
          }
        }
      }
      barrier_arrive_after_copies(&ring.full[at.stage]);
      at.advance();
      filled = filled || at.stage == 0;
    }
    next_tile();
  }
}

}  // namespace moe_engine

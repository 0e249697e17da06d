// How the persistent blocks of a grouped product share out its tiles.
#pragma once

#include <cstdint>

#include "hopper.cuh"
#include "ring.cuh"

namespace moe_engine {

constexpr int kMaxExperts = 1024;

// The pairs of an expert are split evenly into as few groups of at most `group_size` as there can
// be, and a group evenly over the blocks of a cluster. A tile is a group and a range of rows of the
// expert's weight.
//
// Foreseen tiles are those of the first group of each of the first experts, whether they have pairs
// or not: a block knows its one before it knows the groups.
struct TileTable {
  std::int32_t offsets[kMaxExperts + 1];  // first pair of every expert
  std::int32_t groups[kMaxExperts + 1];   // groups before every expert, without foreseen ones
};

// The sum of the values of this lane and those below it.
__device__ __forceinline__ int inclusive_sum(int value, int lane) {
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int other = __shfl_up_sync(0xFFFFFFFF, value, distance);
    if (lane >= distance) value += other;
  }
  return value;
}

// Fills the table from `offsets` [num_experts + 1]; all threads of the block.
__device__ inline void fill_tile_table(TileTable& table, const std::int32_t* offsets,
                                       int num_experts, int group_size, int num_foreseen_experts) {
  if (threadIdx.x < 32) {
    const int lane = threadIdx.x;
    int before = 0;
    for (int first = 0; first < num_experts; first += 32) {
      const int expert = first + lane;
      const bool real = expert < num_experts;
      const int begin = real ? offsets[expert] : 0;
      const int end = real ? offsets[expert + 1] : 0;
      int sum = (end - begin + group_size - 1) / group_size;
      if (expert < num_foreseen_experts && sum > 0) --sum;
      sum = inclusive_sum(sum, lane);
      if (real) {
        table.offsets[expert] = begin;
        table.offsets[expert + 1] = end;
        table.groups[expert + 1] = before + sum;
      }
      before += __shfl_sync(0xFFFFFFFF, sum, 31);
    }
    if (lane == 0) table.groups[0] = 0;
  }
  __syncthreads();
}

// The numbers of the tiles that a block is dealt, from the thread that asks for them to all others.
// No thread is further behind than a ring of stages, of which every tile fills one or more.
template <typename S>
struct TileQueue {
  static constexpr int kLength = S::kStages + 2;
  std::uint64_t dealt[kLength];  // barriers
  std::int32_t numbers[kLength];
};

// The tiles of one block. Foreseen tiles come first. Tiles of a group are neighbours, so that
// blocks that run at the same time read the same rows.
//
// A cluster's are its own number, then every `stride`-th. A block by itself has its own number,
// too, and then what it is dealt (TileDealer).
template <typename S>
struct TileWalk {
  static constexpr int kGroup = S::kTokens * S::kCluster;  // pairs, at most
  const TileTable* table;
  TileQueue<S>* queue;
  int num_row_tiles;
  int num_foreseen;  // a multiple of num_row_tiles, at most `stride`
  int rank;          // of this block in its cluster
  int number;
  int stride;
  int num_tiles;
  RingPosition<TileQueue<S>::kLength> at{};
  // Of the present tile. A block may have no pairs while others of its cluster do, or because the
  // tile was foreseen and nobody chose its expert.
  int expert = 0;
  int row_tile = 0;
  int first_pair = 0;
  int num_pairs = 0;

  __device__ __forceinline__ bool is_foreseen() const { return number < num_foreseen; }

  // Expert and rows of a foreseen tile, without the table.
  __device__ __forceinline__ void find_rows() {
    expert = number / num_row_tiles;
    row_tile = number - expert * num_row_tiles;
  }

  // Moves to the present number; false if there is no such tile.
  __device__ __forceinline__ bool find() {
    if (number >= num_tiles) return false;
    int index = 0;  // of the group among the expert's
    if (is_foreseen()) {
      find_rows();
    } else {
      const int rest = number - num_foreseen;
      const int group = rest / num_row_tiles;
      row_tile = rest - group * num_row_tiles;
      while (table->groups[expert + 1] <= group) ++expert;
      index = group - table->groups[expert];
      if (expert * num_row_tiles < num_foreseen) ++index;
    }
    const int all_pairs = table->offsets[expert + 1] - table->offsets[expert];
    const int num_groups = max(1, (all_pairs + kGroup - 1) / kGroup);
    // The first groups have one pair more than the others if they cannot all have as many.
    const int fewest = all_pairs / num_groups;
    const int num_larger = all_pairs - fewest * num_groups;
    first_pair = table->offsets[expert] + fewest * index + min(index, num_larger);
    num_pairs = fewest + (index < num_larger ? 1 : 0);
    if constexpr (S::kCluster > 1) {
      const int share = (num_pairs + 8 * S::kCluster - 1) / (8 * S::kCluster) * 8;
      const int first = min(rank * share, num_pairs);
      num_pairs = min(share, num_pairs - first);
      // A block without pairs stays at ones that exist.
      if (num_pairs > 0) first_pair += first;
    }
    return true;
  }

  // By a whole warp, or with kAlone by one thread. A warp's first lane alone reads the queue: it is
  // the one that releases stages, behind which the queue is written again.
  template <bool kAlone = false>
  __device__ __forceinline__ bool next() {
    if (is_foreseen()) expert = 0;  // the other tiles begin there, too
    if constexpr (S::kCluster > 1) {
      number += stride;
    } else {
      int dealt = 0;
      if (kAlone || threadIdx.x % 32 == 0) {
        barrier_wait(&queue->dealt[at.stage], at.parity);
        dealt = queue->numbers[at.stage];
      }
      number = kAlone ? dealt : __shfl_sync(0xFFFFFFFF, dealt, 0);
      at.advance();
    }
    return find();
  }
};

// Deals tiles to a block as it comes for them, because multiprocessors do not all get the same
// share of the memory's bandwidth. One thread, which has asked for a number long before it needs
// it; all others find it in the queue. Does nothing for a cluster.
//
// The counter is 0 before and after the kernel: each block asks until there is no tile left for it,
// so that min(stride, num_tiles) find none, num_tiles ask in all, and the last sets it back.
//
// Example, 3 blocks and 5 tiles: tiles 0, 1 and 2 need no dealing. Block 1 ends first and gets 0
// from the counter, tile 3; block 0 gets 1, tile 4. Then blocks 0, 1 and 2 get 2, 3 and 4, numbers
// from 5 on, of which there are no tiles, and the one that got 4 sets the counter back.
template <typename S>
struct TileDealer {
  TileQueue<S>* queue;
  std::int32_t* counter;
  int stride;
  int num_tiles;
  RingPosition<TileQueue<S>::kLength> at{};
  int upcoming = 0;

  // Once, if the block has a first tile.
  __device__ __forceinline__ void ask() {
    if constexpr (S::kCluster == 1) upcoming = atomicAdd(counter, 1);
  }

  // Before every TileWalk::next().
  __device__ __forceinline__ void deal() {
    if constexpr (S::kCluster == 1) {
      const int number = stride + upcoming;
      if (upcoming == num_tiles - 1) *counter = 0;
      queue->numbers[at.stage] = number;
      barrier_arrive(&queue->dealt[at.stage]);
      at.advance();
      if (number < num_tiles) ask();
    }
  }
};

}  // namespace moe_engine

// Few pairs, sorted by expert by every block for itself, which is cheaper than a kernel for it.
#pragma once

#include <cstdint>

#include "expert_tiles.cuh"

namespace moe_engine {

constexpr int kMaxSortedPairs = 1024;
constexpr int kSortChunk = 64;  // pairs that a warp looks at together, 32 at a time
constexpr int kSortChunks = kMaxSortedPairs / kSortChunk;
constexpr int kMaxSortedCounts = 4096;  // chunks times experts

struct SortedPairs {
  std::int32_t pairs[kMaxSortedPairs];
  // [chunk][expert]: pairs of each expert in a chunk; then in the chunks before it.
  alignas(16) std::uint16_t counts[kMaxSortedCounts];
};

// Whether a block can sort so many pairs.
inline bool can_sort_pairs(std::int64_t num_pairs, int num_experts) {
  return num_pairs <= kMaxSortedPairs &&
         (num_pairs + kSortChunk - 1) / kSortChunk * num_experts <= kMaxSortedCounts;
}

// Sorts the pairs 0 .. num_pairs - 1 by `ids`, below 0 for no expert, in increasing order within an
// expert, and fills the table with their offsets; all kThreads threads of the block. Returns the
// sorted pairs.
//
// Example, two chunks of 2 pairs instead of 64, ids {1, 0, 1, -1}: expert 1 has one pair in each
// chunk, the second behind 1 pair of the first: pairs {1, 0, 2}, offsets {0, 1, 3}.
template <int kThreads>
__device__ __forceinline__ const std::int32_t* sort_pairs(SortedPairs& sorted, TileTable& table,
                                                          const std::int32_t* ids, int num_pairs,
                                                          int num_experts, int group_size,
                                                          int num_foreseen_experts) {
  constexpr int kWarps = kThreads / 32;
  constexpr int kRounds = (kSortChunks + kWarps - 1) / kWarps;
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int num_chunks = (num_pairs + kSortChunk - 1) / kSortChunk;
  int expert[kRounds][2];  // of this thread's pairs, two of each chunk of its warp
#pragma unroll
  for (int i = 0; i < kRounds; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int pair = (warp + i * kWarps) * kSortChunk + 32 * half + lane;
      expert[i][half] = pair < num_pairs ? ids[pair] : -1;
    }
  }
  const int num_counts = num_chunks * num_experts;
  for (int i = threadIdx.x; i < (num_counts + 7) / 8; i += kThreads) {
    reinterpret_cast<uint4*>(sorted.counts)[i] = make_uint4(0, 0, 0, 0);
  }
  __syncthreads();

  int rank[kRounds][2];  // among the pairs of its expert in the chunk
#pragma unroll
  for (int i = 0; i < kRounds; ++i) {
    const int chunk = warp + i * kWarps;
    if (chunk >= num_chunks) break;
    std::uint16_t* const counts = sorted.counts + chunk * num_experts;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int mine = expert[i][half];
      const std::uint32_t equal = __match_any_sync(0xFFFFFFFF, mine);
      const int number = __popc(equal & ((1u << lane) - 1));
      const int before = mine >= 0 ? counts[mine] : 0;
      rank[i][half] = before + number;
      __syncwarp();
      if (mine >= 0 && number == 0) {
        counts[mine] = static_cast<std::uint16_t>(before + __popc(equal));
      }
      __syncwarp();
    }
  }
  __syncthreads();

  for (int number = threadIdx.x; number < num_experts; number += kThreads) {
    int here[kSortChunks];
#pragma unroll
    for (int chunk = 0; chunk < kSortChunks; ++chunk) {
      here[chunk] = chunk < num_chunks ? sorted.counts[chunk * num_experts + number] : 0;
    }
    int count = 0;
#pragma unroll
    for (int chunk = 0; chunk < kSortChunks; ++chunk) {
      if (chunk < num_chunks) {
        sorted.counts[chunk * num_experts + number] = static_cast<std::uint16_t>(count);
      }
      count += here[chunk];
    }
    table.offsets[number + 1] = count;  // of this expert alone, for now
  }
  __syncthreads();
  if (warp == 0) {
    int before = 0;  // pairs of the experts so far in the upper half, their groups in the lower
    for (int first = 0; first < num_experts; first += 32) {
      const int number = first + lane;
      const int count = number < num_experts ? table.offsets[number + 1] : 0;
      int groups = (count + group_size - 1) / group_size;
      if (number < num_foreseen_experts && groups > 0) --groups;
      const int through = before + inclusive_sum(count << 16 | groups, lane);
      if (number < num_experts) {
        table.offsets[number + 1] = through >> 16;
        table.groups[number + 1] = through & 0xFFFF;
      }
      before = __shfl_sync(0xFFFFFFFF, through, 31);
    }
    if (lane == 0) table.offsets[0] = table.groups[0] = 0;
  }
  __syncthreads();

#pragma unroll
  for (int i = 0; i < kRounds; ++i) {
    const int chunk = warp + i * kWarps;
    if (chunk >= num_chunks) break;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int mine = expert[i][half];
      if (mine < 0) continue;
      const int position =
          table.offsets[mine] + sorted.counts[chunk * num_experts + mine] + rank[i][half];
      sorted.pairs[position] = chunk * kSortChunk + 32 * half + lane;
    }
  }
  __syncthreads();
  return sorted.pairs;
}

}  // namespace moe_engine

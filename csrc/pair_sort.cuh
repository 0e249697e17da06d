// Few pairs, sorted by expert by every block for itself, which is cheaper than a kernel for it.
#pragma once

#include <cstdint>

#include "expert_tiles.cuh"

namespace moe_engine {

constexpr int kMaxSortedPairs = 512;
constexpr int kMaxSortedExperts = 256;
constexpr int kSortChunk = 32;  // pairs that a warp looks at together
constexpr int kSortChunks = kMaxSortedPairs / kSortChunk;

struct SortedPairs {
  std::int32_t pairs[kMaxSortedPairs];
  // Pairs of each expert in a chunk; then in the chunks before it.
  std::uint16_t counts[kSortChunks][kMaxSortedExperts];
};

// Sorts the pairs 0 .. num_pairs - 1 by `ids`, below 0 for no expert, in increasing order within an
// expert, and fills the table with their offsets; all kThreads threads of the block. Returns the
// sorted pairs.
//
// Example, two chunks of 2 pairs instead of 32, ids {1, 0, 1, -1}: expert 1 has one pair in each
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
  int expert[kRounds];  // of this thread's pairs, one of each chunk of its warp
#pragma unroll
  for (int i = 0; i < kRounds; ++i) {
    const int pair = (warp + i * kWarps) * kSortChunk + lane;
    expert[i] = pair < num_pairs ? ids[pair] : -1;
  }
  auto* const words = reinterpret_cast<std::uint32_t*>(sorted.counts);
  for (int i = threadIdx.x; i < num_chunks * kMaxSortedExperts / 2; i += kThreads) words[i] = 0;
  __syncthreads();

  int rank[kRounds];  // among the pairs of its expert in the chunk
#pragma unroll
  for (int i = 0; i < kRounds; ++i) {
    const int chunk = warp + i * kWarps;
    if (chunk >= num_chunks) break;
    const std::uint32_t equal = __match_any_sync(0xFFFFFFFF, expert[i]);
    rank[i] = __popc(equal & ((1u << lane) - 1));
    if (expert[i] >= 0 && rank[i] == 0) {
      sorted.counts[chunk][expert[i]] = static_cast<std::uint16_t>(__popc(equal));
    }
  }
  __syncthreads();

  if (warp == 0) {
    int before = 0;  // pairs of the experts so far in the upper half, their groups in the lower
    for (int first = 0; first < num_experts; first += 32) {
      const int number = first + lane;
      int count = 0;
      if (number < num_experts) {
        int here[kSortChunks];
#pragma unroll
        for (int chunk = 0; chunk < kSortChunks; ++chunk) {
          here[chunk] = chunk < num_chunks ? sorted.counts[chunk][number] : 0;
        }
#pragma unroll
        for (int chunk = 0; chunk < kSortChunks; ++chunk) {
          if (chunk < num_chunks) sorted.counts[chunk][number] = static_cast<std::uint16_t>(count);
          count += here[chunk];
        }
      }
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
    if (chunk >= num_chunks || expert[i] < 0) continue;
    const int position = table.offsets[expert[i]] + sorted.counts[chunk][expert[i]] + rank[i];
    sorted.pairs[position] = chunk * kSortChunk + lane;
  }
  __syncthreads();
  return sorted.pairs;
}

}  // namespace moe_engine

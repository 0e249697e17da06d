// How the warpgroups of a grouped product store what they have made of a tile.
#pragma once

#include "expert_tiles.cuh"
#include "grouped_product.cuh"
#include "hopper.cuh"

namespace moe_engine {

constexpr int kStoredAtOnce = 32;  // pairs

// With the fast division, unlike streaming_experts.cu: here all threads divide, for every element
// of a tile, between two products. Where 1 + exp(-x) passes 2^126 it gives 0; the quotient would be
// 2e-36 at most.
__device__ __forceinline__ float silu(float x) { return __fdividef(x, 1.0f + __expf(-x)); }

// The rows of the output that the pairs of a tile go to: pair 32 * i + lane is number i.
template <typename S>
struct Destinations {
  static constexpr int kCount = (S::kTokens + kStoredAtOnce - 1) / kStoredAtOnce;
  int rows[kCount];

  // Read beside the product before the one that needs them, which hides the time that takes.
  __device__ __forceinline__ void load(const GroupedProduct& p, const TileWalk<S>& tile, int lane) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int pair = tile.first_pair + kStoredAtOnce * i + lane;
      rows[i] = pair;
      if constexpr (!S::kGateUp) {
        rows[i] = kStoredAtOnce * i + lane < tile.num_pairs ? p.pairs[pair] : 0;
      }
    }
  }
};

// Stores what a warpgroup has made of a tile. 32 pairs at a time go through its buffer, transposed,
// so that neighbouring threads store neighbouring pieces of a pair's row. The pieces of a row are
// swizzled to spread them over the banks.
template <typename S>
__device__ __forceinline__ void store(const GroupedProduct& p, const TileWalk<S>& tile,
                                      const float* acc, const Destinations<S>& destinations,
                                      const char* buffer) {
  constexpr int kPieces = S::kPieces;
  constexpr int kMask = kPieces < 8 ? kPieces - 1 : 7;
  const int warpgroup = threadIdx.x / 128;
  const int warp = threadIdx.x / 32 % 4;
  const int lane = threadIdx.x % 32;
  const std::uint32_t row_address = shared_address(buffer) + lane * kPieces * 16;
  const auto transpose = [&](int piece, const std::uint32_t (&packed)[4]) {
    store_transposed_x4(row_address + (piece ^ (lane & kMask)) * 16, packed[0], packed[1],
                        packed[2], packed[3]);
  };
  const int first_element = (tile.row_tile * S::kWarpgroups + warpgroup) * kPieces * 8;
#pragma unroll
  for (int i = 0; i < Destinations<S>::kCount; ++i) {
    constexpr int kPairs = kStoredAtOnce;
    if (kPairs * i >= tile.num_pairs) break;
#pragma unroll
    for (int block = 0; block < S::kBlocks; ++block) {
      std::uint32_t packed[2][4] = {};
#pragma unroll
      for (int j = 0; j < 4 && kPairs * i + 8 * j < S::kTokens; ++j) {
        const float* d = acc + block * (S::kTokens / 2) + (kPairs / 8 * i + j) * 4;
        if constexpr (S::kGateUp) {
          packed[0][j] = pack_bf16(silu(d[0]) * d[2], silu(d[1]) * d[3]);
        } else {
          packed[0][j] = pack_bf16(d[0], d[1]);
          packed[1][j] = pack_bf16(d[2], d[3]);
        }
      }
      if constexpr (S::kGateUp) {
        transpose(4 * block + warp, packed[0]);
      } else {
        transpose(8 * block + 2 * warp, packed[0]);
        transpose(8 * block + 2 * warp + 1, packed[1]);
      }
    }
    sync_warpgroup(warpgroup);
#pragma unroll
    for (int k = 0; k < kPairs * kPieces / 128; ++k) {
      const int index = k * 128 + static_cast<int>(threadIdx.x % 128);
      const int pair = index / kPieces;
      const int piece = index % kPieces;
      const std::int64_t row = __shfl_sync(0xFFFFFFFF, destinations.rows[i], pair);
      const int element = first_element + 8 * piece;
      if (kPairs * i + pair < tile.num_pairs && element < p.out_width) {
        *reinterpret_cast<uint4*>(p.out + row * p.out_width + element) =
            reinterpret_cast<const uint4*>(buffer)[pair * kPieces + (piece ^ (pair & kMask))];
      }
    }
    sync_warpgroup(warpgroup);
  }
}

}  // namespace moe_engine

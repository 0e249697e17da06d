// How the warps of a grouped product store what they have made of a tile.
#pragma once

#include "expert_tiles.cuh"
#include "hopper.cuh"

namespace moe_engine {

constexpr int kStoredAtOnce = 32;  // pairs

// What a grouped product reads and writes.
struct GroupedProduct {
  const std::int32_t* offsets;
  const std::int32_t* pairs;
  const __nv_bfloat16* x;
  std::int64_t x_stride;
  __nv_bfloat16* out;
  int num_experts;
  int top_k;
  int depth;          // K: elements of a row of the weights
  int out_width;      // intermediate or hidden
  int num_row_tiles;  // tiles over the rows of one expert's weight
  int num_foreseen;   // see TileTable
};

__device__ __forceinline__ float silu(float x) { return __fdividef(x, 1.0f + __expf(-x)); }

// The rows of the output that the pairs of a tile go to: pair 32 * i + lane is number i.
template <typename S>
struct Destinations {
  static constexpr int kCount = (S::kTokens + kStoredAtOnce - 1) / kStoredAtOnce;
  int rows[kCount];

  // Read before the product, which hides the time that takes.
  __device__ __forceinline__ void load(const GroupedProduct& p, const TileWalk& tile, int lane) {
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

// Stores what a warp has made of a tile. 32 pairs at a time go through its buffer, transposed, so
// that a thread stores 8 consecutive elements of a pair's row. With 16 of a pair, the two pieces
// trade places every four pairs to spread them over the banks.
template <typename S>
__device__ __forceinline__ void store(const GroupedProduct& p, const TileWalk& tile,
                                      const float* acc, const Destinations<S>& destinations,
                                      const char* buffer) {
  constexpr int kPairs = kStoredAtOnce;
  constexpr int kPieces = S::kPieces;  // of a pair, from a block of 64 rows of the weights
  constexpr int kElements = kPieces * 8;
  constexpr int kBufferBytes = kPairs * kPieces * 16;  // of a block
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const auto place = [](int pair, int piece) {
    return (pair * kPieces + (kPieces == 2 ? piece ^ (pair / 4 % 2) : 0)) * 16;
  };
#pragma unroll
  for (int i = 0; i < Destinations<S>::kCount; ++i) {
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
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
        store_transposed_x4(shared_address(buffer) + block * kBufferBytes + place(lane, piece),
                            packed[piece][0], packed[piece][1], packed[piece][2], packed[piece][3]);
      }
    }
    __syncwarp();
#pragma unroll
    for (int block = 0; block < S::kBlocks; ++block) {
      const int first_element =
          (((tile.row_tile * S::kWarpgroups + warp / 4) * S::kBlocks + block) * 4 + warp % 4) *
          kElements;
#pragma unroll
      for (int k = 0; k < kPieces; ++k) {
        const int pair = (32 * k + lane) / kPieces;
        const int piece = lane % kPieces;
        const std::int64_t row = __shfl_sync(0xFFFFFFFF, destinations.rows[i], pair);
        const int element = first_element + 8 * piece;
        if (kPairs * i + pair < tile.num_pairs && element < p.out_width) {
          *reinterpret_cast<uint4*>(p.out + row * p.out_width + element) =
              *reinterpret_cast<const uint4*>(buffer + block * kBufferBytes + place(pair, piece));
        }
      }
    }
    __syncwarp();
  }
}

}  // namespace moe_engine

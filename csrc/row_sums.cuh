// Weighted sums of a few long rows, which the copy engine brings through shared memory: a warp has
// more of them on their way than its registers could hold.
#pragma once

#include <cstdint>

#include "element.cuh"
#include "hopper.cuh"

namespace moe_engine {

// The sums of 16 bytes' elements.
template <typename T>
struct Sums {
  static constexpr int kPerWord = 4 / sizeof(T);
  float values[4 * kPerWord] = {};

  __device__ __forceinline__ void add(const uint4& piece, float factor) {
    add_scaled<T>(&values[0], piece.x, factor);
    add_scaled<T>(&values[kPerWord], piece.y, factor);
    add_scaled<T>(&values[2 * kPerWord], piece.z, factor);
    add_scaled<T>(&values[3 * kPerWord], piece.w, factor);
  }

  __device__ __forceinline__ uint4 packed() const {
    return make_uint4(pack<T>(&values[0]), pack<T>(&values[kPerWord]),
                      pack<T>(&values[2 * kPerWord]), pack<T>(&values[3 * kPerWord]));
  }
};

// Of one warp. A stage is a piece of some rows, as many as are left.
struct RowStages {
  static constexpr int kStages = 3;
  static constexpr int kRows = 4;
  static constexpr int kPieceBytes = 1024;
  alignas(128) char pieces[kStages][kRows][kPieceBytes];
  std::uint64_t loaded[kStages];  // barriers
};

// Adds up rows; by a warp that has its RowStages to itself, of which one lane has initialised the
// barriers for 1 arrival.
class RowAdder {
 public:
  explicit __device__ __forceinline__ RowAdder(RowStages& stages) : stages_(stages) {}

  // Writes to `to` the sum of the rows, scaled, in float32 and rounded to T once: bytes
  // [first, end) of each, multiples of 16. Row r begins at from + r * row_bytes. `rows` says which
  // they are: rows.more(), whether there is one more, and rows.next(factor), that one and its
  // factor, both by the whole warp.
  //
  // Example: rows 0 and 2 with factors 1 and 0.5, of which row 2 is 4 everywhere: row 0 plus 2.
  template <typename T, typename Rows>
  __device__ __forceinline__ void add_up(const char* from, int row_bytes, const Rows& rows,
                                         int first, int end, char* to) {
    constexpr int kPerLane = RowStages::kPieceBytes / (16 * 32);
    const int lane = threadIdx.x % 32;
    Rows ahead = rows;
    int piece_ahead = first;
    const auto load = [&] {
      if (piece_ahead >= end || !ahead.more()) return;
      const int num_bytes = min(RowStages::kPieceBytes, end - piece_ahead);
      int offsets[RowStages::kRows];
      int num_rows = 0;
#pragma unroll
      for (int n = 0; n < RowStages::kRows; ++n) {
        if (!ahead.more()) break;
        float factor;
        offsets[n] = ahead.next(factor);
        ++num_rows;
      }
      if (lane == 0) {
        std::uint64_t* const barrier = &stages_.loaded[load_at_.stage];
        barrier_arrive_expecting(barrier, num_rows * num_bytes);
#pragma unroll
        for (int n = 0; n < RowStages::kRows; ++n) {
          if (n >= num_rows) break;
          copy_row(shared_address(stages_.pieces[load_at_.stage][n]),
                   from + std::int64_t{offsets[n]} * row_bytes + piece_ahead, num_bytes, barrier);
        }
      }
      load_at_.advance();
      if (!ahead.more()) {
        ahead = rows;
        piece_ahead += RowStages::kPieceBytes;
      }
    };
    for (int i = 0; i < RowStages::kStages - 1; ++i) load();
    for (int piece = first; piece < end; piece += RowStages::kPieceBytes) {
      Sums<T> sums[kPerLane];
      Rows rest = rows;
      while (rest.more()) {
        load();
        barrier_wait(&stages_.loaded[add_at_.stage], add_at_.parity);
#pragma unroll
        for (int n = 0; n < RowStages::kRows; ++n) {
          if (!rest.more()) break;
          float factor;
          rest.next(factor);
          const auto* const row = reinterpret_cast<const uint4*>(stages_.pieces[add_at_.stage][n]);
#pragma unroll
          for (int i = 0; i < kPerLane; ++i) sums[i].add(row[32 * i + lane], factor);
        }
        add_at_.advance();
        __syncwarp();  // all have read the stage that is loaded next
      }
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        const int at = piece + (32 * i + lane) * 16;
        if (at < end) *reinterpret_cast<uint4*>(to + at) = sums[i].packed();
      }
    }
  }

 private:
  RowStages& stages_;
  RingPosition<RowStages::kStages> load_at_;
  RingPosition<RowStages::kStages> add_at_;
};

}  // namespace moe_engine

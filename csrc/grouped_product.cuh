// The arguments of a grouped product's kernel.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

namespace moe_engine {

// What a grouped product reads and writes.
struct GroupedProduct {
  const std::int32_t* expert_ids;  // null: the pairs are sorted
  const std::int32_t* offsets;
  const std::int32_t* pairs;  // in shared memory, once a block has sorted them
  const __nv_bfloat16* x;
  std::int64_t x_stride;
  __nv_bfloat16* out;
  std::int64_t num_pairs;
  int num_experts;
  int top_k;
  int depth;                // K: elements of a row of the weights
  int out_width;            // intermediate or hidden
  int num_row_tiles;        // tiles over the rows of one expert's weight
  int num_foreseen;         // see TileTable
  std::int32_t* num_dealt;  // see TileDealer
};

}  // namespace moe_engine

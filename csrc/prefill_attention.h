// Causal attention of sequences that compute many positions at once, over the paged KV cache.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace moe_engine {

constexpr int kPrefillRows = 128;  // of a tile: tokens times query heads

// Rows of the queries that are the last positions of a sequence's context.
struct alignas(16) PrefillSpan {
  std::int32_t first_row;
  std::int32_t query_len;
  std::int32_t context_len;  // with the rows themselves, which are in the cache
  std::int32_t table_row;
};

struct PrefillAttentionArgs {
  const void* q;          // bfloat16 [num_rows, num_heads, 128], rows aligned to 16 bytes
  std::int64_t q_stride;  // elements from row to row
  // Null: the queries are normed and rotated already. Else they are normed with this weight,
  // bfloat16 [128], and rotated by their positions in their contexts.
  const void* q_weight;
  const float* cos;                  // [positions, 64], aligned to 16 bytes
  const float* sin;                  // as cos
  const void* k_cache;               // bfloat16 [num_slots, num_kv_heads, 128], aligned to 16 bytes
  const void* v_cache;               // as k_cache
  const std::int32_t* block_tables;  // [..., ...], on the device
  std::int64_t block_tables_stride;
  void* out;  // bfloat16 [num_rows, num_heads, 128]
  // On the device, complete before the kernel that precedes this one starts, or written by a
  // transfer behind it: the spans, and their tiles in the order in which blocks take them, those
  // with the longest context first: number of the span << 16 | number of its tile, below 1 << 16. A
  // tile is kPrefillRows / heads tokens, of which it has `heads` query heads of a KV head: the
  // greatest common divisor of 8 and the number there are.
  const PrefillSpan* spans;
  const std::uint32_t* tiles;
  const std::int32_t* num_tiles;
  std::int64_t num_rows;
  std::int64_t num_slots;  // a multiple of block_size
  float scale;             // of the scores
  float eps;               // of the norm
  int max_tiles;           // *num_tiles is at most that
  int num_heads;
  int num_kv_heads;
  int block_size;
};

// Attends to the spans' contexts and writes their rows of out. Cache entries outside the contexts
// are not used. A row's bits do not depend on other rows of finite keys and values. Enqueues one
// kernel on `stream` and returns. Throws std::invalid_argument for sizes that do not fit.
void prefill_attention(const PrefillAttentionArgs& args, cudaStream_t stream);

// Whether the kernel takes these sizes.
bool prefill_attention_fits(int num_heads, int num_kv_heads, int head_dim, int block_size);

}  // namespace moe_engine

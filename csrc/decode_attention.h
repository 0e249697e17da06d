// What the kernels of decode attention from the fused projection on, warp_decode.h and
// block_decode.h, have in common.
#pragma once

#include <cstdint>

namespace moe_engine {

constexpr int kDim = 128;      // of a head
constexpr int kPiece = 16;     // tokens that a warp takes at a time
constexpr int kMaxGroup = 16;  // query heads of a KV head

// For each sequence: norms and rotates the queries and the key of its new token, writes the key and
// the value to their slot, which is the last position of the context, and attends to the context.
// A context of 0 gives zeros. No sequence may have another's slot in its context. The bits of a
// sequence's output depend on the launch, but not on the other sequences. Everything but positions,
// slots, block tables and contexts is aligned to 16 bytes. Enqueues one kernel on a stream and
// returns; a CUDA graph can capture it. It reads positions, slots, block tables, contexts and what
// is cached of earlier tokens before the kernel before it has ended.
struct DecodeAttentionArgs {
  // The projection, X = (num_heads + 2 * num_kv_heads) * 128 elements a row: bfloat16
  // [num_sequences, X] if num_parts is 0, else the sum, in order and rounded to bfloat16, of
  // float32 [num_parts, num_sequences, X].
  const void* qkv;
  std::int64_t qkv_stride;       // elements between rows, a multiple of 8
  std::int64_t qkv_part_stride;  // elements between parts, a multiple of 4
  int num_parts;
  const void* q_weight;              // bfloat16 [128], of the norm of query heads
  const void* k_weight;              // bfloat16 [128], of the norm of key heads
  const float* cos;                  // [positions, 64]
  const float* sin;                  // [positions, 64]
  const std::int64_t* positions;     // [num_sequences]
  const std::int64_t* slots;         // [num_sequences]; -1: not cached
  void* k_cache;                     // bfloat16 [blocks, block_size, num_kv_heads, 128]
  void* v_cache;                     // as k_cache
  const std::int32_t* block_tables;  // [num_sequences, ...]
  std::int64_t block_tables_stride;
  const std::int32_t* context_lens;  // [num_sequences], the new token counted; 0: no sequence
  void* out;                         // bfloat16 [num_sequences, num_heads, 128]
  float eps;                         // of the norms
  float scale;                       // of the scores
  int num_sequences;
  int num_heads;
  int num_kv_heads;
  int block_size;
  // A context is cut into shares, each with thread blocks of its own: at most max_shares, and so
  // that each has min_tokens or more.
  int max_shares;
  int min_tokens;
  float* parts;            // scratch [num_sequences, num_heads, max_shares, 128]
  float* stats;            // scratch [num_sequences, num_heads, max_shares, 2]
  std::int32_t* arrivals;  // [num_sequences, num_heads], zero before and after
};

// Whether the kernels take these sizes.
inline bool decode_attention_fits(int num_heads, int num_kv_heads, int head_dim, int block_size) {
  return head_dim == kDim && num_heads % num_kv_heads == 0 &&
         num_heads / num_kv_heads <= kMaxGroup && block_size % kPiece == 0;
}

}  // namespace moe_engine

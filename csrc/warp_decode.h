// Decode attention from the fused projection on.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace moe_engine {

struct WarpDecodeArgs {
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
  // A long context is cut into shares, at most so many, each with thread blocks of its own.
  int max_shares;
  float* parts;            // scratch [num_sequences, num_heads, max_shares, 128]
  float* stats;            // scratch [num_sequences, num_heads, max_shares, 2]
  std::int32_t* arrivals;  // [num_sequences, num_heads], zero before and after
};

// Whether the kernel takes these sizes.
bool warp_decode_fits(int num_heads, int num_kv_heads, int head_dim, int block_size);

// For each sequence: norms and rotates the queries and the key of its new token, writes the key and
// the value to their slot, which is the last position of the context, and attends to the context.
// A context of 0 gives zeros. No sequence may have another's slot in its context. The bits of a
// sequence's output depend on max_shares, but not on the others. Everything but positions, slots,
// block tables and contexts is aligned to 16 bytes. Enqueues one kernel on `stream` and returns; a
// CUDA graph can capture it. It reads positions, slots, block tables, contexts and what is cached
// of earlier tokens before the kernel before it has ended. Throws std::invalid_argument for other
// sizes.
void warp_decode(const WarpDecodeArgs& args, cudaStream_t stream);

}  // namespace moe_engine

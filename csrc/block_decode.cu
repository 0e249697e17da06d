// Decode attention whose warps read ahead into shared memory.
//
// A thread block, or several where the context is long or sequences are few, takes one KV head of a
// sequence. Its warps share out the context in pieces of 16 tokens, and each has the next pieces on
// their way to a ring of slots of its own: the first before the projection that makes the queries
// has ended. Warps wait for each other only for the queries and to add up what they found.
#include "block_decode.h"
#include "context_pieces.cuh"
#include "decode_problem.cuh"
#include "hopper.cuh"
#include "launch.cuh"

namespace moe_engine {
namespace {

constexpr int kSlots = 2;     // of a warp
constexpr int kSmWarps = 12;  // of a multiprocessor, whose shared memory their slots fill
constexpr int kPendingGroups = 2 * kSlots - 1;  // of copies: of the keys or the values of a piece

// A warp's slots, and in their place, once it has attended to the last of them, what it has found.
template <int kHeadTiles>
union WarpMemory {
  Slot slots[kSlots];
  WarpParts<kHeadTiles> found;
};

template <int kHeadTiles, int kWarps>
struct Shared {
  WarpMemory<kHeadTiles> warps[kWarps];
  __nv_bfloat16 queries[8 * kHeadTiles][kQueryPitch];
  __nv_bfloat16 fresh[2][kDim];  // the new token's key and value
};

// Grid: (num_kv_heads, most shares, num_sequences). A context is cut into shares, one for each
// block, piece by piece in turn; blocks without a share end at once, while others, started before
// and after them, keep the memory busy.
//
// Example: a context of 100 tokens is 7 pieces, of which the first of 6 warps takes pieces 0 and 6,
// the last piece's 4 tokens being 3 from the cache and the new one, from the block's shared memory.
// Where a context of 640 tokens, 40 pieces, is two shares, warp 1 of the second takes pieces 3, 15,
// 27 and 39: the first two before it has the queries, each next one once it has a slot for it.
template <int kHeadTiles, int kWarps>
__global__ void __launch_bounds__(32 * kWarps, kSmWarps / kWarps)
    block_decode_kernel(const Problem p) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  constexpr int kHeads = 8 * kHeadTiles;
  static_assert(32 * kWarps >= 8 * (kHeads + 2));
  extern __shared__ __align__(16) char shared_bytes[];
  auto& shared = *reinterpret_cast<Shared<kHeadTiles, kWarps>*>(shared_bytes);
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int kv_head = blockIdx.x;
  const int share = blockIdx.y;
  const int sequence = blockIdx.z;
  const int group = p.num_heads / p.num_kv_heads;

  const int context_len = p.context_lens[sequence];
  const int num_pieces = (context_len + kPiece - 1) / kPiece;
  const int num_shares = p.num_shares(num_pieces);
  // Without waiting: those of the first share do, so the launch still ends after those before.
  if (share >= num_shares) return;
  let_next_kernel_start();
  const Context context = p.context(sequence, kv_head, context_len);
  // This warp's pieces, number `first_piece` and every `stride`-th: lane i knows the block of one.
  const int stride = num_shares * kWarps;
  const int first_piece = share + num_shares * warp;
  int block = context.block(first_piece + lane * stride);
  int owner = 0;  // the lane that knows the block of the piece asked for next
  const auto next_vector = [&](int number) {
    if (owner == 32) {
      owner = 0;
      block = context.block(number + lane * stride);
    }
    return context.vector(__shfl_sync(0xFFFFFFFF, block, owner++), number);
  };
  WarpMemory<kHeadTiles>& memory = shared.warps[warp];
#pragma unroll
  for (int i = 0; i < kSlots; ++i) {
    const int number = first_piece + i * stride;
    const std::int64_t vector = next_vector(number);
    const bool exists = number < num_pieces;
    if (exists) context.copy_keys(p.k_cache, vector, number, lane, memory.slots[i]);
    commit_copies();
    if (exists) context.copy_values(p.v_cache, vector, number, lane, memory.slots[i]);
    commit_copies();
  }

  const bool has_new = context_len > 0 && (num_pieces - 1) % num_shares == share;
  prepare_heads(p, sequence, kv_head, has_new, shared.queries, shared.fresh);
  __syncthreads();

  auto found = Found<kHeadTiles>::nothing();
  Piece piece;
  int i = 0;
  for (int number = first_piece; number < num_pieces; number += stride) {
    Slot& slot = memory.slots[i];
    i = (i + 1) % kSlots;
    const int next = number + kSlots * stride;
    const std::int64_t vector = next_vector(next);
    const int num_tokens = context_len - number * kPiece;
    wait_for_copies<kPendingGroups>();
    slot.load_keys(lane, piece.k);
    if (num_tokens <= kPiece) insert_key(piece.k, shared.fresh[0], num_tokens - 1, lane);
    // What a product has taken has left the slot, which the next keys or values may fill.
    attend(found, piece, shared.queries, num_tokens, p.scale_log2, lane, [&] {
      if (next < num_pieces) context.copy_keys(p.k_cache, vector, next, lane, slot);
      commit_copies();
      wait_for_copies<kPendingGroups>();
      slot.load_values(lane, piece.v);
      if (num_tokens <= kPiece) insert_value(piece.v, shared.fresh[1], num_tokens - 1, lane);
    });
    if (next < num_pieces) context.copy_values(p.v_cache, vector, next, lane, slot);
    commit_copies();
  }

  __syncwarp();  // all lanes have read the slots
  memory.found.store(found, lane);
  __syncthreads();
  for (int query = warp; query < group; query += kWarps) {
    float4 sum;
    const Stats stats = fold(
        kWarps, sum, [&](int j) { return shared.warps[j].found.stats[query]; },
        [&](int j) {
          return reinterpret_cast<const float4*>(shared.warps[j].found.parts[query])[lane];
        });
    const int head = sequence * p.num_heads + kv_head * group + query;
    store_share(p, head, share, num_shares, lane, stats, sum);
  }
#endif
}

template <int kHeadTiles, int kWarps>
void launch(const Problem& p, int num_sequences, cudaStream_t stream) {
  constexpr int kSharedBytes = sizeof(Shared<kHeadTiles, kWarps>);
  CHECK_CUDA(cudaFuncSetAttribute(block_decode_kernel<kHeadTiles, kWarps>,
                                  cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
  launch_dependent("block_decode_kernel", block_decode_kernel<kHeadTiles, kWarps>,
                   dim3(p.num_kv_heads, p.max_shares, num_sequences), 32 * kWarps, kSharedBytes,
                   stream, 1, p);
}

template <int kWarps>
void launch_blocks(const Problem& p, int num_sequences, cudaStream_t stream) {
  if (p.num_heads / p.num_kv_heads <= 8) {
    launch<1, kWarps>(p, num_sequences, stream);
  } else {
    launch<2, kWarps>(p, num_sequences, stream);
  }
}

}  // namespace

void block_decode(const DecodeAttentionArgs& args, int num_warps, cudaStream_t stream) {
  if (args.num_sequences == 0) return;
  const Problem p = make_problem(args);
  if (num_warps == 12) {
    launch_blocks<12>(p, args.num_sequences, stream);
  } else if (num_warps == 6) {
    launch_blocks<6>(p, args.num_sequences, stream);
  } else {
    throw std::invalid_argument("thread blocks have 6 or 12 warps, not " +
                                std::to_string(num_warps));
  }
}

}  // namespace moe_engine

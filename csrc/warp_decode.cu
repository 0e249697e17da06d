// Decode attention whose warps read the cache straight into registers.
//
// A cluster of blocks, or several where the context is long, takes one KV head of a sequence. Its
// warps share out the context in pieces of 16 tokens. The first piece of every warp is on its way
// before the projection that makes the queries has ended. Each block adds up what its warps found
// and sends every query head's part to the block that puts the head together; blocks wait for each
// other only there.
#include "context_pieces.cuh"
#include "decode_problem.cuh"
#include "hopper.cuh"
#include "launch.cuh"
#include "warp_decode.h"

namespace moe_engine {
namespace {

constexpr int kBlocks = 8;  // of a cluster
constexpr int kWarps = 8;   // of a block
constexpr int kThreads = 32 * kWarps;
constexpr int kClusterWarps = kBlocks * kWarps;

// Of the query heads, block r puts together number r and, if there are so many, number r + kBlocks.
template <int kHeadTiles>
struct Shared {
  static constexpr int kHeads = 8 * kHeadTiles;
  __nv_bfloat16 queries[kHeads][kQueryPitch];
  __nv_bfloat16 fresh[2][kDim];  // the new token's key and value
  WarpParts<kHeadTiles> warps[kWarps];
  float received[kBlocks][kHeadTiles][kDim];  // from each block
  Stats received_stats[kBlocks][kHeadTiles];
};

// Grid: (kBlocks * num_kv_heads, num_sequences, most shares), clusters of kBlocks. A context is cut
// into shares, one for each cluster; clusters without a share end at once.
//
// Example: a context of 100 tokens is 7 pieces, one for the first warp of 7 of the blocks; the last
// piece's 4 tokens are 3 from the cache and the new one, from the block's shared memory. Of a
// context of 2000 tokens, 125 pieces, warp 1 of block 0 takes pieces 8 and 72; where 5000 tokens,
// 313 pieces, are two shares, warp 1 of block 0 of the second takes pieces 72 and 200.
template <int kHeadTiles>
__global__ void __launch_bounds__(kThreads, kHeadTiles == 1 ? 2 : 1)
    warp_decode_kernel(const Problem p) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  constexpr int kHeads = 8 * kHeadTiles;
  static_assert(kThreads >= 8 * (kHeads + 2));
  extern __shared__ __align__(16) char shared_bytes[];
  auto& shared = *reinterpret_cast<Shared<kHeadTiles>*>(shared_bytes);
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int rank = block_in_cluster();
  const int kv_head = blockIdx.x / kBlocks;
  const int sequence = blockIdx.y;
  const int group = p.num_heads / p.num_kv_heads;

  const int context_len = p.context_lens[sequence];
  const int num_pieces = (context_len + kPiece - 1) / kPiece;
  const int num_shares = p.num_shares(num_pieces);
  const int share = blockIdx.z;
  // Without waiting: those of the first share do, so the launch still ends after those before.
  if (share >= num_shares) return;
  let_next_kernel_start();
  cluster_arrive();
  const Context context = p.context(sequence, kv_head, context_len);
  // This warp's pieces, number `first_piece` and every `stride`-th: lane i knows the block of one.
  const int stride = num_shares * kClusterWarps;
  const int first_piece = share * kClusterWarps + rank + kBlocks * warp;
  int block = context.block(first_piece + lane * stride);
  const auto vector_of = [&](int number, int owner) {
    return context.vector(__shfl_sync(0xFFFFFFFF, block, owner), number);
  };
  Piece piece;
  const std::int64_t first_vector = vector_of(first_piece, 0);
  context.load_keys(p.k_cache, first_vector, first_piece, lane, piece.k);
  context.load_values(p.v_cache, first_vector, first_piece, lane, piece.v);

  const int last_piece = (num_pieces - 1) % stride;
  const bool has_new =
      context_len > 0 && last_piece / kClusterWarps == share && last_piece % kBlocks == rank;
  prepare_heads(p, sequence, kv_head, has_new, shared.queries, shared.fresh);
  __syncthreads();

  auto found = Found<kHeadTiles>::nothing();
  int owner = 0;  // the lane that knows the next piece's block
  for (int number = first_piece; number < num_pieces; number += stride) {
    const int next = number + stride;
    owner = (owner + 1) % 32;
    if (owner == 0) block = context.block(next + lane * stride);
    const std::int64_t next_vector = vector_of(next, owner);
    const int num_tokens = context_len - number * kPiece;
    if (num_tokens <= kPiece) {
      insert_key(piece.k, shared.fresh[0], num_tokens - 1, lane);
      insert_value(piece.v, shared.fresh[1], num_tokens - 1, lane);
    }
    attend(found, piece, shared.queries, num_tokens, p.scale_log2, lane, [&] {
      if (next < num_pieces) context.load_keys(p.k_cache, next_vector, next, lane, piece.k);
    });
    if (next < num_pieces) context.load_values(p.v_cache, next_vector, next, lane, piece.v);
  }

  shared.warps[warp].store(found, lane);
  __syncthreads();

  // The others have begun: their shared memory may be written to.
  cluster_wait();
  for (int query = warp; query < kHeads; query += kWarps) {
    float4 sum;
    const Stats stats = fold(
        kWarps, sum, [&](int i) { return shared.warps[i].stats[query]; },
        [&](int i) { return reinterpret_cast<const float4*>(shared.warps[i].parts[query])[lane]; });
    const int target = query % kBlocks;
    store_to_block(&shared.received[rank][query / kBlocks][4 * lane], target, sum);
    if (lane == 0) {
      Stats& to = shared.received_stats[rank][query / kBlocks];
      store_to_block(&to.max, target, stats.max);
      store_to_block(&to.sum, target, stats.sum);
    }
  }
  __syncwarp();
  cluster_sync();
  const int query = kBlocks * warp + rank;
  if (warp < kHeadTiles && query < group) {
    float4 sum;
    const Stats stats = fold(
        kBlocks, sum, [&](int i) { return shared.received_stats[i][warp]; },
        [&](int i) { return reinterpret_cast<const float4*>(shared.received[i][warp])[lane]; });
    const int head = sequence * p.num_heads + kv_head * group + query;
    store_share(p, head, share, num_shares, lane, stats, sum);
  }
#endif
}

template <int kHeadTiles>
void launch(const Problem& p, int num_sequences, cudaStream_t stream) {
  constexpr int kSharedBytes = sizeof(Shared<kHeadTiles>);
  CHECK_CUDA(cudaFuncSetAttribute(warp_decode_kernel<kHeadTiles>,
                                  cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
  launch_dependent("warp_decode_kernel", warp_decode_kernel<kHeadTiles>,
                   dim3(kBlocks * p.num_kv_heads, num_sequences, p.max_shares), kThreads,
                   kSharedBytes, stream, kBlocks, p);
}

}  // namespace

void warp_decode(const DecodeAttentionArgs& args, cudaStream_t stream) {
  if (args.num_sequences == 0) return;
  const Problem p = make_problem(args);
  if (args.num_heads / args.num_kv_heads <= 8) {
    launch<1>(p, args.num_sequences, stream);
  } else {
    launch<2>(p, args.num_sequences, stream);
  }
}

}  // namespace moe_engine

// Decode attention whose warps read the cache straight into registers.
//
// A cluster of blocks, or several where the context is long, takes one KV head of a sequence. Its
// warps share out the context in pieces of 16 tokens. The first piece of every warp is on its way
// before the projection that makes the queries has ended. Each block adds up what its warps found
// and sends every query head's part to the block that puts the head together; blocks wait for each
// other only there.
#include <cuda_bf16.h>

#include <stdexcept>
#include <string>

#include "context_pieces.cuh"
#include "hopper.cuh"
#include "launch.cuh"
#include "prepared_head.cuh"
#include "warp_decode.h"

namespace moe_engine {
namespace {

constexpr int kPartPitch = kDim + 4;  // floats
constexpr int kBlocks = 8;            // of a cluster
constexpr int kWarps = 8;             // of a block
constexpr int kThreads = 32 * kWarps;
constexpr int kClusterWarps = kBlocks * kWarps;
constexpr int kPiecesPerWarp = 2;  // at least, where clusters share a context
constexpr float kLog2E = 1.4426950408889634f;

struct Problem {
  const void* qkv;
  std::int64_t qkv_stride;
  std::int64_t qkv_part_stride;
  int num_parts;
  const __nv_bfloat16* q_weight;
  const __nv_bfloat16* k_weight;
  const float* cos;
  const float* sin;
  const std::int64_t* positions;
  const std::int64_t* slots;
  __nv_bfloat16* k_cache;
  __nv_bfloat16* v_cache;
  const std::int32_t* block_tables;
  std::int64_t block_tables_stride;
  const std::int32_t* context_lens;
  __nv_bfloat16* out;
  float* parts;            // [num_sequences, num_heads, most shares, kDim]
  Stats* stats;            // [num_sequences, num_heads, most shares]
  std::int32_t* arrivals;  // [num_sequences, num_heads]
  float eps;
  float scale_log2;  // of the scores, whose exponentials are powers of 2
  int num_heads;
  int num_kv_heads;
  int block_size;
};

// Of the query heads, block r puts together number r and, if there are so many, number r + kBlocks.
template <int kHeadTiles>
struct Shared {
  static constexpr int kHeads = 8 * kHeadTiles;
  __nv_bfloat16 queries[kHeads][kQueryPitch];
  __nv_bfloat16 fresh[2][kDim];             // the new token's key and value
  float parts[kWarps][kHeads][kPartPitch];  // of each warp: sums of values, not divided
  Stats stats[kWarps][kHeads];
  float received[kBlocks][kHeadTiles][kDim];  // from each block
  Stats received_stats[kBlocks][kHeadTiles];
};

// Head `number` of a sequence's row of the projection, by eight threads.
__device__ __forceinline__ Head load_head(const Problem& p, int sequence, int number, int part) {
  const std::int64_t first = sequence * p.qkv_stride + number * kDim + 8 * part;
  if (p.num_parts == 0) {
    const auto* const from =
        reinterpret_cast<const uint4*>(static_cast<const __nv_bfloat16*>(p.qkv) + first);
    return {from[0], from[8]};
  }
  float4 sums[4] = {};
#pragma unroll 2
  for (int i = 0; i < p.num_parts; ++i) {
    const auto* const from = reinterpret_cast<const float4*>(static_cast<const float*>(p.qkv) +
                                                             i * p.qkv_part_stride + first);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float4 more = from[j % 2 + j / 2 * (kHalf / 4)];
      sums[j].x += more.x;
      sums[j].y += more.y;
      sums[j].z += more.z;
      sums[j].w += more.w;
    }
  }
  std::uint32_t packed[8];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    packed[2 * j] = pack_bf16(sums[j].x, sums[j].y);
    packed[2 * j + 1] = pack_bf16(sums[j].z, sums[j].w);
  }
  return {make_uint4(packed[0], packed[1], packed[2], packed[3]),
          make_uint4(packed[4], packed[5], packed[6], packed[7])};
}

// Puts the parts of one head together, in order: four dimensions for each thread of a warp.
template <typename LoadStats, typename LoadPart>
__device__ __forceinline__ Stats fold(int count, float4& sum, LoadStats load_stats,
                                      LoadPart load_part) {
  Stats all{-INFINITY, 0.0f};
#pragma unroll 8
  for (int i = 0; i < count; ++i) all.max = fmaxf(all.max, load_stats(i).max);
  sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 8
  for (int i = 0; i < count; ++i) {
    const float4 part = load_part(i);
    const Stats stats = load_stats(i);
    const float scale = stats.max == -INFINITY ? 0.0f : exp2f(stats.max - all.max);
    all.sum = fmaf(stats.sum, scale, all.sum);
    sum.x = fmaf(part.x, scale, sum.x);
    sum.y = fmaf(part.y, scale, sum.y);
    sum.z = fmaf(part.z, scale, sum.z);
    sum.w = fmaf(part.w, scale, sum.w);
  }
  return all;
}

// Grid: (kBlocks * num_kv_heads, num_sequences, most shares), clusters of kBlocks. A context is cut
// into as many shares, one for each cluster, as give a warp kPiecesPerWarp pieces or more; clusters
// without a share end at once. The last that arrives puts the shares' parts of a head together.
//
// Example: a context of 100 tokens is 7 pieces, one for the first warp of 7 of the blocks; the last
// piece's 4 tokens are 3 from the cache and the new one, from the block's shared memory. Of a
// context of 2000 tokens, 125 pieces, warp 1 of block 0 takes pieces 8 and 72; 5000 tokens, 313
// pieces, are two shares, and warp 1 of block 0 of the second takes pieces 72 and 200.
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
  const int num_shares =
      max(1, min(static_cast<int>(gridDim.z), num_pieces / (kClusterWarps * kPiecesPerWarp)));
  const int share = blockIdx.z;
  // Without waiting: those of the first share do, so the launch still ends after those before.
  if (share >= num_shares) return;
  let_next_kernel_start();
  cluster_arrive();
  const Context context{p.block_tables + sequence * p.block_tables_stride, p.block_size,
                        p.num_kv_heads * kVectors, kv_head * kVectors, context_len - 1};
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

  // Eight threads prepare a head: a query, or, in the block that has the context's end, the new
  // key or value.
  const int row = threadIdx.x / 8;
  const int part = threadIdx.x % 8;
  const bool is_key = row == kHeads;
  const bool is_value = row == kHeads + 1;
  const int last_piece = (num_pieces - 1) % stride;
  const bool is_new = (is_key || is_value) && context_len > 0 &&
                      last_piece / kClusterWarps == share && last_piece % kBlocks == rank;
  const bool is_query = row < group;
  const std::int64_t slot = p.slots[sequence];
  const std::int64_t angle = p.positions[sequence] * kHalf + 8 * part;
  wait_for_previous_kernels();

  Head head{};
  if (is_query || is_new) {
    const int number =
        is_query ? kv_head * group + row : p.num_heads + (is_key ? 0 : p.num_kv_heads) + kv_head;
    head = load_head(p, sequence, number, part);
  }
  // Asked for only now, for want of registers.
  const auto* const norm_weight =
      reinterpret_cast<const uint4*>(is_key ? p.k_weight : p.q_weight) + part;
  const Head weight{norm_weight[0], norm_weight[8]};
  float cos[8];
  float sin[8];
#pragma unroll
  for (int i = 0; i < 8; i += 4) {
    *reinterpret_cast<float4*>(cos + i) = *reinterpret_cast<const float4*>(p.cos + angle + i);
    *reinterpret_cast<float4*>(sin + i) = *reinterpret_cast<const float4*>(p.sin + angle + i);
  }
  const Head rotated = norm_and_rotate(head, weight, cos, sin, p.eps);
  if (!is_value) head = rotated;
  if (row < kHeads) {
    auto* const to = reinterpret_cast<uint4*>(shared.queries[row]) + part;
    to[0] = head.first;
    to[8] = head.second;
  } else if (is_new) {
    auto* const to = reinterpret_cast<uint4*>(shared.fresh[is_value]) + part;
    to[0] = head.first;
    to[8] = head.second;
    if (slot >= 0) {
      auto* const cached = reinterpret_cast<uint4*>(is_value ? p.v_cache : p.k_cache) +
                           (slot * p.num_kv_heads + kv_head) * kVectors + part;
      cached[0] = head.first;
      cached[8] = head.second;
    }
  }
  __syncthreads();

  Found<kHeadTiles> found{};
#pragma unroll
  for (int i = 0; i < kHeadTiles; ++i) found.stats[i][0].max = found.stats[i][1].max = -INFINITY;
  int owner = 0;  // the lane that knows the next piece's block
  for (int number = first_piece; number < num_pieces; number += stride) {
    const int next = number + stride;
    owner = (owner + 1) % 32;
    if (owner == 0) block = context.block(next + lane * stride);
    const std::int64_t next_vector = vector_of(next, owner);
    const int num_tokens = context_len - number * kPiece;
    if (num_tokens <= kPiece) insert(piece, shared.fresh, num_tokens - 1, lane);
    attend(found, piece, shared.queries, num_tokens, p.scale_log2, lane, [&] {
      if (next < num_pieces) context.load_keys(p.k_cache, next_vector, next, lane, piece.k);
    });
    if (next < num_pieces) context.load_values(p.v_cache, next_vector, next, lane, piece.v);
  }

#pragma unroll
  for (int tile = 0; tile < kHeadTiles; ++tile) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      Stats stats = found.stats[tile][j];
#pragma unroll
      for (int distance = 4; distance < 32; distance *= 2) {
        stats.sum += __shfl_xor_sync(0xFFFFFFFF, stats.sum, distance);
      }
      const int query = 8 * tile + 2 * (lane % 4) + j;
      if (lane < 4) shared.stats[warp][query] = stats;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        auto* const to =
            reinterpret_cast<float4*>(shared.parts[warp][query] + kHalf * half) + 2 * (lane / 4);
        const auto& acc = found.acc[tile];
        const int i = 2 * half + j;
        to[0] = make_float4(acc[0][i], acc[1][i], acc[2][i], acc[3][i]);
        to[1] = make_float4(acc[4][i], acc[5][i], acc[6][i], acc[7][i]);
      }
    }
  }
  __syncthreads();

  const auto write_output = [&](int query, const Stats& stats, const float4& sum) {
    const float scale = stats.sum == 0.0f ? 0.0f : 1.0f / stats.sum;
    const std::int64_t to = (std::int64_t{sequence} * p.num_heads + kv_head * group + query) * kDim;
    *reinterpret_cast<uint2*>(p.out + to + 4 * lane) = make_uint2(
        pack_bf16(sum.x * scale, sum.y * scale), pack_bf16(sum.z * scale, sum.w * scale));
  };
  // What a warp has of the whole share.
  const auto store_output = [&](int query, const Stats& stats, const float4& sum) {
    if (query >= group) return;
    if (num_shares == 1) return write_output(query, stats, sum);
    const int head = sequence * p.num_heads + kv_head * group + query;
    Stats* const all_stats = p.stats + std::int64_t{head} * gridDim.z;
    float4* const all_parts =
        reinterpret_cast<float4*>(p.parts + std::int64_t{head} * gridDim.z * kDim) + lane;
    all_parts[share * (kDim / 4)] = sum;
    if (lane == 0) all_stats[share] = stats;
    __threadfence();
    __syncwarp();
    int arrived = 0;
    if (lane == 0) arrived = atomicAdd(p.arrivals + head, 1);
    if (__shfl_sync(0xFFFFFFFF, arrived, 0) != num_shares - 1) return;
    if (lane == 0) p.arrivals[head] = 0;
    __threadfence();
    float4 total;
    const Stats whole = fold(
        num_shares, total,
        [&](int i) {
          const float2 pair = __ldcg(reinterpret_cast<const float2*>(all_stats + i));
          return Stats{pair.x, pair.y};
        },
        [&](int i) { return __ldcg(all_parts + i * (kDim / 4)); });
    write_output(query, whole, total);
  };
  // The others have begun: their shared memory may be written to.
  cluster_wait();
  for (int query = warp; query < kHeads; query += kWarps) {
    float4 sum;
    const Stats stats = fold(
        kWarps, sum, [&](int i) { return shared.stats[i][query]; },
        [&](int i) { return reinterpret_cast<const float4*>(shared.parts[i][query])[lane]; });
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
  if (warp < kHeadTiles) {
    float4 sum;
    const Stats stats = fold(
        kBlocks, sum, [&](int i) { return shared.received_stats[i][warp]; },
        [&](int i) { return reinterpret_cast<const float4*>(shared.received[i][warp])[lane]; });
    store_output(kBlocks * warp + rank, stats, sum);
  }
#endif
}

template <int kHeadTiles>
void launch(const Problem& p, int num_sequences, int max_shares, cudaStream_t stream) {
  constexpr int kSharedBytes = sizeof(Shared<kHeadTiles>);
  CHECK_CUDA(cudaFuncSetAttribute(warp_decode_kernel<kHeadTiles>,
                                  cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
  launch_dependent("warp_decode_kernel", warp_decode_kernel<kHeadTiles>,
                   dim3(kBlocks * p.num_kv_heads, num_sequences, max_shares), kThreads,
                   kSharedBytes, stream, kBlocks, p);
}

}  // namespace

bool warp_decode_fits(int num_heads, int num_kv_heads, int head_dim, int block_size) {
  return head_dim == kDim && num_heads % num_kv_heads == 0 && num_heads / num_kv_heads <= 16 &&
         block_size % kPiece == 0;
}

void warp_decode(const WarpDecodeArgs& args, cudaStream_t stream) {
  if (args.num_sequences == 0) return;
  if (!warp_decode_fits(args.num_heads, args.num_kv_heads, kDim, args.block_size)) {
    throw std::invalid_argument("attention of " + std::to_string(args.num_heads) +
                                " query heads to " + std::to_string(args.num_kv_heads) +
                                " KV heads in blocks of " + std::to_string(args.block_size) +
                                " tokens does not fit the kernel");
  }
  const Problem p{args.qkv,
                  args.qkv_stride,
                  args.qkv_part_stride,
                  args.num_parts,
                  static_cast<const __nv_bfloat16*>(args.q_weight),
                  static_cast<const __nv_bfloat16*>(args.k_weight),
                  args.cos,
                  args.sin,
                  args.positions,
                  args.slots,
                  static_cast<__nv_bfloat16*>(args.k_cache),
                  static_cast<__nv_bfloat16*>(args.v_cache),
                  args.block_tables,
                  args.block_tables_stride,
                  args.context_lens,
                  static_cast<__nv_bfloat16*>(args.out),
                  args.parts,
                  reinterpret_cast<Stats*>(args.stats),
                  args.arrivals,
                  args.eps,
                  args.scale * kLog2E,
                  args.num_heads,
                  args.num_kv_heads,
                  args.block_size};
  if (args.num_heads / args.num_kv_heads <= 8) {
    launch<1>(p, args.num_sequences, args.max_shares, stream);
  } else {
    launch<2>(p, args.num_sequences, args.max_shares, stream);
  }
}

}  // namespace moe_engine

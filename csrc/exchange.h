// Expert parallelism's exchange: tokens to the ranks of their experts, and results back.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "exchange_layout.h"

namespace moe_engine {

enum class ElementType { kBFloat16, kFloat16, kFloat32 };

// Rows travel to the experts as they are, or by groups of 128 elements in 8 bits
// (exchange_fp8.cuh).
enum class Wire { kPlain, kFp8 };

// The same buffers as this rank sees them, [num_ranks]; its own is among them.
struct ExchangePeers {
  char* buffers[kMaxExchangeRanks];
};

// What a rank's exchange is, from one launch to the next.
struct ExchangeState {
  ExchangeLayout layout;
  ElementType type;  // of rows before and after
  Wire wire;
  int rank;
  int num_local;  // experts of each rank; those of all ranks are numbered one after the other
  ExchangePeers peers;
  // The multicast address of all buffers: what is stored there goes to all; null without one.
  char* multicast;
  // All ranks in the order in which this one writes to them; it comes last itself.
  std::uint8_t order[kMaxExchangeRanks];
  // Of this rank alone: [0] the number of the present exchange, from 1 on, [1] blocks that have
  // ended it; [2] and [3] the same of collectives of a group.
  std::uint32_t* counters;
  AbortRecord* abort_report;  // of this rank, in memory that the host can read
  std::int64_t timeout_ns;    // after which a wait is given up
  int num_blocks;             // that may wait at once: all of them run side by side
  // Whether kernels that follow may take multiprocessors while this one waits; not where several
  // ranks share a GPU, as they might take what the rank that is awaited needs.
  bool next_may_start;
};

// Where each expert's replicas are, and which share of the tokens each takes: those whose hash
// (replicas.cuh) is up to its bound and above that of the replica before it. Bounds ascend; the
// last is 2^31 - 1.
//
// Example, R = 2: expert 0 half at 0 and half at 5, expert 1 at 1 alone: slots [[0, 5], [1, 1]],
// bounds [[2^30 - 1, 2^31 - 1], [2^31 - 1, 2^31 - 1]].
struct ReplicaTable {
  int num_experts;             // E; 0: no table, each expert is where its number says
  int num_replicas;            // R, at most
  const std::int32_t* slots;   // [E, R], of the experts of all ranks, one rank's after the other's
  const std::int32_t* bounds;  // [E, R]
};

// What travels to the experts. A step's ranks all bring up to `step_tokens` tokens.
struct DispatchArgs {
  const void* x;            // [num_tokens, H], rows side by side
  const std::int32_t* ids;  // [num_tokens, K], below 0 for no expert
  const float* weights;     // [num_tokens, K]
  int num_tokens;
  int step_tokens;
  // R = N * step_tokens. By rows, slots and weights lie in the buffer and these two are not used,
  // nor is received_x of plain rows, which lie there, too.
  void* received_x;              // [R, H]; rows of which no choice is here stay as they are
  std::int32_t* received_slots;  // [R, K], local expert slots, or -1
  float* received_weights;       // [R, K], anything where there is no slot
  // For load balancing; each may be absent.
  ReplicaTable replicas;
  const std::uint32_t* tags;  // [num_tokens], twice the sequence's number, plus 1 in prefill
  std::int32_t* sent_ids;     // [num_tokens, K], ids as the replicas are numbered: for combine
  std::int32_t* load;         // [2, num_counted], added to: choices in decode, and in prefill
  int num_counted;            // experts
};

// What travels back.
struct CombineArgs {
  const void* y;  // [R * K, H], a row per choice; or [R, H], summed already
  bool is_summed;
  const std::int32_t* slots;  // [R, K], what dispatch has received
  const float* weights;       // [R, K]
  const std::int32_t* ids;    // [num_tokens, K], what dispatch has sent
  void* out;                  // [num_tokens, H]
  int num_tokens;
  int step_tokens;
};

// The residual addition and RMSNorm behind a combine.
struct NextNorm {
  const void* residual;  // [num_tokens, H], rows side by side
  const void* weight;    // [H], which no kernel of the step writes
  float eps;             // added to the mean of the squares
  void* normed;          // [num_tokens, H]
  void* new_residual;    // [num_tokens, H]
};

// Ranks with consecutive numbers, such as those that share the heads of attention. All collectives
// of a rank are over the same group.
struct RankGroup {
  int first;
  int size;
};

// A sum over the ranks of a group.
struct AllReduceArgs {
  const void* x;  // [num_rows, H], what this rank adds; the same shape on all
  void* out;      // [num_rows, H], may be x
  int num_rows;
  RankGroup group;
};

// What each rank of a group brings, one behind the other at all of them.
struct AllGatherArgs {
  const void* x;  // this rank's words of 4 bytes
  void* out;      // all words; may be x where no other rank brings any, or this one does not
  RankGroup group;
  std::int32_t num_words[kMaxExchangeRanks];  // of each rank of the group
};

// Each enqueues on `stream` and returns, can be captured in a CUDA graph, and leaves no count to
// the host. All ranks enqueue the same ones in the same order, with the same step_tokens.
//
// With packets: one launch each way, for step_tokens up to the layout's packet_tokens.
void dispatch_packets(const ExchangeState& state, const DispatchArgs& args, cudaStream_t stream);
void combine_packets(const ExchangeState& state, const CombineArgs& args, cudaStream_t stream);
// The same and the norm in one launch, without `out`, for rows of a layout that fits.
bool combine_norm_fits(const ExchangeLayout& layout);
void combine_norm_packets(const ExchangeState& state, const CombineArgs& args, const NextNorm& norm,
                          cudaStream_t stream);
// With rows: two launches each way, of which the first sends and never waits.
void dispatch_rows(const ExchangeState& state, const DispatchArgs& args, cudaStream_t stream);
void combine_rows(const ExchangeState& state, const CombineArgs& args, cudaStream_t stream);

// By packets, in one launch, of up to the layout's reduced_rows, or as many words of each rank.
// Their numbers are their own, so they may come between any two of the above; all ranks of the
// group enqueue the same ones in their order.
void all_reduce_packets(const ExchangeState& state, const AllReduceArgs& args, cudaStream_t stream);
void all_gather_packets(const ExchangeState& state, const AllGatherArgs& args, cudaStream_t stream);
// The same of up to the layout's multicast_rows over all ranks, by the switches between the GPUs;
// x and out at multiples of 16 bytes. Its numbers are those of all_reduce_packets.
void all_reduce_multicast(const ExchangeState& state, const AllReduceArgs& args,
                          cudaStream_t stream);

}  // namespace moe_engine

// Which of an expert's replicas a token goes to, and how many tokens chose each expert.
#pragma once

#include <cstdint>

#include "exchange.h"

namespace moe_engine {

// A number from 0 to 2^31 - 1 for a sequence and an expert, the same on every rank.
//
// Source of the mixing: Chris Wellons, "Prospecting for Hash Functions" (2018), lowbias32.
__device__ __forceinline__ std::int32_t replica_hash(std::uint32_t sequence, std::uint32_t expert) {
  std::uint32_t x = sequence * 0x9E3779B1u ^ expert * 0x85EBCA6Bu;
  x ^= x >> 16;
  x *= 0x7FEB352Du;
  x ^= x >> 15;
  x *= 0x846CA68Bu;
  x ^= x >> 16;
  return static_cast<std::int32_t>(x & 0x7FFFFFFFu);
}

// The table in shared memory, for the block; null if there is none. May run before the kernel waits
// for those before it: nothing in a step writes the table.
__device__ __forceinline__ const std::int32_t* stage_replicas(const ReplicaTable& table,
                                                              std::int32_t* shared) {
  const int size = table.num_experts * table.num_replicas;
  if (size == 0) return nullptr;
  for (int i = threadIdx.x; i < size; i += blockDim.x) {
    shared[i] = table.bounds[i];
    shared[size + i] = table.slots[i];
  }
  __syncthreads();
  return shared;
}

// That a table may take; as MOST_BYTES in moe_engine/dist/exchange/replicas.py.
constexpr int kMostReplicaBytes = 48 << 10;

inline int replica_bytes(const ReplicaTable& table) {
  return 2 * table.num_experts * table.num_replicas * static_cast<int>(sizeof(std::int32_t));
}

// The expert, with its replicas numbered, of this lane's choice; -1 for none.
__device__ __forceinline__ int physical_choice(const DispatchArgs& args, const std::int32_t* staged,
                                               int top_k, int token, int lane) {
  if (token >= args.num_tokens || lane >= top_k) return -1;
  const int expert = args.ids[std::int64_t{token} * top_k + lane];
  if (staged == nullptr || expert < 0) return expert;
  const int num_replicas = args.replicas.num_replicas;
  const std::int32_t* const bounds = staged + expert * num_replicas;
  const std::int32_t hash = replica_hash(args.tags[token] >> 1, expert);
  int replica = 0;
  while (replica < num_replicas - 1 && hash > bounds[replica]) ++replica;
  return bounds[args.replicas.num_experts * num_replicas + replica];
}

// By one warp for each token: what combine and the load monitor want to know of its choices.
__device__ __forceinline__ void note_choices(const DispatchArgs& args, int top_k, int token,
                                             int lane, int physical) {
  if (token >= args.num_tokens || lane >= top_k) return;
  const std::int64_t choice = std::int64_t{token} * top_k + lane;
  if (args.sent_ids != nullptr) args.sent_ids[choice] = physical;
  if (args.load != nullptr && physical >= 0) {
    atomicAdd(&args.load[(args.tags[token] & 1) * args.num_counted + args.ids[choice]], 1);
  }
}

}  // namespace moe_engine

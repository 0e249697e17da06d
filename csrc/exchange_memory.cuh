// Reading and writing the memory that ranks share, and waiting for what a peer writes.
//
// Source: PTX ISA 8.8, "Memory Consistency Model", "ld", "st", "fence" and "Special Registers:
// %globaltimer". Ordinary accesses of 128 bits are single ones (.b128), so a packet is seen whole
// or not at all.
#pragma once

#include <cstdint>
#include <cstring>

#include "exchange.h"

namespace moe_engine {

// --- packets -------------------------------------------------------------------------------------

__device__ __forceinline__ void store_packet(Packet* to, const Packet& packet) {
  const std::uint64_t low = packet.words[0] | std::uint64_t{packet.words[1]} << 32;
  const std::uint64_t high = packet.words[2] | std::uint64_t{packet.epoch} << 32;
  asm volatile(
      "{\n"
      ".reg .b128 whole;\n"
      "mov.b128 whole, {%1, %2};\n"
      "st.relaxed.sys.global.b128 [%0], whole;\n"
      "}\n" ::"l"(__cvta_generic_to_global(to)),
      "l"(low), "l"(high)
      : "memory");
}

// All of it must be used: the assembler reads words of which some are not used one by one, each at
// another time.
__device__ __forceinline__ Packet load_packet(const Packet* from) {
  std::uint64_t low, high;
  asm volatile(
      "{\n"
      ".reg .b128 whole;\n"
      "ld.relaxed.sys.global.b128 whole, [%2];\n"
      "mov.b128 {%0, %1}, whole;\n"
      "}\n"
      : "=l"(low), "=l"(high)
      : "l"(__cvta_generic_to_global(from))
      : "memory");
  return Packet{{static_cast<std::uint32_t>(low), static_cast<std::uint32_t>(low >> 32),
                 static_cast<std::uint32_t>(high)},
                static_cast<std::uint32_t>(high >> 32)};
}

// What arrives with a packet, by itself.
__device__ __forceinline__ std::uint32_t load_epoch(const Packet* from) {
  std::uint32_t epoch;
  asm volatile("ld.relaxed.sys.global.u32 %0, [%1];"
               : "=r"(epoch)
               : "l"(__cvta_generic_to_global(&from->epoch))
               : "memory");
  return epoch;
}

// --- flags ---------------------------------------------------------------------------------------

// After a fence_for_peers() in this thread: what it knew to be written before that is seen by
// whoever sees the flag.
__device__ __forceinline__ void store_flag(std::uint32_t* to, std::uint32_t epoch) {
  asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(__cvta_generic_to_global(to)), "r"(epoch)
               : "memory");
}

__device__ __forceinline__ std::uint32_t load_flag(const std::uint32_t* from) {
  std::uint32_t value;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];"
               : "=r"(value)
               : "l"(__cvta_generic_to_global(from))
               : "memory");
  return value;
}

__device__ __forceinline__ void fence_for_peers() {
  asm volatile("fence.acq_rel.sys;" ::: "memory");
}

// --- giving up -----------------------------------------------------------------------------------

__device__ __forceinline__ AbortRecord load_abort(const AbortRecord* from) {
  std::uint64_t bits;
  asm volatile("ld.relaxed.sys.global.u64 %0, [%1];"
               : "=l"(bits)
               : "l"(__cvta_generic_to_global(from))
               : "memory");
  AbortRecord record;
  memcpy(&record, &bits, sizeof(record));
  return record;
}

__device__ __forceinline__ void store_abort(AbortRecord* to, const AbortRecord& record) {
  std::uint64_t bits;
  memcpy(&bits, &record, sizeof(bits));
  asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(__cvta_generic_to_global(to)), "l"(bits)
               : "memory");
}

__device__ __forceinline__ std::int64_t nanoseconds() {
  std::uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return static_cast<std::int64_t>(now);
}

__device__ __forceinline__ AbortRecord* abort_of(const ExchangeState& state, int rank) {
  return reinterpret_cast<AbortRecord*>(state.peers.buffers[rank] + state.layout.abort_at());
}

// When this thread gives up: never for kNotYet, which has still to be set; kNow when it does.
constexpr std::int64_t kNotYet = 0;
constexpr std::int64_t kNow = -1;

// What a thread does now and then while it waits for `missing`: sees whether another one has given
// up, and gives up itself when it is past `deadline`. Returns its deadline, or kNow.
__device__ __noinline__ inline std::int64_t look_around(const ExchangeState& state,
                                                        std::uint32_t epoch,
                                                        AbortRecord::Phase phase, int missing,
                                                        std::int64_t deadline) {
  const AbortRecord seen = load_abort(abort_of(state, state.rank));
  if (seen.phase != AbortRecord::kNone) {
    store_abort(state.abort_report, seen);
    return kNow;
  }
  const std::int64_t now = nanoseconds();
  if (deadline == kNotYet) return now + state.timeout_ns;
  if (now < deadline) return deadline;
  AbortRecord record{};
  record.epoch = epoch;
  record.phase = phase;
  record.waiter = static_cast<std::uint8_t>(state.rank);
  record.missing = static_cast<std::uint8_t>(missing);
  store_abort(state.abort_report, record);
  for (int rank = 0; rank < state.layout.num_ranks; ++rank) {
    store_abort(abort_of(state, rank), record);
  }
  return kNow;
}

// A thread's patience with one rank after the other. It asks `gives_up` whenever it has looked in
// vain for what `missing` writes; the first few times that costs nothing.
//
// Who gives up tells all ranks, so each ends soon, and the host of each, which finds out whom to
// blame. Nothing is ordered behind it: what the exchange has computed is worthless.
class Patience {
 public:
  __device__ __forceinline__ Patience(const ExchangeState& state, std::uint32_t epoch,
                                      AbortRecord::Phase phase)
      : state_(state), epoch_(epoch), phase_(phase) {}

  __device__ __forceinline__ bool gives_up(int missing) {
    constexpr int kLooks = 64;  // tens of microseconds
    if (missing != awaited_) {
      awaited_ = missing;
      num_looks_ = 0;
      deadline_ = kNotYet;
    }
    if (++num_looks_ % kLooks != 0) return false;
    deadline_ = look_around(state_, epoch_, phase_, missing, deadline_);
    return deadline_ == kNow;
  }

 private:
  const ExchangeState& state_;
  const std::uint32_t epoch_;
  const AbortRecord::Phase phase_;
  int awaited_ = -1;
  int num_looks_ = 0;
  std::int64_t deadline_ = kNotYet;
};

// False if the exchange was given up. A flag may be of the next exchange already where dispatches
// follow each other without a combine, as in a benchmark; of no later one.
__device__ __forceinline__ bool wait_for_flag(const std::uint32_t* from, std::uint32_t epoch,
                                              Patience& patience, int source) {
  while (true) {
    const std::uint32_t seen = load_flag(from);
    if (seen == epoch || seen == next_epoch(epoch)) return true;
    if (patience.gives_up(source)) return false;
  }
}

// --- the ranks of a token ------------------------------------------------------------------------

// The rank of this lane's choice, or -1; the lanes from top_k on have none.
__device__ __forceinline__ int rank_of_choice(const std::int32_t* ids_of_token, int top_k,
                                              int num_local, int lane) {
  const int id = lane < top_k ? ids_of_token[lane] : -1;
  return id >= 0 ? id / num_local : -1;
}

// The first rank behind `last` that any of a warp's lanes names, or kMaxExchangeRanks.
__device__ __forceinline__ int next_rank(int rank_of_lane, int last) {
  return __reduce_min_sync(0xFFFFFFFF, rank_of_lane > last ? rank_of_lane : kMaxExchangeRanks);
}

// --- the exchange's end --------------------------------------------------------------------------

// By all threads of all blocks of the kernel that ends an exchange, or an all-reduce, when each has
// done its part. `counters`: its number, and blocks that have ended it.
//
// What another rank has sent since it gave up is worthless, though nobody may have had to wait for
// it, so the host is told here at the latest.
__device__ __forceinline__ void end_exchange(const ExchangeState& state, std::uint32_t* counters) {
  __syncthreads();
  if (threadIdx.x != 0) return;
  if (atomicAdd(&counters[1], 1u) == gridDim.x - 1) {
    counters[1] = 0;
    counters[0] = next_epoch(counters[0]);
    const AbortRecord seen = load_abort(abort_of(state, state.rank));
    if (seen.phase != AbortRecord::kNone) store_abort(state.abort_report, seen);
  }
}

}  // namespace moe_engine

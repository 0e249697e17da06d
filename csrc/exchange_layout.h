// Where everything lies in the memory that the ranks of an exchange share. Every rank has one such
// buffer, of the same layout, and writes into those of its peers; docs/exchange.md has a picture.
//
// Legend: N ranks, M tokens that a rank brings at most, K experts per token, H hidden size; slot
// s * m + t is token t of source rank s, where m <= M is what a rank may bring in the present step.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define EXCHANGE_BOTH __host__ __device__
#else
#define EXCHANGE_BOTH
#endif

namespace moe_engine {

constexpr int kMaxExchangeRanks = 128;
constexpr int kMaxExchangeTopK = 32;
// Tokens that share a flag: those that one block moves.
constexpr int kChunkTokens = 4;

// The number of an exchange, from 1 to kLastEpoch and then again from 2 on: numbers alternate
// between odd and even and are never 0, which memory holds at first. The highest bit is free for a
// packet.
constexpr std::uint32_t kLastEpoch = 0x7FFFFFFF;
constexpr EXCHANGE_BOTH std::uint32_t next_epoch(std::uint32_t epoch) {
  return epoch == kLastEpoch ? 2 : epoch + 1;
}

// Of few tokens every 16 bytes carry the number of the exchange they belong to, so that a packet
// says by itself that it has arrived.
struct alignas(16) Packet {
  static constexpr int kWords = 3;
  static constexpr std::uint32_t kNothing = kLastEpoch + 1;
  std::uint32_t words[kWords];
  std::uint32_t epoch;  // with kNothing, alone for all packets of a token that does not come
};

// Why an exchange was given up; all zeros while it was not. Eight bytes, so that it is read and
// written at once.
struct alignas(8) AbortRecord {
  enum Phase : std::uint8_t {
    kNone = 0,
    kDispatch = 1,
    kCombine = 2,
    kAllReduce = 3,
    kAllGather = 4
  };
  std::uint32_t epoch;   // of the exchange that did not end
  std::uint8_t phase;    // its half
  std::uint8_t waiter;   // rank that gave up
  std::uint8_t missing;  // rank that it waited for
  std::uint8_t unused;
};
static_assert(sizeof(AbortRecord) == 8);

struct ExchangeLayout {
  int num_ranks;
  int max_tokens;      // M
  int packet_tokens;   // tokens a rank may bring in packets, at most; <= M
  int reduced_rows;    // rows that a collective by packets takes of a rank, at most
  int multicast_rows;  // rows of an all-reduce by multicast, at most; 0 where there is none
  int row_bytes;       // of one token, a multiple of 16
  int wire_bytes;      // of one token on its way to the experts: row_bytes, or what FP8 takes
  int top_k;

  static constexpr EXCHANGE_BOTH std::int64_t aligned(std::int64_t bytes) {
    return (bytes + 255) / 256 * 256;
  }

  // A token on its way to an expert: packets of a header, in words of 4 bytes K expert ids and K
  // weights; then packets of its row.
  constexpr EXCHANGE_BOTH int header_packets() const { return packets(2 * top_k); }
  constexpr EXCHANGE_BOTH int row_packets() const { return packets(wire_bytes / 4); }
  constexpr EXCHANGE_BOTH int dispatch_packets() const { return header_packets() + row_packets(); }
  // What a rank's experts made of it, on its way back.
  constexpr EXCHANGE_BOTH int combine_words() const { return row_bytes / 4; }
  constexpr EXCHANGE_BOTH int combine_packets() const { return packets(combine_words()); }

  constexpr EXCHANGE_BOTH int num_chunks() const {
    return (max_tokens + kChunkTokens - 1) / kChunkTokens;
  }

  // --- sections, in the order in which they lie; offsets in bytes --------------------------------

  // AbortRecord, of this rank for itself.
  constexpr EXCHANGE_BOTH std::int64_t abort_at() const { return 0; }

  // uint32 [N, chunks + 1] each: the last exchange of which source s has written chunk c; of
  // combine's, the last one is that which s has sent all results of, and read all that it needs.
  constexpr EXCHANGE_BOTH std::int64_t dispatch_flags_at() const { return 256; }
  constexpr EXCHANGE_BOTH std::int64_t combine_flags_at() const {
    return dispatch_flags_at() + flags_bytes();
  }

  // Packet [2, N, packet_tokens, dispatch_packets], by the parity of the exchange.
  constexpr EXCHANGE_BOTH std::int64_t dispatch_inbox_at() const {
    return combine_flags_at() + flags_bytes();
  }
  constexpr EXCHANGE_BOTH std::int64_t dispatch_inbox_bytes() const {
    return aligned(std::int64_t{16} * num_ranks * packet_tokens * dispatch_packets());
  }

  // Packet [N, packet_tokens, combine_packets], by the rank whose experts made them.
  constexpr EXCHANGE_BOTH std::int64_t combine_inbox_at() const {
    return dispatch_inbox_at() + 2 * dispatch_inbox_bytes();
  }
  constexpr EXCHANGE_BOTH std::int64_t combine_inbox_bytes() const {
    return aligned(std::int64_t{16} * num_ranks * packet_tokens * combine_packets());
  }

  // Packet [2, N, reduced_rows, combine_packets], by the parity of the group's collective: what
  // each rank brings.
  constexpr EXCHANGE_BOTH std::int64_t reduce_inbox_at() const {
    return combine_inbox_at() + combine_inbox_bytes();
  }
  constexpr EXCHANGE_BOTH std::int64_t reduce_inbox_bytes() const {
    return aligned(std::int64_t{16} * num_ranks * reduced_rows * combine_packets());
  }

  // Of an all-reduce by multicast, flags uint32 [N, multicast_rows], the last one for which source
  // s has written a row, and [multicast_rows], the last one of which a row's sum is here; and rows
  // [multicast_rows, row_bytes], what this rank adds and then the sum.
  constexpr EXCHANGE_BOTH std::int64_t written_flags_at() const {
    return reduce_inbox_at() + 2 * reduce_inbox_bytes();
  }
  constexpr EXCHANGE_BOTH std::int64_t summed_flags_at() const {
    return written_flags_at() + aligned(std::int64_t{4} * num_ranks * multicast_rows);
  }
  constexpr EXCHANGE_BOTH std::int64_t multicast_rows_at() const {
    return summed_flags_at() + aligned(std::int64_t{4} * multicast_rows);
  }

  // Of more tokens: rows [N * m, wire_bytes], their local expert slots int32 [N * m, K], or -1, and
  // weights float32 [N * m, K].
  constexpr EXCHANGE_BOTH std::int64_t rows_at() const {
    return multicast_rows_at() + aligned(std::int64_t{1} * multicast_rows * row_bytes);
  }
  constexpr EXCHANGE_BOTH std::int64_t slots_at() const {
    return rows_at() + aligned(std::int64_t{1} * num_ranks * max_tokens * wire_bytes);
  }
  constexpr EXCHANGE_BOTH std::int64_t weights_at() const { return slots_at() + choices_bytes(); }

  // Rows [N * m, row_bytes] on their way back, by the rank whose experts made them.
  constexpr EXCHANGE_BOTH std::int64_t results_at() const { return weights_at() + choices_bytes(); }

  constexpr EXCHANGE_BOTH std::int64_t total_bytes() const {
    return results_at() + aligned(std::int64_t{1} * num_ranks * max_tokens * row_bytes);
  }

 private:
  static constexpr EXCHANGE_BOTH int packets(int words) {
    return (words + Packet::kWords - 1) / Packet::kWords;
  }
  constexpr EXCHANGE_BOTH std::int64_t flags_bytes() const {
    return aligned(std::int64_t{4} * num_ranks * (num_chunks() + 1));
  }
  constexpr EXCHANGE_BOTH std::int64_t choices_bytes() const {
    return aligned(std::int64_t{4} * num_ranks * max_tokens * top_k);
  }
};

}  // namespace moe_engine

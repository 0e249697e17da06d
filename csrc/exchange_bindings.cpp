// Classes and functions of moe_engine._C for the exchange; addresses are integers, as in
// bindings.cpp.
#include "exchange_bindings.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "exchange.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace moe_engine {
namespace {

void check_in(const char* name, int value, int first, int last) {
  if (value < first || value > last) {
    throw std::invalid_argument(std::string(name) + " is " + std::to_string(value) +
                                "; it is from " + std::to_string(first) + " to " +
                                std::to_string(last));
  }
}

ExchangeLayout make_layout(int num_ranks, int max_tokens, int packet_tokens, int reduced_rows,
                           int multicast_rows, int row_bytes, int wire_bytes, int top_k) {
  check_in("num_ranks", num_ranks, 1, kMaxExchangeRanks);
  check_in("top_k", top_k, 1, kMaxExchangeTopK);
  check_in("max_tokens", max_tokens, 1, 1 << 20);
  check_in("packet_tokens", packet_tokens, 0, max_tokens);
  check_in("reduced_rows", reduced_rows, 0, 1 << 20);
  check_in("multicast_rows", multicast_rows, 0, 1 << 20);
  for (const auto& [name, bytes] :
       {std::pair{"row_bytes", row_bytes}, {"wire_bytes", wire_bytes}}) {
    if (bytes < 16 || bytes % 16 != 0) {
      throw std::invalid_argument(std::string(name) + " is " + std::to_string(bytes) +
                                  "; it is a multiple of 16");
    }
  }
  return ExchangeLayout{num_ranks,      max_tokens, packet_tokens, reduced_rows,
                        multicast_rows, row_bytes,  wire_bytes,    top_k};
}

ExchangeState make_state(const ExchangeLayout& layout, ElementType type, bool is_fp8, int rank,
                         int num_local, const std::vector<std::uintptr_t>& buffers,
                         std::uintptr_t multicast, const std::vector<int>& order,
                         std::uintptr_t counters, std::uintptr_t abort_report,
                         std::int64_t timeout_ns, int num_blocks, bool next_may_start) {
  if (buffers.size() != static_cast<std::size_t>(layout.num_ranks)) {
    throw std::invalid_argument(std::to_string(buffers.size()) + " buffers for " +
                                std::to_string(layout.num_ranks) + " ranks");
  }
  if (rank < 0 || rank >= layout.num_ranks) {
    throw std::invalid_argument("rank is " + std::to_string(rank) + " of " +
                                std::to_string(layout.num_ranks));
  }
  std::vector<int> sorted(order);
  std::sort(sorted.begin(), sorted.end());
  for (int i = 0; i < static_cast<int>(std::max(sorted.size(), buffers.size())); ++i) {
    if (sorted.size() != buffers.size() || sorted[i] != i) {
      throw std::invalid_argument("the order does not have each of " +
                                  std::to_string(layout.num_ranks) + " ranks once");
    }
  }
  ExchangeState state{};
  state.layout = layout;
  state.type = type;
  state.wire = is_fp8 ? Wire::kFp8 : Wire::kPlain;
  state.rank = rank;
  state.num_local = num_local;
  for (std::size_t i = 0; i < buffers.size(); ++i) {
    state.peers.buffers[i] = reinterpret_cast<char*>(buffers[i]);
    state.order[i] = static_cast<std::uint8_t>(order[i]);
  }
  state.multicast = reinterpret_cast<char*>(multicast);
  state.counters = reinterpret_cast<std::uint32_t*>(counters);
  state.abort_report = reinterpret_cast<AbortRecord*>(abort_report);
  state.timeout_ns = timeout_ns;
  state.num_blocks = num_blocks;
  state.next_may_start = next_may_start;
  return state;
}

void dispatch(const ExchangeState& state, bool by_packets, std::uintptr_t x, std::uintptr_t ids,
              std::uintptr_t weights, int num_tokens, int step_tokens, std::uintptr_t received_x,
              std::uintptr_t received_slots, std::uintptr_t received_weights,
              std::uintptr_t replica_slots, std::uintptr_t replica_bounds, int num_experts,
              int num_replicas, std::uintptr_t tags, std::uintptr_t sent_ids, std::uintptr_t load,
              int num_counted, std::uintptr_t stream) {
  DispatchArgs args{};
  args.x = reinterpret_cast<const void*>(x);
  args.ids = reinterpret_cast<const std::int32_t*>(ids);
  args.weights = reinterpret_cast<const float*>(weights);
  args.num_tokens = num_tokens;
  args.step_tokens = step_tokens;
  args.received_x = reinterpret_cast<void*>(received_x);
  args.received_slots = reinterpret_cast<std::int32_t*>(received_slots);
  args.received_weights = reinterpret_cast<float*>(received_weights);
  args.replicas =
      ReplicaTable{num_experts, num_replicas, reinterpret_cast<const std::int32_t*>(replica_slots),
                   reinterpret_cast<const std::int32_t*>(replica_bounds)};
  args.tags = reinterpret_cast<const std::uint32_t*>(tags);
  args.sent_ids = reinterpret_cast<std::int32_t*>(sent_ids);
  args.load = reinterpret_cast<std::int32_t*>(load);
  args.num_counted = num_counted;
  (by_packets ? dispatch_packets : dispatch_rows)(state, args,
                                                  reinterpret_cast<cudaStream_t>(stream));
}

CombineArgs combine_args(std::uintptr_t y, bool is_summed, std::uintptr_t slots,
                         std::uintptr_t weights, std::uintptr_t ids, std::uintptr_t out,
                         int num_tokens, int step_tokens) {
  CombineArgs args{};
  args.y = reinterpret_cast<const void*>(y);
  args.is_summed = is_summed;
  args.slots = reinterpret_cast<const std::int32_t*>(slots);
  args.weights = reinterpret_cast<const float*>(weights);
  args.ids = reinterpret_cast<const std::int32_t*>(ids);
  args.out = reinterpret_cast<void*>(out);
  args.num_tokens = num_tokens;
  args.step_tokens = step_tokens;
  return args;
}

void combine(const ExchangeState& state, std::uintptr_t y, bool is_summed, std::uintptr_t slots,
             std::uintptr_t weights, std::uintptr_t ids, int num_tokens, int step_tokens,
             bool by_packets, std::uintptr_t out, std::uintptr_t stream) {
  const CombineArgs args =
      combine_args(y, is_summed, slots, weights, ids, out, num_tokens, step_tokens);
  (by_packets ? combine_packets : combine_rows)(state, args,
                                                reinterpret_cast<cudaStream_t>(stream));
}

void combine_norm(const ExchangeState& state, std::uintptr_t y, bool is_summed,
                  std::uintptr_t slots, std::uintptr_t weights, std::uintptr_t ids, int num_tokens,
                  int step_tokens, std::uintptr_t residual, std::uintptr_t norm_weight, float eps,
                  std::uintptr_t normed, std::uintptr_t new_residual, std::uintptr_t stream) {
  const CombineArgs args =
      combine_args(y, is_summed, slots, weights, ids, 0, num_tokens, step_tokens);
  const NextNorm norm{reinterpret_cast<const void*>(residual),
                      reinterpret_cast<const void*>(norm_weight), eps,
                      reinterpret_cast<void*>(normed), reinterpret_cast<void*>(new_residual)};
  combine_norm_packets(state, args, norm, reinterpret_cast<cudaStream_t>(stream));
}

void all_reduce(const ExchangeState& state, bool by_packets, std::uintptr_t x, std::uintptr_t out,
                int num_rows, int first_rank, int group_size, std::uintptr_t stream) {
  const ExchangeLayout& layout = state.layout;
  check_in("num_rows", num_rows, 1, by_packets ? layout.reduced_rows : layout.multicast_rows);
  if (!by_packets && (state.multicast == nullptr || group_size != layout.num_ranks)) {
    throw std::invalid_argument("a sum by multicast is over all ranks of a domain that has it");
  }
  const AllReduceArgs args{reinterpret_cast<const void*>(x), reinterpret_cast<void*>(out), num_rows,
                           RankGroup{first_rank, group_size}};
  (by_packets ? all_reduce_packets : all_reduce_multicast)(state, args,
                                                           reinterpret_cast<cudaStream_t>(stream));
}

void all_gather(const ExchangeState& state, std::uintptr_t x, std::uintptr_t out,
                const std::vector<std::int64_t>& num_bytes, int first_rank, std::uintptr_t stream) {
  const std::int64_t most = std::int64_t{state.layout.reduced_rows} * state.layout.row_bytes;
  AllGatherArgs args{reinterpret_cast<const void*>(x),
                     reinterpret_cast<void*>(out),
                     RankGroup{first_rank, static_cast<int>(num_bytes.size())},
                     {}};
  check_in("the number of ranks", args.group.size, 1, state.layout.num_ranks - first_rank);
  for (int i = 0; i < args.group.size; ++i) {
    if (num_bytes[i] < 0 || num_bytes[i] > most || num_bytes[i] % 4 != 0) {
      throw std::invalid_argument("num_bytes is " + std::to_string(num_bytes[i]) +
                                  "; it is a multiple of 4 up to " + std::to_string(most));
    }
    args.num_words[i] = static_cast<std::int32_t>(num_bytes[i] / 4);
  }
  all_gather_packets(state, args, reinterpret_cast<cudaStream_t>(stream));
}

}  // namespace

void bind_exchange(py::module_& module) {
  // Local to this build of the module, of which a process may load several.
  py::enum_<ElementType>(module, "ElementType", py::module_local())
      .value("BFLOAT16", ElementType::kBFloat16)
      .value("FLOAT16", ElementType::kFloat16)
      .value("FLOAT32", ElementType::kFloat32);

  py::class_<ExchangeLayout>(module, "ExchangeLayout", py::module_local())
      .def(py::init(&make_layout), py::kw_only(), "num_ranks"_a, "max_tokens"_a, "packet_tokens"_a,
           "reduced_rows"_a, "multicast_rows"_a = 0, "row_bytes"_a, "wire_bytes"_a, "top_k"_a)
      .def_property_readonly("num_chunks", &ExchangeLayout::num_chunks)
      .def_property_readonly("header_packets", &ExchangeLayout::header_packets)
      .def_property_readonly("dispatch_packets", &ExchangeLayout::dispatch_packets)
      .def_property_readonly("combine_packets", &ExchangeLayout::combine_packets)
      .def_property_readonly("abort_at", &ExchangeLayout::abort_at)
      .def_property_readonly("dispatch_flags_at", &ExchangeLayout::dispatch_flags_at)
      .def_property_readonly("combine_flags_at", &ExchangeLayout::combine_flags_at)
      .def_property_readonly("dispatch_inbox_at", &ExchangeLayout::dispatch_inbox_at)
      .def_property_readonly("combine_inbox_at", &ExchangeLayout::combine_inbox_at)
      .def_property_readonly("reduce_inbox_at", &ExchangeLayout::reduce_inbox_at)
      .def_property_readonly("written_flags_at", &ExchangeLayout::written_flags_at)
      .def_property_readonly("summed_flags_at", &ExchangeLayout::summed_flags_at)
      .def_property_readonly("multicast_rows_at", &ExchangeLayout::multicast_rows_at)
      .def_property_readonly("rows_at", &ExchangeLayout::rows_at)
      .def_property_readonly("slots_at", &ExchangeLayout::slots_at)
      .def_property_readonly("weights_at", &ExchangeLayout::weights_at)
      .def_property_readonly("results_at", &ExchangeLayout::results_at)
      .def_property_readonly("total_bytes", &ExchangeLayout::total_bytes);

  py::class_<ExchangeState>(module, "ExchangeState", py::module_local())
      .def(py::init(&make_state), py::kw_only(), "layout"_a, "type"_a, "is_fp8"_a, "rank"_a,
           "num_local"_a, "buffers"_a, "multicast"_a = 0, "order"_a, "counters"_a, "abort_report"_a,
           "timeout_ns"_a, "num_blocks"_a, "next_may_start"_a);

  module.def("exchange_dispatch", &dispatch, "state"_a, py::kw_only(), "by_packets"_a, "x"_a,
             "ids"_a, "weights"_a, "num_tokens"_a, "step_tokens"_a, "received_x"_a,
             "received_slots"_a, "received_weights"_a, "replica_slots"_a = 0,
             "replica_bounds"_a = 0, "num_experts"_a = 0, "num_replicas"_a = 0, "tags"_a = 0,
             "sent_ids"_a = 0, "load"_a = 0, "num_counted"_a = 0, "stream"_a);
  module.def("exchange_all_reduce", &all_reduce, "state"_a, py::kw_only(), "by_packets"_a = true,
             "x"_a, "out"_a, "num_rows"_a, "first_rank"_a, "group_size"_a, "stream"_a);
  module.def("exchange_all_gather", &all_gather, "state"_a, py::kw_only(), "x"_a, "out"_a,
             "num_bytes"_a, "first_rank"_a, "stream"_a);
  module.def("exchange_combine", &combine, "state"_a, py::kw_only(), "y"_a, "is_summed"_a,
             "slots"_a, "weights"_a, "ids"_a, "num_tokens"_a, "step_tokens"_a, "by_packets"_a,
             "out"_a, "stream"_a);
  module.def("exchange_combine_norm_fits", &combine_norm_fits, "layout"_a);
  module.def("exchange_combine_norm", &combine_norm, "state"_a, py::kw_only(), "y"_a, "is_summed"_a,
             "slots"_a, "weights"_a, "ids"_a, "num_tokens"_a, "step_tokens"_a, "residual"_a,
             "norm_weight"_a, "eps"_a, "normed"_a, "new_residual"_a, "stream"_a);
}

}  // namespace moe_engine

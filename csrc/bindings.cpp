// moe_engine._C: raw device pointers as integers, sizes, and a stream handle. Shapes, dtypes and
// lifetimes are checked above, in moe_engine/ops; the types are in moe_engine/_C.pyi.
#include <pybind11/pybind11.h>

#include "device.h"
#include "expert_counts.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace {

py::dict device_properties(int device) {
  const moe_engine::DeviceInfo info = moe_engine::device_info(device);
  return py::dict("name"_a = info.name, "num_sms"_a = info.num_sms,
                  "compute_capability"_a = py::make_tuple(info.compute_major, info.compute_minor),
                  "memory_bytes"_a = info.memory_bytes, "l2_bytes"_a = info.l2_bytes,
                  "multicast"_a = info.multicast);
}

py::dict device_link(int device, int peer) {
  const moe_engine::LinkInfo info = moe_engine::link_info(device, peer);
  return py::dict("peer_access"_a = info.peer_access, "native_atomics"_a = info.native_atomics,
                  "performance_rank"_a = info.performance_rank);
}

void expert_token_counts(std::uintptr_t topk_ids, bool ids_are_int64, std::int64_t num_tokens,
                         int top_k, int num_experts, std::uintptr_t counts, std::uintptr_t stream) {
  moe_engine::ExpertCountsArgs args;
  args.topk_ids = reinterpret_cast<const void*>(topk_ids);
  args.ids_are_int64 = ids_are_int64;
  args.num_tokens = num_tokens;
  args.top_k = top_k;
  args.num_experts = num_experts;
  args.counts = reinterpret_cast<std::int32_t*>(counts);
  moe_engine::expert_token_counts(args, reinterpret_cast<cudaStream_t>(stream));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.attr("CUDA_ARCHS") = MOE_ENGINE_CUDA_ARCHS;
  m.def("device_count", &moe_engine::device_count);
  m.def("device_properties", &device_properties, "device"_a);
  m.def("device_link", &device_link, "device"_a, "peer"_a);
  m.def("expert_token_counts", &expert_token_counts, py::kw_only(), "topk_ids"_a, "ids_are_int64"_a,
        "num_tokens"_a, "top_k"_a, "num_experts"_a, "counts"_a, "stream"_a);
}

// moe_engine._C: raw device pointers as integers, sizes, and a stream handle. Shapes, dtypes and
// lifetimes are checked above, in moe_engine/ops; the types are in moe_engine/_C.pyi.
#include <pybind11/pybind11.h>

#include "block_decode.h"
#include "device.h"
#include "exchange_bindings.h"
#include "expert_counts.h"
#include "grouped_experts.h"
#include "norm_router.h"
#include "prefill_attention.h"
#include "split_linear.h"
#include "streaming_experts.h"
#include "streaming_linear.h"
#include "warp_decode.h"

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

void grouped_expert_ffn(std::uintptr_t expert_ids, std::uintptr_t offsets, std::uintptr_t pairs,
                        std::uintptr_t x, std::int64_t x_stride, std::uintptr_t gate_up,
                        std::uintptr_t down, std::uintptr_t h, std::uintptr_t y,
                        std::uintptr_t counters, std::int64_t num_pairs, int num_experts, int top_k,
                        int hidden, int intermediate, int tokens_per_tile, std::uintptr_t stream) {
  moe_engine::ExpertFfnArgs args;
  args.expert_ids = reinterpret_cast<const std::int32_t*>(expert_ids);
  args.offsets = reinterpret_cast<const std::int32_t*>(offsets);
  args.pairs = reinterpret_cast<const std::int32_t*>(pairs);
  args.x = reinterpret_cast<const void*>(x);
  args.x_stride = x_stride;
  args.gate_up = reinterpret_cast<const void*>(gate_up);
  args.down = reinterpret_cast<const void*>(down);
  args.h = reinterpret_cast<void*>(h);
  args.y = reinterpret_cast<void*>(y);
  args.counters = reinterpret_cast<std::int32_t*>(counters);
  args.num_pairs = num_pairs;
  args.num_experts = num_experts;
  args.top_k = top_k;
  args.hidden = hidden;
  args.intermediate = intermediate;
  args.tokens_per_tile = tokens_per_tile;
  moe_engine::grouped_expert_ffn(args, reinterpret_cast<cudaStream_t>(stream));
}

void streaming_linear(std::uintptr_t x, std::int64_t x_stride, std::uintptr_t weight,
                      std::uintptr_t out, int num_tokens, int in_features, int out_features,
                      std::uintptr_t stream) {
  moe_engine::StreamingLinearArgs args;
  args.x = reinterpret_cast<const void*>(x);
  args.x_stride = x_stride;
  args.weight = reinterpret_cast<const void*>(weight);
  args.out = reinterpret_cast<void*>(out);
  args.num_tokens = num_tokens;
  args.in_features = in_features;
  args.out_features = out_features;
  moe_engine::streaming_linear(args, reinterpret_cast<cudaStream_t>(stream));
}

void norm_router(std::uintptr_t x, int num_parts, std::uintptr_t residual,
                 std::uintptr_t norm_weight, std::uintptr_t gate, std::uintptr_t num_real_1,
                 std::uintptr_t normed, std::uintptr_t new_residual, std::uintptr_t expert_ids,
                 std::uintptr_t expert_weights, float eps, int num_tokens, int num_experts,
                 int hidden, int top_k, bool normalize, std::uintptr_t stream) {
  moe_engine::NormRouterArgs args;
  args.x = reinterpret_cast<const void*>(x);
  args.num_parts = num_parts;
  args.residual = reinterpret_cast<const void*>(residual);
  args.norm_weight = reinterpret_cast<const void*>(norm_weight);
  args.gate = reinterpret_cast<const void*>(gate);
  args.num_real_1 = reinterpret_cast<const std::int32_t*>(num_real_1);
  args.normed = reinterpret_cast<void*>(normed);
  args.new_residual = reinterpret_cast<void*>(new_residual);
  args.expert_ids = reinterpret_cast<std::int32_t*>(expert_ids);
  args.expert_weights = reinterpret_cast<float*>(expert_weights);
  args.eps = eps;
  args.num_tokens = num_tokens;
  args.num_experts = num_experts;
  args.hidden = hidden;
  args.top_k = top_k;
  args.normalize = normalize;
  moe_engine::norm_router(args, reinterpret_cast<cudaStream_t>(stream));
}

void split_linear(std::uintptr_t x, std::int64_t x_stride, std::uintptr_t weight,
                  std::uintptr_t parts, int num_tokens, int in_features, int out_features,
                  std::uintptr_t stream) {
  moe_engine::SplitLinearArgs args;
  args.x = reinterpret_cast<const void*>(x);
  args.x_stride = x_stride;
  args.weight = reinterpret_cast<const void*>(weight);
  args.parts = reinterpret_cast<float*>(parts);
  args.num_tokens = num_tokens;
  args.in_features = in_features;
  args.out_features = out_features;
  moe_engine::split_linear(args, reinterpret_cast<cudaStream_t>(stream));
}

void streaming_expert_ffn(std::uintptr_t expert_ids, std::uintptr_t expert_weights,
                          std::uintptr_t x, std::int64_t x_stride, std::uintptr_t gate_up,
                          std::uintptr_t down, std::uintptr_t h, std::uintptr_t out,
                          std::uintptr_t counters, int num_tokens, int top_k, int hidden,
                          int intermediate, std::uintptr_t stream) {
  moe_engine::StreamingExpertFfnArgs args;
  args.expert_ids = reinterpret_cast<const std::int32_t*>(expert_ids);
  args.expert_weights = reinterpret_cast<const float*>(expert_weights);
  args.x = reinterpret_cast<const void*>(x);
  args.x_stride = x_stride;
  args.gate_up = reinterpret_cast<const void*>(gate_up);
  args.down = reinterpret_cast<const void*>(down);
  args.h = reinterpret_cast<void*>(h);
  args.out = reinterpret_cast<void*>(out);
  args.counters = reinterpret_cast<std::int32_t*>(counters);
  args.num_tokens = num_tokens;
  args.top_k = top_k;
  args.hidden = hidden;
  args.intermediate = intermediate;
  moe_engine::streaming_expert_ffn(args, reinterpret_cast<cudaStream_t>(stream));
}

void decode_attention(std::uintptr_t qkv, std::int64_t qkv_stride, std::int64_t qkv_part_stride,
                      int num_parts, std::uintptr_t q_weight, std::uintptr_t k_weight,
                      std::uintptr_t cos, std::uintptr_t sin, std::uintptr_t positions,
                      std::uintptr_t slots, std::uintptr_t k_cache, std::uintptr_t v_cache,
                      std::uintptr_t block_tables, std::int64_t block_tables_stride,
                      std::uintptr_t context_lens, std::uintptr_t out, float eps, float scale,
                      int num_sequences, int num_heads, int num_kv_heads, int block_size,
                      int block_warps, int max_shares, int min_tokens, std::uintptr_t parts,
                      std::uintptr_t stats, std::uintptr_t arrivals, std::uintptr_t stream) {
  moe_engine::DecodeAttentionArgs args;
  args.qkv = reinterpret_cast<const void*>(qkv);
  args.qkv_stride = qkv_stride;
  args.qkv_part_stride = qkv_part_stride;
  args.num_parts = num_parts;
  args.q_weight = reinterpret_cast<const void*>(q_weight);
  args.k_weight = reinterpret_cast<const void*>(k_weight);
  args.cos = reinterpret_cast<const float*>(cos);
  args.sin = reinterpret_cast<const float*>(sin);
  args.positions = reinterpret_cast<const std::int64_t*>(positions);
  args.slots = reinterpret_cast<const std::int64_t*>(slots);
  args.k_cache = reinterpret_cast<void*>(k_cache);
  args.v_cache = reinterpret_cast<void*>(v_cache);
  args.block_tables = reinterpret_cast<const std::int32_t*>(block_tables);
  args.block_tables_stride = block_tables_stride;
  args.context_lens = reinterpret_cast<const std::int32_t*>(context_lens);
  args.out = reinterpret_cast<void*>(out);
  args.eps = eps;
  args.scale = scale;
  args.num_sequences = num_sequences;
  args.num_heads = num_heads;
  args.num_kv_heads = num_kv_heads;
  args.block_size = block_size;
  args.max_shares = max_shares;
  args.min_tokens = min_tokens;
  args.parts = reinterpret_cast<float*>(parts);
  args.stats = reinterpret_cast<float*>(stats);
  args.arrivals = reinterpret_cast<std::int32_t*>(arrivals);
  if (block_warps == 0) {
    moe_engine::warp_decode(args, reinterpret_cast<cudaStream_t>(stream));
  } else {
    moe_engine::block_decode(args, block_warps, reinterpret_cast<cudaStream_t>(stream));
  }
}

void prefill_attention(std::uintptr_t q, std::int64_t q_stride, std::uintptr_t q_weight,
                       std::uintptr_t cos, std::uintptr_t sin, float eps, std::uintptr_t k_cache,
                       std::uintptr_t v_cache, std::uintptr_t block_tables,
                       std::int64_t block_tables_stride, std::uintptr_t out, std::uintptr_t spans,
                       std::uintptr_t tiles, std::uintptr_t num_tiles, std::int64_t num_rows,
                       std::int64_t num_slots, float scale, int max_tiles, int num_heads,
                       int num_kv_heads, int block_size, std::uintptr_t stream) {
  moe_engine::PrefillAttentionArgs args;
  args.q = reinterpret_cast<const void*>(q);
  args.q_stride = q_stride;
  args.q_weight = reinterpret_cast<const void*>(q_weight);
  args.cos = reinterpret_cast<const float*>(cos);
  args.sin = reinterpret_cast<const float*>(sin);
  args.eps = eps;
  args.k_cache = reinterpret_cast<const void*>(k_cache);
  args.v_cache = reinterpret_cast<const void*>(v_cache);
  args.block_tables = reinterpret_cast<const std::int32_t*>(block_tables);
  args.block_tables_stride = block_tables_stride;
  args.out = reinterpret_cast<void*>(out);
  args.spans = reinterpret_cast<const moe_engine::PrefillSpan*>(spans);
  args.tiles = reinterpret_cast<const std::uint32_t*>(tiles);
  args.num_tiles = reinterpret_cast<const std::int32_t*>(num_tiles);
  args.num_rows = num_rows;
  args.num_slots = num_slots;
  args.scale = scale;
  args.max_tiles = max_tiles;
  args.num_heads = num_heads;
  args.num_kv_heads = num_kv_heads;
  args.block_size = block_size;
  moe_engine::prefill_attention(args, reinterpret_cast<cudaStream_t>(stream));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.attr("CUDA_ARCHS") = MOE_ENGINE_CUDA_ARCHS;
  m.def("device_count", &moe_engine::device_count);
  m.def("device_properties", &device_properties, "device"_a);
  m.def("device_link", &device_link, "device"_a, "peer"_a);
  m.def("expert_token_counts", &expert_token_counts, py::kw_only(), "topk_ids"_a, "ids_are_int64"_a,
        "num_tokens"_a, "top_k"_a, "num_experts"_a, "counts"_a, "stream"_a);
  m.def("grouped_experts_sort", &moe_engine::grouped_experts_sort, "num_pairs"_a, "num_experts"_a,
        "tokens_per_tile"_a);
  m.def("grouped_expert_ffn", &grouped_expert_ffn, py::kw_only(), "expert_ids"_a, "offsets"_a,
        "pairs"_a, "x"_a, "x_stride"_a, "gate_up"_a, "down"_a, "h"_a, "y"_a, "counters"_a,
        "num_pairs"_a, "num_experts"_a, "top_k"_a, "hidden"_a, "intermediate"_a,
        "tokens_per_tile"_a, "stream"_a);
  m.def("streaming_linear_fits", &moe_engine::streaming_linear_fits, "in_features"_a,
        "out_features"_a);
  m.def("streaming_linear", &streaming_linear, py::kw_only(), "x"_a, "x_stride"_a, "weight"_a,
        "out"_a, "num_tokens"_a, "in_features"_a, "out_features"_a, "stream"_a);
  m.def("norm_router_fits", &moe_engine::norm_router_fits, "num_experts"_a, "hidden"_a, "top_k"_a);
  m.def("norm_router", &norm_router, py::kw_only(), "x"_a, "num_parts"_a, "residual"_a,
        "norm_weight"_a, "gate"_a, "num_real_1"_a, "normed"_a, "new_residual"_a, "expert_ids"_a,
        "expert_weights"_a, "eps"_a, "num_tokens"_a, "num_experts"_a, "hidden"_a, "top_k"_a,
        "normalize"_a, "stream"_a);
  m.def("split_linear_splits", &moe_engine::split_linear_splits, "in_features"_a, "out_features"_a);
  m.def("split_linear", &split_linear, py::kw_only(), "x"_a, "x_stride"_a, "weight"_a, "parts"_a,
        "num_tokens"_a, "in_features"_a, "out_features"_a, "stream"_a);
  m.def("streaming_experts_fit", &moe_engine::streaming_experts_fit, "num_tokens"_a, "top_k"_a,
        "hidden"_a, "intermediate"_a);
  m.def("streaming_expert_ffn", &streaming_expert_ffn, py::kw_only(), "expert_ids"_a,
        "expert_weights"_a, "x"_a, "x_stride"_a, "gate_up"_a, "down"_a, "h"_a, "out"_a,
        "counters"_a, "num_tokens"_a, "top_k"_a, "hidden"_a, "intermediate"_a, "stream"_a);
  m.def("decode_attention_fits", &moe_engine::decode_attention_fits, "num_heads"_a,
        "num_kv_heads"_a, "head_dim"_a, "block_size"_a);
  m.def("decode_attention", &decode_attention, py::kw_only(), "qkv"_a, "qkv_stride"_a,
        "qkv_part_stride"_a, "num_parts"_a, "q_weight"_a, "k_weight"_a, "cos"_a, "sin"_a,
        "positions"_a, "slots"_a, "k_cache"_a, "v_cache"_a, "block_tables"_a,
        "block_tables_stride"_a, "context_lens"_a, "out"_a, "eps"_a, "scale"_a, "num_sequences"_a,
        "num_heads"_a, "num_kv_heads"_a, "block_size"_a, "block_warps"_a, "max_shares"_a,
        "min_tokens"_a, "parts"_a, "stats"_a, "arrivals"_a, "stream"_a);
  m.def("prefill_attention_fits", &moe_engine::prefill_attention_fits, "num_heads"_a,
        "num_kv_heads"_a, "head_dim"_a, "block_size"_a);
  m.def("prefill_attention", &prefill_attention, py::kw_only(), "q"_a, "q_stride"_a, "q_weight"_a,
        "cos"_a, "sin"_a, "eps"_a, "k_cache"_a, "v_cache"_a, "block_tables"_a,
        "block_tables_stride"_a, "out"_a, "spans"_a, "tiles"_a, "num_tiles"_a, "num_rows"_a,
        "num_slots"_a, "scale"_a, "max_tiles"_a, "num_heads"_a, "num_kv_heads"_a, "block_size"_a,
        "stream"_a);
  moe_engine::bind_exchange(m);
}

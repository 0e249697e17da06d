"""CUDA C++ behind raw device pointers (as integers), sizes and a stream handle.

Nothing here checks a shape, a dtype or a lifetime: call `moe_engine.ops` instead. Every failed CUDA
call raises `RuntimeError` naming the call. Missing where the package was installed without nvcc.
"""

from typing import TypedDict

CUDA_ARCHS: str
"""The architectures compiled in, e.g. ``"90a,100a"``."""

class DeviceProperties(TypedDict):
    name: str
    num_sms: int
    compute_capability: tuple[int, int]
    memory_bytes: int
    l2_bytes: int
    multicast: bool

class DeviceLink(TypedDict):
    peer_access: bool
    native_atomics: bool
    performance_rank: int

def device_count() -> int:
    """GPUs that this process can use; 0 without a GPU or without a driver."""

def device_properties(device: int) -> DeviceProperties:
    """What the GPU is. ``multicast`` is what the device reports, not a promise that it works."""

def device_link(device: int, peer: int) -> DeviceLink:
    """How ``device`` reaches the memory of ``peer``; ``performance_rank`` 0 is the fastest link."""

def expert_token_counts(
    *,
    topk_ids: int,
    ids_are_int64: bool,
    num_tokens: int,
    top_k: int,
    num_experts: int,
    counts: int,
    stream: int,
) -> None:
    """Enqueue the histogram of ``topk_ids`` [T, K] into ``counts`` [E] (int32, overwritten).

    Ids below 0 are padding. The current device must be the one that owns the pointers.
    """

def grouped_experts_sort(num_pairs: int, num_experts: int, tokens_per_tile: int) -> bool:
    """Whether `grouped_expert_ffn` sorts so many pairs itself."""

def grouped_expert_ffn(
    *,
    expert_ids: int,
    offsets: int,
    pairs: int,
    x: int,
    x_stride: int,
    gate_up: int,
    down: int,
    h: int,
    y: int,
    counters: int,
    num_pairs: int,
    num_experts: int,
    top_k: int,
    hidden: int,
    intermediate: int,
    tokens_per_tile: int,
    stream: int,
) -> None:
    """Enqueue the experts' products over the pairs of each; see ``csrc/grouped_experts.h``."""

def norm_router_fits(num_experts: int, hidden: int, top_k: int) -> bool:
    """Whether `norm_router` takes these sizes."""

def norm_router(
    *,
    x: int,
    num_parts: int,
    residual: int,
    norm_weight: int,
    gate: int,
    num_real_1: int,
    normed: int,
    new_residual: int,
    expert_ids: int,
    expert_weights: int,
    eps: float,
    num_tokens: int,
    num_experts: int,
    hidden: int,
    top_k: int,
    normalize: bool,
    stream: int,
) -> None:
    """Enqueue residual addition, norm and router of few tokens; see ``csrc/norm_router.h``."""

def split_linear_splits(in_features: int, out_features: int) -> int:
    """Parts into which `split_linear` cuts the depth on the current device; 0: it does not fit."""

def split_linear(
    *,
    x: int,
    x_stride: int,
    weight: int,
    parts: int,
    num_tokens: int,
    in_features: int,
    out_features: int,
    stream: int,
) -> None:
    """Enqueue a linear layer of few tokens in parts; see ``csrc/split_linear.h``."""

def streaming_experts_fit(num_tokens: int, top_k: int, hidden: int, intermediate: int) -> bool:
    """Whether `streaming_expert_ffn` takes these sizes on the current device."""

def streaming_expert_ffn(
    *,
    expert_ids: int,
    expert_weights: int,
    x: int,
    x_stride: int,
    gate_up: int,
    down: int,
    h: int,
    out: int,
    counters: int,
    num_tokens: int,
    top_k: int,
    hidden: int,
    intermediate: int,
    stream: int,
) -> None:
    """Enqueue the experts of a few tokens, each for itself; see ``csrc/streaming_experts.h``."""

def streaming_linear_fits(in_features: int, out_features: int) -> bool:
    """Whether `streaming_linear` takes a layer of this size on the current device."""

def streaming_linear(
    *,
    x: int,
    x_stride: int,
    weight: int,
    out: int,
    num_tokens: int,
    in_features: int,
    out_features: int,
    stream: int,
) -> None:
    """Enqueue a linear layer of at most 16 tokens; see ``csrc/streaming_linear.h``."""

def prefill_attention_fits(
    num_heads: int, num_kv_heads: int, head_dim: int, block_size: int
) -> bool:
    """Whether `prefill_attention` takes these sizes."""

def prefill_attention(
    *,
    q: int,
    q_stride: int,
    q_weight: int,
    cos: int,
    sin: int,
    eps: float,
    k_cache: int,
    v_cache: int,
    block_tables: int,
    block_tables_stride: int,
    out: int,
    spans: int,
    tiles: int,
    num_tiles: int,
    num_rows: int,
    num_slots: int,
    scale: float,
    max_tiles: int,
    num_heads: int,
    num_kv_heads: int,
    block_size: int,
    stream: int,
) -> None:
    """Enqueue prefill attention; see ``csrc/prefill_attention.h``."""

def decode_attention_fits(
    num_heads: int, num_kv_heads: int, head_dim: int, block_size: int
) -> bool:
    """Whether `decode_attention` takes these sizes."""

def decode_attention(
    *,
    qkv: int,
    qkv_stride: int,
    qkv_part_stride: int,
    num_parts: int,
    q_weight: int,
    k_weight: int,
    cos: int,
    sin: int,
    positions: int,
    slots: int,
    k_cache: int,
    v_cache: int,
    block_tables: int,
    block_tables_stride: int,
    context_lens: int,
    out: int,
    eps: float,
    scale: float,
    num_sequences: int,
    num_heads: int,
    num_kv_heads: int,
    block_size: int,
    block_warps: int,
    max_shares: int,
    min_tokens: int,
    parts: int,
    stats: int,
    arrivals: int,
    stream: int,
) -> None:
    """Enqueue decode attention; see ``csrc/decode_attention.h``.

    Warps of a block: 0 for ``csrc/warp_decode.h``, else those of ``csrc/block_decode.h``.
    """

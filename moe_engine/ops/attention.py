"""Paged attention: the operator, and who attends to what on a GPU.

Shape legend: T tokens, S sequences, N query heads, G KV heads, D head dimension, B blocks,
L tokens a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe_engine.ops import cudnn_prefill, decode_attention, native, prefill_attention
from moe_engine.ops.linear import SplitSums
from moe_engine.ops.paged_batch import NeededRows, PagedBatch
from moe_engine.ops.prefill_attention import QueryPreparation
from moe_engine.ops.prefill_plan import Implementation, PrefillGroup, plan_prefills
from moe_engine.ops.reference import attention as reference
from moe_engine.ops.rope import RopeTable, norm_rope_write


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """Weights [D] and epsilon of the norms of query and key heads."""

    q_weight_D: torch.Tensor
    k_weight_D: torch.Tensor
    eps: float


def paged_attention(
    q_TND: torch.Tensor,
    cache: tuple[torch.Tensor, torch.Tensor],
    batch: PagedBatch,
    scale: float,
    own_kv_2TGD: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend causally to the cache, which already holds this step's keys and values; [T, N, D].

    On a GPU with Triton, decodes go to one kernel, and prefills to `prefill_attention` where that
    takes them, else to cuDNN or another kernel, as `plan_prefills` has it; nothing waits for the
    device. Elsewhere the reference does it all.
    A decode's output does not depend on the rest of the batch.

    Args:
        q_TND: float32, bfloat16 or float16, contiguous.
        cache: keys and values of one layer, each [B, L, G, D], contiguous, in the dtype of the
            queries or float8_e4m3fn.
        scale: positive factor on the scores, usually D ** -0.5.
        own_kv_2TGD: this step's keys and values once more, contiguous, which is where cuDNN reads
            them; without them no prefill goes to cuDNN.
    """
    k_cache_BLGD, v_cache_BLGD = cache
    assert q_TND.shape[1] % k_cache_BLGD.shape[2] == 0, (q_TND.shape, k_cache_BLGD.shape)
    assert q_TND.shape[2] == k_cache_BLGD.shape[3], (q_TND.shape, k_cache_BLGD.shape)
    assert batch.num_tokens == q_TND.shape[0], (batch.num_tokens, q_TND.shape)
    if not (q_TND.is_cuda and native.has_triton()):
        batch = batch.known()
        return reference.paged_attention(
            q_TND,
            k_cache_BLGD,
            v_cache_BLGD,
            batch.block_tables_SB,
            batch.context_lens_S,
            batch.rows,
            scale,
        )
    assert q_TND.is_contiguous(), q_TND.stride()
    assert k_cache_BLGD.is_contiguous(), k_cache_BLGD.stride()
    assert v_cache_BLGD.is_contiguous(), v_cache_BLGD.stride()
    with torch.cuda.device(q_TND.device):
        return _on_gpu(q_TND, cache, batch, scale, own_kv_2TGD)


def attend(
    qkv: torch.Tensor | SplitSums,
    norms: HeadNorms,
    rope: RopeTable,
    positions_T: torch.Tensor,
    cache: tuple[torch.Tensor, torch.Tensor],
    batch: PagedBatch,
    scale: float,
    needed: NeededRows | None = None,
) -> torch.Tensor:
    """`norm_rope_write`, then `paged_attention`; [R, N, D].

    In one launch where all decode: there a row's bits may depend on T, but not on the other rows.
    Where the projection is summed and all rows are needed, `prefill_attention` prepares its queries
    itself, to the same bits.

    Args:
        qkv: [T, X], or what is still to be summed to that.
        norms: the norms of query and key heads.
        needed: the R rows of the output that are needed; None: all T of them.
    """
    k_cache_BLGD = cache[0]
    on_gpu = k_cache_BLGD.is_cuda and native.has_triton()
    if on_gpu and needed is None and not batch.has_prefills:
        return _attend_decodes(qkv, norms, rope, positions_T, cache, batch, scale)
    parts, num_heads = _parts_and_heads(qkv, k_cache_BLGD)
    on_hopper = prefill_attention.takes(qkv.dtype, num_heads, k_cache_BLGD)
    if on_gpu and needed is None and on_hopper and isinstance(qkv, torch.Tensor):
        with torch.cuda.device(qkv.device):
            return _attend_on_hopper(qkv, norms, rope, positions_T, cache, batch, scale)
    own_kv_2TGD = None
    # Even if no prompt is for cuDNN: without them it is another kernel, yet to be compiled.
    if not on_hopper and cudnn_prefill.usable(qkv.dtype, num_heads, k_cache_BLGD):
        own_kv_2TGD = k_cache_BLGD.new_empty(2, parts.shape[-2], *k_cache_BLGD.shape[2:])
    q_TND = norm_rope_write(
        qkv, norms.q_weight_D, norms.k_weight_D, norms.eps, rope, positions_T, cache,
        batch.slots_T, own_kv_2TGD,
    )  # fmt: skip
    if needed is None:
        return paged_attention(q_TND, cache, batch, scale, own_kv_2TGD)
    if needed.as_decodes is not None:
        q_RND = q_TND.index_select(0, needed.rows_R)
        return paged_attention(q_RND, cache, needed.as_decodes, scale)
    out_TND = paged_attention(q_TND, cache, batch, scale, own_kv_2TGD)
    return out_TND.index_select(0, needed.rows_R)


def _parts_and_heads(
    qkv: torch.Tensor | SplitSums, k_cache_BLGD: torch.Tensor
) -> tuple[torch.Tensor, int]:
    """The projection, [T, X] or in parts [S, T, X], and how many of its heads are queries."""
    num_kv_heads, head_dim = k_cache_BLGD.shape[2:]
    parts = qkv.parts_STO if isinstance(qkv, SplitSums) else qkv
    return parts, parts.shape[-1] // head_dim - 2 * num_kv_heads


def _attend_decodes(
    qkv: torch.Tensor | SplitSums,
    norms: HeadNorms,
    rope: RopeTable,
    positions_T: torch.Tensor,
    cache: tuple[torch.Tensor, torch.Tensor],
    batch: PagedBatch,
    scale: float,
) -> torch.Tensor:
    """`attend` on a GPU where every sequence computes one position, in one launch."""
    k_cache_BLGD, v_cache_BLGD = cache
    parts, num_heads = _parts_and_heads(qkv, k_cache_BLGD)
    assert parts.stride(-1) == 1, parts.stride()
    assert k_cache_BLGD.is_contiguous(), k_cache_BLGD.stride()
    assert v_cache_BLGD.is_contiguous(), v_cache_BLGD.stride()
    launch = decode_attention.choose(parts, qkv.dtype, num_heads, k_cache_BLGD)
    if launch is not None:
        return decode_attention.decode_attention(
            launch,
            parts,
            (norms.q_weight_D, norms.k_weight_D),
            norms.eps,
            (rope.cos_PF, rope.sin_PF),
            positions_T,
            batch.slots_T,
            cache,
            batch.block_tables_SB,
            batch.context_lens_S,
            scale,
        )
    out_TND = parts.new_empty(parts.shape[-2], num_heads, k_cache_BLGD.shape[3], dtype=qkv.dtype)
    with torch.cuda.device(parts.device):
        _attend_raw_decodes(parts, norms, rope, positions_T, cache, batch, scale, out_TND)
    return out_TND


def _attend_raw_decodes(
    parts: torch.Tensor,
    norms: HeadNorms,
    rope: RopeTable,
    positions_S: torch.Tensor,
    cache: tuple[torch.Tensor, torch.Tensor],
    batch: PagedBatch,
    scale: float,
    out_SND: torch.Tensor,
) -> None:
    """The decodes, from the projection [S, X] or parts of it; writes their keys and values."""
    from moe_engine.kernels.launch import supports_pdl
    from moe_engine.kernels.paged_decode import paged_decode

    paged_decode(
        parts,
        *cache,
        batch.block_tables_SB,
        batch.context_lens_S,
        scale,
        out_SND,
        prepare=(
            norms.q_weight_D,
            norms.k_weight_D,
            rope.cos_PF,
            rope.sin_PF,
            positions_S,
            batch.slots_T,
        ),
        eps=norms.eps,
        use_pdl=supports_pdl(parts.device),
    )


def _attend_on_hopper(
    qkv_TX: torch.Tensor,
    norms: HeadNorms,
    rope: RopeTable,
    positions_T: torch.Tensor,
    cache: tuple[torch.Tensor, torch.Tensor],
    batch: PagedBatch,
    scale: float,
) -> torch.Tensor:
    """`attend` where `prefill_attention` takes the prefills; it prepares their queries itself."""
    num_kv_heads, head_dim = cache[0].shape[2:]
    q_width = qkv_TX.shape[1] - 2 * num_kv_heads * head_dim
    q_TND = qkv_TX[:, :q_width].unflatten(1, (-1, head_dim))
    out_TND = qkv_TX.new_empty(q_TND.shape)
    # Keys and values only. Those of decodes will be written once more, to the same bits: without
    # them the arrays would begin where Triton compiles another variant.
    norm_rope_write(
        qkv_TX[:, q_width:], norms.q_weight_D, norms.k_weight_D, norms.eps, rope, positions_T,
        cache, batch.slots_T,
    )  # fmt: skip
    # Behind that: a decode's context may have blocks that a prompt of this step fills.
    decodes = slice(batch.num_decodes)
    _attend_raw_decodes(
        qkv_TX[decodes], norms, rope, positions_T, cache, batch, scale, out_TND[decodes]
    )
    prefill_attention.prefill_attention(
        q_TND,
        cache,
        batch.block_tables_SB,
        batch.prefill_tiles(prefill_attention.tile_tokens(q_TND.shape[1], num_kv_heads)),
        scale,
        out_TND,
        QueryPreparation(norms.q_weight_D, norms.eps, rope.cos_PF, rope.sin_PF),
    )
    return out_TND


def _on_gpu(
    q_TND: torch.Tensor,
    cache: tuple[torch.Tensor, torch.Tensor],
    batch: PagedBatch,
    scale: float,
    own_kv_2TGD: torch.Tensor | None,
) -> torch.Tensor:
    num_heads, num_kv_heads = q_TND.shape[1], cache[0].shape[2]
    on_hopper = prefill_attention.takes(q_TND.dtype, num_heads, cache[0])
    if own_kv_2TGD is not None and not on_hopper and batch.num_decodes == 0:
        groups = batch.prefill_groups
        if len(groups) == 1 and groups[0].implementation is Implementation.CUDNN:
            return _by_cudnn(q_TND, own_kv_2TGD, groups[0], scale)
    out_TND = torch.empty_like(q_TND)
    _attend_prepared_decodes(q_TND, cache, batch, scale, out_TND)
    if not batch.has_prefills:
        return out_TND
    if on_hopper:
        prefill_attention.prefill_attention(
            q_TND,
            cache,
            batch.block_tables_SB,
            batch.prefill_tiles(prefill_attention.tile_tokens(num_heads, num_kv_heads)),
            scale,
            out_TND,
        )
    else:
        _by_groups(q_TND, cache, batch, scale, own_kv_2TGD, out_TND)
    return out_TND


def _attend_prepared_decodes(
    q_TND: torch.Tensor,
    cache: tuple[torch.Tensor, torch.Tensor],
    batch: PagedBatch,
    scale: float,
    out_TND: torch.Tensor,
) -> None:
    """The decodes, into their rows of ``out_TND``, from queries that are prepared."""
    from moe_engine.kernels.launch import supports_pdl
    from moe_engine.kernels.paged_decode import paged_decode

    paged_decode(
        q_TND[: batch.num_decodes],
        *cache,
        batch.block_tables_SB,
        batch.context_lens_S,
        scale,
        out_TND[: batch.num_decodes],
        use_pdl=supports_pdl(q_TND.device),
    )


def _by_cudnn(
    q_TND: torch.Tensor, own_kv_2TGD: torch.Tensor, group: PrefillGroup, scale: float
) -> torch.Tensor:
    own_k_TGD, own_v_TGD = own_kv_2TGD
    return cudnn_prefill.attend(
        q_TND, own_k_TGD, own_v_TGD, group.num_spans, group.padded_len, scale
    )


def _by_groups(
    q_TND: torch.Tensor,
    cache: tuple[torch.Tensor, torch.Tensor],
    batch: PagedBatch,
    scale: float,
    own_kv_2TGD: torch.Tensor | None,
    out_TND: torch.Tensor,
) -> None:
    """The prefills, into their rows of ``out_TND``, as `plan_prefills` has it."""
    from moe_engine.kernels.paged_prefill import paged_prefill

    assert batch.tiles is None, "these kernels need to know the prefills on the host"
    groups = (
        plan_prefills(batch.prefills, cudnn=False) if own_kv_2TGD is None else batch.prefill_groups
    )
    for group in groups:
        spans = batch.prefills[group.first : group.first + group.num_spans]
        if group.implementation is Implementation.CUDNN:
            assert own_kv_2TGD is not None
            rows = slice(spans[0].first_row, spans[-1].first_row + spans[-1].query_len)
            out_TND[rows] = _by_cudnn(q_TND[rows], own_kv_2TGD[:, rows], group, scale)
        else:
            paged_prefill(
                q_TND,
                *cache,
                batch.block_tables_SB,
                batch.context_lens_S,
                batch.query_starts_S,
                batch.num_decodes + group.first,
                [span.query_len for span in spans],
                scale,
                out_TND,
            )

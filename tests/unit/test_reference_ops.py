"""The torch references against independent, slower formulations."""

import math

import pytest
import torch

from moe_engine.config import RopeConfig
from moe_engine.ops.attention import HeadNorms, attend, paged_attention
from moe_engine.ops.linear import SplitSums
from moe_engine.ops.moe import expert_ffn, group_by_expert, norm_and_route, route, summed
from moe_engine.ops.paged_batch import PagedBatch
from moe_engine.ops.prefill_plan import PrefillSpan
from moe_engine.ops.reference.rope import apply_rope, rope_cos_sin, rope_frequencies
from moe_engine.ops.rope import RopeTable, norm_rope_write


def test_rope_rotates_each_pair_by_position_times_frequency():
    positions = torch.randint(0, 5000, (7,))
    x = torch.randn(7, 3, 8, dtype=torch.float64)
    frequencies, scale = rope_frequencies(RopeConfig(theta=1e4), 8)
    tables = rope_cos_sin(5000, frequencies, scale)
    cos, sin = (table[positions].double() for table in tables)
    rotated = torch.view_as_complex(torch.stack(apply_rope(x, cos, sin).chunk(2, dim=-1), dim=-1))
    for t, position in enumerate(positions.tolist()):
        for i in range(4):
            angle = torch.tensor(position, dtype=torch.float32) * frequencies[i]
            turn = complex(math.cos(angle), math.sin(angle))
            for n in range(3):
                expected = complex(x[t, n, i], x[t, n, i + 4]) * turn
                assert abs(complex(rotated[t, n, i]) - expected) < 1e-6


@pytest.mark.parametrize("factor", [2.0, 4.0, 40.0])
@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"truncate": False},
        {"beta_fast": 16.0},
        {"mscale": 0.7, "mscale_all_dim": 1.0},
        {"attention_factor": 1.3},
    ],
)
def test_yarn_matches_transformers(factor, extra):
    from transformers import Qwen3MoeConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {
        "rope_type": "yarn",
        "rope_theta": 1e5,
        "factor": factor,
        "original_max_position_embeddings": 256,
        **extra,
    }
    config = Qwen3MoeConfig(
        hidden_size=64,
        num_attention_heads=2,
        head_dim=32,
        max_position_embeddings=int(256 * factor),
        rope_parameters=parameters,
    )
    expected, expected_scale = ROPE_INIT_FUNCTIONS["yarn"](config)
    rope = RopeConfig(theta=1e5, factor=factor, original_max_position_embeddings=256, **extra)
    frequencies, scale = rope_frequencies(rope, 32)
    torch.testing.assert_close(frequencies, expected, rtol=1e-6, atol=0)
    assert scale == pytest.approx(expected_scale)


def naive_attention(q, k, v, context_len, scale):
    """One sequence, one query head at a time, in float64."""
    group = q.shape[1] // k.shape[1]
    out = torch.empty_like(q, dtype=torch.float64)
    for i in range(q.shape[0]):
        visible = context_len - q.shape[0] + i + 1
        for head in range(q.shape[1]):
            keys = k[:visible, head // group].double()
            scores = (keys @ q[i, head].double()) * scale
            out[i, head] = scores.softmax(0) @ v[:visible, head // group].double()
    return out


@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize(
    "lens", [[(1, 1)], [(5, 5)], [(1, 17), (1, 16), (4, 4), (3, 9)], [(2, 33), (16, 16)]]
)
def test_paged_attention_reads_own_blocks_causally(block_size, lens):
    heads, kv_heads, dim = 4, 2, 8
    num_blocks = sum(-(-context // block_size) for _, context in lens)
    order = torch.randperm(num_blocks).to(torch.int32)
    k_cache = torch.full((num_blocks, block_size, kv_heads, dim), math.nan)
    v_cache = torch.full_like(k_cache, math.nan)
    q = torch.randn(sum(n for n, _ in lens), heads, dim)
    tables = torch.full((len(lens), num_blocks), 10**9, dtype=torch.int32)
    spans, expected = [], []
    first_block = first_query = 0
    for index, (query_len, context_len) in enumerate(lens):
        blocks = order[first_block : first_block + -(-context_len // block_size)]
        first_block += len(blocks)
        k, v = torch.randn(2, context_len, kv_heads, dim)
        for position in range(context_len):
            where = blocks[position // block_size], position % block_size
            k_cache[where], v_cache[where] = k[position], v[position]
        own_q = q[first_query : first_query + query_len]
        expected.append(naive_attention(own_q, k, v, context_len, dim**-0.5))
        spans.append(PrefillSpan(first_query, query_len, context_len))
        first_query += query_len
        tables[index, : len(blocks)] = blocks
    num_decodes = sum(n == 1 for n, _ in lens)
    batch = PagedBatch(
        slots_T=torch.zeros(len(q), dtype=torch.int64),
        block_tables_SB=tables,
        context_lens_S=torch.tensor([context for _, context in lens], dtype=torch.int32),
        query_starts_S=torch.tensor([span.first_row for span in spans] + [len(q)]),
        num_decodes=num_decodes,
        prefills=tuple(spans[num_decodes:]),
    )
    out = paged_attention(q, (k_cache, v_cache), batch, dim**-0.5)
    torch.testing.assert_close(out.double(), torch.cat(expected), rtol=1e-4, atol=1e-5)


def test_paged_attention_of_no_tokens_is_empty_and_of_padding_is_zero():
    cache = (torch.full((2, 4, 1, 8), math.nan), torch.full((2, 4, 1, 8), math.nan))
    for num_rows in (0, 2):
        batch = PagedBatch(
            slots_T=torch.full((num_rows,), -1),
            block_tables_SB=torch.zeros(num_rows, 2, dtype=torch.int32),
            context_lens_S=torch.zeros(num_rows, dtype=torch.int32),
            query_starts_S=torch.arange(num_rows + 1, dtype=torch.int32),
            num_decodes=num_rows,
            prefills=(),
        )
        out = paged_attention(torch.randn(num_rows, 2, 8), cache, batch, 1.0)
        assert torch.equal(out, torch.zeros(num_rows, 2, 8))


@pytest.mark.parametrize("num_tokens", [0, 1, 7])
def test_norm_rope_write_prepares_queries_and_fills_the_cache(num_tokens):
    heads, kv_heads, dim, block_size, eps = 3, 2, 8, 4, 1e-6
    frequencies, scale = rope_frequencies(RopeConfig(theta=1e4), dim)
    rope = RopeTable(*rope_cos_sin(50, frequencies, scale))
    qkv = torch.randn(num_tokens, (heads + 2 * kv_heads) * dim)
    q_weight, k_weight = torch.randn(2, dim)
    positions = torch.randint(0, 50, (num_tokens,))
    slots = torch.randperm(5 * block_size)[:num_tokens]
    slots[3:4] = -1
    cache = (torch.zeros(5, block_size, kv_heads, dim), torch.zeros(5, block_size, kv_heads, dim))
    own_kv = torch.full((2, num_tokens, kv_heads, dim), math.nan)
    q = norm_rope_write(qkv, q_weight, k_weight, eps, rope, positions, cache, slots, own_kv)
    written_k, written_v = (part.flatten(0, 1) for part in cache)
    parts = qkv.unflatten(1, (-1, dim)).split([heads, kv_heads, kv_heads], dim=1)
    for t in range(num_tokens):
        turned = []
        for x, weight in ((parts[0][t], q_weight), (parts[1][t], k_weight)):
            normed = torch.nn.functional.rms_norm(x, (dim,), weight, eps)
            pairs = torch.complex(*normed.chunk(2, dim=-1))
            angles = positions[t] * frequencies
            pairs = pairs * torch.polar(torch.ones_like(angles), angles)
            turned.append(torch.cat((pairs.real, pairs.imag), dim=-1))
        torch.testing.assert_close(q[t], turned[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(own_kv[0, t], turned[1], rtol=1e-5, atol=1e-5)
        assert torch.equal(own_kv[1, t], parts[2][t])
        if slots[t] >= 0:
            assert torch.equal(written_k[slots[t]], own_kv[0, t])
            assert torch.equal(written_v[slots[t]], own_kv[1, t])
    untouched = [slot for slot in range(20) if slot not in slots.tolist()]
    assert not written_k[untouched].any()
    assert not written_v[untouched].any()


@pytest.mark.parametrize("normalize", [True, False])
def test_router_weights_are_the_largest_softmax_probabilities(normalize):
    x, router = torch.randn(9, 12), torch.randn(16, 12)
    logits = x.double() @ router.double().t()
    ids, weights = route(x, router, 4, normalize)
    assert ids.dtype == torch.int32
    for t in range(9):
        exps = [math.exp(x) for x in logits[t].tolist()]
        best = sorted(range(16), key=lambda e: -exps[e])[:4]
        assert ids[t].tolist() == best
        whole = sum(exps[e] for e in best) if normalize else sum(exps)
        for k, e in enumerate(best):
            assert weights[t, k].item() == pytest.approx(exps[e] / whole, rel=1e-5)


def test_router_gives_padding_rows_no_expert():
    x, router = torch.randn(5, 12), torch.randn(16, 12)
    all_ids, all_weights = route(x, router, 4, True)
    ids, weights = route(x, router, 4, True, torch.tensor([3], dtype=torch.int32))
    assert torch.equal(ids[:3], all_ids[:3])
    assert torch.equal(weights[:3], all_weights[:3])
    assert (ids[3:] == -1).all()
    assert not weights[3:].any()


@pytest.mark.parametrize("num_rows", [0, 1, 50])
def test_group_by_expert_sorts_the_pairs_and_drops_negative_ids(num_rows):
    ids = torch.randint(-1, 6, (num_rows, 3), dtype=torch.int32)
    groups = group_by_expert(ids, 7)
    flat = ids.flatten().tolist()
    assert groups.offsets_E1.shape == (8,)
    for expert in range(7):
        first, last = groups.offsets_E1[expert : expert + 2].tolist()
        assert groups.pairs_P[first:last].tolist() == [
            pair for pair, chosen in enumerate(flat) if chosen == expert
        ]
    assert groups.offsets_E1[-1] == sum(chosen >= 0 for chosen in flat)


def naive_ffn(x, ids, weights, gate_up, down):
    out = torch.zeros(x.shape, dtype=torch.float64)
    for r in range(x.shape[0]):
        for k in range(ids.shape[1]):
            if ids[r, k] >= 0:
                gate, up = (gate_up[ids[r, k]].double() @ x[r].double()).chunk(2)
                y = down[ids[r, k]].double() @ (torch.nn.functional.silu(gate) * up)
                out[r] += weights[r, k].double() * y
    return out


@pytest.mark.parametrize("rows", [0, 1, 7, 64])
@pytest.mark.parametrize("routing", ["random", "one expert", "mostly elsewhere", "all elsewhere"])
def test_expert_ffn_sums_the_weighted_local_experts(rows, routing):
    experts, hidden, width, top_k = 5, 12, 6, 3
    gate_up = torch.randn(experts, 2 * width, hidden)
    down = torch.randn(experts, hidden, width)
    x = torch.randn(rows, hidden)
    ids = (
        torch.stack([torch.randperm(experts)[:top_k] for _ in range(rows)]).to(torch.int32)
        if rows
        else torch.empty(0, top_k, dtype=torch.int32)
    )
    if routing == "one expert":
        ids = torch.full_like(ids, -1)
        ids[:, 1] = 2
    elif routing == "mostly elsewhere":
        ids = torch.where(torch.rand(ids.shape) < 0.8, -1, ids)
    elif routing == "all elsewhere":
        ids = torch.full_like(ids, -1)
    weights = torch.rand(rows, top_k)
    out = summed(expert_ffn(x, ids, weights, gate_up, down))
    expected = naive_ffn(x, ids.long(), weights, gate_up, down)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_parts", [None, 1, 4])
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_norm_and_route_is_an_addition_a_norm_and_a_router(rows, num_parts):
    shape = (rows, 16)
    x = torch.randn(shape if num_parts is None else (num_parts, *shape))
    residual, weight, router = torch.randn(shape), torch.randn(16), torch.randn(6, 16)
    sums = x if num_parts is None else SplitSums(x, torch.float32)
    num_tokens = torch.tensor([max(rows - 2, 0)], dtype=torch.int32)
    normed, total, ids, weights = norm_and_route(
        sums, residual, weight, 1e-6, router, 3, True, num_tokens
    )
    expected_total = residual + (x if num_parts is None else x.sum(0))
    torch.testing.assert_close(total, expected_total)
    expected = torch.nn.functional.rms_norm(expected_total, (16,), weight, 1e-6)
    torch.testing.assert_close(normed, expected, rtol=1e-5, atol=1e-5)
    expected_ids, expected_weights = route(normed, router, 3, True, num_tokens)
    assert torch.equal(ids, expected_ids)
    assert torch.equal(weights, expected_weights)


def test_attend_prepares_before_it_attends():
    """Two decodes, a padding row and a prompt of three, from a projection in parts."""
    heads, kv_heads, dim, block_size = 4, 2, 8, 4
    rope = RopeTable(*rope_cos_sin(50, *rope_frequencies(RopeConfig(theta=1e4), dim)))
    parts = torch.randn(3, 6, (heads + 2 * kv_heads) * dim)
    norms = HeadNorms(*torch.randn(2, dim), 1e-6)
    batch = PagedBatch(
        slots_T=torch.tensor([5, 9, -1, 16, 17, 18]),
        block_tables_SB=torch.tensor([[0, 1], [2, 0], [0, 0], [4, 0]], dtype=torch.int32),
        context_lens_S=torch.tensor([6, 2, 0, 3], dtype=torch.int32),
        query_starts_S=torch.tensor([0, 1, 2, 3, 6], dtype=torch.int32),
        num_decodes=3,
        prefills=(PrefillSpan(3, 3, 3),),
    )
    positions = torch.tensor([5, 1, 0, 0, 1, 2])
    caches = [torch.randn(2, 6, block_size, kv_heads, dim) for _ in range(2)]
    caches[1].copy_(caches[0])
    out = attend(
        SplitSums(parts, torch.float32), norms, rope, positions, tuple(caches[0]), batch, 0.5
    )
    q = norm_rope_write(
        parts[0] + parts[1] + parts[2], norms.q_weight_D, norms.k_weight_D, norms.eps, rope,
        positions, tuple(caches[1]), batch.slots_T,
    )  # fmt: skip
    assert torch.equal(caches[0], caches[1])
    assert torch.equal(out, paged_attention(q, tuple(caches[1]), batch, 0.5))

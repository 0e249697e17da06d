"""The torch references against independent, slower formulations."""

import math

import pytest
import torch

from moe_engine.config import RopeConfig
from moe_engine.ops.attention import PagedBatch, paged_attention
from moe_engine.ops.moe import expert_ffn, route
from moe_engine.ops.reference.rope import apply_rope, rope_cos_sin, rope_frequencies


def test_rope_rotates_each_pair_by_position_times_frequency():
    positions = torch.randint(0, 5000, (7,))
    x = torch.randn(7, 3, 8, dtype=torch.float64)
    frequencies, scale = rope_frequencies(RopeConfig(theta=1e4), 8)
    cos, sin = rope_cos_sin(positions, frequencies, scale, torch.float64)
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
    "lens", [[(1, 1)], [(5, 5)], [(1, 17), (4, 4), (3, 9), (1, 16)], [(2, 33), (16, 16)]]
)
def test_paged_attention_reads_own_blocks_causally(block_size, lens):
    heads, kv_heads, dim = 4, 2, 8
    num_blocks = sum(-(-context // block_size) for _, context in lens)
    order = torch.randperm(num_blocks)
    k_cache = torch.full((num_blocks, block_size, kv_heads, dim), math.nan)
    v_cache = torch.full_like(k_cache, math.nan)
    q = torch.randn(sum(n for n, _ in lens), heads, dim)
    tables, slots, new_k, new_v, expected = [], [], [], [], []
    first_block = first_query = 0
    for query_len, context_len in lens:
        blocks = order[first_block : first_block + -(-context_len // block_size)]
        first_block += len(blocks)
        k, v = torch.randn(2, context_len, kv_heads, dim)
        for position in range(context_len - query_len):
            where = blocks[position // block_size], position % block_size
            k_cache[where], v_cache[where] = k[position], v[position]
        for position in range(context_len - query_len, context_len):
            slots.append(int(blocks[position // block_size]) * block_size + position % block_size)
        new_k.append(k[context_len - query_len :])
        new_v.append(v[context_len - query_len :])
        own_q = q[first_query : first_query + query_len]
        expected.append(naive_attention(own_q, k, v, context_len, dim**-0.5))
        first_query += query_len
        tables.append(blocks)
    batch = PagedBatch(torch.tensor(slots), tables, [n for n, _ in lens], [c for _, c in lens])
    out = paged_attention(
        q, torch.cat(new_k), torch.cat(new_v), (k_cache, v_cache), batch, dim**-0.5
    )
    torch.testing.assert_close(out.double(), torch.cat(expected), rtol=1e-4, atol=1e-5)


def test_paged_attention_of_no_tokens_is_empty():
    cache = (torch.zeros(2, 4, 1, 8), torch.zeros(2, 4, 1, 8))
    batch = PagedBatch(torch.empty(0, dtype=torch.int64), [], [], [])
    empty = torch.empty(0, 2, 8)
    assert paged_attention(empty, empty[:, :1], empty[:, :1], cache, batch, 1.0).shape == (0, 2, 8)


@pytest.mark.parametrize("normalize", [True, False])
def test_router_weights_are_the_largest_softmax_probabilities(normalize):
    logits = torch.randn(9, 16) * 3
    ids, weights = route(logits, 4, normalize)
    assert ids.dtype == torch.int32
    for t in range(9):
        exps = [math.exp(x) for x in logits[t].double().tolist()]
        best = sorted(range(16), key=lambda e: -exps[e])[:4]
        assert ids[t].tolist() == best
        whole = sum(exps[e] for e in best) if normalize else sum(exps)
        for k, e in enumerate(best):
            assert weights[t, k].item() == pytest.approx(exps[e] / whole, rel=1e-5)


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
    out = expert_ffn(x, ids, weights, gate_up, down)
    expected = naive_ffn(x, ids.long(), weights, gate_up, down)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4)

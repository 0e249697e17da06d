"""Tensors of more than 2^31 elements, on a GPU with room for them.

Beside each kernel's own tests there are more of this kind, with rows that lie far apart in memory
that is hardly touched: `test_norm`, `test_router`, `test_greedy`, `test_hash_fill`; and with the
last blocks of a large KV cache: `test_norm_rope`, `test_paged_decode`, `test_paged_prefill`.

Legend: R rows, K choices of a row, P = R * K pairs, E experts, H hidden size, I intermediate size.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from moe_engine.ops import attention, decode_attention, hopper, moe, norm, rope
from moe_engine.ops.decode import DecodeInputs, append_tokens, prepare_decode
from moe_engine.ops.expert_counts import expert_token_counts
from moe_engine.ops.reference import norm as norm_reference
from moe_engine.ops.reference import rope as rope_reference
from moe_engine.ops.sampling import greedy_tokens
from tests.hopper_device import need_hopper
from tests.kernels.close import check_rows
from tests.kernels.decode_cases import LAUNCHES, Decode
from tests.kernels.hopper_cases import TILES
from tests.kernels.paged import expected, make_case
from tests.kernels.test_expert_ffn import Case, check
from tests.kernels.triton_device import HAS_TRITON

GIB = 1 << 30
LIMIT = 2**31
BF16 = torch.bfloat16
EPS = 1e-6


def has_room() -> bool:
    return torch.cuda.is_available() and torch.cuda.mem_get_info()[1] >= 40 * GIB


pytestmark = pytest.mark.skipif(
    not HAS_TRITON or not has_room(), reason="needs an NVIDIA GPU with 40 GiB, and triton"
)


@pytest.fixture(autouse=True)
def memory_of_its_own() -> Iterator[None]:
    yield
    gc.collect()
    torch.cuda.empty_cache()


def far_apart(rows: torch.Tensor, stride: int = 2**30) -> torch.Tensor:
    """A copy whose rows begin ``stride`` elements apart."""
    num_rows, width = rows.shape
    storage = torch.empty((num_rows - 1) * stride + width, dtype=rows.dtype, device="cuda")
    apart = storage.as_strided((num_rows, width), (stride, 1))
    apart.copy_(rows)
    return apart


def run(name: str, case: Case) -> torch.Tensor:
    """By one of the implementations of the experts."""
    num_pairs = case.slot_ids_RK.numel()
    return moe.summed(moe.EXPERT_FFNS[name](*vars(case).values(), num_pairs))


class TestExperts:
    """Weights, rows and outputs, in every implementation."""

    NUM_EXPERTS, HIDDEN, INTERMEDIATE = 352, 4096, 1536

    @pytest.fixture(scope="class")
    def weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Experts of more than 2^31 elements in each of the two tensors."""
        shape = (self.NUM_EXPERTS, self.HIDDEN, self.INTERMEDIATE)
        doubled = (self.NUM_EXPERTS, 2 * self.INTERMEDIATE, self.HIDDEN)
        gate_up_EJH = torch.empty(doubled, dtype=BF16, device="cuda").normal_(std=1 / 64)
        down_EHI = torch.empty(shape, dtype=BF16, device="cuda").normal_(std=1 / 45)
        assert min(gate_up_EJH.numel(), down_EHI.numel()) > LIMIT
        return gate_up_EJH, down_EHI

    @pytest.mark.parametrize("name", list(moe.EXPERT_FFNS))
    @pytest.mark.parametrize("num_rows", [1, 6])
    def test_weights(
        self, weights: tuple[torch.Tensor, torch.Tensor], name: str, num_rows: int
    ) -> None:
        if name in ("grouped", "streaming"):
            need_hopper()
        x_RH = torch.randn(num_rows, self.HIDDEN, device="cuda").to(BF16)
        last = self.NUM_EXPERTS - 1
        ids_RK = torch.tensor([[last, 0, last - 1, 130]], dtype=torch.int32, device="cuda")
        ids_RK = torch.cat([ids_RK.roll(row, 1) for row in range(num_rows)]).contiguous()
        case = Case(x_RH, ids_RK, torch.rand(num_rows, 4, device="cuda"), *weights)
        check(run(name, case), case)

    @pytest.mark.parametrize("tile", TILES)
    def test_weights_at_every_tile(
        self, weights: tuple[torch.Tensor, torch.Tensor], tile: int
    ) -> None:
        need_hopper()
        x_RH = torch.randn(2, self.HIDDEN, device="cuda").to(BF16)
        ids_RK = torch.tensor([[self.NUM_EXPERTS - 1], [129]], dtype=torch.int32, device="cuda")
        groups = moe.group_by_expert(ids_RK, self.NUM_EXPERTS)
        y_PH = hopper.grouped_expert_ffn(
            x_RH, ids_RK, (groups.offsets_E1, groups.pairs_P), *weights, tile
        )
        case = Case(x_RH, ids_RK, torch.ones(2, 1, device="cuda"), *weights)
        check_rows(y_PH, case.expected())

    @pytest.mark.parametrize("name", ["triton", "grouped", "streaming"])
    def test_rows_far_apart(self, name: str) -> None:
        if name != "triton":
            need_hopper()
        case = Case.random(3, 4, 8, 512, 256, BF16)
        apart = replace(case, x_RH=far_apart(case.x_RH))
        assert apart.x_RH[2].data_ptr() - apart.x_RH.data_ptr() >= LIMIT
        out_RH = run(name, apart)
        assert torch.equal(out_RH, run(name, case))
        check(out_RH, case)

    @pytest.mark.parametrize(("hidden", "intermediate"), [(2048, 64), (64, 2048)])
    def test_outputs_and_what_lies_between_the_products(
        self, hidden: int, intermediate: int
    ) -> None:
        need_hopper()
        num_rows = 140_000
        case = Case.random(num_rows, 8, 4, hidden, intermediate, BF16)
        assert num_rows * 8 * max(hidden, intermediate) > LIMIT
        out_RH = run("grouped", case)
        for some in (slice(0, 50), slice(num_rows - 50, num_rows)):
            check(out_RH[some], case.rows(some))

    def test_rows_of_a_linear_layer_far_apart(self) -> None:
        need_hopper()
        x_RX = torch.randn(3, 512, device="cuda").to(BF16)
        weight_OX = torch.randn(100, 512, device="cuda").to(BF16)
        apart = far_apart(x_RX)
        assert hopper.takes_linear(apart, weight_OX)
        assert torch.equal(hopper.linear(apart, weight_OX), hopper.linear(x_RX, weight_OX))

    def test_rows_of_a_split_linear_layer_far_apart(self) -> None:
        need_hopper()
        x_RX = torch.randn(17, 1024, device="cuda").to(BF16)
        weight_OX = (torch.randn(104, 1024, device="cuda") / 32).to(BF16)
        apart = far_apart(x_RX, stride=2**27)
        assert apart[-1].storage_offset() >= LIMIT
        assert hopper.takes_split_linear(apart, weight_OX)
        parts_SRO = hopper.split_linear(apart, weight_OX)
        assert torch.equal(parts_SRO, hopper.split_linear(x_RX, weight_OX))
        check_rows(parts_SRO.sum(0).to(BF16), x_RX.float() @ weight_OX.float().t())


class TestRows:
    """Norms and sums over more than 2^20 rows of 2048."""

    NUM_ROWS, HIDDEN = 2**20 + 5, 2048
    SOME = (slice(0, 3), slice(NUM_ROWS - 3, NUM_ROWS))

    def randn(self) -> torch.Tensor:
        x_RH = torch.empty(self.NUM_ROWS, self.HIDDEN, dtype=BF16, device="cuda").normal_()
        assert x_RH.numel() > LIMIT
        return x_RH

    def test_norms(self) -> None:
        x_RH, residual_RH = self.randn(), self.randn()
        weight_H = torch.randn(self.HIDDEN, device="cuda").to(BF16)
        close = {"rtol": 1e-2, "atol": 1e-2}
        normed = norm.rms_norm(x_RH, weight_H, EPS)
        for some in self.SOME:
            expected_RH = norm_reference.rms_norm(x_RH[some], weight_H, EPS)
            torch.testing.assert_close(normed[some], expected_RH, **close)
        del normed
        found = norm.add_rms_norm(x_RH, residual_RH, weight_H, EPS)
        for some in self.SOME:
            references = norm_reference.add_rms_norm(x_RH[some], residual_RH[some], weight_H, EPS)
            for ours, theirs in zip(found, references, strict=True):
                torch.testing.assert_close(ours[some], theirs, **close)

    def test_sums(self) -> None:
        y_PH, residual_RH = self.randn(), self.randn()
        ids_RK = torch.zeros(self.NUM_ROWS, 1, dtype=torch.int32, device="cuda")
        weights_RK = torch.rand(self.NUM_ROWS, 1, device="cuda")
        weight_H = torch.randn(self.HIDDEN, device="cuda").to(BF16)
        summed = moe.sum_choices(y_PH, ids_RK, weights_RK)
        for some in self.SOME:
            assert torch.equal(summed[some], (y_PH[some] * weights_RK[some]).to(BF16))
        del summed
        outputs = moe.ExpertOutputs(y_PH, ids_RK, weights_RK)
        fused = moe.sum_add_rms_norm(outputs, residual_RH, weight_H, EPS)
        for some in self.SOME:
            few = moe.ExpertOutputs(y_PH[some], ids_RK[some], weights_RK[some])
            alone = moe.sum_add_rms_norm(few, residual_RH[some], weight_H, EPS)
            for ours, theirs in zip(fused, alone, strict=True):
                assert torch.equal(ours[some], theirs)


def test_logits_of_more_rows_than_there_are_counters() -> None:
    num_rows, vocab_size = 16_400, 131_072
    logits_BV = torch.empty(num_rows, vocab_size, dtype=BF16, device="cuda").normal_()
    assert logits_BV.numel() > LIMIT
    best_B = torch.randint(vocab_size, (num_rows,), device="cuda")
    for rows_BV, tokens_B in zip(logits_BV.split(1024), best_B.split(1024), strict=True):
        rows_BV.scatter_(1, tokens_B[:, None], 20.0)
    assert torch.equal(greedy_tokens(logits_BV), best_B)


def test_expert_ids() -> None:
    num_tokens, top_k, num_experts = 2**28 + 1, 8, 128
    ids_TK = torch.full((num_tokens, top_k), -1, dtype=torch.int32, device="cuda")
    assert ids_TK.numel() > LIMIT
    ids_TK[0], ids_TK[-1] = 5, 127
    counts_E = expert_token_counts(ids_TK, num_experts)
    assert counts_E[5] == counts_E[127] == counts_E.sum() / 2 == top_k


def test_projected_heads_far_apart() -> None:
    heads, kv_heads, head_dim = 4, 1, 128
    qkv_TX = torch.randn(3, (heads + 2 * kv_heads) * head_dim, device="cuda").to(BF16)
    weights = [torch.rand(head_dim, device="cuda").to(BF16) for _ in "qk"]
    angles = torch.rand(8, head_dim // 2, device="cuda")
    table = rope.RopeTable(angles.cos(), angles.sin())
    positions_T = torch.arange(3, device="cuda")
    cache = [torch.zeros(1, 16, kv_heads, head_dim, dtype=BF16, device="cuda") for _ in "kv"]
    far_cache = [tensor.clone() for tensor in cache]
    rest = (*weights, EPS, table, positions_T)
    q_TND = rope.norm_rope_write(far_apart(qkv_TX), *rest, tuple(far_cache), positions_T)
    tables = (table.cos_PF, table.sin_PF)
    expected_TND = rope_reference.norm_rope_write(
        qkv_TX, *weights, EPS, tables, positions_T, *cache, positions_T
    )
    torch.testing.assert_close(q_TND, expected_TND, rtol=2**-7, atol=2**-5)
    for ours, theirs in zip(far_cache, cache, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=2**-5)


@pytest.mark.parametrize("contexts", [[0, 1, 3000], [262_144, 5]])
def test_far_blocks_and_the_longest_context_by_the_cuda_kernels(contexts: list[int]) -> None:
    """Past 2^31 elements in the projection, where its last row lies, and in the cache."""
    need_hopper()
    decode = Decode.random(contexts, 32, 4)
    qkv_SX = torch.randn(len(contexts), decode.width).to(BF16)
    case_cache = decode.case.cache
    near = case_cache[0].shape[0]
    num_blocks = LIMIT // case_cache[0][0].numel() + near
    far = [torch.empty(num_blocks, *t.shape[1:], dtype=BF16, device="cuda") for t in case_cache]
    for tensor, original in zip(far, case_cache, strict=True):
        tensor[-near:] = original.cuda()
    arguments = decode.arguments((far[0], far[1]), block_shift=num_blocks - near)
    apart = far_apart(qkv_SX, stride=LIMIT // (len(contexts) - 1))
    assert apart[-1].storage_offset() >= LIMIT
    outputs = [
        decode_attention.decode_attention(launch, apart, **arguments).cpu() for launch in LAUNCHES
    ]
    expected_SND = decode.expected(qkv_SX)
    for out_SND in outputs:
        check_rows(out_SND.flatten(0, 1), expected_SND.flatten(0, 1))


def test_sequence_table() -> None:
    """The last slots of a table of more than 2^31 tokens and as many block ids."""
    num_slots, longest = 2**14 + 2, 2**17
    tokens_NC = torch.zeros(num_slots, longest, dtype=torch.int32, device="cuda")
    blocks_NB = torch.zeros(num_slots, longest, dtype=torch.int32, device="cuda")
    assert tokens_NC.numel() > LIMIT
    slots_S = torch.tensor([num_slots - 1, -1, 0], dtype=torch.int32, device="cuda")
    positions_S = torch.tensor([longest - 2, 0, 1], dtype=torch.int32, device="cuda")
    tokens_NC[-1, longest - 2], tokens_NC[0, 1] = 41, 42
    blocks_NB[-1, longest - 2], blocks_NB[0, 1] = 51, 52
    out = DecodeInputs.empty(3, longest, slots_S.device)
    prepare_decode(slots_S, positions_S, tokens_NC, blocks_NB, 1, out)
    assert out.token_ids_S.tolist() == [41, 0, 42]
    assert out.cache_slots_S.tolist() == [51, -1, 52]
    assert out.context_lens_S.tolist() == [longest - 1, 0, 2]
    assert out.block_tables_SB[0, longest - 2] == 51
    sampled_S = torch.tensor([7, 8, 9], device="cuda")
    append_tokens(slots_S, out.context_lens_S, sampled_S, tokens_NC)
    assert tokens_NC[-1, -1] == 7
    assert tokens_NC[0, 2] == 9
    assert tokens_NC.count_nonzero() == 4


QWEN3 = {"num_heads": 32, "num_kv_heads": 4, "head_dim": 128, "dtype": BF16, "device": "cuda"}


@pytest.mark.parametrize("lens", [[(1, 3000), (1, 1), (1, 0)], [(1, 40), (70, 300)]])
def test_far_blocks_of_a_kv_cache(lens: list[tuple[int, int]]) -> None:
    """By the operator, through all that reads the cache."""
    case = make_case(lens, **QWEN3)
    near = case.cache[0].shape[0]
    num_blocks = LIMIT // case.cache[0][0].numel() + near
    far = [torch.empty(num_blocks, *t.shape[1:], dtype=BF16, device="cuda") for t in case.cache]
    for tensor, original in zip(far, case.cache, strict=True):
        tensor[-near:] = original
    shift = num_blocks - near
    slots_T = case.batch.slots_T
    batch = replace(
        case.batch,
        block_tables_SB=case.batch.block_tables_SB + shift,
        slots_T=torch.where(slots_T >= 0, slots_T + shift * 16, slots_T),
    )
    out_TND = attention.paged_attention(case.q_TND, (far[0], far[1]), batch, case.scale)
    check_rows(out_TND.flatten(0, 1), expected(case).flatten(0, 1))


@pytest.mark.parametrize("lens", [[(1, 262_144), (1, 5)], [(33, 262_144)]])
def test_longest_contexts(lens: list[tuple[int, int]]) -> None:
    case = make_case(lens, **QWEN3)
    out_TND = attention.paged_attention(case.q_TND, case.cache, case.batch, case.scale)
    check_rows(out_TND.flatten(0, 1), expected(case).flatten(0, 1))

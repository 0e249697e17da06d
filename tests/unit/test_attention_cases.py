"""The attention benchmarks check what they time, with operators that are right and wrong ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from benchmarks import attention_cases as cases
from benchmarks import bench_attention
from moe_engine.ops import cudnn_prefill, prefill_attention
from moe_engine.ops.attention import attend, paged_attention
from moe_engine.ops.rope import norm_rope_write

LENS = [(1, 5), (1, 70), (40, 40), (9, 33)]


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch.manual_seed(0)
    monkeypatch.setattr(cases, "DEVICE", "cpu")
    monkeypatch.setattr(cases, "NUM_BLOCKS", 64)
    monkeypatch.setattr(cases, "NUM_POSITIONS", 128)
    heads = cases.NUM_HEADS, cases.NUM_KV_HEADS
    yield
    cases.set_heads(*heads)


@pytest.mark.parametrize("heads", [(32, 4), (6, 2), (3, 3)])
def test_attention_that_is_right_is_close_and_any_row_that_is_not_counts(
    heads: tuple[int, int],
) -> None:
    cases.set_heads(*heads)
    cache, inputs = cases.make_cache(), cases.make_inputs(LENS)
    out_TND = paged_attention(inputs.q_TND, cache, inputs.batch, cases.SCALE)
    cases.check("attention", cases.worst_difference(inputs, cache, out_TND))
    for row in (0, 1, 2, len(out_TND) - 1):
        for wrong in (out_TND + 1, out_TND * float("nan")):
            one_wrong = out_TND.clone()
            one_wrong[row] = wrong[row]
            with pytest.raises(SystemExit, match="attention is off"):
                cases.check("attention", cases.worst_difference(inputs, cache, one_wrong))


@pytest.mark.parametrize("lens", [[(1, 5), (1, 70)], LENS])
def test_attention_from_the_projection_on_is_checked_with_what_it_caches(
    lens: list[tuple[int, int]],
) -> None:
    cache, inputs = cases.make_cache(), cases.make_inputs(lens)
    (new,) = cases.make_projections([inputs])
    batch = inputs.batch

    def right() -> torch.Tensor:
        return attend(new.qkv_TX, new.norms, new.rope, new.positions_T, cache, batch, cases.SCALE)

    def wrong_output() -> torch.Tensor:
        return -right()

    def wrong_key() -> torch.Tensor:
        out_TND = right()
        cache[0].flatten(0, 1)[batch.slots_T[1]] += 1
        return out_TND

    assert cases.check_attend("right", inputs, new, cache, right) < cases.TOLERANCE
    for run in (wrong_output, wrong_key, lambda: torch.zeros_like(inputs.q_TND)):
        with pytest.raises(SystemExit, match=r"attend.* is off"):
            cases.check_attend("attend", inputs, new, cache, run)


def test_a_steps_tokens_stand_at_the_ends_of_their_contexts() -> None:
    positions = cases.make_inputs([(1, 5), (1, 70), (3, 3), (2, 33)]).positions_T
    assert positions.tolist() == [4, 69, 0, 1, 2, 31, 32]


def test_preparation_is_checked_with_what_it_caches() -> None:
    cases.set_heads(6, 2)
    cache = cases.make_cache()
    (new,) = cases.make_token_projections(7, 1)
    slots_T = torch.randperm(64 * cases.BLOCK_SIZE)[:7]

    def right() -> torch.Tensor:
        return norm_rope_write(
            new.qkv_TX, new.norms.q_weight_D, new.norms.k_weight_D, new.norms.eps, new.rope,
            new.positions_T, cache, slots_T,
        )  # fmt: skip

    kept = right()
    wrong: list[Callable[[], torch.Tensor]] = [lambda: right() + 1, lambda: kept]
    assert cases.check_preparation("right", new, slots_T, cache, right) == 0
    for run in wrong:
        with pytest.raises(SystemExit, match=r"prepared.* is off"):
            cases.check_preparation("prepared", new, slots_T, cache, run)


def test_heads_that_cannot_be_shared_out_are_refused() -> None:
    for heads in ((6, 4), (4, 0), (0, 1)):
        with pytest.raises(ValueError, match="no multiple"):
            cases.set_heads(*heads)
    cases.set_heads(64, 4)
    assert cases.projection_width() == 72 * 128
    assert cases.token_bytes(2) == 2 * 4 * 128 * 2


# Where the benchmark finds what it times; the middle two write where their last argument is.
PREFILL_KERNELS = {
    "operator": (bench_attention, "paged_attention"),
    "triton": (bench_attention, "paged_prefill"),
    "hopper": (prefill_attention, "prefill_attention"),
    "cudnn": (cudnn_prefill, "attend"),
}


def timed_prefills(
    monkeypatch: pytest.MonkeyPatch,
    lens: list[tuple[int, int]],
    on_hopper: bool = True,
    wrong: str = "",
) -> list[str]:
    """The kernels that the benchmark times for a step; all but ``wrong`` are the reference."""
    cache, inputs = cases.make_cache(), cases.make_inputs(lens)
    right_TND = paged_attention(inputs.q_TND, cache, inputs.batch, cases.SCALE)

    def stand_in(kernel: str) -> Callable[..., torch.Tensor]:
        out_TND = -right_TND if kernel == wrong else right_TND
        if kernel in ("triton", "hopper"):
            return lambda *arguments: arguments[-1].copy_(out_TND)
        return lambda *arguments: out_TND

    with monkeypatch.context() as patch:
        for kernel, (module, function) in PREFILL_KERNELS.items():
            patch.setattr(module, function, stand_in(kernel))
        patch.setattr(prefill_attention, "takes", lambda *_: on_hopper)
        patch.setattr(cases, "make_inputs", lambda _: inputs)
        patch.setattr(bench_attention, "seconds_per_call", lambda calls: 2e-6)
        rows = bench_attention.prefill_rows("step", lens, cache, None)
    return [row["kernel"].removeprefix("prefill, ") for row in rows]


def test_every_kernel_that_takes_a_prefill_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, chunk = [(40, 40)] * 2, [(40, 70)]
    assert set(timed_prefills(monkeypatch, prompts)) == PREFILL_KERNELS.keys()
    assert timed_prefills(monkeypatch, chunk) == ["operator", "triton", "hopper"]
    assert timed_prefills(monkeypatch, chunk, on_hopper=False) == ["operator", "triton"]


@pytest.mark.parametrize("wrong", PREFILL_KERNELS)
def test_a_wrong_prefill_is_not_timed(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="attention is off"):
        timed_prefills(monkeypatch, [(40, 40)], wrong=wrong)


def test_a_prefill_from_the_projection_on_is_timed_if_it_is_right(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bench_attention, "seconds_per_call", lambda calls: 2e-6)
    row = bench_attention.prepared_prefill_row("step", LENS[2:], cases.make_cache())
    assert row["us"] == 2
    monkeypatch.setattr(bench_attention, "attend", lambda *arguments: -attend(*arguments))
    with pytest.raises(SystemExit, match="prefill is off"):
        bench_attention.prepared_prefill_row("step", LENS[2:], cases.make_cache())

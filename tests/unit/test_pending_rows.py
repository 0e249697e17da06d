"""Rows that the norm behind them makes: who takes them, and how the exchange hands them out."""

import random
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from moe_engine.checkpoint.dummy import fill_dummy
from moe_engine.dist.exchange.base import Received
from moe_engine.dist.exchange.domain import ExchangeShape
from moe_engine.dist.exchange.local import LocalExchange
from moe_engine.dist.exchange.nvlink import NvlinkExchange
from moe_engine.layers.norm import RMSNorm
from moe_engine.ops import native
from moe_engine.ops.moe import summed
from moe_engine.ops.norm import PendingRows, add_rms_norm
from tests.unit.runner_world import ALL_KINDS, RunnerWorld, mixed_requests

HIDDEN, TOP_K, PACKET_TOKENS = 16, 2, 4


class Rows(PendingRows):
    """Rows that are here; notes who takes them."""

    def __init__(self, made, taken):
        self._made, self._taken = made, taken

    def rows(self):
        self._taken.append("rows")
        return self._made

    def add_rms_norm(self, residual_TH, norm_weight_H, eps):
        self._taken.append("norm")
        return add_rms_norm(self._made, residual_TH, norm_weight_H, eps)


def test_a_norm_takes_the_rows_with_its_own_weight():
    norm = RMSNorm(
        SimpleNamespace(
            model=SimpleNamespace(rms_norm_eps=0.5),
            parameter=lambda width: torch.nn.Parameter(torch.rand(width), requires_grad=False),
        ),
        HIDDEN,
    )
    made, residual, taken = torch.randn(3, HIDDEN), torch.randn(3, HIDDEN), []
    found = norm.after_adding(Rows(made, taken), residual)
    for ours, expected in zip(found, norm.after_adding(made, residual), strict=True):
        assert torch.equal(ours, expected)
    assert taken == ["norm"]


def test_rows_without_a_norm():
    made, taken = torch.randn(3, HIDDEN), []
    assert summed(Rows(made, taken)) is made
    assert taken == ["rows"]


def tokens_of(directory, model):
    directory.mkdir()
    world = RunnerWorld(directory, model=model, max_prefill_chunk=7)
    fill_dummy(world.runner._model.weight_specs(), seed=1, std=0.3)
    return [
        output[0] for output in world.run(mixed_requests(random.Random(1), 12, kinds=ALL_KINDS))
    ]


@pytest.mark.parametrize("model", [{}, {"num_hidden_layers": 3, "mlp_only_layers": [1]}])
def test_a_model_takes_every_layers_rows_in_a_norm(tmp_path, monkeypatch, model):
    expected = tokens_of(tmp_path / "here", model)
    taken, num_made = [], 0

    def combine(self, y, received):
        nonlocal num_made
        assert len(taken) == num_made, "the rows of the exchange before are not made"
        num_made += 1
        return Rows(summed(y), taken)

    monkeypatch.setattr(LocalExchange, "combine", combine)
    assert tokens_of(tmp_path / "pending", model) == expected
    assert num_made > 0
    assert taken == ["norm"] * num_made


@pytest.fixture
def launched(monkeypatch):
    """Names and arguments of the kernels that would be launched on a GPU."""
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=7))
    return []


def combine(launched, step_tokens=PACKET_TOKENS, fits=True, apart_tokens=PACKET_TOKENS - 1):
    """What a rank of 2 gets back for 3 tokens."""
    limits = {"packet_tokens": PACKET_TOKENS, "apart_tokens": apart_tokens}
    shape = ExchangeShape(2, 4, TOP_K, HIDDEN, torch.bfloat16, 8, **limits)

    def kernel(name):
        return lambda state, **arguments: launched.append((name, arguments))

    library = SimpleNamespace(
        exchange_combine=kernel("combine"),
        exchange_combine_norm=kernel("combine_norm"),
        exchange_combine_norm_fits=lambda layout: fits,
    )
    domain = SimpleNamespace(
        shape=shape, library=library, layout=None, state=None, pending_combine=None
    )
    num_slots = 2 * step_tokens
    received = Received(
        torch.zeros(num_slots, HIDDEN, dtype=torch.bfloat16),
        torch.zeros(num_slots, TOP_K, dtype=torch.int32),
        torch.zeros(num_slots, TOP_K),
        route=torch.zeros(3, TOP_K, dtype=torch.int32),
    )
    return NvlinkExchange(domain, step_tokens).combine(received.x_RH, received)


@pytest.mark.parametrize("only_compiles", [False, True])
def test_packets_are_combined_once_by_whoever_takes_them(launched, monkeypatch, only_compiles):
    monkeypatch.setattr(native, "compiles_only", lambda: only_compiles)
    residual = torch.zeros(HIDDEN, 3, dtype=torch.bfloat16).t()
    weight = torch.zeros(HIDDEN, dtype=torch.bfloat16)
    pending, other = combine(launched), combine(launched)
    assert isinstance(pending, PendingRows)
    assert not launched
    normed, new_residual = pending.add_rms_norm(residual, weight, 0.5)
    assert normed.shape == new_residual.shape == (3, HIDDEN)
    assert summed(other).shape == (3, HIDDEN)
    names = [name for name, _ in launched]
    assert names == ([] if only_compiles else ["combine_norm", "combine"])
    for name, arguments in launched:
        assert (arguments["num_tokens"], arguments["step_tokens"]) == (3, PACKET_TOKENS)
        if name == "combine_norm":
            assert arguments["residual"] != residual.data_ptr()  # its rows are not side by side
            assert (arguments["norm_weight"], arguments["eps"]) == (weight.data_ptr(), 0.5)
            assert arguments["new_residual"] == new_residual.data_ptr()
            assert arguments["normed"] == normed.data_ptr()
        else:
            assert arguments["by_packets"]
    with pytest.raises(AssertionError, match="combined twice"):
        pending.rows()


@pytest.mark.parametrize(
    ("step_tokens", "fits", "apart_tokens"),
    [(PACKET_TOKENS, False, 0), (8, True, 0), (PACKET_TOKENS, True, PACKET_TOKENS)],
)
def test_long_rows_and_many_and_very_few_are_combined_at_once(
    launched, step_tokens, fits, apart_tokens
):
    assert isinstance(combine(launched, step_tokens, fits, apart_tokens), torch.Tensor)
    [(name, arguments)] = launched
    assert name == "combine"
    assert arguments["by_packets"] == (step_tokens <= PACKET_TOKENS)


def test_a_combine_that_nobody_takes_is_noticed(launched):
    pending = combine(launched)
    exchange = NvlinkExchange(pending._domain, PACKET_TOKENS)
    nothing = torch.zeros(0, HIDDEN)
    with pytest.raises(AssertionError, match="nobody has taken the combine before"):
        exchange.dispatch(nothing, nothing, nothing)
    pending.rows()
    with pytest.raises(AssertionError) as raised:  # by what comes next
        exchange.dispatch(nothing, nothing, nothing)
    assert "nobody has taken" not in str(raised.value)

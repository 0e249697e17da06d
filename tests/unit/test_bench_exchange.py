"""The exchange's benchmark, as far as it runs on a CPU: cases, bytes, times, and gathering."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from benchmarks import bench_exchange, exchange_cases, exchange_ranks, exchange_timing
from benchmarks.exchange_cases import (
    busiest_bytes,
    choose,
    count_bytes,
    count_copies,
    random_inputs,
)
from benchmarks.exchange_ceilings import EXCHANGES, _calls, splits_of
from benchmarks.exchange_ranks import Rank, RealRanks
from benchmarks.exchange_timing import slowest, trials_us
from moe_engine.dist.exchange.base import ExpertShard, Received
from moe_engine.dist.exchange.domain import ExchangeShape
from moe_engine.dist.groups import ParallelGroups
from moe_engine.ops.moe import ExpertOutputs, MoEOutput
from moe_engine.ops.reference import exchange as reference
from moe_engine.ops.reference.exchange import Tokens
from tests.dist.ranks import run_on_ranks

CPU = torch.device("cpu")


def shape_of(num_ranks: int = 2, **sizes: Any) -> ExchangeShape:
    values = {"num_experts": 8, "top_k": 2, "hidden": 512, "max_tokens": 6}
    return ExchangeShape(num_ranks, dtype=torch.bfloat16, **values | sizes)


def test_a_token_counts_once_for_each_rank_that_it_goes_to() -> None:
    shape = shape_of(num_experts=4)
    assert count_copies(shape, torch.tensor([[0, 1], [1, 2]])) == [2, 1]
    assert count_copies(shape_of(4), torch.tensor([[0, 1], [7, 2], [4, 6]])) == [1, 1, 1, 2]


def test_bytes_of_rows_as_they_are() -> None:
    moved = count_bytes(shape_of(), [[6, 2], [5, 6]])
    row = 1024
    assert moved == {
        "dispatch": (2 * 6 + 19) * row,
        "combine": (2 * 6 * 2 + 2 * 19 + 2 * 6) * row,
        "wire_dispatch": 7 * row,
        "wire_combine": 7 * row,
    }


def test_rows_in_8_bits_are_fewer_bytes_there_and_are_restored() -> None:
    moved = count_bytes(shape_of(fp8=True), [[6, 2], [5, 6]])
    row, wire = 1024, 528
    assert moved["dispatch"] == 2 * 6 * row + 19 * wire + 19 * (wire + row)
    assert (moved["wire_dispatch"], moved["wire_combine"]) == (7 * wire, 7 * row)


def test_the_busiest_link_is_a_senders_or_a_receivers() -> None:
    assert busiest_bytes(shape_of(fp8=True), [[6, 5], [3, 6]]) == {
        "dispatch": 5 * 528,
        "combine": 5 * 1024,
    }
    into_rank_0 = [[6, 0, 0, 0], [4, 0, 0, 0], [5, 0, 0, 0], [6, 0, 0, 0]]
    assert busiest_bytes(shape_of(4), into_rank_0)["dispatch"] == 15 * 1024


@pytest.mark.parametrize("routing", exchange_cases.ROUTINGS)
def test_a_token_chooses_different_experts(routing: str) -> None:
    torch.manual_seed(0)
    ids_TK = choose(shape_of(), routing, 300, CPU)
    assert ids_TK.shape == (300, 2)
    assert ids_TK.dtype == torch.int32
    assert bool((ids_TK[:, 0] != ids_TK[:, 1]).all())
    counts = ids_TK.flatten().bincount(minlength=8)
    assert bool((counts[4:] == 0).all()) == (routing == "incast")
    assert (counts[0] > 3 * counts[7]) == (routing != "uniform")


def test_inputs_are_as_many_as_a_graphs_exchanges_or_as_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert len(random_inputs(shape_of(), "uniform", CPU)) == EXCHANGES
    of_all_ranks = 6 * 1024 * 2
    monkeypatch.setattr(exchange_cases, "MOST_INPUT_BYTES", 3 * of_all_ranks)
    inputs = random_inputs(shape_of(), "uniform", CPU)
    assert len(inputs) == 3
    assert not torch.equal(inputs[0].x_TH, inputs[1].x_TH)
    assert inputs[0].x_TH.dtype == torch.bfloat16


def test_what_a_rank_receives_is_what_the_others_send() -> None:
    copies = [[4, 1, 0], [2, 3, 5], [6, 7, 8]]
    splits = [splits_of(copies, rank) for rank in range(3)]
    assert splits[0] == ([4, 1, 0], [4, 2, 6])
    for source, (sent, _) in enumerate(splits):
        assert sent == [splits[to][1][source] for to in range(3)]


def test_real_ranks_are_as_many_as_torchrun_starts(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_exchange.parse_arguments(["--virtual"]).ranks == 2
    assert bench_exchange.parse_arguments(["--virtual", "--ranks", "8"]).ranks == 8
    assert not bench_exchange.parse_arguments([]).virtual
    with pytest.raises(SystemExit):
        bench_exchange.parse_arguments(["--ranks", "2"])
    assert "--ranks is for --virtual" in capsys.readouterr().err


def test_a_rank_that_nobody_launched_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit, match="with torchrun, or let them be --virtual"):
        RealRanks.join()


def test_cases_are_all_that_the_command_line_names() -> None:
    text = "--tokens 1,64 --dtype bf16,fp8 --routing uniform,incast --packet-tokens 8"
    found = bench_exchange.cases(bench_exchange.parse_arguments(text.split()), 4)
    assert len(found) == 8
    case, shape = found[-1]
    assert case == {"dtype": "fp8", "routing": "incast"}
    assert (shape.num_ranks, shape.max_tokens, shape.packet_tokens, shape.fp8) == (4, 64, 8, True)


def test_the_slowest_rank_of_each_trial_counts() -> None:
    assert slowest([[1, 5, 2], [3, 4, 2]]) == [3, 5, 2]


def test_trials_are_gathered_once_without_those_that_warm_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(exchange_timing, "TRIALS", 3)
    events: list[str] = []
    others = [[9.0] * exchange_timing.WARM_UP_TRIALS + [1.0, 700.0, 1.0]]
    world = SimpleNamespace(
        start_together=lambda ranks: events.append("start"),
        all_values=lambda own: events.append("gather") or [*own, *others],
    )
    rank = SimpleNamespace(domain=SimpleNamespace(check=lambda: events.append("check")))
    number = iter(range(100))

    def launch() -> list[Any]:
        milliseconds = float(next(number))
        return [SimpleNamespace(milliseconds=lambda: milliseconds)]

    times = trials_us(cast(Any, world), [cast(Any, rank)], cast(Any, launch), 20)
    assert times == [5 * 50.0, 700.0, 7 * 50.0]
    assert events == ["start", "check"] * 8 + ["gather"]


class ReferenceExchange:
    """Stands for the kernels: what comes back is the reference's."""

    world: RealRanks
    error = 0.0

    def __init__(self, domain: Any, step_tokens: int) -> None:
        self._shape, self._rank, self._step_tokens = domain.shape, domain.shard.rank, step_tokens

    def dispatch(
        self, x_TH: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> Received:
        own = (x_TH, ids_TK, weights_TK)
        parts = zip(*(self.world.all_tensors([part]) for part in own), strict=True)
        tokens = [Tokens(*of_rank) for of_rank in parts]
        arrivals = reference.dispatch(tokens, self._shape.num_experts, self._step_tokens)
        mine = arrivals[self._rank]
        return Received(mine.x_RH, mine.slots_RK, mine.weights_RK, route=(tokens, mine))

    def combine(self, y: ExpertOutputs, received: Received) -> torch.Tensor:
        tokens, mine = received.route
        sums = self.world.all_tensors([reference.presum(y.y_PH, mine)])
        outputs = reference.combine(sums, tokens, self._shape.num_experts, self._step_tokens)
        return outputs[self._rank] + self.error


def make_rank(groups: ParallelGroups) -> tuple[RealRanks, Rank]:
    """On a CPU, with tokens of its own."""
    number = groups.ep.rank
    world = RealRanks(cast(dist.Store, None), groups.ep, CPU)
    torch.manual_seed(number)
    shape = shape_of(packet_tokens=6)
    shard = ExpertShard(shape.num_experts, shape.num_ranks, number)
    domain = SimpleNamespace(shape=shape, shard=shard, check=lambda: None)
    y_PH = torch.randn(2 * 6 * 2, shape.hidden).to(shape.dtype)
    inputs = random_inputs(shape, "uniform", CPU)
    residual_TH, norm_weight_H = torch.randn_like(inputs[0].x_TH), torch.ones_like(y_PH[0])
    stream = cast(Any, None)
    return world, Rank(cast(Any, domain), stream, inputs, y_PH, residual_TH, norm_weight_H)


def check_on_ranks(groups: ParallelGroups) -> None:
    world, rank = make_rank(groups)
    ReferenceExchange.world = world
    with (
        mock.patch.object(bench_exchange, "NvlinkExchange", ReferenceExchange),
        mock.patch.object(torch.cuda, "synchronize"),
    ):
        bench_exchange.check(world, [rank], rank.domain.shape)
        wrong = mock.patch.object(ReferenceExchange, "error", 1.0)
        with wrong, pytest.raises(SystemExit, match=f"rank {rank.number} has other bits"):
            bench_exchange.check(world, [rank], rank.domain.shape)
        for number in range(2):

            def add_norm(rank: Rank, combined: MoEOutput, number: int = number) -> Any:
                found = list(exchange_ranks.add_norm(rank, combined))
                found[number] = found[number] + 1
                return found

            wrong = mock.patch.object(bench_exchange, "add_norm", add_norm)
            with wrong, pytest.raises(SystemExit, match=f"rank {rank.number} has another norm"):
                bench_exchange.check(world, [rank], rank.domain.shape)


def move_rows(groups: ParallelGroups) -> None:
    """Rows of NCCL's all-to-all, by gloo's."""
    world, rank = make_rank(groups)
    shape = rank.domain.shape
    copies = [world.all_values([count_copies(shape, t.ids_TK)]) for t in rank.inputs]
    there = [splits_of(of_input, rank.number) for of_input in copies]
    back = [(received, sent) for sent, received in there]
    for splits, row_bytes in ((there, shape.wire_bytes), (back, shape.row_bytes)):
        calls = _calls(world, splits, row_bytes)
        assert len(calls) == EXCHANGES
        with mock.patch.object(dist, "all_to_all_single", wraps=dist.all_to_all_single) as moved:
            for call in calls:
                call()
        for number, made in enumerate(moved.call_args_list):
            target, source, received, sent = made.args
            assert (sent, received) == splits[number % len(splits)]
            assert source.shape == (sum(sent), row_bytes)
            assert target.shape == (sum(received), row_bytes)


@pytest.mark.parametrize("function", [check_on_ranks, move_rows])
def test_two_ranks_know_of_each_other(function: Callable[[ParallelGroups], None]) -> None:
    run_on_ranks(function, 2, 1)


def test_rank_0_measures_alone_and_tells_the_others() -> None:
    store = dist.HashStore()
    ep = [SimpleNamespace(size=2, rank=rank, meet=lambda: None) for rank in range(2)]
    worlds = [RealRanks(store, cast(Any, of_rank), CPU) for of_rank in ep]
    assert worlds[0].first_alone(lambda: {"one_way": 4e11}) == {"one_way": 4e11}
    assert worlds[1].first_alone(lambda: pytest.fail("not alone")) == {"one_way": 4e11}

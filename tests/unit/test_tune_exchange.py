"""From times of packets and rows to the table's entry."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import tune_exchange
from benchmarks.tune_exchange import derive, renew
from moe_engine.dist.exchange.domain import ExchangeShape
from moe_engine.ops import tuning
from moe_engine.ops.tuning import INF, ExchangeChoices


def shape_of(**sizes: Any) -> ExchangeShape:
    values = {"num_experts": 8, "top_k": 2, "hidden": 512, "max_tokens": 300}
    return ExchangeShape(2, dtype=torch.bfloat16, **values | sizes)


def steps_of(*times: tuple[int, float, float]) -> list[dict[str, float]]:
    return [{"tokens": tokens, "packets": p, "rows": r} for tokens, p, r in times]


@pytest.mark.parametrize(
    ("steps", "packet_tokens"),
    [
        (steps_of((16, 9, 22), (32, 12, 22), (48, 23, 22)), 32),
        (steps_of((16, 9, 22), (32, 22, 22)), 32),
        (steps_of((16, 23, 22)), 0),
    ],
)
def test_packets_go_up_to_the_most_tokens_with_which_they_were_faster(
    steps: list[dict[str, float]], packet_tokens: int
) -> None:
    derived = derive(steps)
    assert derived.packet_tokens == packet_tokens
    assert derived.kinds[-1] == (INF, "rows")


def test_an_entry_is_found_by_the_shape_that_it_was_measured_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document: dict[str, Any] = {"device": "Some GPU", "runs": {"exchange of virtual ranks": {}}}
    for packet_tokens in (16, 48):  # the second one in the place of the first
        steps = steps_of((packet_tokens, 1, 2), (packet_tokens + 1, 2, 1))
        renew(document, shape_of(fp8=True), 2, steps, derive(steps))
    assert len(document["exchange"]) == 1
    assert document["exchange"][0]["shape"] == {
        "num_ranks": 2,
        "ranks_per_gpu": 2,
        "row_bytes": 1024,
        "wire_bytes": 528,
    }
    path = tmp_path / "some.json"
    path.write_text(json.dumps(document))
    found = tuning.table_for("Some GPU", tmp_path)
    monkeypatch.setattr(tuning, "table", lambda device: found)
    device = torch.device("cpu")
    assert shape_of(fp8=True).with_measured_limits(device, 2).packet_tokens == 48
    others = (shape_of().with_measured_limits(device, 2), shape_of(fp8=True))
    assert others[0].packet_tokens == ExchangeChoices().packet_tokens == 64
    assert others[1].with_measured_limits(device).packet_tokens == 64


def test_more_is_tried_until_rows_are_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    class World:
        def make(self, shape: ExchangeShape, routing: str) -> list[ExchangeShape]:
            return [shape]

    class Graph:
        def replay(self) -> None:
            """Nothing is timed here."""

    monkeypatch.setattr(tune_exchange, "check", lambda *arguments: None)
    monkeypatch.setattr(tune_exchange, "capture", lambda *arguments: Graph())
    monkeypatch.setattr(
        tune_exchange,
        "median_us",
        lambda world, ranks, runs: 20.0 if not ranks[0].packet_tokens else ranks[0].max_tokens / 3,
    )
    steps = tune_exchange.measure(World(), shape_of())  # type: ignore[arg-type]
    assert [step["tokens"] for step in steps] == [16, 32, 48, 64]
    assert derive(steps).packet_tokens == 48


@pytest.mark.parametrize(
    "kinds", [((64, "rows"), (INF, "packets")), ((INF, "packets"),), ((8, "rows"), (INF, "rows"))]
)
def test_packets_are_for_few_tokens(kinds: Any) -> None:
    with pytest.raises(ValueError, match="kinds must be packets up to a limit and rows beyond"):
        ExchangeChoices(kinds)

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


def steps_of(few: str, many: str, *times: tuple[int, float, float]) -> list[dict[str, float]]:
    return [{"tokens": tokens, few: few_us, many: many_us} for tokens, few_us, many_us in times]


@pytest.mark.parametrize(
    ("times", "limit"),
    [
        ([(16, 9, 22), (32, 12, 22), (48, 23, 22)], 32),
        ([(16, 9, 22), (32, 22, 22)], 32),
        ([(16, 23, 22)], 0),
    ],
)
def test_a_kind_goes_up_to_the_most_tokens_with_which_it_was_not_slower(
    times: list[tuple[int, float, float]], limit: int
) -> None:
    names = [("packets", "rows"), ("replicated", "sharded"), ("apart", "fused")]
    for number in range(3):
        measured = [steps_of(*of_kind, (16, 1.0, 2.0)) for of_kind in names]
        measured[number] = steps_of(*names[number], *times)
        derived = derive(*measured)
        found = [derived.packet_tokens, derived.replicated_tokens, derived.apart_tokens]
        assert found == [limit if other == number else 16 for other in range(3)]
        assert derived.kinds[-1] == (INF, "rows")


def test_an_entry_is_found_by_the_shape_that_it_was_measured_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document: dict[str, Any] = {"device": "Some GPU", "runs": {"exchange of virtual ranks": {}}}
    for packet_tokens in (16, 48):  # the second one in the place of the first
        packets = steps_of("packets", "rows", (packet_tokens, 1, 2), (packet_tokens + 1, 2, 1))
        shared = steps_of("replicated", "sharded", (9, 1, 1))
        norms = steps_of("apart", "fused", (3, 1, 1))
        renew(document, shape_of(fp8=True), 2, packets, shared, norms)
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
    measured = shape_of(fp8=True).with_measured_limits(device, 2)
    found_limits = (measured.packet_tokens, measured.replicated_tokens, measured.apart_tokens)
    assert found_limits == (48, 9, 3)
    others = (shape_of().with_measured_limits(device, 2), shape_of(fp8=True))
    assert others[0].packet_tokens == ExchangeChoices().packet_tokens == 64
    assert others[1].with_measured_limits(device).packet_tokens == 64


def test_more_is_tried_until_what_is_for_many_is_faster() -> None:
    def times_of(world: Any, shape: ExchangeShape, tokens: int) -> tuple[float, float]:
        return tokens / 3, 20.0

    steps = tune_exchange.compare(None, shape_of(), "packets", "rows", times_of)  # type: ignore[arg-type]
    assert [step["tokens"] for step in steps] == [4, 8, 16, 32, 48, 64]
    assert tune_exchange.best_up_to(steps, "packets", "rows") == 48


@pytest.mark.parametrize(
    "kinds", [((64, "rows"), (INF, "packets")), ((INF, "packets"),), ((8, "rows"), (INF, "rows"))]
)
def test_packets_are_for_few_tokens(kinds: Any) -> None:
    with pytest.raises(ValueError, match="kinds must be packets up to a limit and rows beyond"):
        ExchangeChoices(kinds)
    with pytest.raises(ValueError, match="norms must be apart up to a limit"):
        ExchangeChoices(norms=((INF, "apart"),))
    with pytest.raises(ValueError, match="tensor_parallel must be replicated up to a limit"):
        ExchangeChoices(tensor_parallel=((INF, "replicated"),))

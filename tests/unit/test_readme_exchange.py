"""The README's table of the exchange says what the JSON says."""

from typing import Any

import pytest

from benchmarks.readme_exchange import draw_exchange, render_exchange, uniform_rows


def row(tokens: int, dtype: str = "bf16", routing: str = "uniform") -> dict[str, Any]:
    return {
        "tokens": tokens,
        "dtype": dtype,
        "routing": routing,
        "kind": "packets" if tokens <= 64 else "rows",
        "dispatch_us": 3.25 + tokens,
        "combine_us": 4.5 + tokens,
        "copy_us": {"dispatch": 0.5 * (3.25 + tokens), "combine": 0.75 * (4.5 + tokens)},
    }


@pytest.fixture
def result() -> dict[str, Any]:
    return {
        "date": "2026-12-01",
        "commit": "0123456789ab",
        "gpu": {"name": "NVIDIA H200"},
        "torch": "2.11.0",
        "ranks": 2,
        "hidden": 4096,
        "topk": 8,
        "experts": 128,
        "ceilings": {"copy_gb_per_s": 4238.2},
        "results": [
            row(4096),
            row(1),
            row(1, "fp8"),
            row(1, routing="zipf") | {"kind": "x"},
        ],
    }


def test_a_row_for_each_number_of_tokens(result: dict[str, Any]) -> None:
    lines = render_exchange(result).splitlines()
    assert lines[2] == "| 1 | packets | 4.2 | 5.5 | 50% / 75% | 4.2 |"
    assert lines[3] == "| 4096 | rows | 4099.2 | 4100.5 | 50% / 75% |  |"
    assert "2 virtual ranks" in lines[5]
    assert "4.24 TB/s" in lines[5]
    assert "at commit 0123456." in lines[5]
    assert len(lines) == 6


def test_rows_are_in_the_order_of_their_tokens(result: dict[str, Any]) -> None:
    assert [*uniform_rows(result)] == [1, 4096]
    assert set(uniform_rows(result)[1]) == {"bf16", "fp8"}


def test_the_plot_is_the_same_for_the_same_result(result: dict[str, Any], tmp_path: Any) -> None:
    pytest.importorskip("matplotlib")
    for name in ("a.svg", "b.svg"):
        draw_exchange(result, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert "combine" in (tmp_path / "a.svg").read_text()

"""The tables of kernel choices: which entry an operator gets, and what a file may say."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.tune import to_text
from moe_engine.errors import ConfigError
from moe_engine.ops import hopper, moe, tuning, warp_decode
from moe_engine.ops.tuning import (
    DecodeChoices,
    ExpertChoices,
    LinearChoices,
    NormRouterChoices,
)
from tests.unit.hopper_on_cpu import choose_as_on_hopper, zeros

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)
EXPERTS_SHAPE = (2048, 768, 128, 8)
COMMITTED = sorted(tuning.FOLDER.glob("*.json"))


def document() -> dict[str, Any]:
    """Entries whose every choice differs from the default."""
    return {
        "device": "Some GPU",
        "runs": {"model": {"date": "2026-01-01"}},
        "experts": [
            {
                "shape": {"hidden": 64, "intermediate": 32, "num_experts": 8, "top_k": 2},
                "choices": {"streaming_max_rows": 3, "tiles": [[1.5, 32], [None, 128]]},
                "measured": {"run": "model", "steps": []},
            }
        ],
        "linear": [
            {
                "shape": {"in_features": 64, "out_features": 96},
                "choices": {"streaming_max_rows": 2, "split_max_rows": 5},
            },
            {
                "shape": {"in_features": 96, "out_features": 64},
                "choices": {"streaming_max_rows": 1},
            },
        ],
        "norm_router": [
            {"shape": {"hidden": 64, "num_experts": 8}, "choices": {"fused_max_rows": 7}}
        ],
        "decode_attention": [
            {
                "shape": {"num_heads": 4, "num_kv_heads": 2},
                "choices": {"warp_max_pairs": 6, "warp_max_shares": 2},
            }
        ],
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "some.json").write_text(json.dumps(document()))
    (tmp_path / "other.json").write_text(json.dumps({"device": "Another GPU"}))
    return tmp_path


@pytest.fixture
def gpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`GPU` is the device that the document is for."""
    monkeypatch.setattr(tuning, "FOLDER", folder)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    tuning.table.cache_clear()
    yield
    tuning.table.cache_clear()


@pytest.mark.usefixtures("gpu")
def test_a_known_shape_of_a_known_gpu_gets_its_entry() -> None:
    experts = tuning.choices(ExpertChoices, GPU, 64, 32, 8, 2)
    assert experts == ExpertChoices(3, ((1.5, 32), (math.inf, 128)))
    assert tuning.choices(LinearChoices, GPU, 64, 96) == LinearChoices(2, 5)
    assert tuning.choices(NormRouterChoices, GPU, 64, 8) == NormRouterChoices(7)
    assert tuning.choices(DecodeChoices, GPU, 4, 2) == DecodeChoices(6, 2)


@pytest.mark.usefixtures("gpu")
def test_a_choice_that_an_entry_leaves_out_is_the_default() -> None:
    assert tuning.choices(LinearChoices, GPU, 96, 64) == LinearChoices(1, None)


@pytest.mark.usefixtures("gpu")
def test_an_unknown_shape_gets_the_defaults() -> None:
    assert tuning.choices(ExpertChoices, GPU, 64, 32, 8, 3) == ExpertChoices()
    assert tuning.choices(LinearChoices, GPU, 96, 96) == LinearChoices()


def test_an_unknown_gpu_and_a_cpu_get_the_defaults(folder: Path) -> None:
    assert tuning.table_for("Some GPU 2", folder) == {}
    assert tuning.table_for("Another GPU", folder) == {}
    assert tuning.choices(ExpertChoices, CPU, *EXPERTS_SHAPE) is tuning.DEFAULTS[ExpertChoices]


def test_the_defaults_are_what_was_found_on_the_first_gpu() -> None:
    experts = ExpertChoices()
    # 128 experts, so 32 pairs are 0.25 for each.
    tiles = [experts.tokens_per_tile(n, 128) for n in (1, 32, 33, 5120, 5121, 16384, 16385, 10**6)]
    assert tiles == [16, 16, 64, 64, 128, 128, 256, 256]
    assert experts.streaming_max_rows == 4
    assert (LinearChoices().streaming_max_rows, NormRouterChoices().fused_max_rows) == (16, 16)
    assert DecodeChoices() == DecodeChoices(8, 8)


def set_at(*path: str | int, value: Any) -> Callable[[dict[str, Any]], None]:
    """A change to a document: a value at a path."""

    def change(values: Any) -> None:
        for key in path[:-1]:
            values = values[key]
        values[path[-1]] = value

    return change


EXPERT_CHOICES = ("experts", 0, "choices")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_at("device", value=None), "device must be the name"),
        (set_at("expert", value=[]), r"unknown field 'expert'; did you mean experts"),
        (set_at("linear", value={}), "linear must be a list, not {}"),
        (set_at("linear", 1, value=3), r"linear\[1\] must be an object, not 3"),
        (set_at("experts", 0, "note", value=""), r"experts\[0\]: unknown field 'note'"),
        (set_at("experts", 0, "shape", value=[64]), r"experts\[0\]: shape must be an object"),
        (
            set_at("experts", 0, "shape", "topk", value=2),
            r"experts\[0\].shape: unknown field 'topk'; did you mean top_k",
        ),
        (
            set_at("norm_router", 0, "shape", value={"hidden": 64}),
            r"norm_router\[0\].shape.num_experts must be an integer, not None",
        ),
        (
            set_at("linear", 1, "shape", value={"in_features": 64, "out_features": 96}),
            r"linear\[1\].shape has an entry already",
        ),
        (
            set_at(*EXPERT_CHOICES, "max_rows", value=2),
            r"experts\[0\].choices: unknown field 'max_rows'",
        ),
        (
            set_at(*EXPERT_CHOICES, "streaming_max_rows", value=4.0),
            r"experts\[0\].choices.streaming_max_rows must be an integer of at least 0, not 4.0",
        ),
        (
            set_at(*EXPERT_CHOICES, "streaming_max_rows", value=None),
            "streaming_max_rows must be an integer of at least 0, not None",
        ),
        (
            set_at("linear", 0, "choices", "split_max_rows", value=-1),
            r"linear\[0\].choices.split_max_rows must be an integer of at least 0, not -1",
        ),
        (
            set_at("decode_attention", 0, "choices", "warp_max_shares", value=0),
            r"decode_attention\[0\].choices.warp_max_shares must be at least 1, not 0",
        ),
        (set_at(*EXPERT_CHOICES, "tiles", value=16), r"choices.tiles must be pairs of .* not 16"),
        (set_at(*EXPERT_CHOICES, "tiles", value=[]), "tiles must be pairs"),
        (set_at(*EXPERT_CHOICES, "tiles", value=[[None]]), "tiles must be pairs"),
        (set_at(*EXPERT_CHOICES, "tiles", value=[[4, 16]]), "null for the last"),
        (set_at(*EXPERT_CHOICES, "tiles", value=[[None, 48]]), "one of 16, 32, 64, 128, 256"),
        (
            set_at(*EXPERT_CHOICES, "tiles", value=[[4, 16], [2, 32], [None, 64]]),
            "tiles must be pairs of an ascending limit",
        ),
        (
            set_at("experts", 0, "measured", "run", value="yesterday"),
            r"experts\[0\].measured.run is 'yesterday', which is not in runs",
        ),
    ],
)
def test_a_malformed_file_is_refused_by_the_place(
    folder: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    changed = document()
    change(changed)
    (folder / "some.json").write_text(json.dumps(changed))
    with pytest.raises(ConfigError, match=message) as raised:
        tuning.table_for("Some GPU", folder)
    assert "some.json" in str(raised.value)


@pytest.mark.parametrize("text", ["{", "[]", b"\xff"])
def test_what_is_not_an_object_in_json_is_refused_by_the_name_of_the_file(
    tmp_path: Path, text: str | bytes
) -> None:
    path = tmp_path / "broken.json"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ConfigError, match=r"broken\.json"):
        tuning.table_for("Some GPU", tmp_path)


@pytest.mark.parametrize("path", COMMITTED, ids=[path.name for path in COMMITTED])
def test_a_committed_table_is_read_and_is_as_the_tuner_writes_it(path: Path) -> None:
    committed = tuning.read_document(path)
    parsed = tuning.parse_document(committed, path)
    assert len(parsed) == sum(len(committed.get(section, [])) for section in tuning.SECTIONS)
    assert path.read_text() == to_text(committed) + "\n"
    for section, kind in tuning.SECTIONS.items():
        for entry in committed.get(section, []):
            chosen = parsed[kind, tuple(entry["shape"][name] for name in kind.SHAPE)]
            assert tuning.to_json(chosen) == entry["choices"], "every choice is written down"


def test_each_gpu_has_one_table_and_the_h200_has_that_of_the_model_tuned_on_it() -> None:
    names = [tuning.read_document(path)["device"] for path in COMMITTED]
    assert len(names) == len(set(names))
    table = tuning.table_for("NVIDIA H200", tuning.FOLDER)
    assert {kind for kind, _ in table} == set(tuning.SECTIONS.values())
    assert (ExpertChoices, EXPERTS_SHAPE) in table


def test_the_tables_are_package_data() -> None:
    package_data = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = package_data["tool"]["setuptools"]["package-data"]["moe_engine.ops"]
    packed = {path for pattern in patterns for path in tuning.FOLDER.parent.glob(pattern)}
    assert COMMITTED
    assert packed >= set(COMMITTED)


def test_every_choice_is_documented() -> None:
    for kind in tuning.SECTIONS.values():
        for field in fields(kind):
            assert f"{field.name}:" in (kind.__doc__ or ""), (kind, field.name)


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> tuning.Table:
    """The CPU's, to fill."""
    return choose_as_on_hopper(monkeypatch)


def rows_taken(takes: Callable[[int], bool]) -> list[int]:
    """Which of 0 to 70 rows a kernel takes, as (first, last)."""
    taken = [rows for rows in range(71) if takes(rows)]
    assert taken == list(range(taken[0], taken[-1] + 1))
    return [taken[0], taken[-1]]


@pytest.mark.parametrize(("in_features", "last"), [(2048, 64), (2560, 51), (4096, 32)])
def test_linear_layers_follow_their_table(table: tuning.Table, in_features: int, last: int) -> None:
    weight_OX = zeros(8, in_features)

    def rows(takes: Callable[[torch.Tensor, torch.Tensor], bool]) -> list[int]:
        return rows_taken(lambda num_rows: takes(zeros(num_rows, in_features), weight_OX))

    assert rows(hopper.takes_linear) == [0, 16]
    assert rows(hopper.takes_split_linear) == [17, last]
    table[LinearChoices, (in_features, 8)] = LinearChoices(5, 40)
    assert rows(hopper.takes_linear) == [0, 5]
    assert rows(hopper.takes_split_linear) == [6, 40]
    table[LinearChoices, (in_features, 8)] = LinearChoices(100, 100)
    assert rows(hopper.takes_linear) == [0, 16], "the kernel takes no more"
    table[LinearChoices, (in_features, 8)] = LinearChoices(0, 100)
    assert rows(hopper.takes_split_linear) == [1, 64], "the kernel takes no more"


def test_norm_and_router_follow_their_table(table: tuning.Table) -> None:
    gate_EH = zeros(8, 256)

    def rows() -> list[int]:
        return rows_taken(lambda num: hopper.takes_norm_router(zeros(num, 256), gate_EH, 2))

    assert rows() == [0, 16]
    table[NormRouterChoices, (256, 8)] = NormRouterChoices(33)
    assert rows() == [0, 33]


def test_experts_follow_their_table(table: tuning.Table, monkeypatch: pytest.MonkeyPatch) -> None:
    gate_up_EJH, down_EHI = zeros(8, 128, 64), zeros(8, 64, 64)
    tiles = []
    monkeypatch.setattr(
        hopper, "grouped_expert_ffn", lambda *arguments: tiles.append(arguments[-1]) or zeros(0)
    )
    monkeypatch.setattr(hopper, "streaming_expert_ffn", lambda *arguments: tiles.append(0))

    def run(num_rows: int) -> int:
        ids_RK = torch.zeros(num_rows, 2, dtype=torch.int32)
        moe.expert_ffn(zeros(num_rows, 64), ids_RK, ids_RK.float(), gate_up_EJH, down_EHI)
        return tiles[-1]

    assert [run(rows) for rows in (4, 5, 160, 161)] == [0, 64, 64, 128]
    entry = ExpertChoices(6, ((2, 32), (math.inf, 16)))
    table[ExpertChoices, (64, 64, 8, 2)] = entry
    assert [run(rows) for rows in (6, 7, 8, 9)] == [0, 32, 32, 16]


def test_decode_attention_follows_its_table(table: tuning.Table) -> None:
    k_cache_BLGD = zeros(1, 16, 2, 128)

    def rows() -> list[int]:
        return rows_taken(
            lambda num: warp_decode.takes_warp_decode(
                zeros(num, 8 * 128), torch.bfloat16, 4, k_cache_BLGD
            )
        )

    assert rows() == [0, 4]
    table[DecodeChoices, (4, 2)] = DecodeChoices(7, 2)
    assert rows() == [0, 3]
    assert warp_decode.decode_choices(CPU, 4, 2).warp_max_shares == 2

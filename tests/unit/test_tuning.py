"""The tables of kernel choices: which entry an operator gets, and what a file may say."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.tune import to_text
from moe_engine.errors import ConfigError
from moe_engine.ops import decode_attention, hopper, tuning
from moe_engine.ops.tuning import (
    INF,
    DecodeChoices,
    ExpertChoices,
    Launch,
    LinearChoices,
    NormRouterChoices,
    pick,
)
from tests.unit.hopper_on_cpu import choose_as_on_hopper, zeros

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)
EXPERTS_SHAPE = (2048, 768, 128, 8)
COMMITTED = sorted(tuning.FOLDER.glob("*.json"))


def document() -> dict[str, Any]:
    """Entries whose every choice differs from the default, but for the one that is left out."""
    return {
        "device": "Some GPU",
        "runs": {"model": {"date": "2026-01-01"}},
        "experts": [
            {
                "shape": {"hidden": 64, "intermediate": 32, "num_experts": 8, "top_k": 2},
                "choices": {
                    "kernels": [[3, "streaming"], [None, "grouped"]],
                    "tiles": [[1.5, 32], [None, 128]],
                },
                "measured": {"run": "model", "steps": []},
            },
            {
                "shape": {"hidden": 64, "intermediate": 32, "num_experts": 4, "top_k": 2},
                "choices": {"tiles": [[None, 16]]},
            },
        ],
        "linear": [
            {
                "shape": {"in_features": 64, "out_features": 96},
                "choices": {"kernels": [[2, "streaming"], [5, "split"], [None, "library"]]},
            }
        ],
        "norm_router": [
            {
                "shape": {"hidden": 64, "num_experts": 8},
                "choices": {"kernels": [[None, "separate"]]},
                "measured": None,
            }
        ],
        "decode_attention": [
            {
                "shape": {"num_heads": 4, "num_kv_heads": 2},
                "choices": {
                    "launches": [
                        [6, {"block_warps": 6, "max_shares": 2, "min_tokens": 64}],
                        [None, None],
                    ]
                },
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
    assert experts.kernels == ((3, "streaming"), (INF, "grouped"))
    assert experts.tiles == ((1.5, 32), (INF, 128))
    linear = tuning.choices(LinearChoices, GPU, 64, 96)
    assert linear.kernels == ((2, "streaming"), (5, "split"), (INF, "library"))
    assert tuning.choices(NormRouterChoices, GPU, 64, 8).kernels == ((INF, "separate"),)
    launches = tuning.choices(DecodeChoices, GPU, 4, 2).launches
    assert launches == ((6, Launch(6, 2, 64)), (INF, None))


@pytest.mark.usefixtures("gpu")
def test_a_choice_that_an_entry_leaves_out_is_the_default() -> None:
    experts = tuning.choices(ExpertChoices, GPU, 64, 32, 4, 2)
    assert experts == ExpertChoices(tiles=((INF, 16),))


@pytest.mark.usefixtures("gpu")
def test_an_unknown_shape_gets_the_defaults() -> None:
    assert tuning.choices(ExpertChoices, GPU, 64, 32, 8, 3) == ExpertChoices()
    assert tuning.choices(LinearChoices, GPU, 4096, 96) == LinearChoices.default(4096, 96)
    assert tuning.choices(DecodeChoices, GPU, 8, 2) == DecodeChoices()


def test_an_unknown_gpu_and_a_cpu_get_the_defaults(folder: Path) -> None:
    assert tuning.table_for("Some GPU 2", folder) == {}
    assert tuning.table_for("Another GPU", folder) == {}
    assert tuning.choices(ExpertChoices, CPU, *EXPERTS_SHAPE) == ExpertChoices()


def test_a_limit_belongs_to_what_is_best_up_to_it() -> None:
    steps = ((4, "a"), (9, "b"), (INF, "c"))
    assert [pick(steps, amount) for amount in (0, 4, 4.5, 9, 10, 10**9)] == list("aabbcc")


def test_the_defaults_are_what_was_found_on_the_first_gpu() -> None:
    # 128 experts, so 64 pairs are 0.5 for each.
    pairs = (1, 64, 65, 5120, 5121, 16384, 16385, 10**6)
    tiles = [pick(ExpertChoices.default().tiles, number / 128) for number in pairs]
    assert tiles == [16, 16, 64, 64, 128, 128, 256, 256]
    assert pick(ExpertChoices.default().kernels, 2) == "streaming"
    assert pick(ExpertChoices.default().kernels, 3) == "grouped"


@pytest.mark.parametrize(
    ("in_features", "most_split"), [(512, 64), (2048, 64), (2560, 51), (4096, 32), (8192, None)]
)
def test_a_deep_layer_is_split_for_fewer_rows(in_features: int, most_split: int | None) -> None:
    kernels = LinearChoices.default(in_features, 100).kernels
    found = [pick(kernels, rows) for rows in range(300)]
    assert found[:17] == ["streaming"] * 17
    split = [rows for rows, kernel in enumerate(found) if kernel == "split"]
    assert split == (list(range(17, most_split + 1)) if most_split else [])
    assert set(found[17 + len(split) :]) == {"library"}


def set_at(*path: str | int, value: Any) -> Callable[[dict[str, Any]], None]:
    """A change to a document: a value at a path."""

    def change(values: Any) -> None:
        for key in path[:-1]:
            values = values[key]
        values[path[-1]] = value

    return change


EXPERT_CHOICES = ("experts", 0, "choices")
LAUNCHES = ("decode_attention", 0, "choices", "launches")
ROUTER = {"hidden": 64, "num_experts": 8}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_at("device", value=None), "device must be the name"),
        (set_at("expert", value=[]), r"unknown field 'expert'; did you mean experts"),
        (set_at("linear", value={}), "linear must be a list, not {}"),
        (set_at("runs", value=[1]), r"runs must be an object, not \[1\]"),
        (set_at("linear", 0, value=3), r"linear\[0\] must be an object, not 3"),
        (set_at("experts", 1, "note", value=""), r"experts\[1\]: unknown field 'note'"),
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
            set_at("norm_router", value=[{"shape": ROUTER}, {"shape": ROUTER}]),
            r"norm_router\[1\].shape has an entry already",
        ),
        (
            set_at(*EXPERT_CHOICES, "max_rows", value=2),
            r"experts\[0\].choices: unknown field 'max_rows'",
        ),
        (
            set_at(*EXPERT_CHOICES, "tiles", value=16),
            r"experts\[0\].choices: tiles must be pairs of .* not 16",
        ),
        (set_at(*EXPERT_CHOICES, "tiles", value=[]), "tiles must be pairs"),
        (set_at(*EXPERT_CHOICES, "tiles", value=None), "tiles must be pairs"),
        (set_at(*EXPERT_CHOICES, "tiles", value=[[None]]), "tiles must be pairs"),
        (set_at(*EXPERT_CHOICES, "tiles", value=[["many", 16]]), "tiles must be pairs"),
        (
            set_at(*EXPERT_CHOICES, "tiles", value=[[4, 16]]),
            "an ascending limit, null for the last",
        ),
        (set_at(*EXPERT_CHOICES, "tiles", value=[[None, 48]]), "16 or 32 or 64 or 128 or 256"),
        (
            set_at(*EXPERT_CHOICES, "tiles", value=[[4, 16], [2, 32], [None, 64]]),
            "tiles must be pairs of an ascending limit",
        ),
        (
            set_at(*EXPERT_CHOICES, "kernels", value=[[None, "fused"]]),
            "kernels must be pairs of .* and 'streaming' or 'grouped'",
        ),
        (set_at(*LAUNCHES, value=[[None, "paged"]]), "launches must be .* a launch or null"),
        (
            set_at(*LAUNCHES, 0, 1, "block_warps", value=8),
            r"decode_attention\[0\].choices: no kernel can be launched by Launch\(block_warps=8",
        ),
        (set_at(*LAUNCHES, 0, 1, "max_shares", value=0), "no kernel can be launched"),
        (set_at(*LAUNCHES, 0, 1, "min_tokens", value=1.5), "no kernel can be launched"),
        (set_at(*LAUNCHES, 0, 1, "shares", value=1), r"choices: .*argument 'shares'"),
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
    """Which of 0 to 299 rows a kernel takes, as (first, last)."""
    taken = [rows for rows in range(300) if takes(rows)]
    assert taken == list(range(taken[0], taken[-1] + 1))
    return [taken[0], taken[-1]]


def test_linear_layers_follow_their_table(table: tuning.Table) -> None:
    weight_OX = zeros(8, 4096)

    def rows(takes: Callable[[torch.Tensor, torch.Tensor], bool]) -> list[int]:
        return rows_taken(lambda num_rows: takes(zeros(num_rows, 4096), weight_OX))

    assert rows(hopper.takes_linear) == [0, 16]
    assert rows(hopper.takes_split_linear) == [17, 32]
    steps = ((5, "streaming"), (40, "split"), (INF, "library"))
    table[LinearChoices, (4096, 8)] = LinearChoices(steps)
    assert rows(hopper.takes_linear) == [0, 5]
    assert rows(hopper.takes_split_linear) == [6, 40]


@pytest.mark.parametrize(
    ("kernel", "takes", "most"),
    [
        ("streaming", hopper.takes_linear, 16),
        ("split", hopper.takes_split_linear, 64),
    ],
)
def test_a_kernel_is_not_taken_for_more_rows_than_it_takes(
    table: tuning.Table, kernel: str, takes: Callable[..., bool], most: int
) -> None:
    table[LinearChoices, (2048, 8)] = LinearChoices(((INF, kernel),))
    assert rows_taken(lambda num_rows: takes(zeros(num_rows, 2048), zeros(8, 2048))) == [0, most]


def test_norm_and_router_follow_their_table(table: tuning.Table) -> None:
    def takes(num_rows: int) -> bool:
        x_RH = zeros(num_rows, 256)
        return hopper.takes_norm_router(x_RH, x_RH, zeros(256), zeros(8, 256), 2)

    assert rows_taken(takes) == [0, 64]
    table[NormRouterChoices, (256, 8)] = NormRouterChoices(((33, "fused"), (INF, "separate")))
    assert rows_taken(takes) == [0, 33]


def test_decode_attention_follows_its_table(table: tuning.Table) -> None:
    k_cache_BLGD = zeros(1, 16, 2, 128)

    def launch(num_rows: int) -> Launch | None:
        qkv_RX = zeros(num_rows, 8 * 128)
        return decode_attention.choose(qkv_RX, torch.bfloat16, 4, k_cache_BLGD)

    defaults = [launch for _, launch in DecodeChoices().launches]
    assert [launch(rows) for rows in (4, 5, 8, 9)] == [*defaults[:2], *defaults[1:3]]
    assert launch(513) is None
    mine = Launch(12, 3, 7)
    table[DecodeChoices, (4, 2)] = DecodeChoices(((6, mine), (8, None), (INF, defaults[0])))
    assert [launch(rows) for rows in (3, 4, 5)] == [mine, None, defaults[0]]

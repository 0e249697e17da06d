"""Which kernel runs up to how many rows: the choices for a GPU and the shape that an operator has.

They are in files ``tuned/<gpu>.json``, which `benchmarks.tune` writes with the step times that they
follow from; nothing is measured when an engine starts. A file is for the GPUs that CUDA gives the
name in its ``device``. An entry is for one shape, as a rank sees it. A GPU without a file and a
shape without an entry get the defaults below, and so does a choice that an entry leaves out.

Example, the experts of one model:

    {"device": "NVIDIA H200",
     "runs": {"qwen3-30b-a3b": {"date": "2026-11-25", "torch": "2.11.0", ...}},
     "experts": [{"shape": {"hidden": 2048, "intermediate": 768, "num_experts": 128, "top_k": 8},
                  "choices": {"streaming_max_rows": 4, "tiles": [[0.25, 16], [null, 64]]},
                  "measured": {"run": "qwen3-30b-a3b", "steps": [...]}}]}

A new choice is a field here with a default that does what was done before, which is what the
files get that do not know it.
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

import torch

from moe_engine.config.flat import suggest
from moe_engine.errors import ConfigError

FOLDER = Path(__file__).parent / "tuned"
TILES = (16, 32, 64, 128, 256)

Tiles = tuple[tuple[float, int], ...]
"""(average pairs of an expert up to which, tokens of a tile), ascending; the last has no limit."""


def _check_tiles(tiles: Any) -> None:
    try:
        limits = [float(most) for most, _ in tiles]
        is_right = (
            limits == sorted(set(limits))
            and limits[-1:] == [math.inf]
            and all(tile in TILES for _, tile in tiles)
        )
    except (TypeError, ValueError):
        is_right = False
    if not is_right:
        raise ValueError(
            "tiles must be pairs of an ascending limit (null for the last) and one of "
            f"{', '.join(map(str, TILES))}, not {tiles!r:.120}"
        )


@dataclass(frozen=True)
class Choices:
    """What is chosen for an operator; each field is a limit or a size, 0 or more.

    Attributes:
        SHAPE: names of the sizes that a choice holds for.
    """

    SHAPE: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        """`ValueError` naming the field that cannot be."""
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "tiles":
                _check_tiles(value)
            elif value is None and field.default is None:
                pass
            elif type(value) is not int or value < 0:
                raise ValueError(f"{field.name} must be an integer of at least 0, not {value!r}")


@dataclass(frozen=True)
class ExpertChoices(Choices):
    """Of `ops.moe.expert_ffn` on Hopper.

    Attributes:
        streaming_max_rows: rows up to which `hopper.streaming_expert_ffn` runs; beyond,
            `hopper.grouped_expert_ffn`.
        tiles: its tokens of a tile.
    """

    SHAPE = ("hidden", "intermediate", "num_experts", "top_k")

    streaming_max_rows: int = 4
    tiles: Tiles = ((0.25, 16), (40, 64), (128, 128), (math.inf, 256))

    def tokens_per_tile(self, num_pairs: int, num_experts: int) -> int:
        """The tile for a batch of so many pairs."""
        return next(tile for most, tile in self.tiles if num_pairs <= most * num_experts)


@dataclass(frozen=True)
class LinearChoices(Choices):
    """Of `ops.linear` on Hopper; beyond the limits the vendor's library runs.

    Attributes:
        streaming_max_rows: rows up to which `hopper.linear` runs.
        split_max_rows: rows up to which, beyond those, `hopper.split_linear` runs where the sum
            can be left to the operator that follows. None: see `hopper.SPLIT_LINEAR_MAX_SUMS`.
    """

    SHAPE = ("in_features", "out_features")

    streaming_max_rows: int = 16
    split_max_rows: int | None = None


@dataclass(frozen=True)
class NormRouterChoices(Choices):
    """Of `ops.moe.norm_and_route` on Hopper.

    Attributes:
        fused_max_rows: rows up to which `hopper.norm_router` runs; beyond, two kernels.
    """

    SHAPE = ("hidden", "num_experts")

    fused_max_rows: int = 16


@dataclass(frozen=True)
class DecodeChoices(Choices):
    """Of attention on Hopper where every row decodes; beyond the limit `kernels.paged_decode` runs.

    Attributes:
        warp_max_pairs: rows times KV heads up to which `ops.warp_decode` runs.
        warp_max_shares: that it cuts a long context into, 1 or more.
    """

    SHAPE = ("num_heads", "num_kv_heads")

    warp_max_pairs: int = 8
    warp_max_shares: int = 8

    def __post_init__(self) -> None:
        """See `Choices`."""
        super().__post_init__()
        if self.warp_max_shares < 1:
            raise ValueError(f"warp_max_shares must be at least 1, not {self.warp_max_shares}")


SECTIONS: dict[str, type[Choices]] = {
    "experts": ExpertChoices,
    "linear": LinearChoices,
    "norm_router": NormRouterChoices,
    "decode_attention": DecodeChoices,
}
"""What the lists of a file are called."""

DEFAULTS: dict[type[Choices], Choices] = {kind: kind() for kind in SECTIONS.values()}
"""What an unknown GPU or shape gets."""

Table = dict[tuple[type[Choices], tuple[int, ...]], Choices]
"""Choices by kind and shape."""

C = TypeVar("C", bound=Choices)


def choices(kind: type[C], device: torch.device, *shape: int) -> C:
    """The choices of a kind for a GPU and a shape, whose sizes are those of ``kind.SHAPE``."""
    return cast(C, table(device).get((kind, shape), DEFAULTS[kind]))


@functools.cache
def table(device: torch.device) -> Table:
    """The choices for a device, empty if no file is for it; operators see what is changed in it.

    Raises:
        ConfigError: a file is malformed; the message names it and the place.
    """
    if device.type != "cuda":
        return {}
    return table_for(torch.cuda.get_device_name(device), FOLDER)


def table_for(device_name: str, folder: Path) -> Table:
    """The choices in the file of ``folder`` that is for devices of this name; see `table`."""
    for path in sorted(folder.glob("*.json")):
        document = read_document(path)
        if document["device"] == device_name:
            return parse_document(document, path)
    return {}


def read_document(path: Path) -> dict[str, Any]:
    """The JSON of a file, an object with the name of a device.

    Raises:
        ConfigError: naming the file.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not (isinstance(document, dict) and isinstance(document.get("device"), str)):
        raise ConfigError(f"{path}: device must be the name that CUDA gives the GPU")
    return document


def parse_document(document: dict[str, Any], path: Path) -> Table:
    """All choices in a file.

    Raises:
        ConfigError: naming the file, the entry and the field.
    """
    _check_keys(document, {"device", "runs", *SECTIONS}, str(path))
    parsed: Table = {}
    for section, kind in SECTIONS.items():
        for number, entry in enumerate(_of_type(list, document, section, path) or ()):
            place = f"{path}: {section}[{number}]"
            if not isinstance(entry, dict):
                raise ConfigError(f"{place} must be an object, not {entry!r:.80}")
            shape, chosen = _parse_entry(kind, entry, place)
            if (kind, shape) in parsed:
                raise ConfigError(f"{place}.shape has an entry already")
            _check_measured(entry, _of_type(dict, document, "runs", path) or {}, place)
            parsed[kind, shape] = chosen
    return parsed


def to_json(chosen: Choices) -> dict[str, Any]:
    """The ``choices`` of an entry; what is None or without a limit is left to the reader."""
    values = {name: value for name, value in asdict(chosen).items() if value is not None}
    if "tiles" in values:
        values["tiles"] = [
            [None if math.isinf(most) else most, tile] for most, tile in values["tiles"]
        ]
    return values


def _parse_entry(
    kind: type[Choices], entry: dict[str, Any], place: str
) -> tuple[tuple[int, ...], Choices]:
    """An entry's shape and choices."""
    _check_keys(entry, {"shape", "choices", "measured"}, place)
    sizes = _of_type(dict, entry, "shape", place) or {}
    _check_keys(sizes, set(kind.SHAPE), f"{place}.shape")
    for name in kind.SHAPE:
        if type(sizes.get(name)) is not int:
            raise ConfigError(f"{place}.shape.{name} must be an integer, not {sizes.get(name)!r}")
    values = dict(_of_type(dict, entry, "choices", place) or {})
    _check_keys(values, {field.name for field in fields(kind)}, f"{place}.choices")
    try:
        if "tiles" in values:
            values["tiles"] = _read_tiles(values["tiles"])
        return tuple(sizes[name] for name in kind.SHAPE), kind(**values)
    except ValueError as error:
        raise ConfigError(f"{place}.choices.{error}") from error


def _check_measured(entry: dict[str, Any], runs: dict[str, Any], place: str) -> None:
    """That the run is there which an entry says it was measured in."""
    measured = _of_type(dict, entry, "measured", place)
    if measured is not None and measured.get("run") not in runs:
        raise ConfigError(f"{place}.measured.run is {measured.get('run')!r}, which is not in runs")


def _of_type(kind: type, owner: dict[str, Any], name: str, place: str | Path) -> Any:
    """A member of a JSON object, None if it is absent or null."""
    value = owner.get(name)
    if value is not None and not isinstance(value, kind):
        wanted = "a list" if kind is list else "an object"
        raise ConfigError(f"{place}: {name} must be {wanted}, not {value!r:.80}")
    return value


def _check_keys(values: dict[str, Any], known: set[str], place: str) -> None:
    for name in values:
        if name not in known:
            raise ConfigError(f"{place}: unknown field {name!r}{suggest(name, sorted(known))}")


def _read_tiles(value: Any) -> Any:
    """JSON's lists as tuples, and no limit for null; what is no list of pairs stays as it is."""
    if not (isinstance(value, list) and all(isinstance(p, list) and len(p) == 2 for p in value)):
        return value
    return tuple((math.inf if most is None else most, tile) for most, tile in value)

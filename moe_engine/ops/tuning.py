"""Which kernel runs for how many rows: the choices for a GPU and the shape that an operator has.

They are in files ``tuned/<gpu>.json``, which `benchmarks.tune` writes with the step times that they
follow from; nothing is measured when an engine starts. A file is for the GPUs that CUDA gives the
name in its ``device``. An entry is for one shape, as a rank sees it. A GPU without a file and a
shape without an entry get defaults, and so does a choice that an entry leaves out.

Every choice is a list of limits and what runs up to them, in the file as in `Steps`; the last has
no limit, null in the file. Example, the norm and router of one model, in one launch for up to 64
rows and in two beyond:

    {"device": "NVIDIA H200",
     "runs": {"qwen3-30b-a3b": {"date": "2026-11-25", "torch": "2.11.0", ...}},
     "norm_router": [{"shape": {"hidden": 2048, "num_experts": 128},
                      "choices": {"kernels": [[64, "fused"], [null, "separate"]]},
                      "measured": {"run": "qwen3-30b-a3b", "steps": [...]}}]}
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Hashable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

import torch

from moe_engine.config.flat import suggest
from moe_engine.errors import ConfigError

FOLDER = Path(__file__).parent / "tuned"
INF = math.inf

V = TypeVar("V", bound=Hashable)
Steps = tuple[tuple[float, V], ...]
"""(limit, what is best up to it), limits ascending, the last one infinite."""


def pick(steps: Steps[V], amount: float) -> V:
    """What is best for an amount.

    Example: ``pick(((16, "a"), (INF, "b")), 16) == "a"``.
    """
    return next(value for limit, value in steps if amount <= limit)


@dataclass(frozen=True)
class Launch:
    """A kernel of decode attention, and how a row and KV head's context is shared out.

    The bits of a row depend on it.

    Attributes:
        block_warps: 0: ``csrc/warp_decode.cu``, clusters of 64 warps; else ``block_decode.cu``, and
            the warps of a thread block: 12, which has a multiprocessor for itself, or 6.
        max_shares: that a context is cut into, each with a cluster or block of its own, at most.
        min_tokens: of a share.
    """

    block_warps: int
    max_shares: int
    min_tokens: int

    def __post_init__(self) -> None:
        """`ValueError` if no kernel can be launched so."""
        is_right = all(
            type(value) is int and value > 0 for value in (self.max_shares, self.min_tokens)
        )
        if self.block_warps not in (0, 6, 12) or not is_right:
            raise ValueError(f"no kernel can be launched by {self}")


@dataclass(frozen=True)
class Choices:
    """What is chosen for an operator; each field is `Steps`.

    Attributes:
        SHAPE: names of the sizes that the choices hold for.
        VALUES: by field, what its steps may have; without a name here `Launch` or None.
    """

    SHAPE: ClassVar[tuple[str, ...]] = ()
    VALUES: ClassVar[dict[str, tuple[Any, ...]]] = {}

    def __post_init__(self) -> None:
        """`ValueError` naming the field that cannot be."""
        for choice in fields(self):
            _check_steps(choice.name, getattr(self, choice.name), self.VALUES.get(choice.name, ()))

    @classmethod
    def default(cls, *shape: int) -> Choices:
        """For a shape that nobody has measured."""
        return cls()


@dataclass(frozen=True)
class ExpertChoices(Choices):
    """Of `ops.moe.expert_ffn` on Hopper.

    Attributes:
        kernels: by rows: ``streaming``, `hopper.streaming_expert_ffn`; ``grouped``,
            `hopper.grouped_expert_ffn`; or ``triton``, `kernels/expert_ffn.py`.
        tiles: by the average pairs of an expert: how many pairs share a read of its weights.
    """

    SHAPE = ("hidden", "intermediate", "num_experts", "top_k")

    VALUES: ClassVar = {
        "kernels": ("streaming", "grouped", "triton"),
        "tiles": (16, 32, 64, 128, 256),
    }

    kernels: Steps[str] = ((2, "streaming"), (INF, "grouped"))
    tiles: Steps[int] = ((0.5, 16), (40, 64), (128, 128), (INF, 256))


@dataclass(frozen=True)
class LinearChoices(Choices):
    """Of `ops.linear` on Hopper.

    Attributes:
        kernels: by rows: ``streaming``, `hopper.linear`; ``split``, `hopper.split_linear`, where
            the sum can be left to the operator that follows; or ``library``, the vendor's, which
            also runs where one of the others has no room.
    """

    SHAPE = ("in_features", "out_features")

    VALUES: ClassVar = {"kernels": ("streaming", "split", "library")}

    kernels: Steps[str] = ((16, "streaming"), (64, "split"), (INF, "library"))

    @classmethod
    def default(cls, *shape: int) -> LinearChoices:
        """The more parts of 512 the depth is split into, the longer it takes to add them up.

        Example: of a depth of 4096 up to 32 rows are split, and 33 to 64 are the library's.
        """
        num_parts = max(1, shape[0] // 512)
        most_split = min(64, 256 // num_parts)
        split = [(most_split, "split")] if most_split > 16 else []
        return cls(((16, "streaming"), *split, (INF, "library")))


@dataclass(frozen=True)
class NormRouterChoices(Choices):
    """Of `ops.moe.norm_and_route` on Hopper.

    Attributes:
        kernels: by rows: ``fused``, `hopper.norm_router`, or ``separate``, two kernels. Beyond
            512 rows the latter is `kernels.norm_router` where that takes them.
    """

    SHAPE = ("hidden", "num_experts")

    VALUES: ClassVar = {"kernels": ("fused", "separate")}

    kernels: Steps[str] = ((64, "fused"), (INF, "separate"))


@dataclass(frozen=True)
class DecodeChoices(Choices):
    """Of attention on Hopper where every row decodes.

    Attributes:
        launches: by rows times KV heads; None: `kernels.paged_decode`.
    """

    SHAPE = ("num_heads", "num_kv_heads")

    # So many shares that contexts of some hundred tokens give each of 132 multiprocessors a block,
    # and that a long context among short ones does not outlast them.
    launches: Steps[Launch | None] = (
        (8, Launch(block_warps=0, max_shares=8, min_tokens=2048)),
        (16, Launch(block_warps=12, max_shares=8, min_tokens=80)),
        (32, Launch(block_warps=12, max_shares=8, min_tokens=160)),
        (64, Launch(block_warps=12, max_shares=8, min_tokens=320)),
        (132, Launch(block_warps=12, max_shares=4, min_tokens=1024)),
        (INF, None),
    )


@dataclass(frozen=True)
class ExchangeChoices(Choices):
    """Of `dist.exchange.nvlink` between ranks of one domain.

    Attributes:
        kinds: by the tokens that a rank may bring in a step: ``packets`` for few, or ``rows``.
        tensor_parallel: by the tokens of a step, where all ranks share each sequence's attention:
            ``replicated`` for few, each rank with its experts on all tokens, or ``sharded``, each
            with a share of the tokens in the exchange.
        norms: by the tokens of a rank: the norm behind a combine by packets in a launch of its own,
            ``apart`` for few, or ``fused`` with it.
    """

    SHAPE = ("num_ranks", "ranks_per_gpu", "row_bytes", "wire_bytes")

    VALUES: ClassVar = {
        "kinds": ("packets", "rows"),
        "tensor_parallel": ("replicated", "sharded"),
        "norms": ("apart", "fused"),
    }

    kinds: Steps[str] = ((64, "packets"), (INF, "rows"))
    tensor_parallel: Steps[str] = ((64, "replicated"), (INF, "sharded"))
    norms: Steps[str] = ((16, "apart"), (INF, "fused"))

    def __post_init__(self) -> None:
        """`ValueError` naming the field that cannot be."""
        super().__post_init__()
        for name, (few, many) in self.VALUES.items():
            found = [value for _, value in getattr(self, name)]
            if found not in ([few, many], [many]):
                raise ValueError(f"{name} must be {few} up to a limit and {many} beyond: {found}")

    @property
    def packet_tokens(self) -> int:
        """Up to how many there are packets; 0: there are none."""
        return _first_limit(self.kinds)

    @property
    def replicated_tokens(self) -> int:
        """Up to how many each rank has all tokens; 0: it never has."""
        return _first_limit(self.tensor_parallel)

    @property
    def apart_tokens(self) -> int:
        """Up to how many the norm is a launch of its own; 0: it never is."""
        return _first_limit(self.norms)


SECTIONS: dict[str, type[Choices]] = {
    "experts": ExpertChoices,
    "linear": LinearChoices,
    "norm_router": NormRouterChoices,
    "decode_attention": DecodeChoices,
    "exchange": ExchangeChoices,
}
"""What the lists of a file are called."""

Table = dict[tuple[type[Choices], tuple[int, ...]], Choices]
"""Choices by kind and shape."""

C = TypeVar("C", bound=Choices)


def _first_limit(steps: Steps[str]) -> int:
    """Of steps with one or two values."""
    return int(steps[0][0]) if len(steps) > 1 else 0


def choices(kind: type[C], device: torch.device, *shape: int) -> C:
    """The choices of a kind for a GPU and a shape, whose sizes are those of ``kind.SHAPE``."""
    known = table(device)
    found = known.get((kind, shape))
    if found is None:
        found = known[kind, shape] = kind.default(*shape)
    return cast(C, found)


@functools.cache
def table(device: torch.device) -> Table:
    """The choices for a device, which operators look up; defaults are added as they are needed.

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
    runs = _of_type(dict, document, "runs", path) or {}
    parsed: Table = {}
    for section, kind in SECTIONS.items():
        for number, entry in enumerate(_of_type(list, document, section, path) or ()):
            place = f"{path}: {section}[{number}]"
            if not isinstance(entry, dict):
                raise ConfigError(f"{place} must be an object, not {entry!r:.80}")
            shape, chosen = _parse_entry(kind, entry, place)
            if (kind, shape) in parsed:
                raise ConfigError(f"{place}.shape has an entry already")
            measured = _of_type(dict, entry, "measured", place)
            if measured is not None and measured.get("run") not in runs:
                run = measured.get("run")
                raise ConfigError(f"{place}.measured.run is {run!r}, which is not in runs")
            parsed[kind, shape] = chosen
    return parsed


def to_json(chosen: Choices) -> dict[str, Any]:
    """The ``choices`` of an entry."""
    return {
        name: [[None if limit == INF else limit, value] for limit, value in steps]
        for name, steps in asdict(chosen).items()
    }


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
    shape = tuple(sizes[name] for name in kind.SHAPE)
    values = _of_type(dict, entry, "choices", place) or {}
    default = kind.default(*shape)
    known = [choice.name for choice in fields(kind)]
    _check_keys(values, set(known), f"{place}.choices")
    try:
        steps = {n: _read_steps(values[n]) if n in values else getattr(default, n) for n in known}
        return shape, kind(**steps)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{place}.choices: {error}") from error


def _read_steps(value: Any) -> Any:
    """JSON's lists as tuples, its null as no limit, its objects as launches."""
    if not (isinstance(value, list) and all(isinstance(p, list) and len(p) == 2 for p in value)):
        return value  # which is no steps, so it will be refused
    return tuple(
        (INF if limit is None else limit, Launch(**best) if isinstance(best, dict) else best)
        for limit, best in value
    )


def _check_steps(name: str, steps: Any, values: tuple[Any, ...]) -> None:
    """`ValueError` if it is no `Steps` or has other values, which are launches if none is named."""
    wanted = " or ".join(map(repr, values)) or "a launch or null"
    try:
        limits = [float(limit) for limit, _ in steps]
        is_right = limits == sorted(set(limits)) and limits[-1:] == [INF]
        for _, best in steps:
            is_right &= best in values if values else best is None or isinstance(best, Launch)
    except (TypeError, ValueError):
        is_right = False
    if not is_right:
        raise ValueError(
            f"{name} must be pairs of an ascending limit, null for the last, and {wanted}; "
            f"not {steps!r:.120}"
        )


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

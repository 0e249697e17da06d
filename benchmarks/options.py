"""What the command lines have in common: lists, models by name, the engine's options."""

from __future__ import annotations

from dataclasses import astuple
from pathlib import Path
from typing import Any

from moe_engine.config.flat import flat_options
from moe_engine.config.yaml import load_yaml
from moe_engine.ops.tuning import Launch

MODELS = Path(__file__).parent / "models"


def int_list(text: str) -> list[int]:
    """``1,8`` as [1, 8]."""
    return [int(part) for part in text.split(",")]


def launch_list(text: str) -> list[Launch]:
    """Launches of decode attention: ``0:8:2048,12:1:1`` as [Launch(0, 8, 2048), Launch(12, 1, 1)].

    The numbers are warps of a block, shares at most, tokens of a share at least.
    """
    return [parse_launch(part) for part in text.split(",")]


def parse_launch(text: str) -> Launch:
    """``12:1:32`` as Launch(12, 1, 32)."""
    return Launch(*map(int, text.split(":")))


def launch_name(launch: Launch) -> str:
    """As `parse_launch` reads it."""
    return ":".join(map(str, astuple(launch)))


def plain_options(config: Path | None, assignments: list[str]) -> dict[str, Any]:
    """The engine's options in a YAML file, then those given as ``name=value``; flat."""
    known = flat_options()
    values = load_yaml(config) if config else {}
    values = {name: v for name, v in values.items() if known[name].section != "server"}
    for assignment in assignments:
        name, _, text = assignment.partition("=")
        values[name] = known[name].parse(text)
    return values


def find_model(name: str | None) -> str | None:
    """A directory as it is, a name as its directory in benchmarks/models/."""
    if name is None or Path(name).is_dir():
        return name
    return str(MODELS / name.lower())

"""Parsing torchrun's variables and handing them to children."""

from __future__ import annotations

import pytest

from moe_engine.env import Environment, child_environment, read_environment
from moe_engine.errors import ConfigError

LAUNCHED = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29500",
}


def test_a_process_that_nobody_launched_is_a_world_of_one() -> None:
    assert read_environment({}) == Environment()
    assert not read_environment({}).launched


def test_torchrun_variables_are_parsed() -> None:
    assert read_environment(LAUNCHED) == Environment(
        launched=True,
        rank=5,
        world_size=8,
        local_rank=1,
        local_world_size=4,
        master_addr="node0",
        master_port=29500,
    )


@pytest.mark.parametrize("missing", ["WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"])
def test_a_missing_variable_is_named(missing: str) -> None:
    variables = {name: value for name, value in LAUNCHED.items() if name != missing}
    with pytest.raises(ConfigError, match=f"{missing} is not; start the ranks with torchrun"):
        read_environment(variables)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RANK", "8"),
        ("RANK", "-1"),
        ("RANK", "one"),
        ("LOCAL_RANK", "4"),
        ("LOCAL_WORLD_SIZE", "9"),
        ("MASTER_PORT", ""),
        ("MOE_ENGINE_LOG_LEVEL", "loud"),
    ],
)
def test_a_value_that_makes_no_sense_is_refused(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=name):
        read_environment({**LAUNCHED, name: value})


def test_the_log_level_needs_no_launcher() -> None:
    assert read_environment({"MOE_ENGINE_LOG_LEVEL": "debug"}).log_level == "debug"
    assert read_environment({"MOE_ENGINE_LOG_LEVEL": ""}).log_level is None


def test_a_child_reads_what_its_parent_wrote(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("HOME", "/nowhere")
    variables = child_environment(
        rank=5,
        world_size=8,
        local_rank=1,
        local_world_size=4,
        master_addr="node0",
        master_port=29500,
        OMP_NUM_THREADS="1",
    )
    assert read_environment(variables) == read_environment(LAUNCHED)
    assert variables["HOME"] == "/nowhere"
    assert variables["OMP_NUM_THREADS"] == "1"

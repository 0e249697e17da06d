"""Compiling in the background keeps no engine from starting, unless other ranks would hang."""

import logging

import pytest
import torch

from moe_engine.engine import precompile
from moe_engine.engine.precompile import Precompilation, num_compile_threads


def start(monkeypatch, error, *, is_collective):
    def compile(self):
        if error is not None:
            raise error

    monkeypatch.setattr(Precompilation, "_compile", compile)
    return Precompilation(
        lambda: None, torch.device("cpu"), is_collective=is_collective, num_threads=1
    )


@pytest.mark.parametrize("is_collective", [True, False])
def test_waits_for_the_end(monkeypatch, is_collective):
    compiling = start(monkeypatch, None, is_collective=is_collective)
    compiling.wait()
    assert not compiling._thread.is_alive()


def test_failure_of_one_rank_alone_is_a_warning(monkeypatch, caplog):
    compiling = start(monkeypatch, RuntimeError("no compiler"), is_collective=False)
    monkeypatch.setattr(precompile.logger, "propagate", True)
    with caplog.at_level(logging.WARNING, logger=precompile.logger.name):
        compiling.wait()
    assert "no compiler" in caplog.text


def test_failure_that_leaves_other_ranks_waiting_is_raised(monkeypatch):
    compiling = start(monkeypatch, RuntimeError("out of memory"), is_collective=True)
    with pytest.raises(RuntimeError, match="out of memory"):
        compiling.wait()


@pytest.mark.parametrize(
    ("processors", "ranks", "threads"),
    [(1, 1, 1), (2, 8, 1), (16, 1, 16), (128, 1, 16), (96, 8, 12)],
)
def test_ranks_of_a_machine_share_its_processors(monkeypatch, processors, ranks, threads):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(processors)))
    assert num_compile_threads(ranks) == threads

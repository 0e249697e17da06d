"""The start's time is split into phases that leave nothing out."""

import subprocess
import sys
import time

from moe_engine.engine import startup
from moe_engine.engine.startup import StartupClock, describe_startup


def test_phases_follow_one_another_and_repeated_ones_add_up(monkeypatch):
    now = iter([12.0, 12.5, 14.0, 14.25])
    monkeypatch.setattr(startup.time, "perf_counter", lambda: next(now))
    clock = StartupClock(10.0)
    for phase in ("imports", "wait", "weights", "wait"):
        clock.mark(phase)
    assert clock.seconds == {"imports": 2.0, "wait": 0.75, "weights": 1.5}
    assert sum(clock.seconds.values()) == 14.25 - 10.0


def test_the_description_names_the_whole_and_the_parts():
    assert describe_startup({"imports": 2.04, "KV cache": 0.26}) == (
        "2.3 s: imports 2.0, KV cache 0.3"
    )


def test_the_clock_is_the_same_in_another_process():
    command = [sys.executable, "-c", "import time; print(time.perf_counter())"]
    before = time.perf_counter()
    there = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert before < there < time.perf_counter()

"""A rank that dies under load takes the engine down at once, loudly and completely."""

import os
import signal
import threading
import time
from pathlib import Path

import httpx
import psutil
import pytest

from moe_engine import EngineDeadError, MoEEngine, SamplingParams
from tests.e2e.server_process import running_server

ROOT = Path(__file__).parents[2]
FAULTS = Path(__file__).parent / "faults"
LAYOUT = ("--attention-tp", "2", "--attention-dp", "2")


def ask_until_it_ends(server, outcomes, *, stream):
    """One long request; the lines of its answer go to ``outcomes``."""
    body = {
        "model": "moe-engine-demo",
        "prompt": "Once",
        "max_tokens": 4000,
        "ignore_eos": True,
        "stream": stream,
    }
    lines = []
    try:
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as answer:
            lines += answer.iter_lines()
    except httpx.HTTPError as error:
        lines.append(repr(error))
    outcomes.append(lines)


@pytest.mark.parametrize("rank", [0, 3])
def test_killed_rank_under_load_is_an_error_for_everybody(rank):
    with running_server(*LAYOUT) as server:
        outcomes = []
        threads = [
            threading.Thread(
                target=ask_until_it_ends, args=(server, outcomes), kwargs={"stream": number < 6}
            )
            for number in range(8)
        ]
        for thread in threads:
            thread.start()
        while server.metric("moe_engine:num_requests_running") < 8:
            time.sleep(0.05)
        ranks = server.ranks()
        assert sorted(ranks) == [0, 1, 2, 3]
        killed = time.monotonic()
        ranks[rank].send_signal(signal.SIGKILL)
        while server.health() == 200:
            assert time.monotonic() - killed < 10
        assert server.health() == 503
        assert server.process.wait(10) != 0
        assert time.monotonic() - killed < 10
        for thread in threads:
            thread.join(10)
        assert len(outcomes) == 8
        for lines in outcomes:
            assert "[DONE]" not in "".join(lines)
            assert f"rank {rank}" in "".join(lines[-3:])
        _, alive = psutil.wait_procs(ranks.values(), timeout=5)
        assert not alive
        output = server.process.stdout.read()
        assert f"rank {rank}" in output
        assert "SIGKILL" in output


def test_python_api_names_the_killed_rank():
    with MoEEngine(attention_tp=2, device="cpu") as engine:
        stream = engine.stream("Once", SamplingParams(max_tokens=4000, ignore_eos=True))
        next(stream)
        children = psutil.Process().children()
        ranks = {c.environ()["RANK"]: c for c in children if "RANK" in c.environ()}
        ranks["1"].kill()
        with pytest.raises(EngineDeadError, match=r"rank 1 .*SIGKILL") as caught:
            list(stream)
        assert caught.value.rank == 1
        with pytest.raises(EngineDeadError):
            engine.generate("Again")
    assert not psutil.wait_procs(ranks.values(), timeout=5)[1]


def test_rank_that_raises_is_named_with_its_traceback(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{FAULTS}{os.pathsep}{ROOT}")
    monkeypatch.setenv("RANK_THAT_RAISES", "1")
    with MoEEngine(attention_tp=2, device="cpu") as engine:
        started = time.monotonic()
        with pytest.raises(EngineDeadError, match=r"rank 1 raised ValueError: planted") as caught:
            engine.generate("Once", SamplingParams(max_tokens=100, ignore_eos=True))
        assert time.monotonic() - started < 10
    assert caught.value.rank == 1
    assert "Traceback" in caught.value.details
    assert "sitecustomize.py" in caught.value.details


def test_rank_that_sends_nothing_is_named_to_all_clients(monkeypatch):
    """What a rank tells whose kernels have given another one up, in the middle of a step."""
    monkeypatch.setenv("PYTHONPATH", f"{FAULTS}{os.pathsep}{ROOT}")
    monkeypatch.setenv("RANK_THAT_WAITS_IN_VAIN", "0")
    with running_server("--attention-dp", "2") as server:
        outcomes = []
        threads = [
            threading.Thread(
                target=ask_until_it_ends, args=(server, outcomes), kwargs={"stream": stream}
            )
            for stream in (True, False)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert server.process.wait(10) != 0
        assert len(outcomes) == 2
        said = "rank 1 has sent nothing to rank 0 in the combine of exchange 376"
        for lines in outcomes:
            assert said in "".join(lines[-3:])
        assert said in server.process.stdout.read()


def test_hang_of_one_rank_among_four_is_not_blamed_on_a_dead_one():
    layout = {"attention_tp": 2, "attention_dp": 2}
    with MoEEngine(**layout, device="cpu", step_timeout=2.0) as engine:
        stream = engine.stream("Once", SamplingParams(max_tokens=4000, ignore_eos=True))
        next(stream)
        ranks = psutil.Process().children()
        [stopped] = [rank for rank in ranks if rank.environ().get("RANK") == "3"]
        stopped.suspend()
        with pytest.raises(EngineDeadError) as caught:
            list(stream)
        assert "died without a word" not in str(caught.value)


def test_rank_that_hangs_ends_the_engine_after_the_step_timeout():
    with MoEEngine(attention_tp=2, device="cpu", step_timeout=2.0) as engine:
        stream = engine.stream("Once", SamplingParams(max_tokens=4000, ignore_eos=True))
        next(stream)
        ranks = psutil.Process().children()
        [stopped] = [rank for rank in ranks if rank.environ().get("RANK") == "1"]
        stopped.suspend()
        started = time.monotonic()
        with pytest.raises(EngineDeadError, match=r"(?i)timed out"):
            list(stream)
        assert time.monotonic() - started < 10
    assert stopped not in psutil.Process().children()

"""A rank other than 0 sends the results of its launched steps, or says why it cannot."""

import queue

import pytest

from moe_engine.dist.channel import ChannelClosed
from moe_engine.engine import rank_main
from moe_engine.types.messages import RankFailed, StepDone
from moe_engine.types.step import StepResult


class Channel:
    def __init__(self, closes_after=None):
        self.sent = []
        self._closes_after = closes_after

    def send(self, message):
        if len(self.sent) == self._closes_after:
            raise ChannelClosed("gone")
        self.sent.append(message)


class Step:
    def __init__(self, result):
        self._result = result

    def result(self):
        if isinstance(self._result, Exception):
            raise self._result
        return self._result


@pytest.fixture
def exits(monkeypatch):
    """Exit statuses, instead of the end of this process."""
    statuses = []
    monkeypatch.setattr(rank_main.os, "_exit", statuses.append)
    return statuses


def send(channel, results):
    launched = queue.SimpleQueue()
    for result in results:
        launched.put(Step(result))
    launched.put(None)
    rank_main._send_results(channel, 3, launched)


def test_results_go_out_in_the_order_of_the_steps_and_idle_steps_do_not(exits):
    channel = Channel()
    results = [StepResult(0, 1), None, StepResult(2, 1), StepResult(3, 1)]
    send(channel, results)
    assert channel.sent == [StepDone(result) for result in results if result is not None]
    assert exits == []


def test_device_that_fails_is_reported_with_a_traceback_and_ends_the_rank(exits):
    channel = Channel()
    send(channel, [StepResult(0, 1), RuntimeError("illegal memory access"), StepResult(2, 1)])
    done, failed = channel.sent
    assert done == StepDone(StepResult(0, 1))
    assert isinstance(failed, RankFailed)
    assert failed.rank == 3
    assert "rank 3 raised RuntimeError: illegal memory access" in failed.message
    assert "Traceback" in failed.traceback
    assert exits == [1]


def test_leader_that_has_gone_is_no_failure_of_this_rank(exits):
    send(Channel(closes_after=1), [StepResult(0, 1), StepResult(1, 1)])
    assert exits == []

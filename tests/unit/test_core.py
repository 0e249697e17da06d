"""Rank 0's loop: what is launched, awaited and reported, and in which order."""

import queue
import threading
import time

import pytest

from moe_engine.config import CacheConfig, SchedulerConfig
from moe_engine.dist.communicator import PeerLostError
from moe_engine.engine import watch
from moe_engine.engine.core import EngineCore
from moe_engine.engine.scheduler import Scheduler
from moe_engine.engine.watch import StepWatch
from moe_engine.types.messages import AbortRequest, AddRequest, RunStep, Shutdown
from moe_engine.types.results import FinishReason
from moe_engine.types.sampling import SamplingParams
from moe_engine.types.step import SampledToken, StepResult


def answer(plan, dp_group):
    """A group's result: the token of every sample is the step's number."""
    steps = plan.groups[dp_group].steps
    if not steps:
        return None
    tokens = [SampledToken(s.seq_id, plan.step_id) for s in steps if s.uniform is not None]
    return StepResult(plan.step_id, dp_group, tokens)


class Launched:
    def __init__(self, events, plan):
        self._events = events
        self._plan = plan

    def result(self):
        self._events.append(("result", self._plan.step_id))
        return answer(self._plan, 0)


class Hub:
    """The switchboard, the front end and the runner in one; logs what happens.

    ``others`` says which results of other groups arrive, and when: a function of the step's plan
    that returns the results to deliver once that step has been launched.
    """

    def __init__(self, others=lambda plan: []):
        self.requests = queue.SimpleQueue()
        self.results = queue.SimpleQueue()
        self.events = []
        self.updates = {}
        self.num_open = 0
        self.failures = []
        self.on_launch = {}
        self._others = others

    def add(self, request_id, num_tokens, prompt=(1, 2, 3)):
        params = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
        self.requests.put(AddRequest(request_id, list(prompt), params))
        self.num_open += 1

    def tell_ranks(self, message):
        assert isinstance(message, RunStep)
        self.events.append(("plan", message.plan.step_id))

    def launch(self, plan):
        self.events.append(("launch", plan.step_id))
        self.on_launch.get(plan.step_id, lambda: None)()
        for result in self._others(plan):
            self.results.put(result)
        return Launched(self.events, plan)

    def tell_front_end(self, message):
        self.events.append(("report", message.stats.num_steps_total))
        for update in message.requests:
            self.updates.setdefault(update.request_id, []).append(update)
            self.num_open -= update.finish_reason is not None
        if self.num_open == 0:
            self.requests.put(Shutdown())

    def fail(self, failure):
        self.failures.append(failure)

    def tokens(self, request_id):
        return [token for update in self.updates[request_id] for token in update.token_ids]


def run(hub, *, depth, launches_ahead, num_groups=1, timeout=30.0):
    scheduler = Scheduler(
        SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=16, pipeline_depth=depth),
        CacheConfig(block_size=4),
        num_groups=num_groups,
        num_blocks=32,
        max_model_len=64,
        eos_token_ids=(),
        seed=0,
    )
    EngineCore(
        scheduler,
        hub,
        hub,
        pipeline_depth=depth,
        launches_ahead=launches_ahead,
        step_timeout=timeout,
    ).run()
    return scheduler


def names(hub):
    return [(name, number) for name, number in hub.events if name != "plan"]


def test_plans_go_out_before_rank_0_launches_its_own_part():
    hub = Hub()
    hub.add("a", 3)
    run(hub, depth=2, launches_ahead=True)
    for step_id in range(3):
        assert hub.events.index(("plan", step_id)) < hub.events.index(("launch", step_id))


def test_where_launching_computes_a_step_is_reported_before_the_next_one():
    hub = Hub()
    hub.add("a", 3)
    run(hub, depth=1, launches_ahead=False)
    assert names(hub) == [
        *(("launch", 0), ("result", 0), ("report", 1)),
        *(("launch", 1), ("result", 1), ("report", 2)),
        *(("launch", 2), ("result", 2), ("report", 3)),
    ]


def test_where_launching_enqueues_the_next_step_goes_before_the_report():
    hub = Hub()
    hub.add("a", 3)
    run(hub, depth=1, launches_ahead=True)
    assert names(hub) == [
        *(("launch", 0), ("result", 0)),
        *(("launch", 1), ("report", 2), ("result", 1)),
        *(("launch", 2), ("report", 3), ("result", 2), ("report", 3)),
    ]


def test_two_steps_are_under_way_and_the_oldest_is_awaited():
    hub = Hub()
    hub.add("a", 4)
    run(hub, depth=2, launches_ahead=True)
    assert names(hub) == [
        *(("launch", 0), ("launch", 1), ("result", 0)),
        *(("launch", 2), ("report", 3), ("result", 1)),
        *(("launch", 3), ("report", 4), ("result", 2)),
        *(("report", 4), ("result", 3), ("report", 4)),
    ]
    assert hub.tokens("a") == [0, 1, 2, 3]


@pytest.mark.parametrize("launches_ahead", [True, False])
@pytest.mark.parametrize("depth", [1, 2])
def test_every_request_hears_every_token_and_its_end(depth, launches_ahead):
    hub = Hub()
    for number in range(9):
        hub.add(f"r{number}", number + 1, prompt=range(1, 2 + number))
    scheduler = run(hub, depth=depth, launches_ahead=launches_ahead)
    for number in range(9):
        assert len(hub.tokens(f"r{number}")) == number + 1
        assert hub.updates[f"r{number}"][-1].finish_reason is FinishReason.LENGTH
    assert not scheduler.has_unfinished
    scheduler.check_idle()


def test_abort_is_answered_though_nothing_else_happens():
    hub = Hub()
    hub.add("a", 20)
    hub.on_launch[3] = lambda: hub.requests.put(AbortRequest("a"))
    run(hub, depth=2, launches_ahead=True)
    assert hub.updates["a"][-1].finish_reason is FinishReason.ABORT
    assert [update.finish_reason for update in hub.updates["a"][:-1]] == [None] * 3


def test_results_of_other_groups_count_for_their_own_step():
    """Group 1 may answer a step before rank 0 has asked for it, even two at a time."""
    held = []

    def others(plan):
        result = answer(plan, 1)
        if result is not None:
            held.append(result)
        if plan.step_id % 2 == 0:
            return []
        arrived, held[:] = list(held), []
        return arrived

    hub = Hub(others)
    hub.add("a", 8)
    hub.add("b", 8)
    run(hub, depth=2, launches_ahead=True, num_groups=2)
    assert hub.tokens("a") == hub.tokens("b") == list(range(8))


def test_group_that_never_answers_is_named():
    hub = Hub()
    hub.add("a", 2)
    hub.add("b", 2)
    with pytest.raises(PeerLostError, match=r"step 0 has no result of DP group\(s\) \[1\] after"):
        run(hub, depth=1, launches_ahead=True, num_groups=2, timeout=0.1)


def test_error_of_the_device_ends_the_loop():
    hub = Hub()
    hub.add("a", 2)

    def failing(plan):
        launched = Launched(hub.events, plan)
        launched.result = lambda: (_ for _ in ()).throw(RuntimeError("illegal memory access"))
        return launched

    hub.launch = failing
    with pytest.raises(RuntimeError, match="illegal memory access"):
        run(hub, depth=2, launches_ahead=True)


# The watch over rank 0's own device.


def test_step_that_the_device_never_finishes_ends_the_engine():
    hub, failed = Hub(), threading.Event()
    hub.fail = lambda failure: (hub.failures.append(failure), failed.set())
    step_watch = StepWatch(hub, 0.1)
    with step_watch.waiting_for(7):
        assert failed.wait(5)
    assert hub.failures[0].secondary
    assert "step 7 did not finish on rank 0's device within 0.1 s" in hub.failures[0].message


def test_watch_leaves_quick_steps_alone(monkeypatch):
    monkeypatch.setattr(watch, "_LOOK_INTERVAL", 0.01)
    hub = Hub()
    step_watch = StepWatch(hub, 0.3)
    for step_id in range(8):
        with step_watch.waiting_for(step_id):
            time.sleep(0.06)
    assert not hub.failures

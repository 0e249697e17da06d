"""Rank 0's main loop: schedule, tell everybody, launch, collect, report."""

from __future__ import annotations

import queue
from collections import deque
from dataclasses import dataclass, field

from moe_engine.dist.communicator import PeerLostError
from moe_engine.engine.control import ControlHub
from moe_engine.engine.pending import PendingStep
from moe_engine.engine.runner import ModelRunner
from moe_engine.engine.scheduler import Scheduler
from moe_engine.engine.watch import StepWatch
from moe_engine.errors import InvalidRequestError
from moe_engine.types.messages import (
    AbortRequest,
    AddRequest,
    RequestRefused,
    RequestUpdate,
    RunStep,
    Shutdown,
    Updates,
)
from moe_engine.types.step import StepPlan, StepResult


@dataclass
class _StepInFlight:
    """A plan that all ranks have, and the results of it that other DP groups have sent so far."""

    plan: StepPlan
    own: PendingStep
    results: list[StepResult] = field(default_factory=list)


class EngineCore:
    """The one brain of a replica.

    Every step's plan goes to all ranks before rank 0 launches its own part, so all ranks run the
    same steps in the same order; up to ``pipeline_depth`` plans are under way. Where launching is
    only enqueueing (`launches_ahead`), the device gets its next step before the front end gets the
    news of the last one.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: ModelRunner,
        hub: ControlHub,
        *,
        pipeline_depth: int,
        launches_ahead: bool,
        step_timeout: float,
    ) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._hub = hub
        self._pipeline_depth = pipeline_depth
        self._launches_ahead = launches_ahead
        self._step_timeout = step_timeout
        self._watch = StepWatch(hub, step_timeout)
        self._in_flight: deque[_StepInFlight] = deque()
        self._news: list[RequestUpdate] | None = None  # what the front end has not been told

    def run(self) -> None:
        """Serve until the front end says `Shutdown`."""
        while self._take_in_requests():
            if not self._launches_ahead:
                self._report()
            while len(self._in_flight) < self._pipeline_depth:
                plan = self._scheduler.schedule()
                if plan is None:
                    break
                self._launch(plan)
            self._report()
            if self._in_flight:
                self._news = self._collect_oldest()

    def _take_in_requests(self) -> bool:
        """Handle what the front end has sent, waiting if there is no work; False to shut down."""
        while True:
            idle = not self._in_flight and not self._scheduler.has_unfinished and self._news is None
            try:
                message = self._hub.requests.get(block=idle)
            except queue.Empty:
                return True
            if isinstance(message, Shutdown):
                return False
            if isinstance(message, AddRequest):
                self._add(message)
            elif isinstance(message, AbortRequest):
                update = self._scheduler.abort(message.request_id)
                if update is not None:
                    self._news = [*(self._news or ()), update]

    def _add(self, request: AddRequest) -> None:
        try:
            self._scheduler.add(request)
        except InvalidRequestError as error:
            self._hub.tell_front_end(
                RequestRefused(
                    request.request_id, error.message, error.param, error.code, error.status
                )
            )

    def _launch(self, plan: StepPlan) -> None:
        """Send the plan to all ranks and launch this rank's part of it."""
        self._hub.tell_ranks(RunStep(plan))
        self._in_flight.append(_StepInFlight(plan, self._runner.launch(plan)))

    def _collect_oldest(self) -> list[RequestUpdate]:
        """Wait for every busy DP group's result of the oldest step and tell the scheduler."""
        oldest = self._in_flight[0]
        plan, results = oldest.plan, oldest.results
        with self._watch.waiting_for(plan.step_id):
            own = oldest.own.result()
        if own is not None:
            results.append(own)
        num_busy = sum(bool(group.steps) for group in plan.groups)
        while len(results) < num_busy:
            result = self._wait_for_result(plan, results)
            for step in self._in_flight:
                if step.plan.step_id == result.step_id:
                    step.results.append(result)
        self._in_flight.popleft()
        return self._scheduler.complete(results)

    def _wait_for_result(self, plan: StepPlan, results: list[StepResult]) -> StepResult:
        """The next result of another DP group; `PeerLostError` after ``step_timeout`` seconds."""
        try:
            return self._hub.results.get(timeout=self._step_timeout)
        except queue.Empty:
            answered = {result.dp_group for result in results}
            silent = [g for g, group in enumerate(plan.groups) if group.steps and g not in answered]
            raise PeerLostError(
                f"step {plan.step_id} has no result of DP group(s) {silent} after "
                f"{self._step_timeout:g} s (step_timeout)"
            ) from None

    def _report(self) -> None:
        """Tell the front end what a step or an abort has brought; the counters even if nothing."""
        if self._news is not None:
            self._hub.tell_front_end(Updates(self._news, self._scheduler.stats()))
            self._news = None

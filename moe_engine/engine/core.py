"""Rank 0's main loop: schedule, tell everybody, execute, collect, report."""

from __future__ import annotations

import queue

from moe_engine.config import EngineConfig
from moe_engine.dist.communicator import PeerLostError
from moe_engine.engine.control import ControlHub
from moe_engine.engine.runner import ModelRunner
from moe_engine.engine.scheduler import Scheduler
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


class EngineCore:
    """The one brain of a replica.

    Every step's plan goes to all ranks before rank 0 executes its own part, so all ranks run the
    same steps in the same order; up to ``pipeline_depth`` plans are under way.
    """

    def __init__(
        self, scheduler: Scheduler, runner: ModelRunner, hub: ControlHub, config: EngineConfig
    ) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._hub = hub
        self._pipeline_depth = config.scheduler.pipeline_depth
        self._step_timeout = config.step_timeout
        self._in_flight: list[tuple[StepPlan, list[StepResult]]] = []

    def run(self) -> None:
        """Serve until the front end says `Shutdown`."""
        while self._take_in_requests():
            while len(self._in_flight) < self._pipeline_depth:
                plan = self._scheduler.schedule()
                if plan is None:
                    break
                self._launch(plan)
            if self._in_flight:
                self._report(self._collect_oldest())

    def _take_in_requests(self) -> bool:
        """Handle what the front end has sent, waiting if there is no work; False to shut down."""
        updates: list[RequestUpdate] = []
        while True:
            idle = not (self._in_flight or self._scheduler.has_unfinished or updates)
            try:
                message = self._hub.requests.get(block=idle)
            except queue.Empty:
                break
            if isinstance(message, Shutdown):
                return False
            if isinstance(message, AddRequest):
                self._add(message)
            elif isinstance(message, AbortRequest):
                update = self._scheduler.abort(message.request_id)
                if update is not None:
                    updates.append(update)
        if updates:
            self._report(updates)
        return True

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
        """Send the plan to all ranks and execute this rank's part of it."""
        self._hub.tell_ranks(RunStep(plan))
        own = self._runner.execute(plan)
        self._in_flight.append((plan, [] if own is None else [own]))

    def _collect_oldest(self) -> list[RequestUpdate]:
        """Wait for every busy DP group's result of the oldest step and tell the scheduler."""
        plan, results = self._in_flight.pop(0)
        num_busy = sum(bool(group.steps) for group in plan.groups)
        while len(results) < num_busy:
            result = self._wait_for_result(plan, results)
            for other_plan, other_results in [(plan, results), *self._in_flight]:
                if other_plan.step_id == result.step_id:
                    other_results.append(result)
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

    def _report(self, updates: list[RequestUpdate]) -> None:
        self._hub.tell_front_end(Updates(updates, self._scheduler.stats()))

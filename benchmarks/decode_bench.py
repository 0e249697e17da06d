"""Decode steps of a rank in this process, with dummy weights and without engine or front end."""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.driver import random_prompts
from benchmarks.options import find_model, int_list
from moe_engine.config.flat import build_config
from moe_engine.dist.layout import RankLayout
from moe_engine.dist.rendezvous import open_store
from moe_engine.engine.decode import DecodeStep
from moe_engine.engine.graphs import DecodeGraphs
from moe_engine.engine.model_directory import resolve_model
from moe_engine.engine.pending import PendingStep
from moe_engine.engine.runtime import LocalPlace, RankRuntime
from moe_engine.engine.scheduler import Scheduler
from moe_engine.types.messages import AddRequest
from moe_engine.types.sampling import SamplingParams
from moe_engine.types.step import GroupPlan, StepPlan

BLOCK_SIZE = 16
# Of the tokens drawn: greedy sequences may come to repeat one token, and then need fewer experts.
TEMPERATURE = 1.0
# Room for steps beside those of prompts, where one step is timed again and again.
SPARE_STEPS = 32

Graphs = tuple[DecodeStep | None, DecodeGraphs | None]
"""A runner's captured steps and their static memory."""


def add_arguments(parser: argparse.ArgumentParser, batches: list[int] | None = None) -> None:
    """What every script around a `DecodeBench` takes: the engine, and batch sizes if any."""
    parser.add_argument("--config", type=Path, help="YAML file of the engine's options")
    parser.add_argument("--model", help="checkpoint directory, or a name in benchmarks/models")
    parser.add_argument("--set", action="append", default=[], metavar="OPTION=VALUE")
    if batches is not None:
        parser.add_argument("--batches", type=int_list, default=batches)


class DecodeBench:
    """A rank of one in this process, and a scheduler to plan its steps.

    Args:
        options: the engine's.
        model: checkpoint directory, or a name in benchmarks/models; None: what the options say.
        cases: what will be prepared, (sequences of a batch, tokens of a prompt).
        num_steps: decode steps of a batch, at most.
        pipeline_depth: steps under way at a time.

    Attributes:
        runtime: the rank.
    """

    def __init__(
        self,
        options: dict[str, Any],
        model: str | None,
        cases: Sequence[tuple[int, int]],
        num_steps: int,
        pipeline_depth: int = 1,
    ) -> None:
        # The first sequences decode while others, one a step at worst, compute their prompts.
        most_sequences = max(batch for batch, _ in cases)
        more = num_steps + 8 + most_sequences
        directory = str(resolve_model(find_model(model or options.get("model"))))
        options = options | {
            "model": directory,
            "load_format": "dummy",
            "prefix_cache": False,
            "pipeline_depth": pipeline_depth,
            "max_model_len": max(num_input for _, num_input in cases) + more,
            "max_num_seqs": most_sequences,
            "num_blocks": max(
                batch * (-(-(num_input + more) // BLOCK_SIZE) + 1) for batch, num_input in cases
            ),
            "block_size": BLOCK_SIZE,
        }
        config, _ = build_config(options)
        runtime = RankRuntime(config, RankLayout(0, 1, 1), LocalPlace(0, 1))
        with tempfile.TemporaryDirectory() as store:
            runtime.join(open_store(f"{store}/store", 0, 1))
        num_blocks = runtime.load(lambda *_: None)
        runtime.start(num_blocks)
        self.runtime = runtime
        self.model = Path(directory).name
        self.num_layers = runtime.model_config.num_hidden_layers
        self._scheduler = Scheduler(
            config.scheduler,
            config.cache,
            num_groups=1,
            num_blocks=num_blocks,
            max_model_len=runtime.max_model_len,
            eos_token_ids=(),
            seed=0,
        )
        self._ids: list[str] = []
        self._numbers = itertools.count()
        self._in_flight: deque[tuple[StepPlan, PendingStep]] = deque()
        self._pipeline_depth = pipeline_depth
        self._ends: list[torch.cuda.Event] = []
        self._start_graphs = runtime.runner._decode, runtime.runner._graphs

    def prepare(self, batch: int, num_input: int, temperature: float = 0.0) -> Callable[[], None]:
        """Compute the prompts of a new batch; the function returned finishes one decode step."""
        self._clear()
        self._use(self._start_graphs)
        self._add(batch, num_input, temperature)
        is_prefilling = True
        while is_prefilling:
            is_prefilling = self._step() != batch
        return lambda: assert_equal(self._step(), batch)

    def step_seconds(self, step: Callable[[], None], num_steps: int) -> list[float]:
        """From the end of each step on the device to the end of the next."""
        self._ends.clear()
        for _ in range(num_steps + self._pipeline_depth):
            step()
        torch.cuda.synchronize()
        ends = self._ends[-num_steps - 1 :]
        return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(ends)]

    def capture(self, batch: int) -> Graphs:
        """Capture the steps of this batch size anew, as the operators choose now."""
        runner = self.runtime.runner
        runner.capture_decode_graphs([batch])
        return runner._decode, runner._graphs

    def repeatable_step(self) -> StepPlan:
        """The prepared batch's next step, which can be launched again and again.

        The same tokens at the same positions need the same experts, so steps with other kernels
        are compared without noise from what they compute.
        """
        while self._in_flight:
            self._finish_step()
        return self._next_step_again()

    def repeatable_prompts(
        self, num_decodes: int, num_input: int, num_prompts: int, num_tokens: int
    ) -> StepPlan:
        """A step of whole prompts beside decodes, which can be launched again and again."""
        if num_decodes > 0:
            self.prepare(num_decodes, num_input)
            while self._in_flight:
                self._finish_step()
        else:
            self._clear()
        self._add(num_prompts, num_tokens, temperature=0.0)
        plan = self._next_step_again()
        assert_equal(plan.groups[0].num_tokens, num_decodes + num_prompts * num_tokens)
        return plan

    def hidden_states(self, plan: StepPlan) -> torch.Tensor:
        """The final ones of a step that can be launched again, float32 [rows that sample, H]."""
        runner, kept = self.runtime.runner, list[torch.Tensor]()
        compute = runner._hidden_states

        def compute_and_keep(*args: Any) -> torch.Tensor:
            kept.append(compute(*args))
            return kept[-1]

        runner._hidden_states = compute_and_keep  # type: ignore[assignment, method-assign]
        runner.launch(plan).result()
        runner._hidden_states = compute  # type: ignore[method-assign]
        return kept[0].float()

    def _next_step_again(self) -> StepPlan:
        """The next step of all sequences, after it has run once."""
        plan = self._scheduler.schedule()
        assert plan is not None
        self._in_flight.append((plan, self.runtime.runner.launch(plan)))
        self._finish_step()
        steps = [replace(step, new_blocks=[]) for step in plan.groups[0].steps]
        assert_equal(len(steps), len(self._ids))
        return StepPlan(plan.step_id, [GroupPlan(steps)])

    def _add(self, number: int, num_tokens: int, temperature: float) -> None:
        """Ask for so many more sequences, which end when they are aborted."""
        vocab_size = self.runtime.model_config.vocab_size
        params = SamplingParams(temperature=temperature, ignore_eos=True)
        prompts = random_prompts(number, num_tokens, vocab_size, seed=number)
        for prompt in prompts:
            self._ids.append(str(next(self._numbers)))
            self._scheduler.add(AddRequest(self._ids[-1], prompt, params))

    def _clear(self) -> None:
        """Let go of all sequences."""
        while self._in_flight:
            self._finish_step()
        for request_id in self._ids:
            self._scheduler.abort(request_id)
        self._ids.clear()

    def repeat(self, plan: StepPlan, graphs: Graphs, num_steps: int) -> list[float]:
        """Seconds from the end of each `repeatable_step` on the device to the end of the next."""
        self._use(graphs)
        ends: list[torch.cuda.Event] = []
        under_way: deque[PendingStep] = deque()
        for _ in range(num_steps + 1):
            if len(under_way) == self._pipeline_depth:
                under_way.popleft().result()
            under_way.append(self.runtime.runner.launch(plan))
            ends.append(torch.cuda.Event(enable_timing=True))
            ends[-1].record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(ends)]

    def logits(self, plan: StepPlan, graphs: Graphs) -> torch.Tensor:
        """Of a `repeatable_step`, float32 [batch, vocabulary]."""
        self._use(graphs)
        self.runtime.runner.launch(plan).result()
        _, decode_graphs = graphs
        assert decode_graphs is not None
        logits_SV = decode_graphs.replay(len(self._ids))
        assert logits_SV is not None
        return logits_SV.float()

    def _use(self, graphs: Graphs) -> None:
        """Launch these from now on."""
        self.runtime.runner._decode, self.runtime.runner._graphs = graphs

    def _step(self) -> int:
        """Finish a step; returns how many sequences decoded in it, 0 if any computed its prompt."""
        while len(self._in_flight) < self._pipeline_depth:
            plan = self._scheduler.schedule()
            if plan is None:
                break
            self._in_flight.append((plan, self.runtime.runner.launch(plan)))
            end = torch.cuda.Event(enable_timing=True)
            end.record()
            self._ends.append(end)
        steps = self._finish_step().groups[0].steps
        return len(steps) if all(step.num_tokens == 1 for step in steps) else 0

    def _finish_step(self) -> StepPlan:
        plan, pending = self._in_flight.popleft()
        result = pending.result()
        assert result is not None
        self._scheduler.complete([result])
        return plan


def assert_equal(value: int, expected: int) -> None:
    """A step that was not what it should be makes the figures worthless."""
    assert value == expected, (value, expected)

"""A whole engine's ranks as threads of one process, each with its part of the experts.

On a GPU all share it: each has a stream of its own, and they exchange tokens by the kernels that
ranks with a GPU each use. On a CPU a meeting of the threads stands for torch's collectives.

Threads that share a GPU may not wait for all of it: a kernel there may wait for what the waiting
thread has still to launch. So they wait for their own streams only (`waiting_for_own_streams`).
"""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

from moe_engine.config.flat import build_config
from moe_engine.dist.communicator import Communicator
from moe_engine.dist.exchange.domain import ExchangeShape, NvlinkDomain, virtual_domains
from moe_engine.dist.groups import ParallelGroups
from moe_engine.dist.layout import RankLayout
from moe_engine.engine.pending import PendingStep
from moe_engine.engine.rank_main import _make_scheduler
from moe_engine.engine.runtime import LocalPlace, RankRuntime
from moe_engine.types.messages import AddRequest
from moe_engine.types.sampling import SamplingParams
from moe_engine.types.step import StepPlan, StepResult

T = TypeVar("T")
ABORTED = 1 << 32
"""An `AbortRecord` that makes every exchange end at once."""
_streams: list[torch.cuda.Stream] = []
"""Of ranks, by their numbers, of all worlds: there are counters for few streams."""
Output = tuple[list[int], list[Any], list[Any]]


class Meeting:
    """Where threads hand each other values."""

    def __init__(self, size: int) -> None:
        self._barrier = threading.Barrier(size, timeout=120)
        self._values: list[Any] = [None] * size

    def values(self, rank: int, value: Any) -> list[Any]:
        """What all threads bring, by rank, once all have."""
        self._values[rank] = value
        self._barrier.wait()
        values = list(self._values)
        self._barrier.wait()
        return values


class ThreadCommunicator(Communicator):
    """The collectives of ranks that are threads, on a CPU."""

    def __init__(self, size: int, rank: int, meeting: Meeting) -> None:
        self.size, self.rank = size, rank
        self._meeting = meeting

    def all_to_all_rows(
        self, x_TH: torch.Tensor, send_counts: list[int], recv_counts: list[int]
    ) -> torch.Tensor:
        """See `Communicator.all_to_all_rows`."""
        parts = self._meeting.values(self.rank, x_TH.split(send_counts))
        return torch.cat([of_rank[self.rank] for of_rank in parts])

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """See `Communicator.all_reduce`."""
        return torch.stack(self._meeting.values(self.rank, x.clone())).sum(dim=0)

    def all_gather_rows(self, x_TH: torch.Tensor, counts: list[int]) -> torch.Tensor:
        """See `Communicator.all_gather_rows`."""
        return torch.cat(self._meeting.values(self.rank, x_TH))

    def gather_columns(self, x_TH: torch.Tensor) -> torch.Tensor | None:
        """See `Communicator.gather_columns`."""
        parts = self._meeting.values(self.rank, x_TH)
        return torch.cat(parts, dim=-1) if self.rank == 0 else None

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        """See `Communicator.broadcast`."""
        return x.copy_(self._meeting.values(self.rank, x.clone())[0])


class NoCommunicator(Communicator):
    """Of ranks that share a GPU, among which torch has no collectives; anything raises."""

    def __init__(self, size: int, rank: int) -> None:
        self.size, self.rank = size, rank


class VirtualRank(RankRuntime):
    """A rank whose place among the others somebody else has prepared.

    It starts alone, while no exchange is complete. All collectives of its TP group go by packets.
    """

    domains: Callable[[ExchangeShape], list[NvlinkDomain]]

    def _meet(self) -> None:
        torch.cuda.current_stream().synchronize()

    def _join_domain(self, shape: ExchangeShape) -> NvlinkDomain:
        if shape.reduced_rows:
            most = shape.max_tokens * shape.num_ranks
            logits = 4 * most * self.model_config.vocab_size
            shape = replace(shape, reduced_rows=max(most, -(-logits // shape.row_bytes)))
        return self.domains(shape)[self.layout.rank]


class VirtualWorld:
    """Runs requests to their ends on ``num_ranks`` ranks, attention data-parallel over all.

    Args:
        directory: where to put the model's config; the weights are random.
        model: the config.
        tp: ranks that share each sequence's attention.
        options: of the engine.
    """

    def __init__(
        self,
        directory: Path,
        num_ranks: int,
        model: dict[str, Any],
        *,
        tp: int = 1,
        **options: Any,
    ) -> None:
        (directory / "config.json").write_text(json.dumps(model))
        parallel = {"attention_tp": tp, "attention_dp": num_ranks // tp}
        values = {"model": str(directory), "load_format": "dummy"} | parallel
        config, _ = build_config(values | options)
        self._timeout = config.exchange.exchange_timeout
        self._meeting = Meeting(num_ranks)
        self._group_meetings = [Meeting(tp) for _ in range(num_ranks // tp)]
        self._lock = threading.Lock()
        self._domains: list[NvlinkDomain] = []
        self._pools = [ThreadPoolExecutor(1) for _ in range(num_ranks)]
        self.ranks: list[VirtualRank] = self._on_all(lambda rank: self._make_rank(rank, config))
        # On a GPU one after the other: much of a start waits for all that runs there.
        on_ranks = self._one_by_one if self.ranks[0].device.type == "cuda" else self._on_all
        num_blocks = min(on_ranks(lambda rank: self.ranks[rank].load(lambda *_: None)))
        on_ranks(lambda rank: self.ranks[rank].start(num_blocks))
        self._complete_exchanges()
        self.scheduler = _make_scheduler(self.ranks[0], num_blocks)

    def rehearse(self, requests: list[tuple[list[int], SamplingParams]]) -> None:
        """Run others of the same sizes while no exchange is complete.

        What a step loads and allocates would else wait for kernels that wait for that step.
        """
        self._break_exchanges()
        for rank in self.ranks:
            rank.exchange.check = lambda: None  # type: ignore[method-assign]
        vocab_size = self.ranks[0].model_config.vocab_size
        self.run([([(i + 1) % vocab_size for i in prompt], params) for prompt, params in requests])
        for rank in self.ranks:
            del rank.exchange.check
        self._complete_exchanges()

    def run(self, requests: list[tuple[list[int], SamplingParams]]) -> list[Output]:
        """Of each (prompt, parameters) token ids, their log-probabilities, and the prompt's."""
        for number, (prompt, params) in enumerate(requests):
            self.scheduler.add(AddRequest(str(number), prompt, params))
        outputs: list[Output] = [([], [], []) for _ in requests]
        in_flight: deque[list[Any]] = deque()
        while self.scheduler.has_unfinished or in_flight:
            while (plan := self.scheduler.schedule()) is not None:
                in_flight.append(self.launch(plan))
            results = self.results(in_flight.popleft())
            for update in self.scheduler.complete([r for r in results if r is not None]):
                token_ids, logprobs, prompt_logprobs = outputs[int(update.request_id)]
                token_ids.extend(update.token_ids)
                logprobs.extend(update.logprobs)
                prompt_logprobs.extend(update.prompt_logprobs)
        return outputs

    def launch(self, plan: StepPlan) -> list[PendingStep]:
        """The same step on all ranks."""
        return self._on_all(lambda rank: self.ranks[rank].runner.launch(plan))

    def results(self, pending: list[PendingStep]) -> list[StepResult | None]:
        """What each rank makes of it, waited for."""
        return self._on_all(lambda rank: pending[rank].result())

    def _make_rank(self, rank: int, config: Any) -> VirtualRank:
        layout = RankLayout(rank, config.parallel.attention_tp, config.parallel.attention_dp)
        runtime = VirtualRank(config, layout, LocalPlace(0, 1))
        ep = ThreadCommunicator(layout.world_size, rank, self._meeting)
        runtime.groups = ParallelGroups(layout, self._tp_communicator(runtime), ep)
        runtime.domains = lambda shape: self._make_domains(shape, runtime.device)
        if runtime.device.type == "cuda":
            with self._lock:
                while len(_streams) <= rank:
                    _streams.append(torch.cuda.Stream(runtime.device))
            torch.cuda.set_stream(_streams[rank])
        return runtime

    def _tp_communicator(self, runtime: VirtualRank) -> Communicator:
        size, rank = runtime.layout.attention_tp, runtime.layout.tp_rank
        if size == 1:
            return Communicator(1, 0)
        if runtime.device.type == "cuda":
            return NoCommunicator(size, rank)
        return ThreadCommunicator(size, rank, self._group_meetings[runtime.layout.dp_rank])

    def _make_domains(self, shape: ExchangeShape, device: torch.device) -> list[NvlinkDomain]:
        """All ranks' places, made by the first that asks."""
        with self._lock:
            if not self._domains:
                # Beside those that wait, kernels of others want multiprocessors for themselves.
                multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
                blocks = max(1, multiprocessors // (2 * shape.num_ranks))
                self._domains = virtual_domains(shape, device, self._timeout, num_blocks=blocks)
                self._break_exchanges()
            return self._domains

    def _break_exchanges(self) -> None:
        """Each ends at once from now on."""
        for domain in self._domains:
            domain.section(domain.layout.abort_at, torch.int64, 1).fill_(ABORTED)
        torch.cuda.current_stream().synchronize()

    def _complete_exchanges(self) -> None:
        """Each is as it should be from now on."""
        for domain in self._domains:
            domain.reset()

    def _on_all(self, work: Callable[[int], T]) -> list[T]:
        """What each rank's thread makes of its number, all at the same time."""
        futures = [pool.submit(work, rank) for rank, pool in enumerate(self._pools)]
        return [future.result() for future in futures]

    def _one_by_one(self, work: Callable[[int], T]) -> list[T]:
        """The same, one after the other."""
        return [pool.submit(work, rank).result() for rank, pool in enumerate(self._pools)]


@contextmanager
def waiting_for_own_streams() -> Iterator[None]:
    """Threads wait for their current streams where they would wait for the device."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(
            torch.cuda, "synchronize", lambda *_: torch.cuda.current_stream().synchronize()
        )
        # Memory goes back to the driver only when all kernels have ended.
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        if hasattr(torch._C, "_host_emptyCache"):
            monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: None)
        yield

"""Messages between the front end and the engine core (rank 0), and between rank 0 and the ranks.

Each union is decoded by `msgspec` with the type's name as the tag; nothing is ever pickled.
"""

from __future__ import annotations

import msgspec

from moe_engine.types.results import FinishReason
from moe_engine.types.sampling import SamplingParams
from moe_engine.types.step import Logprobs, StepPlan, StepResult


class Message(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Base of all messages: immutable, encoded as a tagged msgpack array."""


class AddRequest(Message, frozen=True):
    """Front end -> core: start one sequence (``n`` is fanned out by the front end)."""

    request_id: str
    token_ids: list[int]
    params: SamplingParams


class AbortRequest(Message, frozen=True):
    """Front end -> core: forget a request; answered by a final `RequestUpdate` unless it ended."""

    request_id: str


class Shutdown(Message, frozen=True):
    """Front end -> core -> ranks: finish nothing more, exit with status 0."""


class RequestUpdate(Message, frozen=True):
    """Core -> front end: news of one request.

    ``finish_reason`` is set in the last update. ``prompt_logprobs`` are the entries for the
    prompt positions from 1 on that became known, in order.
    """

    request_id: str
    token_ids: list[int] = []
    logprobs: list[Logprobs] = []
    prompt_logprobs: list[Logprobs] = []
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    num_cached_tokens: int = 0


class RequestRefused(Message, frozen=True):
    """Core -> front end: the request cannot be served; becomes an `InvalidRequestError`."""

    request_id: str
    message: str
    param: str | None = None
    code: str | None = None
    status: int = 400


class EngineStats(Message, frozen=True):
    """Counters and gauges of the engine; totals grow, the others are as of now."""

    num_waiting: int = 0
    num_running: int = 0
    num_blocks: int = 0
    num_free_blocks: int = 0
    num_steps_total: int = 0
    num_preemptions_total: int = 0
    prompt_tokens_total: int = 0
    generation_tokens_total: int = 0
    prefix_queried_tokens_total: int = 0
    prefix_hit_tokens_total: int = 0


class Updates(Message, frozen=True):
    """Core -> front end: everything one step has brought."""

    requests: list[RequestUpdate]
    stats: EngineStats


class LoadProgress(Message, frozen=True):
    """Core -> front end, while starting: how far rank 0 has come."""

    stage: str
    done: int
    total: int


class MemoryLedger(Message, frozen=True):
    """What the memory of rank 0's device went to, in bytes; measured on a GPU.

    Attributes:
        total: the device's; 0 on a CPU.
        at_start: taken before the engine allocated anything, by others and by libraries.
        weights: computed from the model's shape.
        activations: the most that a step takes outside of graphs, measured with the largest one;
            0 on a CPU.
        graphs_reserved: kept free for the CUDA graphs when the KV cache was sized.
        graphs: what capturing them took.
        exchange: buffers that ranks share, computed from the largest step.
        kv_cache: computed from the number of blocks.
        free: once everything is up.
    """

    total: int = 0
    at_start: int = 0
    weights: int = 0
    activations: int = 0
    graphs_reserved: int = 0
    graphs: int = 0
    exchange: int = 0
    kv_cache: int = 0
    free: int = 0


class EngineReady(Message, frozen=True):
    """Core -> front end: all ranks are up; the limits that requests are checked against.

    ``startup_s`` splits rank 0's start into phases, in seconds and in order;
    ``measured_memory`` holds bytes really taken on its GPU (`engine.startup.measured_memory`).
    """

    max_model_len: int
    vocab_size: int
    num_blocks_per_group: int
    block_size: int
    eos_token_ids: list[int]
    summary: str
    startup_s: dict[str, float] = {}
    memory: MemoryLedger = MemoryLedger()
    measured_memory: dict[str, int] = {}


class RankHello(Message, frozen=True):
    """Rank -> rank 0: the first message on a control channel, says who is there."""

    rank: int


class RankReady(Message, frozen=True):
    """Rank -> rank 0: the model is loaded and ``num_blocks`` KV blocks fit this rank."""

    rank: int
    num_blocks: int


class RankStarted(Message, frozen=True):
    """Rank -> rank 0: the KV cache is allocated; the rank can execute plans."""

    rank: int


class RankFailed(Message, frozen=True):
    """Rank -> rank 0 -> front end: a rank raised or died; the engine is lost.

    Attributes:
        user_error: name of the exception class when a start was refused for the user's
            configuration or checkpoint, else empty.
        secondary: the rank failed because a collective lost its peers, so another rank is to blame.
    """

    rank: int
    message: str
    traceback: str = ""
    user_error: str = ""
    secondary: bool = False


class StartStepping(Message, frozen=True):
    """Rank 0 -> ranks: the KV cache has this many blocks per DP group; plans follow."""

    num_blocks: int


class RunStep(Message, frozen=True):
    """Rank 0 -> ranks: execute the plan."""

    plan: StepPlan


class StepDone(Message, frozen=True):
    """Rank -> rank 0: the result of its DP group (from the group's attention-TP rank 0)."""

    result: StepResult


ToCore = AddRequest | AbortRequest | Shutdown
ToFrontEnd = Updates | RequestRefused | LoadProgress | EngineReady | RankFailed
ToRank = StartStepping | RunStep | Shutdown
ToRankZero = RankHello | RankReady | RankStarted | StepDone | RankFailed

"""An engine without a model that makes a token per sequence every so many milliseconds.

It shows what the server alone can sustain: front end, detokenizer, HTTP. The rank process is
replaced by this module, which speaks rank 0's side of the protocol; `install` does that in the
process that starts the ranks. ``python -m benchmarks.fake_core ...`` is the server's command line
on top of it. The step time comes from the variable `STEP_MS_VARIABLE`, which the rank inherits.
"""

from __future__ import annotations

import os
import random
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

from moe_engine.config.hf import load_model_config
from moe_engine.dist.channel import Channel
from moe_engine.engine import launcher
from moe_engine.engine.spec import RankSpec
from moe_engine.serve import main as serve
from moe_engine.types.messages import (
    AbortRequest,
    AddRequest,
    EngineReady,
    EngineStats,
    RequestUpdate,
    Shutdown,
    ToCore,
    Updates,
)
from moe_engine.types.results import FinishReason

STEP_MS_VARIABLE = "FAKE_CORE_STEP_MS"


def install() -> None:
    """Have this process start fake ranks."""
    launcher.RANK_MODULE = "benchmarks.fake_core"


def run_core(spec: RankSpec, front_end_fd: int, step_s: float) -> None:
    """Answer the front end until it says `Shutdown`."""
    assert spec.config.model is not None
    channel: Channel[AddRequest | AbortRequest | Shutdown] = Channel(
        Connection(front_end_fd), ToCore
    )
    model = load_model_config(Path(spec.config.model))
    channel.send(
        EngineReady(
            max_model_len=model.max_position_embeddings,
            vocab_size=model.vocab_size,
            num_blocks_per_group=1,
            block_size=16,
            eos_token_ids=[],
            summary=f"fake core, {step_s * 1e3:g} ms a step",
        )
    )
    choose = random.Random(0)
    remaining: dict[str, int] = {}
    next_step = time.perf_counter()
    while True:
        wait = max(0.0, next_step - time.perf_counter()) if remaining else 1.0
        if channel.poll(wait):
            message = channel.receive()
            if isinstance(message, Shutdown):
                return
            if isinstance(message, AddRequest):
                if not remaining:
                    next_step = time.perf_counter() + step_s
                remaining[message.request_id] = message.params.max_tokens or 16
            else:
                remaining.pop(message.request_id, None)
        elif remaining:
            next_step += step_s
            channel.send(Updates(_step(remaining, choose, model.vocab_size), EngineStats()))


def _step(remaining: dict[str, int], choose: random.Random, vocab_size: int) -> list[RequestUpdate]:
    """One token for every request; those that have had their last one are forgotten."""
    updates = []
    for request_id, left in list(remaining.items()):
        updates.append(
            RequestUpdate(
                request_id,
                token_ids=[choose.randrange(vocab_size)],
                finish_reason=FinishReason.LENGTH if left == 1 else None,
            )
        )
        if left == 1:
            del remaining[request_id]
        else:
            remaining[request_id] = left - 1
    return updates


if __name__ == "__main__":
    if sys.argv[1].endswith("spec.json"):
        step_ms = float(os.environ[STEP_MS_VARIABLE])
        run_core(RankSpec.read(sys.argv[1]), int(sys.argv[2]), step_ms / 1e3)
    else:
        install()
        sys.exit(serve())

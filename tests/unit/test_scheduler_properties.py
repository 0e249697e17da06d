"""The scheduler against a simulated device, under random requests, aborts and interleavings.

`scheduler_world` checks every plan and every update: each position that attention reads holds the
KV of the sequence's own prefix, limits are kept, nobody overtakes, and every output equals that of
the request running alone.
"""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from moe_engine.errors import InvalidRequestError
from moe_engine.types.sampling import SamplingParams
from tests.unit.scheduler_world import EOS, VOCAB_SIZE, World

MAX_MODEL_LEN = 28


@st.composite
def worlds(draw) -> World:
    max_num_seqs = draw(st.integers(1, 5))
    return World(
        num_groups=draw(st.integers(1, 3)),
        num_blocks=draw(st.integers(2, 10)),
        block_size=draw(st.sampled_from([1, 2, 3, 4])),
        max_model_len=MAX_MODEL_LEN,
        prefix_cache=draw(st.booleans()),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs + draw(st.integers(0, 12)),
        max_prefill_chunk=draw(st.none() | st.integers(1, 9)),
        max_waiting=8,
        pipeline_depth=draw(st.integers(1, 2)),
    )


# Prompts are cut from two documents, so that prefixes are shared, and may go their own way.
documents = st.sampled_from([[1, 2, 3, 4, 5, 6] * 3, [1, 2, 3, 4] + [5, 4, 3, 2, 1] * 3])
prompts = st.builds(
    lambda document, length, tail: document[:length] + tail,
    documents,
    st.integers(0, 18),
    st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=4),
)


@st.composite
def sampling_params(draw) -> SamplingParams:
    max_tokens = draw(st.none() | st.integers(1, 14))
    return SamplingParams(
        seed=draw(st.none() | st.integers(-3, 3)),
        stop_token_ids=draw(st.sampled_from([(), (3,), (EOS, 5)])),
        ignore_eos=draw(st.booleans()),
        max_tokens=max_tokens,
        min_tokens=draw(st.integers(0, 4 if max_tokens is None else min(max_tokens, 4))),
        logprobs=draw(st.none() | st.just(0)),
        prompt_logprobs=draw(st.sampled_from([None, None, None, 0])),
    )


def submit(world: World, prompt: list[int], params: SamplingParams) -> None:
    """Add a request, and check that it is refused exactly when it should be."""
    wanted = max(params.max_tokens or 1, params.min_tokens)
    room = min(MAX_MODEL_LEN, world.num_blocks * world.block_size + 1) - len(prompt)
    is_full = world.stats.num_waiting >= world.config.max_waiting
    if not prompt or wanted > room or is_full:
        with pytest.raises(InvalidRequestError) as refusal:
            world.add(prompt, params)
        assert (refusal.value.status == 429) == (is_full and bool(prompt) and wanted <= room)
    else:
        world.add(prompt, params)


class SchedulerMachine(RuleBasedStateMachine):
    """Random events in any order, then everything runs to its end."""

    @initialize(world=worlds())
    def start(self, world: World) -> None:
        self.world = world

    @rule(prompt=prompts, params=sampling_params(), copies=st.sampled_from([1, 1, 1, 2, 3]))
    def add(self, prompt: list[int], params: SamplingParams, copies: int) -> None:
        for _ in range(copies):
            submit(self.world, prompt, SamplingParams(**params_fields(params)))
            self.world.check()

    @precondition(lambda self: self.world.clients)
    @rule(data=st.data())
    def abort(self, data) -> None:
        self.world.abort(data.draw(st.sampled_from(self.world.clients)))

    @rule()
    def schedule(self) -> None:
        self.world.schedule()

    @precondition(lambda self: self.world.results)
    @rule()
    def complete(self) -> None:
        self.world.complete()

    @rule(num_steps=st.integers(1, 6))
    def run(self, num_steps: int) -> None:
        for _ in range(num_steps):
            if self.world.schedule() is None and self.world.results:
                self.world.complete()

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.drain()


def params_fields(params: SamplingParams) -> dict[str, object]:
    """The fields of ``params``: every request needs its own object, which identifies it."""
    return {name: getattr(params, name) for name in params.__dataclass_fields__}


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(
    max_examples=80,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def random_request(rng: random.Random) -> tuple[list[int], SamplingParams]:
    document = rng.choice([[1, 2, 3, 4, 5, 6] * 3, [1, 2, 3, 4] + [5, 4, 3, 2, 1] * 3])
    tail = [rng.randrange(VOCAB_SIZE) for _ in range(rng.choice([0, 0, 1, 3]))]
    max_tokens = rng.choice([None, 1, 4, 9, 14])
    params = SamplingParams(
        seed=rng.choice([None, 1, 2]),
        ignore_eos=rng.random() < 0.7,
        stop_token_ids=rng.choice([(), (), (4,)]),
        max_tokens=max_tokens,
        min_tokens=rng.choice([0, 1]),
        logprobs=rng.choice([None, 0]),
        prompt_logprobs=rng.choice([None, None, None, 0]),
    )
    return document[: rng.randrange(19)] + tail, params


def run_random_world(seed: int, num_events: int) -> World:
    """A long random history; unlike the state machine it always keeps the pools under pressure."""
    rng = random.Random(seed)
    max_num_seqs = rng.randint(2, 6)
    world = World(
        num_groups=rng.randint(1, 3),
        num_blocks=rng.randint(6, 16),
        block_size=rng.choice([1, 2, 4]),
        max_model_len=MAX_MODEL_LEN,
        prefix_cache=rng.random() < 0.7,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs + rng.randint(0, 16),
        max_prefill_chunk=rng.choice([None, None, 1, 3, 8]),
        max_waiting=8,
        pipeline_depth=rng.choice([1, 2]),
    )
    for _ in range(num_events):
        event = rng.random()
        if event < 0.25:
            submit(world, *random_request(rng))
        elif event < 0.28 and world.clients:
            world.abort(rng.choice(world.clients))
        elif event < 0.6 and world.results:
            world.complete()
        else:
            world.schedule()
        world.check()
    world.drain(rng)
    return world


def test_random_histories_end_right_and_reach_every_corner():
    stats = [run_random_world(seed, num_events=250).stats for seed in range(80)]
    assert sum(s.num_preemptions_total for s in stats) > 200
    assert sum(s.prefix_hit_tokens_total for s in stats) > 2000
    assert all(s.prefix_hit_tokens_total <= s.prefix_queried_tokens_total for s in stats)


@pytest.mark.parametrize("num_groups", [1, 2, 3])
def test_outputs_do_not_depend_on_any_setting(num_groups):
    rng = random.Random(num_groups)
    requests = [random_request(rng) for _ in range(24)]
    requests = [(p, s) for p, s in requests if p and len(p) + (s.max_tokens or 1) <= MAX_MODEL_LEN]
    outputs = set()
    for depth in (1, 2):
        for prefix_cache in (False, True):
            for chunk, num_blocks in ((None, 64), (2, 7), (5, 8)):
                world = World(
                    num_groups=num_groups,
                    num_blocks=num_blocks,
                    block_size=4,
                    max_model_len=MAX_MODEL_LEN,
                    prefix_cache=prefix_cache,
                    max_prefill_chunk=chunk,
                    pipeline_depth=depth,
                    max_num_seqs=6,
                )
                for prompt, params in requests:
                    world.add(prompt, SamplingParams(**params_fields(params)))
                world.drain(rng)
                outputs.add(tuple(tuple(client.token_ids) for client in world.clients))
    assert len(outputs) == 1

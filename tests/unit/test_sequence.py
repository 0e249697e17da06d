"""A request's state machine, and the random numbers that decide its tokens."""

from __future__ import annotations

import pytest

from moe_engine.engine.seeding import draw64, mix64, uniform
from moe_engine.engine.sequence import Sequence, State
from moe_engine.errors import IllegalTransitionError
from moe_engine.types.results import FinishReason
from moe_engine.types.sampling import SamplingParams
from moe_engine.types.step import Logprobs, PromptLogprobs

EOS = 0


def make_sequence(num_prompt_tokens: int = 3, max_output_tokens: int = 4, **params) -> Sequence:
    return Sequence(
        "r1",
        list(range(1, num_prompt_tokens + 1)),
        SamplingParams(**params),
        arrival=0,
        seed=0,
        max_output_tokens=max_output_tokens,
        eos_token_ids=(EOS,),
    )


def admit(sequence: Sequence) -> None:
    sequence.admit(7, 0, num_cached_blocks=0, block_size=4)


def in_state(state: State) -> Sequence:
    sequence = make_sequence()
    if state in (State.RUNNING, State.PREEMPTED):
        admit(sequence)
    if state is State.PREEMPTED:
        sequence.preempt()
    if state is State.FINISHED:
        sequence.finish()
    return sequence


EVENTS = {
    "admit": admit,
    "compute": lambda sequence: sequence.compute(1, []),
    "accept_token": lambda sequence: sequence.accept_token(5),
    "preempt": lambda sequence: sequence.preempt(),
    "finish": lambda sequence: sequence.finish(),
}
LEGAL = {
    State.WAITING: {"admit", "finish"},
    State.RUNNING: {"compute", "preempt", "finish"},
    State.PREEMPTED: {"admit", "finish"},
    State.FINISHED: set(),
}


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("event", EVENTS)
def test_illegal_transitions_raise_and_name_request_state_and_event(state, event):
    sequence = in_state(state)
    if event in LEGAL[state]:
        EVENTS[event](sequence)
        return
    with pytest.raises(IllegalTransitionError) as error:
        EVENTS[event](sequence)
    assert (error.value.request_id, error.value.state, error.value.event) == ("r1", state, event)
    assert "'r1'" in str(error.value)
    assert sequence.state is state


def test_prompt_in_chunks_samples_only_after_its_last_token():
    sequence = make_sequence(num_prompt_tokens=5)
    admit(sequence)
    assert not sequence.compute(2, [0])
    assert not sequence.compute(2, [])
    assert sequence.num_pending == 1
    assert sequence.compute(1, [1])
    assert (sequence.num_computed, sequence.num_in_flight, sequence.block_table) == (5, 1, [0, 1])


def test_no_more_samples_are_in_flight_than_the_output_may_have_tokens():
    sequence = make_sequence(max_output_tokens=2)
    admit(sequence)
    assert sequence.compute(3, [0])
    assert sequence.compute(1, [])
    assert sequence.num_pending == 0
    with pytest.raises(IllegalTransitionError):
        sequence.compute(1, [])


def test_computing_beyond_the_known_tokens_is_illegal():
    sequence = make_sequence(num_prompt_tokens=3)
    admit(sequence)
    with pytest.raises(IllegalTransitionError):
        sequence.compute(4, [0])


def test_preempted_sequence_takes_its_sample_in_flight_before_it_is_admitted_again():
    sequence = make_sequence()
    admit(sequence)
    sequence.compute(3, [4])
    assert sequence.preempt() == [4]
    with pytest.raises(IllegalTransitionError):
        admit(sequence)
    sequence.accept_token(6)
    new = sequence.admit(8, 1, num_cached_blocks=0, block_size=4)
    assert (new.seq_id, new.token_ids, new.num_prompt_tokens) == (8, [1, 2, 3, 6], 3)
    assert sequence.num_pending == 4


@pytest.mark.parametrize(
    ("params", "tokens", "reason", "stop_token_id"),
    [
        ({}, [5, EOS], FinishReason.STOP, None),
        ({"ignore_eos": True}, [5, EOS, 1, 1], FinishReason.LENGTH, None),
        ({"stop_token_ids": (9,)}, [9], FinishReason.STOP, 9),
        ({"stop_token_ids": (EOS,)}, [EOS], FinishReason.STOP, None),
        ({"stop_token_ids": (EOS,), "ignore_eos": True}, [EOS], FinishReason.STOP, EOS),
        ({"min_tokens": 2}, [EOS, EOS, EOS], FinishReason.STOP, None),
        ({"min_tokens": 4}, [EOS, EOS, EOS, EOS], FinishReason.LENGTH, None),
        ({}, [5, 5, 5, EOS], FinishReason.STOP, None),
    ],
)
def test_output_ends_for_the_right_reason(params, tokens, reason, stop_token_id):
    sequence = make_sequence(**params)
    admit(sequence)
    sequence.compute(3, [0])
    for token_id in tokens[:-1]:
        assert sequence.accept_token(token_id) is None
        sequence.compute(1, [])
    assert sequence.accept_token(tokens[-1]) is reason
    if reason is FinishReason.STOP:
        assert sequence.stop_token_id(tokens[-1]) == stop_token_id


def test_stop_ids_of_the_ranks_are_eos_and_the_users_without_repetition():
    new = make_sequence(stop_token_ids=(9, EOS)).admit(0, 0, num_cached_blocks=0, block_size=4)
    assert new.stop_ids == [EOS, 9]
    new = make_sequence(stop_token_ids=(9,), ignore_eos=True).admit(
        0, 0, num_cached_blocks=0, block_size=4
    )
    assert new.stop_ids == [9]


def test_prompt_logprobs_computed_twice_are_forwarded_once():
    sequence = make_sequence(num_prompt_tokens=6, prompt_logprobs=0)
    entries = [Logprobs(token_id, 0.0, 1) for token_id in range(2, 7)]
    assert sequence.accept_prompt_logprobs(PromptLogprobs(0, 1, entries[:2])) == entries[:2]
    assert sequence.accept_prompt_logprobs(PromptLogprobs(1, 1, entries[:4])) == entries[2:4]
    assert sequence.accept_prompt_logprobs(PromptLogprobs(1, 1, entries[:1])) == []
    assert sequence.accept_prompt_logprobs(PromptLogprobs(1, 5, entries[4:])) == entries[4:]


def test_a_gap_in_prompt_logprobs_is_caught():
    with pytest.raises(AssertionError, match="up to position 0"):
        make_sequence().accept_prompt_logprobs(PromptLogprobs(0, 2, []))


def test_mixer_is_splitmix64():
    # The first outputs of the published generator for seed 1234567.
    golden = 0x9E3779B97F4A7C15
    stream = [mix64(1234567 + (index + 1) * golden) for index in range(3)]
    assert stream == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_uniform_is_a_pure_function_into_the_unit_interval():
    numbers = [
        uniform(seed, index) for seed in (-(2**63), -1, 0, 1, 2**63 - 1) for index in range(400)
    ]
    assert numbers[:400] == [uniform(-(2**63), index) for index in range(400)]
    assert all(0.0 <= number < 1.0 for number in numbers)
    assert len(set(numbers)) == len(numbers)
    assert abs(sum(numbers) / len(numbers) - 0.5) < 0.03


def test_seeds_that_differ_by_the_weyl_constant_do_not_share_a_stream():
    golden = 0x9E3779B97F4A7C15
    assert draw64(5, 1) != draw64(5 + golden, 0)


def test_largest_draw_stays_below_one():
    assert ((2**64 - 1) >> 11) * 2.0**-53 < 1.0
    assert 0 <= draw64(0, 10**9) < 2**64

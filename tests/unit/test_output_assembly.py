from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_engine.text.output import CompletionAssembler, RequestAssembler
from moe_engine.types.messages import RequestUpdate
from moe_engine.types.results import (
    CompletionOutput,
    FinishReason,
    PositionLogprobs,
    RequestOutput,
    TokenLogprob,
)
from moe_engine.types.sampling import SamplingParams
from moe_engine.types.step import Logprobs
from tests.unit.tiny_tokenizer import byte_ids, tiny_tokenizer, token_id_of

PROMPT = [1, 2, 3]
EOS = "<|im_end|>"


def completion(**params: Any) -> CompletionAssembler:
    return CompletionAssembler(tiny_tokenizer(), SamplingParams(**params), index=0)


def request(prompt: list[int] = PROMPT, **params: Any) -> RequestAssembler:
    return RequestAssembler("r", tiny_tokenizer(), SamplingParams(**params), prompt)


def news(token_ids: list[int] | None = None, **fields: Any) -> RequestUpdate:
    return RequestUpdate(request_id="r", token_ids=token_ids or [], **fields)


def entry(token_id: int, logprob: float = -0.5) -> Logprobs:
    return Logprobs(token_id, logprob, rank=2, top_ids=[65, token_id], top_logprobs=[-0.1, logprob])


def update(
    assembler: CompletionAssembler, token_ids: list[int] | None = None, **fields: Any
) -> CompletionOutput:
    """Feed an update that must bring news."""
    delta = assembler.update(news(token_ids, **fields))
    assert delta is not None
    return delta


def chunk(assembler: RequestAssembler, index: int, *args: Any, **fields: Any) -> RequestOutput:
    output = assembler.update(index, news(*args, **fields))
    assert output is not None
    return output


def ids(text: str) -> list[int]:
    """One token per byte."""
    return byte_ids(text.encode())


# --- text and tokens of one completion -------------------------------------------------------


def test_deltas_carry_what_is_new_and_the_total_everything() -> None:
    assembler = completion()
    first = update(assembler, ids("he"))
    last = update(assembler, ids("llo"), finish_reason=FinishReason.LENGTH)
    assert (first.text, first.token_ids, first.finish_reason) == ("he", tuple(ids("he")), None)
    assert (last.text, last.finish_reason) == ("llo", FinishReason.LENGTH)
    assert assembler.total() == CompletionOutput(
        index=0, text="hello", token_ids=tuple(ids("hello")), finish_reason=FinishReason.LENGTH
    )


def test_tokens_come_at_once_while_their_text_is_held_back() -> None:
    assembler = completion()
    half, rest = ids("🙂")[:2], ids("🙂")[2:]
    assert update(assembler, half).token_ids == tuple(half)
    assert assembler.total().text == ""
    assert update(assembler, rest).text == "🙂"


@pytest.mark.parametrize("reason", [FinishReason.LENGTH, FinishReason.ABORT])
def test_end_flushes_unfinished_characters_and_beginnings_of_stop_strings(
    reason: FinishReason,
) -> None:
    assembler = completion(stop=("STOP",))
    assert update(assembler, ids("aST")).text == "a"
    assert update(assembler, finish_reason=reason).text == "ST"
    assembler = completion()
    assert update(assembler, ids("猫")[:1], finish_reason=reason).text == "\ufffd"


def test_update_without_tokens_or_end_is_no_news() -> None:
    assert completion().update(news(num_cached_tokens=3)) is None


def test_updates_after_the_end_are_ignored() -> None:
    assembler = completion()
    update(assembler, ids("a"), finish_reason=FinishReason.LENGTH)
    assert assembler.update(news(ids("b"), finish_reason=FinishReason.ABORT)) is None
    assert assembler.total().text == "a"
    assert assembler.total().finish_reason is FinishReason.LENGTH


# --- stop tokens -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stop_text", "params", "text"),
    [
        (EOS, {}, "hi"),
        (EOS, {"skip_special_tokens": False}, "hi"),
        (EOS, {"include_stop_str_in_output": True}, "hi"),
        (EOS, {"include_stop_str_in_output": True, "skip_special_tokens": False}, "hi" + EOS),
        ("!", {}, "hi"),
        ("!", {"include_stop_str_in_output": True}, "hi!"),
    ],
)
def test_stop_token_is_in_the_ids_but_in_the_text_only_on_demand(
    stop_text: str, params: dict, text: str
) -> None:
    stop_id = token_id_of(stop_text)
    assembler = completion(**params)
    update(assembler, ids("h"))
    update(
        assembler,
        [*ids("i"), stop_id],
        finish_reason=FinishReason.STOP,
        stop_token_id=stop_id,
    )
    total = assembler.total()
    assert total.text == text
    assert total.token_ids == (*ids("hi"), stop_id)
    assert (total.finish_reason, total.stop_reason) == (FinishReason.STOP, stop_id)
    assert not assembler.stopped_by_string


def test_last_token_of_an_output_cut_by_length_stays_in_the_text() -> None:
    assert update(completion(), ids("hi!"), finish_reason=FinishReason.LENGTH).text == "hi!"


# --- stop strings ----------------------------------------------------------------------------


def test_stop_string_ends_the_completion_and_drops_the_tokens_behind_it() -> None:
    assembler = completion(stop=("STOP",), logprobs=0)
    tokens = ids("aSTOPbc")
    delta = update(assembler, tokens, logprobs=[entry(t) for t in tokens])
    assert delta.text == "a"
    assert delta.token_ids == tuple(ids("aSTOP"))
    assert delta.logprobs is not None
    assert len(delta.logprobs) == 5
    assert (delta.finish_reason, delta.stop_reason) == (FinishReason.STOP, "STOP")
    assert assembler.finished
    assert assembler.stopped_by_string
    assert assembler.num_tokens == 5
    assert assembler.update(news(ids("d"))) is None


def test_stop_string_is_kept_in_the_text_on_demand() -> None:
    assembler = completion(stop=("STOP",), include_stop_str_in_output=True)
    assert update(assembler, ids("aSTOPbc")).text == "aSTOP"


@pytest.mark.parametrize("reason", [FinishReason.LENGTH, FinishReason.STOP])
def test_stop_string_outranks_the_cores_reason(reason: FinishReason) -> None:
    assembler = completion(stop=("STOP",))
    tokens = [*ids("aSTOP"), *([token_id_of(EOS)] if reason is FinishReason.STOP else [])]
    delta = update(assembler, tokens, finish_reason=reason, stop_token_id=7)
    assert (delta.text, delta.finish_reason) == ("a", FinishReason.STOP)
    assert delta.stop_reason == "STOP"


def test_stop_string_in_the_flushed_text_counts() -> None:
    assembler = completion(stop=("\ufffd",))
    delta = update(assembler, ids("a猫")[:2], finish_reason=FinishReason.LENGTH)
    assert (delta.text, delta.stop_reason) == ("a", "\ufffd")


def test_stop_token_left_out_of_the_text_completes_no_stop_string() -> None:
    assembler = completion(stop=("a!",))
    delta = update(
        assembler,
        ids("a!"),
        finish_reason=FinishReason.STOP,
        stop_token_id=token_id_of("!"),
    )
    assert (delta.text, delta.stop_reason) == ("a", token_id_of("!"))
    assert not assembler.stopped_by_string


@pytest.mark.parametrize(
    ("min_tokens", "num_tokens"), [(0, 2), (1, 2), (2, 4), (3, 4), (4, 6), (6, 8)]
)
@pytest.mark.parametrize("per_update", [1, 8])
def test_stop_string_cannot_be_completed_by_the_first_min_tokens(
    min_tokens: int, num_tokens: int, per_update: int
) -> None:
    assembler = completion(stop=("ab",), min_tokens=min_tokens)
    tokens = ids("abababab")
    for start in range(0, 8, per_update):
        assembler.update(news(tokens[start : start + per_update]))
    assert assembler.num_tokens == num_tokens
    assert assembler.total().text == "ab" * (num_tokens // 2 - 1)


letters = st.sampled_from("ab🙂")


@settings(deadline=None)
@given(
    text=st.text(letters, max_size=30),
    stops=st.lists(st.text(letters, min_size=1, max_size=3), max_size=3),
    sizes=st.lists(st.integers(1, 7), min_size=1),
)
def test_result_does_not_depend_on_how_tokens_arrive(
    text: str, stops: list[str], sizes: list[int]
) -> None:
    tokens = ids(text)
    whole, pieces = (
        RequestAssembler("r", tiny_tokenizer(), p, PROMPT)
        for p in [SamplingParams(stop=tuple(stops))] * 2
    )
    whole.update(0, news(tokens, finish_reason=FinishReason.LENGTH))
    chunks = []
    start = 0
    for size in sizes:
        chunks.append(pieces.update(0, news(tokens[start : start + size])))
        start += size
    chunks.append(pieces.update(0, news(tokens[start:], finish_reason=FinishReason.LENGTH)))
    assert pieces.final() == whole.final()
    deltas = [chunk.outputs[0] for chunk in chunks if chunk is not None]
    assert "".join(delta.text for delta in deltas) == whole.final().outputs[0].text
    assert sum((d.token_ids for d in deltas), ()) == whole.final().outputs[0].token_ids
    assert [delta.finish_reason is None for delta in deltas] == [True] * (len(deltas) - 1) + [False]


# --- logprobs --------------------------------------------------------------------------------


def test_logprobs_carry_the_tokens_texts_and_ranks() -> None:
    token_id = ids("🙂")[0]
    delta = update(completion(logprobs=2), [token_id], logprobs=[entry(token_id)])
    alternative = tiny_tokenizer().token_text(65)
    assert delta.logprobs == (
        PositionLogprobs(
            chosen=TokenLogprob(token_id, -0.5, 2, "\ufffd"),
            top=(
                TokenLogprob(65, -0.1, 1, alternative),
                TokenLogprob(token_id, -0.5, 2, "\ufffd"),
            ),
        ),
    )


def test_logprobs_add_up_over_updates() -> None:
    assembler = completion(logprobs=1)
    for token_id in ids("abc"):
        update(assembler, [token_id], logprobs=[entry(token_id)])
    logprobs = assembler.total().logprobs
    assert logprobs is not None
    assert [position.chosen.text for position in logprobs] == ["a", "b", "c"]


def test_logprobs_are_none_unless_asked_for() -> None:
    assembler = completion()
    assert update(assembler, ids("a")).logprobs is None
    assert assembler.total().logprobs is None


# --- requests of n sequences -----------------------------------------------------------------


def test_request_ends_with_its_last_completion() -> None:
    assembler = request(n=2)
    first = chunk(assembler, 1, ids("ab"), finish_reason=FinishReason.LENGTH)
    assert [output.index for output in first.outputs] == [1]
    assert not first.finished
    last = chunk(assembler, 0, ids("c"), finish_reason=FinishReason.LENGTH)
    assert last.finished
    final = assembler.final()
    assert [(output.index, output.text) for output in final.outputs] == [(0, "c"), (1, "ab")]
    assert final.finished
    assert final.request_id == "r"
    assert final.prompt_token_ids == tuple(PROMPT)


def test_usage_counts_all_completions_and_the_prompt_once() -> None:
    assembler = request(n=2, stop=("S",))
    chunk(assembler, 0, ids("ab"), num_cached_tokens=1)
    usage = chunk(assembler, 1, ids("cSd"), num_cached_tokens=3).usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (3, 4)
    assert usage.cached_tokens == 1, "completion 1 hits what completion 0 has just computed"
    assert assembler.final().usage == usage


def test_front_end_learns_which_sequence_to_abort() -> None:
    assembler = request(n=2, stop=("S",))
    chunk(assembler, 1, ids("aS"))
    assert [part.stopped_by_string for part in assembler.completions] == [False, True]
    assert assembler.update(1, news(finish_reason=FinishReason.ABORT)) is None
    assert assembler.final().outputs[1].stop_reason == "S"


def texts(output: RequestOutput) -> list[str | None] | None:
    logprobs = output.prompt_logprobs
    return logprobs and [position and position.chosen.text for position in logprobs]


def test_prompt_logprobs_come_once_when_all_are_known() -> None:
    a, b, c = ids("abc")
    assembler = request([5, a, b, c], prompt_logprobs=0)
    assert assembler.update(0, news(prompt_logprobs=[entry(a), entry(b)])) is None
    first = chunk(assembler, 0, ids("x"), prompt_logprobs=[entry(c)])
    assert texts(first) == [None, "a", "b", "c"]
    assert chunk(assembler, 0, ids("y")).prompt_logprobs is None
    assert texts(assembler.final()) == [None, "a", "b", "c"]


def test_prompt_logprobs_of_a_one_token_prompt_are_a_single_none() -> None:
    assembler = request([5], prompt_logprobs=0)
    assert chunk(assembler, 0, ids("x")).prompt_logprobs == (None,)


def test_prompt_logprobs_are_those_of_completion_0() -> None:
    a, b = ids("ab")
    assembler = request([5, a], n=2, prompt_logprobs=0)
    assert chunk(assembler, 1, ids("x"), prompt_logprobs=[entry(b)]).prompt_logprobs is None
    assert texts(chunk(assembler, 0, ids("x"), prompt_logprobs=[entry(a)])) == [None, "a"]


def test_prompt_logprobs_known_at_an_abort_are_handed_over() -> None:
    (a,) = ids("a")
    assembler = request([5, a, 6, 7], prompt_logprobs=0)
    last = chunk(assembler, 0, prompt_logprobs=[entry(a)], finish_reason=FinishReason.ABORT)
    assert texts(last) == [None, "a"]


def test_prompt_logprobs_are_none_unless_asked_for() -> None:
    assembler = request()
    assert chunk(assembler, 0, ids("x"), prompt_logprobs=[entry(5)]).prompt_logprobs is None
    assert assembler.final().prompt_logprobs is None

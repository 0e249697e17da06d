"""/v1/completions as the official client and evaluation harnesses use it."""

from __future__ import annotations

import json

import pytest

from tests.unit.server.conftest import MODEL
from tests.unit.server.fake_engine import TEXT

OUTPUT = TEXT.encode() * 4


def text_of(num_tokens: int, start: int = 0) -> str:
    return OUTPUT[start : start + num_tokens].decode(errors="replace")


def test_completion_has_openai_shape_and_default_of_16_tokens(live):
    reply = live.openai.completions.create(model=MODEL, prompt="Hello")
    assert reply.id.startswith("cmpl-")
    assert reply.object == "text_completion"
    assert reply.model == MODEL
    assert reply.created > 1_700_000_000
    assert reply.system_fingerprint is None
    (choice,) = reply.choices
    assert choice.text == text_of(16)
    assert choice.finish_reason == "length"
    assert choice.logprobs is None
    assert reply.usage.prompt_tokens == 5
    assert reply.usage.completion_tokens == 16
    assert reply.usage.total_tokens == 21
    assert reply.usage.prompt_tokens_details.cached_tokens == 2


@pytest.mark.parametrize(
    ("prompt", "token_ids"),
    [
        ("Hi", [[72, 105]]),
        (["Hi", "yo"], [[72, 105], [121, 111]]),
        ([72, 105, 259], [[72, 105, 259]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)
def test_all_four_prompt_shapes(live, prompt, token_ids):
    reply = live.complete(prompt=prompt, max_tokens=1)
    assert reply.status_code == 200
    assert sorted(seen for seen, _ in live.engine.seen) == token_ids


def test_choices_of_a_batch_are_numbered_prompt_times_n_plus_i(live):
    reply = live.complete(prompt=["a", "bc"], n=3, max_tokens=2).json()
    assert [choice["index"] for choice in reply["choices"]] == list(range(6))
    assert [choice["text"] for choice in reply["choices"]] == [text_of(2, i) for i in (0, 1, 2)] * 2
    assert reply["usage"]["prompt_tokens"] == 3
    assert reply["usage"]["completion_tokens"] == 12


def test_every_sampling_field_reaches_the_engine(live):
    fields = {
        "n": 2,
        "temperature": 0.5,
        "top_p": 0.25,
        "top_k": 7,
        "min_p": 0.125,
        "presence_penalty": -1.5,
        "frequency_penalty": 1.5,
        "repetition_penalty": 1.25,
        "seed": -5,
        "stop_token_ids": [3, 4],
        "ignore_eos": True,
        "max_tokens": 9,
        "min_tokens": 4,
        "logprobs": 3,
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
    }
    reply = live.complete(**fields, stop=["x", "yz"], logit_bias={"7": -100, "9": 1.5})
    assert reply.status_code == 200, reply.text
    (_, params) = live.engine.seen[0]
    for name, value in fields.items():
        seen = getattr(params, name)
        assert (list(seen) if isinstance(seen, tuple) else seen) == value, name
    assert params.stop == ("x", "yz")
    assert params.logit_bias == {7: -100, 9: 1.5}
    assert params.prompt_logprobs is None


def test_one_stop_string_is_not_a_list_of_letters(live):
    assert live.complete(stop="end").status_code == 200
    assert live.engine.seen[0][1].stop == ("end",)


def test_models_defaults_stand_in_for_absent_and_null_fields_only(live):
    live.complete(top_k=None)
    live.complete(temperature=0, top_k=-1)
    (_, absent), (_, given) = live.engine.seen
    assert (absent.temperature, absent.top_k, absent.top_p) == (0.6, 20, 1.0)
    assert (given.temperature, given.top_k) == (0, -1)


def test_streamed_text_and_usage_equal_the_whole_answer(live):
    whole = live.openai.completions.create(model=MODEL, prompt="Hello", n=2, max_tokens=20)
    chunks = list(
        live.openai.completions.create(
            model=MODEL,
            prompt="Hello",
            n=2,
            max_tokens=20,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert len({chunk.id for chunk in chunks}) == 1
    for choice in whole.choices:
        parts = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert "".join(part.text for part in parts) == choice.text
        assert [part.finish_reason for part in parts] == [None] * (len(parts) - 1) + ["length"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_stream_ends_with_done_and_has_no_usage_unless_asked(live):
    reply = live.complete(stream=True, max_tokens=3)
    assert reply.headers["content-type"].startswith("text/event-stream")
    events = reply.text.strip().split("\n\n")
    assert events[-1] == "data: [DONE]"
    bodies = [json.loads(event.removeprefix("data: ")) for event in events[:-1]]
    assert all("usage" not in body and len(body["choices"]) == 1 for body in bodies)


def test_logprobs_align_with_tokens_and_offsets_with_text(live):
    reply = live.openai.completions.create(model=MODEL, prompt="Hello", max_tokens=8, logprobs=2)
    logprobs = reply.choices[0].logprobs
    # "ö" and "ß" are two tokens each: half a character is named by its byte, as OpenAI does
    assert logprobs.tokens == ["S", "c", "h", "bytes:\\xc3", "bytes:\\xb6", "n", "e", " "]
    assert logprobs.token_logprobs == [-0.5] * 8
    assert logprobs.top_logprobs[0] == {"S": -0.5, "T": -1.5}
    assert logprobs.text_offset == [0, 1, 2, 3, 3, 4, 5, 6]
    text = reply.choices[0].text
    for token, offset in zip(logprobs.tokens, logprobs.text_offset, strict=True):
        assert token.startswith("bytes:") or text[offset] == token


def test_logprobs_zero_reports_the_chosen_token_only(live):
    logprobs = live.complete(max_tokens=2, logprobs=0).json()["choices"][0]["logprobs"]
    assert logprobs["top_logprobs"] == [{"S": -0.5}, {"c": -0.5}]


def test_streamed_logprobs_equal_the_whole_answers(live):
    whole = live.complete(max_tokens=9, logprobs=1, n=2, echo=True).json()
    reply = live.complete(max_tokens=9, logprobs=1, n=2, echo=True, stream=True)
    events = [json.loads(e[6:]) for e in reply.text.strip().split("\n\n")[:-1]]
    for choice in whole["choices"]:
        parts = [c for e in events for c in e["choices"] if c["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        for key, values in choice["logprobs"].items():
            assert [x for part in parts for x in part["logprobs"][key]] == values, key


@pytest.mark.parametrize("prompts", [["ab", "c<|"], [[97, 98], [99, 256]]])
def test_echo_puts_the_prompt_before_every_choice(live, prompts):
    reply = live.complete(prompt=prompts, echo=True, n=2, max_tokens=1).json()
    texts = ["ab", "c<|" if prompts[1] == "c<|" else "c<|256|>"]
    expected = [texts[0] + "S", texts[0] + "c", texts[1] + "S", texts[1] + "c"]
    assert [choice["text"] for choice in reply["choices"]] == expected


@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_zero_tokens_scores_the_prompt_alone(live, stream):
    reply = live.complete(
        prompt=[[65, 66, 67]], echo=True, max_tokens=0, logprobs=1, temperature=0, stream=stream
    )
    assert reply.status_code == 200, reply.text
    if stream:
        event, done = reply.text.strip().split("\n\n")
        assert done == "data: [DONE]"
        body = json.loads(event.removeprefix("data: "))
    else:
        body = reply.json()
        assert body["usage"]["completion_tokens"] == 0
    (choice,) = body["choices"]
    assert choice["text"] == "ABC"
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"] == {
        "tokens": ["A", "B", "C"],
        "token_logprobs": [None, -0.5, -0.5],
        "top_logprobs": [None, {"B": -0.5}, {"C": -0.5}],
        "text_offset": [0, 1, 2],
    }


def test_echo_with_logprobs_covers_prompt_and_output(live):
    """The request of a likelihood evaluation: it drops the last, generated, token."""
    choice = live.complete(prompt=[[65, 66]], echo=True, max_tokens=1, logprobs=1).json()[
        "choices"
    ][0]
    assert choice["text"] == "ABS"
    assert choice["logprobs"]["tokens"] == ["A", "B", "S"]
    assert choice["logprobs"]["text_offset"] == [0, 1, 2]


def test_impossible_tokens_have_a_finite_logprob(live, monkeypatch):
    from moe_engine.types.results import PositionLogprobs, TokenLogprob
    from tests.unit.server.fake_engine import FakeEngine

    impossible = PositionLogprobs(TokenLogprob(65, float("-inf"), 9, "A"))
    monkeypatch.setattr(FakeEngine, "_position", lambda *_: impossible)
    reply = live.complete(max_tokens=1, logprobs=0)
    assert reply.json()["choices"][0]["logprobs"]["token_logprobs"] == [-9999.0]

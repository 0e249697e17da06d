"""`SamplingParams` refuses whatever the engine cannot serve, naming field, value and limit."""

import math
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_engine.errors import InvalidRequestError
from moe_engine.types.sampling import (
    INT32_MAX,
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_N,
    MAX_STOP_STRING_CHARS,
    MAX_STOP_STRINGS,
    SamplingParams,
)

# Field: (least, most) allowed.
INTEGERS = {
    "n": (1, MAX_N),
    "top_k": (-1, INT32_MAX),
    "seed": (-(2**63), 2**63 - 1),
    "max_tokens": (1, INT32_MAX),
    "min_tokens": (0, INT32_MAX),
    "logprobs": (0, MAX_LOGPROBS),
    "prompt_logprobs": (0, MAX_LOGPROBS),
}
# Field: (low, whether low itself is allowed, most).
NUMBERS = {
    "temperature": (0.0, True, 2.0),
    "top_p": (0.0, False, 1.0),
    "min_p": (0.0, True, 1.0),
    "presence_penalty": (-2.0, True, 2.0),
    "frequency_penalty": (-2.0, True, 2.0),
    "repetition_penalty": (0.0, False, 10.0),
}
FLAGS = ["ignore_eos", "include_stop_str_in_output", "skip_special_tokens"]
OPTIONAL = ["seed", "max_tokens", "logprobs", "prompt_logprobs"]
HUGE = 10**400  # float(HUGE) overflows
UNPRINTABLE = 10**5000  # str(UNPRINTABLE) is refused by Python


def refusal(**values: Any) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(**values)
    return caught.value


def assert_refused(name: str, value: object, limit: str) -> None:
    error = refusal(**{name: value})
    assert str(error) == f"{name} is {value!r}; it must {limit}"
    assert (error.param, error.status) == (name, 400)


def test_every_field_is_covered_here():
    others = {"stop", "stop_token_ids", "logit_bias"}
    assert {*INTEGERS, *NUMBERS, *FLAGS, *others} == set(SamplingParams.__dataclass_fields__)


@pytest.mark.parametrize("name", INTEGERS)
def test_integer_limits_are_inclusive(name):
    low, high = INTEGERS[name]
    for value in (low, high):
        assert getattr(SamplingParams(**{name: value}), name) == value
    for value in (low - 1, high + 1):
        assert_refused(name, value, f"be an integer in [{low}, {high}]")


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("value", [1.5, 2.0, True, "3", math.nan, math.inf, [1]])
def test_integer_fields_refuse_other_types(name, value):
    low, high = INTEGERS[name]
    assert_refused(name, value, f"be an integer in [{low}, {high}]")


@pytest.mark.parametrize("name", NUMBERS)
def test_number_limits_are_inclusive_unless_open(name):
    low, low_allowed, high = NUMBERS[name]
    limit = f"be a number in {'[' if low_allowed else '('}{low}, {high}]"
    inside = [high, math.nextafter(low, high), low if low_allowed else high]
    outside = [math.nextafter(high, math.inf), math.nextafter(low, -math.inf), -math.inf]
    for value in inside:
        assert getattr(SamplingParams(**{name: value}), name) == value
    for value in outside if low_allowed else [*outside, low]:
        assert_refused(name, value, limit)


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [math.nan, math.inf, True, "1", None, 1j])
def test_number_fields_refuse_what_is_not_a_finite_number(name, value):
    error = refusal(**{name: value})
    assert str(error).startswith(f"{name} is {value!r}; it must be a number in ")
    assert error.param == name


@pytest.mark.parametrize("name", [*INTEGERS, *NUMBERS])
def test_integers_too_large_for_a_float_or_for_printing_are_refused(name):
    for value in (HUGE, -HUGE, UNPRINTABLE, -UNPRINTABLE):
        error = refusal(**{name: value})
        assert f"{name} is an integer of {value.bit_length()} bits; it must be" in str(error)
        assert error.param == name


@pytest.mark.parametrize("name", [*INTEGERS, *NUMBERS, *FLAGS])
def test_only_optional_fields_take_none(name):
    if name in OPTIONAL:
        assert getattr(SamplingParams(**{name: None}), name) is None
    else:
        assert refusal(**{name: None}).param == name


@pytest.mark.parametrize("name", FLAGS)
def test_flags_are_booleans(name):
    for value in (True, False):
        assert getattr(SamplingParams(**{name: value}), name) is value
    for value in (0, 1, "yes"):
        assert_refused(name, value, "be True or False")


def test_min_tokens_may_not_exceed_max_tokens():
    SamplingParams(min_tokens=5, max_tokens=5)
    error = refusal(min_tokens=6, max_tokens=5)
    assert str(error) == "min_tokens is 6; it must be an integer in [0, 5]"


# Stops.


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        ("end", ("end",)),
        (["a", "b"], ("a", "b")),
        (("a",), ("a",)),
        ([], ()),
        (iter("ab"), ("a", "b")),
    ],
)
def test_stop_may_be_one_string_or_many(stop, expected):
    assert SamplingParams(stop=stop).stop == expected


def test_number_of_stop_strings_is_limited():
    SamplingParams(stop=["x"] * MAX_STOP_STRINGS)
    error = refusal(stop=["x"] * (MAX_STOP_STRINGS + 1))
    assert str(error) == "stop has 17 strings; the limit is 16"
    assert error.param == "stop"


def test_length_of_a_stop_string_is_limited():
    SamplingParams(stop="x" * MAX_STOP_STRING_CHARS)
    for text in ("", "x" * (MAX_STOP_STRING_CHARS + 1)):
        error = refusal(stop=["fine", text])
        assert "must be a string of 1 to 1024 characters" in str(error)
        assert repr(text)[:10] in str(error)
        assert len(str(error)) < 200
        assert error.param == "stop"


@pytest.mark.parametrize("stop", [[1], [None], [b"x"], b"x", [["x"]], [UNPRINTABLE]])
def test_a_stop_string_is_a_string(stop):
    assert "must be a string of 1 to 1024 characters" in str(refusal(stop=stop))


def test_stops_that_are_no_sequence_are_refused():
    assert_refused("stop", 5, "be a string or a sequence of strings")
    assert_refused("stop", None, "be a string or a sequence of strings")
    assert_refused("stop_token_ids", 5, "be a sequence of ints")


def test_stop_token_ids_are_kept_as_a_tuple():
    assert SamplingParams(stop_token_ids=[3, 0, INT32_MAX]).stop_token_ids == (3, 0, INT32_MAX)


@pytest.mark.parametrize("bad", [-1, INT32_MAX + 1, 1.0, "1", True, None, HUGE])
def test_stop_token_ids_are_token_ids(bad):
    error = refusal(stop_token_ids=[7, bad])
    assert str(error).startswith("stop_token_ids item 1 is ")
    assert str(error).endswith("; it must be an integer in [0, 2147483647]")
    assert error.param == "stop_token_ids"


# Logit bias.


def test_logit_bias_limits_are_inclusive():
    assert SamplingParams(logit_bias={0: -100, 5: 100.0}).logit_bias == {0: -100.0, 5: 100.0}
    for bias in (-101, math.nextafter(100.0, math.inf), math.nan, "1", True):
        error = refusal(logit_bias={1: 0.0, 7: bias})
        assert str(error) == (
            f"logit_bias of token 7 is {bias!r}; it must be a number in [-100.0, 100.0]"
        )
        assert error.param == "logit_bias"


def test_number_of_biases_is_limited():
    SamplingParams(logit_bias=dict.fromkeys(range(MAX_LOGIT_BIAS), 1.0))
    error = refusal(logit_bias=dict.fromkeys(range(MAX_LOGIT_BIAS + 1), 1.0))
    assert str(error) == "logit_bias has 1025 entries; the limit is 1024"
    assert error.param == "logit_bias"


@pytest.mark.parametrize("key", ["5", 5.0, True, -1, INT32_MAX + 1, None, HUGE])
def test_logit_bias_keys_are_token_ids(key):
    error = refusal(logit_bias={key: 1.0})
    assert str(error).startswith("logit_bias key is ")
    assert str(error).endswith("; it must be an integer in [0, 2147483647]")
    assert error.param == "logit_bias"


@pytest.mark.parametrize("bias", [None, [(1, 1.0)], "x"])
def test_logit_bias_is_a_dict(bias):
    assert_refused("logit_bias", bias, "be a dict from token ids to numbers")


def test_logit_bias_does_not_change_with_the_callers_dict():
    mine = {1: 1.0}
    params = SamplingParams(logit_bias=mine)
    mine[2] = 1000.0
    assert params.logit_bias == {1: 1.0}


# The vocabulary.


@pytest.mark.parametrize("name", ["logit_bias", "stop_token_ids"])
def test_token_ids_outside_the_vocabulary_are_refused(name):
    def params(token_id: int) -> SamplingParams:
        return SamplingParams(**{name: {token_id: 1.0} if name == "logit_bias" else [token_id]})

    params(9).check_vocabulary(10)
    with pytest.raises(InvalidRequestError) as caught:
        params(10).check_vocabulary(10)
    assert str(caught.value) == f"{name} names token id 10; the vocabulary has ids 0 to 9"
    assert caught.value.param == name


def test_parameters_that_name_no_token_fit_any_vocabulary():
    SamplingParams().check_vocabulary(1)


# The wire.

numbers = {
    name: st.floats(low, high, exclude_min=not low_allowed) | st.just(round(high))
    for name, (low, low_allowed, high) in NUMBERS.items()
}
integers = {
    name: st.integers(low, high) for name, (low, high) in INTEGERS.items() if name != "min_tokens"
}
token_ids = st.integers(0, INT32_MAX)


@given(
    values=st.fixed_dictionaries(
        {},
        optional={
            **numbers,
            **integers,
            **{name: st.booleans() for name in FLAGS},
            "stop": st.lists(st.text(min_size=1, max_size=5), max_size=3),
            "stop_token_ids": st.lists(token_ids, max_size=3),
            "logit_bias": st.dictionaries(token_ids, st.floats(-100, 100), max_size=3),
        },
    )
)
def test_whatever_is_accepted_survives_the_wire(values):
    params = SamplingParams(**values)
    wire = msgspec.msgpack.encode(params)
    assert msgspec.msgpack.decode(wire, type=SamplingParams) == params


def test_numpy_floats_become_plain_ones():
    params = SamplingParams(temperature=np.float64(0.5), logit_bias={1: np.float64(2.0)})
    assert type(params.temperature) is float
    assert type(params.logit_bias[1]) is float

from __future__ import annotations

import itertools

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moe_engine.text.detokenizer import IncrementalDetokenizer
from tests.unit.tiny_tokenizer import byte_ids, tiny_tokenizer, token_id_of

# Random bytes, and cut or mixed up characters: what UTF-8 decoders find hard.
broken_utf8 = st.lists(
    st.one_of(
        st.binary(max_size=4),
        st.text(max_size=3).map(str.encode).map(lambda data: data[:-1]),
        st.sampled_from(
            [b"\xed\xa0\x80", b"\xc0\x80", b"\xf4\x90\x80\x80", b"\xef\xbf\xbd", b"ok"]
        ),
    )
).map(b"".join)

no_deadline = settings(deadline=None)  # the machine may be busy; loading the tokenizer is slow


def split(ids: list[int], cuts: list[int]) -> list[list[int]]:
    """``ids`` cut at the places ``cuts`` (modulo its length)."""
    places = sorted({0, len(ids), *(cut % (len(ids) + 1) for cut in cuts)})
    return [ids[a:b] for a, b in itertools.pairwise(places)]


def stream(pieces: list[list[int]], skip_special_tokens: bool = True) -> list[str]:
    """What each push and finally `finish` gave."""
    detokenizer = IncrementalDetokenizer(tiny_tokenizer(), skip_special_tokens)
    return [*map(detokenizer.push, pieces), detokenizer.finish()]


def one_by_one(data: bytes) -> list[str]:
    return stream([[token_id] for token_id in byte_ids(data)])


cuts = st.lists(st.integers(0, 1000))


@no_deadline
@given(ids=st.lists(st.integers(0, 400)), cuts=cuts, skip=st.booleans())
def test_any_tokens_in_any_split_give_the_decoded_text(
    ids: list[int], cuts: list[int], skip: bool
) -> None:
    assert "".join(stream(split(ids, cuts), skip)) == tiny_tokenizer().decode(ids, skip)


@no_deadline
@given(text=st.text(), cuts=cuts)
@example(text="👩‍👩‍👧 e\u0301 你好\ufffd", cuts=[1, 2, 3, 5, 8, 13])
def test_any_text_in_any_split_comes_out_whole(text: str, cuts: list[int]) -> None:
    ids = byte_ids(text.encode())
    pieces = stream(split(ids, cuts))
    assert "".join(pieces) == text
    assert pieces[-1] == ""


@no_deadline
@given(data=broken_utf8, cuts=cuts)
def test_invalid_utf8_in_any_split_gives_the_decoded_text(data: bytes, cuts: list[int]) -> None:
    ids = byte_ids(data)
    assert "".join(stream(split(ids, cuts))) == tiny_tokenizer().decode(ids)


@no_deadline
@given(data=broken_utf8)
def test_at_most_an_unfinished_character_is_held_back(data: bytes) -> None:
    detokenizer = IncrementalDetokenizer(tiny_tokenizer())
    settled = ""
    for count, token_id in enumerate(byte_ids(data), start=1):
        settled += detokenizer.push([token_id])
        so_far = data[:count].decode(errors="replace")
        assert so_far.startswith(settled)
        held = so_far[len(settled) :]
        assert held.strip("\ufffd") == ""
        assert len(held) <= 3


def test_character_comes_out_with_its_last_byte() -> None:
    assert one_by_one("a🙂b".encode()) == ["a", "", "", "", "🙂", "b", ""]


def test_lone_continuation_byte_does_not_stall_the_text_behind_it() -> None:
    assert one_by_one(b"a\x80bc") == ["a", "\ufffd", "b", "c", ""]


def test_cut_character_settles_with_the_next_byte() -> None:
    assert one_by_one(b"\xf0\x9f\x99x") == ["", "", "", "\ufffdx", ""]


def test_genuine_replacement_character_is_not_held_back() -> None:
    assert one_by_one("\ufffdb".encode()) == ["", "", "\ufffd", "b", ""]


def test_long_run_of_invalid_bytes_is_settled_as_it_comes() -> None:
    pieces = one_by_one(b"\xff" * 1000)
    assert pieces == ["\ufffd"] * 1000 + [""]


def test_finish_flushes_an_unfinished_character() -> None:
    assert one_by_one(b"a\xe4\xbd") == ["a", "", "", "\ufffd"]


@pytest.mark.parametrize(("skip", "text"), [(True, "🙂"), (False, "\ufffd<|im_end|>\ufffd\ufffd")])
def test_special_token_inside_a_character_counts_only_when_shown(skip: bool, text: str) -> None:
    first, last = byte_ids(b"\xf0\x9f"), byte_ids(b"\x99\x82")
    ids = [*first, token_id_of("<|im_end|>"), *last]
    assert "".join(stream([[token_id] for token_id in ids], skip)) == text


def test_no_tokens_give_no_text() -> None:
    assert stream([]) == [""]
    assert stream([[], []]) == ["", "", ""]

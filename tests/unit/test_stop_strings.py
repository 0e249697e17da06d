from __future__ import annotations

import itertools

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moe_engine.text.stop import StopStringChecker


def reference(text: str, stops: list[str], include_stop: bool) -> tuple[str, str | None]:
    """Look at every beginning of the text: the first that ends with a stop string decides."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end if include_stop else end - len(longest)], longest
    return text, None


def run(
    pieces: list[str], stops: list[str], include_stop: bool = False
) -> tuple[list[str], str | None]:
    """What each push and finally `finish` gave, and the match."""
    checker = StopStringChecker(stops, include_stop)
    return [*map(checker.push, pieces), checker.finish()], checker.matched


def split(text: str, cuts: list[int]) -> list[str]:
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    return [text[a:b] for a, b in itertools.pairwise(places)]


# Two letters make overlaps and self-overlaps likely; one is outside the BMP.
letters = st.sampled_from("ab🙂")
stop_lists = st.lists(st.text(letters, min_size=1, max_size=5), max_size=4)
cuts = st.lists(st.integers(0, 100))


@settings(deadline=None, max_examples=400)
@given(text=st.text(letters, max_size=40), stops=stop_lists, include=st.booleans(), cuts=cuts)
@example(text="aabaabaaab", stops=["aabaaab"], include=False, cuts=[3, 6])
def test_any_split_gives_what_a_search_of_the_whole_text_gives(
    text: str, stops: list[str], include: bool, cuts: list[int]
) -> None:
    pieces, matched = run(split(text, cuts), stops, include)
    assert ("".join(pieces), matched) == reference(text, stops, include)


@settings(deadline=None)
@given(text=st.text(letters, max_size=40), stops=stop_lists)
def test_only_the_possible_beginning_of_a_stop_string_is_held_back(
    text: str, stops: list[str]
) -> None:
    checker = StopStringChecker(stops)
    shown = ""
    for end in range(1, len(text) + 1):
        shown += checker.push(text[end - 1])
        if checker.matched is not None:
            break
        held = [
            len(stop[:count])
            for stop in stops
            for count in range(len(stop))
            if text[:end].endswith(stop[:count])
        ]
        assert shown == text[: end - max(held, default=0)]


@settings(deadline=None)
@given(
    early=st.text(letters, max_size=12),
    late=st.text(letters, max_size=12),
    stops=stop_lists,
    cuts=cuts,
)
@example(early="aa", late="a", stops=["aa"], cuts=[])
def test_unsearched_text_ends_no_match_but_may_begin_one(
    early: str, late: str, stops: list[str], cuts: list[int]
) -> None:
    checker = StopStringChecker(stops)
    shown = "".join(checker.push(piece, search=False) for piece in split(early, cuts))
    assert checker.matched is None
    shown += "".join(map(checker.push, split(late, cuts))) + checker.finish()
    expected: tuple[str, str | None] = (early + late, None)
    for end in range(len(early) + 1, len(early + late) + 1):
        found = [stop for stop in stops if (early + late)[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            expected = ((early + late)[: end - len(longest)], longest)
            break
    assert (shown, checker.matched) == expected


def test_stop_string_across_pieces_is_found() -> None:
    assert run(["say ST", "O", "P it"], ["STOP"]) == (["say ", "", "", ""], "STOP")


def test_held_back_text_is_released_when_it_turns_out_harmless() -> None:
    assert run(["say ST", "O", "ne"], ["STOP"]) == (["say ", "", "STOne", ""], None)


def test_finish_releases_the_beginning_of_a_stop_string() -> None:
    assert run(["say ST"], ["STOP"]) == (["say ", "ST"], None)


@pytest.mark.parametrize(("include", "text"), [(False, "a"), (True, "aSTOP")])
def test_stop_string_is_kept_on_demand(include: bool, text: str) -> None:
    pieces, _ = run(["aST", "OPb"], ["STOP"], include)
    assert "".join(pieces) == text


def test_nothing_is_held_back_when_the_stop_string_is_shown_anyway() -> None:
    assert run(["aST", "OPb"], ["STOP"], include_stop=True)[0] == ["aST", "OP", ""]


def test_first_complete_stop_string_wins_over_one_that_began_earlier() -> None:
    assert run(["xabcd"], ["abcd", "bc"]) == (["xa", ""], "bc")


@pytest.mark.parametrize("stops", [["bc", "abc", "c"], ["c", "abc", "bc"]])
def test_longest_of_those_that_end_together_wins_in_any_order(stops: list[str]) -> None:
    assert run(["xabcd"], stops) == (["x", ""], "abc")


def test_nothing_comes_out_after_a_match() -> None:
    assert run(["aSTOP", "b", "STOP"], ["STOP"])[0] == ["a", "", "", ""]


def test_without_stop_strings_text_passes_through() -> None:
    assert run(["a", "", "b"], []) == (["a", "", "b", ""], None)


def test_long_stop_strings_hold_back_less_than_their_length() -> None:
    stops = ["a" * 1023 + "b"] * 16
    pieces, matched = run(["a" * 500] * 20, stops)
    assert list(map(len, pieces)) == [0, 0, 500 - 23] + [500] * 17 + [1023]
    assert matched is None

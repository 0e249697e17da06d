"""`StopStringChecker`: finds stop strings in text that arrives in pieces.

A stop string matches where it is first *complete*: of several, the one that ends first in the
text wins, and of those that end at the same character the longest. So the result depends on the
text alone, never on how it was cut into pieces, and generation ends as soon as any stop string
has been written.

One Knuth-Morris-Pratt automaton per stop string knows how many of its characters the text ends
with; the longest such beginning over all of them is what has to be held back, unless stop strings
are shown anyway.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopStringChecker:
    """Passes text through until a stop string is complete.

    Attributes:
        matched: the stop string that was found, or None.
    """

    def __init__(self, stops: Sequence[str], include_stop: bool = False) -> None:
        """``include_stop`` keeps the matched stop string at the end of the text."""
        self.matched: str | None = None
        # Longest first, so that the first automaton to match at a character is the longest.
        self._automata = [_Automaton(stop) for stop in sorted(stops, key=len, reverse=True)]
        self._include_stop = include_stop
        self._held = ""

    def push(self, text: str, *, search: bool = True) -> str:
        """Add text; returns what can be shown now, up to the first stop string.

        With ``search=False`` no match may end in this text (it may begin in it). After a match
        nothing more comes out.
        """
        if not self._automata:
            return text
        if self.matched is not None:
            return ""
        text = self._held + text
        for end in range(len(self._held) + 1, len(text) + 1):
            for automaton in self._automata:
                if automaton.advance(text[end - 1]) and search and self.matched is None:
                    self.matched = automaton.stop
            if self.matched is not None:
                self._held = ""
                return text[: end if self._include_stop else end - len(self.matched)]
        num_held = 0
        if not self._include_stop:
            num_held = max((automaton.num_matched for automaton in self._automata), default=0)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]

    def finish(self) -> str:
        """The text held back, when no more is to come."""
        held, self._held = self._held, ""
        return held


class _Automaton:
    """Knuth-Morris-Pratt matcher of one stop string."""

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.num_matched = 0  # the text so far ends with stop[:num_matched], less than all of it
        # _borders[n]: length of the longest proper prefix of stop[:n] that is also its suffix.
        self._borders = [0, 0]
        for char in stop[1:]:
            self._borders.append(self._extend(self._borders[-1], char))

    def advance(self, char: str) -> bool:
        """Take the next character of the text; True if the stop string ends with it."""
        self.num_matched = self._extend(self.num_matched, char)
        if self.num_matched < len(self.stop):
            return False
        self.num_matched = self._borders[self.num_matched]
        return True

    def _extend(self, num_matched: int, char: str) -> int:
        """The longest beginning of the stop string at the end of ``stop[:num_matched] + char``."""
        while num_matched and self.stop[num_matched] != char:
            num_matched = self._borders[num_matched]
        return num_matched + (self.stop[num_matched] == char)

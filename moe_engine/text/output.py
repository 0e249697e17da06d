"""From the core's `RequestUpdate`s to what a user sees: text, stop strings, logprobs, usage.

`RequestAssembler` serves a request of ``n`` sequences: `update` gives the streamed chunk,
`final` the whole. Both may be used for the same request. The rules follow vLLM:

* A stop token (the model's eos or one of ``stop_token_ids``) is part of ``token_ids`` and
  ``logprobs`` but not of the text, unless ``include_stop_str_in_output`` (special tokens stay out
  all the same while ``skip_special_tokens`` is on).
* The token that completes a stop string is the last one of the output; a stop string outranks the
  core's own reason to end (length, stop token) if both come with the same token.
* A stop string may not be completed by the first ``min_tokens`` tokens; text of theirs may be the
  beginning of one completed later.
"""

from __future__ import annotations

from collections.abc import Sequence

from moe_engine.text.detokenizer import IncrementalDetokenizer
from moe_engine.text.stop import StopStringChecker
from moe_engine.text.tokenizer import Tokenizer
from moe_engine.types.messages import RequestUpdate
from moe_engine.types.results import (
    CompletionOutput,
    FinishReason,
    PositionLogprobs,
    RequestOutput,
    TokenLogprob,
    Usage,
)
from moe_engine.types.sampling import SamplingParams
from moe_engine.types.step import Logprobs


class CompletionAssembler:
    """Assembles one of the ``n`` completions of a request."""

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams, index: int) -> None:
        self._tokenizer = tokenizer
        self._params = params
        self._index = index
        self._detokenizer = IncrementalDetokenizer(tokenizer, params.skip_special_tokens)
        self._stop_strings = StopStringChecker(params.stop, params.include_stop_str_in_output)
        self._texts: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[PositionLogprobs] = []
        self._finish_reason: FinishReason | None = None
        self._stop_reason: str | int | None = None

    @property
    def finished(self) -> bool:
        """Whether the completion has ended; later updates are ignored."""
        return self._finish_reason is not None

    @property
    def stopped_by_string(self) -> bool:
        """Whether a stop string ended it: the core does not know and must be told to abort."""
        return self._stop_strings.matched is not None

    @property
    def num_tokens(self) -> int:
        """Output tokens so far; those behind a stop string do not count."""
        return len(self._token_ids)

    def update(self, update: RequestUpdate) -> CompletionOutput | None:
        """Take the core's news of this sequence; returns what is new, or None if nothing is.

        The text can lag behind the tokens: unfinished characters and what may become a stop
        string are held back until they are settled or the completion ends.
        """
        if self.finished or not (update.token_ids or update.finish_reason):
            return None
        text, num_new = self._take_tokens(update)
        if self.stopped_by_string:
            self._finish_reason = FinishReason.STOP
            self._stop_reason = self._stop_strings.matched
        else:
            self._finish_reason = update.finish_reason
            self._stop_reason = update.stop_token_id
        logprobs: list[PositionLogprobs] = []
        if self._params.logprobs is not None:
            assert len(update.logprobs) == len(update.token_ids), "one logprobs entry per token"
            logprobs = [to_position(self._tokenizer, e) for e in update.logprobs[:num_new]]
        self._texts.append(text)
        self._logprobs += logprobs
        return self._output(text, update.token_ids[:num_new], logprobs)

    def total(self) -> CompletionOutput:
        """Everything so far."""
        return self._output("".join(self._texts), self._token_ids, self._logprobs)

    def _take_tokens(self, update: RequestUpdate) -> tuple[str, int]:
        """Add the tokens up to the one that completes a stop string.

        Returns:
            The text that can be shown now, and how many tokens were added.
        """
        num_shown = len(update.token_ids)
        if update.finish_reason is FinishReason.STOP:  # the last token is a stop token
            num_shown -= not self._params.include_stop_str_in_output
        if not self._params.stop:
            self._token_ids += update.token_ids
            text = self._detokenizer.push(update.token_ids[:num_shown])
            if update.finish_reason is not None:
                text += self._detokenizer.finish()
            return text, len(update.token_ids)
        text = ""
        for position, token_id in enumerate(update.token_ids):
            self._token_ids.append(token_id)
            if position < num_shown:
                text += self._show(self._detokenizer.push([token_id]))
            if self.stopped_by_string:
                return text, position + 1
        if update.finish_reason is not None:
            text += self._show(self._detokenizer.finish()) + self._stop_strings.finish()
        return text, len(update.token_ids)

    def _show(self, text: str) -> str:
        """Pass settled text through the search for stop strings."""
        return self._stop_strings.push(text, search=self.num_tokens > self._params.min_tokens)

    def _output(
        self, text: str, token_ids: Sequence[int], logprobs: Sequence[PositionLogprobs]
    ) -> CompletionOutput:
        return CompletionOutput(
            index=self._index,
            text=text,
            token_ids=tuple(token_ids),
            finish_reason=self._finish_reason,
            stop_reason=self._stop_reason,
            logprobs=None if self._params.logprobs is None else tuple(logprobs),
        )


class RequestAssembler:
    """Assembles a request of ``params.n`` sequences.

    Attributes:
        completions: the parts, by index; a front end asks them for ``stopped_by_string``.
    """

    def __init__(
        self,
        request_id: str,
        tokenizer: Tokenizer,
        params: SamplingParams,
        prompt_token_ids: Sequence[int],
    ) -> None:
        self.completions = tuple(
            CompletionAssembler(tokenizer, params, index) for index in range(params.n)
        )
        self._request_id = request_id
        self._tokenizer = tokenizer
        self._prompt_token_ids = tuple(prompt_token_ids)
        self._wants_prompt_logprobs = params.prompt_logprobs is not None
        self._prompt_logprobs: list[PositionLogprobs | None] = [None]
        self._prompt_logprobs_sent = False
        self._num_cached_tokens = 0
        self._num_tokens = 0
        self._num_open = params.n

    @property
    def finished(self) -> bool:
        """Whether all completions have ended."""
        return self._num_open == 0

    def update(self, index: int, update: RequestUpdate) -> RequestOutput | None:
        """Take the core's news of completion ``index``; returns the chunk to stream, if any.

        ``cached_tokens`` and the prompt's logprobs are those of completion 0: the others find in
        the prefix cache what it has just computed. The chunk of completion 0 that comes when all
        prompt logprobs are known (or it ends) carries them, once.
        """
        if index == 0:
            self._num_cached_tokens = max(self._num_cached_tokens, update.num_cached_tokens)
            if self._wants_prompt_logprobs:
                self._prompt_logprobs += [
                    to_position(self._tokenizer, entry) for entry in update.prompt_logprobs
                ]
        delta = self.completions[index].update(update)
        if delta is None:
            return None
        self._num_tokens += len(delta.token_ids)
        self._num_open -= delta.finish_reason is not None
        prompt_logprobs = None
        if index == 0 and self._wants_prompt_logprobs and not self._prompt_logprobs_sent:
            is_complete = len(self._prompt_logprobs) >= len(self._prompt_token_ids)
            if is_complete or delta.finish_reason is not None:
                prompt_logprobs = tuple(self._prompt_logprobs)
                self._prompt_logprobs_sent = True
        return self._output((delta,), prompt_logprobs)

    def final(self) -> RequestOutput:
        """Everything so far, of all completions."""
        prompt_logprobs = tuple(self._prompt_logprobs) if self._wants_prompt_logprobs else None
        return self._output(tuple(c.total() for c in self.completions), prompt_logprobs)

    def _output(
        self,
        outputs: tuple[CompletionOutput, ...],
        prompt_logprobs: tuple[PositionLogprobs | None, ...] | None,
    ) -> RequestOutput:
        return RequestOutput(
            request_id=self._request_id,
            prompt_token_ids=self._prompt_token_ids,
            outputs=outputs,
            usage=Usage(
                prompt_tokens=len(self._prompt_token_ids),
                completion_tokens=self._num_tokens,
                cached_tokens=self._num_cached_tokens,
            ),
            prompt_logprobs=prompt_logprobs,
            finished=self.finished,
        )


def to_position(tokenizer: Tokenizer, entry: Logprobs) -> PositionLogprobs:
    """Give the core's numbers for one position their tokens' texts."""
    return PositionLogprobs(
        chosen=TokenLogprob(
            entry.token_id, entry.logprob, entry.rank, tokenizer.token_text(entry.token_id)
        ),
        top=tuple(
            TokenLogprob(token_id, logprob, rank, tokenizer.token_text(token_id))
            for rank, (token_id, logprob) in enumerate(
                zip(entry.top_ids, entry.top_logprobs, strict=True), start=1
            )
        ),
    )

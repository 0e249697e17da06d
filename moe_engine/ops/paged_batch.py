"""Where the tokens of a step stand in the paged KV cache.

Shape legend: T tokens, S sequences, B blocks, L tokens a block, R rows, P spans.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from moe_engine.ops.prefill_attention import PrefillTiles, stage_tiles
from moe_engine.ops.prefill_plan import PrefillGroup, PrefillSpan, plan_prefills


@dataclass(frozen=True)
class PagedBatch:
    """The sequences of a step.

    The first ``num_decodes`` of the S sequences compute one position each, in rows
    0 .. num_decodes - 1; the others are ``prefills``, whose rows follow in the same order. A CUDA
    graph runs with padding rows behind the last real decode: slot -1, context length 0.

    In a CUDA graph for steps of any kind only the device knows the prefills, by ``tiles``. Then
    ``num_decodes`` is the most that there can be: rows whose context length is 0 are no decodes,
    but padding or a prefill's. The output of padding is arbitrary.

    Attributes:
        slots_T: int64, cache slot (block × L + offset) of each token's key and value; -1: nowhere.
        block_tables_SB: int32 [S, B], each row the blocks of a sequence; what lies past its
            context is arbitrary.
        context_lens_S: int32 [S], tokens in the cache once this step's are written.
        query_starts_S: int32 [S + 1], first row of each sequence, then T; arbitrary with ``tiles``.
        num_decodes: sequences that compute one position, padding rows included.
        prefills: the spans of the other sequences, known on the host.
        tiles: what `ops.prefill_attention` is to compute instead of ``prefills``.
    """

    slots_T: torch.Tensor
    block_tables_SB: torch.Tensor
    context_lens_S: torch.Tensor
    query_starts_S: torch.Tensor
    num_decodes: int
    prefills: tuple[PrefillSpan, ...]
    tiles: PrefillTiles | None = None

    @property
    def num_tokens(self) -> int:
        """T."""
        if self.tiles is not None:
            return len(self.slots_T)
        return self.num_decodes + sum(span.query_len for span in self.prefills)

    @property
    def has_prefills(self) -> bool:
        """Whether there may be sequences that compute several positions."""
        return self.tiles is not None or bool(self.prefills)

    @property
    def rows(self) -> list[tuple[int, int]]:
        """First row and number of rows of each sequence."""
        decodes = [(row, 1) for row in range(self.num_decodes)]
        return decodes + [(span.first_row, span.query_len) for span in self.prefills]

    @cached_property
    def prefill_groups(self) -> list[PrefillGroup]:
        """Who attends to which prefills on a GPU where cuDNN can; the same in every layer."""
        return plan_prefills(self.prefills, cudnn=True)

    def prefill_tiles(self, tokens: int) -> PrefillTiles:
        """The tiles of ``tokens`` of the prefills, on the device; the same in every layer."""
        if self.tiles is not None:
            return self.tiles
        if tokens not in self._tiles:
            device = self.slots_T.device
            self._tiles[tokens] = stage_tiles(self.prefills, self.num_decodes, tokens, device)
        return self._tiles[tokens]

    @cached_property
    def _tiles(self) -> dict[int, PrefillTiles]:
        return {}

    def known(self) -> PagedBatch:
        """The same with the prefills on the host, for the references; waits for the device.

        Rows of the first ``num_decodes`` may be a prefill's as well; ``query_starts_S`` stays
        arbitrary.
        """
        if self.tiles is None:
            return self
        spans = self.tiles.spans()
        sequences = list(range(self.num_decodes)) + [table_row for _, table_row in spans]
        contexts_S = self.context_lens_S[: self.num_decodes].tolist()
        contexts_S += [span.context_len for span, _ in spans]
        return replace(
            self,
            block_tables_SB=self.block_tables_SB[sequences],
            context_lens_S=torch.tensor(contexts_S, dtype=torch.int32, device=self.slots_T.device),
            prefills=tuple(span for span, _ in spans),
            tiles=None,
        )


@dataclass(frozen=True, slots=True)
class NeededRows:
    """The rows of a step that are needed behind the last layer's attention.

    Attributes:
        rows_R: int64.
        as_decodes: the same rows as sequences that compute one position each, if every one of them
            is the last of its sequence and the step can make use of it. Attending to them alone is
            then little work.
    """

    rows_R: torch.Tensor
    as_decodes: PagedBatch | None

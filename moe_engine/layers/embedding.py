"""The vocabulary, cut by rows over the attention-TP group: embedding and output head.

Shape legend: T tokens, H hidden size, V vocabulary, P rows of the vocabulary per rank.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from moe_engine.checkpoint.spec import WeightSpec
from moe_engine.layers.context import LayerContext
from moe_engine.ops.embedding import embedding


class VocabShard(nn.Module):
    """This rank's rows of a [V, H] matrix; the last shard may have unused rows.

    Rank r holds rows ``[r * P, min((r + 1) * P, V))`` with P = ceil(V / tp).
    """

    def __init__(self, context: LayerContext, name: str) -> None:
        super().__init__()
        self._name = name
        self.tp = context.groups.tp
        self.vocab_size = context.model.vocab_size
        rows = -(-self.vocab_size // self.tp.size)
        self.first = min(self.tp.rank * rows, self.vocab_size)
        self.last = min(self.first + rows, self.vocab_size)
        self.weight = context.parameter(rows, context.model.hidden_size)

    def weight_specs(self, prefix: str) -> Iterator[WeightSpec]:
        """What to read from the checkpoint; nothing if the shard has no rows."""
        if self.last > self.first:
            yield WeightSpec(
                f"{prefix}{self._name}.weight",
                (slice(self.first, self.last), slice(0, self.weight.shape[1])),
                self.weight.data[: self.last - self.first],
            )


class VocabEmbedding(VocabShard):
    """Token ids to hidden states; each rank looks up its own rows, one all-reduce adds them."""

    def forward(self, token_ids_T: torch.Tensor) -> torch.Tensor:
        """Hidden states [T, H] of int64 token ids in [0, V)."""
        return self.tp.all_reduce(embedding(token_ids_T, self.weight, self.first, self.last))


class OutputHead(nn.Module):
    """Hidden states to logits, from rows of its own or tied to the embedding's."""

    def __init__(self, context: LayerContext, embedding: VocabEmbedding) -> None:
        super().__init__()
        tied = context.model.tie_word_embeddings
        self._own = None if tied else VocabShard(context, "lm_head")
        self._shard: VocabShard = self._own or embedding

    def forward(self, x_TH: torch.Tensor) -> torch.Tensor | None:
        """Logits [T, V] on the TP group's rank 0, None on the others (a collective)."""
        logits = self._shard.tp.gather_columns(F.linear(x_TH, self._shard.weight))
        return None if logits is None else logits[:, : self._shard.vocab_size]

    def weight_specs(self, prefix: str) -> Iterator[WeightSpec]:
        """What to read from the checkpoint; nothing if tied."""
        if self._own is not None:
            yield from self._own.weight_specs(prefix)

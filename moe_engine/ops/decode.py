"""Start and end of a decode step on the device: inputs from the sequence table, tokens into it.

Shape legend: S rows of the step, N slots of the table, C longest context, B blocks of the longest
context, L tokens a block. A row whose slot is negative is padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe_engine.ops import native
from moe_engine.ops.reference import decode as reference


@dataclass(frozen=True)
class DecodeInputs:
    """What the model reads in a decode step; the tensors stay the same for every step.

    Attributes:
        token_ids_S, positions_S: int64; 0 for padding rows.
        cache_slots_S: int64, block × L + offset; -1 for padding rows.
        context_lens_S: int32, the row's own token included; 0 for padding rows.
        block_tables_SB: int32; what lies past a row's context is arbitrary.
    """

    token_ids_S: torch.Tensor
    positions_S: torch.Tensor
    cache_slots_S: torch.Tensor
    context_lens_S: torch.Tensor
    block_tables_SB: torch.Tensor

    @classmethod
    def empty(cls, num_rows: int, num_blocks: int, device: torch.device) -> DecodeInputs:
        """Inputs of ``num_rows`` padding rows."""
        return cls(
            torch.zeros(num_rows, dtype=torch.int64, device=device),
            torch.zeros(num_rows, dtype=torch.int64, device=device),
            torch.full((num_rows,), -1, dtype=torch.int64, device=device),
            torch.zeros(num_rows, dtype=torch.int32, device=device),
            torch.zeros(num_rows, num_blocks, dtype=torch.int32, device=device),
        )

    def first(self, num_rows: int) -> DecodeInputs:
        """The same memory, ``num_rows`` rows of it."""
        return DecodeInputs(
            self.token_ids_S[:num_rows],
            self.positions_S[:num_rows],
            self.cache_slots_S[:num_rows],
            self.context_lens_S[:num_rows],
            self.block_tables_SB[:num_rows],
        )


def prepare_decode(
    slots_S: torch.Tensor,
    positions_S: torch.Tensor,
    tokens_NC: torch.Tensor,
    blocks_NB: torch.Tensor,
    block_size: int,
    out: DecodeInputs,
) -> None:
    """Look up what each row's position needs; fills ``out``, which has S rows.

    Args:
        slots_S: int32, each row's slot of the table, or -1.
        positions_S: int32, the position that the row computes.
        tokens_NC: int32 token ids.
        blocks_NB: int32 block tables.
        block_size: L.
    """
    _check_rows(slots_S, positions_S, tokens_NC)
    assert blocks_NB.dtype == torch.int32, blocks_NB.dtype
    assert out.token_ids_S.shape == slots_S.shape, (out.token_ids_S.shape, slots_S.shape)
    assert out.block_tables_SB.shape == (slots_S.shape[0], blocks_NB.shape[1])
    outputs = (
        out.token_ids_S,
        out.positions_S,
        out.cache_slots_S,
        out.context_lens_S,
        out.block_tables_SB,
    )
    if slots_S.is_cuda and native.has_triton():
        from moe_engine.kernels import prepare_decode as kernels

        with torch.cuda.device(slots_S.device):
            kernels.prepare_decode(slots_S, positions_S, tokens_NC, blocks_NB, block_size, *outputs)
        return
    reference.prepare_decode(slots_S, positions_S, tokens_NC, blocks_NB, block_size, *outputs)


def append_tokens(
    slots_S: torch.Tensor,
    positions_S: torch.Tensor,
    sampled_S: torch.Tensor,
    tokens_NC: torch.Tensor,
) -> None:
    """Put sampled tokens where the next step reads its inputs: ``tokens[slot, position] = token``.

    Args:
        slots_S: int32, or -1 for rows to leave out.
        positions_S: int32, the position of the token that was sampled.
        sampled_S: int64.
        tokens_NC: int32, changed.
    """
    _check_rows(slots_S, positions_S, tokens_NC)
    assert sampled_S.dtype == torch.int64, sampled_S.dtype
    assert sampled_S.shape == slots_S.shape, (sampled_S.shape, slots_S.shape)
    if slots_S.shape[0] == 0:
        return
    if slots_S.is_cuda and native.has_triton():
        from moe_engine.kernels import prepare_decode as kernels

        with torch.cuda.device(slots_S.device):
            kernels.append_tokens(slots_S, positions_S, sampled_S, tokens_NC)
        return
    reference.append_tokens(slots_S, positions_S, sampled_S, tokens_NC)


def _check_rows(slots_S: torch.Tensor, positions_S: torch.Tensor, tokens_NC: torch.Tensor) -> None:
    assert slots_S.dtype == positions_S.dtype == tokens_NC.dtype == torch.int32
    assert slots_S.shape == positions_S.shape, (slots_S.shape, positions_S.shape)

"""Start and end of a decode step in plain torch; it waits for the device.

Shape legend: S rows of the step, N slots of the table, C longest context, B blocks of the longest
context. A row whose slot is negative is padding.
"""

from __future__ import annotations

import torch


def prepare_decode(
    slots_S: torch.Tensor,
    positions_S: torch.Tensor,
    tokens_NC: torch.Tensor,
    blocks_NB: torch.Tensor,
    block_size: int,
    token_ids_S: torch.Tensor,
    positions_out_S: torch.Tensor,
    cache_slots_S: torch.Tensor,
    context_lens_S: torch.Tensor,
    block_tables_SB: torch.Tensor,
) -> None:
    """See `ops.decode.prepare_decode`; the outputs are its ``DecodeInputs``."""
    for out, padding in (
        (token_ids_S, 0),
        (positions_out_S, 0),
        (cache_slots_S, -1),
        (context_lens_S, 0),
    ):
        out.fill_(padding)
    rows = (slots_S >= 0).nonzero().squeeze(1)
    slots, positions = slots_S[rows].to(torch.int64), positions_S[rows].to(torch.int64)
    blocks = blocks_NB[slots, positions // block_size].to(torch.int64)
    token_ids_S[rows] = tokens_NC[slots, positions].to(torch.int64)
    positions_out_S[rows] = positions
    cache_slots_S[rows] = blocks * block_size + positions % block_size
    context_lens_S[rows] = (positions + 1).to(torch.int32)
    block_tables_SB[rows] = blocks_NB[slots]


def append_tokens(
    slots_S: torch.Tensor,
    positions_S: torch.Tensor,
    sampled_S: torch.Tensor,
    tokens_NC: torch.Tensor,
) -> None:
    """See `ops.decode.append_tokens`."""
    rows = (slots_S >= 0).nonzero().squeeze(1)
    where = slots_S[rows].to(torch.int64), positions_S[rows].to(torch.int64)
    tokens_NC[where] = sampled_S[rows].to(torch.int32)

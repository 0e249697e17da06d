"""Cases of `ops.decode_attention`, each run once and compared with float32 on the CPU.

Legend: S sequences, N query heads, G KV heads, D head dimension, L tokens a block, P positions,
F = D / 2, X = (N + 2 * G) * D.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from moe_engine.ops import decode_attention
from moe_engine.ops.decode_attention import Launch
from moe_engine.ops.reference import rope as rope_reference
from tests.kernels.close import check_rows
from tests.kernels.paged import Case, make_case
from tests.kernels.paged import expected as expected_attention

BF16 = torch.bfloat16

# (contexts, N, G, L, parts of the projection): padding and the new token alone; around the ends of
# pieces of 16; one piece for every warp and one more; as few as make two shares and one token less;
# more than 32 for each warp of one share; the fewest and the most query heads. No row at all.
CLUSTER_CASES = [
    ([], 8, 2, 16, 0),
    ([], 8, 2, 16, 3),
    ([576], 32, 4, 16, 0),
    ([0, 1, 2, 15, 16, 17, 0], 8, 1, 16, 0),
    ([128, 129, 127, 1], 6, 2, 32, 1),
    ([1024, 1025, 1040, 5], 2, 2, 64, 0),
    ([3001, 48], 16, 1, 16, 5),
    ([700, 33, 0], 18, 2, 16, 0),
    ([4095, 4096], 4, 2, 16, 0),
    ([34000], 2, 1, 16, 0),
]
CLUSTERS = tuple(Launch(0, max_shares, 2048) for max_shares in (1, 2, 8))
# As above: the warps of a block of 6 or 12 have no, one, two and three pieces, and a ring of two.
# Rows from 1 to 257, equal, mixed and padded; more than 32 pieces for each warp of one share.
BLOCK_CASES = [
    ([], 8, 2, 16, 0),
    ([], 8, 2, 16, 3),
    ([640], 32, 4, 16, 0),
    ([0, 1, 2, 15, 16, 17, 0, 31, 33], 8, 1, 16, 0),
    ([95, 96, 97, 191, 192, 193, 287, 289], 6, 2, 32, 1),
    ([383, 385, 400, 577, 1153, 5, 0, 112], 2, 2, 64, 0),
    ([5000, 100, 640, 1, 0, 33, 16], 16, 1, 16, 5),
    ([700, 33, 0, 193], 18, 2, 16, 0),
    ([1249], 64, 4, 16, 4),
    ([640 - row % 7 for row in range(33)], 32, 4, 16, 4),
    ([13 * (row % 23) for row in range(130)], 8, 1, 16, 0),
    ([(0, 1, 15, 16, 17, 100, 330)[row % 7] for row in range(257)], 4, 1, 16, 2),
    ([13_000], 2, 1, 16, 0),
]
# Shares of as few tokens as a piece has, and of one more than two pieces.
BLOCKS = (
    Launch(6, 1, 1),
    Launch(12, 1, 1),
    Launch(6, 8, 16),
    Launch(12, 2, 16),
    Launch(6, 3, 33),
    Launch(12, 8, 160),
)
LAUNCHES = CLUSTERS + BLOCKS


@dataclass(frozen=True)
class Decode:
    """New tokens of decoding sequences, with random norms and angles; all on the CPU."""

    case: Case
    weights_2D: torch.Tensor
    angles_PF: torch.Tensor
    positions_S: torch.Tensor

    @classmethod
    def random(
        cls, contexts: list[int], num_heads: int, num_kv_heads: int, block_size: int = 16
    ) -> Decode:
        """Where the new keys and values go, the cache holds NaN."""
        case = make_case(
            [(1, context) for context in contexts],
            device="cpu",
            dtype=BF16,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=128,
            block_size=block_size,
        )
        slots_S = case.batch.slots_T
        for tensor in case.cache:
            tensor.flatten(0, 1)[slots_S[slots_S >= 0]] = torch.nan
        weights_2D = (1 + 0.3 * torch.randn(2, 128)).to(BF16)
        angles_PF = 6 * torch.rand(max(contexts, default=0) + 1, 64)
        positions_S = (case.batch.context_lens_S.long() - 1).clamp(min=0)
        return cls(case, weights_2D, angles_PF, positions_S)

    @property
    def width(self) -> int:
        """Of the projection, X."""
        return (self.case.q_TND.shape[1] + 2 * self.case.cache[0].shape[2]) * 128

    def expected(self, qkv_SX: torch.Tensor) -> torch.Tensor:
        """By the references, from the CPU; the case's cache gets the new keys and values."""
        case, weights = self.case, self.weights_2D
        cos_sin = self.angles_PF.cos(), self.angles_PF.sin()
        q_SND = rope_reference.norm_rope_write(
            qkv_SX, *weights, 1e-6, cos_sin, self.positions_S, *case.cache, case.batch.slots_T
        )
        return expected_attention(replace(case, q_TND=q_SND))

    def arguments(
        self,
        cache: tuple[torch.Tensor, torch.Tensor],
        rows: slice = slice(None),
        block_shift: int = 0,
    ) -> dict[str, Any]:
        """The kernel's, but for the projection and the launch.

        ``cache``, on the GPU, has the case's blocks from number ``block_shift`` on.
        """
        batch, slots_S = self.case.batch, self.case.batch.slots_T
        slots_S = torch.where(slots_S >= 0, slots_S + block_shift * cache[0].shape[1], slots_S)
        return {
            "norm_weights": (self.weights_2D[0].cuda(), self.weights_2D[1].cuda()),
            "eps": 1e-6,
            "cos_sin_PF": (self.angles_PF.cos().cuda(), self.angles_PF.sin().cuda()),
            "positions_R": self.positions_S[rows].cuda(),
            "slots_R": slots_S[rows].cuda(),
            "cache": cache,
            "block_tables_RB": (batch.block_tables_SB[rows] + block_shift).cuda(),
            "context_lens_R": batch.context_lens_S[rows].cuda(),
            "scale": self.case.scale,
        }


def on_gpu(cache: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Copies of keys and values."""
    return cache[0].cuda(), cache[1].cuda()


def run_decode(
    launch: Launch,
    contexts: list[int],
    num_heads: int,
    num_kv_heads: int,
    block_size: int,
    num_parts: int,
) -> None:
    """Output and cache, from rows of the projection that lie apart or from parts of it."""
    decode = Decode.random(contexts, num_heads, num_kv_heads, block_size)
    if num_parts:
        qkv = torch.randn(num_parts, len(contexts), decode.width)
        qkv_SX, given = qkv.sum(0).to(BF16), qkv.cuda()
    else:
        qkv = torch.randn(len(contexts), decode.width + 16).to(BF16)
        qkv_SX, given = qkv[:, : decode.width], qkv.cuda()[:, : decode.width]
    cache = on_gpu(decode.case.cache)
    arguments = decode.arguments(cache)
    out_SND = decode_attention.decode_attention(launch, given, **arguments).cpu()
    expected_SND = decode.expected(qkv_SX)
    check_rows(out_SND.flatten(0, 1), expected_SND.flatten(0, 1))
    for ours, theirs in zip(cache, decode.case.cache, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-2, atol=1e-2, equal_nan=True)

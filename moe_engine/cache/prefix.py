"""Prefix cache: which blocks already hold the KV of the beginning of a token sequence.

The KV of a token depends on every token before it, so a full block is identified by a chained
digest: BLAKE2b-256 over the parent block's digest followed by the block's own token ids. Equal
digests mean equal tokens at equal positions (up to a collision of a cryptographic hash, which
nobody can construct, so that no user can plant KV in another one's prompt).
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

from moe_engine.cache.block_pool import BlockPool

DIGEST_BYTES = 32


def block_digest(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Digest of a full block; ``parent`` is the digest of the block before it, or ``b""``."""
    content = array("q", token_ids).tobytes()
    return hashlib.blake2b(parent + content, digest_size=DIGEST_BYTES).digest()


def extend_digests(digests: list[bytes], token_ids: Sequence[int], block_size: int) -> None:
    """Append to ``digests`` those of the full blocks of ``token_ids`` that are still missing."""
    for index in range(len(digests), len(token_ids) // block_size):
        parent = digests[-1] if digests else b""
        tokens = token_ids[index * block_size : (index + 1) * block_size]
        digests.append(block_digest(parent, tokens))


def find_prefix(pool: BlockPool, digests: Sequence[bytes], max_blocks: int) -> list[int]:
    """Block ids of the longest run of known blocks from the first one, at most ``max_blocks``.

    The blocks are not held by this call; `BlockPool.hold` does that.
    """
    block_ids: list[int] = []
    for digest in digests[:max_blocks]:
        block_id = pool.find(digest)
        if block_id is None:
            break
        block_ids.append(block_id)
    return block_ids

"""The tensors behind the block pool: keys and values of every layer in pages."""

from __future__ import annotations

import torch


def kv_bytes_per_block(
    num_layers: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
) -> int:
    """Bytes that one block takes on a rank, keys and values of all layers together."""
    return 2 * num_layers * block_size * num_kv_heads * head_dim * dtype.itemsize


class KVCache:
    """Keys and values of one rank, each [layers, blocks, block_size, KV heads, head_dim].

    ``num_kv_heads`` counts the heads of this rank's attention-TP shard.
    """

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (2, num_layers, num_blocks, block_size, num_kv_heads, head_dim)
        self.block_size = block_size
        self._keys, self._values = torch.zeros(shape, dtype=dtype, device=device)

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one layer, each [blocks, block_size, KV heads, head_dim]."""
        return self._keys[index], self._values[index]

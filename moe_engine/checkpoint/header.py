"""The header of a safetensors file: names, shapes, dtypes and byte ranges, without the data.

Format (https://github.com/huggingface/safetensors#format): 8 bytes, little-endian, give the
length N of the header; N bytes of JSON map each tensor's name to
``{"dtype": "BF16", "shape": [2, 3], "data_offsets": [begin, end]}``, the offsets counting from
the first byte after the header; the rest is the data, row-major, little-endian, in the order of
the offsets and without holes. ``__metadata__`` in the map is not a tensor.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe_engine.errors import CheckpointError

# The dtypes that weights may have; the header's other codes (integers, 8-bit floats) are
# recognised by size only, so that a message can name them.
WEIGHT_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_ITEM_SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4,
    "F64": 8, "I64": 8, "U64": 8,
}  # fmt: skip

_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies: contiguous, row-major, from byte ``offset`` of ``file``.

    ``dtype`` is the header's code, e.g. ``BF16``.
    """

    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def item_size(self) -> int:
        """Bytes of one element."""
        return _ITEM_SIZES[self.dtype]

    @property
    def end(self) -> int:
        """The byte of ``file`` after the last one of the tensor."""
        return self.offset + math.prod(self.shape) * self.item_size


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Read the header of a safetensors file and check that it is consistent in itself.

    The file may be shorter than the header says: compare `StoredTensor.end` with its size.

    Raises:
        CheckpointError: the file is missing, unreadable or not a safetensors file.
    """
    try:
        with file.open("rb") as stream:
            length_bytes = stream.read(_LENGTH_BYTES)
            length = int.from_bytes(length_bytes, "little")
            if len(length_bytes) < _LENGTH_BYTES or length > _MAX_HEADER_BYTES:
                raise CheckpointError(f"{file.name} is not a safetensors file")
            text = stream.read(length)
    except FileNotFoundError as error:
        raise CheckpointError(f"{file.name} does not exist") from error
    except OSError as error:
        raise CheckpointError(f"{file.name} cannot be read: {error.strerror}") from error
    if len(text) < length:
        raise CheckpointError(f"{file.name} ends inside its header")
    try:
        entries = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{file.name} has a header that is not JSON: {error}") from error
    if not isinstance(entries, dict):
        raise CheckpointError(f"{file.name} has a header that is not a JSON object")
    entries.pop("__metadata__", None)
    return _parse_entries(file, _LENGTH_BYTES + length, entries)


def _parse_entries(file: Path, data_start: int, entries: dict[str, Any]) -> dict[str, StoredTensor]:
    tensors = {}
    for name, entry in entries.items():
        try:
            begin, end = (int(offset) for offset in entry["data_offsets"])
            shape = tuple(int(size) for size in entry["shape"])
            tensor = StoredTensor(file, data_start + begin, shape, entry["dtype"])
            if min((begin, *shape)) < 0 or tensor.end != data_start + end:
                raise ValueError("shape, dtype and data_offsets disagree")
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{file.name} has a malformed header entry for {name}: {error!r:.200}"
            ) from error
        tensors[name] = tensor
    position = data_start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].end)):
        if tensor.offset != position:
            raise CheckpointError(
                f"{file.name} has a malformed header: {name} begins at byte {tensor.offset}, "
                f"the tensor before it ends at byte {position}"
            )
        position = tensor.end
    return tensors

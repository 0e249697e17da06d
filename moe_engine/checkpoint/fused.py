"""Expert weights in transformers' fused form, seen as one tensor per expert.

transformers 5 can save a layer's experts as two tensors without a ``.weight`` suffix
(E experts, I intermediate size, H hidden size):

    model.layers.N.mlp.experts.gate_up_proj   [E, 2I, H]   rows [0, I) gate, rows [I, 2I) up
    model.layers.N.mlp.experts.down_proj      [E, H, I]

Every expert's projection is a contiguous block of these, so translating is arithmetic on the
byte offset: for E=2, I=3, H=4 in float32, expert 1's ``up_proj`` begins
(1 * 2*3*4 + 3*4) * 4 = 144 bytes after ``gate_up_proj``.
"""

from __future__ import annotations

import re

from moe_engine.checkpoint.header import StoredTensor

_FUSED_NAME = re.compile(r"(model\.layers\.\d+\.mlp\.experts)\.(gate_up|down)_proj")


def is_fused(name: str) -> bool:
    """Whether ``name`` is a tensor of all experts of a layer."""
    return _FUSED_NAME.fullmatch(name) is not None


def fused_shape(name: str, num_experts: int, intermediate: int, hidden: int) -> tuple[int, ...]:
    """The shape that a fused tensor must have."""
    if name.endswith("gate_up_proj"):
        return (num_experts, 2 * intermediate, hidden)
    return (num_experts, hidden, intermediate)


def expert_names(name: str, num_experts: int) -> list[tuple[str, ...]]:
    """The per-expert names of a fused tensor's blocks: one tuple per expert, in memory order."""
    match = _FUSED_NAME.fullmatch(name)
    assert match is not None, name
    projections = ("gate_proj", "up_proj") if match[2] == "gate_up" else ("down_proj",)
    return [
        tuple(f"{match[1]}.{expert}.{projection}.weight" for projection in projections)
        for expert in range(num_experts)
    ]


def split_fused(name: str, tensor: StoredTensor) -> dict[str, StoredTensor]:
    """The per-expert tensors inside a fused one of the right shape."""
    num_experts, num_rows, num_columns = tensor.shape
    blocks = {}
    offset = tensor.offset
    for names in expert_names(name, num_experts):
        shape = (num_rows // len(names), num_columns)
        for block_name in names:
            block = StoredTensor(tensor.file, offset, shape, tensor.dtype)
            blocks[block_name] = block
            offset = block.end
    return blocks

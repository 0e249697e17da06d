"""A small model of sizes that every kernel for Hopper takes, and a record of which of them ran.

`runner_world.MODEL` is so small that its steps run by other kernels.
"""

import random
from dataclasses import dataclass, field, replace

import torch

from moe_engine.layers import linear as linear_layers
from moe_engine.ops import decode_attention, hopper, moe, prefill_attention
from moe_engine.ops.linear import adds_in_place
from moe_engine.ops.tuning import INF
from tests.hopper_device import on_hopper
from tests.unit.runner_world import ALL_KINDS, RunnerWorld, mixed_requests

HOPPER_MODEL = {
    "hidden_size": 1024,
    "intermediate_size": 512,
    "moe_intermediate_size": 256,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "num_experts": 32,
    "num_experts_per_tok": 8,
    "max_position_embeddings": 2048,
}
# As many requests run at once as are made here. The kernels for few rows end at 4 and at 16.
HOPPER_LIMITS = {
    "max_num_seqs": 24,
    "max_num_batched_tokens": 2048,
    "block_size": 16,
    "num_blocks": 400,
}
# The first is computed whole; of the other, the step's budget leaves a rest that has a context
# before it.
LONG_PROMPTS = {0: 1100, 9: 1300}

# By rows, in place of the defaults, which leave Triton's out; each for one of the graphs at least.
EXPERT_KERNELS = ((2, "streaming"), (8, "grouped"), (20, "triton"), (INF, "grouped"))

# (module, function, which of its calls).
LAUNCHES = {
    "streaming linear": (hopper, "linear"),
    "split linear": (hopper, "split_linear"),
    "norm and router": (hopper, "norm_router"),
    "streaming experts": (hopper, "streaming_expert_ffn"),
    "grouped experts": (hopper, "grouped_expert_ffn"),
    "triton experts": (  # by choice: in other types, and on other GPUs, there are no others
        moe,
        "_triton_expert_ffn",
        lambda x_RH, *_: on_hopper() and x_RH.dtype == torch.bfloat16,
    ),
    "warp decode": (
        decode_attention,
        "decode_attention",
        lambda launch, *_: launch.block_warps == 0,
    ),
    "block decode": (
        decode_attention,
        "decode_attention",
        lambda launch, *_: launch.block_warps > 0,
    ),
    "prefill attention": (prefill_attention, "prefill_attention"),
    "norm and router of many rows": (moe, "_norm_router"),
    "output added in place": (linear_layers, "linear_onto", lambda x_TX, *_: adds_in_place(x_TX)),
}
PREFILL_KERNELS = {"prefill attention", "norm and router of many rows", "output added in place"}
DECODE_KERNELS = LAUNCHES.keys() - PREFILL_KERNELS


@dataclass
class KernelRecord:
    """Names of `LAUNCHES` that have run: into a graph, and by themselves."""

    captured: set = field(default_factory=set)
    launched: set = field(default_factory=set)

    def recorded(self, name, launch, conditions):
        def launch_and_record(*args, **kwargs):
            if all(is_met(*args) for is_met in conditions):
                is_captured = torch.cuda.is_current_stream_capturing()
                (self.captured if is_captured else self.launched).add(name)
            return launch(*args, **kwargs)

        return launch_and_record


def record_kernels(monkeypatch):
    """A record of what runs from now on; the start of a world runs everything once.

    The experts are those of `EXPERT_KERNELS`, whatever a table says.
    """
    choices = moe._choices
    monkeypatch.setattr(
        moe, "_choices", lambda *args: replace(choices(*args), kernels=EXPERT_KERNELS)
    )
    record = KernelRecord()
    for name, (module, function, *conditions) in LAUNCHES.items():
        launch = record.recorded(name, getattr(module, function), conditions)
        monkeypatch.setattr(module, function, launch)
    monkeypatch.setitem(moe.EXPERT_FFNS, "triton", moe._triton_expert_ffn)
    return record


def hopper_world(directory, *, model=None, with_decode_steps=False, mixed_sizes=None, **options):
    """A world with `HOPPER_MODEL`, but for changes, in bfloat16."""
    common = {"device": "cuda", "dtype": "bfloat16", "prefix_cache": False, **HOPPER_LIMITS}
    return RunnerWorld(
        directory,
        model=HOPPER_MODEL | (model or {}),
        with_decode_steps=with_decode_steps,
        mixed_sizes=mixed_sizes,
        **common | options,
    )


def requests_with_long_prompts(seed, *, kinds=ALL_KINDS, long_prompts=LONG_PROMPTS, **common):
    """As many requests as can run at once; when they end does not depend on their tokens."""
    choose = random.Random(seed)
    number = HOPPER_LIMITS["max_num_seqs"]
    requests = mixed_requests(choose, number, kinds=kinds, ignore_eos=True, **common)
    for index, length in long_prompts.items():
        requests[index] = ([choose.randrange(90) for _ in range(length)], requests[index][1])
    return requests

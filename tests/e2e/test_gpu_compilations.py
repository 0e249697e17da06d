"""Nothing is compiled while an engine serves: the start has met every variant of every kernel.

A kernel's variants stay compiled for the process, so each engine here has sizes that no other test
has: other constants, for which everything is compiled anew.
"""

import random
from dataclasses import dataclass, field

import pytest
import torch

from moe_engine.engine.mixed import MIXED_ROWS
from moe_engine.ops import native
from moe_engine.ops.linear import MANY_ROWS
from tests.unit.runner_world import ALL_KINDS, RunnerWorld, mixed_requests

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or not native.has_triton(),
    reason="needs an NVIDIA GPU and triton",
)

COMMON = {"hidden_size": 192, "num_attention_heads": 8, "head_dim": 32, "num_experts": 12}
# Steps of more rows than `ops.linear.MANY_ROWS`.
LIMITS = {"max_num_seqs": 40, "max_num_batched_tokens": 2048, "block_size": 8, "num_blocks": 1500}
KINDS = (
    *ALL_KINDS,
    {"temperature": 1.0},
    {"temperature": 0.7, "min_p": 0.1},
    {"temperature": 1.0, "top_k": 5, "presence_penalty": 0.5, "repetition_penalty": 1.1},
    {"temperature": 0.9, "top_p": 0.5, "logprobs": 3, "prompt_logprobs": 2},
)
PLAIN_KINDS = ({"temperature": 0.0}, {"temperature": 1.0})
FILLS_WEIGHTS = "_hash_fill_kernel"


@dataclass
class Compilations:
    """What Triton has compiled, or found in its cache on disk; each is a stall of a step."""

    launched: list[str] = field(default_factory=list)
    ahead: list[str] = field(default_factory=list)

    def add(self, *, fn, repr, is_manual_warmup, **others):
        described = f"{fn.name}: {repr}, {others['compile']['constants']}"
        (self.ahead if is_manual_warmup else self.launched).append(described)


@pytest.fixture
def compilations(monkeypatch):
    import triton

    compilations = Compilations()
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", compilations.add)
    return compilations


@pytest.mark.parametrize(
    ("cuda_graphs", "vocab_size", "model"),
    [
        (True, 9000, {"moe_intermediate_size": 64}),
        (False, 17001, {"moe_intermediate_size": 96, "num_key_value_heads": 4}),
        (True, 26000, {"num_hidden_layers": 4, "mlp_only_layers": [1], "num_key_value_heads": 8}),
        # Heads that prefill attention on Hopper takes, and a projection that is split there.
        (True, 34000, {"hidden_size": 1024, "head_dim": 128, "num_key_value_heads": 4}),
        (False, 42000, {"hidden_size": 1024, "head_dim": 128, "num_key_value_heads": 4}),
    ],
)
def test_serving_compiles_nothing(tmp_path, compilations, cuda_graphs, vocab_size, model):
    model = {"vocab_size": vocab_size} | model
    world = start_world(tmp_path, compilations, model, cuda_graphs=cuda_graphs)
    for size in (1, 2, 3, 8, 17, 33):
        for kind in KINDS:
            choose = random.Random(size)
            world.run(mixed_requests(choose, size, longest=40, kinds=[kind], max_tokens=5))
        # Prompts of odd lengths, which share steps with others' decodes.
        world.run(mixed_requests(random.Random(size), 2 * size, longest=70, kinds=KINDS))
    assert largest_step(world) > MANY_ROWS
    assert_nothing_late(compilations)


def test_steps_too_large_for_graphs_compile_nothing(tmp_path, compilations):
    """Launched by themselves are, with graphs, only steps of thousands of tokens."""
    model = {"vocab_size": 51000, "hidden_size": 1024, "head_dim": 128, "num_key_value_heads": 4}
    limits = {"max_num_batched_tokens": MIXED_ROWS[-1] + 2048, "num_blocks": 2000}
    limits["max_num_seqs"] = 150
    model["max_position_embeddings"] = 8192
    world = start_world(tmp_path, compilations, model, **limits)
    scored = {"temperature": 0.0, "prompt_logprobs": 2}
    for lengths in ([5000], [5500, 5500], [2500] * 4, [200] * 35 + [5500], [50] * 149, [700, 4000]):
        for kinds in (KINDS, PLAIN_KINDS, [scored], [scored, *PLAIN_KINDS]):
            requests = mixed_requests(random.Random(0), len(lengths), kinds=kinds, max_tokens=5)
            world.run(
                [([7] * size, params) for size, (_, params) in zip(lengths, requests, strict=True)]
            )
            assert largest_step(world) > MIXED_ROWS[-1]
    assert_nothing_late(compilations)


def start_world(directory, compilations, model, **options):
    """A world for which everything was compiled ahead."""
    options = {"dtype": "bfloat16", "device": "cuda", "prefix_cache": False} | LIMITS | options
    world = RunnerWorld(directory, model=COMMON | model, **options)
    assert compilations.ahead, "nothing was compiled ahead: the sizes are another test's"
    at_start = [what for what in compilations.launched if not what.startswith(FILLS_WEIGHTS)]
    assert not at_start, "compiled only when launched, one by one:\n" + "\n".join(at_start)
    return world


def largest_step(world):
    return max(sum(num_tokens for _, num_tokens in step) for step in world.steps)


def assert_nothing_late(compilations):
    late = [what for what in compilations.launched if not what.startswith(FILLS_WEIGHTS)]
    assert not late, "compiled while serving:\n" + "\n".join(late)

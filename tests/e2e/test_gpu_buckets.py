"""The same results at any graph bucket, on a GPU and in sizes that the Hopper kernels take.

The tokens are forced, so that every position can be compared, whatever was sampled before it.

What is promised: in float32 the same tokens in every bucket, from logits that differ in their last
bits only, unless two experts are all but equally likely and rounding swaps them. In bfloat16,
buckets differ by the order in which their matrix and attention kernels add up, so logits are as
close as bfloat16 allows; but within a bucket a sequence gets the same bits whoever is beside it,
padding or other sequences, and a graph gives the bits that single launches give.

On Hopper, what runs in bfloat16 are its CUDA kernels, which is recorded; in float32, and on other
GPUs, none of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from moe_engine.ops.tuning import pick
from tests.e2e.bf16_checkpoints import LARGE, save_checkpoint
from tests.e2e.hopper_world import DECODE_KERNELS, EXPERT_KERNELS, KernelRecord, record_kernels
from tests.e2e.teacher_forcing import Errors, ForcedEngine, random_sequences
from tests.hopper_device import on_hopper

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

VARIANT = LARGE[0]
NUM_STEPS = 12
MOST_ROWS, NUM_SEQUENCES = 256, 512
# Batches, and the buckets that they are padded to: all kernels for few rows, split linear layers up
# to 64 rows and the library's beyond, tiles of 64 pairs up to 160 rows and of 128 beyond.
BUCKETS = {1: 1, 2: 2, 3: 4, 9: 16, 33: 40, 60: 64, 100: 112, 129: 160, 200: 224, 256: 256}
# Of the logits' norm: at a typical position, where both sides are about 1e-2 from float32 and share
# the rounding of all that does not depend on the bucket, and over all positions, in a few of which
# rounding swaps experts.
MAX_MEDIAN, MAX_TOTAL = 1.2e-2, 3e-2
# Of the sequences, in float32: those in which an expert may be another at some position.
MAX_SWAPPED = 0.02
LENGTHS = [NUM_STEPS + 1 + 29 * i % 200 for i in range(NUM_SEQUENCES)]
SEQUENCES = random_sequences(LENGTHS, VARIANT.vocab_size, seed=3)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("buckets")
    save_checkpoint(directory, VARIANT, seed=0)
    return directory


@pytest.fixture(scope="module")
def kernels() -> Iterator[KernelRecord]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield record_kernels(monkeypatch)


def kernels_of(bucket: int) -> set[str]:
    """The kernels for Hopper of a decode step of so many rows in bfloat16, with two KV heads."""
    if not on_hopper():
        return set()
    names = {f"{pick(EXPERT_KERNELS, bucket)} experts"}
    if bucket <= 64:
        names |= {"norm and router", "streaming linear" if bucket <= 16 else "split linear"}
    if bucket <= 66:
        names.add("warp decode" if bucket <= 4 else "block decode")
    return names


def make_engine(checkpoint: Path, dtype: str, num_sequences: int) -> ForcedEngine:
    limits = {"max_rows": MOST_ROWS, "max_len": max(LENGTHS) + 1, "max_kept": num_sequences}
    engine = ForcedEngine(
        checkpoint, dtype=dtype, device="cuda", max_num_batched_tokens=MOST_ROWS, **limits
    )
    engine.keep(SEQUENCES[:num_sequences], NUM_STEPS)
    return engine


@pytest.fixture(scope="module")
def bfloat16(checkpoint: Path, kernels: KernelRecord) -> ForcedEngine:
    """Its graphs hold all kernels for Hopper, if the GPU is one."""
    kernels.captured.clear()
    engine = make_engine(checkpoint, "bfloat16", NUM_SEQUENCES)
    expected = DECODE_KERNELS | {"prefill attention"}
    assert kernels.captured == (expected if on_hopper() else set())
    return engine


def decode(engine: ForcedEngine, numbers: list[int], bucket: int) -> torch.Tensor:
    """Logits [S, NUM_STEPS, V] of the sequences with these numbers, decoded together."""
    before = len(engine.sizes_run)
    logits = engine.decode([SEQUENCES[i] for i in numbers], NUM_STEPS)
    assert engine.sizes_run[before:] == [bucket] * NUM_STEPS
    return torch.stack(logits)


def test_float32_gives_the_same_tokens_in_every_bucket(
    checkpoint: Path, kernels: KernelRecord
) -> None:
    kernels.captured.clear()
    engine = make_engine(checkpoint, "float32", MOST_ROWS)
    assert not kernels.captured
    together = decode(engine, list(range(MOST_ROWS)), MOST_ROWS)
    for size, bucket in BUCKETS.items():
        logits = decode(engine, list(range(size)), bucket)
        differences_S = (logits - together[:size]).abs().amax(dim=(1, 2))
        # Not "not above": NaN must fail.
        num_close = int((differences_S <= 1e-3).sum())
        assert size - num_close <= size * MAX_SWAPPED, f"batch of {size}: {differences_S}"
        assert torch.equal(logits.argmax(2), together[:size].argmax(2)), f"batch of {size}"


def test_bfloat16_logits_are_as_close_in_every_bucket(bfloat16: ForcedEngine) -> None:
    together = decode(bfloat16, list(range(MOST_ROWS)), MOST_ROWS)
    for size, bucket in BUCKETS.items():
        # One sequence is too few to judge by: several, each alone.
        groups = [[i] for i in range(9)] if size == 1 else [list(range(size))]
        logits = torch.cat([decode(bfloat16, group, bucket) for group in groups])
        errors = Errors.of(logits.flatten(0, 1), together[: len(logits)].flatten(0, 1))
        print(f"batch of {size}: {errors}")
        assert errors.median <= MAX_MEDIAN, f"batch of {size}: {errors}"
        assert errors.total <= MAX_TOTAL, f"batch of {size}: {errors}"
        assert errors.agreement >= 0.99 - 2 / errors.agrees_T.numel(), f"batch of {size}: {errors}"


@pytest.mark.parametrize("bucket", BUCKETS.values())
def test_a_sequence_gets_the_same_bits_whoever_is_beside_it(
    bfloat16: ForcedEngine, bucket: int
) -> None:
    full = decode(bfloat16, list(range(bucket)), bucket)
    fewest = 1 + max(size for size in [0, *bfloat16.buckets] if size < bucket)
    in_other_order = list(range(bucket))[::-1]
    with_padding = list(range(fewest))[::-1]
    among_others = [i if i % 2 else NUM_SEQUENCES - 1 - i for i in range(bucket)]
    for numbers in (in_other_order, with_padding, among_others):
        logits = decode(bfloat16, numbers, bucket)
        for found, number in zip(logits, numbers, strict=True):
            if number < bucket:
                assert torch.equal(found, full[number]), f"sequence {number} among {numbers}"


@pytest.mark.parametrize("size", BUCKETS)
def test_graphs_give_the_bits_that_single_launches_give(
    bfloat16: ForcedEngine, kernels: KernelRecord, size: int
) -> None:
    numbers = list(range(size))
    replayed = decode(bfloat16, numbers, BUCKETS[size])
    kernels.launched.clear()
    bfloat16.captured = False
    try:
        launched = decode(bfloat16, numbers, BUCKETS[size])
    finally:
        bfloat16.captured = True
    assert kernels.launched >= kernels_of(BUCKETS[size])
    assert torch.equal(replayed, launched)

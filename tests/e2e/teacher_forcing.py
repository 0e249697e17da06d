"""Logits of given token sequences, whatever the model would say itself: ours and transformers'.

Our runner is driven in this process with plans of its own, so that the logits of every position can
be had: of prompts, whole or in chunks, and of decode steps, which go through the CUDA graphs on a
GPU and through the same code without graphs on a CPU.

Shape legend: L tokens of a sequence, T positions of all sequences, V vocabulary.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe_engine import SamplingParams
from moe_engine.config.flat import build_config
from moe_engine.engine.batch import StepBatch
from moe_engine.engine.mixed import MixedSize
from moe_engine.types.step import GroupPlan, NewSequence, SequenceStep, StepPlan
from tests.unit.runner_world import decode_in_static_memory, make_runtime, mix_in_static_memory

BLOCK_SIZE = 16
MIXED_ROWS_ON_CPU = (64, 600)
Tokens = list[int]


def random_sequences(lengths: Sequence[int], vocab_size: int, seed: int) -> list[Tokens]:
    """Sequences of uniformly random tokens."""
    choose = random.Random(seed)
    return [[choose.randrange(vocab_size) for _ in range(length)] for length in lengths]


@torch.inference_mode()
def transformers_logits(
    directory: Path, dtype: torch.dtype, device: str, sequences: list[Tokens]
) -> list[torch.Tensor]:
    """transformers' logits [L, V] of each sequence, as float32 on ``device``.

    In float32 the experts run one by one; otherwise as transformers runs them by default.
    """
    from transformers import Qwen3MoeForCausalLM

    how = {"experts_implementation": "eager"} if dtype == torch.float32 else {}
    model = Qwen3MoeForCausalLM.from_pretrained(directory, dtype=dtype, **how).to(device).eval()
    return [model(torch.tensor([tokens], device=device)).logits[0].float() for tokens in sequences]


class ForcedEngine:
    """A rank that is the whole world, told which tokens to compute.

    Args:
        directory: the checkpoint.
        max_rows: the most sequences of a call.
        max_len: the longest sequence.
        max_kept: the most sequences given to `keep`.
        options: of the engine.

    Attributes:
        captured: whether decode steps replay CUDA graphs; where it is False, or on a CPU, they are
            launched one by one.
        buckets: the batch sizes of decode steps.
        sizes_run: the bucket of each decode step so far.
    """

    def __init__(
        self, directory: Path, *, max_rows: int, max_len: int, max_kept: int = 0, **options: Any
    ) -> None:
        blocks_each = -(-max_len // BLOCK_SIZE)
        num_blocks = (max_rows + max_kept) * blocks_each
        shuffled = random.Random(0).sample(range(num_blocks), num_blocks)
        self._blocks = shuffled[: max_rows * blocks_each]
        self._blocks_to_keep = shuffled[max_rows * blocks_each :]
        self._kept: dict[tuple[int, tuple[int, ...]], list[int]] = {}
        self._max_rows = max_rows
        values = {
            "model": str(directory),
            "max_num_seqs": max_rows,
            "max_model_len": max_len,
            "block_size": BLOCK_SIZE,
            "num_blocks": num_blocks,
        }
        config, _ = build_config(values | options)
        runtime = make_runtime(config)
        runtime.load(lambda *_: None)
        runtime.start(num_blocks)
        self._runner = runtime.runner
        self.captured = runtime.uses_graphs
        if not self.captured:
            decode_in_static_memory(self._runner)
        if runtime.device.type == "cpu":
            sizes = [MixedSize(num, min(num, max_rows)) for num in MIXED_ROWS_ON_CPU]
            mix_in_static_memory(self._runner, sizes)
        self.buckets: list[int] = self._runner._graphs.buckets
        self.sizes_run: list[int] = []
        self._num_steps = 0
        self._num_sequences = 0
        self._held: list[int] = []
        self._new_blocks: dict[int, list[int]] = {}
        # What the last step has left: hidden states of a mixed step, logits of a decode step.
        self._hidden_TH = self._logits_SV = torch.empty(0)
        self._runner._model.register_forward_pre_hook(self._ask_for_all_rows)
        self._runner._model.register_forward_hook(self._keep_hidden)
        self._replay = self._runner._graphs.replay
        self._runner._graphs.replay = self._run_bucket
        if self._runner._mixed_graphs is not None:
            self._run_mixed = self._runner._mixed_graphs.run
            self._runner._mixed_graphs.run = self._run_and_keep_hidden
        # The tokens are forced, so none need to be chosen.
        self._runner._graphs.choose = lambda size, choice: None

    @torch.inference_mode()
    def prefill(
        self, sequences: list[Tokens], chunk: int | None = None, *, is_launched: bool = False
    ) -> list[torch.Tensor]:
        """Logits [L, V] of all positions, computed ``chunk`` positions of each a step.

        Args:
            is_launched: kernel by kernel, whether there are graphs of so many positions or not.
        """
        mixed_graphs = self._runner._mixed_graphs
        if is_launched:
            self._runner._mixed_graphs = None
        try:
            return self._prefill(sequences, chunk or max(map(len, sequences)))
        finally:
            self._runner._mixed_graphs = mixed_graphs

    def _prefill(self, sequences: list[Tokens], chunk: int) -> list[torch.Tensor]:
        plan = self._admit(sequences)
        pieces: list[list[torch.Tensor]] = [[] for _ in sequences]
        for start in range(0, max(map(len, sequences)), chunk):
            counts = [max(0, min(chunk, len(tokens) - start)) for tokens in sequences]
            places = [(i, start, count) for i, count in enumerate(counts) if count]
            self._launch(plan, places, uniform=None)
            logits_TV = self._runner._model.logits(self._hidden_TH).float()
            first = 0
            # Sequences that compute one position come first.
            for i, _, count in sorted(places, key=lambda place: place[2] > 1):
                pieces[i].append(logits_TV[first : first + count])
                first += count
            plan = GroupPlan()
        return [torch.cat(rows) for rows in pieces]

    @torch.inference_mode()
    def keep(self, sequences: list[Tokens], num_steps: int) -> None:
        """Compute once, for every `decode` of them, what comes before their last positions.

        Decoding writes to these positions before it reads them, so it finds the blocks as they
        are now, whoever else has decoded in them.
        """
        for first in range(0, len(sequences), self._max_rows):
            some = sequences[first : first + self._max_rows]
            plan = self._admit(some)
            for i, tokens in enumerate(some):
                blocks = [self._blocks_to_keep.pop() for _ in self._new_blocks[self._held[i]]]
                self._new_blocks[self._held[i]] = blocks
                self._kept[num_steps, tuple(tokens)] = blocks
                self._launch(plan, [(i, 0, len(tokens) - num_steps)], uniform=None)
                plan = GroupPlan()

    @torch.inference_mode()
    def decode(self, sequences: list[Tokens], num_steps: int) -> list[torch.Tensor]:
        """Logits [num_steps, V] of each sequence's last positions, one position of each a step.

        What comes before them is computed by itself for each, so that it is the same in any batch.
        """
        plan = self._admit(sequences)
        starts = [len(tokens) - num_steps for tokens in sequences]
        for i, (tokens, start) in enumerate(zip(sequences, starts, strict=True)):
            kept = self._kept.get((num_steps, tuple(tokens)))
            # The first is computed in any case, in the step that admits them all.
            if i > 0 and kept is not None:
                self._new_blocks[self._held[i]] = kept
                continue
            self._launch(plan, [(i, 0, start)], uniform=None)
            plan = GroupPlan()
        table_NC = self._runner._table.tokens_NC
        forced_NC = table_NC.clone()
        steps = []
        for step in range(num_steps):
            places = [(i, start + step, 1) for i, start in enumerate(starts)]
            self._launch(GroupPlan(), places, uniform=0.5)
            # A copy: the next step writes to the same memory.
            steps.append(self._logits_SV[: len(sequences)].to(torch.float32, copy=True))
            table_NC.copy_(forced_NC)  # where the sampled tokens were written
        assert len(self.sizes_run) >= num_steps, "decode steps did not run as such"
        return list(torch.stack(steps, dim=1))

    def _ask_for_all_rows(self, _model: object, args: tuple[object, ...]) -> tuple[object, ...]:
        return args[:2]

    def _keep_hidden(self, _model: object, _args: object, x_TH: torch.Tensor) -> None:
        self._hidden_TH = x_TH

    def _run_and_keep_hidden(self, size: MixedSize, batch: StepBatch) -> torch.Tensor:
        x_TH = self._run_mixed(size, batch)
        self._hidden_TH = x_TH[: batch.paged.num_tokens]
        return x_TH

    def _run_bucket(self, size: int) -> torch.Tensor:
        self.sizes_run.append(size)
        if self.captured:
            self._logits_SV = self._replay(size)
        else:
            exchange = self._runner._exchange.select(size)
            self._logits_SV = self._runner._decode.compute(size, exchange)
        return self._logits_SV

    def _admit(self, sequences: list[Tokens]) -> GroupPlan:
        """A plan that lets go of the sequences before and admits these."""
        plan = GroupPlan(retired=self._held)
        self._held = [self._num_sequences + i for i in range(len(sequences))]
        self._num_sequences += len(sequences)
        params = SamplingParams(temperature=0.0)
        blocks = self._blocks.copy()
        for seq_id, tokens in zip(self._held, sequences, strict=True):
            plan.admitted.append(NewSequence(seq_id, tokens, len(tokens), params))
            self._new_blocks[seq_id] = [blocks.pop() for _ in range(-(-len(tokens) // BLOCK_SIZE))]
        return plan

    def _launch(
        self, plan: GroupPlan, places: list[tuple[int, int, int]], uniform: float | None
    ) -> None:
        """Compute (number of a sequence, start, number of positions) of each; wait for it."""
        for i, start, count in places:
            new_blocks = self._new_blocks.pop(self._held[i], [])
            plan.steps.append(SequenceStep(self._held[i], start, count, new_blocks, uniform))
        self._runner.launch(StepPlan(self._num_steps, [plan])).result()
        self._num_steps += 1


@dataclass(frozen=True)
class Errors:
    """How far logits are from a reference.

    Attributes:
        total: the norm of the difference over the norm of the reference.
        median: the same of a typical position.
        noise: standard deviation of ``total`` as a share of it, were the positions drawn again.
        agrees_T: whether the most likely token is the reference's.
    """

    total: float
    median: float
    noise: float
    agrees_T: torch.Tensor

    @classmethod
    def of(cls, logits_TV: torch.Tensor, reference_TV: torch.Tensor) -> Errors:
        assert logits_TV.shape == reference_TV.shape
        squares_T = (logits_TV - reference_TV).square().sum(1)
        sizes_T = reference_TV.square().sum(1)
        return cls(
            total=float((squares_T.sum() / sizes_T.sum()).sqrt()),
            median=float((squares_T / sizes_T).sqrt().median()),
            noise=float(squares_T.std() / squares_T.mean() / len(squares_T) ** 0.5 / 2),
            agrees_T=logits_TV.argmax(1) == reference_TV.argmax(1),
        )

    @property
    def agreement(self) -> float:
        """The share of positions with the reference's most likely token."""
        return float(self.agrees_T.float().mean())

    def __str__(self) -> str:
        return (
            f"error {self.total:.4f} +- {self.noise:.1%}, median {self.median:.4f}, "
            f"agreement {self.agreement:.4f}"
        )


def assert_as_good_as(
    ours: Errors, theirs: Errors, *, max_error: float, min_agreement: float
) -> None:
    """Our logits are near the reference, and no farther from it than others.

    A typical position's error may be 1.2 times theirs. The whole error depends on the few
    positions where rounding has swapped experts, in either model: it may be 1.2 times theirs and
    two standard deviations. Agreement is compared position by position (McNemar's test): were both
    equally good, the positions where only one agrees with the reference would be split evenly, and
    the two parts would differ by the root of their sum, of which 2.5 are allowed.
    """
    only_ours = int((ours.agrees_T & ~theirs.agrees_T).sum())
    only_theirs = int((theirs.agrees_T & ~ours.agrees_T).sum())
    found = (
        f"{len(ours.agrees_T)} positions: ours {ours}; theirs {theirs}; "
        f"{only_ours} only ours, {only_theirs} only theirs"
    )
    print(found)
    assert ours.total <= max_error, found
    assert ours.agreement >= min_agreement, found
    assert ours.median <= 1.2 * theirs.median, found
    margin = 1.2 + 2 * math.hypot(ours.noise, theirs.noise)
    assert ours.total <= margin * theirs.total, found
    assert only_theirs - only_ours <= 2.5 * (only_ours + only_theirs) ** 0.5, found

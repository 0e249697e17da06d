"""Hugging Face transformers' ``generate`` on the same checkpoint: the answers and the opponent."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from transformers import Qwen3MoeForCausalLM

from benchmarks.clock import time_call

PAD_TOKEN_ID = 0
EXPERTS_IMPLEMENTATIONS = ("eager", "grouped_mm")
EXPERTS_FOR_ONE_PROMPT = (*EXPERTS_IMPLEMENTATIONS, "batched_mm")
"""``batched_mm`` copies the weights of every token's experts: gigabytes for a batch of prompts."""
NUM_TRIAL_TOKENS = 4


class TransformersBaseline:
    """A model in float32; greedy decoding of many prompts in one batch, or one after the other."""

    def __init__(self, directory: Path) -> None:
        self._model = Qwen3MoeForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()

    def try_experts(self, prompts: list[list[int]]) -> dict[str, float]:
        """Seconds that each experts implementation takes for a few tokens of these prompts."""
        seconds = {}
        for experts in EXPERTS_FOR_ONE_PROMPT if len(prompts) == 1 else EXPERTS_IMPLEMENTATIONS:
            self.generate_padded(prompts, 2, experts)
            trial = partial(self.generate_padded, prompts, NUM_TRIAL_TOKENS, experts)
            seconds[experts] = time_call(trial)
        return seconds

    @torch.inference_mode()
    def generate_padded(
        self, prompts: list[list[int]], num_tokens: int, experts: str
    ) -> list[list[int]]:
        """``num_tokens`` greedy tokens per prompt; shorter prompts are padded on the left."""
        self._model.set_experts_implementation(experts)
        longest = max(map(len, prompts))
        padding = [longest - len(prompt) for prompt in prompts]
        rows = [[PAD_TOKEN_ID] * n + prompt for n, prompt in zip(padding, prompts, strict=True)]
        mask = [[0] * n + [1] * (longest - n) for n in padding]
        output = self._model.generate(
            torch.tensor(rows),
            attention_mask=torch.tensor(mask),
            max_new_tokens=num_tokens,
            do_sample=False,
            pad_token_id=PAD_TOKEN_ID,
        )
        generated: list[list[int]] = output[:, longest:].tolist()
        return generated

    def generate_one_by_one(
        self, prompts: list[list[int]], num_tokens: int, experts: str
    ) -> list[list[int]]:
        """The same, one prompt after the other: no padding, no batching."""
        return [self.generate_padded([prompt], num_tokens, experts)[0] for prompt in prompts]

"""A sampler written the slow way, row by row in numpy, and random sequences to try it on."""

import math
from dataclasses import dataclass, field

import numpy as np
import torch

from moe_engine.engine.sampler import Sampler, SampleRow
from moe_engine.types.sampling import SamplingParams
from moe_engine.types.step import NewSequence

CPU = torch.device("cpu")
ALMOST_ONE = math.nextafter(1.0, 0.0)
GREEDY = SamplingParams(temperature=0.0)
INF = math.inf


@dataclass
class Reference:
    """One sequence, sampled the slow way in float64."""

    params: SamplingParams
    prompt: list[int]
    outputs: list[int] = field(default_factory=list)
    stop_ids: list[int] = field(default_factory=list)

    def adjusted(self, logits: np.ndarray) -> np.ndarray:
        params, result = self.params, logits.astype(np.float64).copy()
        for token, bias in params.logit_bias.items():
            result[token] += bias
        if len(self.outputs) < params.min_tokens:
            result[self.stop_ids] = -INF
        for token in {*self.prompt, *self.outputs}:
            factor = params.repetition_penalty
            result[token] = result[token] * factor if result[token] < 0 else result[token] / factor
        for token in set(self.outputs):
            result[token] -= self.outputs.count(token) * params.frequency_penalty
            result[token] -= params.presence_penalty
        return result

    def probs(self, logits: np.ndarray) -> np.ndarray:
        params = self.params
        scaled = self.adjusted(logits) / params.temperature
        probs = _softmax(scaled)
        scaled[probs < params.min_p * probs.max()] = -INF
        if 0 < params.top_k < len(scaled):
            scaled[scaled < np.sort(scaled)[-params.top_k]] = -INF
        probs = _softmax(scaled)
        kept, total = [], 0.0
        for token in sorted(range(len(probs)), key=lambda i: (-probs[i], i)):
            if total < params.top_p:
                kept.append(token)
            total += probs[token]
        mask = np.zeros(len(probs), dtype=bool)
        mask[kept] = True
        return np.where(mask, probs, 0.0) / probs[mask].sum()

    def expected(self, logits: np.ndarray, rng: np.random.Generator) -> tuple[int, float]:
        """A token that can be sampled, and a uniform in the middle of its interval."""
        if self.params.temperature == 0:
            return int(self.adjusted(logits).argmax()), float(rng.random())
        probs = self.probs(logits)
        token = int(rng.choice(np.flatnonzero(probs > 1e-5)))
        return token, float(probs[:token].sum() + probs[token] / 2)


def _softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def random_params(rng: np.random.Generator, vocab_size: int) -> SamplingParams:
    def maybe(value, default):
        return value if rng.random() < 0.5 else default

    biased = rng.choice(vocab_size, size=min(3, vocab_size), replace=False).tolist()
    return SamplingParams(
        temperature=maybe(float(rng.uniform(0.2, 2)), 0.0 if rng.random() < 0.5 else 1.0),
        top_p=maybe(float(rng.uniform(0.05, 1)), 1.0),
        top_k=maybe(int(rng.integers(1, 2 * vocab_size + 1)), int(rng.integers(-1, 1))),
        min_p=maybe(float(rng.uniform(0, 0.5)), 0.0),
        presence_penalty=maybe(float(rng.uniform(-2, 2)), 0.0),
        frequency_penalty=maybe(float(rng.uniform(-2, 2)), 0.0),
        repetition_penalty=maybe(float(rng.uniform(0.5, 2)), 1.0),
        min_tokens=maybe(int(rng.integers(1, 5)), 0),
        logit_bias=maybe(
            dict(zip(biased, rng.uniform(-5, 5, len(biased)).tolist(), strict=True)), {}
        ),
    )


def random_sequences(rng, num: int, vocab_size: int) -> list[Reference]:
    return [
        Reference(
            random_params(rng, vocab_size),
            rng.integers(vocab_size, size=rng.integers(1, 10)).tolist(),
            rng.integers(vocab_size, size=rng.integers(0, 5)).tolist(),
            # With one token in the vocabulary nothing would be left to sample.
            rng.integers(1, vocab_size, size=2).tolist() if vocab_size > 1 else [],
        )
        for _ in range(num)
    ]


def admit(sampler: Sampler, seq_id: int, reference: Reference) -> None:
    token_ids = reference.prompt + reference.outputs
    sampler.admit(
        NewSequence(
            seq_id, token_ids, len(reference.prompt), reference.params, list(reference.stop_ids)
        )
    )


def sampler_of(vocab_size: int, *references: Reference) -> Sampler:
    sampler = Sampler(vocab_size, CPU)
    for seq_id, reference in enumerate(references):
        admit(sampler, seq_id, reference)
    return sampler


def rows_of(references: list[Reference], uniforms: list[float]) -> list[SampleRow]:
    return [
        SampleRow(seq_id, uniform, len(reference.outputs))
        for seq_id, (reference, uniform) in enumerate(zip(references, uniforms, strict=True))
    ]


def sample_one(params, logits, *, prompt=(0,), uniform=0.5, outputs=(), stop_ids=()) -> int:
    reference = Reference(params, list(prompt), list(outputs), list(stop_ids))
    logits = torch.as_tensor(logits)
    sampler = sampler_of(len(logits), reference)
    return int(sampler.sample(logits.unsqueeze(0), rows_of([reference], [uniform])))

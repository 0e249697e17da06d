"""A scheduler and a runner of one rank in this process, without a core, a hub or a front end."""

import json
from collections import deque

from moe_engine.config import EngineConfig
from moe_engine.config.flat import build_config
from moe_engine.dist.groups import single_rank_groups
from moe_engine.dist.layout import RankLayout
from moe_engine.engine.decode import Choice, DecodeStep
from moe_engine.engine.graphs import graph_buckets, pick_bucket
from moe_engine.engine.mixed import MixedStep, make_mixed_step
from moe_engine.engine.rank_main import _make_scheduler
from moe_engine.engine.runtime import LocalPlace, RankRuntime
from moe_engine.types.messages import AddRequest
from moe_engine.types.sampling import SamplingParams

MODEL = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
    "eos_token_id": 96,
}
LIMITS = {"max_num_seqs": 9, "max_num_batched_tokens": 32, "block_size": 4, "num_blocks": 200}


class UncapturedGraphs:
    """Runs decode steps as graphs would, padding included, but launches them one by one."""

    def __init__(self, decode, exchange):
        self.buckets = graph_buckets(decode.max_rows)
        self.sizes_run = []
        self.chosen = []
        self._decode = decode
        self._exchange = exchange

    def pick(self, num_rows):
        return pick_bucket(num_rows, self.buckets)

    def replay(self, size):
        self.sizes_run.append(size)
        self._logits = self._decode.compute(size, self._exchange.select(size))
        return self._logits

    @property
    def sizes_drawn(self):
        return [size for size, choice in self.chosen if choice is not Choice.MOST_LIKELY]

    def choose(self, size, choice):
        self.chosen.append((size, choice))
        self._decode.choose(size, self._logits, choice)


class UncapturedMixedGraphs:
    """The same of steps of any kind."""

    def __init__(self, mixed, exchange):
        self.mixed = mixed
        self.sizes_run = []
        self._exchange = exchange

    def pick(self, num_tokens, num_decodes):
        return self.mixed.pick(num_tokens, num_decodes)

    def run(self, size, batch):
        self.sizes_run.append(size)
        self.mixed.load(batch)
        return self.mixed.compute(size, self._exchange.select(size.num_rows))


class RunnerWorld:
    """Runs requests to their ends.

    Args:
        directory: where to put the model's config; the weights are random.
        with_decode_steps: run decode steps in static memory and padded, as graphs do on a GPU, but
            launch their kernels one by one.
        mixed_sizes: the same of steps of any kind of these sizes; ``[]``: those to capture.
        model: changes to `MODEL`.
        options: of the engine, besides `LIMITS`.

    Attributes:
        steps: what each step of the last run computed, (start, number of positions) by sequence.
    """

    def __init__(
        self, directory, *, with_decode_steps=False, mixed_sizes=None, model=None, **options
    ):
        (directory / "config.json").write_text(json.dumps(MODEL | (model or {})))
        values = {"model": str(directory), "load_format": "dummy", "device": "cpu"}
        config, _ = build_config(values | LIMITS | options)
        self.runtime = make_runtime(config)
        self.num_blocks = self.runtime.load(lambda *_: None)
        self.runtime.start(self.num_blocks)
        self.runner = self.runtime.runner
        if with_decode_steps:
            decode_in_static_memory(self.runner)
        if mixed_sizes is not None:
            mix_in_static_memory(self.runner, mixed_sizes)
        self.scheduler = _make_scheduler(self.runtime, self.num_blocks)
        self.steps = []

    def run(self, requests):
        """Outputs of (prompt, parameters) pairs: token ids, logprobs, prompt logprobs."""
        for number, (prompt, params) in enumerate(requests):
            self.scheduler.add(AddRequest(str(number), prompt, params))
        outputs = [([], [], []) for _ in requests]
        self.steps = []
        in_flight = deque()
        while self.scheduler.has_unfinished or in_flight:
            while (plan := self.scheduler.schedule()) is not None:
                self.steps.append([(step.start, step.num_tokens) for step in plan.groups[0].steps])
                in_flight.append(self.runner.launch(plan))
            result = in_flight.popleft().result()
            for update in self.scheduler.complete([result]):
                output = outputs[int(update.request_id)]
                output[0].extend(update.token_ids)
                output[1].extend(update.logprobs)
                output[2].extend(update.prompt_logprobs)
        return outputs


def decode_in_static_memory(runner):
    """Let a runner without graphs decode as it would with them."""
    runner._decode = DecodeStep(
        runner._model, runner._kv, runner._table, runner._groups, runner._max_num_seqs
    )
    runner._graphs = UncapturedGraphs(runner._decode, runner._exchange)


def mix_in_static_memory(runner, sizes):
    """Let a runner without graphs compute prompts as it would with them.

    Args:
        sizes: empty: those to capture.
    """
    parts = runner._model, runner._kv, runner._table
    if sizes:
        mixed = MixedStep(*parts, sizes)
    else:
        mixed = make_mixed_step(*parts, runner._max_num_tokens, runner._exchange)
    runner._mixed_graphs = UncapturedMixedGraphs(mixed, runner._exchange)


def make_runtime(config: EngineConfig) -> RankRuntime:
    """A rank that is the whole world."""
    runtime = RankRuntime(config, RankLayout(0, 1, 1), LocalPlace(0, 1))
    runtime.groups = single_rank_groups()
    return runtime


GREEDY_KINDS = ({"temperature": 0.0}, {"temperature": 0.0, "logprobs": 2, "prompt_logprobs": 1})
DRAWN_KINDS = (
    {"temperature": 0.8, "top_p": 0.9, "top_k": 20},
    {"temperature": 1.0, "logprobs": 0},
)
ADJUSTED_KINDS = (
    {"temperature": 0.0, "repetition_penalty": 1.3, "frequency_penalty": 0.5},
    {"temperature": 0.0, "logit_bias": {5: 3.0}, "min_tokens": 3},
)
# By what a batch of them needs, whichever of them it has.
KINDS_OF_CHOICES = {
    Choice.MOST_LIKELY: GREEDY_KINDS,
    Choice.DRAW: ({"temperature": 1.0}, {"temperature": 0.5, "logprobs": 1}),
    Choice.FILTER_AND_DRAW: (
        {"temperature": 0.8, "top_k": 20},
        {"temperature": 1.2, "top_p": 0.9},
        {"temperature": 1.0, "min_p": 0.05},
    ),
}
ALL_KINDS = (*GREEDY_KINDS, *DRAWN_KINDS, *ADJUSTED_KINDS)


def mixed_requests(choose, number, *, longest=30, kinds=ALL_KINDS, **common):
    """Requests of several kinds of sampling."""
    requests = []
    for index in range(number):
        prompt = [choose.randrange(90) for _ in range(choose.randint(1, longest))]
        params = {"max_tokens": choose.randint(3, 20), "seed": index, **kinds[index % len(kinds)]}
        requests.append((prompt, SamplingParams(**(params | common))))
    return requests

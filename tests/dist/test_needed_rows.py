"""Ranks whose last layers need different rows, or none, take part in the same collectives."""

import json
import random
import tempfile
from pathlib import Path

import pytest
import torch

from moe_engine.cache.kv import KVCache
from moe_engine.checkpoint.dummy import fill_dummy
from moe_engine.config import ExchangeConfig
from moe_engine.config.hf import load_model_config
from moe_engine.dist.exchange import ExchangeSelector
from moe_engine.engine.batch import build_batch
from moe_engine.engine.table import SequenceTable
from moe_engine.layers.attention import local_kv_heads
from moe_engine.layers.context import ForwardContext, LayerContext
from moe_engine.models.qwen3_moe import Qwen3MoeForCausalLM
from moe_engine.ops.paged_batch import NeededRows
from moe_engine.types.sampling import SamplingParams
from moe_engine.types.step import NewSequence, SequenceStep
from tests.dist.ranks import run_on_ranks
from tests.unit.runner_world import MODEL

CPU = torch.device("cpu")


class CountingExchange:
    """A backend that counts the rows it is brought."""

    def __init__(self, exchange):
        self._exchange = exchange
        self.shards_tokens = exchange.shards_tokens
        self.combine = exchange.combine
        self.brought = []

    def dispatch(self, x_TH, expert_ids_TK, weights_TK):
        self.brought.append(len(x_TH))
        return self._exchange.dispatch(x_TH, expert_ids_TK, weights_TK)


def make_model(groups):
    """The same on every rank, with weights so large that every layer counts."""
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(MODEL))
        config = load_model_config(Path(directory))
    model = Qwen3MoeForCausalLM(LayerContext(config, groups, torch.float32, CPU))
    fill_dummy(model.weight_specs(), seed=1, std=0.3)
    return model, config


def one_prompt(num_tokens, seed):
    """A step that computes a prompt of random tokens in block 0, or nothing."""
    table = SequenceTable(1, 64, 64, CPU)
    if num_tokens == 0:
        return build_batch(table, [], [], [])
    choose = random.Random(seed)
    token_ids = [choose.randrange(MODEL["vocab_size"]) for _ in range(num_tokens)]
    table.admit([NewSequence(0, token_ids, num_tokens, SamplingParams())])
    steps = [SequenceStep(0, 0, num_tokens, [0])]
    return build_batch(table, steps, table.advance(steps), [0])


def check_needed_rows(groups, backend, num_tokens_by_group, needed_by_group):
    """Compare with a step in which all rows are needed; count what the last layer exchanges."""
    layout = groups.layout
    model, config = make_model(groups)
    num_tokens, needed = num_tokens_by_group[layout.dp_rank], needed_by_group[layout.dp_rank]
    heads = local_kv_heads(config, layout.attention_tp, layout.tp_rank)
    kv = KVCache(2, 1, 64, len(heads), config.head_dim, torch.float32, CPU)
    batch = one_prompt(num_tokens, layout.dp_rank)
    selector = ExchangeSelector(ExchangeConfig(exchange=backend), groups, config.num_experts)
    exchange = CountingExchange(selector.select(max(num_tokens_by_group)))
    step = ForwardContext(batch.positions_T, batch.paged, kv, exchange)
    expected_TH = model(batch.token_ids_T, step)
    exchange.brought.clear()
    rows_R = torch.tensor(needed, dtype=torch.int64)
    found_RH = model(batch.token_ids_T, step, NeededRows(rows_R, as_decodes=None))
    torch.testing.assert_close(found_RH, expected_TH[needed], rtol=1e-4, atol=1e-4)
    brought = torch.tensor(exchange.brought)
    if exchange.shards_tokens:
        groups.tp.all_reduce(brought)
    assert brought.tolist() == [num_tokens, len(needed)]


def pure_tp_cases(groups):
    for backend in ("collective", "replicated"):
        for needed in ([], [8], [8, 0, 3], list(range(9))):
            check_needed_rows(groups, backend, [9], [needed])


def mixed_cases(groups):
    for tokens, needed in (
        ([9, 5], [[8], []]),
        ([9, 5], [[], []]),
        ([9, 5], [[2, 8], [0, 1, 4]]),
        ([9, 0], [[8], []]),
        ([9, 0], [[], []]),
    ):
        check_needed_rows(groups, "auto", tokens, needed)


@pytest.mark.parametrize(("cases", "tp", "dp"), [(pure_tp_cases, 2, 1), (mixed_cases, 2, 2)])
def test_needed_rows_are_those_of_a_step_with_all_rows(cases, tp, dp):
    run_on_ranks(cases, tp, dp)

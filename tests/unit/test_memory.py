"""The memory ledger: weights are counted to the byte, and what does not fit is refused."""

import pytest
import torch

from moe_engine.cache.kv import KVCache, kv_bytes_per_block
from moe_engine.config import (
    CacheConfig,
    EngineConfig,
    ModelConfig,
    ParallelConfig,
    SchedulerConfig,
)
from moe_engine.config.engine import GIB
from moe_engine.dist.communicator import Communicator
from moe_engine.dist.groups import ParallelGroups, single_rank_groups
from moe_engine.dist.layout import RankLayout
from moe_engine.engine.memory import (
    CPU_KV_CACHE_BYTES,
    KVBudget,
    check_weights_fit,
    choose_num_blocks,
    kv_budget,
    size,
    weight_bytes,
)
from moe_engine.engine.summary import memory_lines
from moe_engine.errors import ConfigError
from moe_engine.layers.attention import local_kv_heads
from moe_engine.layers.context import LayerContext
from moe_engine.models.qwen3_moe import Qwen3MoeForCausalLM
from moe_engine.types.messages import MemoryLedger

MIB = 1 << 20
SHAPE = {
    "model_type": "qwen3_moe",
    "vocab_size": 41,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "moe_intermediate_size": 10,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
}
BF16 = torch.bfloat16


def model_config(**changes: object) -> ModelConfig:
    return ModelConfig.from_dict(SHAPE | changes)


def groups_of(rank: int, tp: int, dp: int) -> ParallelGroups:
    """Groups of a rank whose peers do not exist: enough to size the weights."""
    if tp * dp == 1:
        return single_rank_groups()
    layout, nobody = RankLayout(rank, tp, dp), torch.distributed.ProcessGroup(rank, tp * dp)
    return ParallelGroups(
        layout,
        Communicator(tp, layout.tp_rank, nobody),
        Communicator(layout.world_size, rank, nobody),
    )


def parameter_bytes(model: ModelConfig, rank: int, tp: int, dp: int, dtype: torch.dtype) -> int:
    context = LayerContext(model, groups_of(rank, tp, dp), dtype, torch.device("meta"))
    return sum(parameter.nbytes for parameter in Qwen3MoeForCausalLM(context).parameters())


# Weights.


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention_bias": True},
        {"tie_word_embeddings": True},
        {"mlp_only_layers": [1]},
        {"mlp_only_layers": [0, 1, 2]},
        {"decoder_sparse_step": 2, "attention_bias": True, "tie_word_embeddings": True},
        {"num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 8},
    ],
    ids=str,
)
@pytest.mark.parametrize(("tp", "dp"), [(1, 1), (2, 1), (4, 1), (1, 4), (2, 2), (4, 2)])
def test_weight_bytes_are_those_of_the_models_parameters(changes, tp, dp):
    model = model_config(**changes)
    config = EngineConfig(parallel=ParallelConfig(tp, dp))
    for dtype in (torch.float32, BF16):
        needed = weight_bytes(model, config, dtype)
        for rank in range(tp * dp):
            assert parameter_bytes(model, rank, tp, dp, dtype) == needed


def test_weights_that_just_fit_are_accepted():
    check_weights_fit(needed=3 * GIB, free=12 * GIB, world_on_node=4)


def test_weights_that_do_not_fit_are_refused_with_the_arithmetic():
    with pytest.raises(ConfigError) as caught:
        check_weights_fit(needed=3 * GIB, free=12 * GIB - 1, world_on_node=4)
    message = str(caught.value)
    assert "4 ranks x 3.00 GiB = 12.00 GiB, but 12.00 GiB are free" in message


# The KV cache's budget.


def config_of(
    tp: int = 1, max_model_len: int | None = None, max_num_seqs: int = 4, **cache: object
) -> EngineConfig:
    return EngineConfig(
        parallel=ParallelConfig(tp),
        cache=CacheConfig(**cache),
        scheduler=SchedulerConfig(max_model_len=max_model_len, max_num_seqs=max_num_seqs),
    )


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_block_bytes_are_those_of_the_cache_tensors(tp):
    model = model_config()
    budget = kv_budget(model, config_of(tp, block_size=5), BF16, free=GIB, total=0)
    heads = len(local_kv_heads(model, tp, 0))
    cache = KVCache(3, 7, 5, heads, model.head_dim, BF16, torch.device("cpu"))
    allocated = sum(part.nbytes for layer in range(3) for part in cache.layer(layer))
    assert budget.block_bytes * 7 == allocated
    assert budget.block_bytes == kv_bytes_per_block(3, 5, heads, 6, BF16)
    assert cache.layer(2)[0].shape == (7, 5, heads, 6)


@pytest.mark.parametrize("total", [0, 10 * GIB])
def test_kv_cache_memory_is_the_budget_wherever_it_is_set(total):
    config = config_of(kv_cache_memory=5 * MIB, memory_utilization=0.5)
    budget = kv_budget(model_config(), config, BF16, free=5 * MIB, total=total)
    assert (budget.available, budget.source) == (5 * MIB, "kv_cache_memory")


def test_more_kv_cache_memory_than_free_is_refused():
    config = config_of(kv_cache_memory=5 * MIB)
    with pytest.raises(ConfigError) as caught:
        kv_budget(model_config(), config, BF16, free=4 * MIB, total=0)
    assert str(caught.value) == (
        "the KV cache may take 5.00 MiB (kv_cache_memory), but 4.00 MiB are free"
    )


def test_a_gpu_keeps_back_the_share_that_may_not_be_used():
    config = config_of(memory_utilization=0.75)
    budget = kv_budget(model_config(), config, BF16, free=50 * GIB, total=80 * GIB)
    assert budget.available == 30 * GIB
    assert budget.source == (
        "50.00 GiB free less 25% of 80.00 GiB and 0.00 KiB for activations and graphs"
    )


def test_activations_and_graphs_are_kept_back_from_the_kv_cache():
    config = config_of(memory_utilization=0.75)
    budget = kv_budget(model_config(), config, BF16, free=50 * GIB, total=80 * GIB, working=3 * GIB)
    assert budget.available == 27 * GIB
    assert budget.source.endswith("and 3.00 GiB for activations and graphs")


def test_kv_cache_memory_may_not_take_what_steps_need():
    config = config_of(kv_cache_memory=4 * GIB)
    model = model_config()
    assert kv_budget(model, config, BF16, 10 * GIB, 80 * GIB, 6 * GIB).available == 4 * GIB
    with pytest.raises(ConfigError) as caught:
        kv_budget(model, config, BF16, 10 * GIB, 80 * GIB, 7 * GIB)
    assert str(caught.value) == (
        "the KV cache may take 4.00 GiB (kv_cache_memory), but 10.00 GiB are free "
        "and steps need 7.00 GiB"
    )


def test_a_gpu_that_others_have_filled_leaves_less_than_nothing():
    budget = kv_budget(model_config(), config_of(), BF16, free=4 * GIB, total=80 * GIB)
    assert budget.available < 0
    with pytest.raises(ConfigError, match=r"= 0 blocks of 16 tokens"):
        choose_num_blocks(budget, config_of(), max_model_len=64)


@pytest.mark.parametrize(
    ("free", "available"), [(100 * GIB, CPU_KV_CACHE_BYTES), (GIB, GIB // 2), (0, 0)]
)
def test_a_cpu_takes_its_default_but_at_most_half_of_what_is_free(free, available):
    budget = kv_budget(model_config(), config_of(), BF16, free=free, total=0)
    assert (budget.available, budget.source) == (available, "the default of a CPU rank")


def test_ledger_of_a_gpu_names_every_part():
    ledger = MemoryLedger(
        total=80 * GIB,
        at_start=GIB,
        weights=60 * GIB,
        activations=2 * GIB,
        graphs_reserved=GIB,
        graphs=GIB // 2,
        kv_cache=8 * GIB,
        free=9 * GIB,
    )
    assert memory_lines(ledger) == [
        "memory    per rank: weights 60.00 GiB, KV cache 8.00 GiB",
        "          CUDA graphs 512.00 MiB (1.00 GiB reserved), free 9.00 GiB, of which steps take "
        "up to 2.00 GiB",
        "          of 80.00 GiB, 1.00 GiB of it taken before",
    ]


def test_ledger_of_a_cpu_has_what_was_computed():
    ledger = MemoryLedger(weights=3 * MIB, kv_cache=2 * MIB, free=GIB)
    assert memory_lines(ledger) == ["memory    per rank: weights 3.00 MiB, KV cache 2.00 MiB"]


# Number of blocks.


def budget_of(num_blocks: int) -> KVBudget:
    """Room for ``num_blocks`` blocks of 1000 bytes, and 999 bytes too few for another."""
    return KVBudget(block_bytes=1000, available=1000 * num_blocks + 999, source="a test")


def test_num_blocks_is_taken_if_it_fits():
    config = config_of(num_blocks=10)
    assert choose_num_blocks(budget_of(10), config, max_model_len=64) == 10
    with pytest.raises(ConfigError) as caught:
        choose_num_blocks(budget_of(9), config, max_model_len=64)
    assert str(caught.value) == (
        f"too little memory for num_blocks = 10: {size(9999)} (a test) / 1000 bytes a block "
        "= 9 blocks of 16 tokens"
    )


@pytest.mark.parametrize(
    ("fit", "max_model_len", "expected"),
    [
        (1000, 64, 16),  # 4 sequences of 4 blocks can use no more
        (1000, 65, 20),  # a token more takes a fifth block
        (15, 64, 15),
        (1, 64, 1),
    ],
)
def test_all_blocks_that_fit_are_taken_but_no_more_than_can_be_used(fit, max_model_len, expected):
    assert choose_num_blocks(budget_of(fit), config_of(), max_model_len) == expected


def test_a_configured_max_model_len_must_fit_once():
    config = config_of(max_model_len=64)
    assert choose_num_blocks(budget_of(4), config, max_model_len=64) == 4
    with pytest.raises(ConfigError) as caught:
        choose_num_blocks(budget_of(3), config, max_model_len=64)
    message = str(caught.value)
    assert "one sequence of 64 tokens takes 4 blocks" in message
    assert "= 3 blocks of 16 tokens; lower max_model_len or raise kv_cache_memory" in message


def test_no_block_at_all_is_refused_whatever_the_length():
    with pytest.raises(ConfigError, match="= 0 blocks"):
        choose_num_blocks(budget_of(0), config_of(), max_model_len=64)


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (20 * MIB, "20.00 MiB"),
        (GIB - MIB, "1023.00 MiB"),
        (3 * GIB // 2, "1.50 GiB"),
        (-2 * GIB, "-2.00 GiB"),
    ],
)
def test_sizes_are_shown_in_the_unit_that_fits(num_bytes, text):
    assert size(num_bytes) == text

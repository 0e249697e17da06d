"""The sweep over all kernels on several ranks: each takes part in the same collectives."""

import json
import tempfile
from pathlib import Path

import pytest
import torch

from moe_engine.config.flat import build_config
from moe_engine.engine.runtime import LocalPlace, RankRuntime
from moe_engine.engine.sweep import StepSweep
from tests.dist.ranks import run_on_ranks
from tests.unit.runner_world import LIMITS, MODEL


def sweep(groups):
    layout = groups.layout
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(MODEL))
        values = {"model": directory, "load_format": "dummy", "device": "cpu"}
        parallel = {"attention_tp": layout.attention_tp, "attention_dp": layout.attention_dp}
        config, _ = build_config(values | LIMITS | parallel | {"replicated_max_tokens": 8})
        runtime = RankRuntime(config, layout, LocalPlace(layout.rank, layout.world_size))
        runtime.groups = groups
        runtime.load(lambda *_: None)
    run_sweep = StepSweep(
        config,
        runtime.model_config,
        runtime._model,
        runtime._kv_cache(1),
        groups,
        runtime.exchange,
        runtime.max_model_len,
        runtime.device,
        with_graphs=True,
    )
    with torch.inference_mode():
        run_sweep()


@pytest.mark.parametrize(("tp", "dp"), [(2, 1), (1, 2)])
def test_ranks_sweep_together(tp, dp):
    run_on_ranks(sweep, tp, dp)

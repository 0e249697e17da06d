"""The tuner on a GPU, with a small model that every kernel for Hopper takes."""

import json
import math
import sys

import pytest
import torch

from benchmarks import tune
from moe_engine.ops import hopper, tuning
from tests.e2e.hopper_world import HOPPER_MODEL
from tests.unit.runner_world import MODEL

pytestmark = pytest.mark.usefixtures("needs_hopper")


def test_every_operator_is_measured_with_each_of_its_kernels(monkeypatch, tmp_path):
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "config.json").write_text(json.dumps(MODEL | HOPPER_MODEL))
    path = tmp_path / "table.json"
    command = f"tune --model {tmp_path}/small --set dtype=bfloat16 --set device=cuda"
    command += f" --batches 1,2,16,64 --inputs 48,700 --write {path}"
    monkeypatch.setattr(sys, "argv", command.split())
    tiles_run = set()
    grouped_expert_ffn = hopper.grouped_expert_ffn

    def record_tile(*arguments):
        tiles_run.add(arguments[-1])
        return grouped_expert_ffn(*arguments)

    monkeypatch.setattr(hopper, "grouped_expert_ffn", record_tile)
    before = dict(tuning.table(torch.device("cuda", 0)))
    tune.main()

    assert tiles_run >= {16, 32, 64, 128}, "what was forced ran"
    document = tuning.read_document(path)
    assert document["device"] == torch.cuda.get_device_name()
    assert document["runs"]["small"]["torch"] == torch.__version__
    table = tuning.parse_document(document, path)
    assert len(table) == 5
    after = tuning.table(torch.device("cuda", 0))
    for (kind, shape), choices in after.items():
        assert choices == before.get((kind, shape), kind.default(*shape)), (
            "it is not forced any more"
        )

    tried = {}
    for section in tuning.SECTIONS:
        for entry in document.get(section, []):
            for step in entry["measured"]["steps"]:
                kernels = tried.setdefault((section, step["batch"], step["input"]), set())
                kernels.update(step["step_ms"])
                assert step["present"] in step["step_ms"]
                assert all(0.01 < ms < math.inf for ms in step["step_ms"].values())
    assert tried["experts", 1, 48] == {"streaming", "triton", "tile 16", "tile 32", "tile 64"}
    assert tried["linear", 16, 48] == {"streaming", "split", "library"}
    assert tried["linear", 64, 48] == {"split", "library"}
    assert tried["norm_router", 64, 48] == {"fused", "separate"}
    launches = {"0:4:2048", "0:8:2048", "12:8:80", "6:8:80"}
    for num_input in (48, 700):
        assert tried["decode_attention", 2, num_input] == {*launches, "paged"}
    assert ("experts", 1, 700) not in tried, "long prompts are for attention"

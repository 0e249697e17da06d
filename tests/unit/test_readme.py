"""The README says what was measured, and what it points to exists."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.plot import renewed_readme
from benchmarks.readme_table import (
    SECTION,
    markers,
    render_results,
    replace_section,
    speed_ratio,
)
from moe_engine.config.flat import flat_options

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BEGIN, END = markers(SECTION)


@pytest.fixture
def result() -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / "engine_cpu.json").read_text())


def test_results_in_the_readme_are_those_of_the_json() -> None:
    assert renewed_readme(README) == README, "run python -m benchmarks.plot"


def test_a_changed_measurement_changes_the_readme(result: Any) -> None:
    changed = copy.deepcopy(result)
    changed["batches"][1]["output_tokens_per_s"]["moe_engine_tp1_dp1"] *= 2
    assert replace_section(README, SECTION, render_results(changed)) != README


def test_the_ratio_compares_the_best_of_both() -> None:
    rates = {
        "moe_engine_tp1_dp1": 6.0,
        "moe_engine_tp2_dp1": 8.0,
        "transformers_padded": 3.0,
        "transformers_one_by_one": 4.0,
    }
    assert speed_ratio({"output_tokens_per_s": rates}) == 2.0


@pytest.mark.parametrize("readme", ["", BEGIN, f"{END}{BEGIN}", f"{BEGIN}{END}{BEGIN}{END}"])
def test_a_readme_without_its_two_markers_is_refused(readme: str) -> None:
    with pytest.raises(ValueError, match="once each"):
        replace_section(readme, SECTION, "")


def test_all_outputs_were_equal_before_anything_was_timed(result: Any) -> None:
    check = result["check"]
    assert check["num_prompts"] > 0
    assert set(check["num_equal"].values()) == {check["num_prompts"]}


def test_every_link_of_the_readme_leads_to_a_file() -> None:
    targets = re.findall(r"\]\(([^)#]+)|src(?:set)?=\"([^\"]+)\"", README)
    files = [link or image for link, image in targets if "://" not in (link or image)]
    assert files
    assert [name for name in files if not (ROOT / name).exists()] == []


def test_every_flag_in_the_readme_exists() -> None:
    own = {"--config", "--help", *("--" + name.replace("_", "-") for name in flat_options())}
    torchrun = {"--nnodes", "--nproc-per-node", "--node-rank", "--master-addr", "--master-port"}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", re.sub(r"<!--.*?-->", "", README)))
    benchmarks = {
        *("--write", "--json", "--batches", "--streams", "--input", "--output", "--temperature"),
        *("--repetitions", "--date", "--virtual", "--ranks", "--tokens", "--hidden"),
    }
    switches = {"--no-prefix-cache", "--no-cuda-graphs"}
    sanitizer = {"--tool", "--error-exitcode"}
    assert named - own - torchrun - benchmarks - switches - sanitizer == set()

"""What ``import moe_engine`` costs and offers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import moe_engine

# Makes importing these packages fail, as if they were not installed.
BLOCK = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Block())
"""


def run_python(code: str, blocked: set[str]) -> str:
    """Standard output of ``code`` in a fresh interpreter that lacks the packages ``blocked``."""
    done = subprocess.run(
        [sys.executable, "-c", BLOCK.format(blocked=blocked) + code],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_needs_neither_torch_nor_gpu_packages() -> None:
    code = "import moe_engine; moe_engine.SamplingParams(); moe_engine.ConfigError"
    run_python(code, {"torch", "transformers", "triton", "cupy", "numpy"})


def test_import_alone_loads_no_heavy_package() -> None:
    code = "import moe_engine; print(*({'torch', 'transformers', 'triton'} & set(sys.modules)))"
    assert run_python(code, set()).strip() == ""


def test_ops_work_without_triton_and_without_the_cuda_extension() -> None:
    code = """
sys.modules["moe_engine._C"] = None
import torch
from moe_engine.ops.expert_counts import expert_token_counts
from moe_engine.ops.norm import rms_norm
print(expert_token_counts(torch.tensor([[0, 2], [2, -1]]), 4).tolist())
print(rms_norm(torch.ones(3), torch.ones(3), 0.0).tolist())
"""
    assert run_python(code, {"triton", "cupy"}) == "[1, 0, 2, 0]\n[1.0, 1.0, 1.0]\n"


def test_ops_work_where_a_clone_hides_the_installed_package() -> None:
    code = """
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name: None if name == "moe_engine.kernels" else real(name)
from moe_engine.ops import native
print(native.has_triton())
"""
    pytest.importorskip("triton")
    assert run_python(code, set()) == "False\n"


def test_lazy_names_are_listed_and_resolve_to_their_definition() -> None:
    from moe_engine.errors import ConfigError
    from moe_engine.types.sampling import SamplingParams

    assert moe_engine.ConfigError is ConfigError
    assert moe_engine.SamplingParams is SamplingParams
    assert set(moe_engine.__all__) <= set(dir(moe_engine))
    folder = Path(moe_engine.__file__).parent
    assert set(moe_engine._DEFINED_IN) == set(moe_engine.__all__) - {"__version__"}
    assert folder.joinpath("py.typed").exists()


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'MoeEngine'"):
        moe_engine.MoeEngine  # noqa: B018

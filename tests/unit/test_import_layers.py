"""Imports point only downwards, and a few modules may not know certain others.

Read with `ast`, so that imports inside functions count and nothing has to be importable.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# From the bottom to the top; modules of one line may import one another.
LAYERS = [
    ["errors"],
    ["types"],
    ["config"],
    ["env", "garbage", "log"],
    ["kernels", "_C"],
    ["ops"],
    ["dist"],
    ["checkpoint"],
    ["cache"],
    ["balance"],
    ["layers"],
    ["models"],
    ["demo"],
    ["text"],
    ["engine"],
    ["plan"],
    ["server"],
    ["serve"],
]
HEIGHT = {name: height for height, names in enumerate(LAYERS) for name in names}

# Pure Python: exhaustively tested without tensors.
WITHOUT_TORCH = ["cache/block_pool*.py", "engine/scheduler*.py", "engine/sequence*.py"]
READS_ENVIRONMENT = "env.py"


@dataclass(frozen=True)
class Import:
    """One imported module, with the line and whether importing the file is enough to import it."""

    module: str
    line: int
    at_import_time: bool


def find_imports(tree: ast.AST, package: str) -> list[Import]:
    """Every import of a file in ``package``; ``from a import b`` counts as ``a.b``."""
    found: list[Import] = []

    def visit(node: ast.AST, at_import_time: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(name.name, node.lineno, at_import_time) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = ".".join(parents[: len(parents) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, [base, node.module]))
            found.extend(
                Import(f"{module}.{name.name}", node.lineno, at_import_time) for name in node.names
            )
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, at_import_time and not inside)

    visit(tree, True)
    return found


def reads_environment(tree: ast.AST) -> list[int]:
    """Lines that mention ``os.environ``, ``os.getenv`` and the like."""
    names = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}
    return [
        node.lineno
        for node in ast.walk(tree)
        if (isinstance(node, ast.Attribute) and node.attr in names)
        or (isinstance(node, ast.ImportFrom) and names & {alias.name for alias in node.names})
    ]


def violations(path: str, source: str) -> list[str]:
    """What breaks the rules in a file, given its path from the root of the repository."""
    tree = ast.parse(source)
    inside = path.removeprefix("moe_engine/")
    package = ".".join(["moe_engine", *Path(inside).parent.parts])
    layer = inside.split("/")[0].removesuffix(".py")
    problems: list[str] = []

    def problem(line: int, text: str) -> None:
        problems.append(f"{path}:{line}: {text}")

    is_facade = path == "moe_engine/__init__.py"
    if not is_facade and layer not in HEIGHT:
        problem(1, f"{layer} has no place in LAYERS")
        return problems
    for found in find_imports(tree, package):
        names = found.module.split(".")
        if names[0] == "moe_engine" and not is_facade:
            target = names[1] if len(names) > 1 else "__init__"
            if layer == "kernels" and target != "kernels":
                problem(found.line, f"kernels import nothing of ours, but {found.module}")
            elif target == "__version__":
                pass
            elif target not in HEIGHT:
                problem(found.line, f"import {found.module} from the module that defines it")
            elif HEIGHT[target] > HEIGHT[layer]:
                problem(found.line, f"{layer} lies below {target}, but imports {found.module}")
        if names[1:3] == ["ops", "reference"] and layer != "ops":
            problem(found.line, "ask ops, which picks CUDA, Triton or the reference")
        if names[0] == "torch" and any(fnmatch(inside, pattern) for pattern in WITHOUT_TORCH):
            problem(found.line, "this module works without torch")
        if names[0] == "transformers" and found.at_import_time and layer != "text":
            problem(found.line, "only text/ may import transformers at import time")
    if inside != READS_ENVIRONMENT:
        for line in reads_environment(tree):
            problem(line, "only env.py knows the environment")
    return problems


def source_files() -> list[Path]:
    return sorted([*ROOT.glob("moe_engine/**/*.py"), *ROOT.glob("kernels/**/*.py")])


def test_no_file_breaks_the_rules() -> None:
    files = source_files()
    assert len(files) > 10
    problems = [
        problem
        for path in files
        for problem in violations(path.relative_to(ROOT).as_posix(), path.read_text())
    ]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    ("path", "source", "expected"),
    [
        ("moe_engine/types/a.py", "import moe_engine.engine.core", "types lies below engine"),
        ("moe_engine/ops/a.py", "from moe_engine import engine", "ops lies below engine"),
        ("moe_engine/ops/a.py", "from ..server import app", "ops lies below server"),
        ("moe_engine/layers/a.py", "from moe_engine.ops.reference import moe", "ask ops"),
        (
            "moe_engine/cache/a.py",
            "def f():\n    from moe_engine.layers import x",
            "cache lies below layers",
        ),
        ("moe_engine/env.py", "import moe_engine._C", "env lies below _C"),
        ("moe_engine/server/a.py", "from moe_engine import MoEEngine", "module that defines it"),
        ("moe_engine/server/a.py", "import moe_engine", "module that defines it"),
        ("moe_engine/novel/a.py", "", "no place in LAYERS"),
        ("kernels/a.py", "from moe_engine.errors import ConfigError", "kernels import nothing"),
        ("kernels/a.py", "from .. import errors", "kernels import nothing"),
        ("moe_engine/log.py", "import os\nos.environ['A']", "only env.py"),
        ("moe_engine/log.py", "import os as o\no.getenv('A')", "only env.py"),
        ("moe_engine/log.py", "from os import getenv", "only env.py"),
        ("moe_engine/cache/block_pool.py", "import torch.nn", "without torch"),
        ("moe_engine/engine/scheduler_queue.py", "from torch import Tensor", "without torch"),
        ("moe_engine/engine/sequence.py", "def f():\n    import torch", "without torch"),
        ("moe_engine/engine/core.py", "import transformers", "only text/"),
        ("moe_engine/engine/core.py", "if True:\n    import transformers", "only text/"),
    ],
)
def test_a_violation_is_found(path: str, source: str, expected: str) -> None:
    problems = violations(path, source)
    assert len(problems) == 1
    assert expected in problems[0]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("moe_engine/engine/core.py", "from moe_engine.errors import ConfigError"),
        ("moe_engine/log.py", "import moe_engine.env"),
        ("moe_engine/ops/a.py", "from .reference import norm"),
        ("moe_engine/server/a.py", "from moe_engine import __version__"),
        ("moe_engine/env.py", "import os\nos.environ['A']"),
        ("moe_engine/engine/core.py", "def f():\n    import transformers"),
        ("moe_engine/text/a.py", "import transformers"),
        ("moe_engine/cache/kv.py", "import torch"),
        ("kernels/a.py", "from moe_engine.kernels import b\nimport triton"),
    ],
)
def test_what_is_allowed_is_not_reported(path: str, source: str) -> None:
    assert violations(path, source) == []

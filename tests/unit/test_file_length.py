"""A file has one job, so it stays short."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ["moe_engine", "kernels", "csrc", "tests", "benchmarks"]
SUFFIXES = {".py", ".pyi", ".cu", ".cuh", ".cpp", ".h"}
MAX_LINES = 420


def test_no_source_file_is_too_long() -> None:
    files = [
        path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES
    ]
    assert len(files) > 20
    too_long = {
        path.relative_to(ROOT).as_posix(): num_lines
        for path in files
        if (num_lines := len(path.read_text().splitlines())) > MAX_LINES
    }
    assert not too_long, f"more than {MAX_LINES} lines; give each job a file of its own: {too_long}"

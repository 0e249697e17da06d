"""Results are saved wherever they are to go, with the date and the commit they are of."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from benchmarks import report


def git(root: Path, *arguments: str) -> str:
    who = ("-c", "user.name=Test", "-c", "user.email=test@localhost")
    done = subprocess.run(
        ["git", *who, *arguments], cwd=root, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A working tree of one commit."""
    tree = tmp_path / "tree"
    (tree / "benchmarks" / "results").mkdir(parents=True)
    (tree / "code.py").write_text("1\n")
    (tree / "benchmarks" / "results" / "saved.json").write_text("{}\n")
    git(tree, "init", "--quiet")
    git(tree, "add", ".")
    git(tree, "commit", "--quiet", "--message", "one")
    return tree


def test_a_result_has_its_date_and_commit_and_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "today", lambda: "2026-01-02")
    monkeypatch.setattr(report, "commit", lambda: "abc+changes")
    path = tmp_path / "a" / "b" / "result.json"
    report.save_result(path, {"model": "/somewhere/name", "steps": [1]}, leave_out="/somewhere/")
    saved = json.loads(path.read_text())
    assert list(saved.items()) == [
        ("date", "2026-01-02"),
        ("commit", "abc+changes"),
        ("model", "name"),
        ("steps", [1]),
    ]
    report.save_result(path, {"steps": [1]}, indent=None)
    assert path.read_text().count("\n") == 1


def test_the_commit_says_whether_files_differ_from_it(tree: Path) -> None:
    head = git(tree, "rev-parse", "HEAD")
    assert len(head) >= 40
    assert report.commit(tree) == head
    (tree / "benchmarks" / "results" / "saved.json").write_text("[]\n")
    (tree / "unknown.txt").write_text("unknown to git\n")
    assert report.commit(tree) == head, "a result saved before is no change"
    (tree / "code.py").write_text("2\n")
    assert report.commit(tree) == f"{head}+changes"


def test_without_a_working_tree_there_is_no_commit(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert report.commit(tree / "benchmarks") is None, "it is the repository's around it"
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert report.commit(tmp_path) is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert report.commit(tree) is None

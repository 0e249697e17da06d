"""The one log format."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator

import pytest

from moe_engine.log import get_logger, setup_logging


@pytest.fixture(autouse=True)
def _restore_logging() -> Iterator[None]:
    logger = logging.getLogger("moe_engine")
    before = (logger.handlers[:], logger.level, logger.propagate)
    yield
    logger.handlers[:], logger.propagate = before[0], before[2]
    logger.setLevel(before[1])


def test_a_line_has_time_severity_rank_and_logger(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging("info", rank=3)
    get_logger("moe_engine.engine.core").warning("step %d is late", 7)
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} WARNING \[rank 3\] moe_engine\.engine\.core: "
        r"step 7 is late\n",
        capsys.readouterr().err,
    )


def test_a_second_setup_replaces_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging("debug", rank=0)
    setup_logging("error")
    get_logger("moe_engine.x").warning("below the level")
    get_logger("moe_engine.x").error("once")
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "rank" not in err


def test_setup_keeps_handlers_of_the_embedding_program() -> None:
    theirs = logging.NullHandler()
    logging.getLogger("moe_engine").addHandler(theirs)
    setup_logging()
    assert theirs in logging.getLogger("moe_engine").handlers

"""Logging: one line format with time, severity and rank, set up once by whoever owns the process.

Importing moe_engine configures nothing, so that a program that embeds it keeps its own logging.
"""

from __future__ import annotations

import logging
import sys

ROOT = "moe_engine"
_HANDLER = "moe_engine"


def get_logger(name: str) -> logging.Logger:
    """The logger of a module; pass ``__name__``."""
    return logging.getLogger(name)


def setup_logging(level: str = "info", rank: int | None = None) -> None:
    """Send moe_engine's messages to standard error; a second call replaces the first.

    Args:
        level: debug, info, warning or error.
        rank: global rank written on every line; None for a process that is no rank.
    """
    who = "" if rank is None else f" [rank {rank}]"
    handler = logging.StreamHandler(sys.stderr)
    handler.name = _HANDLER
    handler.setFormatter(
        logging.Formatter(
            f"%(asctime)s.%(msecs)03d %(levelname)-7s{who} %(name)s: %(message)s",
            datefmt="%Y-%m-%d %H:%M:%S",
        )
    )
    logger = logging.getLogger(ROOT)
    for old in [handler for handler in logger.handlers if handler.name == _HANDLER]:
        logger.removeHandler(old)
    logger.addHandler(handler)
    logger.setLevel(level.upper())
    logger.propagate = False

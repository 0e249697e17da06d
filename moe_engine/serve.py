"""``python -m moe_engine.serve``: the command line of the HTTP server.

Every option of the engine's and the server's configuration is a flag. Values come from the
defaults, then ``--config``'s YAML file, then the flags. Exit status: 0 after SIGINT or SIGTERM, 1
when the port is taken or the engine died, 2 for a configuration or checkpoint that cannot work.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_engine.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from moe_engine.config import EngineConfig, ServerConfig
    from moe_engine.config.flat import FlatOption

EXIT_FAILURE = 1
EXIT_USAGE = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until told to stop; returns the process's exit status."""
    from moe_engine.env import read_environment
    from moe_engine.log import setup_logging

    try:
        environment = read_environment()
        engine_config, server_config = parse_arguments(arguments)
        setup_logging(
            environment.log_level or server_config.log_level,
            rank=environment.rank if environment.launched else None,
        )
        if environment.rank > 0:  # torchrun starts every rank with this command line
            from moe_engine.engine.rank_main import run_torchrun_rank

            run_torchrun_rank(engine_config, environment)
            return 0
        return _serve(engine_config, server_config)
    except (ConfigError, CheckpointError) as error:
        return _fail(EXIT_USAGE, str(error))


def _serve(engine_config: EngineConfig, server_config: ServerConfig) -> int:
    """Take the port before anything is loaded, then run the server."""
    # Imported here: the other ranks and --help need neither torch nor a web framework.
    from moe_engine.engine.async_llm import AsyncMoEEngine
    from moe_engine.server.launch import bind, run_server

    try:
        listener = bind(server_config.host, server_config.port)
    except OSError as error:
        return _fail(
            EXIT_FAILURE,
            f"cannot listen on {server_config.host}:{server_config.port}: "
            f"{error.strerror or error}; choose another --host or --port",
        )
    with listener:
        failure = asyncio.run(
            run_server(lambda: AsyncMoEEngine.from_config(engine_config), server_config, listener)
        )
    if failure is None:
        return 0
    if isinstance(failure, ConfigError | CheckpointError):
        return _fail(EXIT_USAGE, str(failure))
    return _fail(EXIT_FAILURE, str(failure))


def parse_arguments(arguments: Sequence[str] | None) -> tuple[EngineConfig, ServerConfig]:
    """The configuration that a command line asks for.

    Raises:
        ConfigError: an unknown flag or key of the YAML file, or values that do not work together.
        SystemExit: as argparse does, after ``--help``, or for a flag that lacks its value.
    """
    from moe_engine.config.flat import build_config, flat_options
    from moe_engine.config.yaml import load_yaml

    known, unknown = make_parser().parse_known_args(arguments)
    for flag in unknown:
        if flag.startswith("-"):
            raise ConfigError(f"unknown flag {flag}{_nearest_flags(flag)}")
    if unknown:
        raise ConfigError(f"unexpected argument {unknown[0]!r}; --help lists what there is")
    flags = vars(known)
    config_file = flags.pop("config", None)
    positional_model = flags.pop("model_directory", None)
    if positional_model is not None and flags.setdefault("model", positional_model) != (
        positional_model
    ):
        raise ConfigError(
            f"the model is given twice: {positional_model} and --model {flags['model']}"
        )
    values = load_yaml(config_file) if config_file is not None else {}
    for name, value in flags.items():
        values[name] = flat_options()[name].parse(value) if isinstance(value, str) else value
    engine_config, server_config = build_config(values)
    if server_config.served_model_name is None:
        name = _default_model_name(engine_config.model)
        server_config = dataclasses.replace(server_config, served_model_name=name)
    return engine_config, server_config


def _default_model_name(model: str | None) -> str:
    """A checkpoint directory's name, or the repository id itself."""
    from moe_engine.config.engine import DEMO_MODEL_NAME

    if model is None:
        return DEMO_MODEL_NAME
    return Path(model).resolve().name if Path(model).is_dir() else model


def _nearest_flags(flag: str) -> str:
    """``"; did you mean ...?"`` with known flags, or where to find them."""
    from moe_engine.config.flat import flat_options, suggest

    known = [f"--{name.replace('_', '-')}" for name in flat_options()]
    return suggest(flag.split("=")[0], known) or "; --help lists all flags"


def make_parser() -> argparse.ArgumentParser:
    """A parser with one flag per option, grouped by section; flags left out leave no value."""
    from moe_engine.config.flat import flat_options

    parser = argparse.ArgumentParser(
        prog="python -m moe_engine.serve",
        description="Serve a Qwen3-MoE model over an OpenAI-compatible HTTP API.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("model_directory", nargs="?", metavar="MODEL", help="same as --model")
    parser.add_argument("--config", metavar="YAML", help="file with options; flags override it")
    groups: dict[str, Any] = {}
    for option in flat_options().values():
        section = option.section or "engine"
        if section not in groups:
            groups[section] = parser.add_argument_group(section)
        _add_flag(groups[section], option)
    return parser


def _add_flag(group: Any, option: FlatOption) -> None:
    """Values stay text here: `FlatOption.parse` knows more types than argparse and says more."""
    flag = "--" + option.name.replace("_", "-")
    default = "none" if option.default is None else option.default
    help_text = f"{option.help} (default: {default})".replace("%", "%%")
    if option.type is bool:
        action = argparse.BooleanOptionalAction
        group.add_argument(flag, dest=option.name, action=action, help=help_text)
    else:
        kind = "BYTES" if option.is_bytes else option.type.__name__.upper()
        metavar = "|".join(option.choices) if option.choices else kind
        group.add_argument(flag, dest=option.name, metavar=metavar, help=help_text)


def _fail(status: int, message: str) -> int:
    print(f"moe_engine: error: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())

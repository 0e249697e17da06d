"""Every option of `EngineConfig` and `ServerConfig` as one flat list, and back.

YAML files, command-line flags and keyword arguments all go through here, so that a name, its
type and its help exist once: in the dataclasses.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import cache
from types import NoneType
from typing import Any, get_args, get_type_hints

from moe_engine.config.engine import EngineConfig, ServerConfig
from moe_engine.errors import ConfigError

SERVER_SECTION = "server"

_BYTE_SIZE = re.compile(r"(\d+)\s*(KiB|MiB|GiB)?")
_BYTE_UNITS = {None: 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
_TYPE_NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}


@dataclass(frozen=True, slots=True)
class FlatOption:
    """One option.

    Attributes:
        name: unique over all sections; the keyword argument, and the flag after ``--``.
        section: the YAML section, "" for the top level.
        type: bool, int, float or str.
        optional: whether None (YAML's ``null``) is a value.
        choices: the strings allowed, or None.
        is_bytes: an int that may also be written like ``4GiB``.
    """

    name: str
    section: str
    type: type
    optional: bool
    default: Any
    help: str
    choices: tuple[str, ...] | None
    is_bytes: bool

    @property
    def path(self) -> str:
        """The name with its section, as in ``cache.block_size``."""
        return f"{self.section}.{self.name}" if self.section else self.name

    def check(self, value: Any) -> Any:
        """Return ``value`` as the option's type.

        Raises:
            ConfigError: it is of another type; a number written as a string is one.
        """
        if value is None and self.optional:
            return None
        if self.is_bytes and isinstance(value, str) and _BYTE_SIZE.fullmatch(value.strip()):
            return _parse_bytes(value)
        if self.type is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        is_wrong_bool = isinstance(value, bool) and self.type is not bool
        if not isinstance(value, self.type) or is_wrong_bool:
            expected = _TYPE_NAMES[self.type]
            if self.is_bytes:
                expected = "bytes as an integer or like 64KiB, 512MiB, 4GiB"
            if self.optional:
                expected += ", or null"
            raise ConfigError(f"{self.path} is {value!r}; it must be {expected}")
        if self.choices is not None and value not in self.choices:
            raise ConfigError(
                f"{self.path} is {value!r}; it must be one of {', '.join(self.choices)}"
            )
        return value

    def parse(self, text: str) -> Any:
        """Return the value that ``text`` from a command line stands for; ``null`` is None.

        Raises:
            ConfigError: the text is no value of the option.
        """
        value: Any = text
        if self.optional and text in ("null", "none", "None"):
            value = None
        elif self.type is bool:
            value = {"true": True, "false": False}.get(text.lower(), text)
        elif self.type in (int, float) and not (self.is_bytes and _BYTE_SIZE.fullmatch(text)):
            try:
                value = self.type(text)
            except ValueError:
                value = text
        return self.check(value)


@cache
def flat_options() -> dict[str, FlatOption]:
    """Name -> option, in the order of the dataclasses."""
    options: dict[str, FlatOption] = {}
    for section, config in config_sections().items():
        hints = get_type_hints(config)
        for info in fields(config):
            if is_dataclass(hints[info.name]):
                continue
            assert info.name not in options, f"two options are called {info.name}"
            options[info.name] = _flat_option(section, info, hints[info.name])
    return options


@cache
def config_sections() -> dict[str, Any]:
    """YAML section -> the dataclass of its options; "" is `EngineConfig` itself."""
    hints = get_type_hints(EngineConfig)
    sections: dict[str, Any] = {"": EngineConfig}
    sections.update((name, hint) for name, hint in hints.items() if is_dataclass(hint))
    sections[SERVER_SECTION] = ServerConfig
    return sections


def build_config(values: dict[str, Any]) -> tuple[EngineConfig, ServerConfig]:
    """Build the configuration from flat values; options left out keep their defaults.

    Raises:
        ConfigError: an unknown name, a value of a wrong type or out of range, or options that
            contradict each other.
    """
    options = flat_options()
    by_section: dict[str, dict[str, Any]] = {section: {} for section in config_sections()}
    for name, value in values.items():
        if name not in options:
            raise ConfigError(f"unknown option {name!r}{suggest(name, options)}")
        option = options[name]
        by_section[option.section][name] = option.check(value)
    server = ServerConfig(**by_section.pop(SERVER_SECTION))
    engine_values = by_section.pop("")
    for section, section_values in by_section.items():
        engine_values[section] = config_sections()[section](**section_values)
    return EngineConfig(**engine_values), server


def suggest(name: str, known: Iterable[str]) -> str:
    """``"; did you mean ...?"`` with the known names nearest to ``name``, or nothing."""
    matches = difflib.get_close_matches(name, list(known), n=3)
    return f"; did you mean {' or '.join(matches)}?" if matches else ""


def _flat_option(section: str, info: Field[Any], hint: Any) -> FlatOption:
    members = get_args(hint) or (hint,)
    types = [member for member in members if member is not NoneType]
    assert len(types) == 1, f"{info.name}: {hint}"
    assert types[0] in _TYPE_NAMES, f"{info.name}: {hint}"
    assert info.default is not MISSING, info.name
    return FlatOption(
        name=info.name,
        section=section,
        type=types[0],
        optional=NoneType in members,
        default=info.default,
        help=info.metadata["help"],
        choices=info.metadata["choices"],
        is_bytes=info.metadata["is_bytes"],
    )


def _parse_bytes(text: str) -> int:
    match = _BYTE_SIZE.fullmatch(text.strip())
    assert match is not None
    return int(match[1]) * _BYTE_UNITS[match[2]]

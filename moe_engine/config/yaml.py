"""Reads a YAML configuration file into flat option values, refusing whatever it does not know."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from moe_engine.config.flat import FlatOption, config_sections, flat_options, suggest
from moe_engine.errors import ConfigError


def load_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file whose sections mirror `EngineConfig` and `ServerConfig`.

    The result holds only what the file sets, so precedence is a merge of dictionaries:
    ``{**load_yaml(path), **flags}`` for `build_config`.

    Raises:
        ConfigError: the file is missing, unreadable, not a mapping, or has an unknown or
            duplicate key or a value of a wrong type; names the file and the key.
    """
    path = Path(path)
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(document, dict):
        raise ConfigError(f"{path} must hold a mapping of options, not {document!r:.80}")
    try:
        return _flatten(document)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _flatten(document: dict[Any, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in document.items():
        if key not in config_sections() or key == "":
            if isinstance(value, dict) and key not in flat_options():
                sections = [name for name in config_sections() if name]
                raise ConfigError(
                    f"unknown section {key!r}{suggest(str(key), sections)}; the sections are "
                    f"{', '.join(sections)}, and the engine's options stand outside of them"
                )
            option = _lookup("", key)
            values[option.name] = option.check(value)
            continue
        # a section whose every line is commented out reads as None
        section = {} if value is None else value
        if not isinstance(section, dict):
            raise ConfigError(f"section {key!r} must be a mapping of options, not {value!r:.80}")
        for name, inner_value in section.items():
            option = _lookup(key, name)
            values[option.name] = option.check(inner_value)
    return values


def _lookup(section: str, key: Any) -> FlatOption:
    """The option called ``key`` in ``section``."""
    options = flat_options()
    option = options.get(key) if isinstance(key, str) else None
    if option is not None and option.section == section:
        return option
    path = f"{section}.{key}" if section else str(key)
    if option is not None:
        raise ConfigError(f"unknown key {path!r}; did you mean {option.path}?")
    sections = [name for name in config_sections() if name and not section]
    names = [name for name in options if options[name].section == section]
    raise ConfigError(f"unknown key {path!r}{suggest(str(key), names + sections)}")


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML's safe loader, which would otherwise let the last of two equal keys win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                continue
            key = key_node.value  # the text of a scalar, unique even before YAML types it
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"found duplicate key {key!r}", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)

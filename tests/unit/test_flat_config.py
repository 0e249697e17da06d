"""The flat list of options, building the configuration from it, and YAML files."""

from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from moe_engine.config import EngineConfig, ServerConfig
from moe_engine.config.flat import build_config, flat_options
from moe_engine.config.yaml import load_yaml
from moe_engine.errors import ConfigError

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


def write(tmp_path, text):
    path = tmp_path / "engine.yaml"
    path.write_text(text)
    return path


def leaves(config):
    for info in fields(config):
        value = getattr(config, info.name)
        if is_dataclass(value):
            yield from leaves(value)
        else:
            yield info.name, value


def test_every_field_is_an_option_with_its_default_and_help():
    options = flat_options()
    defaults = dict(leaves(EngineConfig())) | dict(leaves(ServerConfig()))
    assert {name: option.default for name, option in options.items()} == defaults
    assert all(option.help for option in options.values())


def test_no_values_build_the_defaults():
    assert build_config({}) == (EngineConfig(), ServerConfig())


def test_every_option_reaches_its_field():
    samples = {bool: False, int: 3, float: 0.5, str: "x"}
    for option in flat_options().values():
        values = {option.name: option.choices[-1] if option.choices else samples[option.type]}
        if option.name == "pipeline_depth":
            values["pipeline_depth"] = 2
        if option.name == "max_num_batched_tokens":
            values["max_num_seqs"] = 3
        if option.name == "dummy_expert_skew":
            values["load_format"] = "dummy"
        built = [dict(leaves(config)) for config in build_config(values)]
        assert (built[0] | built[1])[option.name] == values[option.name]


@pytest.mark.parametrize(
    ("name", "near"), [("block_sise", "block_size"), ("max-num-seqs", "max_num_seqs")]
)
def test_an_unknown_option_is_refused_with_near_matches(name, near):
    with pytest.raises(ConfigError, match=f"{name}.*did you mean.*{near}"):
        build_config({name: 1})


def test_an_unknown_option_like_no_other_is_refused():
    with pytest.raises(ConfigError, match=r"unknown option 'qqqqqq'$"):
        build_config({"qqqqqq": 1})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("block_size", "16"),
        ("block_size", 16.0),
        ("block_size", True),
        ("block_size", None),
        ("block_size", "16KiB"),
        ("prefix_cache", 1),
        ("prefix_cache", "true"),
        ("memory_utilization", "0.9"),
        ("memory_utilization", False),
        ("model", 7),
        ("host", None),
        ("host", ["a"]),
        ("kv_cache_memory", "4GB"),
        ("kv_cache_memory", "lots"),
        ("kv_cache_memory", 1.5),
        ("port", {"a": 1}),
        ("device", "tpu"),
    ],
)
def test_a_wrong_value_is_refused_naming_key_and_value(name, value):
    with pytest.raises(ConfigError) as caught:
        build_config({name: value})
    assert name in str(caught.value)
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [("64KiB", 64 << 10), ("512MiB", 512 << 20), ("4 GiB", 4 << 30), ("7", 7), (9, 9)],
)
def test_byte_sizes_take_units(value, expected):
    engine, server = build_config({"kv_cache_memory": value, "max_body_bytes": value})
    assert engine.cache.kv_cache_memory == expected
    assert server.max_body_bytes == expected


def test_an_integer_is_a_float_where_one_is_wanted():
    engine, _ = build_config({"startup_timeout": 30})
    assert isinstance(engine.startup_timeout, float)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("block_size", "32", 32),
        ("num_blocks", "null", None),
        ("kv_cache_memory", "2GiB", 2 << 30),
        ("memory_utilization", "0.5", 0.5),
        ("prefix_cache", "false", False),
        ("prefix_cache", "True", True),
        ("model", "none", None),
        ("model", "17", "17"),
        ("device", "cpu", "cpu"),
    ],
)
def test_command_line_text_is_parsed_by_type(name, text, value):
    assert flat_options()[name].parse(text) == value


@pytest.mark.parametrize(
    ("name", "text"),
    [("block_size", "x"), ("block_size", "null"), ("prefix_cache", "1"), ("startup_timeout", "")],
)
def test_command_line_text_of_a_wrong_type_is_refused(name, text):
    with pytest.raises(ConfigError, match=name):
        flat_options()[name].parse(text)


def test_contradictions_between_options_are_refused():
    with pytest.raises(ConfigError, match="16 ranks"):
        build_config({"attention_tp": 8, "attention_dp": 2, "gpus_per_node": 8})


def test_yaml_sections_become_flat_values(tmp_path):
    path = write(
        tmp_path,
        "model: m\nparallel:\n  attention_tp: 2\ncache:\n  kv_cache_memory: 1MiB\n"
        "scheduler:\nserver:\n  port: 1\n",
    )
    expected = {"model": "m", "attention_tp": 2, "kv_cache_memory": 1 << 20, "port": 1}
    assert load_yaml(path) == expected


def test_flags_override_yaml_and_yaml_overrides_defaults(tmp_path):
    path = write(tmp_path, "cache:\n  block_size: 32\n  prefix_cache: false\n")
    engine, _ = build_config({**load_yaml(path), "block_size": 64})
    assert engine.cache.block_size == 64
    assert not engine.cache.prefix_cache
    assert engine.scheduler == EngineConfig().scheduler


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("modle: x", "modle.*did you mean model"),
        ("cach:\n  block_size: 1", "cach.*did you mean cache"),
        ("engine:\n  seed: 1", "'engine'.*the engine's options stand outside"),
        ("cache:\n  blok_size: 1", "cache.blok_size.*did you mean block_size"),
        ("block_size: 1", "block_size.*did you mean cache.block_size"),
        ("server:\n  block_size: 1", "server.block_size.*did you mean cache.block_size"),
        ("cache:\n  parallel:\n    attention_tp: 1", "cache.parallel"),
        ("1: 2", "'1'"),
        ("model: a\nseed: 1\nmodel: b", "duplicate key 'model'"),
        ("cache:\n  block_size: 1\n  block_size: 1", "duplicate key 'block_size'"),
        ("? [model]\n: a", "not valid YAML"),
        ("cache: 5", "'cache'.*5"),
        ("cache:\n  block_size: big", "cache.block_size.*'big'"),
        ("cache:\n  block_size: {a: 1}", "cache.block_size"),
        ("model:\n  - a", "model"),
        ("", "None"),
        ("- a", r"\['a'\]"),
        ("just text", "just text"),
        ("a: [", "not valid YAML"),
        ("seed: !!python/object:os.system {}", "not valid YAML"),
    ],
)
def test_a_bad_file_is_refused_naming_file_and_key(tmp_path, text, named):
    path = write(tmp_path, text)
    with pytest.raises(ConfigError, match=rf"(?s)engine\.yaml.*{named}"):
        load_yaml(path)


def test_an_unreadable_file_is_refused_naming_it(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml cannot be read"):
        load_yaml(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"binary\.yaml is not valid"):
        load_yaml(tmp_path / "binary.yaml")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configurations_load(path):
    build_config(load_yaml(path))


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("qwen3-235b-a22b-8xh100", (4, 2, 1, 8)),
        ("qwen3-235b-a22b-nvl72", (4, 4, 4, 16)),
        ("qwen3-30b-a3b-1gpu", (1, 1, 1, 1)),
        ("demo-cpu", (1, 1, 1, 1)),
    ],
)
def test_shipped_configurations_have_the_layout_that_they_describe(name, layout):
    path = next(path for path in CONFIGS if path.stem == name)
    parallel = build_config(load_yaml(path))[0].parallel
    found = (parallel.attention_tp, parallel.attention_dp, parallel.replicas, parallel.world_size)
    assert found == layout

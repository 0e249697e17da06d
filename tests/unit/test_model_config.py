"""Reading config.json and generation_config.json, in both of their styles."""

import json

import pytest
from transformers import Qwen3MoeConfig

from moe_engine.config import ModelConfig, RopeConfig
from moe_engine.config.hf import default_sampling
from moe_engine.errors import ConfigError

HUB_235B = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "max_position_embeddings": 40960,
    "max_window_layers": 94,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 1536,
    "norm_topk_prob": True,
    "num_attention_heads": 64,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 94,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


def write(directory, name, values):
    text = values if isinstance(values, str) else json.dumps(values)
    (directory / name).write_text(text)


def test_hub_style_is_read():
    config = ModelConfig.from_dict(HUB_235B)
    assert (config.num_experts, config.num_experts_per_tok) == (128, 8)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (64, 4, 128)
    assert config.rope == RopeConfig(theta=1e6)
    assert config.dtype == "bfloat16"
    assert config.eos_token_ids == (151645,)
    assert config.max_position_embeddings == 40960
    assert config.norm_topk_prob


@pytest.mark.parametrize("rope_scaling", [None, YARN, {**YARN, "type": "yarn", "beta_fast": 16}])
def test_style_saved_by_transformers_reads_as_the_hub_style(tmp_path, rope_scaling):
    hub = {**HUB_235B, "rope_scaling": rope_scaling}
    Qwen3MoeConfig(**json.loads(json.dumps(hub))).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in saved
    assert "num_local_experts" in saved
    assert "rope_theta" not in saved
    assert ModelConfig.from_directory(tmp_path) == ModelConfig.from_dict(hub)


def test_missing_keys_take_transformers_defaults(tmp_path):
    Qwen3MoeConfig().save_pretrained(tmp_path)
    saved = ModelConfig.from_directory(tmp_path)
    assert ModelConfig.from_dict({"model_type": "qwen3_moe"}) == saved


def test_head_dim_defaults_to_the_hidden_size_per_head():
    values = {**HUB_235B, "head_dim": None}
    assert ModelConfig.from_dict(values).head_dim == 64
    del values["head_dim"]
    assert ModelConfig.from_dict(values).head_dim == 64


@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_yarn_is_read_from_both_spellings(key):
    scaling = {key: "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    config = ModelConfig.from_dict({**HUB_235B, "rope_scaling": scaling})
    assert config.rope == RopeConfig(1e6, factor=4.0, original_max_position_embeddings=32768)


def test_yarn_extends_the_context():
    config = ModelConfig.from_dict({**HUB_235B, "rope_scaling": YARN})
    assert config.max_position_embeddings == 131072


def test_yarn_keeps_every_parameter():
    extra = {
        "attention_factor": 1.5,
        "beta_fast": 16,
        "beta_slow": 2,
        "mscale": 0.7,
        "mscale_all_dim": 0.9,
        "truncate": False,
    }
    rope = ModelConfig.from_dict({**HUB_235B, "rope_scaling": {**YARN, **extra}}).rope
    assert {name: getattr(rope, name) for name in extra} == extra


def test_yarn_factor_of_null_is_the_ratio_of_the_contexts():
    scaling = {**YARN, "factor": None}
    rope = ModelConfig.from_dict({**HUB_235B, "rope_scaling": scaling}).rope
    assert rope.factor == 40960 / 32768


def test_yarn_original_context_defaults_to_the_models():
    scaling = {"type": "yarn", "factor": 2.0}
    config = ModelConfig.from_dict({**HUB_235B, "rope_scaling": scaling})
    assert config.rope.original_max_position_embeddings == 40960
    assert config.max_position_embeddings == 81920


def test_theta_inside_rope_parameters_wins():
    parameters = {"rope_type": "default", "rope_theta": 5e6}
    config = ModelConfig.from_dict({**HUB_235B, "rope_parameters": parameters})
    assert config.rope == RopeConfig(theta=5e6)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "qwen3"}, ["model_type", "'qwen3'"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "'gelu'"]),
        ({"use_sliding_window": True}, ["use_sliding_window", "True"]),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, ["rope_scaling", "'linear'"]),
        ({"rope_parameters": {"rope_type": "llama3"}}, ["rope_parameters", "'llama3'"]),
        ({"rope_scaling": {"type": "yarn"}}, ["rope_scaling", "factor"]),
        ({"rope_scaling": {**YARN, "factor": 0.5}}, ["factor", "0.5"]),
        ({"rope_scaling": "yarn"}, ["rope_scaling", "'yarn'"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "0.5"]),
        ({"quantization_config": {"quant_method": "fp8"}}, ["quantization_config", "'fp8'"]),
        ({"num_experts_per_tok": 129}, ["num_experts_per_tok", "129", "128"]),
        ({"num_key_value_heads": 5}, ["num_attention_heads", "64", "5"]),
        ({"head_dim": 127}, ["head_dim", "127"]),
        ({"hidden_size": "4096"}, ["hidden_size", "'4096'"]),
        ({"hidden_size": None}, ["hidden_size", "None"]),
        ({"num_hidden_layers": True}, ["num_hidden_layers", "True"]),
        ({"decoder_sparse_step": 0}, ["decoder_sparse_step", "0"]),
        ({"norm_topk_prob": 1}, ["norm_topk_prob", "1"]),
        ({"mlp_only_layers": 3}, ["mlp_only_layers", "3"]),
        ({"torch_dtype": "float8_e4m3fn"}, ["torch_dtype", "float8_e4m3fn"]),
        ({"eos_token_id": 151936}, ["eos_token_id", "151936", "151935"]),
        ({"rms_norm_eps": float("nan")}, ["rms_norm_eps", "nan"]),
    ],
)
def test_what_cannot_run_is_refused_naming_key_and_value(tmp_path, change, named):
    write(tmp_path, "config.json", {**HUB_235B, **change})
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_directory(tmp_path)
    for part in [*named, str(tmp_path)]:
        assert part in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[1]", '"qwen3_moe"', "\x00"])
def test_a_malformed_config_is_refused_naming_the_file(tmp_path, text):
    write(tmp_path, "config.json", text)
    with pytest.raises(ConfigError, match=r"config\.json"):
        ModelConfig.from_directory(tmp_path)


def test_a_missing_config_is_refused_naming_the_file(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json does not exist"):
        ModelConfig.from_directory(tmp_path / "Qwen/Qwen3-235B-A22B")


def test_a_config_that_is_a_directory_is_refused(tmp_path):
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ConfigError, match="cannot be read"):
        ModelConfig.from_directory(tmp_path)


def test_eos_ids_of_the_generation_config_win(tmp_path):
    write(tmp_path, "config.json", HUB_235B)
    write(tmp_path, "generation_config.json", {"eos_token_id": [151645, 151643, 151645]})
    assert ModelConfig.from_directory(tmp_path).eos_token_ids == (151645, 151643)


def test_eos_ids_of_the_config_serve_when_the_generation_config_names_none(tmp_path):
    write(tmp_path, "config.json", {**HUB_235B, "eos_token_id": [1, 2]})
    write(tmp_path, "generation_config.json", {"do_sample": True, "eos_token_id": None})
    assert ModelConfig.from_directory(tmp_path).eos_token_ids == (1, 2)


def test_a_model_without_eos_has_no_eos_ids():
    assert ModelConfig.from_dict({"model_type": "qwen3_moe"}).eos_token_ids == ()


def test_moe_layers_follow_sparse_step_and_exceptions():
    values = {"num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3]}
    config = ModelConfig.from_dict({**HUB_235B, **values})
    assert [config.is_moe_layer(layer) for layer in range(6)] == [0, 1, 0, 0, 0, 1]


def test_a_model_without_experts_needs_no_top_k():
    config = ModelConfig.from_dict({**HUB_235B, "num_experts": 0})
    assert not any(config.is_moe_layer(layer) for layer in range(94))


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ({}, {}),
        ({"do_sample": True}, {}),
        (
            {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": None},
            {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
        ),
        (
            {"repetition_penalty": 1.05, "min_p": 0.1, "max_new_tokens": 99},
            {"repetition_penalty": 1.05, "min_p": 0.1, "max_tokens": 99},
        ),
        ({"do_sample": False, "temperature": 0.6}, {"temperature": 0.0}),
    ],
)
def test_recommended_sampling_is_read(tmp_path, generation, expected):
    write(tmp_path, "generation_config.json", generation)
    assert default_sampling(tmp_path) == expected


def test_no_generation_config_recommends_nothing(tmp_path):
    assert default_sampling(tmp_path) == {}


@pytest.mark.parametrize("generation", [{"top_p": 1.5}, {"temperature": "hot"}, "{"])
def test_a_bad_generation_config_is_refused_naming_the_file(tmp_path, generation):
    write(tmp_path, "generation_config.json", generation)
    with pytest.raises(ConfigError, match=r"generation_config\.json"):
        default_sampling(tmp_path)

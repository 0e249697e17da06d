"""Reads the ``config.json`` and ``generation_config.json`` of a Hugging Face qwen3_moe checkpoint.

Two styles of ``config.json`` exist and both are read: the hub's (``rope_theta``, ``rope_scaling``,
``torch_dtype``, ``num_experts``) and the one that transformers 5 saves (``rope_parameters``,
``dtype``, ``num_local_experts``). A missing key takes the default of transformers'
``Qwen3MoeConfig``; a value that the engine cannot honour is refused, naming the key.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from moe_engine.config.model import ModelConfig, RopeConfig
from moe_engine.errors import ConfigError, InvalidRequestError
from moe_engine.types.sampling import SamplingParams

CONFIG_NAME = "config.json"
GENERATION_CONFIG_NAME = "generation_config.json"

DEFAULT_ROPE_THETA = 10_000.0
DTYPES = ("float32", "bfloat16", "float16")

# generation_config.json's key -> SamplingParams' field
_SAMPLING_KEYS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


def load_model_config(directory: Path) -> ModelConfig:
    """Read the model's configuration from a checkpoint directory.

    The eos ids are those of ``generation_config.json`` when it names any, else ``config.json``'s,
    as in Hugging Face's ``generate``.

    Raises:
        ConfigError: ``config.json`` is missing, unreadable or malformed, or describes a model
            that the engine cannot run.
    """
    values = _read_json(directory / CONFIG_NAME)
    generation = _read_generation_config(directory)
    try:
        return parse_model_config(values, generation)
    except ConfigError as error:
        raise ConfigError(f"{directory}: {error}") from error


def parse_model_config(
    values: dict[str, Any], generation: dict[str, Any] | None = None
) -> ModelConfig:
    """Build a `ModelConfig` from the parsed ``config.json`` and ``generation_config.json``.

    ``max_position_embeddings`` of the result is the longest context that the rotary embedding
    covers: with YaRN, ``factor * original_max_position_embeddings`` if that is more.

    Raises:
        ConfigError: names the key and its value.
    """
    _refuse_unsupported(values)
    num_layers = _integer(values, "num_hidden_layers", 24)
    num_heads = _integer(values, "num_attention_heads", 32)
    num_kv_heads = _integer(values, "num_key_value_heads", 4)
    hidden_size = _integer(values, "hidden_size", 2048)
    vocab_size = _integer(values, "vocab_size", 151936)
    if num_heads % num_kv_heads:
        raise ConfigError(
            f"num_attention_heads is {num_heads}; it must be a multiple of "
            f"num_key_value_heads = {num_kv_heads}"
        )
    head_dim = hidden_size // num_heads
    if values.get("head_dim") is not None:
        head_dim = _integer(values, "head_dim", head_dim)
    if head_dim % 2 or head_dim == 0:
        raise ConfigError(
            f"head_dim is {head_dim}; the rotary embedding needs an even, positive number"
        )
    num_experts, top_k = _experts(values)
    rope, max_positions = _rope(values, _integer(values, "max_position_embeddings", 32768))
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=_integer(values, "intermediate_size", 6144),
        moe_intermediate_size=_integer(values, "moe_intermediate_size", 768),
        num_experts=num_experts,
        num_experts_per_tok=top_k,
        norm_topk_prob=_boolean(values, "norm_topk_prob", False),
        decoder_sparse_step=_integer(values, "decoder_sparse_step", 1),
        mlp_only_layers=_integer_list(values, "mlp_only_layers"),
        rms_norm_eps=_number(values, "rms_norm_eps", 1e-6, minimum=0.0),
        rope=rope,
        attention_bias=_boolean(values, "attention_bias", False),
        tie_word_embeddings=_boolean(values, "tie_word_embeddings", False),
        max_position_embeddings=max_positions,
        eos_token_ids=_eos_token_ids(values, generation or {}, vocab_size),
        bos_token_id=_token_id("bos_token_id", values.get("bos_token_id"), vocab_size),
        dtype=_dtype(values),
    )


def default_sampling(directory: Path) -> dict[str, Any]:
    """Read the sampling parameters that the model's authors recommend.

    As in vLLM, the values in ``generation_config.json`` count whether or not ``do_sample`` is
    there; but an explicit ``"do_sample": false`` asks for greedy decoding and gives
    ``temperature`` 0. What the file leaves out keeps the default of `SamplingParams`.

    Returns:
        Keyword arguments of `SamplingParams`; empty if the file is absent or recommends nothing.

    Raises:
        ConfigError: the file is malformed or a value is out of range.
    """
    generation = _read_generation_config(directory)
    defaults = {
        field: generation[key]
        for key, field in _SAMPLING_KEYS.items()
        if generation.get(key) is not None
    }
    if generation.get("do_sample") is False:
        defaults["temperature"] = 0.0
    try:
        SamplingParams(**defaults)
    except InvalidRequestError as error:
        raise ConfigError(f"{directory / GENERATION_CONFIG_NAME}: {error}") from error
    return defaults


def _refuse_unsupported(values: dict[str, Any]) -> None:
    model_type = values.get("model_type")
    if model_type != "qwen3_moe":
        raise ConfigError(f"model_type is {model_type!r}; only 'qwen3_moe' is supported")
    hidden_act = values.get("hidden_act", "silu")
    if hidden_act != "silu":
        raise ConfigError(f"hidden_act is {hidden_act!r}; only 'silu' is supported")
    if _boolean(values, "use_sliding_window", False):
        raise ConfigError(
            "use_sliding_window is True; only full attention is supported "
            "(set it to false to attend to the whole context)"
        )
    quantization = values.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise ConfigError(
            f"quantization_config is present (quant_method {method!r}); quantised checkpoints "
            "are not supported yet, take the bfloat16 one"
        )


def _experts(values: dict[str, Any]) -> tuple[int, int]:
    """``(num_experts, num_experts_per_tok)``; transformers 5 saves ``num_local_experts``."""
    key = "num_experts" if "num_experts" in values else "num_local_experts"
    num_experts = _integer(values, key, 128, minimum=0)
    top_k = _integer(values, "num_experts_per_tok", 8)
    if num_experts and top_k > num_experts:
        raise ConfigError(
            f"num_experts_per_tok is {top_k}; it may not exceed {key} = {num_experts}"
        )
    return num_experts, top_k


def _rope(values: dict[str, Any], max_positions: int) -> tuple[RopeConfig, int]:
    """The rotary embedding and the longest context that it covers.

    ``rope_scaling`` (older) comes before ``rope_parameters``, and a ``rope_theta`` inside them
    before one at the top level, as in transformers.
    """
    key = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
    scaling = values.get(key) or {}
    if not isinstance(scaling, dict):
        raise ConfigError(f"{key} is {scaling!r}; it must be an object or null")
    theta_source = scaling if scaling.get("rope_theta") is not None else values
    theta = _number(theta_source, "rope_theta", DEFAULT_ROPE_THETA, minimum=1.0)
    for source in (scaling, values):
        partial = source.get("partial_rotary_factor")
        if partial not in (None, 1):
            raise ConfigError(f"partial_rotary_factor is {partial!r}; only 1.0 is supported")
    rope_type = scaling.get("rope_type", scaling.get("type"))
    if rope_type in (None, "default"):
        return RopeConfig(theta=theta), max_positions
    if rope_type != "yarn":
        raise ConfigError(f"rope_type in {key} is {rope_type!r}; only 'default' and 'yarn' are")
    return _yarn(values, key, scaling, theta, max_positions)


def _yarn(
    values: dict[str, Any], key: str, scaling: dict[str, Any], theta: float, max_positions: int
) -> tuple[RopeConfig, int]:
    if "factor" not in scaling:
        raise ConfigError(f"{key} is {scaling!r}; YaRN needs a factor")
    name = "original_max_position_embeddings"
    original = _integer(values if name in values else scaling, name, max_positions)
    factor = max_positions / original
    if scaling["factor"] is not None:
        factor = _number(scaling, "factor", factor, minimum=1.0)
    rope = RopeConfig(
        theta=theta,
        factor=factor,
        original_max_position_embeddings=original,
        attention_factor=_optional_number(scaling, "attention_factor"),
        # 0 counts as unset in transformers, hence `or`
        beta_fast=_optional_number(scaling, "beta_fast") or 32.0,
        beta_slow=_optional_number(scaling, "beta_slow") or 1.0,
        mscale=_optional_number(scaling, "mscale"),
        mscale_all_dim=_optional_number(scaling, "mscale_all_dim"),
        truncate=_boolean(scaling, "truncate", True),
    )
    return rope, max(max_positions, int(factor * original))


def _dtype(values: dict[str, Any]) -> str:
    """The weights' data type; float32, which holds every other exactly, where none is named."""
    key = "dtype" if values.get("dtype") is not None else "torch_dtype"
    dtype = values.get(key)
    if dtype is None:
        return "float32"
    name = dtype.removeprefix("torch.") if isinstance(dtype, str) else dtype
    if name not in DTYPES:
        raise ConfigError(f"{key} is {dtype!r}; it must be one of {', '.join(DTYPES)}")
    return str(name)


def _eos_token_ids(
    values: dict[str, Any], generation: dict[str, Any], vocab_size: int
) -> tuple[int, ...]:
    ids = generation.get("eos_token_id")
    if ids is None:
        ids = values.get("eos_token_id")
    if ids is None:
        return ()
    if not isinstance(ids, list):
        ids = [ids]
    checked = (_token_id("eos_token_id", token_id, vocab_size) for token_id in ids)
    return tuple(dict.fromkeys(token_id for token_id in checked if token_id is not None))


def _token_id(key: str, value: Any, vocab_size: int) -> int | None:
    if value is None:
        return None
    if not _is_integer(value) or not 0 <= value < vocab_size:
        raise ConfigError(f"{key} is {value!r}; token ids run from 0 to {vocab_size - 1}")
    return int(value)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _integer(values: dict[str, Any], key: str, default: int, *, minimum: int = 1) -> int:
    value = values.get(key, default)
    if not _is_integer(value) or value < minimum:
        raise ConfigError(f"{key} is {value!r}; it must be an integer of at least {minimum}")
    return int(value)


def _integer_list(values: dict[str, Any], key: str) -> tuple[int, ...]:
    value = values.get(key)
    if value is None:
        return ()
    if not isinstance(value, list) or not all(_is_integer(item) for item in value):
        raise ConfigError(f"{key} is {value!r}; it must be a list of integers")
    return tuple(value)


def _number(
    values: dict[str, Any], key: str, default: float, *, minimum: float = -math.inf
) -> float:
    value = values.get(key, default)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value < minimum:
        raise ConfigError(f"{key} is {value!r}; it must be a number of at least {minimum}")
    return float(value)


def _optional_number(values: dict[str, Any], key: str) -> float | None:
    return None if values.get(key) is None else _number(values, key, 0.0, minimum=0.0)


def _boolean(values: dict[str, Any], key: str, default: bool) -> bool:
    value = values.get(key, default)
    if not isinstance(value, bool):
        raise ConfigError(f"{key} is {value!r}; it must be true or false")
    return value


def _read_generation_config(directory: Path) -> dict[str, Any]:
    path = directory / GENERATION_CONFIG_NAME
    return _read_json(path) if path.exists() else {}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(
            f"{path} does not exist; the model must be a local directory with a Hugging Face "
            "checkpoint in it"
        ) from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds a JSON {type(values).__name__}; it must be an object")
    return values

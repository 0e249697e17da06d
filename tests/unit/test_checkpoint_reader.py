"""A checkpoint directory is checked whole: every fault is named in one error."""

import json
import struct

import pytest
import torch

from moe_engine.checkpoint import Checkpoint, checkpoint_tensors
from moe_engine.checkpoint.header import read_header
from moe_engine.config import ModelConfig
from moe_engine.errors import CheckpointError
from tests.unit.checkpoint_factory import edit_file, read_index, save_tiny, shard_of, write_index

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
EXPERT = "model.layers.2.mlp.experts.3.up_proj.weight"
GATE_UP = "model.layers.2.mlp.experts.gate_up_proj"


@pytest.fixture
def directory(tmp_path):
    save_tiny(tmp_path)
    return tmp_path


def fault(directory):
    """The message with which the checkpoint is refused."""
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(directory, ModelConfig.from_directory(directory))
    return str(caught.value)


@pytest.mark.parametrize("changes", [{}, {"attention_bias": True}, {"tie_word_embeddings": True}])
@pytest.mark.parametrize("fused", [False, True])
def test_expected_tensors_are_those_that_transformers_writes(tmp_path, changes, fused):
    save_tiny(tmp_path, fused=fused, **changes)
    config = ModelConfig.from_directory(tmp_path)
    stored = Checkpoint(tmp_path, config).tensors
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    if config.tie_word_embeddings:
        assert shapes.pop("lm_head.weight") == (40, 16)
    assert shapes == checkpoint_tensors(config)


def test_a_single_file_needs_no_index(tmp_path):
    save_tiny(tmp_path, shard_size="1GB")
    assert not (tmp_path / "model.safetensors.index.json").exists()
    Checkpoint(tmp_path, ModelConfig.from_directory(tmp_path))


def test_every_kind_of_fault_is_named_at_once(directory):
    weight_map = read_index(directory)
    edit_file(shard_of(directory, Q_PROJ), {Q_PROJ: torch.zeros(3, 16)})
    edit_file(shard_of(directory, EXPERT), {EXPERT: torch.zeros(10, 16, dtype=torch.int32)})
    norm, head = "model.norm.weight", "lm_head.weight"
    edit_file(shard_of(directory, head), {head: None})
    extra = "model.layers.0.self_attn.q_proj.bias"
    edit_file(shard_of(directory, norm), {norm: None, extra: torch.zeros(24)})
    del weight_map[norm]
    write_index(
        directory, weight_map | {extra: weight_map["model.layers.2.input_layernorm.weight"]}
    )
    message = fault(directory)
    for part in (
        f"missing tensors (1):\n    {norm}",
        f"{head} (not in {weight_map[head]}; no file has it)",
        f"{Q_PROJ} ([3, 16], config.json asks for [24, 16])",
        f"{EXPERT} (I32, not F32, BF16, F16)",
        extra,
        str(directory),
    ):
        assert part in message


def test_an_unexpected_tensor_is_refused(directory):
    save_tiny(directory, attention_bias=True)
    values = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(values | {"attention_bias": False}))
    assert "unexpected tensors (12)" in fault(directory)


def test_long_lists_are_cut_with_a_count(directory):
    values = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(values | {"num_hidden_layers": 9}))
    message = fault(directory)
    # each of the 6 layers: 2 norms, 6 of attention, the router, 5 experts x 3
    assert "missing tensors (144)" in message
    assert "... and 124 more" in message
    assert len(message.splitlines()) < 30


def test_a_missing_shard_is_named_once_and_not_every_tensor_in_it(directory):
    shard = shard_of(directory, EXPERT)
    shard.unlink()
    message = fault(directory)
    assert f"{shard.name} does not exist" in message
    assert "missing tensors" not in message


def test_a_missing_fused_shard_is_named_once(tmp_path):
    save_tiny(tmp_path, fused=True)
    shard_of(tmp_path, GATE_UP).unlink()
    message = fault(tmp_path)
    assert "files that cannot be read (1)" in message
    assert "missing tensors" not in message


def test_a_truncated_file_names_the_tensors_cut_off(directory):
    shard = shard_of(directory, EXPERT)
    last = max(read_header(shard).items(), key=lambda item: item[1].end)[0]
    with shard.open("r+b") as stream:
        stream.truncate(shard.stat().st_size - 1)
    message = fault(directory)
    assert f"truncated tensors (1):\n    {last} (ends at byte" in message


def test_a_file_longer_than_its_header_says_is_refused(directory):
    shard = shard_of(directory, EXPERT)
    with shard.open("ab") as stream:
        stream.write(b"12345")
    assert f"{shard.name} has {shard.stat().st_size} bytes, 5 more" in fault(directory)


def test_an_index_that_names_the_wrong_shard_is_refused(directory):
    weight_map = read_index(directory)
    right = weight_map[Q_PROJ]
    wrong = next(file for file in weight_map.values() if file != right)
    write_index(directory, weight_map | {Q_PROJ: wrong})
    assert f"{Q_PROJ} (not in {wrong}; it is in {right})" in fault(directory)


def test_a_tensor_that_the_index_leaves_out_is_refused(directory):
    weight_map = read_index(directory)
    file = weight_map.pop(Q_PROJ)
    write_index(directory, weight_map)
    assert f"{Q_PROJ} (in {file})" in fault(directory)


@pytest.mark.parametrize("file", ["../model.safetensors", "/model.safetensors", "..", "", 3])
def test_an_index_may_not_leave_its_directory(directory, file):
    write_index(directory, read_index(directory) | {Q_PROJ: file})
    assert f"places {Q_PROJ} in {file!r}" in fault(directory)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": {}}'])
def test_a_malformed_index_is_refused(directory, text):
    (directory / "model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json" in fault(directory)


def test_a_directory_in_place_of_a_file_is_refused_with_the_systems_words(directory):
    shard = shard_of(directory, EXPERT)
    shard.unlink()
    shard.mkdir()
    assert f"{shard.name} cannot be read: Is a directory" in fault(directory)
    index = directory / "model.safetensors.index.json"
    index.unlink()
    index.mkdir()
    assert fault(directory) == f"{index} cannot be read: Is a directory"


def test_a_directory_without_safetensors_is_refused(directory):
    for file in directory.glob("model*"):
        file.unlink()
    assert "neither model.safetensors nor model.safetensors.index.json" in fault(directory)


def entry(dtype="F32", shape=(2, 3), offsets=(0, 24)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x01\x02",
        struct.pack("<Q", 1 << 40) + b"{}",
        struct.pack("<Q", 100) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 3) + b"{x}",
        {"a": entry(dtype="X9")},
        {"a": entry(offsets=(0, 20))},
        {"a": entry(shape=(-2, -3))},
        {"a": entry(offsets=(8, 32))},
        {"a": entry(), "b": entry(offsets=(16, 40))},
        {"a": {"dtype": "F32", "shape": [6]}},
        {"a": 7},
    ],
)
def test_a_malformed_header_is_refused_naming_the_file(tmp_path, content):
    if isinstance(content, dict):
        text = json.dumps(content).encode()
        content = struct.pack("<Q", len(text)) + text + bytes(64)
    file = tmp_path / "broken.safetensors"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"broken\.safetensors"):
        read_header(file)


def test_what_hugging_face_ignores_is_tolerated(tmp_path):
    save_tiny(tmp_path, shard_size="1GB", tie_word_embeddings=True)
    ignored = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(3),
        "lm_head.weight": torch.zeros(40, 16),
    }
    edit_file(tmp_path / "model.safetensors", ignored)
    stored = Checkpoint(tmp_path, ModelConfig.from_directory(tmp_path)).tensors
    assert stored["lm_head.weight"] == stored["model.embed_tokens.weight"]


def test_a_fused_tensor_of_a_wrong_shape_is_named_once(tmp_path):
    save_tiny(tmp_path, fused=True)
    edit_file(shard_of(tmp_path, GATE_UP), {GATE_UP: torch.zeros(4, 20, 16)})
    message = fault(tmp_path)
    assert f"{GATE_UP} ([4, 20, 16], config.json asks for [5, 20, 16])" in message
    assert "missing" not in message


def test_fused_experts_in_a_dense_layer_are_unexpected(tmp_path):
    save_tiny(tmp_path, fused=True, shard_size="1GB")
    name = "model.layers.1.mlp.experts.gate_up_proj"
    edit_file(tmp_path / "model.safetensors", {name: torch.zeros(5, 20, 16)})
    assert f"unexpected tensors (1):\n    {name}" in fault(tmp_path)


def test_experts_stored_both_fused_and_apart_are_refused(tmp_path):
    save_tiny(tmp_path, fused=True, shard_size="1GB")
    edit_file(tmp_path / "model.safetensors", {EXPERT: torch.zeros(10, 16)})
    assert f"stored twice, fused and per expert (1):\n    {EXPERT}" in fault(tmp_path)

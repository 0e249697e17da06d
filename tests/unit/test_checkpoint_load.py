"""Weights arrive in their targets, and only the bytes asked for are read."""

import math
import os
import random

import pytest
import torch

from moe_engine.checkpoint import Checkpoint, WeightSpec, load_weights
from moe_engine.checkpoint.header import StoredTensor
from moe_engine.checkpoint.slices import pread_into, read_slice
from moe_engine.config import ModelConfig
from moe_engine.errors import CheckpointError
from tests.unit.checkpoint_factory import edit_file, reference_tensors, save_tiny, whole_specs


def open_tiny(directory, **kwargs):
    model = save_tiny(directory, **kwargs)
    config = ModelConfig.from_directory(directory)
    return model, config, Checkpoint(directory, config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("shard_size", ["6KB", "1GB"])
def test_every_tensor_arrives_as_transformers_saved_it(tmp_path, dtype, fused, shard_size):
    model, config, checkpoint = open_tiny(
        tmp_path, fused=fused, shard_size=shard_size, dtype=dtype, attention_bias=True
    )
    specs = whole_specs(config)
    load_weights(specs, checkpoint)
    expected = reference_tensors(model)
    assert {spec.name for spec in specs} == set(expected)
    for spec in specs:
        assert torch.equal(spec.target, expected[spec.name].float()), spec.name


def test_layers_may_differ_in_form(tmp_path):
    model, config, _ = open_tiny(tmp_path, fused=True, shard_size="1GB")
    expected = reference_tensors(model)
    prefix = "model.layers.0.mlp.experts"
    apart = {name: expected[name].contiguous() for name in expected if name.startswith(prefix)}
    fused = {f"{prefix}.gate_up_proj": None, f"{prefix}.down_proj": None}
    edit_file(tmp_path / "model.safetensors", fused | apart)
    specs = whole_specs(config)
    load_weights(specs, Checkpoint(tmp_path, config))
    for spec in specs:
        assert torch.equal(spec.target, expected[spec.name]), spec.name


@pytest.mark.parametrize("fused", [False, True])
def test_random_slices_match_and_read_no_other_byte(tmp_path, fused):
    model, config, checkpoint = open_tiny(tmp_path, fused=fused)
    expected = reference_tensors(model)
    rng = random.Random(3)
    specs = []
    for whole in whole_specs(config):
        bounds = [sorted(rng.choices(range(size + 1), k=2)) for size in whole.target.shape]
        slices = tuple(slice(*bound) for bound in bounds)
        target = torch.empty([stop - start for start, stop in bounds], dtype=torch.bfloat16)
        specs.append(WeightSpec(whole.name, slices, target))
    read = []

    def counting(fd, buffer, offset):
        count = pread_into(fd, buffer, offset)
        read.append(count)
        return count

    total = load_weights(specs, checkpoint, read_into=counting)
    for spec in specs:
        assert torch.equal(spec.target, expected[spec.name][spec.slices].bfloat16()), spec.name
    assert sum(read) == total == sum(4 * spec.target.numel() for spec in specs)


@pytest.mark.parametrize("shape", [(7,), (4, 5), (3, 4, 5), (1, 1), (0, 3)])
def test_read_slice_equals_indexing(tmp_path, shape):
    data = torch.randn(shape)
    file = tmp_path / "raw"
    file.write_bytes(b"head" + data.numpy().tobytes())
    tensor = StoredTensor(file, 4, shape, "F32")
    rng = random.Random(str(shape))
    fd = os.open(file, os.O_RDONLY)
    for _ in range(40):
        slices = tuple(slice(*sorted(rng.choices(range(size + 1), k=2))) for size in shape)
        assert torch.equal(read_slice(fd, tensor, slices), data[slices])
    assert torch.equal(read_slice(fd, tensor, (slice(None),) * len(shape)), data)
    os.close(fd)


def test_contiguous_rows_are_one_read(tmp_path):
    file = tmp_path / "raw"
    file.write_bytes(torch.arange(20.0).numpy().tobytes())
    reads = []

    def recording(fd, buffer, offset):
        reads.append((offset, len(buffer)))
        return pread_into(fd, buffer, offset)

    with file.open("rb") as stream:
        tensor = StoredTensor(file, 0, (4, 5), "F32")
        read_slice(stream.fileno(), tensor, (slice(1, 3), slice(0, 5)), recording)
        read_slice(stream.fileno(), tensor, (slice(1, 3), slice(1, 3)), recording)
    assert reads == [(20, 40), (24, 8), (44, 8)]


def test_short_reads_are_continued(tmp_path):
    _, config, checkpoint = open_tiny(tmp_path)
    specs, whole = whole_specs(config), whole_specs(config)
    load_weights(whole, checkpoint)
    load_weights(specs, checkpoint, read_into=lambda fd, b, at: pread_into(fd, b[:7], at))
    assert all(torch.equal(a.target, b.target) for a, b in zip(specs, whole, strict=True))


def test_a_file_that_shrinks_after_the_check_is_refused(tmp_path):
    _, config, checkpoint = open_tiny(tmp_path, shard_size="1GB")
    os.truncate(tmp_path / "model.safetensors", 5000)
    with pytest.raises(CheckpointError, match=r"model\.safetensors ends before byte"):
        load_weights(whole_specs(config), checkpoint)


def test_a_file_that_vanishes_after_the_check_is_refused(tmp_path):
    _, config, checkpoint = open_tiny(tmp_path, shard_size="1GB")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        load_weights(whole_specs(config), checkpoint)


def test_progress_rises_to_the_total_and_reads_go_forward(tmp_path):
    _, config, checkpoint = open_tiny(tmp_path)
    specs = whole_specs(config)
    random.Random(0).shuffle(specs)
    seen, places = [], []

    def recording(fd, buffer, offset):
        places.append((os.readlink(f"/proc/self/fd/{fd}"), offset))
        return pread_into(fd, buffer, offset)

    load_weights(specs, checkpoint, lambda done, total: seen.append((done, total)),
                 read_into=recording)  # fmt: skip
    size = sum(4 * math.prod(spec.target.shape) for spec in specs)
    assert [total for _, total in seen] == [size] * len(specs)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[-1] == (size, size)
    assert places == sorted(places)


@pytest.mark.parametrize(("show", "shown"), [(True, True), (False, False)])
def test_the_progress_bar_is_drawn_only_when_asked(tmp_path, monkeypatch, capsys, show, shown):
    monkeypatch.setattr("moe_engine.checkpoint.load.PROGRESS_BAR_DELAY_S", 0.0)
    _, config, checkpoint = open_tiny(tmp_path)
    capsys.readouterr()
    load_weights(whole_specs(config), checkpoint, show_progress=show)
    assert ("loading weights" in capsys.readouterr().err) is shown


def test_a_quick_load_draws_no_bar(tmp_path, capsys):
    _, config, checkpoint = open_tiny(tmp_path)
    capsys.readouterr()
    load_weights(whole_specs(config), checkpoint, show_progress=True)
    assert capsys.readouterr().err == ""


def test_a_tied_head_reads_the_embedding(tmp_path):
    model, _, checkpoint = open_tiny(tmp_path, tie_word_embeddings=True)
    target = torch.empty(40, 16)
    load_weights([WeightSpec("lm_head.weight", (slice(0, 40), slice(0, 16)), target)], checkpoint)
    assert torch.equal(target, model.state_dict()["model.embed_tokens.weight"])


def test_targets_may_be_views_of_a_parameter(tmp_path):
    model, _, checkpoint = open_tiny(tmp_path)
    stacked = torch.full((20, 16), 7.0)
    name = "model.layers.0.mlp.experts.4.{}_proj.weight"
    every = (slice(0, 10), slice(0, 16))
    load_weights([WeightSpec(name.format("up"), every, stacked[10:])], checkpoint)
    assert torch.equal(stacked[10:], reference_tensors(model)[name.format("up")])
    assert (stacked[:10] == 7.0).all()

"""Writes the demo checkpoint: a small qwen3_moe model with random weights and a real tokenizer.

The engine serves it when no model is named, so that everything from the HTTP door to the kernels
runs on any machine without a download. The directory is an ordinary Hugging Face checkpoint, in
two shards. Its weights are hashes (`checkpoint.dummy`), the same bytes everywhere, scaled so that
the text it makes is nonsense but lively: activations of the order of 1, logits with a standard
deviation of about 3, uneven routing.

Shape letters: H hidden size 128, I expert size 64.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path

import torch
from safetensors.torch import save_file

from moe_engine.checkpoint.dummy import fill_uniform
from moe_engine.checkpoint.tensors import EMBEDDING, LM_HEAD, checkpoint_tensors
from moe_engine.config import ModelConfig
from moe_engine.errors import CheckpointError

MODEL_NAME = "moe-engine-demo"
MANIFEST = "manifest.json"
DATA_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
NUM_SHARDS = 2
SEED = 0
# Raised with every change of the weights; the directory's name depends on it.
WEIGHTS_VERSION = 1


def ensure_demo_checkpoint(directory: Path | None = None) -> Path:
    """Return the demo checkpoint's directory, building it first if need be.

    Safe with several processes at once: one builds, the others wait for it. A directory that is
    incomplete or altered is built again.

    Args:
        directory: the cache directory to build in; ``~/.cache/moe_engine`` by default.

    Raises:
        CheckpointError: the cache directory cannot be written.
    """
    cache = Path.home() / ".cache" / "moe_engine" if directory is None else Path(directory)
    parent = cache / f"demo-{_version()}"
    target = parent / MODEL_NAME
    if _is_intact(target):
        return target
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with _lock(parent / "lock"):
            if not _is_intact(target):  # else another process has built it meanwhile
                shutil.rmtree(target, ignore_errors=True)
                staging = Path(tempfile.mkdtemp(prefix="building-", dir=parent))
                try:
                    _build(staging)
                    staging.chmod(0o755)  # mkdtemp's is private
                    staging.rename(target)
                finally:
                    shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(
            f"the demo model cannot be written to {parent}: {error.strerror or error}; "
            "name a writable cache directory, or a model"
        ) from error
    return target


def demo_weights(config: ModelConfig) -> dict[str, torch.Tensor]:
    """Name -> bfloat16 tensor of every weight of the demo model."""
    weights = {}
    for name, shape in checkpoint_tensors(config).items():
        values = torch.empty(shape)
        fill_uniform(values, SEED, name, (0,) * len(shape), _std(name, shape))
        if name.endswith("norm.weight"):
            values += 1.0
        weights[name] = values.to(torch.bfloat16)
    return weights


def _std(name: str, shape: tuple[int, ...]) -> float:
    """Standard deviation of a tensor: of the norms' distance from 1, else of the weights."""
    if name.endswith("norm.weight"):
        return 0.1
    if name == EMBEDDING:
        return 1.0
    # An input of H values of the order of 1 gives an output of the order of `gain`.
    gain = 1.0
    if name == LM_HEAD:
        gain = 3.0
    elif name.endswith("mlp.gate.weight"):
        gain = 1.5
    elif name.endswith("down_proj.weight"):
        gain = 4.0  # makes up for silu(gate) * up, and for the mean over the chosen experts
    return gain / math.sqrt(shape[-1])


def _build(directory: Path) -> None:
    data = files("moe_engine.demo").joinpath("data")
    for name in DATA_FILES:
        (directory / name).write_bytes(data.joinpath(name).read_bytes())
    weights = demo_weights(ModelConfig.from_directory(directory))
    names = sorted(weights)
    per_shard = math.ceil(len(names) / NUM_SHARDS)
    weight_map = {}
    for shard in range(NUM_SHARDS):
        file_name = f"model-{shard + 1:05}-of-{NUM_SHARDS:05}.safetensors"
        shard_names = names[shard * per_shard : (shard + 1) * per_shard]
        tensors = {name: weights[name] for name in shard_names}
        save_file(tensors, directory / file_name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard_names, file_name))
    total = sum(tensor.nbytes for tensor in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    for path in directory.iterdir():
        path.chmod(0o644)
    (directory / MANIFEST).write_text(json.dumps(_digests(directory), indent=2))


def _is_intact(directory: Path) -> bool:
    """Whether the directory holds exactly the files of its manifest, unaltered."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
        return bool(manifest) and manifest == _digests(directory)
    except (OSError, ValueError):
        return False


def _digests(directory: Path) -> dict[str, str]:
    """File name -> SHA-256 of every file but the manifest."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.iterdir())
        if path.name != MANIFEST
    }


def _version() -> str:
    """Changes with everything that the checkpoint is made of."""
    digest = hashlib.sha256(f"{WEIGHTS_VERSION} {SEED} {NUM_SHARDS}".encode())
    data = files("moe_engine.demo").joinpath("data")
    for name in DATA_FILES:
        digest.update(data.joinpath(name).read_bytes())
    return digest.hexdigest()[:12]


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock between processes; the system releases it if this one dies."""
    with path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield

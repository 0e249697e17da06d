"""Where the checkpoint is: a directory, a Hugging Face repository id, or the embedded demo."""

from __future__ import annotations

import re
from pathlib import Path

from moe_engine.errors import ConfigError

REPOSITORY_ID = re.compile(r"[\w.-]+/[\w.-]+")
CHECKPOINT_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]


def resolve_model(model: str | None) -> Path:
    """The local directory of ``model``; a repository id is downloaded unless already cached.

    Raises:
        ConfigError: neither a directory nor a repository that can be had.
    """
    if model is None:
        # Imported here, because it brings torch, which the front end does without otherwise.
        from moe_engine.demo.build import ensure_demo_checkpoint

        return ensure_demo_checkpoint()
    directory = Path(model)
    if directory.is_dir():
        return directory.resolve()
    if not REPOSITORY_ID.fullmatch(model):
        raise ConfigError(
            f"model {model!r} is not a directory; give one, or a Hugging Face repository id such "
            "as Qwen/Qwen3-30B-A3B"
        )
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(model, allow_patterns=CHECKPOINT_FILES))
    except Exception as error:  # the hub's client raises many unrelated kinds
        raise ConfigError(
            f"model {model!r} is neither a directory nor a repository that could be downloaded: "
            f"{type(error).__name__}: {error}"
        ) from error

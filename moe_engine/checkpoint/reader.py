"""`Checkpoint`: a directory of safetensors files, checked whole before any weight is read.

Only headers are read here. Everything that is wrong is collected and told at once, so that a
broken download is repaired in one go.

Tolerated, because Hugging Face ignores it too: ``*.rotary_emb.inv_freq`` (recomputed), and
``lm_head.weight`` where ``tie_word_embeddings`` says that the embedding takes its place. Any
other tensor that the configuration does not ask for (a bias, a quantisation scale, an extra
layer) would change the result if it were left out, and is refused.
"""

from __future__ import annotations

import json
from pathlib import Path

from moe_engine.checkpoint.fused import expert_names, fused_shape, is_fused, split_fused
from moe_engine.checkpoint.header import WEIGHT_DTYPES, StoredTensor, read_header
from moe_engine.checkpoint.tensors import EMBEDDING, LM_HEAD, checkpoint_tensors
from moe_engine.config import ModelConfig
from moe_engine.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_LISTED = 20


class Checkpoint:
    """The tensors of a checkpoint directory and where their bytes lie.

    Args:
        directory: holds ``model.safetensors``, or ``model.safetensors.index.json`` and shards.
        config: the model that the checkpoint must fit.

    Attributes:
        tensors: per-expert Hugging Face name -> `StoredTensor`, for every name in
            `checkpoint_tensors` (and ``lm_head.weight`` when tied: the embedding's bytes).

    Raises:
        CheckpointError: lists every missing, unexpected, mis-shaped, wrong-typed, truncated or
            misplaced tensor and every missing or malformed file.
    """

    def __init__(self, directory: str | Path, config: ModelConfig) -> None:
        self.directory = Path(directory)
        self._config = config
        self._expected = checkpoint_tensors(config)
        self._problems: dict[str, list[str]] = {}
        self._unreadable: set[str] = set()
        self.tensors: dict[str, StoredTensor] = {}

        for name, tensor in self._read_files().items():
            self._add(name, tensor)
        missing = [
            name
            for name in self._expected
            if name not in self.tensors and name not in self._unreadable
        ]
        for name in missing:
            self._report("missing tensors", name)
        if self._problems:
            raise CheckpointError(self._describe_problems())
        if config.tie_word_embeddings:
            self.tensors[LM_HEAD] = self.tensors[EMBEDDING]

    def _read_files(self) -> dict[str, StoredTensor]:
        """Every tensor of every file, under the name and form in which it is stored."""
        if (self.directory / SINGLE_FILE).is_file():
            return self._read_file(SINGLE_FILE) or {}
        weight_map = self._read_index()
        stored: dict[str, StoredTensor] = {}
        holder: dict[str, str] = {}
        for file_name in sorted(set(weight_map.values())):
            tensors = self._read_file(file_name)
            if tensors is None:
                for name, file in weight_map.items():
                    if file == file_name:
                        self._mark_unreadable(name)
                continue
            for name, tensor in tensors.items():
                holder[name] = file_name
                if weight_map.get(name) == file_name:
                    stored[name] = tensor
                elif name not in weight_map and not self._is_tolerated(name):
                    self._report("tensors absent from the index", f"{name} (in {file_name})")
        for name, file_name in weight_map.items():
            if name not in stored and name not in self._unreadable:
                where = f"it is in {holder[name]}" if name in holder else "no file has it"
                self._report(
                    "tensors that are not in the file the index names",
                    f"{name} (not in {file_name}; {where})",
                )
                self._mark_unreadable(name)
        return stored

    def _read_index(self) -> dict[str, str]:
        path = self.directory / INDEX_FILE
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise CheckpointError(
                f"{self.directory} has neither {SINGLE_FILE} nor {INDEX_FILE}; "
                "weights must be in safetensors files"
            ) from error
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise CheckpointError(f"{path} is not valid JSON: {error}") from error
        weight_map = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{path} has no weight_map")
        for name, file_name in weight_map.items():
            # a path would let an index read files outside its directory
            is_plain = isinstance(file_name, str) and Path(file_name).name == file_name
            if not is_plain or not file_name.endswith(".safetensors"):
                raise CheckpointError(
                    f"{path} places {name} in {file_name!r}; it must be a safetensors file in "
                    "the same directory"
                )
        return weight_map

    def _read_file(self, file_name: str) -> dict[str, StoredTensor] | None:
        """The tensors of one file; None, with the problem reported, if its header is no use."""
        file = self.directory / file_name
        try:
            tensors = read_header(file)
            size = file.stat().st_size
        except CheckpointError as error:
            self._report("files that cannot be read", str(error))
            return None
        end = max((tensor.end for tensor in tensors.values()), default=size)
        if size > end:
            self._report(
                "files that cannot be read",
                f"{file_name} has {size} bytes, {size - end} more than its header describes",
            )
        for name, tensor in tensors.items():
            if tensor.end > size:
                self._report(
                    "truncated tensors",
                    f"{name} (ends at byte {tensor.end} of {file_name}, which has {size})",
                )
        return tensors

    def _add(self, name: str, tensor: StoredTensor) -> None:
        """Take a tensor, fused or not, into `tensors`, reporting what is wrong with it."""
        config = self._config
        blocks = {name: tensor}
        if is_fused(name):
            shape = fused_shape(
                name, config.num_experts, config.moe_intermediate_size, config.hidden_size
            )
            if tensor.shape != shape:
                self._report_shape(name, tensor, shape)
                self._mark_unreadable(name)
                return
            blocks = split_fused(name, tensor)
        if not any(block in self._expected for block in blocks):
            if not self._is_tolerated(name):
                self._report("unexpected tensors", name)
            return
        if tensor.dtype not in WEIGHT_DTYPES:
            allowed = ", ".join(WEIGHT_DTYPES)
            self._report("tensors of a wrong dtype", f"{name} ({tensor.dtype}, not {allowed})")
        for block_name, block in blocks.items():
            if block.shape != self._expected[block_name]:
                self._report_shape(block_name, block, self._expected[block_name])
            if block_name in self.tensors:
                self._report("tensors stored twice, fused and per expert", block_name)
            self.tensors[block_name] = block

    def _is_tolerated(self, name: str) -> bool:
        is_tied_head = name == LM_HEAD and self._config.tie_word_embeddings
        return is_tied_head or name.endswith(".rotary_emb.inv_freq")

    def _mark_unreadable(self, name: str) -> None:
        """Note that ``name`` has been reported already, so that it is not also called missing."""
        self._unreadable.add(name)
        if is_fused(name):
            for names in expert_names(name, self._config.num_experts):
                self._unreadable.update(names)

    def _report(self, kind: str, detail: str) -> None:
        self._problems.setdefault(kind, []).append(detail)

    def _report_shape(self, name: str, tensor: StoredTensor, expected: tuple[int, ...]) -> None:
        found, wanted = list(tensor.shape), list(expected)
        self._report("tensors of a wrong shape", f"{name} ({found}, config.json asks for {wanted})")

    def _describe_problems(self) -> str:
        lines = [f"the checkpoint in {self.directory} cannot be loaded:"]
        for kind, details in self._problems.items():
            lines.append(f"  {kind} ({len(details)}):")
            lines += [f"    {detail}" for detail in details[:MAX_LISTED]]
            if len(details) > MAX_LISTED:
                lines.append(f"    ... and {len(details) - MAX_LISTED} more")
        return "\n".join(lines)

"""Fills modules from a checkpoint folder: every tensor is loaded, is on a short list of ignored names, or is an error.

Each weight is allocated once, in its final dtype or in FP8 as it is stored, and filled tensor by
tensor from memory-mapped shards. A shard is mapped anew every `REMAP_BYTES`, so the resident peak is
the weights plus that.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from specdec.errors import CheckpointError
from specdec.kernels import AnyBackend
from specdec.kernels.fp8 import E4M3
from specdec.kernels.progress import Progress, silent, tracked
from specdec.model.config import Glm4MoeConfig, load_config, read_json
from specdec.model.fp8 import scaled_modules, store_fp8
from specdec.model.glm4_moe import Glm4MoeForCausalLM
from specdec.model.layers import Experts, Matrices, RotaryEmbedding, iter_slots
from specdec.model.mtp import MTPLayer
from specdec.model.quantization import SCALE_SUFFIX, SUPPORTED

log = logging.getLogger(__name__)

REMAP_BYTES = 16 * 2**20
INDEX_NAME = "model.safetensors.index.json"
FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
QUANTISED_SUFFIXES = ("_scale", "_scale_inv", "_scale_2", "_packed", "_zero_point", "_g_idx")


@dataclass(frozen=True)
class CheckpointIndex:
    """What a checkpoint folder holds."""

    folder: Path
    """The folder."""
    config: Glm4MoeConfig
    """The content of its config.json."""
    tensors: dict[str, Path]
    """The shard of every tensor, by the tensor's name."""

    @classmethod
    def open(cls, folder: Path) -> CheckpointIndex:
        """Reads config.json and the headers of all shards. Raises CheckpointError where one is faulty."""
        return cls(folder, load_config(folder), index_tensors(folder))

    @property
    def has_mtp_layer(self) -> bool:
        """Whether there is an MTP layer. The tensors alone decide: transformers drops them but keeps their number in
        config.json."""
        return any(name.startswith(mtp_prefix(self.config)) for name in self.tensors)

    def scaled_modules(self) -> set[str]:
        """Returns the names (without `.weight`) of the modules that the checkpoint stores in FP8. Raises
        CheckpointError as `specdec.model.fp8.scaled_modules` does."""
        ignored = ignored_names(self.config)
        return scaled_modules((name for name in self.tensors if not ignored.fullmatch(name)), self.config)


@dataclass(frozen=True)
class LoadedModel:
    """Target and MTP layer."""

    config: Glm4MoeConfig
    """The checkpoint's configuration."""
    target: Glm4MoeForCausalLM
    """The target model."""
    mtp: MTPLayer | None
    """The MTP layer; None where the checkpoint has none, which leaves plain decoding."""

    def parts(self) -> list[tuple[nn.Module, str]]:
        """Returns each module with the prefix of its names in a checkpoint."""
        parts: list[tuple[nn.Module, str]] = [(self.target, "")]
        return parts if self.mtp is None else [*parts, (self.mtp, mtp_prefix(self.config))]


def build_model(config: Glm4MoeConfig, kernels: AnyBackend, *, with_mtp: bool) -> LoadedModel:
    """Returns modules whose weights have no memory yet."""
    target = Glm4MoeForCausalLM(config, kernels)
    return LoadedModel(config, target, MTPLayer(config, kernels) if with_mtp else None)


def load_model(
    index: CheckpointIndex,
    kernels: AnyBackend,
    *,
    with_mtp: bool = True,
    max_model_len: int | None = None,
    progress: Progress = silent,
) -> LoadedModel:
    """Builds and fills a checkpoint's model. Raises CheckpointError naming the tensor or file at fault.

    index: the checkpoint.
    kernels: the backend that will run the model.
    with_mtp: the MTP layer too, if the checkpoint has one; otherwise its tensors stay on disk.
    max_model_len: the most tokens of a sequence; None is what config.json allows.
    progress: hears of each tensor that is read, in bytes, then of each module whose matrices the kernels pack.
    """
    loaded = build_model(index.config, kernels, with_mtp=with_mtp and index.has_mtp_layer)
    store_fp8(loaded.parts(), index.scaled_modules().__contains__)
    for part, _ in loaded.parts():
        part.to_empty(device=kernels.device)
    ignored = ignored_names(index.config, with_mtp=with_mtp)
    _fill(_Slots(loaded), index.tensors, ignored, progress)
    prepare(loaded, kernels, index.config.max_position_embeddings if max_model_len is None else max_model_len, progress)
    return loaded


def prepare(loaded: LoadedModel, kernels: AnyBackend, max_positions: int, progress: Progress = silent) -> None:
    """Hands filled weights to the kernels and makes the decoders that run them. max_positions: the most tokens of a
    sequence."""
    modules = [module for part, _ in loaded.parts() for module in part.modules() if isinstance(module, Matrices)]
    for module in tracked(modules, "packing weights", progress):
        module.pack()
    rotary = RotaryEmbedding(loaded.config, max_positions, kernels.device)
    loaded.target.prepare(rotary)
    if loaded.mtp is not None:
        loaded.mtp.prepare(loaded.target, rotary)


def mtp_prefix(config: Glm4MoeConfig) -> str:
    """Returns what the names of the MTP layer's tensors begin with."""
    return f"model.layers.{config.num_hidden_layers}."


def ignored_names(config: Glm4MoeConfig, *, with_mtp: bool = True) -> re.Pattern[str]:
    """Returns a pattern of the tensors that are not loaded: the MTP layer's copies of embeddings and head (the target's
    serve both), or all of its tensors where it is not wanted, stored inverse frequencies, and a stored head where the
    embeddings are tied to it."""
    prefix, weight = re.escape(mtp_prefix(config)), rf"\.weight({SCALE_SUFFIX})?"
    names = [
        prefix + "embed_tokens" + weight,
        prefix + r"shared_head\.head" + weight,
        r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",
    ]
    if config.tie_word_embeddings:
        names.append("lm_head" + weight)
    if not with_mtp:
        names.append(prefix + ".*")
    return re.compile("|".join(names))


def index_tensors(folder: Path) -> dict[str, Path]:
    """Returns the shard of every tensor, by name, out of all *.safetensors files of the folder.

    The index decides where it names a tensor; shards that it forgot (GLM-4.7's mtp.safetensors) are
    scanned as well. Raises CheckpointError for the same unindexed tensor in two shards, and for faulty files.
    """
    shards = sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("."))
    if not shards:
        raise CheckpointError(f"{folder} holds no *.safetensors file")
    names = {shard: _tensor_names(shard) for shard in shards}
    indexed = _read_index(folder, names)
    found = dict(indexed)
    for shard, contained in names.items():
        for name in contained:
            if name in indexed:
                continue
            if name in found:
                raise CheckpointError(f"tensor {name} is in both {found[name].name} and {shard.name}")
            found[name] = shard
    return found


def _read_index(folder: Path, names: dict[Path, list[str]]) -> dict[str, Path]:
    path = folder / INDEX_NAME
    if not path.exists():
        return {}
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{path} has no weight_map object")
    contained = {shard.name: set(tensor_names) for shard, tensor_names in names.items()}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or shard not in contained:
            raise CheckpointError(f"{path} names the shard {shard!r}, which is missing")
        if name not in contained[shard]:
            raise CheckpointError(f"{path} places tensor {name} in {shard}, which does not hold it")
    return {name: folder / shard for name, shard in weight_map.items()}


def _tensor_names(shard: Path) -> list[str]:
    with _open(shard) as file:
        return list(file.keys())


def _open(shard: Path) -> safe_open:
    try:
        return safe_open(str(shard), framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{shard} is truncated or no safetensors file: {error}") from error


def read_tensors(tensors: dict[str, Path]) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, memory-mapped tensor) shard by shard; use each before asking for the next."""
    by_shard: dict[Path, list[str]] = {}
    for name, shard in tensors.items():
        by_shard.setdefault(shard, []).append(name)
    for shard, names in by_shard.items():
        log.debug("reading %s", shard)
        file, mapped = _open(shard), 0
        for name in names:
            if mapped >= REMAP_BYTES:
                file, mapped = _open(shard), 0
            tensor = file.get_tensor(name)
            mapped += tensor.nbytes
            yield name, tensor


class _Slots:
    """The weights that must be filled, and which of them have been."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.views: dict[str, Tensor] = {}
        self.covers: dict[str, list[str]] = {}  # fused name -> the per-expert names it stands for
        for root, prefix in loaded.parts():
            self.views |= iter_slots(root, prefix)
            for path, module in root.named_modules():
                if isinstance(module, Experts):
                    per_expert = module.slots(prefix + path)
                    for name, view in module.fused_slots(prefix + path).items():
                        self.views[name] = view
                        down = name.endswith(".down_proj")
                        self.covers[name] = [n for n in per_expert if (".down_proj." in n) == down]
        self.missing = set(self.views) - set(self.covers)

    def fill(self, name: str, tensor: Tensor) -> None:
        view = self.views[name]
        if name.endswith(SCALE_SUFFIX) and tensor.shape == (*view.shape, 1):
            tensor = tensor.squeeze(-1)
        if tensor.shape != view.shape:
            raise CheckpointError(
                f"tensor {name} has shape {list(tensor.shape)}, config.json asks for {list(view.shape)}"
            )
        _check_dtype(name, tensor, E4M3 if view.dtype == E4M3 else None)
        if name.endswith(SCALE_SUFFIX) and not (tensor.isfinite() & (tensor >= 0)).all():
            raise CheckpointError(f"tensor {name} holds a negative or infinite scale, or NaN")
        filled = self.covers.get(name, [name])
        if not self.missing.issuperset(filled):
            raise CheckpointError(f"tensor {name} repeats experts that are also stored one by one; keep one layout")
        view.copy_(tensor)
        self.missing.difference_update(filled)


def _check_dtype(name: str, tensor: Tensor, needed: torch.dtype | None) -> None:
    """Raises CheckpointError unless a tensor has the dtype that is needed; None: any plain one will do."""
    if needed is not None and tensor.dtype != needed:
        raise CheckpointError(
            f"tensor {name} has dtype {tensor.dtype}, but as {name}{SCALE_SUFFIX} is there {needed} is needed"
        )
    if needed is None and tensor.dtype == E4M3:
        raise CheckpointError(f"tensor {name} has dtype {E4M3}, and there is no {name}{SCALE_SUFFIX}: {SUPPORTED}")
    if needed is None and tensor.dtype not in FLOAT_DTYPES:
        raise CheckpointError(f"tensor {name} has dtype {tensor.dtype}, which is not supported: {SUPPORTED}")


@torch.no_grad()
def _fill(slots: _Slots, tensors: dict[str, Path], ignored: re.Pattern[str], progress: Progress) -> None:
    wanted, unexpected = {}, []
    for name, shard in tensors.items():
        if name in slots.views:
            wanted[name] = shard
        elif not ignored.fullmatch(name):
            unexpected.append(name)
    if unexpected:
        raise CheckpointError(_unexpected_message(unexpected))
    done, total = 0, sum(slots.views[name].nbytes for name in wanted)
    progress("loading weights", done, total)
    for name, tensor in read_tensors(wanted):
        slots.fill(name, tensor)
        done += slots.views[name].nbytes
        progress("loading weights", done, total)
    if slots.missing:
        raise CheckpointError(f"the checkpoint lacks {_listed(slots.missing)}")


def _unexpected_message(names: list[str]) -> str:
    if any(name.endswith(QUANTISED_SUFFIXES) for name in names):
        return f"the checkpoint holds {_listed(names)}, which are not supported: {SUPPORTED}"
    return f"the checkpoint holds {_listed(names)}, unknown to this architecture and config.json"


def _listed(names: set[str] | list[str], most: int = 5) -> str:
    shown = ", ".join(sorted(names)[:most])
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{len(names)} tensor{'s' * (len(names) > 1)}: {shown}{more}"

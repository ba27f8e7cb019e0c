"""Loads, from a model's name, everything that an engine is wired from: devices, dtypes, weights, cache."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdec.cache.pages import allocate_kv_cache, page_bytes
from specdec.config import MAX_SPECULATIVE_TOKENS, EngineConfig, SamplingParams, SpeculationParams
from specdec.errors import CheckpointError, KernelsUnavailableError, NotEnoughMemoryError, warn
from specdec.kernels import AnyBackend, select
from specdec.kernels.backend import CapturesGraphs
from specdec.kernels.flashinfer.requirements import missing
from specdec.kernels.fp8 import FP8_KINDS, Fp8Kind
from specdec.kernels.progress import Progress, silent
from specdec.model.config import DTYPES, Glm4MoeConfig, check_token_ids, parse_token_ids, read_json
from specdec.model.fp8 import store_fp8
from specdec.model.tokenizer import Tokenizer
from specdec.model.weights import CheckpointIndex, LoadedModel, build_model, load_model
from specdec.units import size_text

log = logging.getLogger(__name__)

DEFAULT_KV_CACHE_BYTES = 2 * 2**30
AUTO_GRAPHS = [1, 2, 3, 5, MAX_SPECULATIVE_TOKENS]  # draft lengths with CUDA graphs of their own; others are filled up
GIB = 2**30


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's small files, checked against each other; the weights stay on disk."""

    index: CheckpointIndex
    """Its configuration, and where its tensors are."""
    tokenizer: Tokenizer
    """Its tokenizer."""
    eos_token_ids: frozenset[int]
    """Tokens that end a text: generation_config.json's, which wins in transformers too, or else config.json's."""
    default_params: SamplingParams
    """What generation_config.json recommends."""
    ignored_recommendations: dict[str, object]
    """Recommended sampling settings that this engine does not have."""

    @property
    def folder(self) -> Path:
        """The checkpoint's folder."""
        return self.index.folder

    @property
    def config(self) -> Glm4MoeConfig:
        """The content of its config.json."""
        return self.index.config

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of `text`. Raises CheckpointError where the tokenizer gives one that the model does not
        have."""
        token_ids = self.tokenizer.encode(text)
        if token_ids and max(token_ids) >= self.config.vocab_size:
            raise CheckpointError(
                f"{self.folder / 'tokenizer.json'} gives token {max(token_ids)} for this text, the model's vocabulary "
                f"ends at {self.config.vocab_size - 1}: they do not belong together"
            )
        return token_ids


def open_checkpoint(folder: Path) -> Checkpoint:
    """Reads a checkpoint's small files. Raises CheckpointError for any file at fault."""
    index = CheckpointIndex.open(folder)
    path = folder / "generation_config.json"
    generation = read_json(path) if path.exists() else {}
    eos = parse_token_ids(generation.get("eos_token_id"), f"{path}: eos_token_id")
    check_token_ids(eos, index.config.vocab_size, f"{path}: eos_token_id")
    return Checkpoint(
        index=index,
        tokenizer=Tokenizer.from_folder(folder),
        eos_token_ids=frozenset(eos or index.config.eos_token_ids),
        default_params=_default_params(generation, path),
        ignored_recommendations={k: v for k, v in generation.items() if _NEUTRAL.get(k, v) != v},
    )


# Recommendations that would change the distribution and are not supported, with the value that changes nothing.
_NEUTRAL = {"typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "no_repeat_ngram_size": 0}
_RECOMMENDED = (
    "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
)  # fmt: skip


def _default_params(generation: dict[str, Any], path: Path) -> SamplingParams:
    fields = {name: generation[name] for name in _RECOMMENDED if generation.get(name) is not None}
    if generation.get("do_sample") is False:
        fields["temperature"] = 0.0
    try:
        return SamplingParams(**fields)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def resolve_device(device: str | torch.device) -> torch.device:
    """Returns a device; "auto" is CUDA where torch sees a device, else the CPU. Raises ValueError for any other
    kind."""
    try:
        if device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        resolved = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device = {device!r} is unknown: give 'auto', 'cpu' or 'cuda'") from error
    if resolved.type not in ("cpu", "cuda"):
        raise ValueError(f"device = {str(device)!r} is not supported: give 'auto', 'cpu' or 'cuda'")
    return resolved


WEIGHT_DTYPES = DTYPES | {"int8": torch.int8}
_LANGUAGES = {"reference": "plain torch", "cpu": "C++", "flashinfer": "CUDA"}  # of the backends


def resolve_dtype(
    dtype: str | torch.dtype, name: str = "dtype", choices: dict[str, torch.dtype] = WEIGHT_DTYPES
) -> torch.dtype:
    """Returns the dtype of a torch dtype or its name, other than "auto". Raises ValueError unless it is one of the
    choices.

    dtype: the dtype or its name.
    name: what the message calls it.
    choices: the dtypes that are allowed, by name.
    """
    if isinstance(dtype, torch.dtype) and dtype in choices.values():
        return dtype
    if isinstance(dtype, str) and dtype in choices:
        return choices[dtype]
    raise ValueError(f"{name} = {dtype!r} is unknown: choose one of auto, {', '.join(choices)}")


def check_num_threads(num_threads: int) -> None:
    """Raises ValueError for a number of threads that the machine does not have."""
    most = os.cpu_count() or 1
    if isinstance(num_threads, bool) or not isinstance(num_threads, Integral) or not 1 <= num_threads <= most:
        raise ValueError(f"num_threads = {num_threads!r} must be an integer from 1 to {most}, the machine's CPUs")


def resolve_backend(
    device: str | torch.device,
    dtype: str | torch.dtype,
    kernels: str,
    config: Glm4MoeConfig,
    progress: Progress = silent,
) -> AnyBackend:
    """Returns the backend that an engine with these arguments computes with. Raises as `specdec.kernels.select` does.

    device, kernels: as `Engine.from_pretrained` takes them.
    dtype: of matrices; "auto" is bfloat16 for an FP8 checkpoint, whose values it holds to 2^-9.
    config: the checkpoint's.
    progress: hears of a compilation.
    """
    automatic = None if config.quantization is None else torch.bfloat16
    wanted = automatic if dtype == "auto" else resolve_dtype(dtype)
    resolved = resolve_device("cpu" if device == "auto" and kernels == "cpu" else device)
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise KernelsUnavailableError(f"device = {str(device)!r} cannot be used: {missing()}")
    if resolved.type == "cpu" and device == kernels == "auto":
        log.info("auto: not flashinfer because torch sees no CUDA device")
    backend = select(resolved, wanted, kernels, config.dtype, progress=progress)
    weight_dtype = getattr(backend, "weight_dtype", backend.dtype)  # int8 is not a dtype that one computes in
    log.info("kernels: %s (%s), %s", backend.name, _LANGUAGES[backend.name], _name_of(weight_dtype))
    return backend


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Runtime:
    """Loaded model and cache."""

    model: LoadedModel
    """Target and MTP layer."""
    kv_cache: Tensor
    """[num_layers (+ 1 for the MTP layer), num_pages + scratch, 2, page_size, Hkv, D]: the cache."""
    max_model_len: int
    """The most tokens of a sequence, prompt and output."""

    @property
    def num_pages(self) -> int:
        """Pages that requests may have; the kernels' scratch pages come after them."""
        return self.kv_cache.shape[1] - self.model.target.kernels.num_scratch_pages


def load_runtime(
    checkpoint: Checkpoint,
    config: EngineConfig,
    backend: AnyBackend,
    kv_dtype: str | torch.dtype = "auto",
    progress: Progress = silent,
    *,
    with_mtp: bool = True,
) -> Runtime:
    """Checks that weights and cache fit into memory, then loads the ones and allocates the other.

    checkpoint: what to load.
    config: says how large the cache is.
    backend: what will compute.
    kv_dtype: of the cache; "auto" is the activations'.
    progress: hears of loading the weights and of capturing CUDA graphs.
    with_mtp: the MTP layer too, if the checkpoint has one; False where a drafter of the user's own drafts.

    Raises NotEnoughMemoryError, CheckpointError for a tensor at fault, ValueError for sizes that cannot be.
    """
    cache_dtype = backend.activation_dtype if kv_dtype == "auto" else resolve_dtype(kv_dtype, "kv_dtype", DTYPES)
    if cache_dtype not in backend.cache_dtypes:
        raise ValueError(f"kv_dtype = {cache_dtype}: kernels = {backend.name!r} know {backend.cache_dtypes}")
    max_model_len = _max_model_len(checkpoint.config, config)
    has_mtp = with_mtp and checkpoint.index.has_mtp_layer
    num_layers = checkpoint.config.num_hidden_layers + has_mtp
    bytes_per_page = page_bytes(checkpoint.config, num_layers, config.page_size, cache_dtype)
    num_pages = _num_pages(config, max_model_len, bytes_per_page) + backend.num_scratch_pages
    needed = {
        "weights": _weight_bytes_of(checkpoint.index, backend, has_mtp=has_mtp),
        "KV cache": num_pages * bytes_per_page,
    }
    _check_memory(needed, backend.device)
    log.info("loading %s of weights from %s", size_text(needed["weights"]), checkpoint.folder)
    start_s = time.perf_counter()
    model = load_model(checkpoint.index, backend, with_mtp=with_mtp, max_model_len=max_model_len, progress=progress)
    log.info("loaded the weights in %.1f s", time.perf_counter() - start_s)
    kv_cache = allocate_kv_cache(
        checkpoint.config, num_layers, num_pages, config.page_size, cache_dtype, backend.device
    )
    _log_cache(kv_cache, backend)
    runtime = Runtime(model, kv_cache, max_model_len)
    if config.cuda_graphs and isinstance(backend, CapturesGraphs):
        _capture_graphs(backend, runtime, config, progress, drafts=has_mtp or not with_mtp)
    return runtime


def _log_cache(kv_cache: Tensor, backend: AnyBackend) -> None:
    num_pages, page_size = kv_cache.shape[1] - backend.num_scratch_pages, kv_cache.shape[3]
    size, dtype = size_text(kv_cache.nbytes), _name_of(kv_cache.dtype)
    log.info(
        "KV cache: %d pages of %d tokens, %d tokens, %s in %s", num_pages, page_size, num_pages * page_size, size, dtype
    )


def _capture_graphs(
    backend: CapturesGraphs, runtime: Runtime, config: EngineConfig, progress: Progress, *, drafts: bool
) -> None:
    """Records CUDA graphs for the engine's default draft length; shorter drafts are padded to it. drafts: whether
    anything is drafted."""
    model, speculation = runtime.model, config.speculation or SpeculationParams()
    draft_lengths = AUTO_GRAPHS if speculation.automatic else [speculation.max_draft_tokens]
    mtp = None if model.mtp is None else model.mtp.decoder.prepared
    backend.capture(
        model.target.decoder.prepared,
        mtp,
        runtime.kv_cache,
        max_num_seqs=config.max_num_seqs,
        draft_lengths=[length for length in draft_lengths if length > 0] if drafts else [],
        max_model_len=runtime.max_model_len,
        progress=progress,
    )


def weight_bytes(
    config: Glm4MoeConfig,
    kernels: AnyBackend,
    with_mtp: bool,
    is_fp8: Callable[[str], bool] = lambda module: False,
    fp8_kinds: frozenset[Fp8Kind] = FP8_KINDS,
) -> int:
    """Returns the bytes of all weights, counted on modules without memory.

    config: the model's.
    kernels: says in which dtype weights are.
    with_mtp: whether the MTP layer's are counted.
    is_fp8: whether a module of this name is in FP8; scales are counted then.
    fp8_kinds: modules of other kinds are not in FP8, whatever `is_fp8` says.
    """
    model = build_model(config, kernels, with_mtp=with_mtp)
    store_fp8(model.parts(), is_fp8, fp8_kinds)
    parts = [part for part, _ in model.parts()]
    return sum(t.nbytes for part in parts for tensors in (part.parameters(), part.buffers()) for t in tensors)


def _weight_bytes_of(index: CheckpointIndex, kernels: AnyBackend, *, has_mtp: bool) -> int:
    """Returns the bytes of the weights as loaded. Warns if FP8 weights must be dequantised on this GPU and so take more
    memory than on disk."""
    config, is_fp8 = index.config, index.scaled_modules().__contains__
    loaded = weight_bytes(config, kernels, has_mtp, is_fp8, kernels.fp8)
    if kernels.device.type != "cpu" and loaded > (stored := weight_bytes(config, kernels, has_mtp, is_fp8)):
        what = "experts" if "linear" in kernels.fp8 else "linear layers and experts"
        warn(
            f"kernels={kernels.name!r} have no FP8 {what} on this device: they are dequantised to {kernels.dtype} as "
            f"they are loaded, {loaded / GIB:.1f} GiB of weights instead of {stored / GIB:.1f}"
        )
    return loaded


def _max_model_len(checkpoint: Glm4MoeConfig, config: EngineConfig) -> int:
    limit = checkpoint.max_position_embeddings
    if config.max_model_len is not None and config.max_model_len > limit:
        raise ValueError(f"max_model_len = {config.max_model_len} exceeds the checkpoint's {limit} positions")
    return limit if config.max_model_len is None else config.max_model_len


def _num_pages(config: EngineConfig, max_model_len: int, bytes_per_page: int) -> int:
    if config.num_pages is not None:
        return config.num_pages
    if config.kv_cache_bytes is not None:
        if config.kv_cache_bytes < bytes_per_page:
            raise ValueError(
                f"kv_cache_bytes = {config.kv_cache_bytes} is less than one page of {config.page_size} tokens, "
                f"{bytes_per_page} bytes"
            )
        return config.kv_cache_bytes // bytes_per_page
    wanted = config.max_num_seqs * -(-max_model_len // config.page_size)
    return max(1, min(wanted, DEFAULT_KV_CACHE_BYTES // bytes_per_page))


def _check_memory(needed: dict[str, int], device: torch.device) -> None:
    available = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory_bytes()
    if available is not None and sum(needed.values()) > available:
        parts = ", ".join(f"{name} {size / GIB:.1f} GiB" for name, size in needed.items())
        raise NotEnoughMemoryError(
            f"the model does not fit: {parts}, and {available / GIB:.1f} GiB of memory are available; "
            "choose dtype='bfloat16', a smaller kv_cache_bytes, or a machine with more memory"
        )


def available_memory_bytes() -> int | None:
    """Returns the bytes that can still be allocated on the host; None where the system does not tell."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None

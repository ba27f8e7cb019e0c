"""The C interface of src/api.cpp in ctypes: structures field by field, functions argument by argument.

The structures have the names, fields and order of those in src/, which `load_library` checks.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import POINTER, c_double, c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from time import perf_counter
from typing import ClassVar

from specdec.kernels.cpu.build import library_path
from specdec.kernels.cpu.layout import check_layout, library_layout
from specdec.kernels.progress import Progress, silent


class Matrix(ctypes.Structure):
    _fields_: ClassVar = [
        ("data", c_void_p), ("scales", c_void_p), ("bias", c_void_p), ("out", c_int64), ("in", c_int64),
        ("dtype", c_int32),
    ]  # fmt: skip


class MLP(ctypes.Structure):
    _fields_: ClassVar = [("gate_up", Matrix), ("down", Matrix)]


class Routing(ctypes.Structure):
    _fields_: ClassVar = [
        ("num_experts", c_int64), ("top_k", c_int64), ("n_group", c_int64), ("topk_group", c_int64),
        ("norm_topk_prob", c_int32), ("scaling", c_float),
    ]  # fmt: skip


class Cache(ctypes.Structure):
    _fields_: ClassVar = [
        ("data", c_void_p), ("dtype", c_int32), ("page_size", c_int64), ("kv_heads", c_int64), ("head_dim", c_int64),
    ]  # fmt: skip


class Batch(ctypes.Structure):
    _fields_: ClassVar = [
        ("num_sequences", c_int64), ("query_starts", c_void_p), ("kv_lens", c_void_p), ("page_starts", c_void_p),
        ("pages", c_void_p),
    ]  # fmt: skip


class Layer(ctypes.Structure):
    _fields_: ClassVar = [
        ("input_norm", c_void_p), ("post_attention_norm", c_void_p), ("q_norm", c_void_p), ("k_norm", c_void_p),
        ("qkv", Matrix), ("o", Matrix), ("mlp", MLP), ("experts", MLP), ("router", Matrix),
        ("correction_bias", c_void_p),
    ]  # fmt: skip


class Decoder(ctypes.Structure):
    _fields_: ClassVar = [
        ("embedding", c_void_p), ("embedding_dtype", c_int32), ("hidden", c_int64), ("heads", c_int64),
        ("kv_heads", c_int64), ("head_dim", c_int64), ("rotary_dim", c_int64), ("eps", c_float),
        ("cos_sin", c_void_p), ("enorm", c_void_p), ("hnorm", c_void_p), ("eh_proj", Matrix),
        ("layers", POINTER(Layer)), ("num_layers", c_int64), ("routing", Routing), ("norm", c_void_p),
    ]  # fmt: skip


class Forward(ctypes.Structure):
    _fields_: ClassVar = [
        ("rows", c_int64), ("input_ids", c_void_p), ("previous", c_void_p), ("batch", Batch), ("cache", Cache),
        ("layer_stride", c_int64), ("normed", c_void_p), ("unnormed", c_void_p), ("expert_ids", c_void_p),
    ]  # fmt: skip


class Sampling(ctypes.Structure):
    _fields_: ClassVar = [("rows", c_int64), ("reals", c_void_p), ("ints", c_void_p), ("seeds", c_void_p)]


class Edits(ctypes.Structure):
    _fields_: ClassVar = [
        ("num_biases", c_int64), ("bias_ids", c_void_p), ("biases", c_void_p), ("num_ends", c_int64),
        ("ends_banned", c_int64), ("ends", c_void_p), ("num_words", c_int64), ("word_starts", c_void_p),
        ("word_tokens", c_void_p), ("num_recent", c_int64), ("recent", c_void_p), ("num_counted", c_int64),
        ("counted_ids", c_void_p), ("counts", c_void_p), ("repetition", c_double), ("presence", c_double),
        ("frequency", c_double),
    ]  # fmt: skip


class DraftSampling(ctypes.Structure):
    _fields_: ClassVar = [
        ("rows", Sampling), ("min_confidence", c_void_p), ("prob_rows", c_void_p), ("probs", c_void_p),
        ("prob_steps", c_int64), ("edits", c_void_p),
    ]  # fmt: skip


class Chain(ctypes.Structure):
    _fields_: ClassVar = [
        ("pairs", Forward), ("steps", c_int64), ("counts", c_void_p), ("recycle_unnormed", c_int32),
        ("sampling", POINTER(DraftSampling)), ("drafts", c_void_p),
    ]  # fmt: skip


class Verification(ctypes.Structure):
    _fields_: ClassVar = [
        ("rows", Sampling), ("rules", c_void_p), ("first_rows", c_void_p), ("starts", c_void_p),
        ("prob_rows", c_void_p), ("drafts", c_void_p), ("draft_probs", c_void_p), ("prob_steps", c_int64),
        ("edits", c_void_p), ("raw", c_void_p), ("processed", c_void_p), ("tokens", c_void_p), ("num_tokens", c_void_p),
    ]  # fmt: skip


class Residuals(ctypes.Structure):
    _fields_: ClassVar = [
        ("num", c_int64), ("size", c_int64), ("p", c_void_p), ("q", c_void_p), ("scales", c_void_p), ("ints", c_void_p),
    ]  # fmt: skip


_P, _I, _T = c_void_p, c_int64, c_int32  # pointer, size, number of threads
_SIGNATURES: dict[str, list[type]] = {
    "sd_pack": [_P, c_int32, _I, _I, _P],
    "sd_linear": [_P, _P, _I, _P, _I, _T],
    "sd_rms_norm": [_P, _P, c_float, _I, _I, _P, _T],
    "sd_add_rms_norm": [_P, _P, _P, c_float, _I, _I, _P, _P, _T],
    "sd_rope": [_P, _I, _I, _I, _I, _P, _P, _I, _T],
    "sd_silu_and_mul": [_P, _I, _I, _P, _T],
    "sd_route": [_P, _P, _I, _P, _P, _P, _T],
    "sd_mlp": [_P, _P, _I, _P, _T],
    "sd_moe": [_P, _I, _P, _P, _P, _I, _I, _P, _T],
    "sd_append": [_P, _P, _P, _I, _I, _P, _I],
    "sd_attention": [_P, _P, _I, _P, _I, _P, _T],
    "sd_decode": [_P, _P, _T],
    "sd_draft_chain": [_P, _P, _P, _T],
    "sd_head_argmax": [_P, _P, _I, _P, _T],
    "sd_verify": [_P, _P, _P, _P, _T],
    "sd_edit": [_P, _P, _P, _P, _I, _I],
    "sd_softmax": [_P, _P, _I, _I, _P, _T],
    "sd_truncate": [_P, _P, _I, _T],
    "sd_choose": [_P, _P, _I, _P, _T],
    "sd_residual_mass": [_P, _P, _T],
    "sd_sample_residual": [_P, _P, _P, _T],
    "sd_uniforms": [_P, _I, _P, _P, _I, _P],
    "sd_read": [_P, _I, _P, _T],
}


def _structures() -> list[type[ctypes.Structure]]:
    return [value for value in globals().values() if isinstance(value, type) and issubclass(value, ctypes.Structure)]


def load_library(architecture: str, progress: Progress = silent) -> ctypes.CDLL:
    """Loads the library with every function declared, and compiles it first where need be.

    Raises KernelsUnavailableError as `library_path` does, AssertionError where a structure is not the library's.
    """
    library = ctypes.CDLL(str(library_path(architecture, progress)))
    check_layout(library_layout(library), _structures())
    for name, arguments in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = None, arguments
    return library


@dataclass
class NativeTime:
    """Time spent in the library."""

    seconds: float = 0.0
    """Seconds of all calls so far."""


class TimedLibrary:
    """The library's functions, each of which adds the seconds it takes to `time`."""

    def __init__(self, library: ctypes.CDLL, time: NativeTime) -> None:
        for name in _SIGNATURES:
            setattr(self, name, _timed(getattr(library, name), time))


def _timed(function: Callable[..., None], time: NativeTime) -> Callable[..., None]:
    def call(*arguments: object) -> None:
        start = perf_counter()
        function(*arguments)
        time.seconds += perf_counter() - start

    return call

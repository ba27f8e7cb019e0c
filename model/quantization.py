"""Reads config.json's quantization_config into an `Fp8Scheme`: which modules are in FP8.

One scheme is read, that of zai-org's FP8 checkpoints: compressed-tensors, format float-quantized, weights in
float8_e4m3fn with a scale per output channel, activations quantised per token as they come. Anything else is refused
with its name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from specdec.errors import CheckpointError

SCALE_SUFFIX = "_scale"  # of `X.weight`: `X.weight_scale`
SUPPORTED = (
    "of quantised weights those of linear layers and single experts in float8_e4m3fn are read, symmetric, with one "
    "scale per output channel, activations dynamic per token (compressed-tensors, format float-quantized); use such a "
    "checkpoint or the unquantised one"
)


@dataclass(frozen=True)
class Fp8Scheme:
    """Which modules of a checkpoint are in FP8. Modules are named as in the checkpoint, without `.weight`.

    A pattern is a name; "re:" and a regular expression that matches from a name's start; or a class, of which only
    "Linear" occurs, which experts count as too.
    """

    targets: tuple[str, ...]
    """Patterns of modules that are in FP8."""
    ignore: tuple[str, ...]
    """Patterns of modules that are not, whatever the targets say."""

    def covers(self, module: str) -> bool:
        """Returns whether a linear layer or an expert's projection of this name is in FP8."""
        return self._targets.match(module) and not self.ignores(module)

    def ignores(self, module: str) -> bool:
        """Returns whether `ignore` names this module."""
        return self._ignored.match(module)

    @cached_property
    def _targets(self) -> _Patterns:
        return _Patterns(self.targets)

    @cached_property
    def _ignored(self) -> _Patterns:
        return _Patterns(self.ignore)


class _Patterns:
    """Matches names; fast for the lists that spell out hundreds of them."""

    def __init__(self, patterns: tuple[str, ...]) -> None:
        self._names = frozenset(patterns)
        self._expressions = [re.compile(pattern[3:]) for pattern in patterns if pattern.startswith("re:")]

    def match(self, module: str) -> bool:
        named = module in self._names or "Linear" in self._names
        return named or any(expression.match(module) for expression in self._expressions)


# What zai-org's FP8 checkpoints of GLM-4.5 and its successors leave in bf16 of the modules that could be in FP8; their
# own lists spell out every name, those of norms and biases included. The MTP layer's other matrices are in FP8.
PUBLISHED = Fp8Scheme(targets=("Linear",), ignore=("lm_head", r"re:.*\.eh_proj$"))


def parse_quantization(raw: Mapping[str, Any] | None) -> Fp8Scheme | None:
    """Returns the scheme of a quantization_config; None where there is none. Raises CheckpointError naming what is not
    supported."""
    if raw is None:
        return None
    if not isinstance(raw, dict):
        raise CheckpointError(f"config.json: quantization_config = {raw!r} is not an object")
    _require(raw, "quantization_config", {"quant_method": "compressed-tensors", "format": "float-quantized"})
    _require(raw, "quantization_config", {"quantization_status": "compressed"}, optional=True)
    for key in ("kv_cache_scheme", "sparsity_config", "transform_config"):
        if raw.get(key):
            raise _unsupported(f"quantization_config.{key}", raw[key])
    groups = raw.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise _unsupported("quantization_config.config_groups", groups)
    targets = [target for name, group in groups.items() for target in _targets(group, f"config_groups.{name}")]
    return Fp8Scheme(tuple(targets), _names(raw.get("ignore") or [], "quantization_config.ignore"))


_WEIGHTS = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False}
_ACTIVATIONS = {"num_bits": 8, "type": "float", "strategy": "token", "symmetric": True, "dynamic": True}


def _targets(group: Any, where: str) -> tuple[str, ...]:
    """Returns the targets of one of config_groups. Raises CheckpointError where its scheme is not the supported one."""
    if not isinstance(group, dict):
        raise _unsupported(where, group)
    for part, expected in (("weights", _WEIGHTS), ("input_activations", _ACTIVATIONS)):
        if not isinstance(group.get(part), dict):
            raise _unsupported(f"{where}.{part}", group.get(part))
        _require(group[part], f"{where}.{part}", expected)
    _require(group, where, {"format": "float-quantized"}, optional=True)
    if group.get("output_activations"):
        raise _unsupported(f"{where}.output_activations", group["output_activations"])
    return _names(group.get("targets"), f"{where}.targets")


def _require(found: Mapping[str, Any], where: str, expected: dict[str, Any], *, optional: bool = False) -> None:
    for key, value in expected.items():
        if found.get(key) != value and not (optional and found.get(key) is None):
            raise _unsupported(f"{where}.{key}", found.get(key))


def _names(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise CheckpointError(f"config.json: {where} = {value!r} is not a list of names")
    for name in value:
        try:
            _Patterns((name,))
        except re.error as error:
            raise CheckpointError(f"config.json: {where}: {name!r} holds no regular expression: {error}") from error
    return tuple(value)


def _unsupported(where: str, value: Any) -> CheckpointError:
    return CheckpointError(f"config.json: {where} = {value!r} is not supported: {SUPPORTED}")

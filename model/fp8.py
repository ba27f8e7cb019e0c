"""Which matrices of a checkpoint are in FP8: decided by the scales that are there, and checked against config.json.

A module's matrices are stored together, so its projections are all in FP8 or none; the experts of a layer, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import nn

from specdec.errors import CheckpointError
from specdec.kernels.fp8 import FP8_KINDS, Fp8Kind
from specdec.model.config import Glm4MoeConfig
from specdec.model.layers import Matrices, iter_modules
from specdec.model.quantization import SCALE_SUFFIX


def scaled_modules(names: Iterable[str], config: Glm4MoeConfig) -> set[str]:
    """Returns the names (without `.weight`) of the modules whose matrices are in FP8: those that have scales.

    names: a checkpoint's tensors.
    config: its configuration.

    Raises CheckpointError where scales and quantization_config contradict each other.
    """
    suffix = f".weight{SCALE_SUFFIX}"
    scaled = {name.removesuffix(suffix) for name in names if name.endswith(suffix)}
    scheme = config.quantization
    if scheme is None:
        if scaled:
            raise CheckpointError(
                f"the checkpoint holds {min(scaled)}{suffix}, but config.json has no quantization_config: "
                "give the config.json that came with these weights"
            )
        return scaled
    if not scaled:
        raise CheckpointError(
            f"config.json has a quantization_config, but the checkpoint holds no *{suffix}: use the FP8 weights, or "
            "the config.json of the unquantised ones"
        )
    ignored = sorted(module for module in scaled if scheme.ignores(module))
    if ignored:
        raise CheckpointError(
            f"the checkpoint holds {ignored[0]}{suffix}, but quantization_config.ignore says that {ignored[0]} is not "
            "quantised: give the config.json that came with these weights"
        )
    return scaled


def store_fp8(
    parts: Iterable[tuple[nn.Module, str]],
    is_scaled: Callable[[str], bool],
    kinds: frozenset[Fp8Kind] = FP8_KINDS,
) -> None:
    """Makes modules hold FP8 whose projections are scaled. Call it on the meta device, before memory is allocated.

    parts: pairs of a module and the prefix of its names in the checkpoint.
    is_scaled: whether a projection of this name (without `.weight`) has scales.
    kinds: modules of other kinds are left as they are.

    Raises CheckpointError where only some of the projections that are stored together are scaled.
    """
    for root, prefix in parts:
        for module, slots in iter_modules(root, prefix):
            if not isinstance(module, Matrices) or module.fp8_kind not in kinds:
                continue
            projections = [name.removesuffix(".weight") for name in slots if name.endswith(".weight")]
            scaled = [name for name in projections if is_scaled(name)]
            if scaled and len(scaled) < len(projections):
                lacking = next(name for name in projections if name not in scaled)
                raise CheckpointError(
                    f"{scaled[0]} has a scale and {lacking} has none ({len(scaled)} of {len(projections)} have one): "
                    "what is stored together must be in FP8 together"
                )
            if scaled:
                module.store_fp8()

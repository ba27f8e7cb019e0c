"""Two engines in bf16 that choose different tokens: whether their roundings explain it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specdec import Engine, GenerationOutput
from specdec.step.batch import Extend, build_batch

UNIT = 2.0**-8  # the most that rounding to bf16 changes, relative
PER_LAYER = 11  # norm, qkv, rope, attention, output, sum; norm, gate and up, activation, down, sum


def relative_error(num_layers: int) -> float:
    """Of a hidden state in bf16: every rounding moves it by UNIT / sqrt(3) of its size at the most (root mean square of
    an even spread), independently of the others."""
    return UNIT * (PER_LAYER * num_layers / 3) ** 0.5


@dataclass
class Forced:
    hidden: Tensor  # [T, H]
    logits: Tensor  # [T, V]
    expert_ids: Tensor  # [layers, T, k]


@torch.inference_mode()
def teacher_forced(engine: Engine, token_ids: list[int]) -> Forced:
    model, cache = engine.runtime.model, engine.runtime.kv_cache
    size = cache.shape[3]
    batch = build_batch([Extend(token_ids, 0, list(range(-(-len(token_ids) // size))))], size)
    with model.target.decoder.traced() as runs:
        hidden = model.target(batch.input_ids, batch.metadata, torch.zeros_like(cache))
    found = hidden, model.target.compute_logits(hidden), runs[0].expert_ids
    return Forced(*(x.as_subclass(Tensor).cpu() for x in found))


def assert_near_tie(exact: Engine, context: list[int], one: int, other: int) -> None:
    """Two bf16 engines chose differently after `context`: one of them is wrong by no more than its roundings explain.

    Its hidden state is off by `relative_error` in a random direction, of which two tokens' logits feel the part along
    the difference of their rows: four standard deviations. The logits are rounded, too.
    """
    forced, head = teacher_forced(exact, context), exact.runtime.model.target.head
    logits, hidden = forced.logits[-1], forced.hidden[-1]
    felt = ((head[one] - head[other]).norm() * hidden.norm() / hidden.numel() ** 0.5).item()
    sizes = logits[one].abs().item() + logits[other].abs().item()
    bound = 4 * felt * relative_error(exact.checkpoint.config.num_hidden_layers) + UNIT * sizes
    margin = (logits[one] - logits[other]).abs().item()
    print(f"chose {one} and {other} at a margin of {margin:.3f}, at most {bound:.3f} by rounding")
    assert margin <= bound


def num_differing(exact: Engine, ours: list[GenerationOutput], theirs: list[GenerationOutput]) -> int:
    num = 0
    for a, b in zip(ours, theirs):
        assert len(a.token_ids) == len(b.token_ids)
        at = next((i for i, (x, y) in enumerate(zip(a.token_ids, b.token_ids)) if x != y), None)
        if at is not None:
            num += 1
            context = a.prompt_token_ids + a.token_ids[:at]
            assert_near_tie(exact, context, a.token_ids[at], b.token_ids[at])
    return num


def acceptance(outputs: list[GenerationOutput]) -> float:
    accepted = sum(o.stats.num_accepted_tokens for o in outputs)
    return accepted / sum(o.stats.num_draft_tokens for o in outputs)

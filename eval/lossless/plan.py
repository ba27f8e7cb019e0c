"""Chooses prompts, parameter combinations and seeds that suit a checkpoint."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import torch

from specdec import Engine, SamplingParams, SpeculationParams
from specdec.config import DraftMode, VerificationRule
from specdec.errors import CheckpointError
from specdec.eval.lossless.certificate import (
    MAX_SAMPLES,
    MIN_VOCAB_SIZE,
    NUM_ITERATIONS,
    RULES,
    LosslessOptions,
)
from specdec.eval.lossless.law import PlainTarget
from specdec.eval.prompts import load_stdlib
from specdec.kernels.progress import Progress, silent
from specdec.loading import open_checkpoint
from specdec.model.hub import resolve_model

PROMPT_TOKENS, RANDOM_PROMPT_TOKENS = 16, 4
POOLED_ELEMENTS, LAW_OVERHEAD = 2**31, 500  # probabilities that pooled e-processes read; cost of a row beside them


@dataclass(frozen=True)
class Combination:
    """Parameters of requests, and how their drafts are made."""

    name: str
    """A name for reports."""
    params: SamplingParams
    """The parameters, without seed and speculation."""
    draft_sampling: DraftMode = "sampled"
    """Whether drafts are drawn or argmaxes."""
    min_draft_confidence: float = 0.0
    """Confidence below which a step drafts no further."""

    def speculation(self, rule: str, num_tokens: int) -> SpeculationParams:
        """Returns the speculation of its requests, with this rule and draft length."""
        return SpeculationParams(
            num_tokens, cast(VerificationRule, rule), self.draft_sampling, self.min_draft_confidence
        )

    def described(self) -> dict[str, Any]:
        """Returns the parameters that are not defaults, as JSON."""
        ours, plain = asdict(self.params), asdict(SamplingParams())
        changed = {name: value for name, value in ours.items() if value != plain[name]}
        if "logit_bias" in changed:
            changed["logit_bias"] = {str(token): str(bias) for token, bias in self.params.biases}
        return changed | {"draft_sampling": self.draft_sampling, "min_draft_confidence": self.min_draft_confidence}


def combinations(vocab_size: int, probable: Seq[int], options: LosslessOptions) -> list[Combination]:
    """Returns eight combinations that together use every parameter which changes the distribution.

    vocab_size: the model's.
    probable: six tokens that are probable after a prompt.
    options: what to certify.
    """
    k, t = options.num_speculative_tokens, options.temperature
    least = NUM_ITERATIONS * (k + 1) + 1  # the first token comes without drafts, later ones at most k + 1 at a time
    plain = SamplingParams(max_tokens=least, temperature=t, ignore_eos=True)
    a, b, c, d, e, f = probable
    top_k = min(50, 3 * vocab_size // 4)
    # No output ends before it has had its iterations; those that may draft nothing get more of them.
    cautious = replace(plain, max_tokens=least + k + 1)
    ending = replace(plain, max_tokens=least + 2, min_tokens=least, stop_token_ids=(e,))
    return [
        Combination("plain", plain),
        Combination("top_k, top_p", replace(plain, temperature=0.7 * t, top_k=top_k, top_p=0.9)),
        Combination("min_p", replace(cautious, min_p=0.1), min_draft_confidence=0.2),
        Combination("logit_bias", replace(plain, logit_bias={a: -1.5, b: 2.0, c: -math.inf, d: 0.5})),
        Combination("repetition", replace(plain, repetition_penalty=1.3)),
        Combination("presence, frequency", replace(plain, presence_penalty=0.7, frequency_penalty=0.4)),
        Combination("bad_words, min_tokens", replace(ending, bad_words=((a,), (b, c), (d, b, f)))),
        Combination("greedy drafts", replace(cautious, temperature=1.2 * t), "greedy", min_draft_confidence=0.2),
    ]


@dataclass(frozen=True)
class Plan:
    """What the parts share. Sample i of a rule has combination i % C and prompt i // C % P, and its own seed."""

    options: LosslessOptions
    """What to certify."""
    engine: Engine
    """The engine that is certified."""
    prompts: list[list[int]]
    """The P prompts of the samples."""
    comparison_prompts: list[list[int]]
    """Prompts of the comparisons."""
    combinations: list[Combination]
    """The C parameter combinations."""

    @property
    def vocab_size(self) -> int:
        """The model's number of tokens."""
        return self.engine.checkpoint.config.vocab_size

    @property
    def longest(self) -> int:
        """The most tokens of a sample."""
        return max(c.params.max_tokens for c in self.combinations)

    def request(self, sample: int) -> tuple[int, int]:
        """Returns the numbers of a sample's combination and prompt."""
        return sample % len(self.combinations), sample // len(self.combinations) % len(self.prompts)

    def seed(self, rule: str, sample: int) -> int:
        """Returns the seed of a sample."""
        return (self.options.seed * len(RULES) + RULES.index(cast(VerificationRule, rule))) * MAX_SAMPLES + sample

    @property
    def num_pooled(self) -> int:
        """Samples of each rule that the pooled e-processes read."""
        laws = len(self.options.rules) * self.longest
        return min(self.options.samples, max(100, POOLED_ELEMENTS // (laws * (self.vocab_size + LAW_OVERHEAD))))


def make_plan(options: LosslessOptions, progress: Progress = silent) -> Plan:
    """Loads the engine, and finds prompts and parameters that suit it. Raises CheckpointError for a checkpoint that
    cannot be certified, ValueError for options that do not fit it."""
    checkpoint = open_checkpoint(resolve_model(options.model))
    vocab_size, k = checkpoint.config.vocab_size, options.num_speculative_tokens
    if not checkpoint.index.has_mtp_layer:
        raise CheckpointError(
            f"{checkpoint.folder} has no MTP layer: it does not speculate, there is nothing to certify"
        )
    if vocab_size < MIN_VOCAB_SIZE:
        raise CheckpointError(f"{checkpoint.folder}: vocab_size = {vocab_size} must be at least {MIN_VOCAB_SIZE}")
    longest = max(options.comparison_tokens, (NUM_ITERATIONS + 1) * (k + 1) + 1)
    max_num_seqs = options.max_num_seqs or max(16, min(256, 2**25 // (vocab_size * (k + 1))))
    engine = Engine.from_pretrained(
        checkpoint.folder, kernels=options.kernels, dtype=options.dtype, num_threads=options.num_threads,
        max_num_seqs=max_num_seqs, max_model_len=PROMPT_TOKENS + longest, progress=progress,
    )  # fmt: skip
    activations = engine.runtime.model.target.kernels.activation_dtype
    if activations not in (torch.float32, torch.float64):
        raise ValueError(
            f"dtype = {options.dtype!r} computes in {activations}, in which a distribution depends on the batch by "
            "about 1e-2: there is no exact one to compare with; choose dtype = 'float32'"
        )
    prompts = _prompts(engine, max(options.num_prompts, options.comparison_prompts), options.seed)
    logits = PlainTarget(engine, PROMPT_TOKENS).logits_after(prompts[0])
    probable = logits[0].topk(6).indices.tolist()
    chosen = combinations(vocab_size, probable, options)
    return Plan(options, engine, prompts[: options.num_prompts], prompts[: options.comparison_prompts], chosen)


def _prompts(engine: Engine, count: int, seed: int) -> list[list[int]]:
    """Returns starts of the `stdlib` texts; random tokens where the tokenizer does not know text."""
    texts = [p.prompt for p in load_stdlib()]
    try:
        found = [engine.checkpoint.encode(texts[(seed + i) % len(texts)])[:PROMPT_TOKENS] for i in range(count)]
    except CheckpointError:
        found = []
    if found and min(map(len, found)) == PROMPT_TOKENS and len({tuple(prompt) for prompt in found}) == count:
        return found
    generator = random.Random(seed)
    vocab_size = engine.checkpoint.config.vocab_size
    return [[generator.randrange(vocab_size) for _ in range(RANDOM_PROMPT_TOKENS)] for _ in range(count)]

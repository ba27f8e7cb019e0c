"""The greedy and the coupled part: outputs equal those of plain decoding alone."""

from __future__ import annotations

import math
import random
from dataclasses import asdict, dataclass, replace
from itertools import product

import torch

from specdec import Engine, GenerationOutput, SamplingParams, SpeculationParams
from specdec.eval.lossless.certificate import (
    BATCH_SIZES,
    DRAFT_LENGTHS,
    MAX_EXAMPLES,
    TEMPERATURES,
    TIE,
    Comparison,
    Difference,
    Failure,
)
from specdec.eval.lossless.law import PlainTarget, edited_logits, truncated_probs
from specdec.eval.lossless.plan import Plan
from specdec.kernels.philox import gumbel_noise
from specdec.kernels.progress import Progress
from specdec.request.seeds import Stream


@dataclass(frozen=True)
class Case:
    """A request, whose output plain decoding alone decides."""

    name: str
    """The parameter combination's name."""
    prompt: list[int]
    """Its prompt."""
    params: SamplingParams
    """Its parameters, without speculation."""


def greedy_cases(plan: Plan) -> list[Case]:
    """Returns every prompt with the plain combination, and with each that changes the argmax, at temperature 0."""
    length = plan.options.comparison_tokens
    chosen = [
        c for c in plan.combinations if c.params.penalises or c.params.biases or c.params.bad_words or c.name == "plain"
    ]
    return [
        Case(c.name, prompt, _lengthened(replace(c.params, temperature=0.0), length))
        for prompt in plan.comparison_prompts
        for c in chosen
    ]


def coupled_cases(plan: Plan) -> list[Case]:
    """Returns every combination with `comparison_seeds` seeds, at temperatures that take turns."""
    length, prompts = plan.options.comparison_tokens, plan.comparison_prompts
    cases = []
    for number, (c, _) in enumerate(product(plan.combinations, range(plan.options.comparison_seeds))):
        params = replace(c.params, temperature=TEMPERATURES[number % len(TEMPERATURES)])
        params = replace(_lengthened(params, length), seed=plan.options.seed + number)
        cases.append(Case(c.name, prompts[number % len(prompts)], params))
    return cases


def _lengthened(params: SamplingParams, length: int) -> SamplingParams:
    return replace(params, max_tokens=length, min_tokens=length // 2 if params.min_tokens else 0)


def compare(
    plan: Plan, part: str, cases: list[Case], speculations: list[SpeculationParams], progress: Progress
) -> tuple[Comparison, list[Failure]]:
    """Compares every case with every draft length, in batches in random order, with plain decoding alone. Each such
    output has one of the batch sizes, and one of the `speculations` with its draft length, at random.

    plan: what the parts share.
    part: the part's name.
    cases: the requests.
    speculations: parameters to draw from; their draft lengths are replaced.
    progress: hears of plain decoding and of the comparison.
    """
    # 1) Plain decoding, each request alone.
    engine, generator = plan.engine, random.Random(plan.options.seed)
    off = replace(speculations[0], num_speculative_tokens=0)
    plain: list[list[int]] = []
    for case in cases:
        progress(f"{part}, plain decoding", len(plain), len(cases))
        plain.append(engine.generate([case.prompt], replace(case.params, speculation=off))[0].token_ids)
    # 2) Which output has which draft length, speculation and batch size.
    jobs: dict[int, list[tuple[int, SpeculationParams]]] = {size: [] for size in BATCH_SIZES}
    for n, k in product(range(len(cases)), DRAFT_LENGTHS):
        speculation = replace(generator.choice(speculations), num_speculative_tokens=k)
        jobs[generator.choice(BATCH_SIZES)].append((n, speculation))
    # 3) The same requests with speculation, in batches.
    done, differences, tokens, drafts, accepted = 0, [], 0, 0, 0
    for size, of_size in jobs.items():
        generator.shuffle(of_size)
        for start in range(0, len(of_size), size):
            progress(f"{part} comparison", done, len(cases) * len(DRAFT_LENGTHS))
            batch = of_size[start : start + size]
            params = [replace(cases[n].params, speculation=speculation) for n, speculation in batch]
            outputs = engine.generate([cases[n].prompt for n, _ in batch], params)
            done += len(batch)
            tokens += sum(len(output.token_ids) for output in outputs)
            drafts += sum(output.stats.num_drafts for output in outputs)
            accepted += sum(output.stats.num_accepted_tokens for output in outputs)
            for (n, speculation), output in zip(batch, outputs):
                if output.token_ids != plain[n]:
                    differences.append(_difference(plan, cases[n], speculation, size, plain[n], output))
    # 4) Only rounding may explain a difference, and on row-invariant kernels nothing may.
    tie = 0.0 if engine.runtime.model.target.kernels.name != "reference" else TIE
    unexplained = [d for d in differences if d.margin is None or d.margin > tie or tie == 0]
    comparison = Comparison(
        cases=len(cases),
        outputs=done,
        tokens=tokens,
        draft_lengths=DRAFT_LENGTHS,
        batch_sizes=BATCH_SIZES,
        mean_acceptance_length=1 + accepted / drafts if drafts else None,
        tie=tie,
        different=len(differences),
        unexplained=len(unexplained),
        largest_margin=max((d.margin for d in differences if d.margin is not None), default=0.0),
        examples=(unexplained + [d for d in differences if d not in unexplained])[:MAX_EXAMPLES],
    )
    return comparison, [_failure(part, d, tie) for d in unexplained[:MAX_EXAMPLES]]


def _failure(part: str, d: Difference, tie: float) -> Failure:
    why = "nothing explains it" if d.margin is None else f"the margin is {d.margin:.3g}, {tie:g} would be rounding"
    message = f"{d.case}: token {d.token} instead of {d.plain_token} at output position {d.position}; {why}"
    return Failure(part, message, asdict(d))


def _difference(
    plan: Plan, case: Case, speculation: SpeculationParams, size: int, plain: list[int], output: GenerationOutput
) -> Difference:
    ours, params = output.token_ids, case.params
    same = next((i for i, (a, b) in enumerate(zip(plain, ours)) if a != b), min(len(plain), len(ours)))
    a, b = (tokens[same] if same < len(tokens) else -1 for tokens in (plain, ours))
    margin = None if -1 in (a, b) else margin_of(plan.engine, case.prompt, plain[:same], params, a, b)
    return Difference(
        case.name, case.prompt, params.seed, asdict(speculation), size, position=same, plain_token=a, token=b,
        margin=margin,
    )  # fmt: skip


def margin_of(
    engine: Engine, prompt: list[int], output: list[int], params: SamplingParams, a: int, b: int
) -> float | None:
    """Returns how far the scores of tokens a and b lie apart after prompt and output, in units of the largest logit;
    None where one of them is impossible. Scores are logits at temperature 0, else log-probabilities with the noise of
    coupled verification."""
    logits = PlainTarget(engine, len(prompt) + len(output)).logits_after(prompt + output)
    z = edited_logits(logits, prompt, torch.tensor([output], dtype=torch.int64), params)
    scores, scale = z[0], logits.abs().max() / (params.temperature or 1.0)
    if not params.greedy:
        p, rounded = truncated_probs(z, params)
        if not rounded:
            scores = scores.masked_fill(p[0] == 0, -math.inf)
        at = len(prompt) + len(output)
        noise = gumbel_noise([params.seed or 0], [Stream.TARGET], [at], [0], z.shape[1])
        scores = scores + torch.from_numpy(noise[0])
    if not scores[[a, b]].isfinite().all():
        return None
    return float((scores[a] - scores[b]).abs() / scale)

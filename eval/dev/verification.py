"""Measures what verification itself costs: from logits to tokens, by rule and parameters.

    python -m specdec.eval.dev.verification [--model bundled] [--batch-size 16] [-k 3] [--vocab-size 151552] [--json]

Two tables, medians of many: the share of an engine step at a batch size (all threads), and milliseconds per row of
logits with a large vocabulary on one thread, logits drawn at random with a standard deviation of 4. What a verification
takes beyond its forward and its logits is the difference of three timings of the same rows.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from specdec import Engine, SamplingParams, SpeculationParams
from specdec.config import VerificationRule as Rule
from specdec.eval.calls import Method, timed_calls, wrapped
from specdec.kernels import AnyBackend, AttentionMetadata, RoutingConfig
from specdec.kernels.data import DecoderShape, DecoderWeights
from specdec.kernels.decisions import Drafts, RowSampling, VerifyBatch
from specdec.request.logit_edits import RequestEdits
from specdec.request.seeds import Stream
from specdec.step.verify import RULES as RULE_NUMBERS

RULES: tuple[Rule, ...] = ("coupled", "token", "block")
PARAMETERS: dict[str, dict[str, Any]] = {
    "temperature 0.8": {},
    "and top_k 50, top_p 0.95, min_p 0.05": {"top_k": 50, "top_p": 0.95, "min_p": 0.05},
    "and three penalties": {"repetition_penalty": 1.1, "presence_penalty": 0.2, "frequency_penalty": 0.1},
}
MAX_TOKENS, NUM_STEPS, NUM_REPEATS = 128, 12, 15
HIDDEN_SIZE, PROMPT_TOKENS, LOGIT_STD = 32, 300, 4.0  # sizes of the single iteration with a large vocabulary


@dataclass(frozen=True)
class Share:
    """The share of a step that verification takes."""

    rule: str
    """The verification rule."""
    parameters: str
    """The sampling parameters, in words."""
    step_s: float
    """Median seconds of a step."""
    verification_s: float
    """Median seconds of its part from logits to tokens."""


@dataclass(frozen=True)
class RowCost:
    """The cost of one row of logits."""

    rule: str
    """The verification rule."""
    parameters: str
    """The sampling parameters, in words."""
    row_s: float
    """Median seconds per row of logits, for one iteration of k drafts."""


def timed(run: Callable[[], object]) -> float:
    """Returns the seconds of a call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@dataclass(frozen=True)
class Call:
    """One call of `Backend.verify`, to be made again; `kernels` is the backend, the other fields are its arguments."""

    kernels: AnyBackend
    decoder: Any
    head: Any
    input_ids: list[int]
    metadata: AttentionMetadata
    kv_cache: Tensor
    verification: VerifyBatch

    def decision_s(self) -> float:
        """Returns the median seconds beyond the forward and the logits of the rows that decide."""
        v, k = self.verification, self.kernels
        forward = (self.decoder, self.head, self.input_ids, self.metadata, self.kv_cache)
        hidden = k.verify(*forward, v).hidden
        rows = hidden[[first + i for first, n in zip(v.first_rows, v.drafts.counts) for i in range(n + 1)]]
        runs = (
            partial(k.verify, *forward, v),
            partial(k.verify, *forward, NOTHING),
            partial(k.compute_logits, rows, self.head),
        )
        times = [[timed(run) for run in runs] for _ in range(NUM_REPEATS)]
        whole, without, logits = map(statistics.median, zip(*times))
        return whole - without - logits


NO_ROWS = RowSampling([], [], [], [], [], [], [], [])
NOTHING = VerifyBatch([], Drafts.of([]), [], NO_ROWS, [])


def shares(model: str, batch_size: int, k: int) -> list[Share]:
    """Times steps as they run, and their decisions by making some of their calls again.

    model: the checkpoint.
    batch_size: requests of a step.
    k: drafts of each.
    """
    engine = Engine.from_pretrained(model, max_num_seqs=batch_size, prefix_caching=False)
    decoder, kernels = engine.runtime.model.target.decoder, engine.runtime.model.target.kernels
    prompts = [f"def f{i}(x):\n" for i in range(batch_size)]
    calls: list[Call] = []

    def recorded(verify: Method) -> Method:
        def call(*arguments: Any) -> Any:
            calls.append(Call(kernels, decoder.prepared, *arguments))
            return verify(*arguments)

        return call

    found = []
    for rule in RULES:
        for name, fields in PARAMETERS.items():
            params = SamplingParams(temperature=0.8, max_tokens=MAX_TOKENS, ignore_eos=True, **fields)
            params = replace(params, speculation=SpeculationParams(k, rule))
            calls.clear()
            with wrapped(decoder, "verify", recorded), timed_calls(engine.core, "step") as steps:
                engine.generate(prompts, [replace(params, seed=seed) for seed in range(batch_size)])
            full = [call for call in calls if len(call.verification.rules) == batch_size]
            decisions = [call.decision_s() for call in full[:: max(1, len(full) // NUM_STEPS)]]
            found.append(Share(rule, name, statistics.median(steps), statistics.median(decisions)))
    return found


def row_costs(kernels: AnyBackend, vocab_size: int, k: int) -> list[RowCost]:
    """Times decisions after a decoder without layers and a head drawn at random; every draft is accepted, so that all
    rows are needed."""
    torch.set_num_threads(1)
    found = []
    for rule in RULES:
        for name, fields in PARAMETERS.items():
            params = SamplingParams(temperature=0.8, **fields)
            call = _one_iteration(kernels, vocab_size, k, rule, params)
            found.append(RowCost(rule, name, call.decision_s() / (k + 1)))
    return found


def _one_iteration(kernels: AnyBackend, vocab_size: int, k: int, rule: Rule, params: SamplingParams) -> Call:
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn(k + 1, HIDDEN_SIZE, generator=generator).to(kernels.dtype)
    head = torch.randn(vocab_size, HIDDEN_SIZE, generator=generator) * LOGIT_STD / HIDDEN_SIZE**0.5
    routing = RoutingConfig(1, 1, 1, True, 1.0)
    shape = DecoderShape(1, 1, HIDDEN_SIZE, 1e-5, 1, routing)
    weights = DecoderWeights(shape, embedding, None, (), torch.ones(HIDDEN_SIZE), torch.zeros(1, HIDDEN_SIZE))
    prompt = torch.randint(vocab_size, (PROMPT_TOKENS,), generator=generator).tolist()
    edits = RequestEdits.of(params, (), frozenset(), prompt)
    scale, top_k, top_p, min_p = params.row_law
    verification = VerifyBatch(
        first_rows=[0],
        drafts=Drafts([[0] * k], [0], torch.full((1, k, vocab_size), 1 / vocab_size)),
        rules=[RULE_NUMBERS[rule]],
        rows=RowSampling([scale], [top_k], [top_p], [min_p], [1], [Stream.TARGET], [PROMPT_TOKENS], [0]),
        edits=[None if edits is None else edits.current],
    )
    call = Call(
        kernels, kernels.prepare(weights), kernels.pack(head.to(kernels.dtype)), list(range(k + 1)),
        AttentionMetadata([k + 1], [k + 1], [[0]], k + 1), torch.zeros(1, 1, 2, k + 1, 1, HIDDEN_SIZE), verification,
    )  # fmt: skip
    for _ in range(k + 1):  # until the drafts are what it emits
        forward = (call.decoder, call.head, call.input_ids, call.metadata, call.kv_cache)
        emitted = kernels.verify(*forward, verification).token_ids[0]
        verification.drafts.token_ids[0][: len(emitted)] = emitted[:k]
    assert len(emitted) == k + 1, "a draft is not accepted"
    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("-k", "--num-speculative-tokens", type=int, default=3)
    parser.add_argument("--vocab-size", type=int, default=151_552)
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of tables")
    args = parser.parse_args()
    of_steps = shares(args.model, args.batch_size, args.num_speculative_tokens)
    kernels = Engine.from_pretrained(args.model).runtime.model.target.kernels
    of_rows = row_costs(kernels, args.vocab_size, args.num_speculative_tokens)
    if args.json:
        print(json.dumps({"steps": [vars(s) for s in of_steps], "rows": [vars(r) for r in of_rows]}, indent=2))
        return
    print(f"| rule | parameters | step, batch {args.batch_size}, us | logits to tokens, us | share |")
    print("|---|---|---|---|---|")
    for s in of_steps:
        share = s.verification_s / s.step_s
        print(f"| {s.rule} | {s.parameters} | {s.step_s * 1e6:.0f} | {s.verification_s * 1e6:.0f} | {share:.1%} |")
    print(f"\n| rule | parameters | ms per row, vocabulary {args.vocab_size:,}, one thread |\n|---|---|---|")
    for r in of_rows:
        print(f"| {r.rule} | {r.parameters} | {r.row_s * 1e3:.2f} |")


if __name__ == "__main__":
    main()

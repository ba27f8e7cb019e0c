"""Draft lengths on a simulated clock: real sequences and controllers, drawn acceptances, costs by a table."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from specdec import SamplingParams, SpeculationParams
from specdec.auto_length.controller import AutoDraftLength
from specdec.config import MAX_SPECULATIVE_TOKENS
from specdec.cost import CostTable
from specdec.kernels.data import HiddenRows
from specdec.request.sequence import Sequence
from specdec.request.text import OutputText
from specdec.step.draft_length import DraftLength
from specdec.step.scheduler import ScheduledSequence

Law = Callable[[int, int, int], float]  # request number, its output tokens, draft position -> conditional acceptance
HIDDEN = HiddenRows(torch.zeros(1, 1), 0, 1)

# Seconds of the bundled checkpoint's parts on two cores, and of a larger one that is read from memory at small batches.
BUNDLED = CostTable(
    {1: 0.45e-3, 2: 0.46e-3, 4: 0.51e-3, 8: 0.73e-3, 16: 1.4e-3, 32: 2.4e-3, 64: 4.4e-3, 128: 8.6e-3, 256: 16e-3},
    {1: 0.1e-3, 2: 0.11e-3, 4: 0.13e-3, 8: 0.18e-3, 16: 0.25e-3, 32: 0.33e-3, 64: 0.6e-3, 128: 1.0e-3, 512: 2.9e-3},
    {1: 0.08e-3, 4: 0.1e-3, 8: 0.14e-3, 16: 0.2e-3, 64: 0.5e-3},
    5e-6,
)
MEDIUM = CostTable(
    {1: 9.5e-3, 2: 13.7e-3, 4: 19.5e-3, 8: 28.4e-3, 16: 40e-3, 32: 55e-3, 64: 82e-3, 96: 108e-3},
    {1: 2.0e-3, 4: 2.3e-3, 8: 2.6e-3, 16: 3.2e-3, 32: 4.2e-3, 64: 7.1e-3, 96: 9.6e-3},
    {1: 1.9e-3, 8: 2.4e-3, 16: 3.0e-3, 64: 7.0e-3},
)
GPU = CostTable({1: 20e-3, 64: 22e-3, 144: 26e-3, 256: 40e-3}, {1: 0.6e-3, 256: 1.2e-3}, {1: 0.5e-3, 64: 0.6e-3})


@dataclass
class Simulation:
    """A batch that stays full: requests of `length` tokens each, one after another."""

    table: CostTable
    law: Law
    batch_size: int
    length: int = 1000
    prompt: int = 16
    seed: int = 0
    now_s: float = 0.0
    num_tokens: int = 0
    num_requests: int = 0
    lengths: list[int] = field(default_factory=lambda: [0] * (MAX_SPECULATIVE_TOKENS + 1))

    def clock(self) -> float:
        return self.now_s

    def auto(self) -> AutoDraftLength:
        return AutoDraftLength(lambda _: self.table, self.clock)

    def run(self, controller: DraftLength, num_tokens: int, k: int | str = "auto") -> float:
        """Tokens per second."""
        controller.prepare()
        rng = random.Random(self.seed)
        start_s, start = self.now_s, self.num_tokens
        running: list[tuple[int, Sequence]] = []
        while self.num_tokens - start < num_tokens:
            running = [entry for entry in running if len(entry[1].token_ids) < entry[1].max_total_tokens]
            while len(running) < self.batch_size:
                running.append((self.num_requests, self._sequence(k)))
                self.num_requests += 1
            self._step(controller, running, rng)
        return (self.num_tokens - start) / (self.now_s - start_s)

    def _sequence(self, k: int | str) -> Sequence:
        params = SamplingParams(max_tokens=self.length, temperature=0)
        sequence = Sequence(
            f"r{self.num_requests}", [1] * self.prompt, params, SpeculationParams(k), 0, self.prompt + self.length,
            frozenset(), OutputText(None, params),
        )  # fmt: skip
        sequence.arrival = self.num_requests
        sequence.token_ids.append(1)
        sequence.num_computed_tokens = self.prompt
        sequence.pending_hidden = [HIDDEN] if sequence.speculates else []
        return sequence

    def _step(self, controller: DraftLength, running: list[tuple[int, Sequence]], rng: random.Random) -> None:
        limits = [min(s.speculation.max_draft_tokens, s.max_total_tokens - len(s.token_ids) - 1) for _, s in running]
        scheduled = controller.choose([ScheduledSequence(s, 1, k) for (_, s), k in zip(running, limits)])
        extends = [s.extends_mtp for s in scheduled]
        counts = [s.num_draft_tokens for s in scheduled]
        assert all(k <= limit for k, limit in zip(counts, limits))
        self.now_s += self.table.seconds(
            len(running),
            len(running) + sum(counts),
            sum(s.sequence.num_pending_pairs for s, extended in zip(scheduled, extends) if extended),
            [sum(k > depth for k in counts) for depth in range(MAX_SPECULATIVE_TOKENS)],
        )
        outputs = []
        for (number, s), k, extended in zip(running, counts, extends):
            accepted = 0
            while accepted < k and rng.random() < self.law(number, s.num_output_tokens, accepted):
                accepted += 1
            if extended:
                s.num_mtp_tokens = s.num_computed_tokens
            s.num_computed_tokens += accepted + 1
            s.token_ids += [1] * (accepted + 1)
            outputs.append([1] * (accepted + 1))
            self.num_tokens += accepted + 1
            self.lengths[k] += 1
        controller.record(scheduled, [[1] * k for k in counts], outputs)


def expected_rate(table: CostTable, batch_size: int, k: int, alphas: list[float]) -> float:
    """Tokens per second of one K in the long run, at constant conditional acceptances."""
    length, survival = 1.0, 1.0
    for alpha in alphas[:k]:
        survival *= alpha
        length += survival
    return table.predict(batch_size, k, length)

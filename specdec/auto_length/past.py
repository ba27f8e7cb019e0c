"""Remembers what earlier steps have shown of the requests: acceptance, draft lengths, probes."""

from __future__ import annotations

import statistics
from collections.abc import Sequence as Seq

from specdec.auto_length.acceptance import EngineAcceptance, RequestAcceptance
from specdec.auto_length.plan import RequestState, StepPlan


class Past:
    """The state of each request that the last decision was for, and of all requests together."""

    def __init__(self) -> None:
        self._engine = EngineAcceptance()
        self._requests: dict[int, RequestState] = {}  # by arrival
        self._usual_length = 0

    def known(self, arrivals: Seq[int], step: int) -> list[RequestState]:
        """Returns the state of these requests, creating that of new ones and dropping that of all others.

        arrivals: `Sequence.arrival` of each request.
        step: the number of this step, counted by the engine.
        """
        before = self._requests
        self._requests = {arrival: before.get(arrival) or RequestState(RequestAcceptance(step)) for arrival in arrivals}
        return list(self._requests.values())

    def survivals(self, requests: Seq[RequestState], step: int) -> list[list[float]]:
        """Returns the probability, by request and by position, that this draft and all before it are accepted."""
        rates, weight = self._engine.rates(), self._engine.prior_weight(r.acceptance for r in requests)
        return [request.acceptance.survivals(rates, weight, step) for request in requests]

    def carried_over(self, requests: Seq[RequestState]) -> list[int]:
        """Returns the last lengths of these requests; those that had none draft as most of the others do."""
        return [self._usual_length if request.length is None else request.length for request in requests]

    def keep(self, requests: Seq[RequestState], lengths: Seq[int], limits: Seq[int]) -> None:
        """Remembers the lengths that were chosen.

        requests: the state of each request.
        lengths: [n], the chosen draft lengths.
        limits: [n], the most drafts that each request might have had; one without a choice, 0, keeps its old length.
        """
        for request, k, limit in zip(requests, lengths, limits):
            if limit > 0:
                request.length = k
        known = [request.length for request in requests if request.length is not None]
        if known:
            self._usual_length = statistics.mode(known)

    def record(self, plan: StepPlan, drafts: Seq[Seq[int]], output_token_ids: Seq[Seq[int]]) -> None:
        """Counts which drafts of a step were accepted.

        plan: what was decided about the step.
        drafts: drafts[b] is what sequence b drafted.
        output_token_ids: output_token_ids[b] is what sequence b emitted.
        """
        for b, request in zip(plan.members, plan.requests):
            num_drafted, num_accepted = len(drafts[b]), len(output_token_ids[b]) - 1
            if num_drafted:
                self._engine.counts.record(num_drafted, num_accepted)
                request.acceptance.counts.record(num_drafted, num_accepted)

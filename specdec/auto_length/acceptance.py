"""How often drafts are accepted, estimated from the past: by draft position, for the engine and for each request."""

from __future__ import annotations

from collections.abc import Iterable

from specdec.config import MAX_SPECULATIVE_TOKENS

FIRST_GUESS = 0.7  # acceptance that is assumed before anything is known
POSITION_WEIGHT = 4.0  # verified drafts that the position before counts for
ENGINE_MEMORY, REQUEST_MEMORY = 128.0, 48.0  # verified drafts after which one counts for 1/e
MIN_PRIOR_WEIGHT, MAX_PRIOR_WEIGHT = 4.0, 48.0  # verified drafts of a request that the engine's rate counts for
REQUEST_MEMORY_STEPS = 512.0  # steps after which what a request has shown counts for 1/e

MIN_SHOWN = 6.0  # verified drafts of a request that say something about how requests differ
OPTIMISM = 0.8  # standard deviations: a draft that is wrongly left out is not observed, one wrongly taken is
OWN_SHARE = 0.5  # share of a request's difference from the engine at one position that is expected at the next


class Counts:
    """Verified drafts by position: how many were reached (all drafts before them were accepted), and how many of these
    were accepted. The older a draft, the less it counts."""

    def __init__(self, memory: float) -> None:
        """memory: verified drafts after which one counts for 1/e."""
        self.keep = 1 - 1 / memory
        self.reached = [0.0] * MAX_SPECULATIVE_TOKENS
        self.accepted = [0.0] * MAX_SPECULATIVE_TOKENS

    def record(self, num_drafted: int, num_accepted: int) -> None:
        """Counts one verification."""
        for position in range(min(num_drafted, num_accepted + 1)):
            self.reached[position] = self.keep * self.reached[position] + 1
            self.accepted[position] = self.keep * self.accepted[position] + (position < num_accepted)

    def fade(self, factor: float) -> None:
        """Multiplies all counts by `factor`."""
        self.reached = [factor * n for n in self.reached]
        self.accepted = [factor * n for n in self.accepted]


class EngineAcceptance:
    """Acceptance of all requests together, which is where the estimate of each one starts."""

    def __init__(self) -> None:
        self.counts = Counts(ENGINE_MEMORY)

    def rates(self) -> list[float]:
        """Returns the conditional acceptance by position; one that was hardly reached resembles the one before it."""
        rate, rates = FIRST_GUESS, []
        for reached, accepted in zip(self.counts.reached, self.counts.accepted):
            rate = (POSITION_WEIGHT * rate + accepted) / (POSITION_WEIGHT + reached)
            rates.append(rate)
        return rates

    def prior_weight(self, requests: Iterable[RequestAcceptance]) -> float:
        """Returns how many of a request's own verified drafts weigh as much as the engine's rate.

        They are few where requests differ in the acceptance of first drafts by more than chance, many where they do not
        (the method of moments for a beta-binomial distribution).
        """
        shown = [(r.counts.accepted[0], r.counts.reached[0]) for r in requests if r.counts.reached[0] >= MIN_SHOWN]
        if len(shown) < 2:
            return MIN_PRIOR_WEIGHT
        rates = [accepted / reached for accepted, reached in shown]
        mean = sum(rates) / len(rates)
        chance = mean * (1 - mean)
        spread = sum((rate - mean) ** 2 for rate in rates) / (len(rates) - 1)
        spread -= chance * sum(1 / reached for _, reached in shown) / len(shown)
        if spread <= 0:
            return MAX_PRIOR_WEIGHT
        return min(MAX_PRIOR_WEIGHT, max(MIN_PRIOR_WEIGHT, chance / spread))


class RequestAcceptance:
    """Acceptance of one request, from the engine's rates and what the request itself has shown lately."""

    def __init__(self, step: int) -> None:
        """step: the number of this step, counted by the engine."""
        self.counts = Counts(REQUEST_MEMORY)
        self._faded_at = step

    def survivals(self, engine_rates: list[float], prior_weight: float, step: int) -> list[float]:
        """Returns the probability, by position, that this draft and all before it are accepted, as high as is still
        plausible. There are as many positions as `engine_rates` has.

        engine_rates: `EngineAcceptance.rates`.
        prior_weight: `EngineAcceptance.prior_weight`.
        step: the number of this step, counted by the engine.
        """
        if step > self._faded_at:
            self.counts.fade((1 - 1 / REQUEST_MEMORY_STEPS) ** (step - self._faded_at))
            self._faded_at = step
        survival, difference, survivals = 1.0, 0.0, []
        for engine_rate, reached, accepted in zip(engine_rates, self.counts.reached, self.counts.accepted):
            prior = engine_rate + OWN_SHARE * difference
            prior = 0.0 if prior < 0 else 1.0 if prior > 1 else prior  # min and max would take a third of the time
            weight = prior_weight + reached
            rate = (prior_weight * prior + accepted) / weight
            difference = rate - engine_rate
            plausible = rate + OPTIMISM * (rate * (1 - rate) / weight) ** 0.5
            survivals.append(survival * plausible if plausible < 1 else survival)
            survival *= rate
        return survivals

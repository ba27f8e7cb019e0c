"""A certificate that speculation changes nothing: `specdec eval lossless`.

Three parts, all through the engine as it is:

- *sampling*: its outputs at temperature > 0 follow the target's exact distribution, which is computed here once more: a
  plain forward over every context that was visited, into a cache of its own, and the transforms of SamplingParams in
  fp64.
- *greedy*: at temperature 0 every output equals that of plain decoding alone.
- *coupled*: with coupled verification every sampled output equals that of plain decoding alone with the same seed.

**Statistics of the sampling part.** A *group* is one rule with one parameter combination. Each group has

- an e-process over contexts: a context c with distribution p, visited n times and followed n_v times by token v,
contributes
  E_c = G(A) / G(A+n) * prod_v G(A p_v + n_v) / (G(A p_v) p_v^n_v), G the gamma function: how much better a
  Dirichlet(A p) mixture predicts the tokens than p does. The product over contexts is a martingale under p, whatever
  A is. A says how far from p the bet is (about 1/sqrt(A) in total variation); the mean over `CONCENTRATIONS` is bet
  on, so that A needs no choice. A context visited once contributes exactly 1.
- a pooled e-process, which needs no repeated context: at every token the vocabulary is cut into cells by rank under
  p, 1, 2-4, 5-16, 17-64 and the rest, whose probabilities P are known. A bet (a, theta) multiplies its stake by
  exp(theta a(cell)) / sum_k P_k exp(theta a(k)); the mean over all bets is an e-process. It reads the first
  samples of each group only, where all of them would be too much (their number depends on sizes, never on outcomes).
- G-tests (Williams' correction) of the contexts visited most after the first output token, cells with an expectation
  below 5 merged.

Each rule also has both e-processes over all its combinations together. With M tests in all, an e-process fails at
E >= M / alpha and a G-test at p <= alpha / M, so that a lossless engine fails anywhere with probability alpha at most
(exactly so for the e-processes; the G-tests' p-values are asymptotic). A token that is impossible under p is a failure
at once. Contexts where rounding decides what top_k, top_p or min_p cut are left out of the tests and counted: that
depends on the context alone, not on what followed.
"""

from specdec.eval.lossless.certificate import Certificate, LosslessOptions
from specdec.eval.lossless.certify import certify

__all__ = ["Certificate", "LosslessOptions", "certify"]

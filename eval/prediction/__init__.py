"""A cost model for hardware that is not at hand: `specdec eval predict`.

The time of a forward of n rows, on N GPUs that split every matrix between them:

    T(n) = max(bytes / (eta_b N BW), flops / (eta_f N F)) + t_0 + L t_lat + all-reduces
    bytes = W_fixed + L_moe W_expert U(n) + sum over sequences of their keys and values,  U(n) = E (1 - (1 - k/E)^n)

and of one iteration that drafts K tokens for each of b sequences, tau(K) = 1 + A_1 + ... + A_K of them kept:

    T_iter(0) = T_target(b),  T_iter(K) = T_target(b (K + 1)) + T_mtp(b tau(K)) + (K - 1) T_mtp(b)

`costs` has the formulas, `hardware` and `shapes` the figures that go in, `published` what others have measured, and
`validation` how far the model is from that.
"""

from specdec.eval.prediction.predict import Prediction, PredictOptions, predict
from specdec.eval.prediction.rates import AcceptanceRates, parse_acceptance
from specdec.eval.prediction.validation import Validation, validate

__all__ = ["AcceptanceRates", "PredictOptions", "Prediction", "Validation", "parse_acceptance", "predict", "validate"]

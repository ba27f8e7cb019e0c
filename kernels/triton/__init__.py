"""Turns logits on the device into tokens, in Triton: sampling and verification without a wait for the device.

FlashInfer's samplers draw by batch slot; here every number comes from `specdec.kernels.philox`'s counters, so that a
request's tokens are its own wherever it lies. Tried in the interpreter and compiled for sm_90; not yet run on a GPU.

    layout.py     what the host packs and copies; Batch
    slots.py      which program sees which row
    noise.py      Philox in kernels
    edits.py  truncate.py  choose.py  softmax.py  residual.py      one operation each
    rules.py      verification rules, one program per sequence
    decide.py     logits of a target forward -> accepted tokens; Decider
    draft.py      logits of a draft step -> drafts and their distributions; Drawer
    sampling.py   the same operations with the signatures of `Operations`; TritonSampling
"""

from __future__ import annotations

from specdec.kernels.triton.decide import Decided, Decider
from specdec.kernels.triton.draft import Drawer
from specdec.kernels.triton.layout import Batch, edit_words
from specdec.kernels.triton.sampling import TritonSampling

__all__ = ["Batch", "Decided", "Decider", "Drawer", "TritonSampling", "edit_words"]

"""Turns a prompt and parameters into a `Sequence`: everything that can be wrong with a request is found here."""

from __future__ import annotations

import itertools
import math
from typing import Literal

from specdec.config import SamplingParams, SpeculationParams
from specdec.errors import warn
from specdec.loading import Checkpoint
from specdec.request.seeds import draw_seed, sample_seed
from specdec.request.sequence import Sequence
from specdec.request.text import OutputText

OFF = SpeculationParams(num_speculative_tokens=0)

DraftsWith = Literal["mtp", "drafter", "nothing"]
"""What an engine drafts with: the MTP layer, a drafter of its user's own, or nothing, for want of both."""


class Admission:
    """Makes requests for one model.

    default: the speculation of those that bring none of their own.
    """

    def __init__(
        self, checkpoint: Checkpoint, max_model_len: int, speculation: SpeculationParams | None, drafts_with: DraftsWith
    ) -> None:
        self.checkpoint, self.max_model_len, self.drafts_with = checkpoint, max_model_len, drafts_with
        self.default = self._resolve_speculation(speculation)
        self._request_numbers = itertools.count()

    def sequence(
        self, prompt: str | list[int], params: SamplingParams, *, request_id: str | None = None, priority: int = 0
    ) -> Sequence:
        """Like `sequences`, for a request with n = 1; returns its only Sequence. Raises ValueError for a larger n,
        too."""
        if params.n > 1:
            raise ValueError(f"n = {params.n}: one sample can be streamed; pass n = 1, or use Engine.generate()")
        return self.sequences(prompt, params, request_id=request_id, priority=priority)[0]

    def sequences(
        self, prompt: str | list[int], params: SamplingParams, *, request_id: str | None = None, priority: int = 0
    ) -> list[Sequence]:
        """Returns one Sequence per sample, to be queued in this order. Any thread may call it.

        prompt: text or token ids.
        params: the request's; their n says how many samples.
        request_id: None counts requests.
        priority: lower ones run first.

        Raises ValueError for what this model cannot do.
        """
        token_ids = self._prompt_token_ids(prompt)
        end_token_ids = frozenset(params.stop_token_ids)
        if not params.ignore_eos:
            end_token_ids |= self.checkpoint.eos_token_ids
        bad_words = self._bad_words(params)
        self._check_token_ids(params, end_token_ids, bad_words)
        if request_id is None:
            request_id = f"request-{next(self._request_numbers)}"
        seed = draw_seed() if params.seed is None else params.seed
        sequences: list[Sequence] = []
        for sample in range(params.n):
            sequences.append(
                Sequence(
                    request_id=f"{request_id}.{sample}" if sample else request_id,
                    prompt_token_ids=token_ids,
                    params=params,
                    speculation=self._resolve_speculation(params.speculation, self.default),
                    seed=sample_seed(seed, sample),
                    max_total_tokens=min(len(token_ids) + params.max_tokens, self.max_model_len),
                    end_token_ids=end_token_ids,
                    output=OutputText(self.checkpoint.tokenizer, params),
                    bad_words=bad_words,
                    priority=priority,
                    leader=sequences[0] if sequences else None,
                    has_mtp=self.drafts_with == "mtp",
                )
            )
        return sequences

    def _bad_words(self, params: SamplingParams) -> tuple[tuple[int, ...], ...]:
        """Returns all bad words as token ids; a text gives two, its tokens at the start of a line and after a space."""
        words: list[tuple[int, ...]] = []
        for word in params.banned_words:
            if isinstance(word, str):
                words += [tuple(self.checkpoint.encode(text)) for text in (word, " " + word)]
            else:
                words.append(word)
        return tuple(dict.fromkeys(words))

    def _check_token_ids(
        self, params: SamplingParams, end_token_ids: frozenset[int], bad_words: tuple[tuple[int, ...], ...]
    ) -> None:
        """Raises ValueError unless every id is the model's own, and some token stays possible."""
        vocab_size = self.checkpoint.config.vocab_size
        named = {
            "stop_token_ids": params.stop_token_ids,
            "logit_bias": [token for token, _ in params.biases],
            "bad_words": [token for word in bad_words for token in word],
        }
        for name, token_ids in named.items():
            for token in token_ids:
                if token >= vocab_size:
                    raise ValueError(f"{name}: {token} is no token id of this model: 0 <= id < {vocab_size}")
        impossible = {token for token, bias in params.biases if bias == -math.inf} | {word[-1] for word in bad_words}
        if params.min_tokens > 0:
            impossible |= end_token_ids
        if len(impossible) == vocab_size:
            raise ValueError(
                f"logit_bias, bad_words and min_tokens leave none of the {vocab_size} tokens possible: allow some"
            )

    def _prompt_token_ids(self, prompt: str | list[int]) -> list[int]:
        token_ids = self.checkpoint.encode(prompt) if isinstance(prompt, str) else prompt
        vocab_size = self.checkpoint.config.vocab_size
        if not token_ids:
            raise ValueError("the prompt is empty: give at least one token")
        for token in token_ids:
            if not 0 <= token < vocab_size:
                raise ValueError(f"prompt token {token!r} is no token id of this model: 0 <= id < {vocab_size}")
        if len(token_ids) >= self.max_model_len:
            raise ValueError(
                f"the prompt has {len(token_ids)} tokens, the context {self.max_model_len}, output included: shorten it"
            )
        return token_ids

    def _resolve_speculation(
        self, asked: SpeculationParams | None, default: SpeculationParams | None = None
    ) -> SpeculationParams:
        """Returns what was asked for; plain decoding where nothing drafts. Raises ValueError for what cannot be."""
        if self.drafts_with != "nothing":
            resolved = asked or default or SpeculationParams()
            if self.drafts_with == "drafter":
                check_without_mtp(resolved)
            return resolved
        if asked is not None and asked.max_draft_tokens > 0:
            raise ValueError(
                f"num_speculative_tokens = {asked.num_speculative_tokens}: the checkpoint {self.checkpoint.folder} "
                "has no MTP layer, so speculation is unavailable; pass 0"
            )
        if default is None and asked is None:
            warn(f"{self.checkpoint.folder} has no MTP layer: speculation is unavailable, decoding plainly")
        return asked or default or OFF


def check_without_mtp(speculation: SpeculationParams) -> None:
    """Raises ValueError for what only the MTP layer can do."""
    if speculation.automatic:
        raise ValueError(
            "num_speculative_tokens = 'auto' weighs what the MTP layer's drafts cost, and this engine drafts with a "
            "drafter of your own: give a number"
        )
    if speculation.min_draft_confidence > 0:
        raise ValueError(
            f"min_draft_confidence = {speculation.min_draft_confidence} asks the MTP layer's probabilities, and this "
            "engine drafts with a drafter of your own: give 0, and let it draft less where it is unsure"
        )

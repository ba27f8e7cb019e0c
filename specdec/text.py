"""A request's output text: detokenised as tokens come, cut at stop strings, streamed without regrets."""

from __future__ import annotations

from specdec.config import SamplingParams
from specdec.model.tokenizer import IncrementalDetokenizer, Tokenizer


class OutputText:
    """`text` grows token by token; `take` hands out what can no longer be part of a stop string."""

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams) -> None:
        self.text = ""
        self.stopped = False
        self._detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=params.skip_special_tokens)
        self._stop, self._include_stop = params.stop, params.include_stop_str_in_output
        self._longest_stop = max(map(len, params.stop), default=0)
        self._min_tokens, self._num_tokens = params.min_tokens, 0
        self._taken = 0

    def push(self, token_id: int) -> bool:
        """Adds a token's text; True when it completes a stop string (the text is cut then)."""
        self._num_tokens += 1
        return self._append(self._detokenizer.push(token_id))

    def flush(self) -> bool:
        """Adds what the detokeniser holds back, at the end of the output; True as for `push`."""
        return not self.stopped and self._append(self._detokenizer.flush())

    def take(self, *, finished: bool) -> str:
        """The text that is new since the last call; without `finished`, a possible start of a stop
        string at the very end stays back."""
        end = len(self.text) if finished else len(self.text) - self._possible_stop()
        start, self._taken = self._taken, max(self._taken, end)
        return self.text[start : self._taken]

    def _append(self, piece: str) -> bool:
        if not piece:
            return False
        old_length = len(self.text)
        self.text += piece
        if self._num_tokens < self._min_tokens:
            return False
        starts = [(stop, max(0, old_length - len(stop) + 1)) for stop in self._stop]
        found = [(at, stop) for stop, start in starts if (at := self.text.find(stop, start)) >= 0]
        if not found:
            return False
        at, stop = min(found)
        self.text = self.text[: at + len(stop) if self._include_stop else at]
        self.stopped = True
        return True

    def _possible_stop(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        if self.stopped:
            return 0
        for length in range(min(self._longest_stop - 1, len(self.text)), 0, -1):
            if any(stop.startswith(self.text[-length:]) for stop in self._stop):
                return length
        return 0

"""A request's output text: detokenised as tokens come, cut at stop strings, streamed without regrets."""

from __future__ import annotations

from specdec.config import SamplingParams
from specdec.model.tokenizer import IncrementalDetokenizer, Tokenizer


class OutputText:
    """The text of a request's output, which grows with the tokens; `take` hands out what no stop string can cut any
    more.

    Without stop strings nothing waits for the text, so tokens are decoded only when somebody asks for it.
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams) -> None:
        self.tokenizer, self.stopped = tokenizer, False
        self._text = ""
        self._undecoded: list[int] = []
        self._detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=params.skip_special_tokens)
        self._stop, self._include_stop = params.stop_strings, params.include_stop_str_in_output
        self._longest_stop = max(map(len, params.stop_strings), default=0)
        self._min_tokens, self._num_tokens = params.min_tokens, 0
        self._taken = 0

    @property
    def text(self) -> str:
        """The whole text so far."""
        self._text += self._decode_rest()
        return self._text

    def push(self, token_id: int) -> bool:
        """Adds a token's text. Returns whether that completes a stop string; the text is cut then."""
        if not self._stop:
            self._undecoded.append(token_id)
            return False
        self._num_tokens += 1
        return self._append(self._detokenizer.push([token_id]))

    def flush(self) -> bool:
        """Adds what the detokeniser holds back; call it at the end of the output. Returns as `push` does."""
        return not self.stopped and self._append(self._decode_rest() + self._detokenizer.flush())

    def take(self, *, finished: bool) -> str:
        """Returns the text that is new since the last call. finished: nothing more comes; otherwise a possible start of
        a stop string at the very end stays back."""
        text = self.text
        end = len(text) if finished else len(text) - self._possible_stop()
        start, self._taken = self._taken, max(self._taken, end)
        return text[start : self._taken]

    def _decode_rest(self) -> str:
        if not self._undecoded:
            return ""
        token_ids, self._undecoded = self._undecoded, []
        return self._detokenizer.push(token_ids)

    def _append(self, piece: str) -> bool:
        if not piece:
            return False
        old_length = len(self._text)
        self._text += piece
        if self._num_tokens < self._min_tokens:
            return False
        starts = [(stop, max(0, old_length - len(stop) + 1)) for stop in self._stop]
        found = [(at, stop) for stop, start in starts if (at := self._text.find(stop, start)) >= 0]
        if not found:
            return False
        at, stop = min(found)
        self._text = self._text[: at + len(stop) if self._include_stop else at]
        self.stopped = True
        return True

    def _possible_stop(self) -> int:
        """Returns the length of the longest end of the text that a stop string begins with."""
        if self.stopped:
            return 0
        for length in range(min(self._longest_stop - 1, len(self._text)), 0, -1):
            if any(stop.startswith(self._text[-length:]) for stop in self._stop):
                return length
        return 0

"""The values that the engine hands back."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from specdec.request.logprobs import TokenLogprobs
from specdec.request.sequence import FinishReason, Sequence
from specdec.request.stats import RequestStats


@dataclass(frozen=True)
class GenerationOutput:
    """One finished request."""

    request_id: str
    """The request's id, as given or counted; the samples after the first have ".1", ".2", ... at its end."""
    prompt_token_ids: list[int]
    """The prompt's tokens."""
    token_ids: list[int]
    """The output's tokens, without the prompt's, the ending token included."""
    text: str
    """The output's text, cut at stop strings and, unless include_stop_str_in_output, without the ending token."""
    finish_reason: FinishReason
    """Why the request ended: "stop" (an end token or a stop string), "length", "abort", "deadline", or "error", where
    an exception ended it, which its consumer gets."""
    seed: int
    """The seed that reproduces the request: the given one, or one that was drawn."""
    logprobs: list[TokenLogprobs] | None
    """Log-probabilities, one entry per output token; None unless SamplingParams.logprobs asks for them."""
    stats: RequestStats
    """Counts and times of the request."""
    other_samples: list[GenerationOutput] = field(default_factory=list)
    """The other n - 1 samples of the prompt, with SamplingParams.n > 1; those have no others."""

    @property
    def outputs(self) -> list[GenerationOutput]:
        """All samples of the prompt, this one first."""
        return [self, *self.other_samples]

    def as_dict(self) -> dict[str, object]:
        """Returns a document for JSON, see docs/json.md. With n > 1 its "outputs" are the documents of all samples."""
        document = self._own_dict()
        if self.other_samples:
            document["outputs"] = [sample._own_dict() for sample in self.outputs]
        return document

    def _own_dict(self) -> dict[str, object]:
        return {
            "request_id": self.request_id,
            "text": self.text,
            "prompt_token_ids": self.prompt_token_ids,
            "token_ids": self.token_ids,
            "finish_reason": self.finish_reason,
            "seed": self.seed,
            "logprobs": _as_dicts(self.logprobs),
            "stats": self.stats.as_dict(),
        }

    @classmethod
    def of(cls, sequence: Sequence, others: Seq[Sequence] = ()) -> GenerationOutput:
        """Returns the output of a sequence that has finished. others: the other samples of its prompt."""
        assert sequence.finish_reason is not None, "the sequence is still running"
        return cls(
            request_id=sequence.request_id,
            prompt_token_ids=sequence.prompt_token_ids,
            token_ids=sequence.output_token_ids,
            text=sequence.output.text,
            finish_reason=sequence.finish_reason,
            seed=sequence.seed,
            logprobs=_logprobs(sequence),
            stats=RequestStats.of(sequence.stats),
            other_samples=[cls.of(other) for other in others],
        )


@dataclass(frozen=True)
class StreamChunk:
    """The part of an output that is new since the chunk before.

    The last chunk of a stream read to its end, and only that, has a finish_reason; it may have no tokens where the
    request was ended from outside.
    """

    text: str
    """New text. It may lag behind the tokens: it is held back while it may be part of a character or a stop string."""
    token_ids: list[int]
    """New tokens."""
    finish_reason: FinishReason | None = None
    """Why the request ended, see `GenerationOutput.finish_reason`; None while it goes on."""
    logprobs: list[TokenLogprobs] | None = None
    """Log-probabilities, one entry per token; None unless SamplingParams.logprobs asks for them."""

    def as_dict(self) -> dict[str, object]:
        """Returns a document for JSON, see docs/json.md."""
        return {
            "text": self.text,
            "token_ids": self.token_ids,
            "finish_reason": self.finish_reason,
            "logprobs": _as_dicts(self.logprobs),
        }

    def followed_by(self, later: StreamChunk) -> StreamChunk:
        """Returns one chunk that has this one's content and then the later one's."""
        logprobs = None if self.logprobs is None else self.logprobs + (later.logprobs or [])
        return StreamChunk(self.text + later.text, self.token_ids + later.token_ids, later.finish_reason, logprobs)


class ChunkCutter:
    """Cuts a request's output into chunks as it grows."""

    def __init__(self, sequence: Sequence) -> None:
        self._sequence = sequence
        self._num_taken, self._ended = 0, False

    def take(self) -> StreamChunk | None:
        """Returns what is new since the last call; None where there is nothing. The last chunk has a finish_reason."""
        sequence = self._sequence
        start = len(sequence.prompt_token_ids) + self._num_taken
        token_ids = sequence.token_ids[start:]
        if self._ended or not (token_ids or sequence.finished):
            return None
        self._ended = sequence.finished
        first, self._num_taken = self._num_taken, self._num_taken + len(token_ids)
        return StreamChunk(
            text=sequence.output.take(finished=sequence.finished),
            token_ids=token_ids,
            finish_reason=sequence.finish_reason,
            logprobs=_logprobs(sequence, first, self._num_taken),
        )


def _logprobs(sequence: Sequence, first: int = 0, end: int | None = None) -> list[TokenLogprobs] | None:
    """Returns the log-probabilities of output tokens [first, end), with texts; None where the request does not ask."""
    if sequence.params.logprobs is None:
        return None
    return [entry.with_texts(sequence.output.tokenizer) for entry in sequence.logprobs[first:end]]


def _as_dicts(logprobs: list[TokenLogprobs] | None) -> list[dict[str, object]] | None:
    return None if logprobs is None else [entry.as_dict() for entry in logprobs]


class TokenStream(Iterator[StreamChunk]):
    """One request's chunks as they are generated: an iterator. Closing it, or dropping it, aborts the request."""

    def __init__(
        self,
        sequence: Sequence,
        chunks: Generator[StreamChunk],
        abort: Callable[[Sequence], object],
        abandon: Callable[[Sequence], None],
    ) -> None:
        self._sequence, self._chunks, self._abort, self._abandon = sequence, chunks, abort, abandon

    def __next__(self) -> StreamChunk:
        """Steps the engine until there is something new, and returns it. Raises the error that ended the request."""
        return next(self._chunks)

    def close(self) -> None:
        """Ends the stream and aborts the request unless it has finished; safe to call at any time."""
        self._chunks.close()
        self._abort(self._sequence)

    def __del__(self) -> None:
        self._abandon(self._sequence)  # the collector may run in the middle of a step

    @property
    def output(self) -> GenerationOutput:
        """The finished request; after `close` what was generated until then. Raises ValueError while it runs."""
        if not self._sequence.finished:
            raise ValueError("the stream is still running: read it to its end or close it first")
        return GenerationOutput.of(self._sequence)

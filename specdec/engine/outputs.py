"""What the engine hands back."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from specdec.request.logprobs import TokenLogprobs
from specdec.request.sequence import FinishReason, Sequence
from specdec.request.stats import RequestStats


@dataclass(frozen=True)
class GenerationOutput:
    """One finished request. finish_reason: "stop" (an end token or a stop string), "length", "abort", "deadline", or
    "error" where an exception ended it, which its consumer gets. `token_ids` is the output alone, the ending token
    included; `text` is cut at stop strings and, unless include_stop_str_in_output, has no ending token. `seed`
    reproduces the request. `logprobs`: one per token, where SamplingParams.logprobs asks for them. `outputs`: with
    SamplingParams.n > 1, the other n - 1 samples of the prompt."""

    request_id: str
    prompt_token_ids: list[int]
    token_ids: list[int]
    text: str
    finish_reason: FinishReason
    seed: int
    logprobs: list[TokenLogprobs] | None
    stats: RequestStats
    outputs: list[GenerationOutput] = field(default_factory=list)

    @classmethod
    def of(cls, sequence: Sequence, others: Seq[Sequence] = ()) -> GenerationOutput:
        """others: the other samples of its prompt."""
        assert sequence.finish_reason is not None, "the sequence is still running"
        return cls(
            request_id=sequence.request_id,
            prompt_token_ids=sequence.prompt_token_ids,
            token_ids=sequence.output_token_ids,
            text=sequence.output.text,
            finish_reason=sequence.finish_reason,
            seed=sequence.seed,
            logprobs=None if sequence.params.logprobs is None else sequence.logprobs,
            stats=RequestStats.of(sequence.stats),
            outputs=[cls.of(other) for other in others],
        )


@dataclass(frozen=True)
class StreamChunk:
    """What is new since the last chunk. Text may lag behind the tokens: it is held back while it may be part
    of a character or a stop string. The last chunk of a stream read to its end, and only that, has a
    finish_reason; it may have no tokens where the request was ended from outside. logprobs: one per token, where they
    are asked for."""

    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    logprobs: list[TokenLogprobs] | None = None

    def followed_by(self, later: StreamChunk) -> StreamChunk:
        """Both as one."""
        logprobs = None if self.logprobs is None else self.logprobs + (later.logprobs or [])
        return StreamChunk(self.text + later.text, self.token_ids + later.token_ids, later.finish_reason, logprobs)


class ChunkCutter:
    """Cuts a request's output into chunks as it grows."""

    def __init__(self, sequence: Sequence) -> None:
        self._sequence = sequence
        self._num_taken, self._ended = 0, False

    def take(self) -> StreamChunk | None:
        """What is new since the last call; None where there is nothing. The last chunk is that with a finish_reason."""
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
            logprobs=None if sequence.params.logprobs is None else sequence.logprobs[first : self._num_taken],
        )


class TokenStream(Iterator[StreamChunk]):
    """One request's chunks as they are generated. Closing it, or dropping it, aborts the request."""

    def __init__(
        self,
        sequence: Sequence,
        chunks: Generator[StreamChunk],
        abort: Callable[[Sequence], object],
        abandon: Callable[[Sequence], None],
    ) -> None:
        self._sequence, self._chunks, self._abort, self._abandon = sequence, chunks, abort, abandon

    def __next__(self) -> StreamChunk:
        return next(self._chunks)

    def close(self) -> None:
        """Ends the stream and aborts the request unless it has finished; safe to call at any time."""
        self._chunks.close()
        self._abort(self._sequence)

    def __del__(self) -> None:
        self._abandon(self._sequence)  # the collector may run in the middle of a step

    @property
    def output(self) -> GenerationOutput:
        """The finished request; after `close` what was generated until then."""
        if not self._sequence.finished:
            raise ValueError("the stream is still running: read it to its end or close it first")
        return GenerationOutput.of(self._sequence)

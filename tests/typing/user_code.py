"""What users write, with every public name: `make lint` checks it by plain mypy against the installed package."""

from __future__ import annotations

import asyncio
import json
import warnings
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any, assert_type

import specdec
from specdec import (
    AsyncEngine,
    AsyncTokenStream,
    CacheFullError,
    CheckpointError,
    CostTable,
    Drafter,
    DrafterError,
    DraftLengthStats,
    DraftRequest,
    DraftStats,
    Engine,
    EngineConfig,
    EngineInUseError,
    EngineStats,
    FinishReason,
    GenerationOutput,
    Histogram,
    KernelsUnavailableError,
    ModelError,
    NotEnoughMemoryError,
    Prompt,
    QueueFullError,
    RequestStats,
    SamplingParams,
    SpecdecError,
    SpecdecWarning,
    SpeculationParams,
    StepTimes,
    StreamChunk,
    TokenLogprobs,
    TokenStream,
)

CREATIVE = SamplingParams(stop="\n", stop_token_ids=[1], bad_words=["x"], logit_bias={1: 2.0}, top_k=-1, seed=7)
FORMS = [
    SamplingParams(stop=["\n", "def"], bad_words="word", logit_bias=[(3, -1.5)]),
    SamplingParams(bad_words=["word", [1, 2], (3,)], stop_token_ids=(1, 2), max_tokens=32, temperature=0),
    SamplingParams(n=3, logprobs=5, speculation=SpeculationParams("auto")),
    SamplingParams(speculation=SpeculationParams(num_speculative_tokens=3, verification="block")),
]


def load(folder: Path) -> Engine:
    costs = CostTable(target={1: 1e-3, 16: 3e-3}, mtp_extend={1: 2e-4}, mtp_step={1: 2e-4})
    config = EngineConfig(speculation=SpeculationParams(2), max_num_seqs=4, page_size=32, cost_table=costs)
    assert_type(config.speculation, SpeculationParams | None)
    warnings.simplefilter("error", SpecdecWarning)
    try:
        return Engine.from_pretrained(folder, kernels="cpu", dtype="int8", max_num_seqs=config.max_num_seqs)
    except (CheckpointError, KernelsUnavailableError, NotEnoughMemoryError) as error:
        raise SystemExit(f"{error} (specdec {specdec.__version__})") from error
    except SpecdecError as error:
        assert_type(error.exit_code, int)
        raise SystemExit(error.exit_code) from error


def complete(engine: Engine, prompts: list[str]) -> DraftStats:
    outputs = engine.generate(prompts, CREATIVE)
    assert_type(outputs, list[GenerationOutput])
    for output in outputs:
        print(output.text, output.finish_reason, output.seed, output.stats.tokens_per_s)
        print(json.dumps(output.as_dict()))
    assert_type(outputs[0].outputs, list[GenerationOutput])
    assert_type(outputs[0].token_ids, list[int])
    assert_type(outputs[0].stats, RequestStats)
    assert_type(outputs[0].stats.mean_acceptance_length, float | None)
    total = sum((output.stats for output in outputs), DraftStats())
    assert_type(total.num_accepted_tokens, int)
    return outputs[0].stats + outputs[1].stats


def prompts_in_all_forms(engine: Engine, arrays: Any) -> None:
    own: Prompt = "def main():"
    engine.generate(own)
    engine.generate([1, 2, 3])
    engine.generate([[1, 2], [3]])
    mixed: list[Prompt] = [[1, 2], "text", (3, 4)]
    engine.generate(mixed, [CREATIVE, *FORMS[:2]])
    engine.generate(arrays, (params for params in FORMS))
    engine.chat([{"role": "user", "content": "2+2?"}], enable_thinking=False)


def most_probable(output: GenerationOutput) -> Iterator[tuple[str, float]]:
    for entry in output.logprobs or []:
        assert_type(entry, TokenLogprobs)
        assert_type(entry.token, str)
        assert_type(entry.bytes, list[int] | None)
        for text, (token_id, logprob) in zip(entry.top_tokens, entry.top):
            assert_type(token_id, int)
            yield text, logprob


def show(engine: Engine, prompt: Prompt) -> GenerationOutput:
    stream = engine.stream(prompt, SamplingParams(max_tokens=8))
    assert_type(stream, TokenStream)
    reason: FinishReason | None = None
    for chunk in stream:
        assert_type(chunk, StreamChunk)
        print(chunk.text, end="", flush=True)
        reason = chunk.finish_reason
    if reason == "length":
        print("...")
    stream.close()
    return stream.output


class Repeats:
    """Guesses that the last token comes again."""

    def draft(self, requests: Sequence[DraftRequest]) -> list[list[int]]:
        return [[r.token_ids[-1]] * r.num_draft_tokens for r in requests]


def draft_with(drafter: Drafter, prompt: Prompt) -> str:
    try:
        return Engine.from_pretrained("bundled", drafter=drafter).generate(prompt)[0].text
    except DrafterError as error:
        return str(error)


def watch(stats: EngineStats) -> float | None:
    assert_type(stats.finished["stop"], int)
    assert_type(stats.drafts, DraftStats)
    first_token: Histogram = stats.first_token
    chosen: DraftLengthStats | None = stats.draft_length
    if chosen is not None:
        times: StepTimes = chosen.times
        assert_type(times.median_relative_error, float | None)
    return first_token.mean


async def words(engine: AsyncEngine, prompt: Prompt) -> AsyncIterator[str]:
    try:
        stream = engine.generate(prompt, SamplingParams(max_tokens=64), priority=1, deadline_s=2.5)
    except (QueueFullError, EngineInUseError):
        return
    assert_type(stream, AsyncTokenStream)
    try:
        async for chunk in stream:
            assert_type(chunk, StreamChunk)
            yield chunk.text
    except (CacheFullError, ModelError) as error:
        raise RuntimeError(f"{stream.request_id} failed") from error
    finally:
        await stream.aclose()


async def serve() -> EngineStats:
    engine = AsyncEngine.from_pretrained("bundled", max_queue=8, num_pages=64)
    streams = engine.samples("x = ", SamplingParams(n=2))
    assert_type(streams, list[AsyncTokenStream])
    async for word in words(engine, "import os"):
        print(word)
    await engine.shutdown(drain=True)
    assert_type(streams[0].output, GenerationOutput)
    return engine.stats()


def main() -> None:
    engine = load(Path("checkpoint"))
    assert_type(complete(engine, ["a", "b"]).outcomes, dict[tuple[int, int], int])
    print(dict(most_probable(show(engine, "x"))), watch(asyncio.run(serve())), draft_with(Repeats(), "x"))


if __name__ == "__main__":
    main()

"""Runs a cell's requests, conversations turn by turn through the engine, and records what each of them showed."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

import numpy as np

from specdec import Engine, GenerationOutput, SamplingParams
from specdec.eval.acceptance.analyse import Completion, analyse
from specdec.eval.acceptance.loops import final_loop
from specdec.eval.acceptance.plan import AcceptanceOptions, Cell
from specdec.eval.acceptance.records import RequestRecord
from specdec.eval.acceptance.replay import Reader
from specdec.eval.prompts import Prompt
from specdec.step.step import Decision


@dataclass(frozen=True)
class Request:
    """One turn of a conversation."""

    prompt: int
    """Index in the prompt set."""
    category: str
    """The prompt's category."""
    turn: int
    """Number of the turn, from 0."""
    token_ids: list[int]
    """The prompt's tokens, earlier turns and answers included."""


@dataclass
class Round:
    """What a cell did with some of the prompts."""

    records: list[RequestRecord]
    """What each request showed."""
    completions: list[Completion]
    """The same requests with all their verifications, for analysis."""
    wall_s: float = 0.0
    """Seconds of generating alone."""


def run_round(
    engine: Engine, options: AcceptanceOptions, cell: Cell, prompts: Seq[tuple[int, Prompt]], repeat: int
) -> Round:
    """Completes conversations: all first turns, then all second ones, and so on. A conversation whose next turn does
    not fit the context ends before it.

    engine: one with the cell's batch size.
    options: what is measured.
    cell: the settings.
    prompts: each with its index in the prompt set.
    repeat: number of the repeat, from 0.
    """
    done = Round([], [])
    answers: dict[int, list[str]] = {index: [] for index, _ in prompts}
    while True:
        asked = [(i, p) for i, p in prompts if len(answers[i]) < len(p.turns)]
        requests = [_request(engine, options, i, p, answers[i]) for i, p in asked]
        requests = [r for r in requests if fits(engine, options, r.token_ids)]
        if not requests:
            return done
        for request, text in zip(requests, run_turn(engine, options, cell, requests, repeat, done)):
            answers[request.prompt].append(text)
        going_on = {r.prompt for r in requests}
        prompts = [(i, p) for i, p in asked if i in going_on]


def fits(engine: Engine, options: AcceptanceOptions, token_ids: list[int]) -> bool:
    """Returns whether the context holds a prompt and its output."""
    return 0 < len(token_ids) <= engine.max_model_len - options.max_tokens


def prompt_text(engine: Engine, options: AcceptanceOptions, prompt: Prompt, answers: Seq[str]) -> str:
    """Returns the text of turn len(answers), by the chat template if the options ask for it."""
    return engine.tokenizer.apply_chat_template(prompt.messages(answers)) if options.chat else prompt.text(answers)


def _request(engine: Engine, options: AcceptanceOptions, index: int, prompt: Prompt, answers: Seq[str]) -> Request:
    text = prompt_text(engine, options, prompt, answers)
    return Request(index, prompt.category, len(answers), engine.checkpoint.encode(text))


def run_turn(
    engine: Engine, options: AcceptanceOptions, cell: Cell, requests: list[Request], repeat: int, done: Round
) -> list[str]:
    """Runs one turn of all conversations, adds it to `done`, and returns the answers. Parameters: as of `run_round`."""
    params = SamplingParams(max_tokens=options.max_tokens, temperature=cell.temperature, speculation=cell.speculation)
    per_request = [replace(params, seed=options.request_seed(r.prompt, r.turn, repeat)) for r in requests]
    with engine.core.traced() as trace:
        start = time.perf_counter()
        outputs = engine.generate([r.token_ids for r in requests], per_request)
        done.wall_s += time.perf_counter() - start
    verifications: dict[str, list[Decision]] = defaultdict(list)
    for v in trace:
        if v.draft_token_ids:
            verifications[v.request_id].append(v)
    for request, output, ttft_s in zip(requests, outputs, ttfts(outputs, cell.batch_size)):
        found = verifications[output.request_id]
        done.records.append(_record(request, output, found, repeat, ttft_s))
        done.completions.append(
            Completion(
                output.prompt_token_ids + output.token_ids,
                output.seed,
                [v.start for v in found],
                [v.draft_token_ids for v in found],
            )
        )
    return [output.text for output in outputs]


def ttfts(outputs: Seq[GenerationOutput], batch_size: int) -> list[float]:
    """Returns the seconds to each request's first token, from when it was given one of the `batch_size` slots. They are
    given first come, first served: the n-th beyond the first `batch_size` when the n-th request has ended."""
    ends = sorted(output.stats.last_token_s or 0.0 for output in outputs)
    return [
        (o.stats.first_token_s or 0.0) - max(o.stats.arrival_s, ends[i - batch_size] if i >= batch_size else 0.0)
        for i, o in enumerate(outputs)
    ]


def _record(
    request: Request, output: GenerationOutput, verifications: list[Decision], repeat: int, ttft_s: float
) -> RequestRecord:
    stats = output.stats
    return RequestRecord(
        prompt=request.prompt,
        category=request.category,
        turn=request.turn,
        repeat=repeat,
        num_prompt_tokens=len(output.prompt_token_ids),
        num_output_tokens=stats.num_output_tokens,
        num_loop_tokens=final_loop(output.token_ids),
        num_target_forwards=stats.num_target_forwards,
        starts=np.array([v.start for v in verifications], np.int64),
        num_drafted=np.array([len(v.draft_token_ids) for v in verifications], np.int64),
        num_accepted=np.array([len(v.output_token_ids) - 1 for v in verifications], np.int64),
        ttft_s=ttft_s,
        decode_s=stats.decode_s,
        num_decode_tokens=stats.num_output_tokens - stats.num_first_tokens,
    )


def analysed(done: Round, reader: Reader, cell: Cell, num_contexts: int) -> list[RequestRecord]:
    """Returns the round's records, with an analysis of the first `num_contexts` verifications, request by request.

    Which ones these are never depends on what was accepted later, so that they can be tested against the model's
    distributions.
    """
    chosen: dict[int, Completion] = {}
    left = num_contexts
    for number, completion in enumerate(done.completions):
        count = min(left, len(completion.starts))
        if count > 0:
            starts, drafts = completion.starts[:count], completion.drafts[:count]
            chosen[number] = replace(completion, starts=starts, drafts=drafts)
        left -= count
    found = dict(zip(chosen, analyse(reader, list(chosen.values()), cell.temperature, cell.speculation)))
    return [replace(record, analysis=found.get(number)) for number, record in enumerate(done.records)]

"""Drafters of a user's own: whatever they propose, the output stays the target's, and no request harms another."""

from __future__ import annotations

import asyncio
import importlib.util
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from specdec import AsyncEngine, DrafterError, DraftRequest, Engine, SamplingParams, SpeculationParams
from specdec.request.sequence import Sequence as RunningSequence
from support.enumeration import Enumerator, RandomModel, distance
from support.fakes import write_checkpoint, write_planted_checkpoint
from support.laws import PLAIN, defined_law

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_drafter.py"
VOCAB_SIZE = 259  # of the tiny checkpoints
Answer = Callable[[Sequence[DraftRequest]], Any]
PROMPTS = ["abcabcabc", "x = 1\ny = 2\nx = ", [5, 6, 7, 5, 6], "zz"]
SHORT = SamplingParams(max_tokens=16, temperature=1.0, seed=3, ignore_eos=True)


class Fixed:
    """Answers with what a function says, and keeps what it was asked."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.asked: list[list[DraftRequest]] = []

    def draft(self, requests: Sequence[DraftRequest]) -> Any:
        self.asked.append([replace(r, token_ids=list(r.token_ids)) for r in requests])
        return self.answer(requests)


def guesses(requests: Sequence[DraftRequest]) -> list[list[int]]:
    """Ragged, of one small part of the vocabulary, and a function of the tokens alone."""
    found = []
    for r in requests:
        generator = random.Random(hash(tuple(r.token_ids)))
        found.append([generator.randrange(40) for _ in range(generator.randint(0, r.num_draft_tokens))])
    return found


def ngram_drafter() -> Any:
    spec = importlib.util.spec_from_file_location("own_drafter", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.NgramDrafter()


def load(folder: Path, drafter: Any, **config: Any) -> Engine:
    return Engine.from_pretrained(folder, kernels="reference", dtype="float64", drafter=drafter, **config)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_planted_checkpoint(tmp_path_factory.mktemp("planted"))


def outputs_of(engine: Engine, params: SamplingParams) -> list[list[int]]:
    return [output.token_ids for output in engine.generate(PROMPTS, params)]


@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize(("vocab_size", "k", "num_tokens"), [(2, 1, 5), (2, 3, 6), (3, 2, 5), (4, 2, 4)])
def test_the_targets_distribution_is_kept_exactly(
    tmp_path: Path, vocab_size: int, k: int, num_tokens: int, rule: Any
) -> None:
    def answer(requests: Sequence[DraftRequest]) -> list[list[int]]:
        """Less than asked for now and then, and of some tokens more than once."""
        rows = []
        for r in requests:
            mixed = sum((i + 1) * token for i, token in enumerate(r.token_ids))
            rows.append([(mixed + i * i) % vocab_size for i in range((mixed + 1) % (r.num_draft_tokens + 1))])
        return rows

    target = RandomModel(vocab_size, 7, zeros=0.2)
    engine = Enumerator(tmp_path, target, RandomModel(vocab_size, 8), Fixed(answer))
    params = replace(PLAIN, max_tokens=num_tokens, speculation=SpeculationParams(k, rule))
    expected: dict[tuple[int, ...], float] = {(): 1.0}
    law = defined_law(target, params, [1])
    for _ in range(num_tokens):
        expected = {
            (*tokens, token): probability * p
            for tokens, probability in expected.items()
            for token, p in enumerate(law((1, *tokens)).tolist())
            if p > 0
        }
    assert distance(engine.law([1], params), expected) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("k", [1, 5])
def test_coupled_and_greedy_tokens_are_those_without_drafts(folder: Path, k: int, temperature: float) -> None:
    params = replace(SHORT, temperature=temperature)
    done = load(folder, None, speculation=SpeculationParams(0)).generate(PROMPTS, params)
    plain = [output.token_ids for output in done]
    whole = [output.prompt_token_ids + output.token_ids for output in done]

    def often_right(requests: Sequence[DraftRequest]) -> list[list[int]]:
        rows = []
        for r in requests:
            tokens, size = list(r.token_ids), len(r.token_ids)
            (text,) = (text for text in whole if text[:size] == tokens)
            rows.append([token ^ (i % 5 == 0) for i, token in enumerate(text)][size : size + r.num_draft_tokens])
        return rows

    for drafter in (
        Fixed(guesses),
        Fixed(lambda requests: [[] for _ in requests]),
        ngram_drafter(),
        Fixed(often_right),
    ):
        engine = load(folder, drafter, speculation=SpeculationParams(k))
        assert outputs_of(engine, params) == plain
        small = load(folder, drafter, speculation=SpeculationParams(k), max_num_seqs=2, num_pages=4, page_size=16)
        assert outputs_of(small, params) == plain
    drafts = engine.stats().drafts
    assert 0.3 * drafts.num_draft_tokens < drafts.num_accepted_tokens < drafts.num_draft_tokens


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["coupled", "block", "token"])
def test_preemption_and_batches_change_no_token(folder: Path, rule: Any) -> None:
    """Where verifications start is the same too, on which the noise of the rejection rules depends."""
    params = replace(SHORT, speculation=SpeculationParams(3, rule), max_tokens=24)
    roomy = load(folder, Fixed(guesses), prefix_caching=False)
    alone = [roomy.generate([prompt], params)[0].token_ids for prompt in PROMPTS]
    assert outputs_of(roomy, params) == alone
    tight = load(folder, Fixed(guesses), num_pages=14, page_size=4, max_num_seqs=4, max_num_batched_tokens=36)
    assert outputs_of(tight, params) == alone
    assert tight.stats().num_preemptions > 0


def test_what_a_drafter_is_asked(folder: Path) -> None:
    drafter = Fixed(guesses)
    engine = load(folder, drafter, max_num_seqs=4, max_num_batched_tokens=64)
    long = list(range(200))
    params = [replace(SHORT, speculation=SpeculationParams(k)) for k in (2, 0, 5)]
    outputs = engine.generate([long, "plain", "short"], params)
    seen: dict[str, list[DraftRequest]] = {}
    for requests in drafter.asked:
        assert requests, "a step in which nobody drafts does not ask"
        assert len({r.request_id for r in requests}) == len(requests)
        for r in requests:
            seen.setdefault(r.request_id, []).append(r)
    assert set(seen) == {outputs[0].request_id, outputs[2].request_id}
    for output, most in ((outputs[0], 2), (outputs[2], 5)):
        whole = output.prompt_token_ids + output.token_ids
        for r in seen[output.request_id]:
            assert r.token_ids == whole[: len(r.token_ids)]
            assert r.num_prompt_tokens == len(output.prompt_token_ids) < len(r.token_ids) < len(whole)
            assert r.num_draft_tokens == min(most, len(whole) - len(r.token_ids) - 1) or not r.num_draft_tokens
        assert output.stats.num_draft_tokens > 0
    assert outputs[1].stats.num_draft_tokens == 0


def test_numbers_of_other_kinds_are_token_ids(folder: Path) -> None:
    for kind in (tuple, np.array, torch.tensor):
        engine = load(folder, Fixed(lambda requests, kind=kind: [kind([1, 2])[: r.num_draft_tokens] for r in requests]))
        output = engine.generate(["ab"], SHORT)[0]
        assert output.stats.num_draft_tokens > 0


FAULTS: dict[str, tuple[Any, str]] = {
    "too many": (lambda r: [0] * (r.num_draft_tokens + 1), r"drafted \d tokens for .*: draft at most its num_draft"),
    "negative": (lambda r: [-1], r"drafted token -1 for .*: this model's ids are 0 <= id < 259"),
    "too large": (lambda r: [VOCAB_SIZE], r"drafted token 259 for "),
    "no integer": (lambda r: [1.0], r"drafted \[1\.0\] for .*: give token ids"),
    "no list": (lambda r: None, r"drafted None for .*: give token ids"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_row_ends_its_own_request_alone(folder: Path, fault: str) -> None:
    make, message = FAULTS[fault]
    good = load(folder, Fixed(guesses)).generate(["good"], SHORT)[0].token_ids
    bad = [7, 8, 9]

    def answer(requests: Sequence[DraftRequest]) -> list[Any]:
        """At fault once, after a few steps."""
        faulty = [list(r.token_ids[:3]) == bad and len(r.token_ids) > 6 for r in requests]
        return [make(r) if wrong else row for r, wrong, row in zip(requests, faulty, guesses(requests))]

    engine = load(folder, Fixed(answer))
    sequences = [engine.core.admission.sequence(prompt, SHORT) for prompt in (bad, "good")]
    run_all(engine, sequences)
    assert isinstance(sequences[0].error, DrafterError)
    with pytest.raises(DrafterError, match=message):
        raise sequences[0].error
    assert (sequences[1].finish_reason, sequences[1].output_token_ids) == ("length", good)
    assert engine.core.scheduler.idle
    engine.core.scheduler.check_integrity()


def run_all(engine: Engine, sequences: list[RunningSequence]) -> None:
    for sequence in sequences:
        engine.core.add(sequence)
    while not all(sequence.finished for sequence in sequences):
        engine.core.step()


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (lambda requests: 1 / 0, ZeroDivisionError, "division by zero"),
        (lambda requests: [], DrafterError, "Fixed.draft() returned 0 lists of drafts for 1 requests"),
        (lambda requests: None, TypeError, "NoneType"),
    ],
)
def test_an_answer_that_fails_ends_those_it_was_asked_for(
    folder: Path, answer: Answer, error: type[Exception], message: str
) -> None:
    engine = load(folder, Fixed(answer))
    drafting = engine.core.admission.sequence("ab", SHORT)
    plain = engine.core.admission.sequence("ab", replace(SHORT, speculation=SpeculationParams(0)))
    run_all(engine, [drafting, plain])
    assert isinstance(drafting.error, error)
    assert message in str(drafting.error)
    assert (plain.finish_reason, len(plain.output_token_ids)) == ("length", SHORT.max_tokens)


def test_the_mtp_layer_is_not_loaded(folder: Path) -> None:
    engine, usual = load(folder, Fixed(guesses)), load(folder, None)
    assert engine.runtime.model.mtp is None
    assert len(engine.runtime.kv_cache) == len(usual.runtime.kv_cache) - 1


def test_a_checkpoint_without_an_mtp_layer_speculates(tmp_path: Path, folder: Path) -> None:
    without = write_checkpoint(tmp_path / "plain", with_mtp=False)
    with pytest.warns(UserWarning, match="has no MTP layer"):
        plain = load(without, None)
    engine = load(without, Fixed(guesses))
    assert outputs_of(engine, SHORT) == outputs_of(plain, SHORT)
    assert engine.stats().drafts.num_draft_tokens > 0


def test_what_only_the_mtp_layer_can_do_is_refused_before_anything_is_loaded(tmp_path: Path, folder: Path) -> None:
    broken = write_checkpoint(tmp_path)
    (broken / "model.safetensors").write_bytes(b"nothing")
    for config, message in (
        ({"speculation": SpeculationParams("auto")}, "num_speculative_tokens = 'auto' .* give a number"),
        ({"speculation": SpeculationParams(min_draft_confidence=0.25)}, "min_draft_confidence = 0.25 .* give 0"),
        ({"mtp_recycling": "pre_norm"}, "mtp_recycling = 'pre_norm' is about the MTP layer's drafts"),
    ):
        with pytest.raises(ValueError, match=message):
            load(broken, Fixed(guesses), **config)
    for drafter in (object(), Fixed, 3):
        with pytest.raises(ValueError, match="must be an object with a method draft"):
            load(broken, drafter)
    engine = load(folder, Fixed(guesses))
    for speculation in (SpeculationParams("auto"), SpeculationParams(min_draft_confidence=0.1)):
        with pytest.raises(ValueError, match="drafter of your own"):
            engine.generate(["ab"], replace(SHORT, speculation=speculation))


def test_streams_of_an_async_engine_draft_with_it(folder: Path) -> None:
    plain = load(folder, None).generate(["abcabc"], replace(SHORT, speculation=SpeculationParams(0)))[0]

    async def main() -> tuple[list[int], int]:
        engine = AsyncEngine.from_pretrained(
            folder, kernels="reference", dtype="float64", drafter=Fixed(guesses), shorten_switch_interval=False
        )
        stream = engine.generate("abcabc", SHORT)
        tokens = [token async for chunk in stream for token in chunk.token_ids]
        drafted = engine.stats().drafts.num_draft_tokens
        await engine.shutdown()
        return tokens, drafted

    tokens, drafted = asyncio.run(main())
    assert tokens == plain.token_ids
    assert drafted > 0

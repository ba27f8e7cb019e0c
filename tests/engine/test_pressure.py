"""A real model under pressure: few pages, preemption, shared prefixes, samples. No request's tokens may tell."""

from __future__ import annotations

import itertools
import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from specdec import Engine, SamplingParams, SpeculationParams
from specdec.cache import prefix as prefix_cache_module
from specdec.cache.prefix import PageKey
from specdec.config import EngineConfig
from specdec.engine.core import EngineCore
from specdec.loading import Runtime
from specdec.model.layers import Decoder
from specdec.request.seeds import sample_seed
from specdec.request.sequence import Sequence
from specdec.step.scheduler import ScheduledSequence
from support.draft_simulation import GPU
from support.fakes import NEEDS_COMPILER, planted_tensors, tiny_config, write_files

pytestmark = NEEDS_COMPILER
NUM_SCHEDULES = 500
ATTENTION = 50
Decisions = list[tuple[int, list[int], list[int]]]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """Drafts are accepted now and then, and attention is strong enough for tokens and drafts to show a wrong row."""
    folder, config = tmp_path_factory.mktemp("planted"), tiny_config()
    tensors = planted_tensors(config, 0, noise=0.7)
    for name, tensor in tensors.items():
        if name.endswith("o_proj.weight"):
            tensor.mul_(ATTENTION)
    write_files(folder, config)
    save_file(tensors, str(folder / "model.safetensors"))
    return Engine.from_pretrained(folder, kernels="cpu", max_num_seqs=1, num_pages=64)


def make_core(
    engine: Engine, *, num_pages: int, page_size: int, slots: int = 1, budget: int | None = None, caching: bool = True
) -> EngineCore:
    """The same model with another cache, of NaN: what is read before it is written shows."""
    old = engine.runtime.kv_cache
    cache = torch.full((old.shape[0], num_pages, 2, page_size, *old.shape[4:]), float("nan"), dtype=old.dtype)
    config = EngineConfig(max_num_seqs=slots, page_size=page_size, prefix_caching=caching, cost_table=GPU)
    core = EngineCore(engine.checkpoint, Runtime(engine.runtime.model, cache, engine.max_model_len), config)
    if budget is not None:
        core.scheduler.max_num_batched_tokens = budget
    return core


def run(core: EngineCore, requests: list[tuple[list[int], SamplingParams]]) -> tuple[list[Sequence], list[Decisions]]:
    """All at once to their ends; -> sequences and what each step decided about them: start, drafts, output."""
    sequences = [core.admission.sequence(prompt, params) for prompt, params in requests]
    for sequence in sequences:
        core.add(sequence)
    with core.traced() as trace:
        while not core.scheduler.idle:
            core.step()
            core.scheduler.check_integrity()
    decisions: dict[str, Decisions] = defaultdict(list)
    for decision in trace:
        decisions[decision.request_id].append(decision[1:])
    return sequences, [decisions[s.request_id] for s in sequences]


# --- 500 schedules ---


def random_cases(
    rng: random.Random, engine: Engine, count: int
) -> list[tuple[list[int], SamplingParams, list[list[int]]]]:
    """Prompts that begin alike, coupled and greedy parameters, and what every sample gives alone with K = 0."""
    stem = [rng.randrange(3, 259) for _ in range(40)]
    plain = make_core(engine, num_pages=8, page_size=16, caching=False)
    cases = []
    for seed in range(count):
        shared = rng.choice([0, 4, 16, 17, 32, 33])
        prompt = stem[:shared] + [rng.randrange(3, 259) for _ in range(rng.randint(shared == 0, 6))]
        params = SamplingParams(
            n=rng.choice([1, 1, 1, 2, 3]),
            max_tokens=rng.choice([1, 8, 16, 24]),
            temperature=rng.choice([0, 0.7, 1.0]),
            top_p=rng.choice([1.0, 0.9]),
            repetition_penalty=rng.choice([1.0, 1.0, 1.2]),
            stop_token_ids=tuple(rng.sample(range(3, 259), 4)),
            seed=seed,
        )
        alone = []
        for sample in range(params.n):
            one = replace(params, n=1, seed=sample_seed(seed, sample), speculation=SpeculationParams(0))
            alone.append(run(plain, [(prompt, one)])[0][0].output_token_ids)
        cases.append((prompt, params, alone))
    return cases


def lower_k(core: EngineCore, rng: random.Random) -> None:
    """Each step drafts less than it might, at random."""
    schedule = core.scheduler.schedule

    def lowered() -> list[ScheduledSequence]:
        return [replace(s, num_draft_tokens=rng.randint(0, s.num_draft_tokens)) for s in schedule()]

    core.scheduler.schedule = lowered


class Schedule:
    """Random arrivals, priorities, aborts, page pool and draft lengths, of cases whose outcome is known."""

    def __init__(
        self, seed: int, engine: Engine, cases: list[tuple[list[int], SamplingParams, list[list[int]]]]
    ) -> None:
        rng = random.Random(seed)
        page_size, slots = rng.choice([1, 4, 16]), rng.randint(2, 6)
        pages = -(-rng.randint(64, 110) // page_size)
        budget = slots * 9 + rng.choice([0, 1, 40])
        self.core = make_core(
            engine, num_pages=pages, page_size=page_size, slots=slots, budget=budget, caching=rng.random() < 0.8
        )
        if rng.random() < 0.5:
            lower_k(self.core, rng)
        self.expected: dict[str, list[int]] = {}
        self.arrivals: dict[int, list[Sequence]] = defaultdict(list)
        self.aborts: dict[int, list[Sequence]] = defaultdict(list)
        for prompt, params, alone in rng.sample(cases, rng.randint(2, 7)):
            k, draft_sampling = rng.choice([0, 1, 3, 8, "auto"]), rng.choice(["sampled", "greedy"])
            speculation = SpeculationParams(k, "coupled", draft_sampling)
            step = rng.choice([0, 0, 1, 5, 20])
            samples = self.core.admission.sequences(
                prompt, replace(params, speculation=speculation), priority=rng.choice([0, 0, 1])
            )
            self.expected |= {s.request_id: tokens for s, tokens in zip(samples, alone, strict=True)}
            self.arrivals[step] += samples
            self.aborts[step + rng.randint(0, 10)] += [s for s in samples if rng.random() < 0.1]
        self.sequences = list(itertools.chain(*self.arrivals.values()))

    def run(self) -> Iterator[str]:
        """-> what went wrong."""
        for step in itertools.count():
            for sequence in self.arrivals.get(step, ()):
                self.core.add(sequence)
            for sequence in self.aborts.get(step, ()):
                self.core.end(sequence, "abort")
            if self.core.scheduler.idle and step > 30:
                break
            self.core.step()
            self.core.scheduler.check_integrity()
        for sequence in self.sequences:
            expected, output = self.expected[sequence.request_id], sequence.output_token_ids
            if sequence.finish_reason == "abort":
                expected = expected[: len(output)]
            if output != expected:
                yield f"{sequence.request_id}: {output}, alone {expected}"
            ended = sequence.token_ids[-1] in sequence.end_token_ids
            if sequence.finish_reason not in ("abort", "stop" if ended else "length"):
                yield f"{sequence.request_id}: {sequence.finish_reason}"


@pytest.mark.slow
def test_tokens_of_500_random_schedules_are_those_of_each_request_alone_without_drafts(engine: Engine) -> None:
    cases = random_cases(random.Random(0), engine, 120)
    preemptions = cached = accepted = aborted = 0
    for seed in range(NUM_SCHEDULES):
        schedule = Schedule(seed, engine, cases)
        assert list(schedule.run()) == [], f"schedule {seed}"
        stats = [s.stats for s in schedule.sequences]
        preemptions += sum(s.num_preemptions for s in stats)
        cached += sum(s.num_cached_tokens for s in stats)
        accepted += sum(s.num_accepted_tokens for s in stats)
        aborted += sum(s.finish_reason == "abort" for s in schedule.sequences)
    assert preemptions > 100
    assert cached > 1000
    assert accepted > 1000
    assert aborted > 50


# --- the same tokens and the same drafts, whatever was cached, chunked or preempted ---

STEM = [7 * i % 250 + 3 for i in range(36)]
# Repetitions, a prompt that ends where a page does, prompts that part within a page and exactly at its end.
PROMPTS = [
    STEM,
    STEM,
    STEM[:32],
    [*STEM[:32], 4, 4],
    [*STEM[:30], 9],
    [*STEM[:16], 200, 9, 9],
    STEM[:17],
    [4, *STEM[1:]],
    [5],
]
KINDS = {
    "greedy": SamplingParams(temperature=0),
    "coupled": SamplingParams(speculation=SpeculationParams(3, "coupled")),
    "block": SamplingParams(speculation=SpeculationParams(3, "block")),
}


def requests_of(kind: str) -> list[tuple[list[int], SamplingParams]]:
    params = replace(KINDS[kind], max_tokens=14, ignore_eos=True)
    return [(prompt, replace(params, seed=seed)) for seed, prompt in enumerate(PROMPTS)]


def cold(engine: Engine, kind: str) -> list[Decisions]:
    core = make_core(engine, num_pages=40, page_size=16, caching=False)
    return [run(core, [request])[1][0] for request in requests_of(kind)]


def differences_with_hits(engine: Engine, page_sizes: tuple[int, ...], chunks: range) -> tuple[int, int]:
    """Requests one after the other, twice, so that most of them find their beginning: how many decide otherwise than
    in a cache of their own, and how many tokens were found."""
    different = cached = 0
    for kind in KINDS:
        expected = cold(engine, kind)
        for page_size, chunk in itertools.product(page_sizes, chunks):
            core = make_core(engine, num_pages=-(-400 // page_size), page_size=page_size, budget=chunk)
            for request, decisions in zip(requests_of(kind), expected):
                (sequence,), (found,) = run(core, [request])
                different += found != decisions
                cached += sequence.stats.num_cached_tokens
    return different, cached


@pytest.mark.slow
@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_hits_change_neither_tokens_nor_drafts(engine: Engine, page_size: int) -> None:
    different, cached = differences_with_hits(engine, (page_size,), range(1, 65))
    assert different == 0
    assert cached > len(KINDS) * 64 * 80


@pytest.mark.slow
def test_without_the_cache_chunks_and_pages_change_neither_tokens_nor_drafts(engine: Engine) -> None:
    for kind, page_size in itertools.product(KINDS, (1, 4, 16)):
        expected = cold(engine, kind)
        for chunk in (1, 2, 7, 8, 9, 16, 31, 33, 35, 64):
            core = make_core(engine, num_pages=-(-64 // page_size), page_size=page_size, budget=chunk, caching=False)
            for request, decisions in zip(requests_of(kind), expected):
                (sequence,), (found,) = run(core, [request])
                assert found == decisions
                assert sequence.stats.num_cached_tokens == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_preemption_changes_neither_tokens_nor_drafts(engine: Engine, kind: str) -> None:
    """The rejection rules' too: iterations start at the same places, with the same drafts."""
    expected, preemptions = cold(engine, kind), 0
    for page_size, num_rows, caching in itertools.product((1, 4, 16), (64, 80, 112), (True, False)):
        core = make_core(engine, num_pages=num_rows // page_size, page_size=page_size, slots=6, caching=caching)
        sequences, found = run(core, requests_of(kind))
        assert found == expected
        preemptions += sum(s.stats.num_preemptions for s in sequences)
    assert preemptions > 10


def test_text_logprobs_and_penalties_outlive_preemption(engine: Engine) -> None:
    params = SamplingParams(
        temperature=0.8, max_tokens=20, ignore_eos=True, logprobs=2, repetition_penalty=1.2, min_tokens=9, seed=3
    )
    requests = [(prompt, replace(params, seed=seed)) for seed, prompt in enumerate(PROMPTS)]
    alone = [run(make_core(engine, num_pages=8, page_size=16), [request])[0][0] for request in requests]
    together, _ = run(make_core(engine, num_pages=16, page_size=4, slots=6), requests)
    assert sum(s.stats.num_preemptions for s in together) > 2
    for ours, theirs in zip(together, alone):
        assert ours.output_token_ids == theirs.output_token_ids
        assert ours.output.text == theirs.output.text
        assert ours.logprobs == theirs.logprobs
        assert len(ours.logprobs) == ours.num_output_tokens


@pytest.mark.slow
@pytest.mark.parametrize("forgotten", ["the next token", "a token"])
def test_mutant_keys_that_forget_something_are_seen(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, forgotten: str
) -> None:
    class Key(PageKey):
        def __new__(cls, predecessor: int, token_ids: tuple[int, ...], next_token_id: int | None) -> Key:
            if forgotten == "a token":
                token_ids = token_ids[1:]
            elif next_token_id is not None:
                next_token_id = 0
            return super().__new__(cls, predecessor, token_ids, next_token_id)

    monkeypatch.setattr(prefix_cache_module, "PageKey", Key)
    monkeypatch.setattr("specdec.cache.pages.PageKey", Key)
    assert differences_with_hits(engine, (4,), range(9, 12))[0] > 0


def lose_mtp_state(monkeypatch: pytest.MonkeyPatch, change: Callable[[Sequence], None]) -> None:
    admit = Sequence.admit

    def admitting(self: Sequence, pages: list[int], num_cached_pages: int, page_size: int) -> None:
        admit(self, pages, num_cached_pages, page_size)
        if self.stats.num_preemptions and self.speculates:
            change(self)

    monkeypatch.setattr(Sequence, "admit", admitting)


def test_mutant_preempted_request_that_loses_its_mtp_rows_is_seen_in_the_drafts(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = cold(engine, "coupled")

    def skip_a_pair(sequence: Sequence) -> None:
        sequence.num_mtp_tokens += 1

    lose_mtp_state(monkeypatch, skip_a_pair)
    core = make_core(engine, num_pages=16, page_size=4, slots=6)
    sequences, found = run(core, requests_of("coupled"))
    assert found != expected
    assert [[t for *_, tokens in d for t in tokens][:14] for d in found] == [
        [t for *_, tokens in d for t in tokens][:14] for d in expected
    ], "no output shows it"
    assert sum(s.stats.num_preemptions for s in sequences) > 0


# --- samples ---


@pytest.mark.parametrize("caching", [True, False])
def test_samples_are_those_of_their_seeds_alone(engine: Engine, caching: bool) -> None:
    own = Engine.from_pretrained(
        engine.checkpoint.folder, max_num_seqs=8, num_pages=40, page_size=4, prefix_caching=caching
    )
    for k, rule in ((0, "coupled"), (3, "coupled"), (3, "block")):
        params = SamplingParams(n=4, max_tokens=12, seed=11, ignore_eos=True, speculation=SpeculationParams(k, rule))
        outputs = own.generate([STEM, [5]], params)
        for prompt, first in zip((STEM, [5]), outputs):
            samples = first.outputs
            assert samples[0] is first
            assert [s.seed for s in samples] == [sample_seed(11, i) for i in range(4)]
            assert [s.request_id for s in samples[1:]] == [f"{first.request_id}.{i}" for i in (1, 2, 3)]
            assert all(s.outputs == [s] for s in samples[1:])
            assert len({tuple(s.token_ids) for s in samples}) == 4
            for sample in samples:
                one = engine.generate(prompt, replace(params, n=1, seed=sample.seed))[0]
                assert one.token_ids == sample.token_ids
                assert one.stats.accepted_per_position == sample.stats.accepted_per_position
        cached = [s.stats.num_cached_tokens for s in outputs[0].outputs]
        assert cached[1:] == [32 * caching] * 3
        own.core.scheduler.check_integrity()


def test_samples_of_one_token_share_their_prompt_without_the_mtp_layer(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Engine.from_pretrained(engine.checkpoint.folder, page_size=4, num_pages=40)
    monkeypatch.setattr(Decoder, "draft_chain", lambda *_: pytest.fail("the MTP layer ran"))
    first = own.generate(STEM, SamplingParams(n=3, max_tokens=1, seed=1, speculation=SpeculationParams(3)))[0]
    assert [o.stats.num_cached_tokens for o in first.outputs] == [0, 32, 32]


def test_the_seeds_of_samples_are_distinct_and_the_first_is_the_requests_own() -> None:
    for seed in (0, 1, 2**64 - 1):
        seeds = [sample_seed(seed, i) for i in range(128)]
        assert seeds[0] == seed
        assert len(set(seeds)) == 128
        assert all(0 <= s < 2**53 for s in seeds[1:])
    assert [sample_seed(11, i) for i in range(3)] == [11, 2848476260233222, 2363175199526242], "they reproduce outputs"


def test_numbers_of_samples_that_cannot_be_are_refused(engine: Engine) -> None:
    for n in (0, -1, 129, 1.5, True, None):
        with pytest.raises(ValueError, match=r"n = .* must be an integer, from 1 to 128"):
            SamplingParams(n=n)
    with pytest.raises(ValueError, match=r"n = 2: one sample can be streamed; pass n = 1"):
        engine.stream("abc", SamplingParams(n=2))
    with pytest.raises(ValueError, match="prefix_caching = 1 must be True or False"):
        EngineConfig(prefix_caching=1)

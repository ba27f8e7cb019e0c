"""Statistics on cases by hand, and their exposition read back by a strict parser."""

from __future__ import annotations

import copy
import json
import math
import re
import time
from dataclasses import FrozenInstanceError
from itertools import pairwise
from pathlib import Path

import pytest

from specdec import DraftStats, Engine, RequestStats, SamplingParams, SpeculationParams
from specdec.eval.dev.faults import Fault, FaultPlan
from specdec.metrics.engine import EngineStats
from specdec.metrics.prometheus import render
from specdec.request.sequence import Sequence
from specdec.request.stats import CommitRecord, Histogram, SequenceStats
from specdec.request.text import OutputText
from specdec.step.draft_length import FixedDraftLength
from specdec.step.scheduler import ScheduledSequence
from specdec.step.step import StepError, step
from support.fakes import write_planted_checkpoint

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]

NAME, LABEL = r"[a-zA-Z_:][a-zA-Z0-9_:]*", r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\["\\n])*)"'
SAMPLE = re.compile(rf"({NAME})(?:\{{({LABEL}(?:,{LABEL})*)\}})? (\S+)")
NUMBER = re.compile(r"[+-]?(\d+(\.\d+)?([eE][+-]?\d+)?|Inf)|NaN")


def parse(text: str) -> tuple[dict[str, str], Samples]:
    """Types by family, values by name and labels; AssertionError for whatever the format does not allow."""
    types: dict[str, str] = {}
    samples: Samples = {}
    family = described = ""
    assert text.endswith("\n")
    for line in text[:-1].split("\n"):
        if line.startswith("# HELP "):
            described = line.split(" ", 3)[2]
            assert line.split(" ", 3)[3]
        elif line.startswith("# TYPE "):
            _, _, family, kind = line.split(" ")
            assert family == described
            assert family not in types, "a family comes once, and whole"
            assert kind in ("gauge", "counter", "histogram")
            assert re.fullmatch(NAME, family)
            types[family] = kind
        else:
            match = SAMPLE.fullmatch(line)
            assert match, line
            name, labels, value = (
                match[1],
                dict(x[:2] for x in re.findall(LABEL, match[2] or "")),
                match[match.lastindex],
            )
            assert NUMBER.fullmatch(value), line
            suffixes = ("_bucket", "_sum", "_count") if types[family] == "histogram" else ("",)
            assert name in [family + suffix for suffix in suffixes], line
            key = (name, tuple(sorted(labels.items())))
            assert key not in samples, f"{line} comes twice"
            samples[key] = float(value)
    check_histograms(types, samples)
    return types, samples


def check_histograms(types: dict[str, str], samples: Samples) -> None:
    for family in (name for name, kind in types.items() if kind == "histogram"):
        buckets = [(float(dict(k[1])["le"]), v) for k, v in samples.items() if k[0] == f"{family}_bucket"]
        assert all(a[0] < b[0] and a[1] <= b[1] for a, b in pairwise(buckets)), "ascending and cumulative"
        assert buckets[-1][0] == math.inf
        (count,) = (v for k, v in samples.items() if k[0] == f"{family}_count")
        assert buckets[-1][1] == count
    for (name, _), value in samples.items():
        assert value >= 0 or types.get(name) == "gauge", "counters never fall"


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[(name, tuple(sorted(labels.items())))]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    engine = Engine.from_pretrained(write_planted_checkpoint(tmp_path_factory.mktemp("planted")))
    params = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
    engine.generate(["hello", "world"], params)
    next(engine.stream("abc", params)).text  # noqa: B018  (dropped: aborted at the next step)
    engine.generate("again", params)
    return engine


def test_the_exposition_has_vllms_names_and_the_right_values(engine: Engine) -> None:
    stats = engine.stats()
    types, samples = parse(render(stats))
    for name, kind, expected in (
        ("vllm:num_requests_running", "gauge", 0),
        ("vllm:num_requests_waiting", "gauge", 0),
        ("vllm:kv_cache_usage_perc", "gauge", 0),
        ("vllm:prompt_tokens_total", "counter", 18),
        ("vllm:generation_tokens_total", "counter", stats.num_output_tokens),
        ("vllm:num_preemptions_total", "counter", 0),
        ("vllm:prefix_cache_queries_total", "counter", stats.num_prefix_queries),
        ("vllm:prefix_cache_hits_total", "counter", 0),
        ("vllm:spec_decode_num_drafts_total", "counter", stats.drafts.num_drafts),
        ("vllm:spec_decode_num_draft_tokens_total", "counter", stats.drafts.num_draft_tokens),
        ("vllm:spec_decode_num_accepted_tokens_total", "counter", stats.drafts.num_accepted_tokens),
    ):
        assert (types[name], value(samples, name)) == (kind, expected)
    for name, count in (
        ("vllm:time_to_first_token_seconds", 4),
        ("vllm:inter_token_latency_seconds", stats.inter_token.count),
        ("vllm:request_time_per_output_token_seconds", 3),
        ("vllm:e2e_request_latency_seconds", 3),
        ("vllm:request_queue_time_seconds", 3),
        ("vllm:request_prefill_time_seconds", 3),
        ("vllm:request_decode_time_seconds", 3),
        ("vllm:iteration_tokens_total", stats.num_steps),
    ):
        assert (types[name], value(samples, f"{name}_count")) == ("histogram", count)
    for reason, count in {"stop": 0, "length": 3, "abort": 1, "deadline": 0, "error": 0}.items():
        assert value(samples, "vllm:request_success_total", finished_reason=reason) == count
    for position, count in enumerate(stats.drafts.accepted_per_position):
        name = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
        assert value(samples, name, position=str(position)) == count
    assert not [name for name in types if "speculation" in name], "nothing is said of what is not known"


def test_labels_are_escaped(engine: Engine) -> None:
    name = 'a "model"\\ of\nmine'
    _, samples = parse(render(engine.stats(), model_name=name))
    assert all(dict(labels)["model_name"] == 'a \\"model\\"\\\\ of\\nmine' for _, labels in samples)


def test_the_parser_sees_what_is_wrong(engine: Engine) -> None:
    text = render(engine.stats())
    for broken in (
        text[:-1],
        text + text,
        text.replace(" 18\n", " 1 8\n"),
        text.replace('le="0.3"', "le=0.3"),
        text.replace('le="0.5"', 'le="0.2"'),
        text.replace("# TYPE vllm:prompt_tokens_total counter\n", ""),
    ):
        assert broken != text
        with pytest.raises((AssertionError, KeyError)):
            parse(broken)


def test_bounds_belong_to_their_buckets() -> None:
    histogram = Histogram((1, 2, 5))
    for observed in (0.5, 1, 1.5, 2, 5.1, 9):
        histogram.observe(observed)
    assert histogram.counts == [2, 2, 0, 2]
    assert (histogram.count, histogram.sum, histogram.mean) == (6, 19.1, 19.1 / 6)
    assert Histogram((1,)).mean is None


class Costs(FixedDraftLength):
    def __init__(self, per_rows: dict[int, float]) -> None:
        self.per_rows = per_rows

    def plain_step_s(self, rows: int) -> float | None:
        return self.per_rows.get(rows)


Committed = tuple[ScheduledSequence, CommitRecord | None]


def committed(num_new: int, num_drafts: int, num_tokens: int) -> Committed:
    """A sequence that speculates, after a commit that was not its first; no tokens: a chunk of its prompt."""
    params = SamplingParams()
    sequence = Sequence("r", [1] * 9, params, SpeculationParams(3), 0, 99, frozenset(), OutputText(None, params))
    record = None
    if num_tokens:
        sequence.stats.record_commit(time.perf_counter(), 0, 0, 1)
        record = sequence.stats.record_commit(time.perf_counter(), num_drafts, num_tokens - 1, num_tokens)
    return ScheduledSequence(sequence, num_new, num_drafts), record


def record_step(stats: EngineStats, step: list[Committed], start_s: float, end_s: float, costs: Costs) -> None:
    scheduled, records = zip(*step)
    before = copy.deepcopy([s.sequence.stats for s in scheduled])
    stats.record_step(scheduled, records, start_s, end_s, costs)
    assert [s.sequence.stats for s in scheduled] == before, "only commit changes a sequence"


def test_speculation_is_compared_with_plain_decoding_of_the_same_tokens() -> None:
    stats = EngineStats(num_pages=1)
    costs = Costs({1: 1.0, 2: 1.5, 42: 4.0})
    record_step(stats, [committed(1, 3, 3)], 10.0, 11.2, costs)  # 3 plain steps of one row
    assert (stats.compared_s, stats.plain_s) == (pytest.approx(1.2), 3.0)
    record_step(stats, [committed(1, 3, 4), committed(1, 3, 1)], 0.0, 2.0, costs)  # 5 tokens at 2 per step of 1.5 s
    assert (stats.compared_s, stats.plain_s) == (pytest.approx(3.2), 3.0 + 2.5 * 1.5)
    # 40 rows of a prompt are computed either way, then one plain step more for the two decoding ones
    record_step(stats, [committed(1, 3, 2), committed(1, 3, 2), committed(40, 0, 0)], 0.0, 5.0, costs)
    assert (stats.compared_s, stats.plain_s) == (pytest.approx(8.2), 6.75 + 4.0 + 1.5)
    record_step(stats, [committed(7, 0, 0)], 0.0, 1.0, costs)  # nobody decodes
    record_step(stats, [committed(1, 0, 1)] * 3, 0.0, 1.0, costs)  # the costs are not known
    assert stats.compared_s == pytest.approx(8.2)
    assert stats.saved_s == pytest.approx(12.25 - 8.2)
    assert stats.speedup == pytest.approx(12.25 / 8.2)
    _, samples = parse(render(stats))
    assert value(samples, "specdec:speculation_saved_seconds") == pytest.approx(12.25 - 8.2)
    assert value(samples, "specdec:speculation_plain_seconds_total") == 12.25


def started(engine: Engine, *prompts: list[int]) -> list[Sequence]:
    core = engine.core
    sequences = [core.admission.sequence(prompt, SamplingParams(max_tokens=8, ignore_eos=True)) for prompt in prompts]
    for sequence in sequences:
        core.add(sequence)
    return sequences


def test_a_step_says_what_it_added_to_each_sequence(tmp_path: Path) -> None:
    """A prompt in two chunks, then verifications until the longest output ends."""
    engine = Engine.from_pretrained(
        write_planted_checkpoint(tmp_path), max_num_seqs=2, max_num_batched_tokens=20, kernels="reference"
    )
    core = engine.core
    short, long = started(engine, [5, 6, 7], list(range(5, 30)))
    records: dict[Sequence, list[CommitRecord | None]] = {short: [], long: []}
    assert short.stats.scheduled_s is None
    while not core.scheduler.idle:
        done = step(core.scheduler, core.draft_length, core.drafter, core.verifier)
        for s, record in zip(done.scheduled, done.records, strict=True):
            records[s.sequence].append(record)
        if len(records[long]) == 1:
            stamped = short.stats.scheduled_s, long.stats.scheduled_s
            assert short.stats.arrival_s < stamped[0] < stamped[1] < short.stats.first_token_s, "as they got a place"
    assert records[short][0] == (0, 0, 1, None)
    assert records[long][:2] == [None, (0, 0, 1, None)]
    assert (short.stats.scheduled_s, long.stats.scheduled_s) == stamped
    for sequence, found in records.items():
        commits = [record for record in found if record is not None]
        stats = sequence.stats
        assert sum(commit.num_tokens for commit in commits) == stats.num_output_tokens == 8
        assert sum(commit.num_draft_tokens for commit in commits) == stats.num_draft_tokens > 0
        assert sum(commit.num_accepted_tokens for commit in commits) == stats.num_accepted_tokens
        assert sum(commit.interval_s or 0.0 for commit in commits) == pytest.approx(stats.decode_s)


def test_a_failed_step_says_what_it_had_added(tmp_path: Path) -> None:
    engine = Engine.from_pretrained(write_planted_checkpoint(tmp_path), kernels="reference")
    core = engine.core
    first, broken, last = started(engine, [5], [6], [7])
    FaultPlan(core).plan(broken.request_id, Fault.COMMIT, 1)
    with pytest.raises(StepError) as caught:
        step(core.scheduler, core.draft_length, core.drafter, core.verifier)
    assert caught.value.failed == [broken]
    assert caught.value.records == [(0, 0, 1, None), None, None]
    assert [s.num_output_tokens for s in (first, last)] == [1, 0]


def test_an_engine_uses_the_costs_it_is_given(engine: Engine) -> None:
    assert engine.stats().as_dict()["speculation"] == {
        "compared_s": None, "plain_s": None, "saved_s": None, "speedup": None,
    }  # fmt: skip
    before = engine.stats().drafts.num_target_forwards
    chosen = engine.core.draft_length
    engine.core.draft_length = Costs({1: 0.25})
    engine.generate("hello", SamplingParams(max_tokens=21, temperature=0, ignore_eos=True))
    engine.core.draft_length = chosen
    stats = engine.stats()
    assert stats.plain_s == pytest.approx(20 * 0.25), "of the 20 tokens after the prompt's step"
    assert 0 < stats.compared_s < 20
    assert stats.drafts.num_target_forwards > before


def test_parts_of_a_run_add_up(tmp_path: Path) -> None:
    engine = Engine.from_pretrained(write_planted_checkpoint(tmp_path))
    params = [SamplingParams(max_tokens=n, temperature=0, ignore_eos=True, seed=n) for n in (12, 20, 31)]
    parts = [engine.generate(["hello", "world", "again"], params[:3]), engine.generate("hello", params[2])]
    totals = [sum((output.stats for output in part), DraftStats()) for part in parts]
    whole = engine.stats().drafts
    assert totals[0] + totals[1] == sum(totals) == sum(o.stats for part in parts for o in part) == whole
    assert whole.num_accepted_tokens > 0
    assert whole.mean_acceptance_length == 1 + whole.num_accepted_tokens / whole.num_drafts
    assert sum([DraftStats(), totals[1]]) == totals[1], "the parts are as they were"
    assert DraftStats({(2, 1): 3}) + DraftStats({(2, 1): 1, (2, 2): 4}) == DraftStats({(2, 1): 4, (2, 2): 4})
    with pytest.raises(TypeError):
        totals[0] + 1
    with pytest.raises(TypeError):
        sum(totals, 1)


def test_a_requests_statistics_are_a_value(engine: Engine) -> None:
    """Frozen, and none of the engine's own objects: what the engine records later does not change them."""
    stats = engine.generate("hello", SamplingParams(max_tokens=20, temperature=0, ignore_eos=True))[0].stats
    assert isinstance(stats, RequestStats)
    assert stats.num_output_tokens == 20
    assert json.loads(json.dumps(stats.as_dict()))["ttft_s"] == pytest.approx(stats.queue_s + stats.prefill_s)
    with pytest.raises(FrozenInstanceError):
        stats.num_output_tokens = 3
    recorder = SequenceStats()
    recorder.record_verification(2, 1)
    stats = RequestStats.of(recorder)
    recorder.record_verification(2, 1)
    assert (stats.num_drafts, recorder.num_drafts) == (1, 2)


@pytest.mark.parametrize(("caching", "queries", "hits"), [(True, 100, 48), (False, 0, 0)])
def test_what_the_prefix_cache_was_asked_for(tmp_path: Path, caching: bool, queries: int, hits: int) -> None:
    engine = Engine.from_pretrained(write_planted_checkpoint(tmp_path), prefix_caching=caching, page_size=16)
    prompt = list(range(1, 51))
    for _ in range(2):
        engine.generate([prompt], SamplingParams(max_tokens=2, temperature=0, ignore_eos=True))
    stats = engine.stats()
    assert (stats.num_prefix_queries, stats.num_prefix_hits) == (queries, hits)

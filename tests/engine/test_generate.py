"""The whole engine on planted models, whose drafts are accepted now and then."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from specdec import (
    CacheFullError,
    CheckpointError,
    Engine,
    ModelError,
    SamplingParams,
    SpecdecWarning,
    SpeculationParams,
)
from specdec.cache.pages import allocate_kv_cache
from specdec.kernels.decisions import Drafts
from specdec.kernels.reference import ReferenceKernels
from specdec.model.layers import Decoder
from specdec.step.batch import Extend, build_batch
from specdec.step.draft import MTPDrafts
from specdec.step.scheduler import ScheduledSequence
from support.fakes import (
    EXACT_DTYPES,
    KERNELS,
    NEEDS_COMPILER,
    PROMPTS,
    planted_tensors,
    tiny_config,
    write_checkpoint,
    write_files,
    write_planted_checkpoint,
)


@pytest.fixture(scope="module", params=KERNELS)
def engine(planted: Path, request: pytest.FixtureRequest) -> Engine:
    return Engine.from_pretrained(planted, kernels=request.param, dtype=EXACT_DTYPES[request.param])


def greedy(k: int, max_tokens: int = 48, **fields: object) -> SamplingParams:
    return SamplingParams(
        max_tokens=max_tokens, temperature=0, ignore_eos=True, speculation=SpeculationParams(k), **fields
    )  # fmt: skip


@pytest.mark.slow
def test_greedy_output_does_not_depend_on_k_batch_pages_or_chunks(planted: Path, engine: Engine) -> None:
    expected = [engine.generate(p, greedy(0))[0].token_ids for p in PROMPTS]
    for k in range(9):
        outputs = engine.generate(PROMPTS, greedy(k))
        assert [o.token_ids for o in outputs] == expected
        assert k == 0 or 0.1 < outputs[0].stats.num_accepted_tokens / outputs[0].stats.num_draft_tokens < 0.95
    for page_size, max_num_seqs, budget in ((1, 2, 18), (3, 5, 45), (64, 1, 9)):
        other = Engine.from_pretrained(
            planted, page_size=page_size, max_num_seqs=max_num_seqs, max_num_batched_tokens=budget
        )
        mixed = [greedy(k) for k in (5, 0, 3, 1, 8, 2, 4)]
        assert [o.token_ids for o in other.generate(PROMPTS, mixed)] == expected
        other.core.scheduler.pool.check_integrity([])


def test_accepted_drafts_save_target_forwards(engine: Engine) -> None:
    stats = engine.generate("hello world", greedy(4, max_tokens=64))[0].stats
    assert stats.num_target_forwards == stats.num_drafts + 1  # the prefill decides one token without drafts
    assert stats.num_output_tokens == 64
    assert stats.num_target_forwards < 64
    assert sum(stats.accepted_per_position) == stats.num_accepted_tokens
    assert sum(stats.drafted_per_position) == stats.num_draft_tokens
    assert stats.mean_acceptance_length == 1 + stats.num_accepted_tokens / stats.num_drafts


@pytest.mark.slow
def test_draft_lengths_of_engine_and_request_are_honoured(planted: Path, engine: Engine) -> None:
    plain = SamplingParams(max_tokens=30, temperature=0, ignore_eos=True)
    for k in range(9):
        assert len(engine.generate("hello", greedy(k, max_tokens=30))[0].stats.drafted_per_position) == k
        own = Engine.from_pretrained(planted, speculation=SpeculationParams(k))
        assert len(own.generate("hello", plain)[0].stats.drafted_per_position) == k
    assert len(engine.generate("hello", plain)[0].stats.drafted_per_position) == 3


@pytest.mark.parametrize("recycling", ["post_norm", "pre_norm"])
def test_each_draft_step_is_fed_what_it_should(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recycling: str) -> None:
    """The extend gets the target's hidden states after its final norm; later steps the layer's own last output."""
    engine = Engine.from_pretrained(write_checkpoint(tmp_path), kernels="reference", mtp_recycling=recycling)
    calls = []
    decode = ReferenceKernels.decode

    def recording(self: ReferenceKernels, decoder: object, ids: object, previous: object, *rest: object) -> object:
        output = decode(self, decoder, ids, previous, *rest)
        if previous is not None:
            calls.append((torch.cat([rows.tensor() for rows in previous]), output))
        return output

    monkeypatch.setattr(ReferenceKernels, "decode", recording)
    prompt = [5, 6, 7, 8]
    engine.generate(
        prompt, SamplingParams(max_tokens=9, temperature=0, ignore_eos=True, speculation=SpeculationParams(3))
    )
    batch = build_batch([Extend(prompt, 0, [0])], 4)
    cache = allocate_kv_cache(engine.checkpoint.config, 3, 1, 4, torch.float32, torch.device("cpu"))
    with torch.inference_mode():
        hidden = engine.runtime.model.target(batch.input_ids, batch.metadata, cache)
    (extend, first), (step_2, second), (step_3, _) = calls[:3]
    torch.testing.assert_close(extend, hidden)
    for fed, output in ((step_2, first), (step_3, second)):
        assert torch.equal(fed, (output.normed if recycling == "post_norm" else output.unnormed)[-1:])


@pytest.mark.slow
def test_drafts_use_the_requests_transform(engine: Engine) -> None:
    """With top_k = 1 a sampled draft is the greedy one, so acceptance is greedy's."""
    sampled = SamplingParams(max_tokens=48, temperature=1.3, top_k=1, ignore_eos=True, speculation=SpeculationParams(4))
    for prompt in PROMPTS:
        a, b = engine.generate(prompt, sampled)[0], engine.generate(prompt, greedy(4))[0]
        assert (a.token_ids, a.stats.accepted_per_position) == (b.token_ids, b.stats.accepted_per_position)


def test_no_speculation_means_no_mtp_work(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Decoder, "draft_chain", lambda *_: pytest.fail("the MTP layer ran"))
    assert len(engine.generate("abc", greedy(0, max_tokens=5))[0].token_ids) == 5


def test_pre_norm_recycling_changes_drafts_not_output(planted: Path, engine: Engine) -> None:
    ablated = Engine.from_pretrained(planted, mtp_recycling="pre_norm")
    ours, theirs = (e.generate(PROMPTS, greedy(4)) for e in (engine, ablated))
    assert [o.token_ids for o in ours] == [o.token_ids for o in theirs]
    accepted = [[o.stats.accepted_per_position for o in outputs] for outputs in (ours, theirs)]
    assert accepted[0] != accepted[1]


@pytest.mark.slow
@pytest.mark.parametrize("draft_sampling", ["sampled", "greedy"])
@pytest.mark.parametrize("rule", ["coupled", "block", "token"])
def test_seeded_sampling_does_not_depend_on_the_batch(engine: Engine, rule: str, draft_sampling: str) -> None:
    def params(seed: int) -> SamplingParams:
        speculation = SpeculationParams(3, rule, draft_sampling)
        return SamplingParams(
            max_tokens=24, temperature=0.8, top_p=0.95, seed=seed, ignore_eos=True, speculation=speculation
        )

    alone = [engine.generate(p, params(i))[0].token_ids for i, p in enumerate(PROMPTS)]
    order = list(range(len(PROMPTS)))
    random.Random(0).shuffle(order)
    together = engine.generate([PROMPTS[i] for i in order], [params(i) for i in order])
    assert [o.token_ids for o in together] == [alone[i] for i in order]
    assert engine.generate(PROMPTS[0], params(99))[0].token_ids != alone[0]


@pytest.mark.slow
def test_requests_of_all_kinds_share_a_batch(engine: Engine) -> None:
    """Rules, drafts, temperatures, parameters and lengths mixed: each request as if it were alone."""
    kinds = [
        {"temperature": 0},
        {"temperature": 0, "presence_penalty": 1.0},
        {"temperature": 0, "logprobs": 2},
        {"speculation": SpeculationParams(3, "coupled")},
        {"speculation": SpeculationParams(2, "block"), "top_p": 0.9, "logprobs": 1},
        {"speculation": SpeculationParams(5, "token", "greedy"), "frequency_penalty": 0.5},
        {"speculation": SpeculationParams(4, "token", min_draft_confidence=0.1), "top_k": 9},
        {"speculation": SpeculationParams(0, "token"), "min_p": 0.02},
        {"speculation": SpeculationParams(8, "block", "greedy"), "logit_bias": {7: 3.0}},
        {"speculation": SpeculationParams(1, "coupled", "greedy"), "bad_words": ((5,), (6, 7)), "min_tokens": 9},
    ]
    params = [SamplingParams(max_tokens=11 + 3 * i, seed=i, ignore_eos=True, **kind) for i, kind in enumerate(kinds)]
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(len(kinds))]
    alone = [engine.generate(prompt, p)[0] for prompt, p in zip(prompts, params)]
    order = random.Random(3).sample(range(len(kinds)), len(kinds))
    together = engine.generate([prompts[i] for i in order], [params[i] for i in order])
    exact = engine.runtime.model.target.kernels.name == "cpu"
    for i, output in zip(order, together):
        assert output.token_ids == alone[i].token_ids, kinds[i]
        if exact:
            assert output.logprobs == alone[i].logprobs
            assert output.stats.accepted_per_position == alone[i].stats.accepted_per_position


def test_a_drawn_seed_reproduces_the_output(engine: Engine) -> None:
    first = engine.generate("abc", SamplingParams(max_tokens=20, temperature=1.5))[0]
    again = engine.generate("abc", SamplingParams(max_tokens=20, temperature=1.5, seed=first.seed))[0]
    assert first.token_ids == again.token_ids
    assert engine.generate("abc", SamplingParams(max_tokens=20, temperature=1.5))[0].seed != first.seed


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["coupled", "block", "token"])
@pytest.mark.parametrize(("k", "draft_sampling"), [(0, "sampled"), (2, "sampled"), (2, "greedy")])
def test_sampled_outputs_follow_the_targets_law(tmp_path: Path, rule: str, k: int, draft_sampling: str) -> None:
    """Three tokens of an 8-token model against the exact law: Pearson's chi-square over 8**3 cells."""
    config = tiny_config(vocab_size=8)
    engine = Engine.from_pretrained(write_planted_checkpoint(tmp_path, config, noise=0.7, sharpness=0.05))
    num_samples, prompt = 6000, [1, 5, 3]
    speculation = SpeculationParams(k, rule, draft_sampling)
    params = [
        SamplingParams(max_tokens=3, temperature=0.9, top_p=0.97, seed=s, ignore_eos=True, speculation=speculation)
        for s in range(num_samples)
    ]
    outputs = engine.generate([prompt] * num_samples, params)
    counts = Counter(tuple(o.token_ids) for o in outputs)
    if k:
        accepted = sum(o.stats.num_accepted_tokens for o in outputs) / sum(o.stats.num_draft_tokens for o in outputs)
        assert 0.2 < accepted < 0.98
    law = exact_law(engine, prompt, params[0], 3)
    assert set(counts) <= {tokens for tokens, p in law.items() if p > 0}
    expected = {tokens: p * num_samples for tokens, p in law.items() if p * num_samples >= 5}
    rest = num_samples - sum(expected.values())
    chi2 = sum((counts[t] - e) ** 2 / e for t, e in expected.items())
    chi2 += (num_samples - sum(counts[t] for t in expected) - rest) ** 2 / max(rest, 1)
    freedom = len(expected)
    assert freedom > 50
    assert chi2 < freedom + 4.5 * (2 * freedom) ** 0.5, f"chi2 {chi2:.0f} on {freedom} degrees of freedom"


def exact_law(engine: Engine, prompt: list[int], params: SamplingParams, length: int) -> dict[tuple[int, ...], float]:
    """By one dense forward of all continuations, with transforms written out here."""
    model, vocab_size = engine.runtime.model, engine.checkpoint.config.vocab_size
    laws: dict[tuple[int, ...], torch.Tensor] = {}
    for n in range(length):
        for tokens in itertools.product(range(vocab_size), repeat=n):
            context = prompt + list(tokens)
            cache = allocate_kv_cache(model.config, 3, 1, len(context), torch.float32, torch.device("cpu"))
            batch = build_batch([Extend(context, 0, [0])], len(context))
            with torch.inference_mode():
                hidden = model.target(batch.input_ids, batch.metadata, cache)
                probs = (model.target.compute_logits(hidden[-1:])[0].double() / params.temperature).softmax(0)
            kept, total = torch.zeros_like(probs), 0.0
            for token in probs.argsort(descending=True).tolist():
                kept[token] = probs[token]
                total += probs[token].item()
                if total >= params.top_p:
                    break
            laws[tokens] = kept / kept.sum()
    law = {}
    for tokens in itertools.product(range(vocab_size), repeat=length):
        probability = 1.0
        for n, token in enumerate(tokens):
            probability *= laws[tokens[:n]][token].item()
        law[tokens] = probability
    return law


@pytest.mark.slow
def test_ending_inside_an_accepted_run_is_the_same_as_without_drafts(engine: Engine) -> None:
    """Every possible place for a stop token and for max_tokens, with K = 6 and K = 0."""
    reference = engine.generate("hello world", greedy(0, max_tokens=24))[0]
    for end in range(24):
        token = reference.token_ids[end]
        first = reference.token_ids.index(token)
        for k in (0, 6):
            stopped = engine.generate("hello world", greedy(k, max_tokens=24, stop_token_ids=(token,)))[0]
            assert stopped.token_ids == reference.token_ids[: first + 1]
            assert stopped.finish_reason == "stop"
            assert stopped.text == engine.tokenizer.decode(reference.token_ids[:first])
            kept = greedy(k, max_tokens=24, stop_token_ids=(token,), include_stop_str_in_output=True)
            assert engine.generate("hello world", kept)[0].text == engine.tokenizer.decode(stopped.token_ids)
            short = engine.generate("hello world", greedy(k, max_tokens=end + 1))[0]
            assert short.text == engine.tokenizer.decode(short.token_ids), (
                "an unfinished character comes out at the end"
            )
            assert short.token_ids == reference.token_ids[: end + 1]
            assert short.finish_reason == "length"
    engine.core.scheduler.pool.check_integrity([])


def test_stop_strings_cut_text_and_tokens(engine: Engine) -> None:
    reference = engine.generate("hello world", greedy(0, max_tokens=40))[0]
    text = reference.text
    stop = text[10:13]
    at = text.index(stop)
    for k in (0, 5):
        output = engine.generate("hello world", greedy(k, max_tokens=40, stop=(stop, "never")))[0]
        assert output.text == text[:at]
        assert output.finish_reason == "stop"
        assert output.token_ids == reference.token_ids[: len(output.token_ids)]
        assert len(output.token_ids) < 40
        with_stop = engine.generate(
            "hello world", greedy(k, max_tokens=40, stop=stop, include_stop_str_in_output=True)
        )[0]
        assert with_stop.text == text[: at + len(stop)]
        chunks = list(engine.stream("hello world", greedy(k, max_tokens=40, stop=stop)))
        assert "".join(c.text for c in chunks) == text[:at]


@pytest.mark.slow
def test_min_tokens_puts_off_every_end(engine: Engine) -> None:
    reference = engine.generate("hello world", greedy(0, max_tokens=40))[0]
    ending = reference.token_ids[5]
    for k in (0, 5):
        output = engine.generate("hello world", greedy(k, max_tokens=40, stop_token_ids=(ending,), min_tokens=20))[0]
        assert ending not in output.token_ids[:20]
        assert len(output.token_ids) >= 20

        def ended(least: int, k: int = k) -> int:
            params = greedy(k, max_tokens=40, stop=(reference.text[10:13],), min_tokens=least)
            return len(engine.generate("hello world", params)[0].token_ids)

        complete = ended(0)  # with so many tokens the stop string is
        assert ended(complete) == complete < ended(complete + 1)


@pytest.mark.slow
def test_logprobs_are_the_models_and_the_laws_under_speculation_too(engine: Engine) -> None:
    fields = {"temperature": 0.8, "top_k": 20, "frequency_penalty": 0.5, "logprobs": 3, "seed": 5, "max_tokens": 30}
    for rule in ("coupled", "block", "token"):
        for k in (0, 4):
            params = SamplingParams(ignore_eos=True, speculation=SpeculationParams(k, rule), **fields)
            output = engine.generate("hello world", params)[0]
            assert output.logprobs is not None
            assert [x.token_id for x in output.logprobs] == output.token_ids
            logits = teacher_forced_logits(engine, output.prompt_token_ids + output.token_ids)
            for i, entry in enumerate(output.logprobs):
                row = logits[len(output.prompt_token_ids) - 1 + i].double().clone()
                raw = row.log_softmax(-1)
                for token in set(output.token_ids[:i]):
                    row[token] -= 0.5 * output.token_ids[:i].count(token)
                row = row / 0.8
                law = row.masked_fill(row < row.topk(20).values[-1], float("-inf")).log_softmax(-1)
                for ours, expected, top in (
                    (entry.logprob, raw, entry.top),
                    (entry.processed_logprob, law, entry.processed_top),
                ):
                    assert ours == pytest.approx(expected[output.token_ids[i]].item(), abs=1e-4)
                    assert [t for t, _ in top] == expected.topk(3).indices.tolist()
                    assert [x for _, x in top] == pytest.approx(expected.topk(3).values.tolist(), abs=1e-4)


def teacher_forced_logits(engine: Engine, token_ids: list[int]) -> torch.Tensor:
    model, num = engine.runtime.model, len(token_ids)
    kernels = model.target.kernels
    cache = allocate_kv_cache(model.config, 3, 1, num, kernels.activation_dtype, torch.device("cpu"))
    batch = build_batch([Extend(token_ids, 0, [0])], num)
    with torch.inference_mode():
        return model.target.compute_logits(model.target(batch.input_ids, batch.metadata, cache))


def test_logprobs_come_with_chunks_and_stop_with_the_output(engine: Engine) -> None:
    reference = engine.generate("hello world", greedy(4, max_tokens=24, logprobs=0))[0]
    for end in range(1, 24, 5):
        params = greedy(4, max_tokens=24, logprobs=0, stop_token_ids=(reference.token_ids[end],))
        stream = engine.stream("hello world", params)
        chunks = list(stream)
        assert stream.output.logprobs == [x for c in chunks for x in c.logprobs]
        assert [len(c.logprobs) for c in chunks] == [len(c.token_ids) for c in chunks]
        assert stream.output.logprobs == reference.logprobs[: len(stream.output.token_ids)]
        assert all(x.top == [] and x.logprob == x.processed_logprob for x in stream.output.logprobs)
    assert engine.generate("abc", greedy(2, max_tokens=3))[0].logprobs is None
    assert next(engine.stream("abc", greedy(2))).logprobs is None


@pytest.mark.slow
def test_greedy_requests_honour_penalties_and_bans(engine: Engine) -> None:
    """Temperature 0 takes the argmax of the edited logits, with drafts and without."""
    start = engine.tokenizer.encode("hello world")
    prompt = (
        engine.generate("hello world", greedy(0))[0].token_ids[4:9] + start
    )  # the chain comes to these tokens again
    plain = engine.generate(prompt, greedy(0))[0].token_ids
    second = plain[1]
    for fields in (
        {"repetition_penalty": 3.0},
        {"frequency_penalty": -2.0},
        {"presence_penalty": -2.0},
        {"logit_bias": {second: float("-inf")}},
        {"bad_words": ((plain[0], second),)},
        {"bad_words": (engine.tokenizer.decode([token]) for token in plain if 3 + 33 <= token < 3 + 94)},
    ):
        edited = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True, **fields)
        expected = engine.generate(prompt, replace(edited, speculation=SpeculationParams(0)))[0].token_ids
        assert expected != plain, fields
        for k in (1, 4):
            assert engine.generate(prompt, replace(edited, speculation=SpeculationParams(k)))[0].token_ids == expected
    assert second not in engine.generate(prompt, greedy(3, logit_bias={second: float("-inf")}))[0].token_ids


@pytest.mark.slow
def test_low_confidence_ends_chains_early(engine: Engine) -> None:
    def drafted(confidence: float, temperature: float = 0.0) -> tuple[list[int], list[int]]:
        speculation = SpeculationParams(4, min_draft_confidence=confidence)
        params = SamplingParams(
            max_tokens=60, temperature=temperature, seed=3, ignore_eos=True, speculation=speculation
        )
        output = engine.generate("hello world", params)[0]
        return output.token_ids, output.stats.drafted_per_position

    for temperature in (0.0, 0.8):
        tokens, full = drafted(0.0, temperature)
        assert len(full) == 4
        counts = [drafted(confidence, temperature) for confidence in (0.05, 0.2, 1.0)]
        assert [t for t, _ in counts] == [tokens] * 3
        totals = [sum(d) for _, d in counts]
        assert sum(full) >= totals[0] > totals[1] > totals[2]


@pytest.mark.slow
def test_end_of_text_ends_unless_ignored(planted: Path, engine: Engine) -> None:
    tokens = engine.generate("a", greedy(3, max_tokens=250))[0].token_ids
    assert 0 in tokens
    for k in (0, 4):
        ended = engine.generate("a", SamplingParams(max_tokens=250, temperature=0, speculation=SpeculationParams(k)))[0]
        assert ended.token_ids == tokens[: tokens.index(0) + 1]
        assert ended.finish_reason == "stop"
        assert "endoftext" not in ended.text


@pytest.mark.slow
def test_generation_config_gives_end_tokens_and_defaults(planted: Path, engine: Engine, tmp_path: Path) -> None:
    tokens = engine.generate("a", greedy(0, max_tokens=60))[0].token_ids
    second, third = next(t for t in tokens[5:] if t > 2), next(t for t in tokens[20:] if t > 2)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((planted / name).read_bytes())

    def write(**content: object) -> Engine:
        (tmp_path / "generation_config.json").write_text(json.dumps(content))
        return Engine.from_pretrained(tmp_path)

    params = SamplingParams(max_tokens=60, temperature=0)
    for eos in ([second], [third, second]):
        output = write(eos_token_id=eos).generate("a", params)[0]
        assert output.token_ids == tokens[: min(tokens.index(t) for t in eos) + 1]
        assert output.finish_reason == "stop"
    both = json.loads((tmp_path / "config.json").read_text()) | {"eos_token_id": [1, second]}
    (tmp_path / "config.json").write_text(json.dumps(both))
    assert write().generate("a", params)[0].token_ids == tokens[: tokens.index(second) + 1]

    recommended = write(temperature=0.6, top_k=20, top_p=0.9, min_p=0.05, do_sample=True).default_sampling_params()
    assert recommended == SamplingParams(temperature=0.6, top_k=20, top_p=0.9, min_p=0.05)
    assert write(temperature=0.6, do_sample=False).default_sampling_params().temperature == 0
    assert write().default_sampling_params() == SamplingParams()
    penalised = write(repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=0.1).default_sampling_params()
    assert penalised == SamplingParams(repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=0.1)
    with pytest.warns(SpecdecWarning, match="recommends {'typical_p': 0.9}, which is not supported"):
        write(typical_p=0.9).default_sampling_params()
    for content, message in (
        ({"top_p": 0}, "top_p = 0 must be in"),
        ({"eos_token_id": 999}, "eos_token_id 999 is outside"),
    ):
        with pytest.raises(CheckpointError, match=f"generation_config.json: {message}"):
            write(**content)


def test_output_ends_at_the_context_limit(planted: Path) -> None:
    engine = Engine.from_pretrained(planted, max_model_len=20)
    for k in (0, 8):
        output = engine.generate([5] * 12, greedy(k, max_tokens=100))[0]
        assert (len(output.token_ids), output.finish_reason) == (8, "length")


@pytest.mark.slow
def test_streams_give_what_generate_gives_and_free_their_pages(engine: Engine) -> None:
    expected = engine.generate("hello world", greedy(3))[0]
    stream = engine.stream("hello world", greedy(3))
    chunks = list(stream)
    assert [t for c in chunks for t in c.token_ids] == expected.token_ids
    assert "".join(c.text for c in chunks) == expected.text == stream.output.text
    assert [c.finish_reason for c in chunks] == [None] * (len(chunks) - 1) + ["length"]

    left = engine.stream("hello world", greedy(3))
    next(left)
    with pytest.raises(ValueError, match="still running"):
        _ = left.output
    left.close()
    assert left.output.finish_reason == "abort"
    assert engine.core.scheduler.idle
    engine.core.scheduler.pool.check_integrity([])
    assert list(left) == []
    engine.stream("never started", greedy(3)).close()
    assert engine.core.scheduler.idle
    side_by_side = [engine.stream(p, greedy(2)) for p in PROMPTS[:3]]
    interleaved = [[t for c in s for t in c.token_ids] for s in reversed(side_by_side)]
    assert interleaved == [engine.generate(p, greedy(0))[0].token_ids for p in reversed(PROMPTS[:3])]
    assert engine.core.scheduler.idle
    engine.core.scheduler.pool.check_integrity([])


def test_hundreds_of_prompts_share_few_slots_and_pages(planted: Path) -> None:
    engine = Engine.from_pretrained(planted, max_num_seqs=4, num_pages=24, page_size=4)
    prompts = [[1 + i % 250] * (1 + i % 9) for i in range(300)]
    outputs = engine.generate(prompts, greedy(3, max_tokens=6))
    assert [o.prompt_token_ids for o in outputs] == prompts
    assert all(len(o.token_ids) == 6 for o in outputs)
    engine.core.scheduler.pool.check_integrity([])


def test_requests_that_cannot_run_are_refused_before_anything_runs(planted: Path) -> None:
    engine = Engine.from_pretrained(planted, num_pages=4, page_size=8)
    with pytest.raises(ValueError, match="the prompt is empty"):
        engine.generate("")
    with pytest.raises(ValueError, match="prompt token 259 is no token id of this model: 0 <= id < 259"):
        engine.generate([[5], [259]])
    with pytest.raises(ValueError, match="the prompt has 256 tokens, the context 256"):
        engine.generate([5] * 256)
    with pytest.raises(ValueError, match="2 SamplingParams for 3 prompts"):
        engine.generate(["a", "b", "c"], [greedy(0), greedy(0)])
    for prompt, message in (
        (None, "None is no prompt"),
        (5, "5 is no prompt"),
        (b"abc", "b'abc' is no prompt"),
        ({"a": 1}, "is no prompt"),
        ([1.5], "1.5 is no prompt"),
        ([[1, "a"]], "prompt token 'a' is no token id"),
        ([True], "True is no prompt"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.generate(prompt, greedy(0))
    for params in ({"temperature": 0}, [None], "x"):
        with pytest.raises(ValueError, match="must be a SamplingParams, or one for each prompt"):
            engine.generate("a", params)
    with pytest.raises(ValueError, match="stop_token_ids: 259 is no token id of this model"):
        engine.generate("a", greedy(0, stop_token_ids=(259,)))
    for fields, name in (({"logit_bias": {259: 1}}, "logit_bias"), ({"bad_words": ((1, 259),)}, "bad_words")):
        with pytest.raises(ValueError, match=f"{name}: 259 is no token id of this model"):
            engine.generate("a", greedy(0, **fields))
    everything = {token: float("-inf") for token in range(1, 259)}
    with pytest.raises(ValueError, match="leave none of the 259 tokens possible"):
        engine.generate("a", greedy(0, logit_bias=everything, min_tokens=1, stop_token_ids=(0,)))
    assert set(engine.generate("a", greedy(1, max_tokens=5, logit_bias=everything))[0].token_ids) == {0}
    with pytest.raises(ValueError, match="not valid Unicode"):
        engine.generate("a\udcff", greedy(0))
    with pytest.raises(CacheFullError, match=r"up to 33 tokens needs 5 pages of 8, the KV cache has 4.*num_pages"):
        engine.generate(["a", [5] * 3], [greedy(0, max_tokens=4), greedy(0, max_tokens=30)])
    assert engine.core.scheduler.idle
    engine.core.scheduler.pool.check_integrity([])
    assert len(engine.generate([5] * 3, greedy(2, max_tokens=29))[0].token_ids) == 29


def test_a_failing_step_leaves_the_engine_usable(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "draft_chain", lambda *_: (_ for _ in ()).throw(RuntimeError("broken")))
        with pytest.raises(RuntimeError, match="broken"):
            engine.generate(PROMPTS, greedy(3))
        with pytest.raises(RuntimeError, match="broken"):
            list(engine.stream(PROMPTS[0], greedy(3)))
    assert engine.core.scheduler.idle
    engine.core.scheduler.pool.check_integrity([])
    assert len(engine.generate("abc", greedy(3, max_tokens=7))[0].token_ids) == 7


def test_without_an_mtp_layer_it_decodes_plainly_and_says_so(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, with_mtp=False)
    with pytest.warns(UserWarning, match="no MTP layer: speculation is unavailable"):
        engine = Engine.from_pretrained(folder)
    assert len(engine.generate("abc", SamplingParams(max_tokens=4, temperature=0))[0].token_ids) == 4
    with pytest.raises(ValueError, match=r"num_speculative_tokens = 2.*no MTP layer"):
        engine.generate("abc", greedy(2))
    with pytest.raises(ValueError, match=r"num_speculative_tokens = 1.*no MTP layer"):
        Engine.from_pretrained(folder, speculation=SpeculationParams(1))
    Engine.from_pretrained(folder, speculation=SpeculationParams(0))


@pytest.mark.parametrize("k", [None, 0])
def test_without_an_mtp_layer_sampling_works_too(tmp_path: Path, k: int | None) -> None:
    folder = write_checkpoint(tmp_path, with_mtp=False)
    engine = Engine.from_pretrained(folder, speculation=SpeculationParams(0))
    outputs = []
    for rule in ("coupled", "token"):
        speculation = None if k is None else SpeculationParams(k, rule)
        params = SamplingParams(max_tokens=9, seed=1, ignore_eos=True, speculation=speculation)
        outputs.append(engine.generate("abc", params)[0])
        assert len(outputs[-1].token_ids) == 9
        assert outputs[-1].stats.num_drafts == 0
    assert (outputs[0].token_ids == outputs[1].token_ids) == (k is None), "the rule decides which noise is used"


def test_prompts_may_be_tuples_arrays_and_tensors(engine: Engine) -> None:
    expected = [o.token_ids for o in engine.generate([[5, 6], [7]], greedy(2, max_tokens=4))]
    for prompts in (((5, 6), (7,)), [np.array([5, 6]), [np.int64(7)]], [torch.tensor([5, 6]), torch.tensor([7])]):
        assert [o.token_ids for o in engine.generate(prompts, greedy(2, max_tokens=4))] == expected
    assert engine.generate(np.array([5, 6]), greedy(2, max_tokens=4))[0].token_ids == expected[0]
    assert engine.generate([]) == []


def test_finished_requests_keep_no_hidden_states(engine: Engine) -> None:
    stream = engine.stream("hello world", greedy(3, max_tokens=5))
    list(stream)
    assert not stream._sequence.pending_hidden


def test_a_stream_dropped_in_the_middle_of_a_step_ends_after_it(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropped = [engine.stream(p, greedy(3)) for p in PROMPTS[:3]]
    for stream in dropped:
        next(stream)
    del stream
    draft = MTPDrafts.draft

    def dropping(self: MTPDrafts, scheduled: list[ScheduledSequence]) -> Drafts:
        dropped.clear()
        return draft(self, scheduled)

    monkeypatch.setattr(MTPDrafts, "draft", dropping)
    assert len(engine.generate("abc", greedy(2, max_tokens=12))[0].token_ids) == 12
    assert engine.core.scheduler.idle
    engine.core.scheduler.pool.check_integrity([])


def test_broken_weights_raise_instead_of_generating(tmp_path: Path) -> None:
    config = tiny_config()
    tensors = planted_tensors(config, 0, noise=0.5)
    tensors["model.norm.weight"][3] = float("nan")
    write_files(tmp_path, config)
    save_file(tensors, str(tmp_path / "model.safetensors"))
    engine = Engine.from_pretrained(tmp_path)
    for temperature in (0, 1):
        with pytest.raises(ModelError, match="logits are not finite"):
            engine.generate("abc", SamplingParams(temperature=temperature))
    engine.core.scheduler.pool.check_integrity([])


@pytest.mark.slow
def test_chunked_prefill_keeps_every_mtp_pair(planted: Path, engine: Engine) -> None:
    """The same output and, since every pair of the prompt has its row, the same drafts; chunk sizes below 9, pages and
    hits are in test_pressure.py."""
    prompts = [PROMPTS[2], PROMPTS[5] + "a", "hello world, hello moon" * 3]

    def drafts(engine: Engine) -> list[tuple[list[int], list[int]]]:
        outputs = [engine.generate(p, greedy(3))[0] for p in prompts]
        return [(o.token_ids, o.stats.accepted_per_position) for o in outputs]

    expected = drafts(engine)
    for budget in (9, 11, 16, 60):
        chunked = Engine.from_pretrained(planted, max_num_seqs=1, max_num_batched_tokens=budget)
        assert drafts(chunked) == expected


def test_chat_applies_the_template(engine: Engine) -> None:
    output = engine.chat([{"role": "user", "content": "hi"}], greedy(2, max_tokens=3), enable_thinking=False)
    assert (
        engine.tokenizer.decode(output.prompt_token_ids, skip_special_tokens=False) == "<|user|>hi/nothink<|assistant|>"
    )


def test_arguments_are_honoured_or_refused(planted: Path) -> None:
    for arguments, message in (
        ({"device": "warp"}, "device = 'warp' is unknown"),
        ({"device": "mps"}, "device = 'mps' is not supported: give 'auto', 'cpu' or 'cuda'"),
        ({"dtype": "int4"}, "dtype = 'int4' is unknown: choose one of auto, bfloat16"),
        ({"kv_dtype": "fp8"}, "kv_dtype = 'fp8' is unknown"),
        ({"kernels": "cuda"}, "kernels = 'cuda' is unknown"),
        ({"device": None}, "device = None is unknown"),
        ({"model": 5}, "model = 5 must be a string or a path"),
        ({"num_threads": 0}, "num_threads = 0 must be an integer from 1 to"),
        ({"page_size": 0}, "page_size = 0 must be an integer, from 1 to"),
        ({"max_model_len": 257}, "max_model_len = 257 exceeds the checkpoint's 256 positions"),
        ({"num_pages": 4, "kv_cache_bytes": 10**6}, "both size the cache"),
        ({"kv_cache_bytes": 10}, "kv_cache_bytes = 10 is less than one page"),
        ({"num_pages": 10**9}, "the model does not fit"),
        ({"max_num_batched_tokens": 100}, "max_num_batched_tokens = 100 must be an integer, at least 144"),
        ({"mtp_recycling": "none"}, "mtp_recycling = 'none' is unknown"),
    ):
        with pytest.raises(ValueError, match=message):
            Engine.from_pretrained(**{"model": planted} | arguments)
    with pytest.raises(TypeError, match="max_seqs"):
        Engine.from_pretrained(planted, max_seqs=3)
    for kernels, dtype in (("reference", torch.bfloat16), ("auto", torch.float64)):
        engine = Engine.from_pretrained(planted, kernels=kernels, dtype=dtype, kv_dtype="float32", kv_cache_bytes=10**6)
        assert engine.generate("abc", greedy(3, max_tokens=9))[0].stats.num_output_tokens == 9
    engine = Engine.from_pretrained(planted, dtype=torch.bfloat16, kv_dtype="float32", kv_cache_bytes=10**6)
    assert engine.runtime.kv_cache.dtype == torch.float32
    assert engine.runtime.kv_cache.nbytes <= 10**6
    assert engine.runtime.model.target.kernels.dtype == torch.bfloat16
    assert len(engine.generate("abc", greedy(3, max_tokens=9))[0].token_ids) == 9


@NEEDS_COMPILER
def test_numpys_numbers_are_as_good_as_pythons(planted: Path) -> None:
    outputs = []
    for integer, number in ((int, float), (np.int64, np.float32), (np.uint8, np.float64)):
        engine = Engine.from_pretrained(
            planted, num_threads=integer(1), page_size=integer(8), max_num_seqs=integer(2), num_pages=integer(20)
        )
        params = SamplingParams(
            n=integer(2), seed=integer(200), max_tokens=integer(9), temperature=number(0.5), top_k=integer(50),
            logprobs=integer(1), speculation=SpeculationParams(integer(2), min_draft_confidence=number(0.25)),
        )  # fmt: skip
        first = engine.generate(np.array([5, 6]), params)[0]
        outputs.append(json.dumps([[o.token_ids, o.seed] for o in first.outputs]))
    assert outputs[0] == outputs[1] == outputs[2]


def test_arguments_of_the_cpp_kernels_are_honoured_or_refused(planted: Path) -> None:
    engine = Engine.from_pretrained(planted, kernels="cpu", dtype="bfloat16", kv_dtype="float32", kv_cache_bytes=10**6)
    assert engine.generate("abc", greedy(3, max_tokens=9))[0].stats.num_output_tokens == 9
    with pytest.raises(ValueError, match=r"kernels='cpu' have weights in float32, bfloat16 or int8, not torch.float16"):
        Engine.from_pretrained(planted, kernels="cpu", dtype="float16")
    with pytest.raises(ValueError, match=r"kv_dtype = torch.float16: kernels = 'cpu' know"):
        Engine.from_pretrained(planted, kernels="cpu", kv_dtype="float16")

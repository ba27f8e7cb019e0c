"""What parameters make of logits, against transformers; which parameters are refused."""

from __future__ import annotations

import copy
import inspect
import pickle
import random
import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from specdec import Engine, EngineConfig, SamplingParams, SpeculationParams
from specdec.kernels.reference import ReferenceKernels, banned_tokens, lowest_argmax
from specdec.request.logit_edits import RequestEdits
from specdec.request.seeds import Stream
from specdec.request.sequence import Sequence
from specdec.step.sampling import draft_stream, row_sampling, target_stream
from support.laws import law_by_transformers

pytest.importorskip("transformers")
VOCAB_SIZE = 60
EXACT = ReferenceKernels(torch.device("cpu"), torch.float64)


def make_sequence(params: SamplingParams, prompt: list[int], output: list[int], ends: frozenset[int]) -> Sequence:
    sequence = Sequence(
        request_id="x", prompt_token_ids=prompt, params=params, speculation=params.speculation or SpeculationParams(),
        seed=1, max_total_tokens=99, end_token_ids=ends, output=None, bad_words=params.bad_words,
    )  # fmt: skip
    sequence.token_ids += output
    for token in output:
        if sequence.edits is not None:
            sequence.edits.advance(token)
    return sequence


def law(sequence: Sequence, drafts: list[int], logits: Tensor) -> Tensor:
    row = logits.clone()[None]
    EXACT.edit_(row, [sequence.logit_edits], [drafts])
    sampling = row_sampling([sequence], [Stream.TARGET])
    EXACT.truncate_(row, sampling)
    return EXACT.softmax(row, sampling.scales)[0]


def random_case(rng: random.Random) -> tuple[SamplingParams, frozenset[int]]:
    def sometimes(value: object, otherwise: object) -> object:
        return value if rng.random() < 0.5 else otherwise

    params = SamplingParams(
        max_tokens=30,
        temperature=rng.choice([0.2, 0.7, 1.0, 1.7]),
        top_k=rng.choice([0, 1, 5, 40, 10**6]),
        top_p=rng.choice([1.0, 0.95, 0.5, 0.01]),
        min_p=rng.choice([0.0, 0.05, 0.5, 1.0]),
        repetition_penalty=sometimes(rng.uniform(0.5, 2), 1.0),
        logit_bias=sometimes({t: rng.randrange(-12, 13) / 4 for t in rng.sample(range(VOCAB_SIZE), 4)}, None),
        bad_words=sometimes([(1,), (3, 2), (4, 5, 6), (2, 2)], ()),
        min_tokens=sometimes(rng.randint(1, 12), 0),
    )
    return params, frozenset(rng.sample(range(VOCAB_SIZE), 2))


@pytest.mark.slow
def test_laws_equal_those_of_transformers() -> None:
    """With and without drafts at the end of the context; its tokens are few, so that they repeat."""
    rng = random.Random(0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(400):
        params, ends = random_case(rng)
        prompt, output, drafts = (
            [rng.randrange(7) for _ in range(n)] for n in (rng.randint(1, 6), rng.randrange(9), rng.randrange(5))
        )
        logits = 3 * torch.randn(VOCAB_SIZE, generator=generator, dtype=torch.float64)
        ours = law(make_sequence(params, prompt, output, ends), drafts, logits)
        theirs = law_by_transformers(params, ends, len(prompt), prompt + output + drafts, logits)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_presence_and_frequency_penalties_count_output_and_drafts_only() -> None:
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    sequence = make_sequence(params, [1, 1, 2], [3, 4, 3], frozenset())
    logits = torch.zeros(1, 8, dtype=torch.float64)
    EXACT.edit_(logits, [sequence.logit_edits], [[3, 2, 5]])
    assert logits.tolist() == [[0, 0, -0.75, -1.25, -0.75, -0.75, 0, 0]]


def test_rows_of_a_batch_are_edited_apart() -> None:
    rng = random.Random(1)
    cases = [random_case(rng) for _ in range(12)]
    sequences = [
        make_sequence(p, [1, 2, 3], [rng.randrange(7) for _ in range(i)], ends) for i, (p, ends) in enumerate(cases)
    ]
    edits = [s.logit_edits for s in sequences for _ in range(3)]
    drafts = [[rng.randrange(7) for _ in range(i)] for _ in sequences for i in range(3)]
    logits = torch.randn(len(edits), VOCAB_SIZE)
    together = logits.clone()
    EXACT.edit_(together, edits, drafts)
    for i in range(len(edits)):
        alone = logits[i : i + 1].clone()
        EXACT.edit_(alone, edits[i : i + 1], drafts[i : i + 1])
        assert torch.equal(alone[0], together[i])
    assert not torch.equal(together, logits)


def test_edits_follow_the_tokens() -> None:
    params = SamplingParams(presence_penalty=0.1, min_tokens=2)
    edits = RequestEdits.of(params, [(1, 2, 3), (9,)], frozenset({0}), [5, 5, 7])
    assert edits is not None

    def state() -> tuple[dict[int, int], list[int], int]:
        e = edits.current
        assert e is not None
        return dict(zip(e.counted_ids, e.counts, strict=True)), e.recent.tolist(), e.ends_banned

    assert state() == ({5: 0, 7: 0}, [5, 7], 2)
    for token in (7, 9, 9):
        edits.advance(token)
    assert state() == ({5: 0, 7: 1, 9: 2}, [9, 9], 0)
    assert RequestEdits.of(SamplingParams(), [], frozenset({0}), [5]) is None


def test_ends_are_banned_until_min_tokens_in_every_row() -> None:
    sequence = make_sequence(SamplingParams(min_tokens=4), [1], [2, 3], frozenset({0, 9}))
    edits = sequence.logit_edits
    assert edits is not None
    assert [sorted(banned_tokens(edits, [2] * n)) for n in range(4)] == [[0, 9], [0, 9], [], []]
    assert make_sequence(SamplingParams(min_tokens=2), [1], [2, 3], frozenset({0})).logit_edits is None


def test_streams_of_rules_and_drafts() -> None:
    def streams(temperature: float, rule: str, draft_sampling: str) -> tuple[int, int]:
        params = SamplingParams(temperature=temperature, speculation=SpeculationParams(2, rule, draft_sampling))
        sequence = make_sequence(params, [1], [], frozenset())
        return target_stream(sequence.rule), draft_stream(sequence)

    assert streams(0, "coupled", "sampled") == (-1, -1)
    assert streams(1, "coupled", "sampled") == (Stream.TARGET, Stream.TARGET)
    assert streams(1, "coupled", "greedy") == (Stream.TARGET, -1)
    assert streams(1, "block", "sampled")[1] == streams(1, "token", "sampled")[1] == Stream.DRAFT
    assert streams(1, "token", "greedy")[1] == -1
    sequence = make_sequence(SamplingParams(), [1, 2], [3], frozenset())
    rows = row_sampling([sequence, sequence], [Stream.DRAFT, Stream.TARGET])
    assert (rows.starts, rows.positions, rows.seeds) == ([3, 0], [3, 3], [1, 1])
    later = rows.select([1, 1], [0, 2])
    assert (later.starts, later.positions, later.seeds) == ([0, 0], [3, 5], [1, 1])


def test_the_lowest_index_among_equals() -> None:
    logits = torch.zeros(3, 5000)
    logits[1, 4000:] = 1
    logits[2, [7, 4999]] = 2
    assert lowest_argmax(logits).tolist() == [0, 4000, 7]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_tokens": 0}, "max_tokens = 0 must be an integer, at least 1"),
        ({"max_tokens": 2.0}, "max_tokens = 2.0 must be an integer"),
        ({"temperature": -0.1}, "temperature = -0.1 must be a finite number, at least 0"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"temperature": float("inf")}, "temperature = inf"),
        ({"top_k": -2}, "top_k = -2 must be an integer, at least -1; 0 or -1 switches it off"),
        ({"top_p": 0.0}, r"top_p = 0.0 must be in \(0, 1\]"),
        ({"top_p": 1.01}, r"top_p = 1.01 must be in \(0, 1\]"),
        ({"min_p": 1.5}, r"min_p = 1.5 must be in \[0, 1\]"),
        ({"stop": ("a", "")}, "stop = '' must be a non-empty string"),
        ({"ignore_eos": "no"}, "ignore_eos = 'no' must be True or False"),
        ({"skip_special_tokens": 1}, "skip_special_tokens = 1 must be True or False"),
        ({"include_stop_str_in_output": None}, "include_stop_str_in_output = None must be True or False"),
        ({"temperature": 10**400}, "temperature = 10+ must be a finite number"),
        ({"stop_token_ids": (-1,)}, "stop_token_ids = -1 must be an integer"),
        ({"min_tokens": 17}, "min_tokens = 17 must be an integer, from 0 to 16: it is at most max_tokens"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty = 0.0 must be in \[1e-05, 100000\]"),
        ({"repetition_penalty": 1e-40}, "repetition_penalty = 1e-40 must be in"),
        ({"repetition_penalty": 1e39}, r"repetition_penalty = 1e\+39 must be in"),
        ({"temperature": 1e31}, r"temperature = 1e\+31 must be 0 \(greedy\) or from 1e-05 to 1e\+30"),
        ({"presence_penalty": 2.5}, r"presence_penalty = 2.5 must be in \[-2, 2\]"),
        ({"frequency_penalty": float("nan")}, r"frequency_penalty = nan must be in \[-2, 2\]"),
        ({"logit_bias": {3: 101}}, r"logit_bias of token 3 = 101 must be in \[-100, 100\]"),
        ({"logit_bias": {3: float("inf")}}, "logit_bias of token 3 = inf"),
        ({"logit_bias": {"a": 1.0}}, "logit_bias = 'a' must be an integer, at least 0: it is a token id"),
        ({"logit_bias": [(3, 1.0), (3, 2.0)]}, "names a token twice"),
        ({"logit_bias": [3]}, "logit_bias: 3 must be a token id and a number"),
        ({"bad_words": ("a", "")}, "bad_words: '' must be a non-empty string or token ids"),
        ({"bad_words": [[]]}, r"bad_words: \[\] must be a non-empty string or token ids"),
        ({"bad_words": [[-1]]}, "bad_words = -1 must be an integer"),
        ({"logprobs": -1}, "logprobs = -1 must be an integer, from 0 to 100"),
        ({"logprobs": True}, "logprobs = True"),
        ({"seed": 2**64}, "seed = 18446744073709551616 must be an integer, from 0 to"),
        ({"seed": -1}, "seed = -1"),
        ({"speculation": 3}, "speculation = 3 must be a SpeculationParams or None"),
    ],
)
def test_impossible_sampling_params_raise(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"num_speculative_tokens": 9},
            "num_speculative_tokens = 9 must be an integer, from 0 to 8; 0 switches it off",
        ),
        ({"num_speculative_tokens": -1}, "num_speculative_tokens = -1"),
        ({"num_speculative_tokens": True}, "num_speculative_tokens = True"),
        ({"verification": "magic"}, "verification = 'magic' is unknown: choose one of coupled, block, token"),
        ({"min_draft_confidence": 1.1}, r"min_draft_confidence = 1.1 must be in \[0, 1\]"),
        ({"draft_sampling": "beam"}, "draft_sampling = 'beam' is unknown: choose one of sampled, greedy"),
    ],
)
def test_impossible_speculation_params_raise(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SpeculationParams(**fields)


def test_unknown_parameters_raise_and_those_near_to_them_are_named() -> None:
    for make, name, near in (
        (SamplingParams, "max_new_tokens", "do you mean max_tokens or min_tokens? It takes n, max_tokens, min_tokens"),
        (SamplingParams, "use_beams", "'use_beams'. It takes n, max_tokens"),
        (SpeculationParams, "speculative_tokens", "do you mean num_speculative_tokens?"),
        (EngineConfig, "block_size", "EngineConfig() got an unexpected keyword argument 'block_size': do you mean"),
        (EngineConfig, "enable_prefix_caching", "do you mean prefix_caching"),
    ):
        with pytest.raises(TypeError, match=re.escape(near)):
            make(**{name: 1})
    with pytest.raises(TypeError, match=r"Engine.from_pretrained\(\) got .* 'block_size': do you mean page_size"):
        Engine.from_pretrained("bundled", block_size=16)
    with pytest.raises(TypeError, match=r"do you mean num_threads.*It takes device, dtype, .*, cuda_graphs$"):
        Engine.from_pretrained("bundled", threads=2)
    assert str(inspect.signature(SpeculationParams)).startswith("(num_speculative_tokens: 'NumSpeculativeTokens' = 3,")


def test_parameters_are_taken_in_their_usual_forms() -> None:
    params = SamplingParams(logit_bias={7: 1, 3: -2.5}, bad_words="word", stop="x")
    assert params.logit_bias == ((3, -2.5), (7, 1))
    assert params.bad_words == ("word",)
    assert SamplingParams(bad_words=["a", [1, 2]]).bad_words == ("a", (1, 2))
    assert hash(params) == hash(SamplingParams(logit_bias=((7, 1), (3, -2.5)), bad_words=["word"], stop=["x"]))
    assert SamplingParams().logit_bias == ()
    assert params.stop_strings == ("x",)
    assert SamplingParams(stop_token_ids=[3, 4], stop=["a"], top_k=-1) == SamplingParams(
        stop_token_ids=(3, 4), stop="a", top_k=0
    )
    assert SamplingParams(top_k=-1).top_k == 0
    assert replace(params, top_k=5).banned_words == ("word",)
    for copied in (copy.deepcopy(params), pickle.loads(pickle.dumps(params))):
        assert copied == params

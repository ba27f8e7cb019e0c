"""Log-probabilities of tokens against their definition, ties, impossible tokens and tiny vocabularies included."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from specdec import Engine, GenerationOutput, SamplingParams
from specdec.request.logprobs import DecidedRows, token_logprobs
from support.fakes import randn

NUM = 4


def top(logits: Tensor, num: int) -> list[tuple[int, float]]:
    law = logits.double().log_softmax(-1).tolist()
    return sorted(((v, p) for v, p in enumerate(law) if p > -torch.inf), key=lambda pair: (-pair[1], pair[0]))[:num]


def test_tokens_and_the_most_probable_ones() -> None:
    requests = []
    for seed, num_top in enumerate((0, 1, 3, 5, 20)):
        for vocab_size in (2, 7, 12):
            raw = (2 * randn(NUM + 1, vocab_size, seed=seed)).round()  # many ties
            processed = raw.masked_fill(randn(NUM + 1, vocab_size, seed=seed + 9) > 0.2, -torch.inf)
            processed[:, 1] = 1.0
            requests.append(DecidedRows([1] * NUM, raw, processed, num_top))
    found = token_logprobs([*requests, DecidedRows([], raw, processed, 3)])
    assert found.pop() == []
    for request, values in zip(requests, found, strict=True):
        assert len(values) == NUM
        for i, value in enumerate(values):
            assert value.top == top(request.raw_logits[i], request.num_top)
            assert value.processed_top == top(request.processed_logits[i], request.num_top)
            assert value.logprob == float(request.raw_logits[i].double().log_softmax(-1)[1])
            assert value.processed_logprob == float(request.processed_logits[i].double().log_softmax(-1)[1])


def test_nothing_is_asked() -> None:
    assert token_logprobs([]) == []


@pytest.fixture(scope="module")
def output(planted: Path) -> GenerationOutput:
    """Bytes as tokens, drawn almost at random: parts of characters come about."""
    engine = Engine.from_pretrained(planted)
    return engine.generate("héllo", SamplingParams(temperature=3, max_tokens=60, seed=1, n=3, logprobs=2))[0]


def test_entries_have_the_texts_of_their_tokens(planted: Path, output: GenerationOutput) -> None:
    tokenizer = Engine.from_pretrained(planted).tokenizer
    assert output.logprobs is not None
    for entry in output.logprobs:
        assert entry.token == tokenizer.decode([entry.token_id], skip_special_tokens=False)
        assert entry.bytes is not None
        assert bytes(entry.bytes).decode(errors="replace") == entry.token
        for tokens, top in ((entry.top_tokens, entry.top), (entry.processed_top_tokens, entry.processed_top)):
            assert tokens == [tokenizer.decode([token], skip_special_tokens=False) for token, _ in top]
    assert any(entry.token == "\ufffd" for entry in output.logprobs)
    written = b"".join(bytes(entry.bytes or []) for entry in output.logprobs)
    assert written.decode(errors="replace") == tokenizer.decode(output.token_ids, skip_special_tokens=False)


def test_outputs_are_all_samples_and_go_through_json(output: GenerationOutput) -> None:
    assert [sample.request_id.partition(".")[2] for sample in output.outputs] == ["", "1", "2"]
    assert output.outputs[0] is output
    assert all(sample.outputs == [sample] for sample in output.outputs[1:])
    assert repr(output).count("GenerationOutput(") == 3
    document = output.as_dict()
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    samples = document.pop("outputs")
    assert samples == [document, *(sample.as_dict() for sample in output.outputs[1:])]
    assert [(s["token_ids"], s["seed"], s["text"]) for s in samples] == [
        (sample.token_ids, sample.seed, sample.text) for sample in output.outputs
    ]
    assert document["logprobs"][0]["top"] == [list(pair) for pair in output.logprobs[0].top]
    assert document["stats"] == output.stats.as_dict()


def test_chunks_go_through_json(planted: Path) -> None:
    engine = Engine.from_pretrained(planted)
    params = SamplingParams(temperature=3, max_tokens=12, seed=2, logprobs=1, ignore_eos=True)
    stream = engine.stream("hello", params)
    documents = [json.loads(json.dumps(chunk.as_dict(), allow_nan=False)) for chunk in stream]
    assert "".join(d["text"] for d in documents) == stream.output.text
    assert [token for d in documents for token in d["token_ids"]] == stream.output.token_ids
    assert [d["finish_reason"] for d in documents][-1] == "length"
    assert [entry for d in documents for entry in d["logprobs"]] == stream.output.as_dict()["logprobs"]
    plain = engine.generate("hello", SamplingParams(max_tokens=2, seed=1))[0].as_dict()
    assert plain["logprobs"] is None
    assert "outputs" not in plain

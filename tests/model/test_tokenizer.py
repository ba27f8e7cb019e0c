from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders
from tokenizers.models import BPE

from specdec.errors import CheckpointError
from specdec.model.chat_template import ChatTemplate
from specdec.model.tokenizer import IncrementalDetokenizer, Tokenizer
from support.fakes import CHAT_TEMPLATE, byte_tokenizer, tiny_config, write_files

TOKENIZER = Tokenizer(byte_tokenizer(), ChatTemplate(CHAT_TEMPLATE, {}))


def tokenizer_with(template: str) -> Tokenizer:
    return Tokenizer(byte_tokenizer(), ChatTemplate(template, {}))


@given(st.text(max_size=40))
def test_pieces_add_up_to_the_text_and_never_split_a_character(text: str) -> None:
    """One token per byte: every character beyond ASCII arrives in pieces."""
    detokenizer = IncrementalDetokenizer(TOKENIZER, skip_special_tokens=False)
    pieces = [detokenizer.push([token]) for token in TOKENIZER.encode(text)]
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) + detokenizer.flush() == text


def test_a_character_comes_with_its_last_byte() -> None:
    detokenizer = IncrementalDetokenizer(TOKENIZER)
    assert [detokenizer.push([t]) for t in TOKENIZER.encode("a€😀")] == ["a", "", "", "€", "", "", "", "😀"]
    assert detokenizer.flush() == ""


def test_any_byte_sequence_gives_what_decode_gives() -> None:
    rng = random.Random(0)
    for _ in range(300):
        tokens = [rng.randrange(259) for _ in range(rng.randint(1, 30))]
        whole = TOKENIZER.decode(tokens, skip_special_tokens=False)
        for most in (1, 4):  # tokens at a time
            detokenizer, text, rest = IncrementalDetokenizer(TOKENIZER, skip_special_tokens=False), "", tokens
            while rest:
                count = rng.randint(1, most)
                text, rest = text + detokenizer.push(rest[:count]), rest[count:]
            assert text + detokenizer.flush() == whole


def test_a_token_alone_has_a_text_and_bytes() -> None:
    assert [TOKENIZER.token_text(token) for token in TOKENIZER.encode("a é<|user|>")] == [
        ("a", [97]), (" ", [32]), ("\ufffd", [0xC3]), ("\ufffd", [0xA9]), ("<|user|>", list(b"<|user|>")),
    ]  # fmt: skip
    assert sorted(TOKENIZER.token_text(token).bytes for token in range(3, 259)) == [[byte] for byte in range(256)]
    assert TOKENIZER.token_text(5000) == ("", []), "a vocabulary that is padded"
    fallback = HFTokenizer(BPE(vocab={"<0xC3>": 0, "\ufffd": 1, "é": 2}, merges=[]))
    fallback.decoder = decoders.ByteFallback()
    assert [Tokenizer(fallback, None).token_text(token) for token in range(3)] == [
        ("\ufffd", None), ("\ufffd", None), ("é", list("é".encode())),
    ]  # fmt: skip


def test_special_tokens_in_a_prompt_are_recognised_and_none_are_added() -> None:
    assert TOKENIZER.encode("<|user|>a<|assistant|>") == [1, *TOKENIZER.encode("a"), 2]
    assert TOKENIZER.decode([1, *TOKENIZER.encode("a")]) == "a"
    assert TOKENIZER.encode("") == []


def test_chat_template_renders_with_its_variables() -> None:
    messages = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    assert TOKENIZER.apply_chat_template(messages) == "<|user|>2+2?<|assistant|>4<|assistant|>"
    assert TOKENIZER.apply_chat_template(messages[:1], enable_thinking=False).endswith("/nothink<|assistant|>")


def test_chat_template_errors_are_the_users() -> None:
    for source, message in (
        ("{{ raise_exception('no system turn') }}", "refuses these messages: no system turn"),
        ("{% for m in messages %}{{ m.content + 'x' }}{% endfor %}", "refuses these messages: unsupported operand"),
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "refuses these messages: .*unsafe"),
    ):
        with pytest.raises(ValueError, match=message):
            tokenizer_with(source).apply_chat_template([{"role": "user", "content": None}])
    with pytest.raises(ValueError, match="has no chat template"):
        Tokenizer(byte_tokenizer(), None).apply_chat_template([])
    with pytest.raises(ValueError, match="messages must be a list like"):
        TOKENIZER.apply_chat_template("hello")
    with pytest.raises(CheckpointError, match="no valid jinja2"):
        ChatTemplate("{% if %}", {})


def test_chat_template_writes_json_as_transformers_does() -> None:
    """GLM-4.5's template renders tools with tojson(ensure_ascii=False); jinja2's own filter knows no such option."""
    template = tokenizer_with("{% for t in tools %}{{ t | tojson(ensure_ascii=False) }}|{{ t | tojson }}{% endfor %}")
    tool = {"name": "größer", "description": "a < b & c"}
    expected = json.dumps(tool, ensure_ascii=False)
    assert template.apply_chat_template([], tools=[tool]) == f"{expected}|{expected}"
    assert len(tokenizer_with("{{ strftime_now('%Y') }}").apply_chat_template([])) == 4


def test_prompts_are_neither_truncated_nor_padded() -> None:
    backend = byte_tokenizer()
    backend.enable_truncation(5)
    backend.enable_padding(length=12)
    assert len(Tokenizer(backend, None).encode("hello world")) == 11


def test_invalid_unicode_is_refused() -> None:
    with pytest.raises(ValueError, match=r"not valid Unicode at character 1: '\\udcff'"):
        TOKENIZER.encode("a\udcff")


def test_detokenising_takes_linear_work() -> None:
    """Skipped special tokens are boundaries too: the window must not grow."""
    detokenizer = IncrementalDetokenizer(TOKENIZER)
    for _ in range(50):
        assert detokenizer.push([1]) == ""
    assert len(detokenizer._token_ids) - detokenizer._window_start <= 2


def test_reads_a_folder(tmp_path: Path) -> None:
    write_files(tmp_path, tiny_config(), chat_template="from config {{ eos_token }}")
    assert Tokenizer.from_folder(tmp_path).apply_chat_template([]) == "from config <|endoftext|>"
    (tmp_path / "chat_template.jinja").write_text("from file {{ eos_token }}")
    eos = {"eos_token": {"content": "<|user|>", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(eos))
    assert Tokenizer.from_folder(tmp_path).apply_chat_template([]) == "from file <|user|>"
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "chat_template.jinja").unlink()
    assert Tokenizer.from_folder(tmp_path).chat_template is None
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": named, "eos_token": {"special": True}})
    )
    assert Tokenizer.from_folder(tmp_path).apply_chat_template([]) == "yes"


def test_missing_or_broken_files_raise(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer.json does not exist"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer.json is no valid tokenizer"):
        Tokenizer.from_folder(tmp_path)
    write_files(tmp_path, tiny_config())
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=r"chat_template.jinja cannot be read"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": 5}')
    with pytest.raises(CheckpointError, match=r"chat_template is a int, a string is needed"):
        Tokenizer.from_folder(tmp_path)

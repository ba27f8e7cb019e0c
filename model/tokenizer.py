"""Text to token ids and back, by a checkpoint's tokenizer.json; chat messages to text; incremental detokenisation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer as HFTokenizer

from specdec.errors import CheckpointError
from specdec.model.chat_template import ChatTemplate
from specdec.model.config import read_json

REPLACEMENT = "\ufffd"


class TokenText(NamedTuple):
    """What one token stands for, decoded alone."""

    text: str
    """The token's text. Bytes that are no whole character are U+FFFD in it; a special token's text is its name."""
    bytes: list[int] | None
    """The token's bytes in UTF-8; None where they are part of a character and the tokenizer does not tell which."""


class Tokenizer:
    """Turns text into token ids and back, and chat messages into text."""

    def __init__(self, backend: HFTokenizer, chat_template: ChatTemplate | None) -> None:
        backend.no_truncation()  # a tokenizer.json may store either; a prompt is taken as it is
        backend.no_padding()
        self.backend, self.chat_template = backend, chat_template
        self._token_texts: dict[int, TokenText] = {}

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """Reads tokenizer.json, tokenizer_config.json and chat_template.jinja; only the first is required. Raises
        CheckpointError for a file at fault."""
        path = folder / "tokenizer.json"
        if not path.exists():
            raise CheckpointError(f"{path} does not exist: a checkpoint folder needs it")
        try:
            backend = HFTokenizer.from_file(str(path))
        except Exception as error:  # the tokenizers library raises plain Exception
            raise CheckpointError(f"{path} is no valid tokenizer: {error}") from error
        return cls(backend, _load_chat_template(folder))

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of `text`; special tokens written in it are recognised, none are added. Raises
        ValueError where it is not valid Unicode."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the text is not valid Unicode at character {error.start}: {text[error.start]!r}"
            ) from error
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Returns the text of token ids."""
        return self.backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def token_text(self, token_id: int) -> TokenText:
        """Returns the text and the bytes of one token; empty ones for an id beyond the tokenizer's vocabulary."""
        found = self._token_texts.get(token_id)
        if found is None:
            found = self._token_texts[token_id] = self._decode_token(token_id)
        return found

    def _decode_token(self, token_id: int) -> TokenText:
        text = self.decode([token_id], skip_special_tokens=False)
        if REPLACEMENT not in text:
            return TokenText(text, list(text.encode()))
        # Only a byte-level tokenizer has tokens whose characters stand for bytes; then they decode to the text.
        raw = bytes(BYTE_OF_CHARACTER.get(character, 0) for character in self.backend.id_to_token(token_id) or "")
        return TokenText(text, list(raw) if raw.decode(errors="replace") == text else None)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        enable_thinking: bool | None = None,
    ) -> str:
        """Returns the prompt's text, ready for the assistant's turn.

        messages: a list of {"role", "content", ...}.
        tools: descriptions of functions that the model may call; None for none.
        enable_thinking: handed to the template; None leaves it to the template's own default.

        Raises ValueError where there is no template, or the template refuses the messages.
        """
        if self.chat_template is None:
            raise ValueError("the checkpoint has no chat template: pass the prompt as text, without --chat")
        return self.chat_template.render(messages, tools=tools, enable_thinking=enable_thinking)


def _byte_level_alphabet() -> dict[str, int]:
    """Returns the byte that each character stands for in GPT-2's byte-level vocabulary: printable ones for themselves,
    those from U+0100 on for the other bytes in ascending order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


BYTE_OF_CHARACTER = _byte_level_alphabet()


def _load_chat_template(folder: Path) -> ChatTemplate | None:
    """Returns the template of chat_template.jinja, or else tokenizer_config.json's, with the special tokens as its
    variables; None where there is none."""
    config_path, template_path = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    config = read_json(config_path) if config_path.exists() else {}
    source = config.get("chat_template")
    if isinstance(source, list):  # several named ones
        named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
        source = named.get("default")
    if template_path.exists():
        try:
            source = template_path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{template_path} cannot be read: {error}") from error
    if source is None:
        return None
    if not isinstance(source, str):
        raise CheckpointError(f"{config_path}: chat_template is a {type(source).__name__}, a string is needed")
    return ChatTemplate(source, _special_tokens(config))


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    tokens = {}
    for key, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(text, str):
            tokens[key] = text
    return tokens


class IncrementalDetokenizer:
    """Turns token ids into text as they come, and never hands out a part of a character.

    Byte-level tokens may hold a piece of a UTF-8 character; decoded, an unfinished one is a single U+FFFD at
    the very end, which is held back until the rest arrives. Each push decodes a short window, from the
    boundary before the last one, not the whole output.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer, self._skip_special_tokens = tokenizer, skip_special_tokens
        self._token_ids: list[int] = []
        self._window_start = 0  # one boundary back, so that the decoder sees what came before
        self._boundary = 0  # no character crosses it
        self._emitted = 0  # characters of the window's text that are out

    def push(self, token_ids: Sequence[int]) -> str:
        """Returns the text that these tokens complete; what is unfinished at their end stays back."""
        self._token_ids += token_ids
        text = self._decode()
        end = len(text) - text.endswith(REPLACEMENT)
        piece = text[self._emitted : end]
        self._emitted = max(self._emitted, end)
        if end == len(text):
            self._window_start, self._boundary = self._boundary, len(self._token_ids)
            self._emitted = len(self._decode())
        return piece

    def flush(self) -> str:
        """Returns what is still held back, an unfinished character as U+FFFD. Call it once, at the end."""
        text = self._decode()
        piece, self._emitted = text[self._emitted :], len(text)
        return piece

    def _decode(self) -> str:
        window = self._token_ids[self._window_start :]
        return self._tokenizer.decode(window, skip_special_tokens=self._skip_special_tokens)

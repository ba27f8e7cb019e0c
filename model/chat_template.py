"""Chat templates as checkpoints ship them: jinja2, sandboxed, with what transformers offers inside one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox

from specdec.errors import CheckpointError


class ChatTemplate:
    """A checkpoint's chat template."""

    def __init__(self, source: str, variables: Mapping[str, Any]) -> None:
        """Compiles a template. Raises CheckpointError where the source is no valid jinja2.

        source: the template's text.
        variables: what it may refer to beside the messages, the special tokens for instance.
        """
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise CheckpointError(f"the chat template is no valid jinja2: {error}") from error
        self._variables = dict(variables)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None,
        enable_thinking: bool | None,
    ) -> str:
        """Returns the prompt's text, ready for the assistant's turn.

        messages: a list of {"role", "content", ...}.
        tools: descriptions of functions that the model may call; None for none.
        enable_thinking: handed to the template; None leaves it to the template's own default.

        Raises ValueError where the template refuses.
        """
        if isinstance(messages, str) or not all(isinstance(message, Mapping) for message in messages):
            raise ValueError('messages must be a list like [{"role": "user", "content": "hello"}]')
        variables = (
            self._variables if enable_thinking is None else self._variables | {"enable_thinking": enable_thinking}
        )
        try:
            return self._template.render(messages=messages, tools=tools, add_generation_prompt=True, **variables)
        except Exception as error:  # a template computes with what the messages hold: any type error is theirs
            raise ValueError(f"the chat template refuses these messages: {error}") from error


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """Replaces jinja2's own `tojson`, which would escape for HTML, by that of transformers."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)

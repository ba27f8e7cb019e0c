"""`Engine`: the library's front door. Wires the stages and turns prompts into outputs."""

from __future__ import annotations

import itertools
import math
import warnings
from collections import deque
from collections.abc import Generator, Iterable, Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import torch

from specdec.commit import abort
from specdec.config import EngineConfig, SamplingParams, SpeculationParams
from specdec.draft import Drafter, MTPDrafter, NoDrafter
from specdec.errors import SpecdecWarning
from specdec.kv_cache import PagePool
from specdec.loading import (
    Checkpoint,
    Runtime,
    check_num_threads,
    load_runtime,
    open_checkpoint,
    resolve_backend,
)
from specdec.model.hub import resolve_model
from specdec.outputs import GenerationOutput, StreamChunk, TokenStream
from specdec.prompts import Prompt, as_batch, as_prompt, params_per_prompt
from specdec.rng import draw_seed
from specdec.scheduler import Scheduler
from specdec.sequence import Sequence
from specdec.step import step
from specdec.text import OutputText
from specdec.verify import TargetVerifier

OFF = SpeculationParams(num_speculative_tokens=0)


class Engine:
    """Generates with speculative decoding. Not thread-safe: one thread calls it.

    Build it with `Engine.from_pretrained`.
    """

    def __init__(self, checkpoint: Checkpoint, runtime: Runtime, config: EngineConfig) -> None:
        self.checkpoint, self.runtime, self.config = checkpoint, runtime, config
        self.tokenizer, self.max_model_len = checkpoint.tokenizer, runtime.max_model_len
        self.speculation = self._resolve_speculation(config.speculation)
        self.scheduler = Scheduler(
            PagePool(runtime.kv_cache.shape[1], config.page_size), config.max_num_seqs, config.token_budget
        )
        self._drafter = self._make_drafter()
        self._verifier = TargetVerifier(runtime.model.target, runtime.kv_cache, config.page_size)
        self._request_numbers = itertools.count()
        self._abandoned: deque[Sequence] = deque()

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        kernels: str = "auto",
        kv_dtype: str | torch.dtype = "auto",
        revision: str | None = None,
        num_threads: int | None = None,
        **config: Any,
    ) -> Engine:
        """Loads "bundled", a local checkpoint folder or a Hub id.

        kernels: "cpu" (C++, compiled at first use) or "reference" (plain torch); "auto" is the former where
        there is a compiler. dtype: of the matrices, and with "reference" of the activations; "auto" is float32,
        with "cpu" bfloat16 where the checkpoint is. kv_dtype: of the KV cache; "auto" is the activations'.
        num_threads: torch's, for the whole process. `config`: the fields of EngineConfig.
        Raises CheckpointError for a checkpoint that cannot be used, ValueError for arguments.
        """
        engine_config = EngineConfig(**config)
        if num_threads is not None:
            check_num_threads(num_threads)
            torch.set_num_threads(num_threads)
        checkpoint = open_checkpoint(resolve_model(model, revision))
        backend = resolve_backend(device, dtype, kernels, checkpoint.config.dtype)
        runtime = load_runtime(checkpoint, engine_config, backend, kv_dtype)
        return cls(checkpoint, runtime, engine_config)

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        params: SamplingParams | Iterable[SamplingParams] | None = None,
    ) -> list[GenerationOutput]:
        """Completes every prompt (text, or token ids); -> one output per prompt, in order.

        params: one for all, or one per prompt; None is `default_sampling_params()`. All requests are
        checked before the first one runs.
        """
        batch = as_batch(prompts)
        per_prompt = params_per_prompt(self.default_sampling_params() if params is None else params, len(batch))
        sequences = [self._make_sequence(p, q) for p, q in zip(batch, per_prompt)]
        try:
            for sequence in sequences:
                self.scheduler.add(sequence)
            while not all(s.finished for s in sequences):
                self._step()
        finally:
            for sequence in sequences:
                self._abort(sequence)
        return [GenerationOutput.of(s) for s in sequences]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> TokenStream:
        """Completes one prompt chunk by chunk; closing the stream aborts the request."""
        (one,) = params_per_prompt(self.default_sampling_params() if params is None else params, 1)
        sequence = self._make_sequence(as_prompt(prompt), one)
        self.scheduler.add(sequence)
        return TokenStream(sequence, self._chunks(sequence), self._abort, self._abandoned.append)

    def chat(
        self,
        messages: Seq[Mapping[str, Any]],
        params: SamplingParams | None = None,
        *,
        enable_thinking: bool | None = None,
        tools: Seq[Mapping[str, Any]] | None = None,
    ) -> GenerationOutput:
        """Applies the checkpoint's chat template to `messages` and completes the assistant's turn."""
        prompt = self.tokenizer.apply_chat_template(messages, tools=tools, enable_thinking=enable_thinking)
        return self.generate([prompt], params)[0]

    def default_sampling_params(self) -> SamplingParams:
        """SamplingParams with what the checkpoint's generation_config.json recommends; `do_sample: false` is
        temperature 0. A recommendation that is not supported gives a warning."""
        if self.checkpoint.ignored_recommendations:
            warnings.warn(
                f"generation_config.json recommends {self.checkpoint.ignored_recommendations}, which is not supported",
                SpecdecWarning,
                stacklevel=3,
            )
        return self.checkpoint.default_params

    def _chunks(self, sequence: Sequence) -> Generator[StreamChunk]:
        num_sent = 0
        while not sequence.finished or num_sent < len(sequence.output_token_ids):
            if num_sent == len(sequence.output_token_ids):
                self._step()
            tokens = sequence.output_token_ids[num_sent:]
            num_sent += len(tokens)
            if tokens:
                text = sequence.output.take(finished=sequence.finished)
                logprobs = sequence.logprobs[num_sent - len(tokens) : num_sent]
                asked = sequence.params.logprobs is not None
                yield StreamChunk(text, tokens, sequence.finish_reason, logprobs if asked else None)

    def _step(self) -> None:
        while self._abandoned:
            self._abort(self._abandoned.popleft())
        try:
            step(self.scheduler, self._drafter, self._verifier)
        except BaseException:  # a half-done step may have left any of them between two states
            for sequence in list(self.scheduler.running):
                self._abort(sequence)
            raise

    def _abort(self, sequence: Sequence) -> None:
        if not sequence.finished:
            abort(sequence)
            self.scheduler.remove_finished()

    def _make_sequence(self, prompt: str | list[int], params: SamplingParams) -> Sequence:
        token_ids = self._prompt_token_ids(prompt)
        end_token_ids = frozenset(params.stop_token_ids)
        if not params.ignore_eos:
            end_token_ids |= self.checkpoint.eos_token_ids
        bad_words = self._bad_words(params)
        self._check_token_ids(params, end_token_ids, bad_words)
        return Sequence(
            request_id=f"request-{next(self._request_numbers)}",
            prompt_token_ids=token_ids,
            params=params,
            speculation=self._resolve_speculation(params.speculation, self.speculation),
            seed=draw_seed() if params.seed is None else params.seed,
            max_total_tokens=min(len(token_ids) + params.max_tokens, self.max_model_len),
            end_token_ids=end_token_ids,
            output=OutputText(self.tokenizer, params),
            bad_words=bad_words,
        )

    def _bad_words(self, params: SamplingParams) -> tuple[tuple[int, ...], ...]:
        """A text's tokens at the start of a word and after a space."""
        words: list[tuple[int, ...]] = []
        for word in params.bad_words:
            if isinstance(word, str):
                words += [tuple(self.checkpoint.encode(text)) for text in (word, " " + word)]
            else:
                words.append(word)
        return tuple(dict.fromkeys(words))

    def _check_token_ids(
        self, params: SamplingParams, end_token_ids: frozenset[int], bad_words: tuple[tuple[int, ...], ...]
    ) -> None:
        """Every id is the model's own, and some token stays possible."""
        vocab_size = self.checkpoint.config.vocab_size
        named = {
            "stop_token_ids": params.stop_token_ids,
            "logit_bias": [token for token, _ in params.biases],
            "bad_words": [token for word in bad_words for token in word],
        }
        for name, token_ids in named.items():
            for token in token_ids:
                if token >= vocab_size:
                    raise ValueError(f"{name}: {token} is no token id of this model: 0 <= id < {vocab_size}")
        impossible = {token for token, bias in params.biases if bias == -math.inf} | {word[-1] for word in bad_words}
        if params.min_tokens > 0:
            impossible |= end_token_ids
        if len(impossible) == vocab_size:
            raise ValueError(
                f"logit_bias, bad_words and min_tokens leave none of the {vocab_size} tokens possible: allow some"
            )

    def _prompt_token_ids(self, prompt: str | list[int]) -> list[int]:
        token_ids = self.checkpoint.encode(prompt) if isinstance(prompt, str) else prompt
        vocab_size = self.checkpoint.config.vocab_size
        if not token_ids:
            raise ValueError("the prompt is empty: give at least one token")
        for token in token_ids:
            if not 0 <= token < vocab_size:
                raise ValueError(f"prompt token {token!r} is no token id of this model: 0 <= id < {vocab_size}")
        if len(token_ids) >= self.max_model_len:
            raise ValueError(
                f"the prompt has {len(token_ids)} tokens, the context {self.max_model_len}, output included: shorten it"
            )
        return token_ids

    def _resolve_speculation(
        self, asked: SpeculationParams | None, default: SpeculationParams | None = None
    ) -> SpeculationParams:
        """What was asked for; without an MTP layer plain decoding, and an error where drafts were asked for."""
        if self.runtime.model.mtp is not None:
            return asked or default or SpeculationParams()
        if asked is not None and asked.num_speculative_tokens > 0:
            raise ValueError(
                f"num_speculative_tokens = {asked.num_speculative_tokens}: the checkpoint {self.checkpoint.folder} "
                "has no MTP layer, so speculation is unavailable; pass 0"
            )
        if default is None and asked is None:
            warnings.warn(
                f"{self.checkpoint.folder} has no MTP layer: speculation is unavailable, decoding plainly",
                SpecdecWarning,
                stacklevel=4,
            )
        return asked or default or OFF

    def _make_drafter(self) -> Drafter:
        model, cache = self.runtime.model, self.runtime.kv_cache
        if model.mtp is None:
            return NoDrafter()
        return MTPDrafter(model.target, model.mtp, cache[-1], self.config.page_size, self.config.mtp_recycling)

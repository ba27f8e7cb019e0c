"""`Engine`: the library's front door. Turns prompts into outputs."""

from __future__ import annotations

import inspect
from collections.abc import Generator, Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from specdec.checks import require_keywords
from specdec.config import EngineConfig, SamplingParams, SpeculationParams, require_default_recycling
from specdec.engine.admission import check_without_mtp
from specdec.engine.core import EngineCore
from specdec.engine.outputs import ChunkCutter, GenerationOutput, StreamChunk, TokenStream
from specdec.errors import EngineInUseError, warn
from specdec.kernels.progress import Progress, silent
from specdec.loading import (
    Checkpoint,
    Runtime,
    check_num_threads,
    load_runtime,
    open_checkpoint,
    resolve_backend,
)
from specdec.metrics.engine import EngineStats
from specdec.model.hub import resolve_model
from specdec.request.prompts import Prompt, as_batch, as_params, as_prompt, params_per_prompt
from specdec.request.sequence import Sequence
from specdec.step.drafter import Drafter, is_drafter


class Engine:
    """Generates with speculative decoding. It serves one call at a time, from whatever thread; a second one meanwhile
    raises EngineInUseError.

    Build it with `Engine.from_pretrained`.
    """

    def __init__(
        self, checkpoint: Checkpoint, runtime: Runtime, config: EngineConfig, drafter: Drafter | None = None
    ) -> None:
        self.checkpoint, self.runtime, self.config = checkpoint, runtime, config
        self.tokenizer, self.max_model_len = checkpoint.tokenizer, runtime.max_model_len
        self.core = EngineCore(checkpoint, runtime, config, drafter)

    @property
    def speculation(self) -> SpeculationParams:
        """The default SpeculationParams, for requests that bring none."""
        return self.core.admission.default

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
        drafter: Drafter | None = None,
        progress: Progress | None = None,
        **config: Any,
    ) -> Engine:
        """Loads "bundled", a local checkpoint folder or a Hub id.

        model: which one.
        device: "cpu", "cuda", or "auto", which is CUDA where torch sees a device.
        dtype: of the matrices, and with "reference" of the activations; "auto" is float32, with "cpu" bfloat16 where
            the checkpoint is, with "flashinfer" and for an FP8 checkpoint bfloat16.
        kernels: "cpu" (C++, compiled at first use), "flashinfer" (CUDA) or "reference" (plain torch); "auto" is the
            device's own where it can run.
        kv_dtype: of the KV cache; "auto" is the activations'.
        revision: of a Hub id; None is the newest.
        num_threads: torch's, for the whole process; None leaves it as it is.
        drafter: one of your own, see `specdec.Drafter`; it drafts in place of the MTP layer, which is then not loaded.
        progress: called as progress(what, done, total) while kernels are compiled, weights are loaded and CUDA graphs
            are captured.
        config: the fields of EngineConfig.

        Raises CheckpointError for a checkpoint that cannot be used, KernelsUnavailableError for kernels that cannot run
        here, NotEnoughMemoryError where the model does not fit, ValueError and TypeError for arguments.
        """
        own = inspect.getfullargspec(cls.from_pretrained).kwonlyargs
        require_keywords("Engine.from_pretrained()", config, own + [field.name for field in fields(EngineConfig)])
        engine_config = EngineConfig(**config)
        if num_threads is not None:
            check_num_threads(num_threads)
            torch.set_num_threads(num_threads)
        if drafter is not None:
            _check_drafter(drafter, engine_config)
        checkpoint = open_checkpoint(resolve_model(model, revision))
        heard = progress or silent
        backend = resolve_backend(device, dtype, kernels, checkpoint.config, heard)
        runtime = load_runtime(checkpoint, engine_config, backend, kv_dtype, heard, with_mtp=drafter is None)
        return cls(checkpoint, runtime, engine_config, drafter)

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        params: SamplingParams | Iterable[SamplingParams] | None = None,
    ) -> list[GenerationOutput]:
        """Completes every prompt; returns one output per prompt, in order. With n > 1 its `outputs` are all samples,
        itself the first. All requests are checked before the first one runs.

        prompts: one, or several, each text or token ids.
        params: one for all, or one per prompt; None is `default_sampling_params()`.

        Raises ValueError for what cannot be asked for, CacheFullError for a request that the whole KV cache could not
        hold, ModelError for logits that are not finite, EngineInUseError while another call is under way.
        """
        batch = as_batch(prompts)
        per_prompt = params_per_prompt(self.default_sampling_params() if params is None else params, len(batch))
        samples = [self.core.admission.sequences(p, q) for p, q in zip(batch, per_prompt)]
        sequences = [s for of_one_prompt in samples for s in of_one_prompt]
        with self.core.in_use():
            self._run(sequences)
        return [GenerationOutput.of(first, others) for first, *others in samples]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> TokenStream:
        """Completes one prompt chunk by chunk; closing the stream aborts the request. A step serves all open streams:
        where one's request fails, that one raises the error.

        prompt: text or token ids.
        params: None is `default_sampling_params()`.
        """
        one = self.default_sampling_params() if params is None else as_params(params)
        sequence = self.core.admission.sequence(as_prompt(prompt), one)
        with self.core.in_use():
            self.core.add(sequence)
        return TokenStream(sequence, self._chunks(sequence), self._stop, self.core.abandon)

    def chat(
        self,
        messages: Seq[Mapping[str, Any]],
        params: SamplingParams | None = None,
        *,
        enable_thinking: bool | None = None,
        tools: Seq[Mapping[str, Any]] | None = None,
    ) -> GenerationOutput:
        """Applies the checkpoint's chat template to `messages` and completes the assistant's turn.

        messages: a list of {"role", "content", ...}.
        params: None is `default_sampling_params()`.
        enable_thinking: handed to the template; None leaves it to the template's own default.
        tools: descriptions of functions that the model may call; None for none.

        Raises ValueError where there is no template, or the template refuses the messages.
        """
        prompt = self.tokenizer.apply_chat_template(messages, tools=tools, enable_thinking=enable_thinking)
        return self.generate([prompt], params)[0]

    def measure_costs(self) -> None:
        """Measures what forwards cost on this machine (tenths of a second, once in a process), as the first request of
        draft length "auto" does. `stats()` then says what speculation saves."""
        with self.core.in_use():
            self.core.draft_length.prepare()

    def default_sampling_params(self) -> SamplingParams:
        """Returns SamplingParams with what the checkpoint's generation_config.json recommends; `do_sample: false` is
        temperature 0. A recommendation that is not supported gives a warning."""
        if self.checkpoint.ignored_recommendations:
            warn(f"generation_config.json recommends {self.checkpoint.ignored_recommendations}, which is not supported")
        return self.checkpoint.default_params

    def stats(self) -> EngineStats:
        """Returns what the engine did since it was made: a snapshot."""
        return self.core.stats()

    def _run(self, sequences: list[Sequence]) -> None:
        """Steps until these requests have ended. Raises the error of one that fails, and aborts the others then."""
        own: set[Sequence] = set()
        try:
            for sequence in sequences:
                own.add(sequence)
                self.core.add(sequence)
            while not all(s.finished for s in sequences):
                _raise_errors(s for s in self.core.step() if s in own)
        finally:
            for sequence in own:
                self.core.end(sequence, "abort")

    def _stop(self, sequence: Sequence) -> None:
        """Aborts a stream's request: at once, or before the next step of a call that is under way."""
        try:
            with self.core.in_use():
                self.core.end(sequence, "abort")
        except EngineInUseError:
            self.core.abandon(sequence)

    def _chunks(self, sequence: Sequence) -> Generator[StreamChunk]:
        cutter = ChunkCutter(sequence)
        while True:
            with self.core.in_use():
                _raise_errors([sequence])
                chunk = cutter.take()
                if chunk is None and not sequence.finished:
                    self.core.step()
                    continue
            if chunk is None:
                return
            yield chunk


def _raise_errors(sequences: Iterable[Sequence]) -> None:
    for sequence in sequences:
        if sequence.error is not None:
            raise sequence.error


def _check_drafter(drafter: Any, config: EngineConfig) -> None:
    """Raises ValueError for what is no drafter, and for a setting of the MTP layer's drafts."""
    if not is_drafter(drafter):
        raise ValueError(f"drafter = {drafter!r} must be an object with a method draft(requests), see specdec.Drafter")
    require_default_recycling(config.mtp_recycling, drafter)
    check_without_mtp(config.speculation or SpeculationParams())

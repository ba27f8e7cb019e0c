"""`specdec generate`."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specdec.cli.common import (
    Dtype,
    InvalidOption,
    Kernels,
    Model,
    Revision,
    Threads,
    check_backend,
    option_errors,
    progress_bar,
    say,
    user_errors,
)
from specdec.config import AUTO, MAX_SPECULATIVE_TOKENS, NumSpeculativeTokens, SamplingParams, SpeculationParams

if TYPE_CHECKING:
    from specdec.engine.engine import Engine
    from specdec.engine.outputs import GenerationOutput

PromptText = Annotated[str | None, typer.Argument(help="The prompt's text.", show_default=False)]
PromptFile = Annotated[
    str | None, typer.Option(help="Read the prompt from this file; - is standard input.", show_default=False)
]
MaxTokens = Annotated[int, typer.Option(help="Generate at most so many tokens.")]
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
TopK = Annotated[int, typer.Option(help="Sample among the k most probable tokens; 0 is off.")]
TopP = Annotated[float, typer.Option(help="Sample among the most probable tokens that reach this sum.")]
MinP = Annotated[float, typer.Option(help="Drop tokens below this fraction of the most probable one.")]
RepetitionPenalty = Annotated[float, typer.Option(help="Of tokens in prompt and output; 1 is off.")]
PresencePenalty = Annotated[float, typer.Option(help="Of tokens in the output; 0 is off.")]
FrequencyPenalty = Annotated[float, typer.Option(help="The same for each occurrence; 0 is off.")]
LogitBias = Annotated[
    list[str] | None,
    typer.Option(
        help="ID=BIAS, added to the logit of a token id, -100 to 100 or -inf; may be repeated.", show_default=False
    ),
]
BadWord = Annotated[
    list[str] | None, typer.Option(help="Never generate this text; may be repeated.", show_default=False)
]
MinTokens = Annotated[int, typer.Option(help="Do not end before so many tokens.")]
Stop = Annotated[list[str] | None, typer.Option(help="End before this string; may be repeated.", show_default=False)]
Seed = Annotated[int | None, typer.Option(help="Reproduces a run; drawn if absent.", show_default=False)]
DraftTokens = Annotated[
    str | None,
    typer.Option(
        "--num-speculative-tokens",
        "-k",
        help=f"Draft tokens per step, 0 to {MAX_SPECULATIVE_TOKENS}, or auto.",
        show_default=f"{SpeculationParams.num_speculative_tokens}; 0 without an MTP layer",
    ),
]
Rule = Annotated[str, typer.Option(help="Rule at temperature > 0: coupled, block or token.")]
DraftSampling = Annotated[str, typer.Option(help="Drafts at temperature > 0: sampled or greedy.")]
MinDraftConfidence = Annotated[float, typer.Option(help="Draft no further once no token has this probability.")]
NoSpeculation = Annotated[bool, typer.Option("--no-speculation", help="Decode plainly; the same as -k 0.")]
Chat = Annotated[bool, typer.Option("--chat", help="Wrap the prompt in the checkpoint's chat template.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Logprobs = Annotated[
    int | None,
    typer.Option(help="With --json: log-probabilities of the tokens, and so many alternatives.", show_default=False),
]
JsonDocument = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]


def generate(
    prompt: PromptText = None,
    prompt_file: PromptFile = None,
    model: Model = "bundled",
    revision: Revision = None,
    max_tokens: MaxTokens = 64,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    presence_penalty: PresencePenalty = 0.0,
    frequency_penalty: FrequencyPenalty = 0.0,
    logit_bias: LogitBias = None,
    bad_word: BadWord = None,
    min_tokens: MinTokens = 0,
    stop: Stop = None,
    seed: Seed = None,
    num_speculative_tokens: DraftTokens = None,
    verification: Rule = SpeculationParams.verification,
    draft_sampling: DraftSampling = SpeculationParams.draft_sampling,
    min_draft_confidence: MinDraftConfidence = SpeculationParams.min_draft_confidence,
    no_speculation: NoSpeculation = False,
    chat: Chat = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    kernels: Kernels = "auto",
    threads: Threads = None,
    logprobs: Logprobs = None,
    as_json: JsonDocument = False,
) -> None:
    """Generate text from a prompt, drafting with the MTP head."""
    with user_errors():
        speculation_is_given = no_speculation or num_speculative_tokens is not None
        if logprobs is not None and not as_json:
            raise InvalidOption(f"--logprobs {logprobs} is shown in the JSON document only: add --json")
        params = _sampling_params(
            num_tokens=_num_tokens(num_speculative_tokens, no_speculation),
            verification=verification,
            draft_sampling=draft_sampling,
            min_draft_confidence=min_draft_confidence,
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            logit_bias=_biases(logit_bias or []),
            bad_words=bad_word or [],
            stop=stop or [],
            seed=seed,
            logprobs=logprobs,
        )
        text = _prompt_text(prompt, prompt_file)
        check_backend(device, dtype, kernels, threads)
        from specdec.engine.engine import Engine

        with progress_bar() as progress:
            engine = Engine.from_pretrained(
                model,
                revision=revision,
                device=device,
                dtype=dtype,
                kernels=kernels,
                num_threads=threads,
                progress=progress,
                speculation=params.speculation if speculation_is_given else None,
            )
            if num_speculative_tokens == AUTO:
                progress("measuring what forwards cost", 0, 1)
                engine.measure_costs()
                progress("measuring what forwards cost", 1, 1)
        if chat:
            text = engine.tokenizer.apply_chat_template([{"role": "user", "content": text}])
        if not speculation_is_given and engine.runtime.model.mtp is None:
            params = replace(params, speculation=None)  # the engine has warned; no drafts were asked for
        _run(engine, text, params, as_json)


def _num_tokens(asked: str | None, no_speculation: bool) -> NumSpeculativeTokens:
    if no_speculation and asked not in (None, "0"):
        raise InvalidOption(f"--no-speculation and -k {asked} contradict each other: give one")
    if no_speculation:
        return 0
    if asked is None or asked == AUTO:
        return AUTO if asked else SpeculationParams.num_speculative_tokens
    try:
        return int(asked)
    except ValueError:
        raise InvalidOption(f"-k {asked}: give a number from 0 to {MAX_SPECULATIVE_TOKENS}, or auto") from None


def _biases(texts: list[str]) -> tuple[tuple[int, float], ...]:
    pairs = []
    for text in texts:
        token, _, bias = text.partition("=")
        try:
            pairs.append((int(token), float(bias)))
        except ValueError:
            raise InvalidOption(f"--logit-bias {text}: give a token id and a number, as in 42=-3.5") from None
    return tuple(pairs)


def _sampling_params(
    *,
    num_tokens: NumSpeculativeTokens,
    verification: Any,
    draft_sampling: Any,
    min_draft_confidence: float,
    **fields: Any,
) -> SamplingParams:
    with option_errors():
        speculation = SpeculationParams(num_tokens, verification, draft_sampling, min_draft_confidence)
        return SamplingParams(**fields, speculation=speculation)


def _prompt_text(prompt: str | None, prompt_file: str | None) -> str:
    if (prompt is None) == (prompt_file is None):
        raise InvalidOption("give one prompt: as an argument, or with --prompt-file (- for standard input)")
    if prompt is not None:
        return prompt
    assert prompt_file is not None
    try:
        if prompt_file != "-":
            return Path(prompt_file).read_text(encoding="utf-8")
        if sys.stdin is None:
            raise InvalidOption("--prompt-file -: standard input is closed")
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{prompt_file} is not UTF-8 text: {error}") from error


def _run(engine: Engine, text: str, params: SamplingParams, as_json: bool) -> None:
    """Streams one completion; on Ctrl-C what was generated so far stays, in the JSON document too."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character shows a mark instead
    stream = engine.stream(text, params)
    try:
        for chunk in stream:
            if not as_json:
                sys.stdout.write(chunk.text)
                sys.stdout.flush()
    finally:
        stream.close()
        output = stream.output
        if as_json:
            print(json.dumps(_document(engine, text, output), indent=2))
        else:
            sys.stdout.write("\n")
            say(summary_line(output), "dim")


def summary_line(output: GenerationOutput) -> str:
    """Returns speed and acceptance of one output in one line."""
    stats = output.stats
    parts = [f"{len(output.token_ids)} tokens ({output.finish_reason})"]
    if stats.tokens_per_s is not None:
        parts.append(f"{stats.tokens_per_s:.1f} tokens/s")
    if stats.num_drafts:
        per_position = " ".join(f"{a}/{d}" for a, d in zip(stats.accepted_per_position, stats.drafted_per_position))
        parts.append(f"mean acceptance length {stats.mean_acceptance_length:.2f} (bonus included)")
        parts.append(f"accepted/drafted by position {per_position}")
    else:
        parts.append("no drafts")
    return " | ".join(parts)


def _document(engine: Engine, prompt: str, output: GenerationOutput) -> dict[str, object]:
    return {
        "model": str(engine.checkpoint.folder),
        "kernels": engine.runtime.model.target.kernels.name,
        "prompt": prompt,
        **output.as_dict(),
    }

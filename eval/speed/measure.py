"""Measures the speed of decoding, with and without speculation, in one interleaved run: `specdec eval speed`.

Every repeat goes through all settings, peers included, before the next one begins, so a slow moment of the
machine meets all of them alike. Decode time is that of N tokens per prompt less that of 1, for every engine.
Also measured: prefill, forwards by number of rows, bytes read, the share of Python. What a step could take at
best is its bytes over the machine's read bandwidth; what it should take follows from the forwards' times.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from specdec import Engine, GenerationOutput, SamplingParams, SpeculationParams
from specdec.config import MAX_SPECULATIVE_TOKENS
from specdec.cost import CostTable
from specdec.eval.calls import timed_calls
from specdec.eval.machine import describe_machine
from specdec.eval.prompts import load_stdlib
from specdec.eval.speed.costs import measure_speed_costs
from specdec.eval.speed.peers import PEERS, Peer, PeerSpec, Settings
from specdec.eval.speed.planted import RECIPE_NAME, planted_prompts
from specdec.eval.speed.roofline import StepBytes, read_bandwidth, traced
from specdec.kernels.cpu import CpuKernels
from specdec.kernels.progress import Progress, silent

GREEDY = 0.0


@dataclass(frozen=True)
class SpeedOptions:
    """What to measure. Raises ValueError for what cannot be."""

    model: str = "bundled"
    """The checkpoint, as `Engine.from_pretrained` takes it."""
    kernels: str = "auto"
    """The backend, as `Engine.from_pretrained` takes it."""
    dtype: str = "auto"
    """Dtype of the matrices, as `Engine.from_pretrained` takes it."""
    num_threads: int | None = None
    """CPU threads; None leaves torch's own number."""
    batch_sizes: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Requests at once."""
    draft_lengths: tuple[int, ...] = (0, 1, 2, 3, 4, 5)
    """K, with 0 for plain decoding."""
    prefill_lengths: tuple[int, ...] = (512, 2048)
    """Prompt lengths whose prefill is timed; those beyond the context are left out."""
    temperature: float = GREEDY
    """Temperature; 0 is greedy. Peers are always greedy."""
    num_prompts: int = 4
    """Prompts at every batch size, in groups of that size (at least one group)."""
    prompt_tokens: int = 32
    """Tokens of every prompt."""
    max_tokens: int = 64
    """Tokens generated from each."""
    repeats: int = 5
    """Passes through all settings."""
    peers: tuple[PeerSpec, ...] = ()
    """Other engines to measure beside."""
    peer_draft_lengths: tuple[int, ...] = (0, 1, 3)
    """K of the peers, clipped to what they can."""

    def __post_init__(self) -> None:
        for name, low in (("num_prompts", 1), ("prompt_tokens", 1), ("max_tokens", 2), ("repeats", 1)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} = {getattr(self, name)} must be at least {low}")
        for name, low, high in (
            ("batch_sizes", 1, 256),
            ("draft_lengths", 0, MAX_SPECULATIVE_TOKENS),
            ("peer_draft_lengths", 0, MAX_SPECULATIVE_TOKENS),
            ("prefill_lengths", 1, 10**6),
        ):
            for value in getattr(self, name):
                if not low <= value <= high:
                    raise ValueError(f"{name}: {value} must be from {low} to {high}")
        if not self.batch_sizes or 0 not in self.draft_lengths:
            raise ValueError("batch_sizes must not be empty, and draft_lengths must hold 0, plain decoding")


@dataclass
class Decoding:
    """Decoding of one engine at one batch size and K."""

    engine: str
    """The engine's name, with its version for a peer."""
    batch_size: int
    """Requests at once."""
    num_draft_tokens: int
    """K."""
    rates: list[float] = field(default_factory=list)
    """[repeats]: tokens per second."""
    mean_acceptance_length: float | None = None
    """Tokens per verification; None without drafts or where a peer does not tell."""
    step_s: list[float] = field(default_factory=list)
    """[repeats]: seconds per target forward with all that belongs to it; none for peers."""
    python_share: float | None = None
    """Share of a step that is spent outside the C++ library; None without that library."""
    dispatch_share: float | None = None
    """Share of a step that is spent outside the C++ library and inside the two calls of the kernels."""
    step_bytes: float | None = None
    """Bytes that a step reads; None for peers."""
    distinct_experts: float | None = None
    """Distinct experts per layer and forward; None for peers."""
    predicted: float | None = None
    """Tokens per second from the cost table and the realised acceptance; None for peers."""


@dataclass
class Prefill:
    """Prefill of one engine and prompt length."""

    engine: str
    """The engine's name, with its version for a peer."""
    num_tokens: int
    """Tokens of the prompt."""
    rates: list[float] = field(default_factory=list)
    """[repeats]: tokens per second."""


@dataclass
class SpeedReport:
    """What was measured."""

    options: SpeedOptions
    """What was asked for."""
    machine: dict[str, str]
    """What it was measured on."""
    bandwidth_samples: list[float] = field(default_factory=list)
    """Read bandwidth in bytes per second, one per repeat."""
    decoding: list[Decoding] = field(default_factory=list)
    """Decoding, by setting."""
    prefill: list[Prefill] = field(default_factory=list)
    """Prefill, by setting."""
    costs: CostTable | None = None
    """Seconds of forwards; None before they are measured."""

    @property
    def bandwidth(self) -> float:
        """The most read bandwidth that was measured, in bytes per second: the limit."""
        return max(self.bandwidth_samples)


class Subject:
    """The engine under test: completes prompts and says how long that takes."""

    name = "specdec"

    def __init__(self, engine: Engine, options: SpeedOptions) -> None:
        self.engine, self.options = engine, options

    def generate(
        self, prompts: list[list[int]], max_tokens: int, num_draft_tokens: int
    ) -> tuple[float, list[GenerationOutput]]:
        """Completes prompts; returns the seconds that it took, and the outputs."""
        params = [
            SamplingParams(
                max_tokens=max_tokens, temperature=self.options.temperature, seed=seed, ignore_eos=True,
                speculation=SpeculationParams(num_draft_tokens),
            )
            for seed in range(len(prompts))
        ]  # fmt: skip
        start = time.perf_counter()
        outputs = self.engine.generate(prompts, params)
        return time.perf_counter() - start, outputs

    def measure(self, groups: list[list[list[int]]], cell: Decoding) -> None:
        """Adds one repeat to `cell`."""
        k, seconds, outputs = cell.num_draft_tokens, 0.0, []
        for group in groups:
            first, _ = self.generate(group, 1, k)
            whole, done = self.generate(group, self.options.max_tokens, k)
            seconds += whole - first
            outputs.append(done)
        tokens = sum(len(o.token_ids) - 1 for done in outputs for o in done)
        steps = sum(max(o.stats.num_target_forwards for o in done) - 1 for done in outputs)
        stats = [o.stats for done in outputs for o in done]
        cell.rates.append(_rate(tokens, seconds))
        cell.step_s.append(seconds / steps)
        if num_drafts := sum(s.num_drafts for s in stats):
            cell.mean_acceptance_length = 1 + sum(s.num_accepted_tokens for s in stats) / num_drafts

    def inspect(self, groups: list[list[list[int]]], cell: Decoding) -> None:
        """Adds bytes and distinct experts per step and the share of Python to `cell`, from runs of their own."""
        k, counts, shares = cell.num_draft_tokens, StepBytes(), []
        for group in groups:
            with traced(self.engine) as first:
                self.generate(group, 1, k)
            with traced(self.engine) as whole:
                self.generate(group, self.options.max_tokens, k)
            decoding = whole - first
            counts = StepBytes(**{n: v + getattr(counts, n) for n, v in vars(decoding).items()})
            shares.append(self._python_shares(group, k))
        cell.step_bytes = counts.total / counts.num_target_forwards
        cell.distinct_experts = counts.num_expert_reads / max(1, counts.num_layer_runs)
        if None not in shares:
            cell.python_share, cell.dispatch_share = np.array(shares).mean(0).tolist()

    def _python_shares(self, group: list[list[int]], num_draft_tokens: int) -> tuple[float, float] | None:
        """Returns the share of a step outside the C++ library, and the part of it inside the kernels' calls; None where
        there is no such library."""
        kernels = self.engine.runtime.model.target.kernels
        if not isinstance(kernels, CpuKernels):
            return None
        totals = []
        for max_tokens in (1, self.options.max_tokens):
            with kernels.timed() as native, timed_calls(kernels, "draft_chain", "verify") as calls:
                seconds, _ = self.generate(group, max_tokens, num_draft_tokens)
            totals.append((seconds, native.seconds, sum(calls)))
        whole, native_s, called_s = np.diff(np.array(totals), axis=0)[0].tolist()
        return 1 - native_s / whole, (called_s - native_s) / whole

    def prefill(self, prompt: list[int]) -> float:
        """Returns the tokens per second of a prompt until the first token."""
        seconds, _ = self.generate([prompt], 1, 0)
        return len(prompt) / seconds


class PeerSubject:
    """A peer at one K, measured like `Subject`."""

    def __init__(self, peer: Peer, options: SpeedOptions) -> None:
        self.peer, self.options, self.name = peer, options, peer.version

    def measure(self, groups: list[list[list[int]]], cell: Decoding) -> None:
        """Adds one repeat to `cell`."""
        seconds, tokens, drafted, accepted = 0.0, 0, 0, 0
        for group in groups:
            first = self.peer.generate(group, 1)
            whole = self.peer.generate(group, self.options.max_tokens)
            seconds += whole.seconds - first.seconds
            tokens += sum(len(ids) - 1 for ids in whole.token_ids)
            drafted += whole.num_draft_tokens or 0
            accepted += whole.num_accepted_tokens or 0
        cell.rates.append(_rate(tokens, seconds))
        if drafted:
            cell.mean_acceptance_length = 1 + accepted / (drafted / cell.num_draft_tokens)

    def prefill(self, prompt: list[int]) -> float:
        """Returns the tokens per second of a prompt until the first token."""
        return len(prompt) / self.peer.generate([prompt], 1).seconds


def measure_speed(
    options: SpeedOptions, progress: Callable[[str], None] = lambda _: None, loading: Progress = silent
) -> SpeedReport:
    """Measures everything. Raises ValueError for options that do not fit the model, PeerError for a peer's fault.

    options: what to measure.
    progress: hears what is measured next.
    loading: hears how far the model is loaded.
    """
    most = max(options.batch_sizes)
    longest = max([options.prompt_tokens + options.max_tokens, *(n + 1 for n in options.prefill_lengths)])
    engine = Engine.from_pretrained(
        options.model,
        kernels=options.kernels,
        dtype=options.dtype,
        num_threads=options.num_threads,
        max_num_seqs=most,
        progress=loading,
        prefix_caching=False,  # the same prompts run again and again
    )
    if engine.max_model_len < options.prompt_tokens + options.max_tokens:
        raise ValueError(
            f"prompt_tokens + max_tokens = {options.prompt_tokens + options.max_tokens} exceed the model's context, "
            f"{engine.max_model_len}: lower them"
        )
    report = SpeedReport(options, describe_machine(engine) | {"model": str(engine.checkpoint.folder)})
    ours = Subject(engine, options)
    prompts = _prompts(engine, max(most, options.num_prompts), options.prompt_tokens)
    with ExitStack() as stack:
        peers = _start_peers(stack, engine, options, min(longest, engine.max_model_len), progress)
        _measure_decoding(report, ours, peers, prompts, progress)
        _measure_prefill(report, ours, peers, engine, progress)
    progress("forwards by number of rows")
    report.costs = measure_speed_costs(engine, options.batch_sizes, options.draft_lengths)
    for cell in report.decoding:
        if cell.engine == ours.name:
            ours.inspect(_groups(prompts, cell.batch_size, options.num_prompts), cell)
            cell.predicted = report.costs.predict(
                cell.batch_size, cell.num_draft_tokens, cell.mean_acceptance_length or 1.0
            )
    return report


def _measure_decoding(
    report: SpeedReport,
    ours: Subject,
    peers: list[tuple[PeerSubject, int]],
    prompts: list[list[int]],
    progress: Callable[[str], None],
) -> None:
    options = report.options
    cells: list[tuple[Subject | PeerSubject, Decoding]] = []
    for batch_size in options.batch_sizes:
        cells += [(ours, Decoding(ours.name, batch_size, k)) for k in options.draft_lengths]
        for peer, k in peers:
            limit = PEERS[peer.peer.spec.name].most_prompts_with_drafts
            if k == 0 or limit is None or batch_size <= limit:
                cells.append((peer, Decoding(peer.name, batch_size, k)))
    report.decoding = [cell for _, cell in cells]
    for repeat in range(options.repeats + 1):  # the first one warms up
        progress("read bandwidth")
        report.bandwidth_samples.append(read_bandwidth(ours.engine.runtime.model.target.kernels))
        for subject, cell in cells:
            what = f"{cell.engine}, batch {cell.batch_size}, K {cell.num_draft_tokens}"
            progress(f"repeat {repeat} of {options.repeats}: {what}")
            groups = _groups(prompts, cell.batch_size, options.num_prompts)
            subject.measure(groups[:1] if repeat == 0 else groups, cell)
            if repeat == 0:
                cell.rates.clear()
                cell.step_s.clear()


def _measure_prefill(
    report: SpeedReport,
    ours: Subject,
    peers: list[tuple[PeerSubject, int]],
    engine: Engine,
    progress: Callable[[str], None],
) -> None:
    lengths = [n for n in report.options.prefill_lengths if n < engine.max_model_len]
    subjects: list[Subject | PeerSubject] = [ours, *(peer for peer, k in peers if k == 0)]
    cells = [(subject, Prefill(subject.name, n)) for n in lengths for subject in subjects]
    report.prefill = [cell for _, cell in cells]
    for repeat in range(report.options.repeats):
        for subject, cell in cells:
            progress(f"prefill {cell.num_tokens}: {cell.engine}, repeat {repeat + 1}")
            (prompt,) = _prompts(engine, 1, cell.num_tokens, offset=repeat)
            cell.rates.append(subject.prefill(prompt))


def _start_peers(
    stack: ExitStack, engine: Engine, options: SpeedOptions, max_model_len: int, progress: Callable[[str], None]
) -> list[tuple[PeerSubject, int]]:
    """Starts one process per peer and K, all loaded at once; returns each with its K."""
    folder = Path(stack.enter_context(TemporaryDirectory(prefix="specdec-peers-"))) if options.peers else Path()
    dtype = str(engine.runtime.model.target.kernels.dtype).removeprefix("torch.")
    started = []
    for spec in options.peers:
        for k in sorted({min(k, PEERS[spec.name].most_drafts) for k in options.peer_draft_lengths}):
            progress(f"starting {spec.name}, K {k}")
            settings = Settings(
                checkpoint=str(engine.checkpoint.folder.absolute()), work_folder=str(folder), dtype=dtype,
                num_threads=torch.get_num_threads(), num_speculative_tokens=k, max_num_seqs=max(options.batch_sizes),
                max_model_len=max_model_len,
            )  # fmt: skip
            started.append((PeerSubject(stack.enter_context(Peer(spec, settings)), options), k))
    return started


def _rate(tokens: int, seconds: float) -> float:
    if seconds <= 0:
        raise ValueError(f"{tokens} tokens take too little time to be measured: raise max_tokens or num_prompts")
    return tokens / seconds


def _groups(prompts: list[list[int]], batch_size: int, num_prompts: int) -> list[list[list[int]]]:
    count = max(1, num_prompts // batch_size)
    return [prompts[i * batch_size : (i + 1) * batch_size] for i in range(count)]


def _prompts(engine: Engine, count: int, length: int, offset: int = 0) -> list[list[int]]:
    """Returns prompts of `length` token ids: random ones for a planted checkpoint, else stretches of the `stdlib`
    prompts, one after another."""
    if (engine.checkpoint.folder / RECIPE_NAME).exists():
        return planted_prompts(engine.checkpoint.config.vocab_size, count, length, seed=offset)
    texts = [p.prompt for p in load_stdlib()]
    prompts: list[list[int]] = []
    for i in range(count):
        ids: list[int] = []
        at = i + offset
        while len(ids) < length:
            ids += engine.checkpoint.encode(texts[at % len(texts)])
            at += 1
        prompts.append(ids[:length])
    return prompts

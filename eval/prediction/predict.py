"""Tokens per second and the best draft length by batch size: `specdec eval predict`."""

from __future__ import annotations

from dataclasses import dataclass, field

from specdec.config import MAX_SPECULATIVE_TOKENS
from specdec.eval.prediction.costs import MEMORY_SHARE, CostModel, Iteration, Machine, Memory
from specdec.eval.prediction.hardware import find_gpu
from specdec.eval.prediction.published import MOST_ROWS
from specdec.eval.prediction.rates import AcceptanceRates
from specdec.eval.prediction.shapes import ROUTER_BYTES, find_precision, load_shape

DEFAULT_BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


@dataclass(frozen=True)
class PredictOptions:
    """What to predict.

    config: see `shapes.load_shape`. gpu, dtype: names in `hardware.GPUS` and `shapes.PRECISIONS`. batch_sizes: None for
    `DEFAULT_BATCH_SIZES` as far as they fit. draft_lengths: None for 0 up to the positions whose acceptance is known;
    beyond them it is extrapolated. context_length: tokens of every sequence, prompt included.
    """

    config: str
    gpu: str
    num_gpus: int
    dtype: str
    acceptance: AcceptanceRates
    batch_sizes: tuple[int, ...] | None = None
    draft_lengths: tuple[int, ...] | None = None
    context_length: int = 2048

    def __post_init__(self) -> None:
        gpu = find_gpu(self.gpu)
        gpu.flops(find_precision(self.dtype).matmul)
        if not 1 <= self.num_gpus <= gpu.max_gpus:
            raise ValueError(f"num_gpus = {self.num_gpus} must be from 1 to {gpu.max_gpus}, as many as one link joins")
        if self.context_length < 1:
            raise ValueError(f"context_length = {self.context_length} must be at least 1")
        if self.batch_sizes is not None and (not self.batch_sizes or min(self.batch_sizes) < 1):
            raise ValueError(f"batch_sizes = {self.batch_sizes} must be one or more integers from 1 on")
        for k in self.draft_lengths if self.draft_lengths is not None else (0,):
            if not 0 <= k <= MAX_SPECULATIVE_TOKENS:
                raise ValueError(f"draft_lengths: {k} must be from 0 to {MAX_SPECULATIVE_TOKENS}")
        if self.draft_lengths == ():
            raise ValueError("draft_lengths must not be empty")


@dataclass(frozen=True)
class Cell:
    """tokens_per_s: of all requests together. speedup: over plain decoding. iteration: its seconds."""

    batch_size: int
    num_draft_tokens: int
    mean_acceptance_length: float
    tokens_per_s: float
    speedup: float
    iteration: Iteration

    @property
    def tokens_per_s_per_request(self) -> float:
        return self.tokens_per_s / self.batch_size

    @property
    def is_beyond_points(self) -> bool:
        """More rows in the target forward than any published point has."""
        return self.batch_size * (self.num_draft_tokens + 1) > MOST_ROWS


@dataclass(frozen=True)
class Prediction:
    """cells: by batch size, then draft length. memory: per GPU, by batch size."""

    options: PredictOptions
    model: CostModel
    cells: list[Cell]
    memory: dict[int, Memory]
    warnings: list[str] = field(default_factory=list)

    @property
    def batch_sizes(self) -> list[int]:
        return list(self.memory)

    @property
    def draft_lengths(self) -> list[int]:
        return sorted({cell.num_draft_tokens for cell in self.cells})

    def best(self, batch_size: int) -> Cell:
        """The cell with the most tokens per second, the shortest drafts among equals."""
        cells = [cell for cell in self.cells if cell.batch_size == batch_size]
        return max(cells, key=lambda cell: (cell.tokens_per_s, -cell.num_draft_tokens))


def predict(options: PredictOptions) -> Prediction:
    """ValueError for what does not fit: config, GPUs, memory. CheckpointError for a config that is none of Glm4Moe."""
    machine = Machine(find_gpu(options.gpu), options.num_gpus)
    model = CostModel(load_shape(options.config), find_precision(options.dtype), machine)
    _check_shape(model, options.context_length)
    rates, lengths, warnings = _draft_lengths(options, model.shape.has_mtp)
    with_mtp = max(lengths) > 0
    batch_sizes = _batch_sizes(options, model, with_mtp)
    cells = [_cell(model, rates, b, k, options.context_length) for b in batch_sizes for k in lengths]
    memory = {b: model.memory(b, options.context_length, with_mtp) for b in batch_sizes}
    if any(cell.is_beyond_points for cell in cells):
        warnings.append(
            f"forwards of more than {MOST_ROWS} rows, batch x (K + 1), are beyond every published point; what grows "
            "with rows beside experts, arithmetic and all-reduces is not in the model, so they come out too fast"
        )
    return Prediction(options, model, cells, memory, warnings)


def _cell(model: CostModel, rates: AcceptanceRates, batch_size: int, k: int, context_length: int) -> Cell:
    length = rates.mean_length(k)
    iteration = model.iteration(batch_size, k, length, context_length)
    tokens_per_s = batch_size * length / iteration.total_s
    plain = model.tokens_per_s(batch_size, 0, 1, context_length)
    return Cell(batch_size, k, length, tokens_per_s, tokens_per_s / plain, iteration)


def _check_shape(model: CostModel, context_length: int) -> None:
    shape, gpus = model.shape, model.machine.num_gpus
    if shape.num_heads % gpus:
        raise ValueError(f"num_gpus = {gpus}: the {shape.num_heads} heads of {shape.name} cannot be split evenly")
    if context_length > shape.max_context_length:
        raise ValueError(f"context_length = {context_length} exceeds the {shape.max_context_length} of {shape.name}")


def _draft_lengths(options: PredictOptions, has_mtp: bool) -> tuple[AcceptanceRates, tuple[int, ...], list[str]]:
    """-> rates that reach far enough, the draft lengths, warnings."""
    rates = options.acceptance
    known = min(rates.measured, MAX_SPECULATIVE_TOKENS) if has_mtp else 0
    lengths = tuple(sorted(set(options.draft_lengths or range(known + 1))))
    if max(lengths) > 0 and not has_mtp:
        raise ValueError(
            f"draft_lengths: {max(lengths)}, but {options.config} has no MTP layer: only 0 can be predicted"
        )
    if max(lengths) <= rates.measured:
        return rates, lengths, []
    warning = (
        f"acceptance is known for draft positions 1 to {rates.measured} only; up to {max(lengths)} the last "
        "conditional acceptance is taken to go on, which MTP layers rarely reach"
    )
    return rates.extended(max(lengths)), lengths, [warning]


def _batch_sizes(options: PredictOptions, model: CostModel, with_mtp: bool) -> list[int]:
    most = model.max_batch_size(options.context_length, with_mtp)
    if most == 0:
        raise ValueError(_does_not_fit(model, 1, options.context_length, with_mtp) + _remedy(model, options, with_mtp))
    if options.batch_sizes is None:
        return [b for b in DEFAULT_BATCH_SIZES if b <= most]
    batch_sizes = sorted(set(options.batch_sizes))
    if batch_sizes[-1] > most:
        message = _does_not_fit(model, batch_sizes[-1], options.context_length, with_mtp)
        raise ValueError(f"{message}; batch sizes up to {most} do")
    return batch_sizes


def _does_not_fit(model: CostModel, batch_size: int, context_length: int, with_mtp: bool) -> str:
    m = model.memory(batch_size, context_length, with_mtp)
    return (
        f"{model.shape.name} in {model.precision.name} does not fit {model.machine}: {m.weights / 1e9:.1f} GB of "
        f"weights and {m.kv_cache / 1e9:.1f} GB of keys and values ({batch_size} x {context_length} tokens) on each "
        f"GPU, of {m.available / 1e9:.1f} GB"
    )


def _remedy(model: CostModel, options: PredictOptions, with_mtp: bool) -> str:
    """The least number of linked GPUs that would do, if there is one."""
    gpu = model.machine.gpu
    for num_gpus in range(model.machine.num_gpus + 1, gpu.max_gpus + 1):
        larger = CostModel(model.shape, model.precision, Machine(gpu, num_gpus))
        if model.shape.num_heads % num_gpus == 0 and larger.max_batch_size(options.context_length, with_mtp) > 0:
            return f"; {num_gpus} of them would do"
    smaller = "a shorter context" if options.dtype == "fp8" else "fp8, a shorter context"
    return f"; choose {smaller}, or GPUs with more memory"


def assumptions(prediction: Prediction) -> list[str]:
    """What the figures rest on, in sentences."""
    o, model = prediction.options, prediction.model
    gpu, c, p = model.machine.gpu, model.constants, model.precision
    compute = gpu.flops(p.matmul) / 1e12
    return [
        f"{gpu.name}, by its data sheet: {gpu.memory / 1e9:.0f} GB, {gpu.bandwidth / 1e12:.3g} TB/s, {compute:.4g} "
        f"TFLOP/s dense {p.matmul}, {gpu.link_bandwidth / 1e9:.3g} GB/s to the others in one direction",
        f"{model.shape.name} in {p.name}: {p.mlp:g} byte(s) per weight of linears and experts, {p.embedding:g} of "
        f"embeddings, head and eh_proj, {ROUTER_BYTES} of routers, {p.kv:g} of keys and values",
        f"each of {o.num_gpus} GPUs holds 1/{o.num_gpus} of every matrix; keys and values are split over at most "
        f"{model.shape.kv_shards} GPU(s); two all-reduces per layer where there are several",
        f"a forward reads at {c.bandwidth_share:.0%} of the bandwidth or computes at {c.flops_share:.0%} of the peak, "
        f"whichever takes longer, plus {c.forward_s * 1e6:.0f} us, {c.layer_s * 1e6:.0f} us per layer and "
        f"{c.all_reduce_s * 1e6:.0f} us per all-reduce; the bandwidth share and the time per layer were fitted to the "
        "published points below, to engines of 2025 and 2026: one with fewer or slower launches is off by just that",
        "rows choose their experts independently and evenly, U(n) = E (1 - (1 - k/E)^n); real routing overlaps more",
        f"every sequence has {o.context_length} tokens, none is prefilled meanwhile; all of a batch draft the same K",
        f"acceptance: {o.acceptance.source}; it holds for this model and these texts only as far as they are alike",
        f"{1 - MEMORY_SHARE:.0%} of a GPU's memory is left for activations and the rest",
    ]


def parse_draft_lengths(text: str) -> tuple[int, ...]:
    """ "0..4" or "0,1,3" -> the lengths. Raises ValueError."""
    try:
        first, dots, last = text.partition("..")
        if dots:
            return tuple(range(int(first), int(last) + 1))
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"draft lengths = {text!r} must be like 0..4 or 0,1,3") from error

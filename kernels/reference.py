"""Every operation in plain torch: the executable specification of `specdec.kernels.operations`.

Runs in any floating dtype on any torch device. Reductions and the router are computed in at least
fp32, as Glm4Moe does. F.linear's bits depend on the number of rows, so this backend is not
row-invariant: a row agrees with itself in another batch to rounding only.
"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from specdec.kernels import speculation
from specdec.kernels.data import AttentionMetadata, DecoderOutput, DecoderWeights, HiddenRows, RoutingConfig
from specdec.kernels.decisions import (
    GREEDY,
    DraftChain,
    Drafts,
    LogitEdits,
    Residuals,
    RowSampling,
    Verified,
    VerifyBatch,
)
from specdec.kernels.decoder import gated_mlp, run_decoder
from specdec.kernels.fp8 import Fp8Kind, Fp8Matrix, plain
from specdec.kernels.philox import gumbel_noise, uniforms


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class ReferenceOperations:
    """Every operation in plain torch; `Operations` has the contracts. Packed matrices are plain tensors.

    device: where tensors are.
    activation_dtype: dtype of the model's activations.
    """

    def __init__(self, device: torch.device, activation_dtype: torch.dtype) -> None:
        self.device, self.activation_dtype = device, activation_dtype

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, weight, bias)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(_accumulation_dtype(x.dtype))
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return wide.to(x.dtype) * weight

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        total = x + residual
        return self.rms_norm(total, weight, eps), total

    def rope_(self, q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor) -> None:
        half = cos_sin.shape[-1] // 2
        cos, sin = cos_sin[positions].unsqueeze(1).to(_accumulation_dtype(q.dtype)).chunk(2, -1)  # [T, 1, half]
        for x in (q, k):
            x1, x2 = x[..., :half], x[..., half : 2 * half]
            rotated = torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1)
            x[..., : 2 * half] = rotated.to(x.dtype)

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up

    def route(self, router_logits: Tensor, correction_bias: Tensor, config: RoutingConfig) -> tuple[Tensor, Tensor]:
        scores = router_logits.sigmoid()
        choice = scores + correction_bias  # [T, E]
        if config.topk_group < config.n_group:
            groups = choice.view(choice.shape[0], config.n_group, -1)  # [T, n_group, E / n_group]
            group_scores = groups.topk(2, -1).values.sum(-1)
            kept = _top_ids(group_scores, config.topk_group)
            dropped = torch.ones_like(group_scores, dtype=torch.bool).scatter(1, kept, False)
            choice = groups.masked_fill(dropped.unsqueeze(-1), float("-inf")).flatten(1)
        expert_ids = _top_ids(choice, config.num_experts_per_tok)
        weights = scores.gather(1, expert_ids)
        if config.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return expert_ids, weights * config.routed_scaling_factor

    def mlp(self, x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        return gated_mlp(self, x, gate_up, down)

    def moe(self, x: Tensor, expert_ids: Tensor, expert_weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        out = torch.zeros_like(x, dtype=_accumulation_dtype(x.dtype))
        for expert in expert_ids.unique().tolist():
            rows, choices = (expert_ids == expert).nonzero(as_tuple=True)
            routed = self.mlp(x[rows], gate_up[expert], down[expert])
            out[rows] += routed * expert_weights[rows, choices].unsqueeze(-1)
        return out.to(x.dtype)

    def append_kv(self, k: Tensor, v: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
        page_size = kv_cache.shape[2]
        pages, offsets = slot_mapping // page_size, slot_mapping % page_size
        kv_cache[pages, 0, offsets] = k.to(kv_cache.dtype)
        kv_cache[pages, 1, offsets] = v.to(kv_cache.dtype)

    def paged_attention(self, q: Tensor, kv_cache: Tensor, metadata: AttentionMetadata) -> Tensor:
        page_size, num_kv_heads = kv_cache.shape[2], kv_cache.shape[3]
        group = q.shape[1] // num_kv_heads
        wide = _accumulation_dtype(q.dtype)
        outputs = []
        sequences = zip(q.split(metadata.query_lens), metadata.kv_lens, metadata.page_tables, strict=True)
        for queries, kv_len, page_table in sequences:
            pages = kv_cache[page_table[: -(-kv_len // page_size)]]  # [pages, 2, page_size, Hkv, D]
            keys, values = pages.transpose(0, 1).flatten(1, 2)[:, :kv_len].to(wide)  # [S, Hkv, D] each
            keys, values = (x.repeat_interleave(group, 1).transpose(0, 1) for x in (keys, values))  # [Hq, S, D]
            scores = queries.to(wide).transpose(0, 1) @ keys.transpose(1, 2) * q.shape[-1] ** -0.5  # [Hq, Q, S]
            first = kv_len - queries.shape[0]
            hidden = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(first + 1)
            probs = scores.masked_fill(hidden, float("-inf")).softmax(-1)
            outputs.append((probs @ values).transpose(0, 1).to(q.dtype))
        return torch.cat(outputs)

    def head_argmax(self, x: Tensor, head: Tensor) -> Tensor:
        logits = self.linear(x, head)
        best = lowest_argmax(logits)
        return best.where(logits.isfinite().all(-1), -1)

    def edit_(self, logits: Tensor, edits: list[LogitEdits | None], drafts: list[list[int]]) -> None:
        for row, e, before in zip(logits, edits, drafts, strict=True):
            if e is not None:
                row[list(e.bias_ids)] += torch.tensor(e.biases.tolist(), dtype=row.dtype, device=row.device)
                row[banned_tokens(e, before)] = float("-inf")
                _penalise_(row, e, before)

    def truncate_(self, logits: Tensor, sampling: RowSampling) -> None:
        rows = zip(logits, sampling.scales, sampling.top_k, sampling.top_p, sampling.min_p, strict=True)
        for row, scale, top_k, top_p, min_p in rows:
            if not row.max().isfinite():  # NaN, too
                row.fill_(float("nan"))
                continue
            if 0 < top_k < len(row):
                row.masked_fill_(row < row.topk(top_k).values[-1], float("-inf"))
            if top_p < 1:
                _keep_top_p_(row, scale, top_p)
            if min_p > 0:
                probs = (row * scale).softmax(-1)
                row.masked_fill_(probs < min_p * probs.max(), float("-inf"))

    def choose(self, logits: Tensor, sampling: RowSampling) -> Tensor:
        noisy = [r for r, stream in enumerate(sampling.streams) if stream != GREEDY]
        scores = logits.to(torch.float64, copy=True)
        if noisy:
            s = sampling.select(noisy)
            noise = gumbel_noise(s.seeds, s.streams, s.positions, s.starts, logits.shape[-1])
            scales = torch.tensor(s.scales, dtype=torch.float64, device=logits.device)
            scores[noisy] = scores[noisy] * scales.unsqueeze(-1) + torch.from_numpy(noise).to(logits.device)
        return lowest_argmax(scores).where(scores.amax(-1).isfinite(), -1)

    def softmax(self, logits: Tensor, scales: list[float]) -> Tensor:
        return (logits * torch.tensor(scales, dtype=logits.dtype, device=logits.device).unsqueeze(-1)).softmax(-1)

    def residual_mass(self, laws: Residuals) -> list[float]:
        return [float(_residual(laws, i).sum()) for i in range(len(laws.p_rows))]

    def sample_residual(self, laws: Residuals, uniforms: list[float]) -> list[int]:
        return [_inverse_cdf(residual_law(laws, i), u) for i, u in enumerate(uniforms)]

    def uniforms(self, seeds: list[int], stream: int, positions: list[int], starts: list[int]) -> list[float]:
        return uniforms(seeds, [stream] * len(seeds), positions, starts).tolist()


class ReferenceKernels(ReferenceOperations):
    """The reference backend; `Backend` has the contracts."""

    name = "reference"
    cache_dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    fp8: frozenset[Fp8Kind] = frozenset()
    num_scratch_pages = 0

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(device, dtype)
        self.dtype = dtype

    def pack(self, weight: Tensor | Fp8Matrix, *, full_precision: bool = False) -> Tensor:
        return plain(weight, self.dtype)

    def pack_gate_up(self, weight: Tensor | Fp8Matrix) -> Tensor:
        return plain(weight, self.dtype)

    def num_bytes(self, packed: Tensor) -> int:
        return packed.nbytes

    def prepare(self, decoder: DecoderWeights) -> DecoderWeights:
        return decoder

    def decode(
        self,
        decoder: DecoderWeights,
        input_ids: list[int],
        previous: list[HiddenRows] | None,
        metadata: AttentionMetadata,
        kv_cache: Tensor,
        expert_ids: Tensor | None = None,
    ) -> DecoderOutput:
        return run_decoder(self, decoder, input_ids, previous, metadata, kv_cache, expert_ids)

    def draft_chain(
        self, decoder: DecoderWeights, head: Tensor, chain: DraftChain, expert_ids: Tensor | None = None
    ) -> Drafts:
        return speculation.draft_chain(self, decoder, head, chain, expert_ids)

    def verify(
        self,
        decoder: DecoderWeights,
        head: Tensor,
        input_ids: list[int],
        metadata: AttentionMetadata,
        kv_cache: Tensor,
        batch: VerifyBatch,
        expert_ids: Tensor | None = None,
    ) -> Verified:
        return speculation.verify(self, decoder, head, input_ids, metadata, kv_cache, batch, expert_ids)

    def compute_logits(self, hidden: Tensor, head: Tensor) -> Tensor:
        return speculation.compute_logits(self, hidden, head)


def banned_tokens(e: LogitEdits, drafts: list[int]) -> list[int]:
    """Returns the tokens that may not follow the committed tokens and `drafts`."""
    banned = e.end_ids.tolist() if len(drafts) < e.ends_banned else []
    before = [*e.recent, *drafts]
    for start, end in pairwise(e.word_starts):
        *others, last = e.word_tokens[start:end]
        if len(before) >= len(others) and before[len(before) - len(others) :] == others:
            banned.append(last)
    return banned


def _penalise_(row: Tensor, e: LogitEdits, drafts: list[int]) -> None:
    if not e.counted_ids:
        return
    counts = Counter(dict(zip(e.counted_ids, e.counts)))
    counts.update(drafts)
    ids = list(counts)
    number = torch.tensor([counts[token] for token in ids], dtype=row.dtype, device=row.device)
    values = row[ids]
    values = torch.where(values > 0, values / e.repetition, values * e.repetition)
    values = values - e.presence * number.clamp(max=1)
    row[ids] = values - e.frequency * number


def _keep_top_p_(row: Tensor, scale: float, top_p: float) -> None:
    """Keeps the smallest set of most probable tokens whose probability reaches top_p, at least one (nucleus sampling,
    Holtzman et al. 2020); the others become -inf."""
    ordered, ids = row.sort(descending=True, stable=True)
    before = (ordered * scale).softmax(-1).cumsum(-1).roll(1)
    before[0] = -1  # below every top_p, one that is 0 in fp32 included
    row[ids[before >= top_p]] = float("-inf")


def residual_law(laws: Residuals, i: int) -> Tensor:
    """Returns residual distribution i, [V] in fp64, up to a factor; p where it has no mass."""
    law = _residual(laws, i)
    return law if law.sum() != 0 else laws.p[laws.p_rows[i]].double()


def _residual(laws: Residuals, i: int) -> Tensor:
    law = laws.scales[i] * laws.p[laws.p_rows[i]].double()
    if laws.q is not None and laws.q_rows[i] >= 0:
        law = (law - laws.q[laws.q_rows[i]].double()).clamp(min=0)
    if laws.excluded[i] >= 0:
        law[laws.excluded[i]] = 0
    return law


def _inverse_cdf(law: Tensor, uniform: float) -> int:
    """Returns the first token where the CDF exceeds uniform * total; -1 where the total is 0 or not finite. A token of
    probability 0 is never returned, as uniform <= 1 - 2**-53 keeps the product below the total."""
    cdf = law.cumsum(-1)
    if not 0 < cdf[-1] < float("inf"):
        return -1
    return int(torch.searchsorted(cdf, uniform * cdf[-1:], right=True))


def lowest_argmax(values: Tensor) -> Tensor:
    """Returns the argmax [...] int64 of values [..., V], the lowest id among equals (torch.argmax leaves that open)."""
    ids = torch.arange(values.shape[-1], dtype=torch.int32, device=values.device)
    is_best = values == values.amax(-1, keepdim=True)
    return torch.where(is_best, ids, values.shape[-1] - 1).amin(-1).long()


def _top_ids(scores: Tensor, k: int) -> Tensor:
    """Returns the ids [T, k] of each row's k largest scores; the lowest id first among equals (a stable sort, unlike
    topk)."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[:, :k]

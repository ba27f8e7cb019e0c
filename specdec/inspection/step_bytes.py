"""Counts the bytes of weights that the forwards of a decode step read from memory.

A forward reads every weight once, however many rows it has; but of the embeddings one row per token, and of a layer's
routed experts only those that some row chose. Keys, values and activations are not counted here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from specdec.kernels import AnyBackend
from specdec.kernels.data import AttentionWeights, LayerWeights, MLPWeights, MoEWeights
from specdec.model.layers import Decoder
from specdec.model.weights import LoadedModel


@dataclass(frozen=True)
class DecoderBytes:
    """Bytes of weights of a decoder, as its kernels hold them; without the head, which target and MTP layer share."""

    fixed: int
    """Bytes that every forward reads: all but embeddings and routed experts."""
    embedding_row: int
    """Bytes of one token's embedding."""
    expert: tuple[int, ...]
    """Bytes of one routed expert, by layer; 0 in a dense layer."""

    def read(self, num_rows: int, distinct: Iterable[float]) -> float:
        """Returns the bytes that a forward of `num_rows` rows reads. distinct: how many experts the rows chose, by
        layer."""
        experts = sum(size * num for size, num in zip(self.expert, distinct, strict=True))
        return self.fixed + num_rows * self.embedding_row + experts


def decoder_bytes(decoder: Decoder) -> DecoderBytes:
    """Counts the bytes of a decoder's weights."""
    weights, kernels = decoder.weights, decoder.kernels
    fixed = sum(_layer_bytes(kernels, layer) for layer in weights.layers) + weights.norm.nbytes
    if weights.fusion is not None:
        fixed += kernels.num_bytes(weights.fusion.eh_proj) + weights.fusion.enorm.nbytes + weights.fusion.hnorm.nbytes
    return DecoderBytes(
        fixed=fixed,
        embedding_row=weights.embedding[0].nbytes,
        expert=tuple(_expert_bytes(kernels, layer.mlp) for layer in weights.layers),
    )


def _layer_bytes(kernels: AnyBackend, layer: LayerWeights) -> int:
    total = _attention_bytes(kernels, layer.attention) + layer.input_norm.nbytes + layer.post_attention_norm.nbytes
    mlp = layer.mlp
    if isinstance(mlp, MoEWeights):
        total += kernels.num_bytes(mlp.router) + mlp.correction_bias.nbytes
        mlp = mlp.shared
    return total + _mlp_bytes(kernels, mlp)


def _attention_bytes(kernels: AnyBackend, attention: AttentionWeights) -> int:
    vectors = (attention.qkv_bias, attention.q_norm, attention.k_norm)
    matrices = kernels.num_bytes(attention.qkv) + kernels.num_bytes(attention.o)
    return matrices + sum(vector.nbytes for vector in vectors if vector is not None)


def _mlp_bytes(kernels: AnyBackend, mlp: MLPWeights) -> int:
    return kernels.num_bytes(mlp.gate_up) + kernels.num_bytes(mlp.down)


def _expert_bytes(kernels: AnyBackend, mlp: MLPWeights | MoEWeights) -> int:
    return _mlp_bytes(kernels, mlp.experts) // len(mlp.correction_bias) if isinstance(mlp, MoEWeights) else 0


def expected_distinct(num_experts: int, experts_per_token: int, num_rows: int) -> float:
    """Returns how many experts of a layer are chosen by any of T rows on average, if each row chooses its k of the E
    experts evenly and independently: E (1 - (1 - k / E)^T).

    Consecutive tokens of a text choose alike more often, so that fewer are read in practice.
    """
    return float(num_experts * (1 - (1 - experts_per_token / num_experts) ** num_rows))


@dataclass(frozen=True)
class ModelBytes:
    """Bytes of weights that decode steps of a model read."""

    target: DecoderBytes
    """The target's decoder."""
    mtp: DecoderBytes | None
    """The MTP layer's decoder; None without one."""
    head: int
    """Bytes of the head."""
    num_experts: int
    """Routed experts of a layer, E."""
    experts_per_token: int
    """Experts that a row chooses, k."""

    @classmethod
    def of(cls, model: LoadedModel) -> ModelBytes:
        """Counts the bytes of a model that is packed and prepared; its tensors may be without memory."""
        target, mtp, config = model.target, model.mtp, model.config
        return cls(
            target=decoder_bytes(target.decoder),
            mtp=None if mtp is None else decoder_bytes(mtp.decoder),
            head=target.kernels.num_bytes(target.head),
            num_experts=config.n_routed_experts,
            experts_per_token=config.num_experts_per_tok,
        )

    def step(self, num_draft_tokens: int) -> float:
        """Returns the expected bytes of one decode step for one sequence, K = `num_draft_tokens`.

        The target verifies the last token and K drafts, K + 1 rows. The MTP layer runs K times: over the K + 1 pairs
        that are pending where all drafts of the step before were accepted, then over one pair at a time. Every forward
        reads the head. With K = 0 the target runs alone. See `expected_distinct` for the experts.
        """
        num_rows = num_draft_tokens + 1
        total = self._forward(self.target, num_rows)
        if num_draft_tokens > 0:
            assert self.mtp is not None, "without an MTP layer nothing is drafted"
            total += self._forward(self.mtp, num_rows) + (num_draft_tokens - 1) * self._forward(self.mtp, 1)
        return total

    def _forward(self, decoder: DecoderBytes, num_rows: int) -> float:
        distinct = expected_distinct(self.num_experts, self.experts_per_token, num_rows)
        return self.head + decoder.read(num_rows, [distinct] * len(decoder.expert))

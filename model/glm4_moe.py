"""The target model, Glm4MoeForCausalLM: embed -> layers -> norm; hidden states out, logits on demand."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

from torch import Tensor, nn

from specdec.kernels import AnyBackend, AttentionMetadata
from specdec.kernels.data import DecoderShape, DecoderWeights
from specdec.kernels.decisions import Verified, VerifyBatch
from specdec.model.config import Glm4MoeConfig
from specdec.model.layers import Decoder, DecoderLayer, Embedding, Linear, Matrices, RMSNorm, RotaryEmbedding


def decoder_shape(config: Glm4MoeConfig) -> DecoderShape:
    """Returns the sizes that the kernels need beside the weights; the same for target and MTP layer."""
    return DecoderShape(
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        rms_norm_eps=config.rms_norm_eps,
        num_experts=config.n_routed_experts,
        routing=config.routing,
    )


class Glm4MoeModel(nn.Module):
    """Weights of embeddings, layers and final norm, by the checkpoint's names."""

    def __init__(self, config: Glm4MoeConfig, kernels: AnyBackend) -> None:
        super().__init__()
        self.embed_tokens = Embedding(kernels, config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, kernels, dense=i < config.first_k_dense_replace)
            for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(kernels, config.hidden_size)


class TiedHead(Matrices):
    """The embeddings used as the head; it has no tensors of its own."""

    def __init__(self, kernels: AnyBackend, embedding: Embedding) -> None:
        super().__init__(kernels)
        self._embedding = [embedding]  # in a list: not a submodule

    def slots(self, name: str) -> dict[str, Tensor]:
        return {}

    def pack(self) -> None:
        self.packed["weight"] = self.kernels.pack(self._embedding[0].weight)


class Glm4MoeForCausalLM(nn.Module):
    """The target. Its embeddings and head serve the MTP layer too."""

    def __init__(self, config: Glm4MoeConfig, kernels: AnyBackend) -> None:
        super().__init__()
        self.config, self.kernels = config, kernels
        self.model = Glm4MoeModel(config, kernels)
        self.lm_head: Linear | TiedHead
        if config.tie_word_embeddings:
            self.lm_head = TiedHead(kernels, self.model.embed_tokens)
        else:
            self.lm_head = Linear(kernels, config.hidden_size, config.vocab_size)
        self.decoder: Decoder  # these two from `prepare` on
        self.head: Any

    def prepare(self, rotary: RotaryEmbedding) -> None:
        """Makes the decoder that the backend runs. Call it once all weights are packed."""
        self.head = self.lm_head.packed["weight"]
        layers = cast(Iterable[DecoderLayer], self.model.layers)
        self.decoder = Decoder(
            self.kernels,
            DecoderWeights(
                shape=decoder_shape(self.config),
                embedding=self.model.embed_tokens.weight,
                fusion=None,
                layers=tuple(layer.weights() for layer in layers),
                norm=self.model.norm.weight,
                cos_sin=rotary.cos_sin,
            ),
        )

    def forward(self, input_ids: list[int], metadata: AttentionMetadata, kv_cache: Tensor) -> Tensor:
        """Returns hidden states [T, H] after the final norm.

        input_ids: [T], the packed tokens.
        metadata: where they live in the cache.
        kv_cache: [num_layers or more, pages, 2, page_size, Hkv, D]; keys and values are appended to it.
        """
        return self.decoder(input_ids, None, metadata, kv_cache).normed

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Returns logits [R, V], in at least fp32, of hidden states [R, H]."""
        return self.kernels.compute_logits(hidden, self.head)

    def verify(
        self, input_ids: list[int], metadata: AttentionMetadata, kv_cache: Tensor, verification: VerifyBatch
    ) -> Verified:
        """Runs `forward` and decides the tokens that each sequence emits after it; see `Backend.verify`."""
        return self.decoder.verify(self.head, input_ids, metadata, kv_cache, verification)

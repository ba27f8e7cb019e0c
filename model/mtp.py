"""The multi-token-prediction (MTP) layer: `model.layers.{num_hidden_layers}` of a checkpoint.

    x_i = eh_proj(concat[enorm(E[t_{i+1}]), hnorm(h_i)])     embedding half first
    y_i = decoder_layer(x_i)                                  always MoE, with a causal KV cache of its own
    o_i = shared_head.norm(y_i);  lm_head(o_i) are the logits for t_{i+2}

h_i is the target's hidden state after its final norm, at the first draft step; later steps take the
layer's own previous output in its place (docs/mtp.md has the alignment table).
"""

from __future__ import annotations

from torch import Tensor, nn

from specdec.kernels import AnyBackend, AttentionMetadata
from specdec.kernels.data import DecoderOutput, DecoderWeights, FusionWeights, HiddenRows
from specdec.model.config import Glm4MoeConfig
from specdec.model.glm4_moe import Glm4MoeForCausalLM, decoder_shape
from specdec.model.layers import Decoder, DecoderLayer, Linear, RMSNorm, RotaryEmbedding


class SharedHead(nn.Module):
    """The norm before the head. Only the norm is the layer's own: embeddings and head are the target's."""

    def __init__(self, config: Glm4MoeConfig, kernels: AnyBackend) -> None:
        super().__init__()
        self.norm = RMSNorm(kernels, config.hidden_size)


class MTPLayer(DecoderLayer):
    """Weights of the MTP layer, and the decoder that runs it."""

    def __init__(self, config: Glm4MoeConfig, kernels: AnyBackend) -> None:
        super().__init__(config, kernels, dense=False)
        self.config, self.kernels = config, kernels
        self.enorm = RMSNorm(kernels, config.hidden_size)
        self.hnorm = RMSNorm(kernels, config.hidden_size)
        self.eh_proj = Linear(kernels, 2 * config.hidden_size, config.hidden_size)
        self.shared_head = SharedHead(config, kernels)
        self.decoder: Decoder  # from `prepare` on

    def prepare(self, target: Glm4MoeForCausalLM, rotary: RotaryEmbedding) -> None:
        """Makes the decoder that the backend runs, with the target's embeddings. Call it once all weights are
        packed."""
        self.decoder = Decoder(
            self.kernels,
            DecoderWeights(
                shape=decoder_shape(self.config),
                embedding=target.model.embed_tokens.weight,
                fusion=FusionWeights(self.enorm.weight, self.hnorm.weight, self.eh_proj.packed["weight"]),
                layers=(self.weights(),),
                norm=self.shared_head.norm.weight,
                cos_sin=rotary.cos_sin,
            ),
        )

    def draft(
        self, previous: Tensor, next_token_ids: list[int], metadata: AttentionMetadata, kv_cache: Tensor
    ) -> DecoderOutput:
        """Runs the layer over pairs of a hidden state and the token after it; returns outputs [T, H].

        Of these `normed` feeds the head and, by default, the next draft; feeding `unnormed` is an ablation.

        previous: [T, H], the hidden states.
        next_token_ids: [T], the tokens.
        metadata: where the pairs live in the cache.
        kv_cache: [pages, 2, page_size, Hkv, D], the MTP layer's own, which is appended to.
        """
        rows = [HiddenRows(previous, 0, len(previous))]
        return self.decoder(next_token_ids, rows, metadata, kv_cache.unsqueeze(0))

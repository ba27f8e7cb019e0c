"""The bundled checkpoint as a trainable network: Glm4Moe's mathematics with gradients.

The engine's own modules read a paged cache and keep no gradient, so training has this plain twin.
`tests/model/test_bundled.py` checks that both give the same logits. Parameter names follow the
checkpoint, except that a layer's experts are stacked; `export_tensors` splits them.

Shapes: B windows, T positions, N = B*T tokens, H hidden, E experts, I expert width, Hq/Hkv query/KV
heads, D head_dim, V vocabulary, S scored positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class NetworkConfig:
    """Sizes of the bundled model, by the names of config.json; see `specdec.model.config.Glm4MoeConfig`."""

    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 512
    moe_intermediate_size: int = 48
    num_hidden_layers: int = 12
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    n_routed_experts: int = 16
    num_experts_per_tok: int = 2
    rope_theta: float = 10000.0
    partial_rotary_factor: float = 0.5
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 1024

    def hf_config(self) -> dict[str, object]:
        """Returns the content of the checkpoint's config.json."""
        return {
            "architectures": ["Glm4MoeForCausalLM"],
            "model_type": "glm4_moe",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "use_qk_norm": True,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "moe_intermediate_size": self.moe_intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_nextn_predict_layers": 1,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "n_routed_experts": self.n_routed_experts,
            "n_shared_experts": 1,
            "num_experts_per_tok": self.num_experts_per_tok,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 1.0,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": None,
            "partial_rotary_factor": self.partial_rotary_factor,
            "max_position_embeddings": self.max_position_embeddings,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "eos_token_id": [0],
            "pad_token_id": 0,
        }


class _GroupedLinear(torch.autograd.Function):
    """Computes y[rows of e] = x[rows of e] @ weight[e].T, with one matrix product per expert in both directions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bounds: list[int]) -> Tensor:  # x [R, in], weight [E, out, in]
        y = x.new_empty(x.shape[0], weight.shape[1])
        for e, (start, end) in enumerate(pairwise(bounds)):
            torch.mm(x[start:end], weight[e].t(), out=y[start:end])
        ctx.save_for_backward(x, weight)
        ctx.bounds = bounds
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight)
        for e, (start, end) in enumerate(pairwise(ctx.bounds)):
            torch.mm(grad[start:end], weight[e], out=grad_x[start:end])
            torch.mm(grad[start:end].t(), x[start:end], out=grad_weight[e])
        return grad_x, grad_weight, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # x [B, T, heads, D], cos/sin [T, 1, rotary/2]
    half = cos.shape[-1]
    x1, x2, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest], -1)


def _norm_rotate(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    return rotate(rms_norm(x, weight, eps), cos, sin)


def _matrix(*shape: int, std: float) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) * std)


class Norm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Linear(nn.Module):
    """A projection without bias. `write=True`: it writes to the residual stream, and its weights start at zero."""

    def __init__(self, size_in: int, size_out: int, write: bool = False) -> None:
        super().__init__()
        self.weight = _matrix(size_out, size_in, std=0.0 if write else size_in**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Attention(nn.Module):
    def __init__(self, cfg: NetworkConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.dim, self.eps = (
            cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim, cfg.rms_norm_eps,
        )  # fmt: skip
        self.q_proj = Linear(cfg.hidden_size, self.heads * self.dim)
        self.k_proj = Linear(cfg.hidden_size, self.kv_heads * self.dim)
        self.v_proj = Linear(cfg.hidden_size, self.kv_heads * self.dim)
        self.o_proj = Linear(self.heads * self.dim, cfg.hidden_size, write=True)
        self.q_norm, self.k_norm = Norm(self.dim, cfg.rms_norm_eps), Norm(self.dim, cfg.rms_norm_eps)

    def project(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Returns q, k, v [B, Hq, T, D] of x [B, T, H]; keys and values are repeated for their group of queries."""
        b, t, _ = x.shape
        q = _norm_rotate(self.q_proj(x).view(b, t, self.heads, self.dim), self.q_norm.weight, *rope, self.eps)
        k = _norm_rotate(self.k_proj(x).view(b, t, self.kv_heads, self.dim), self.k_norm.weight, *rope, self.eps)
        v = self.v_proj(x).view(b, t, self.kv_heads, self.dim)
        group = self.heads // self.kv_heads
        k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def output(self, attended: Tensor) -> Tensor:  # [B, Hq, T, D] -> [B, T, H]
        b, _, t, _ = attended.shape
        return self.o_proj(attended.transpose(1, 2).reshape(b, t, -1))


class DenseMLP(nn.Module):
    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = Linear(hidden, width), Linear(hidden, width)
        self.down_proj = Linear(width, hidden, write=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Router(Linear):
    e_score_correction_bias: Tensor

    def __init__(self, size_in: int, num_experts: int) -> None:
        super().__init__(size_in, num_experts)
        self.register_buffer("e_score_correction_bias", torch.zeros(num_experts))


class SharedHead(nn.Module):
    """The norm before the head; the head itself is the target's."""

    def __init__(self, cfg: NetworkConfig) -> None:
        super().__init__()
        self.norm = Norm(cfg.hidden_size, cfg.rms_norm_eps)


class MoE(nn.Module):
    """Sigmoid router with a correction bias for the choice only; one unscaled shared expert."""

    load: Tensor

    def __init__(self, cfg: NetworkConfig) -> None:
        super().__init__()
        e, h, i = cfg.n_routed_experts, cfg.hidden_size, cfg.moe_intermediate_size
        self.top_k = cfg.num_experts_per_tok
        self.gate = Router(h, e)
        self.register_buffer("load", torch.zeros(e), persistent=False)  # tokens per expert, last forward passes
        self.gate_up = _matrix(e, 2 * i, h, std=h**-0.5)
        self.down = _matrix(e, h, i, std=0.0)
        self.shared_experts = DenseMLP(h, i)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])  # [N, H]
        scores = torch.sigmoid(self.gate(flat))
        experts = (scores + self.gate.e_score_correction_bias).topk(self.top_k, -1).indices  # [N, k]
        weights = scores.gather(1, experts)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        order = experts.reshape(-1).argsort(stable=True)
        counts = torch.bincount(experts.reshape(-1), minlength=self.load.numel())
        self.load += counts
        bounds = [0, *counts.cumsum(0).tolist()]
        rows = order // self.top_k
        inner = swiglu(_GroupedLinear.apply(flat.index_select(0, rows), self.gate_up, bounds))
        inner = inner * weights.reshape(-1).index_select(0, order).unsqueeze(-1)
        routed = _GroupedLinear.apply(inner, self.down, bounds)
        out = torch.zeros_like(flat).index_add(0, rows, routed)
        return (out + self.shared_experts(flat)).view_as(x)

    @torch.no_grad()
    def balance(self, rate: float) -> None:
        """Nudges the router's bias towards an even load: auxiliary-loss-free balancing (Wang et al. 2024,
        arXiv 2408.15664)."""
        self.gate.e_score_correction_bias += rate * torch.sign(self.load.mean() - self.load)
        self.load.zero_()


class DecoderLayer(nn.Module):
    def __init__(self, cfg: NetworkConfig, dense: bool) -> None:
        super().__init__()
        self.input_layernorm = Norm(cfg.hidden_size, cfg.rms_norm_eps)
        self.post_attention_layernorm = Norm(cfg.hidden_size, cfg.rms_norm_eps)
        self.self_attn = Attention(cfg)
        self.mlp = DenseMLP(cfg.hidden_size, cfg.intermediate_size) if dense else MoE(cfg)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = self.self_attn.project(self.input_layernorm(x), rope)
        return self.after_attention(x, F.scaled_dot_product_attention(q, k, v, is_causal=True))

    def after_attention(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.self_attn.output(attended)
        return x + self.mlp(self.post_attention_layernorm(x))


class MTPLayer(DecoderLayer):
    """The MTP layer, unrolled as it drafts.

    Row p of step j stands for the pair (hidden of p, token p+1) and predicts token p+2. Step 1 has
    the target's hidden states; step j > 1 has, in place of h_p, the output of step j-1 at p-1. Its
    query sees what it would see in decoding: step 1's rows up to p-(j-1), then one row of each later
    step of the same chain.
    """

    def __init__(self, cfg: NetworkConfig) -> None:
        super().__init__(cfg, dense=False)
        self.enorm = Norm(cfg.hidden_size, cfg.rms_norm_eps)
        self.hnorm = Norm(cfg.hidden_size, cfg.rms_norm_eps)
        self.eh_proj = Linear(2 * cfg.hidden_size, cfg.hidden_size)
        self.shared_head = SharedHead(cfg)

    def unroll(self, hidden: Tensor, next_embeds: Tensor, rope: tuple[Tensor, Tensor], steps: int) -> list[Tensor]:
        """Returns one output [B, T, H] for each step, after `shared_head.norm`.

        hidden: [B, T, H], the target's hidden states.
        next_embeds: [B, T, H], the embeddings of the tokens after them.
        rope: cosines and sines.
        steps: how many drafts a chain has.
        """
        embeds = self.enorm(next_embeds)
        keys: list[Tensor] = []
        values: list[Tensor] = []
        outputs: list[Tensor] = []
        for step in range(1, steps + 1):
            previous = hidden if step == 1 else F.pad(outputs[-1], (0, 0, 1, 0))[:, :-1]
            x = self.eh_proj(torch.cat([embeds, self.hnorm(previous)], -1))
            q, k, v = self.self_attn.project(self.input_layernorm(x), rope)
            keys.append(k)
            values.append(v)
            attended = _chain_attention(q, keys, values)
            outputs.append(self.shared_head.norm(self.after_attention(x, attended)))
        return outputs


def _chain_attention(q: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:  # each [B, Hq, T, D]
    step = len(keys)
    if step == 1:
        return F.scaled_dot_product_attention(q, keys[0], values[0], is_causal=True)
    t = q.shape[2]
    q = q * q.shape[-1] ** -0.5
    visible = torch.ones(t, t, dtype=torch.bool).tril(-(step - 1))
    scores = [(q @ keys[0].transpose(-1, -2)).masked_fill(~visible, float("-inf"))]
    lags = [step - m for m in range(2, step + 1)]  # row of step m that belongs to this chain: p - (step - m)
    shifted = [(_shift(keys[step - lag - 1], lag), _shift(values[step - lag - 1], lag)) for lag in lags]
    scores += [(q * k).sum(-1, keepdim=True) for k, _ in shifted]
    probs = torch.cat(scores, -1).softmax(-1)
    out = probs[..., :t] @ values[0]
    for column, (_, v) in enumerate(shifted):
        out = out + probs[..., t + column, None] * v
    return out


def _shift(x: Tensor, lag: int) -> Tensor:
    return x if lag == 0 else F.pad(x, (0, 0, lag, 0))[:, :, :-lag]


class Network(nn.Module):
    """Target and MTP layer together."""

    def __init__(self, cfg: NetworkConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        nn.init.normal_(self.embed_tokens.weight, std=0.3)
        self.layers = nn.ModuleList(DecoderLayer(cfg, dense=i == 0) for i in range(cfg.num_hidden_layers))
        self.norm = Norm(cfg.hidden_size, cfg.rms_norm_eps)
        self.mtp = MTPLayer(cfg)
        self.lm_head = Linear(cfg.hidden_size, cfg.vocab_size, write=True)

    def rope(self, length: int) -> tuple[Tensor, Tensor]:
        rotary = int(self.cfg.head_dim * self.cfg.partial_rotary_factor)
        inv_freq = self.cfg.rope_theta ** (-torch.arange(0, rotary, 2, dtype=torch.float32) / rotary)
        angles = torch.arange(length, dtype=torch.float32)[:, None] * inv_freq
        return angles.cos()[:, None], angles.sin()[:, None]  # [T, 1, rotary/2]

    def forward(self, tokens: Tensor, mtp_steps: int) -> tuple[Tensor, list[Tensor]]:
        """Returns hidden states [B, T, H] (row p predicts token p+1) and the MTP layer's outputs of tokens [B, T+1]."""
        rope = self.rope(tokens.shape[1] - 1)
        embeds = self.embed_tokens(tokens)
        x = embeds[:, :-1]
        for layer in self.layers:
            x = layer(x, rope)
        hidden = self.norm(x)
        return hidden, self.mtp.unroll(hidden, embeds[:, 1:], rope, mtp_steps)

    def moe_layers(self) -> dict[str, MoE]:
        return {name: module for name, module in self.named_modules() if isinstance(module, MoE)}

    def export_tensors(self) -> dict[str, Tensor]:
        """Returns the checkpoint's tensors by GLM-4.5's names, in bf16 (correction biases in fp32)."""
        tensors: dict[str, Tensor] = {}
        for name, value in self.state_dict().items():
            if name.startswith("mtp."):
                name = name.replace("mtp.", f"layers.{self.cfg.num_hidden_layers}.", 1)
            if not name.startswith("lm_head."):
                name = "model." + name
            dtype = torch.float32 if name.endswith("e_score_correction_bias") else torch.bfloat16
            value = value.detach().to(dtype)
            if name.endswith(".mlp.gate_up"):
                prefix = name.removesuffix("gate_up")
                for e, (gate, up) in enumerate(w.chunk(2) for w in value):
                    tensors[f"{prefix}experts.{e}.gate_proj.weight"] = gate.clone()
                    tensors[f"{prefix}experts.{e}.up_proj.weight"] = up.clone()
            elif name.endswith(".mlp.down"):
                for e, down in enumerate(value):
                    tensors[f"{name.removesuffix('down')}experts.{e}.down_proj.weight"] = down.clone()
            else:
                tensors[name] = value.contiguous()
        return tensors

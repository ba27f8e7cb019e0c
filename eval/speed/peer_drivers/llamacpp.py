"""llama.cpp through xllamacpp, its server in-process; drafts by the checkpoint's MTP layer (DRAFT_MTP), any batch.

Needs the packages xllamacpp, gguf and numpy. The checkpoint is converted once per dtype into the work folder.
"""

from __future__ import annotations

import json
import time
from typing import Any
from urllib.request import Request, urlopen

import xllamacpp

from .gguf_file import convert
from .protocol import Answer, Generate, Settings, serve

_JSON = {"Content-Type": "application/json"}


def load(settings: Settings) -> tuple[str, Generate]:
    """Starts the server; returns llama.cpp's version and a function that generates."""
    server = xllamacpp.Server(_params(settings))

    def generate(prompts: list[list[int]], max_tokens: int) -> Answer:
        body = {
            "prompt": prompts,
            "n_predict": max_tokens,
            "temperature": 0.0,
            "cache_prompt": False,
            "return_tokens": True,
        }
        request = Request(f"{server.listening_address}/completion", json.dumps(body).encode(), _JSON)
        start = time.perf_counter()
        with urlopen(request) as response:
            content = response.read()
        return _answer(json.loads(content), time.perf_counter() - start)

    return f"llama.cpp (xllamacpp {xllamacpp.__version__})", generate


def _params(settings: Settings) -> Any:
    params = xllamacpp.CommonParams()
    params.model.path = str(convert(settings))
    params.n_parallel = settings.max_num_seqs
    params.n_ctx = settings.max_model_len * settings.max_num_seqs
    for cpu in (params.cpuparams, params.cpuparams_batch):
        cpu.n_threads = settings.num_threads
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_ENABLED
    params.cache_ram_mib = 0
    params.verbosity = 1
    params.n_gpu_layers = 0
    params.fit_params = False
    if settings.num_speculative_tokens > 0:
        params.speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_MTP]
        draft = params.speculative.draft
        draft.n_max = settings.num_speculative_tokens
        for cpu in (draft.cpuparams, draft.cpuparams_batch):
            cpu.n_threads = settings.num_threads
    return params


def _answer(results: Any, seconds: float) -> Answer:
    """Returns the answer to a request. One prompt's result is an object of its own, several are a list of them."""
    results = [results] if isinstance(results, dict) else sorted(results, key=lambda result: result["index"])
    drafted, accepted = (
        sum(result["timings"].get(name, 0) for result in results) for name in ("draft_n", "draft_n_accepted")
    )
    return Answer(seconds, [result["tokens"] for result in results], drafted, accepted)


if __name__ == "__main__":
    serve(load)

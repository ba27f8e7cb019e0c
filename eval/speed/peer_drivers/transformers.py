"""Drives transformers' generate(); with drafts `use_mtp=True`, which knows K = 1 and one prompt at a time.

The MTP layer, which generate() reads from the checkpoint at every call, is kept between calls.
"""

from __future__ import annotations

import time
from typing import Any
from unittest.mock import patch

import torch
import transformers
from transformers.generation import utils
from transformers.generation.candidate_generator import MTPCandidateGenerator
from transformers.modeling_layers import MtpModel

from .protocol import Answer, Generate, Settings, serve


class CountingGenerator(MTPCandidateGenerator):
    """Counts, over all calls, what is proposed and what is accepted; a draft beyond max_tokens is not."""

    num_draft_tokens = num_accepted_tokens = 0

    def get_candidates(self, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        candidates, logits = super().get_candidates(input_ids, *args, **kwargs)
        CountingGenerator.num_draft_tokens += candidates.shape[1] - input_ids.shape[1]
        return candidates, logits

    def update_candidate_strategy(self, input_ids: Any, scores: Any, num_matches: Any) -> None:
        CountingGenerator.num_accepted_tokens += int(num_matches)
        super().update_candidate_strategy(input_ids, scores, num_matches)


def load(settings: Settings) -> tuple[str, Generate]:
    """Loads the model; returns transformers' version and a function that generates."""
    torch.set_num_threads(settings.num_threads)
    config = transformers.AutoConfig.from_pretrained(settings.checkpoint)
    model_class = transformers.Glm4MoeForCausalLM
    # which tensors are the MTP layer's, known to transformers for the layer numbers of GLM-4.5 and Air only
    model_class._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{config.num_hidden_layers}\."]
    model = model_class.from_pretrained(settings.checkpoint, dtype=getattr(torch, settings.dtype)).eval()
    use_mtp = settings.num_speculative_tokens > 0
    model.generation_config = transformers.GenerationConfig(do_sample=False, pad_token_id=0, use_mtp=use_mtp)
    if use_mtp:
        mtp_model = MtpModel.from_pretrained(model, device_map={"": "cpu"})
        patch.object(MtpModel, "from_pretrained", lambda *args, **kwargs: mtp_model).start()
        patch.object(utils, "MTPCandidateGenerator", CountingGenerator).start()

    def generate(prompts: list[list[int]], max_tokens: int) -> Answer:
        drafted, accepted = CountingGenerator.num_draft_tokens, CountingGenerator.num_accepted_tokens
        input_ids, mask = _left_padded(prompts)
        start = time.perf_counter()
        output = model.generate(input_ids, attention_mask=mask, max_new_tokens=max_tokens)
        seconds = time.perf_counter() - start
        token_ids = output[:, input_ids.shape[1] :].tolist()
        drafted = CountingGenerator.num_draft_tokens - drafted
        accepted = CountingGenerator.num_accepted_tokens - accepted
        return Answer(seconds, token_ids, drafted, accepted)

    return f"transformers {transformers.__version__} (torch {torch.__version__})", generate


def _left_padded(prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns token ids and attention mask, [B, longest prompt]."""
    length = max(len(prompt) for prompt in prompts)
    input_ids = torch.tensor([[0] * (length - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return input_ids, mask


if __name__ == "__main__":
    serve(load)

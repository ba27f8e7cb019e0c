"""Measures the figures of the bundled checkpoint's card, on modules that no training step saw.

    python -m specdec.eval.dev.held_out [--model bundled] [--json FILE]

Bits per byte and expert load over all held-out documents (teacher-forced, windows of the context length), and
`specdec eval acceptance` from all `stdlib` prompts with K = 3 and token rejection. What training measured on windows of
its own is measured once more here, by the engine. Run it with the Python whose standard library the checkpoint was
trained on: the documents are read from there.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from specdec import Engine
from specdec.eval.acceptance.plan import AcceptanceOptions
from specdec.eval.acceptance.run import run_acceptance
from specdec.eval.acceptance.summary import failed_checks
from specdec.inspection.checkpoint import teacher_forced
from specdec.kernels.reference import lowest_argmax
from specdec.model.bundled.corpus import Document, load_documents
from specdec.model.bundled.train import encode
from specdec.model.config import Glm4MoeConfig

NUM_DRAFT_TOKENS, MAX_TOKENS = 3, 128
NUM_WINDOWS, WINDOW = 32, 512  # as in the training's own evaluation


@dataclass(frozen=True)
class TextFigures:
    """Figures of the whole held-out text."""

    num_documents: int
    """Documents."""
    num_tokens: int
    """Tokens that were scored."""
    num_bytes: int
    """Bytes of the text."""
    nats_per_token: float
    """Cross-entropy of the target."""
    bits_per_byte: float
    """The same in bits, per byte of text."""
    draft_agreement: float
    """How often the MTP layer's first draft is the target's greedy choice."""
    expert_load: dict[str, list[float]]
    """Each expert's share of a layer's routed tokens, times the number of experts (1 = even), by layer."""


@dataclass(frozen=True)
class WindowFigures:
    """Figures of the windows that training evaluates."""

    num_windows: int
    """Windows."""
    length: int
    """Tokens of a window."""
    nats_per_token: float
    """Cross-entropy of the target."""
    draft_agreement: float
    """How often the MTP layer's first draft is the target's greedy choice."""


class ExpertCounter:
    """Counts the experts that every layer of target and MTP layer chooses, while the context is entered."""

    def __init__(self, engine: Engine) -> None:
        model = engine.runtime.model
        assert model.mtp is not None
        num_layers = model.config.num_hidden_layers
        self.decoders = {
            model.target.decoder: [f"layer {i}" for i in range(num_layers)],
            model.mtp.decoder: ["MTP layer"],
        }
        self.num_experts = model.config.n_routed_experts
        self.counts: dict[str, Tensor] = {}

    def __enter__(self) -> ExpertCounter:
        self._stack = ExitStack()
        self._runs = [self._stack.enter_context(decoder.traced()) for decoder in self.decoders]
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        for names, runs in zip(self.decoders.values(), self._runs):
            chosen = torch.cat([run.expert_ids for run in runs], 1)  # [layers, T, k]
            for name, ids in zip(names, chosen, strict=True):
                if (ids >= 0).all():
                    self.counts[name] = torch.bincount(ids.flatten(), minlength=self.num_experts)

    def load(self) -> dict[str, list[float]]:
        """Returns each expert's share of a layer's routed tokens, times the number of experts, by layer."""
        return {name: (c / c.sum() * len(c)).tolist() for name, c in self.counts.items()}


def documents_of(engine: Engine) -> list[Document]:
    """Returns the held-out documents that the checkpoint lists, from this interpreter's standard library. Raises
    SystemExit where one is missing."""
    listed = json.loads((engine.checkpoint.folder / "held_out.json").read_text(encoding="utf-8"))
    found = {d.name: d for d in load_documents() if d.held_out}
    if missing := [name for name in listed if name not in found]:
        raise SystemExit(
            f"this Python ({sys.version.split()[0]}) lacks {len(missing)} held-out modules, e.g. {missing[0]}"
        )
    return [found[name] for name in listed]


@torch.inference_mode()
def measure_text(engine: Engine, documents: list[Document]) -> TextFigures:
    """Scores every token of every document, with up to a context's length of tokens before it."""
    start_token = min(engine.checkpoint.eos_token_ids)  # documents follow the end of another in training
    nats, num_tokens, agreed, num_drafts = 0.0, 0, 0, 0
    with ExpertCounter(engine) as counter:
        for document in documents:
            token_ids = [start_token, *engine.tokenizer.encode(document.text)]
            for start in range(0, len(token_ids) - 1, engine.max_model_len):
                window = token_ids[start : start + engine.max_model_len + 1]
                window_nats, window_agreed = _score_window(engine, window)
                nats, agreed = nats + window_nats, agreed + window_agreed
                num_tokens, num_drafts = num_tokens + len(window) - 1, num_drafts + len(window) - 2
    num_bytes = sum(len(d.text.encode()) for d in documents)
    return TextFigures(
        num_documents=len(documents),
        num_tokens=num_tokens,
        num_bytes=num_bytes,
        nats_per_token=nats / num_tokens,
        bits_per_byte=nats / math.log(2) / num_bytes,
        draft_agreement=agreed / num_drafts,
        expert_load=counter.load(),
    )


def _score_window(engine: Engine, window: list[int]) -> tuple[float, int]:
    """Returns the nats of all tokens after the first, and how many first drafts equal the target's choice."""
    scored = torch.tensor(window[1:])
    if len(window) == 2:  # a single row has no pair to draft from
        logits = teacher_forced(engine.runtime, window)[0][:1]
        return cross_entropy(logits, scored, reduction="sum").item(), 0
    logits, draft_logits = teacher_forced(engine.runtime, window[:-1])
    nats = cross_entropy(logits, scored, reduction="sum").item()
    return nats, int((lowest_argmax(draft_logits) == lowest_argmax(logits[1:])).sum())


@torch.inference_mode()
def measure_windows(engine: Engine, documents: list[Document]) -> WindowFigures:
    """Scores the windows of `specdec.model.bundled.train.evaluate`, at the positions that it compares."""
    tokens = encode(engine.checkpoint.folder / "tokenizer.json", documents).tolist()
    stride = (len(tokens) - WINDOW - 1) // NUM_WINDOWS
    nats, agreed = 0.0, 0.0
    for start in range(0, NUM_WINDOWS * stride, stride):
        window = tokens[start : start + WINDOW + 1]
        logits, draft_logits = teacher_forced(engine.runtime, window[:-1])
        nats += cross_entropy(logits, torch.tensor(window[1:])).item() / NUM_WINDOWS
        same = lowest_argmax(draft_logits[2:]) == lowest_argmax(logits[3:])
        agreed += same.double().mean().item() / NUM_WINDOWS
    return WindowFigures(NUM_WINDOWS, WINDOW, nats, agreed)


def measure_acceptance(model: str) -> list[dict[str, Any]]:
    """Returns the cells with drafts, as in results.json. Raises SystemExit where a check fails."""
    options = AcceptanceOptions(
        model=model, num_prompts=None, num_speculative_tokens=(NUM_DRAFT_TOKENS,), temperatures=(0.0, 1.0),
        verification=("token",), batch_sizes=(32,), max_tokens=MAX_TOKENS,
    )  # fmt: skip
    with TemporaryDirectory() as folder:
        document = run_acceptance(options, Path(folder) / "acceptance")
    if failed := failed_checks(document):
        raise SystemExit(f"acceptance is not what the model's distributions say: {failed}")
    return [cell for cell in document["cells"] if cell["num_speculative_tokens"] > 0]


def markdown(text: TextFigures, windows: WindowFigures, cells: list[dict[str, Any]], config: Glm4MoeConfig) -> str:
    """Returns all figures as Markdown tables."""
    where = f"{windows.num_windows} windows of {windows.length} tokens"
    lines = [
        "| held-out text | |",
        "|---|---|",
        f"| documents, tokens, bytes | {text.num_documents}, {text.num_tokens:,}, {text.num_bytes:,} |",
        f"| bits per byte | {text.bits_per_byte:.3f} |",
        f"| nats per token ({text.num_bytes / text.num_tokens:.2f} bytes) | {text.nats_per_token:.3f} |",
        f"| first draft = target's greedy choice, on this text | {text.draft_agreement:.3f} |",
        f"| the same two on training's {where} | {windows.nats_per_token:.3f}, {windows.draft_agreement:.3f} |",
        "",
        f"| acceptance, K = {NUM_DRAFT_TOKENS}, {cells[0]['num_requests']} prompts x {MAX_TOKENS} tokens "
        "| draft 1 | draft 2 | draft 3 | mean acceptance length |",
        "|---|---|---|---|---|",
    ]
    for cell in sorted(cells, key=lambda cell: -cell["temperature"]):  # greedy text repeats itself: it comes last
        name = "greedy" if cell["temperature"] == 0 else f"temperature {cell['temperature']:g}"
        group = cell["all"]
        figures = [_figure(e, 3) for e in group["conditional"]] + [_figure(group["mean_acceptance_length"], 2)]
        lines.append(f"| conditional, {name} | {' | '.join(figures)} |")
    lines += ["", f"| expert load ({config.n_routed_experts} experts, 1 = even) | least | most |", "|---|---|---|"]
    lines += [f"| {name} | {min(load):.2f} | {max(load):.2f} |" for name, load in text.expert_load.items()]
    return "\n".join(lines)


def _figure(estimate: dict[str, float], digits: int) -> str:
    """Returns an estimate as text, with its 95 % interval."""
    value, low, high = (f"{estimate[name]:.{digits}f}" for name in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    args = parser.parse_args()
    engine = Engine.from_pretrained(args.model, max_num_seqs=1)
    documents = documents_of(engine)
    text, windows, cells = (
        measure_text(engine, documents),
        measure_windows(engine, documents),
        measure_acceptance(args.model),
    )
    print(markdown(text, windows, cells, engine.checkpoint.config))
    if args.json is not None:
        document = {"text": asdict(text), "windows": asdict(windows), "acceptance": cells}
        args.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

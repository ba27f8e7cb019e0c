"""`specdec eval predict`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from specdec.cli.common import AsJson, as_numbers, option_errors, tables, user_errors


def predict(
    config: Annotated[
        str,
        typer.Option(
            help="glm-4.5, glm-4.5-air, glm-4.6, glm-4.7, deepseek-v3, bundled, or a folder with a config.json.",
            show_default=False,
        ),
    ],
    gpu: Annotated[str, typer.Option(help="h100, h200, b200, gb200 or rtx3090.", show_default=False)],
    acceptance: Annotated[
        str,
        typer.Option(
            help="A results.json or its folder, or unconditional acceptance by draft position, as in 0.85,0.7; "
            "conditional:0.85,0.8 gives conditional ones.",
            show_default=False,
        ),
    ],
    num_gpus: Annotated[int, typer.Option(help="Each holds a share of every matrix.")] = 1,
    dtype: Annotated[str, typer.Option(help="fp8 or bf16.")] = "fp8",
    batch_size: Annotated[
        str | None, typer.Option(help="Requests at once.", show_default="powers of two that fit")
    ] = None,
    draft_lengths: Annotated[
        str | None,
        typer.Option(
            "--num-speculative-tokens", "-k", help="0..4 or 0,1,3.", show_default="0 to the positions that are known"
        ),
    ] = None,
    context_length: Annotated[int, typer.Option(help="Tokens of every sequence.")] = 2048,
    temperature: Annotated[
        float | None, typer.Option(help="Which cells of a results.json.", show_default=False)
    ] = None,
    verification: Annotated[str | None, typer.Option(help="Which cells.", show_default=False)] = None,
    draft_sampling: Annotated[str | None, typer.Option(help="Which cells.", show_default=False)] = None,
    as_json: AsJson = False,
) -> None:
    """Predict tokens/s and the best draft length on hardware that is not at hand, with all assumptions."""
    with user_errors():
        from specdec.eval.prediction import PredictOptions, parse_acceptance, validate
        from specdec.eval.prediction import predict as compute
        from specdec.eval.prediction.predict import parse_draft_lengths
        from specdec.eval.prediction.report import as_json as prediction_as_json
        from specdec.eval.prediction.report import print_report

        batch_sizes = None if batch_size is None else as_numbers("--batch-size", batch_size, int)
        with option_errors():
            rates = parse_acceptance(acceptance, temperature, verification, draft_sampling)
            lengths = None if draft_lengths is None else parse_draft_lengths(draft_lengths)
            options = PredictOptions(config, gpu, num_gpus, dtype, rates, batch_sizes, lengths, context_length)
        prediction, validation = compute(options), validate()
        if as_json:
            print(json.dumps(prediction_as_json(prediction, validation), indent=2))
        else:
            print_report(prediction, validation, tables())

"""Writes a `Certificate` as a summary for people and as JSON for machines."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from specdec.eval.files import finite, write_whole
from specdec.eval.lossless.certificate import NUM_ITERATIONS, POWER, Certificate, Comparison, Detectable

SCHEMA = 1


def as_json(certificate: Certificate) -> dict[str, Any]:
    """Returns the fields of a `Certificate` with its verdict as strict JSON, version `SCHEMA`. A log10_e of null is
    infinite."""
    document = {"schema": SCHEMA, "passed": certificate.passed, **asdict(certificate)}
    cleaned: dict[str, Any] = finite(document)
    return cleaned


def write_json(certificate: Certificate, path: Path) -> None:
    """Writes a certificate as JSON, complete or not at all."""
    write_whole(path, json.dumps(as_json(certificate), indent=2) + "\n")


def print_certificate(certificate: Certificate, out: Console) -> None:
    """Prints a certificate as a summary."""
    for key, value in certificate.provenance.items():
        out.print(f"{key}: {value}", markup=False, soft_wrap=True)
    out.print(_rules_table(certificate))
    s = certificate.sampling
    out.print(
        f"{s.num_tests} tests, alpha {certificate.options.alpha:g} over all of them: an e-process fails at log10 E >= "
        f"{s.log10_e_limit:.2f}, a G-test at p <= {s.p_limit:.2g}. The table has the largest E and the least p of each "
        "rule, tokens per iteration (length), and the smallest shift of the distribution, in total variation, that "
        f"would have been found with {POWER:.0%} power.",
        soft_wrap=True,
    )
    for r in s.rules:
        out.print(
            f"{r.rule}: {r.tokens:,} tokens in {r.contexts:,} contexts, {r.repeated_contexts:,} of them visited more "
            "than once, "
            f"{r.rounded_contexts:,} left out for rounding; {r.together.pooled_positions:,} tokens pooled; "
            f"{r.few_iterations:,} samples had fewer than {NUM_ITERATIONS} iterations with drafts; "
            f"at the context visited most ({r.context_visits:,} times), a shift of {_shift(r.context_shift)}",
            soft_wrap=True,
            markup=False,
        )
    _print_comparison("greedy", certificate.greedy, out)
    if certificate.coupled is not None:
        _print_comparison("coupled", certificate.coupled, out)
    for failure in certificate.failures:
        out.print(f"FAILED, {failure.part}: {failure.message}", style="red", soft_wrap=True, markup=False)
        out.print(f"  reproduce: {json.dumps(finite(failure.reproduce))}", style="dim", soft_wrap=True, markup=False)
    if certificate.passed:
        verdict = f"lossless at alpha {certificate.options.alpha:g}: no test failed"
    else:
        verdict = f"NOT lossless: {len(certificate.failures)} failures"
    out.print(f"{verdict} ({certificate.seconds:.0f} s)", style="bold green" if certificate.passed else "bold red")


def _rules_table(certificate: Certificate) -> Table:
    k = certificate.options.num_speculative_tokens
    title = f"Sampling, K = {k}, {len(certificate.combinations)} parameter combinations"
    table = Table(title=title, title_justify="left")
    for name in ("rule", "samples", "iterations", "length", "log10 E", "least p", "shift"):
        table.add_column(name, justify="left" if name == "rule" else "right")
    for r in certificate.sampling.rules:
        table.add_row(
            r.rule,
            f"{r.samples:,}",
            f"{r.iterations:,}",
            "" if r.mean_acceptance_length is None else f"{r.mean_acceptance_length:.2f}",
            f"{r.worst.log10_e:.2f}",
            f"{r.smallest_p:.2g}",
            _shift(r.together.pooled_shift),
        )
    return table


def _shift(detectable: Detectable) -> str:
    """Returns the larger shift of both directions as text."""
    values = (detectable.from_top, detectable.to_top)
    found = [v for v in values if v is not None]
    return "none" if len(found) < len(values) else f"{max(found):.2g}"


def _print_comparison(name: str, c: Comparison, out: Console) -> None:
    lengths = f"K {c.draft_lengths[0]} to {c.draft_lengths[-1]}, batches of {', '.join(map(str, c.batch_sizes))}"
    length = "" if c.mean_acceptance_length is None else f", accepted length {c.mean_acceptance_length:.2f}"
    differences = f"{c.different} different from plain decoding alone"
    if c.different:
        differences += f", {c.unexplained} of them unexplained (largest margin {c.largest_margin:.2g} of the logits"
        differences += f", up to {c.tie:g} is rounding)"
    text = f"{name}: {c.outputs:,} outputs of {c.cases} requests, {c.tokens:,} tokens, {lengths}{length}: {differences}"
    out.print(text, soft_wrap=True, markup=False)

"""Statistics as Prometheus reads them: the text exposition format, version 0.0.4.

Names, buckets and labels are vLLM's where a metric means the same there; specdec's own begin with `specdec:`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from specdec.metrics.engine import EngineStats
from specdec.request.stats import Histogram

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def render(stats: EngineStats, model_name: str | None = None) -> str:
    """Returns the text that a Prometheus server reads.

    stats: from `Engine.stats` or `AsyncEngine.stats`.
    model_name: the value of the label of this name, which vLLM's metrics have; None leaves the label out.
    """
    labels = {} if model_name is None else {"model_name": model_name}
    return "".join(f"{line}\n" for line in _lines(stats, labels))


def _lines(stats: EngineStats, labels: Mapping[str, str]) -> Iterator[str]:
    for kind, samples in (("gauge", _gauges(stats)), ("counter", _counters(stats))):
        for name, meaning, value in samples:
            yield from _family(name, kind, meaning)
            yield _sample(name, labels, value)
    for name, meaning, label, values in _labelled_counters(stats):
        yield from _family(name, "counter", meaning)
        for key, value in values.items():
            yield _sample(name, {**labels, label: str(key)}, value)
    for name, meaning, histogram in _histograms(stats):
        yield from _family(name, "histogram", meaning)
        yield from _buckets(name, labels, histogram)


def _gauges(stats: EngineStats) -> list[tuple[str, str, float]]:
    usage = stats.num_used_pages / stats.num_pages
    gauges: list[tuple[str, str, float]] = [
        ("vllm:num_requests_running", "Requests that take part in steps.", stats.num_running),
        ("vllm:num_requests_waiting", "Requests that wait to be run.", stats.num_waiting),
        ("vllm:kv_cache_usage_perc", "Part of the KV cache's pages in use, 0 to 1.", usage),
        ("specdec:kv_cache_pages", "Pages of the KV cache.", stats.num_pages),
        ("specdec:kv_cache_used_pages", "Pages of the KV cache in use.", stats.num_used_pages),
    ]  # fmt: skip
    if stats.saved_s is not None:
        meaning = "Seconds that speculation saved against the estimate for plain decoding; below 0 it cost them."
        gauges.append(("specdec:speculation_saved_seconds", meaning, stats.saved_s))
    error = None if stats.draft_length is None else stats.draft_length.times.median_relative_error
    if error is not None:
        gauges.append(("specdec:step_time_error_ratio", "Of predicted step times, the median of the last ones.", error))
    return gauges


def _counters(stats: EngineStats) -> list[tuple[str, str, float]]:
    drafts = stats.drafts
    counters: list[tuple[str, str, float]] = [
        ("vllm:prompt_tokens_total", "Prompt tokens of requests whose first token is there.", stats.num_prompt_tokens),
        ("vllm:generation_tokens_total", "Generated tokens.", stats.num_output_tokens),
        ("vllm:num_preemptions_total", "Times that ended requests had lost their pages.", stats.num_preemptions),
        ("vllm:prefix_cache_queries_total", "Prompt tokens looked up in the prefix cache.", stats.num_prefix_queries),
        ("vllm:prefix_cache_hits_total", "Prompt tokens that the prefix cache had.", stats.num_prefix_hits),
        ("vllm:spec_decode_num_drafts_total", "Verifications of at least one draft token.", drafts.num_drafts),
        ("vllm:spec_decode_num_draft_tokens_total", "Draft tokens verified.", drafts.num_draft_tokens),
        ("vllm:spec_decode_num_accepted_tokens_total", "Draft tokens accepted.", drafts.num_accepted_tokens),
        ("specdec:requests_total", "Requests accepted.", stats.num_requests),
        ("specdec:requests_rejected_total", "Requests refused because the queue was full.", stats.num_rejected),
        ("specdec:steps_total", "Engine steps.", stats.num_steps),
        ("specdec:steps_failed_total", "Engine steps in which a stage failed.", stats.num_failed_steps),
        ("specdec:step_seconds_total", "Seconds spent in steps.", stats.steps_s),
        ("specdec:target_forwards_total", "Decisions: a target forward, for one request.", drafts.num_target_forwards),
    ]  # fmt: skip
    if stats.compared_s:
        counters += [
            ("specdec:speculation_measured_seconds_total", "Steps that have an estimate, measured.", stats.compared_s),
            ("specdec:speculation_plain_seconds_total", "The same without speculation, estimated.", stats.plain_s),
        ]  # fmt: skip
    return counters


def _labelled_counters(stats: EngineStats) -> list[tuple[str, str, str, Mapping[str, int] | dict[int, int]]]:
    drafts = stats.drafts
    reasons: dict[str, int] = {str(reason): count for reason, count in stats.finished.items()}
    return [
        ("vllm:request_success_total", "Ended requests.", "finished_reason", reasons),
        (
            "vllm:spec_decode_num_accepted_tokens_per_pos_total",
            "Draft tokens accepted, by draft position.",
            "position",
            dict(enumerate(drafts.accepted_per_position)),
        ),
        (
            "specdec:spec_decode_num_draft_tokens_per_pos_total",
            "Draft tokens verified, by draft position.",
            "position",
            dict(enumerate(drafts.drafted_per_position)),
        ),
        (
            "specdec:spec_decode_num_reached_tokens_per_pos_total",
            "Draft tokens verified after accepted ones only, by draft position.",
            "position",
            dict(enumerate(drafts.reached_per_position)),
        ),
        (
            "specdec:draft_length_total",
            "Sequences for which a step's draft length was chosen, by length.",
            "length",
            {} if stats.draft_length is None else dict(enumerate(stats.draft_length.chosen)),
        ),
    ]


def _histograms(stats: EngineStats) -> list[tuple[str, str, Histogram]]:
    return [
        ("vllm:time_to_first_token_seconds", "Arrival to first token.", stats.first_token),
        ("vllm:inter_token_latency_seconds", "Between a request's outputs, of several tokens each.", stats.inter_token),
        ("vllm:request_time_per_output_token_seconds", "Per token after the first.", stats.time_per_output_token),
        ("vllm:e2e_request_latency_seconds", "Arrival to last token.", stats.latency),
        ("vllm:request_queue_time_seconds", "Arrival to the first step.", stats.queue),
        ("vllm:request_prefill_time_seconds", "First step to first token.", stats.prefill),
        ("vllm:request_decode_time_seconds", "First token to last token.", stats.decode),
        ("vllm:iteration_tokens_total", "Prompt rows computed and tokens generated per step.", stats.step_tokens),
    ]


def _family(name: str, kind: str, meaning: str) -> Iterator[str]:
    yield f"# HELP {name} {meaning}"
    yield f"# TYPE {name} {kind}"


def _buckets(name: str, labels: Mapping[str, str], histogram: Histogram) -> Iterator[str]:
    total = 0
    for bound, count in zip((*histogram.bounds, math.inf), histogram.counts, strict=True):
        total += count
        yield _sample(f"{name}_bucket", {**labels, "le": _number(float(bound))}, total)
    yield _sample(f"{name}_sum", labels, histogram.sum)
    yield _sample(f"{name}_count", labels, total)


def _sample(name: str, labels: Mapping[str, str], value: float) -> str:
    pairs = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
    return f"{name}{{{pairs}}} {_number(value)}" if pairs else f"{name} {_number(value)}"


def _number(value: float) -> str:
    """Returns a count as an integer, a bound as prometheus_client writes it ("1.0", "+Inf")."""
    return str(value) if isinstance(value, int) else "+Inf" if value == math.inf else repr(float(value))


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')

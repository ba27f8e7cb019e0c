"""The sampling part: outputs at temperature > 0 follow the target's distribution."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from specdec.cache.pages import page_bytes
from specdec.eval.lossless.certificate import (
    MAX_EXAMPLES,
    NUM_ITERATIONS,
    Failure,
    GroupResult,
    GTest,
    Ints,
    RuleResult,
    Sampling,
)
from specdec.eval.lossless.contexts import Level, build_levels, visit_contexts
from specdec.eval.lossless.evidence import (
    CONCENTRATIONS,
    PooledProcess,
    cell_probs,
    context_detectable,
    context_terms,
    g_test,
    log_mixture,
    pooled_detectable,
    token_terms,
)
from specdec.eval.lossless.law import PlainTarget, edited_logits, truncated_probs
from specdec.eval.lossless.plan import Plan
from specdec.kernels.progress import Progress

G_TESTS_PER_GROUP, G_TEST_VISITS = 4, 50
BATCH_ELEMENTS = 2**22  # logits at once
KV_BYTES = 2**28


@dataclass
class Samples:
    """Outputs of one rule."""

    rule: str
    """The rule."""
    tokens: NDArray[np.int32]
    """[n, L]: the outputs, -1 after their ends."""
    iterations: int = 0
    """Verifications of drafts."""
    accepted: int = 0
    """Drafts accepted."""
    few_iterations: int = 0
    """Outputs with fewer than `NUM_ITERATIONS` verifications of drafts."""


def draw_samples(plan: Plan, rule: str, progress: Progress) -> Samples:
    """Draws the samples of one rule through the engine."""
    options = plan.options
    templates = [
        replace(c.params, speculation=c.speculation(rule, options.num_speculative_tokens)) for c in plan.combinations
    ]
    samples = Samples(rule, np.full((options.samples, plan.longest), -1, np.int32))
    block = 8 * plan.engine.config.max_num_seqs
    for start in range(0, options.samples, block):
        progress(f"sampling, {rule}", start, options.samples)
        chosen = range(start, min(start + block, options.samples))
        requests = [plan.request(i) for i in chosen]
        outputs = plan.engine.generate(
            [plan.prompts[p] for _, p in requests],
            [replace(templates[c], seed=plan.seed(rule, i)) for i, (c, _) in zip(chosen, requests)],
        )
        for i, output in zip(chosen, outputs):
            samples.tokens[i, : len(output.token_ids)] = output.token_ids
            samples.iterations += output.stats.num_drafts
            samples.accepted += output.stats.num_accepted_tokens
            samples.few_iterations += output.stats.num_drafts < NUM_ITERATIONS
    return samples


@dataclass
class Accounts:
    """What the walk over all contexts adds up, by group g = combination * number of rules + rule."""

    num_groups: int
    """Number of groups."""
    log_e: Tensor = field(init=False)
    """[groups, concentrations] fp64: logarithms of the e-processes over contexts."""
    pooled: list[PooledProcess] = field(init=False)
    """[groups]: the pooled e-processes."""
    rounded: Ints = field(init=False)
    """[groups]: contexts left out because rounding decides their distribution."""
    impossible: Ints = field(init=False)
    """[groups]: tokens that are impossible."""
    watched: dict[tuple[int, int], list[tuple[int, int]]] = field(default_factory=dict)
    """(node, group) of each G-test, by (prompt, depth)."""
    laws: dict[int, list[tuple[int, list[int], Tensor, Tensor]]] = field(init=False)
    """What each G-test needs, by group: prompt, output tokens, the distribution p [V] and the counts [V]."""
    examples: list[tuple[int, int, list[int], int]] = field(default_factory=list)
    """Some impossible tokens, as (group, prompt, output tokens before, token)."""

    def __post_init__(self) -> None:
        self.log_e = torch.zeros(self.num_groups, len(CONCENTRATIONS), dtype=torch.float64)
        self.pooled = [PooledProcess() for _ in range(self.num_groups)]
        self.rounded, self.impossible = np.zeros((2, self.num_groups), np.int64)
        self.laws = {group: [] for group in range(self.num_groups)}


def watch(levels: list[list[Level]], accounts: Accounts) -> None:
    """Chooses the contexts of the G-tests: those that most samples of a group visit, after a first token."""
    candidates: list[list[tuple[int, int, int, int]]] = [[] for _ in range(accounts.num_groups)]
    for prompt, of_prompt in enumerate(levels):
        for depth, level in enumerate(of_prompt[1:], 1):
            node, group, visits = level.visits()
            for g in range(accounts.num_groups):
                ours = np.flatnonzero((group == g) & (visits >= G_TEST_VISITS))
                most = ours[np.argsort(-visits[ours], kind="stable")[:G_TESTS_PER_GROUP]]
                candidates[g] += [(-int(visits[i]), prompt, depth, int(node[i])) for i in most]
    for g, found in enumerate(candidates):
        for _, prompt, depth, context in sorted(found)[:G_TESTS_PER_GROUP]:
            accounts.watched.setdefault((prompt, depth), []).append((context, g))


def account(
    plan: Plan, prompt: int, level: Level, depth: int, first: int, logits: Tensor, outputs: Tensor, accounts: Accounts
) -> None:
    """Adds R contexts of a level to the accounts.

    plan: what the parts share.
    prompt: number of the prompt.
    level, depth: the level, and its number of output tokens.
    first: number of the first of the contexts.
    logits: [R, V], the target's after each context.
    outputs: [R, depth], the contexts' output tokens.
    accounts: what is added to.
    """
    # Three numberings meet here: entries of the level (visits), contexts from `first` on, and `rows`, those of these
    # contexts that a combination visits. `row` says for each entry which row it belongs to.
    num_rules = len(plan.options.rules)
    here = slice(*np.searchsorted(level.node, [first, first + len(logits)]).tolist())
    combination = level.group[here] // num_rules
    for c in np.unique(combination).tolist():
        # 1) The exact distributions of the contexts that this combination visits.
        ours = np.flatnonzero(combination == c) + here.start
        rows, row = np.unique(level.node[ours] - first, return_inverse=True)
        params = plan.combinations[c].params
        z = edited_logits(logits[rows], plan.prompts[prompt], outputs[rows], params)
        p, rounded = truncated_probs(z, params)
        # 2) The e-process over contexts, its share of tokens. Where rounding decides, only tokens count that are
        # impossible whatever rounding does.
        group, token = level.group[ours], torch.from_numpy(level.next_token[ours])
        count, at = torch.from_numpy(level.count[ours]), torch.from_numpy(row)
        p_token = p[at, token]
        outside = ((p_token == 0) & ~rounded[at]) | (z[at, token] == -math.inf)
        terms = token_terms(p_token, count).masked_fill(rounded[at][:, None], 0).masked_fill(outside[:, None], math.inf)
        accounts.log_e.index_add_(0, torch.from_numpy(group), terms)
        for i in outside.nonzero()[:, 0].tolist():
            accounts.impossible[group[i]] += int(count[i])
            if len(accounts.examples) < MAX_EXAMPLES:
                accounts.examples.append((int(group[i]), prompt, outputs[rows[row[i]]].tolist(), int(token[i])))
        # 3) Its share of contexts, group by group.
        for g in np.unique(group).tolist():
            of_group = torch.from_numpy(np.flatnonzero(group == g))
            visits = torch.bincount(at[of_group], count[of_group].double(), minlength=len(rows))
            accounts.rounded[g] += int((rounded & (visits > 0)).sum())
            usable = (visits > 0) & ~rounded
            accounts.log_e[g] += context_terms(visits[usable]).sum(0)
        # 4) The pooled e-process, and the contexts that G-tests watch.
        usable_entries = ~rounded[at] & (torch.from_numpy(level.pooled[ours]) > 0) & ~outside
        _account_pooled(p, at[usable_entries], token[usable_entries], level, ours[usable_entries.numpy()], accounts)
        for context, g in accounts.watched.get((prompt, depth), ()):
            i = int(np.searchsorted(rows, context - first))
            if g // num_rules == c and i < len(rows) and rows[i] == context - first and not rounded[i]:
                entries = torch.from_numpy(np.flatnonzero((group == g) & (row == i)))
                counts = torch.zeros(p.shape[1], dtype=torch.int64)
                counts[token[entries]] = count[entries]
                accounts.laws[g].append((prompt, outputs[rows[i]].tolist(), p[i].clone(), counts))


def _account_pooled(p: Tensor, at: Tensor, token: Tensor, level: Level, entries: Ints, accounts: Accounts) -> None:
    """Adds tokens to the pooled e-processes.

    p: [R, V], distributions.
    at: [m], the row of p under which each entry's token was emitted.
    token: [m], the tokens.
    level, entries: [m], where group and number of the tokens are.
    accounts: what is added to.
    """
    if len(entries) == 0:
        return
    probs, limits = cell_probs(p)
    cells = (p[at, token][:, None] < limits[at]).sum(1)
    group, count = torch.from_numpy(level.group[entries]), torch.from_numpy(level.pooled[entries]).double()
    for g in group.unique().tolist():
        ours = group == g
        visits = torch.bincount(at[ours], count[ours], minlength=len(p))
        accounts.pooled[g].add_laws(probs[visits > 0], visits[visits > 0])
        accounts.pooled[g].add_cells(cells[ours], count[ours])


def certify_sampling(plan: Plan, progress: Progress) -> tuple[Sampling, list[Failure]]:
    """Draws samples of every rule and tests them against the target's distribution."""
    # 1) Samples of all rules, and the contexts that they visited.
    options, num_combinations, num_rules = plan.options, len(plan.combinations), len(plan.options.rules)
    samples = [draw_samples(plan, rule, progress) for rule in options.rules]
    accounts = Accounts(num_combinations * num_rules)
    number = np.arange(options.samples)
    levels: list[list[Level]] = []
    contexts, repeated = np.zeros((2, accounts.num_groups), np.int64)
    for prompt in range(len(plan.prompts)):
        ours = number[number // num_combinations % len(plan.prompts) == prompt]
        tokens = np.concatenate([s.tokens[ours] for s in samples])
        rules = np.repeat(np.arange(num_rules), len(ours))
        groups = np.tile(ours % num_combinations, num_rules) * num_rules + rules
        pooled = np.tile(ours < plan.num_pooled, num_rules)
        of_prompt, found = build_levels(tokens, groups, pooled, accounts.num_groups, plan.vocab_size)
        levels.append(of_prompt)
        contexts += found
        for level in of_prompt:
            _, group, visits = level.visits()
            repeated += np.bincount(group[visits > 1], minlength=accounts.num_groups)
    # 2) A walk over all contexts, then the verdicts.
    watch(levels, accounts)
    _walk_all(plan, levels, accounts, progress)
    return _conclude(plan, samples, accounts, contexts, repeated, progress)


def _walk_all(plan: Plan, levels: list[list[Level]], accounts: Accounts, progress: Progress) -> None:
    cache, config = plan.engine.runtime.kv_cache, plan.engine.checkpoint.config
    page = page_bytes(config, config.num_hidden_layers, 1, cache.dtype)
    width = max(1, min(8192, BATCH_ELEMENTS // plan.vocab_size, KV_BYTES // (page * plan.longest)))
    target = PlainTarget(plan.engine, max(map(len, plan.prompts)) + plan.longest * width)
    total, done = sum(len(level.parent) for of_prompt in levels for level in of_prompt), 0
    for prompt, of_prompt in enumerate(levels):
        for depth, first, logits, outputs in visit_contexts(target, plan.prompts[prompt], of_prompt, width):
            progress("distributions of the contexts", done, total)
            account(plan, prompt, of_prompt[depth], depth, first, logits, outputs, accounts)
            done += len(logits)


def _conclude(
    plan: Plan, samples: list[Samples], accounts: Accounts, contexts: Ints, repeated: Ints, progress: Progress
) -> tuple[Sampling, list[Failure]]:
    # The number of all tests first: it decides at which level each of them fails.
    options, num_rules = plan.options, len(samples)
    tests = {g: [t for law in laws if (t := _g_test(*law)).num_cells > 1] for g, laws in accounts.laws.items()}
    num_tests = 2 * (accounts.num_groups + num_rules) + sum(map(len, tests.values()))
    log_e_limit, p_limit = math.log(num_tests / options.alpha), options.alpha / num_tests

    def group_result(name: str, groups: list[int]) -> GroupResult:
        pooled = accounts.pooled[groups[0]]
        for g in groups[1:]:
            pooled = pooled.plus(accounts.pooled[g])
        number = np.arange(options.samples) % len(plan.combinations)
        return GroupResult(
            combination=name,
            samples=int(np.isin(number, [g // num_rules for g in groups]).sum()),
            log10_e_contexts=float(log_mixture(accounts.log_e[groups].sum(0))) / math.log(10),
            log10_e_pooled=float(pooled.log_e()) / math.log(10),
            pooled_positions=pooled.positions,
            pooled_shift=pooled_detectable(pooled, log_e_limit),
            g_tests=[test for g in groups for test in tests[g]] if len(groups) == 1 else [],
        )

    rules = []
    for r, s in enumerate(samples):
        progress("detection power", r, num_rules)
        groups = [c * num_rules + r for c in range(len(plan.combinations))]
        laws = [law for g in groups for law in accounts.laws[g]]
        p, visits = max(((p, int(n.sum())) for _, _, p, n in laws), key=lambda x: x[1], default=(torch.ones(1), 0))
        rules.append(
            RuleResult(
                rule=s.rule,
                samples=len(s.tokens),
                tokens=int((s.tokens >= 0).sum()),
                iterations=s.iterations,
                few_iterations=s.few_iterations,
                mean_acceptance_length=1 + s.accepted / s.iterations if s.iterations else None,
                contexts=int(contexts[groups].sum()),
                repeated_contexts=int(repeated[groups].sum()),
                rounded_contexts=int(accounts.rounded[groups].sum()),
                impossible_tokens=int(accounts.impossible[groups].sum()),
                context_visits=visits,
                context_shift=context_detectable(p, visits, log_e_limit, p_limit),
                groups=[group_result(c.name, [g]) for c, g in zip(plan.combinations, groups)],
                together=group_result("all", groups),
            )
        )
    sampling = Sampling(num_tests, log_e_limit / math.log(10), p_limit, rules)
    return sampling, [*_impossible(plan, samples, accounts), *_unlikely(plan, sampling)]


def _g_test(prompt: int, context: list[int], p: Tensor, counts: Tensor) -> GTest:
    p_value, num_cells = g_test(p, counts)
    return GTest(prompt, context, int(counts.sum()), num_cells, float(p_value))


def _impossible(plan: Plan, samples: list[Samples], accounts: Accounts) -> Iterator[Failure]:
    """Yields a failure for each token that no correct engine emits, with the first sample that has it."""
    for group, prompt, context, token in accounts.examples:
        c, r = divmod(group, len(samples))
        start = np.array([*context, token])
        for i in np.flatnonzero((samples[r].tokens[:, : len(start)] == start).all(1)).tolist():
            if plan.request(i) == (c, prompt):
                name = plan.combinations[c].name
                message = f"{samples[r].rule}, {name}: token {token} is impossible after output {context}"
                seeds = {"seed": plan.seed(samples[r].rule, i), "output_token_ids": start.tolist()}
                yield Failure("sampling", message, _reproduce(plan, samples[r].rule, c) | seeds)
                break


def _unlikely(plan: Plan, sampling: Sampling) -> Iterator[Failure]:
    for rule in sampling.rules:
        for c, group in enumerate([*rule.groups, rule.together]):
            where = f"{rule.rule}, {group.combination}"
            reproduce = _reproduce(plan, rule.rule, c if c < len(rule.groups) else None)
            for name, value in (("contexts", group.log10_e_contexts), ("pooled", group.log10_e_pooled)):
                if not value < sampling.log10_e_limit:  # NaN fails, too
                    what = f"log10 E = {value:.4g} over {name}, the limit is {sampling.log10_e_limit:.4g}"
                    yield Failure("sampling", f"{where}: {what}", reproduce)
            for test in group.g_tests:
                if not test.p_value > sampling.p_limit:
                    what = f"p = {test.p_value:.3g} after output {test.context}, the limit is {sampling.p_limit:.3g}"
                    yield Failure("sampling", f"{where}: {what}", reproduce | {"prompt": plan.prompts[test.prompt]})


def _reproduce(plan: Plan, rule: str, combination: int | None) -> dict[str, Any]:
    """Returns what reproduces the samples of a rule, or of one combination; `Plan` says how sample i is drawn."""
    o, step = plan.options, len(plan.combinations)
    first = plan.seed(rule, 0)
    seeds: dict[str, Any] = {"first_seed": first, "last_seed": first + o.samples - 1}
    if combination is not None:
        seeds["first_seed"], seeds["seed_step"] = first + combination, step
        seeds["params"] = plan.combinations[combination].described()
    return {"rule": rule, "num_speculative_tokens": o.num_speculative_tokens, **seeds}

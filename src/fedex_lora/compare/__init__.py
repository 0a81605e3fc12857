"""`fedex-lora compare`: methods by seeds, paired, each at its own learning rate."""

import math
import os
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedex_lora.aggregation import method_named
from fedex_lora.client import quiet
from fedex_lora.compare._plan import Variant, configured, controls, grid_around, variants
from fedex_lora.compare._runs import Job, Outcome, done, outcomes
from fedex_lora.compare._statistics import Curve, held_out_score, interval, rounds_to, summary
from fedex_lora.compare._tables import footnotes, markdown, table_rows, title
from fedex_lora.config import Config, write_config
from fedex_lora.errors import FedexLoraError, TrainingError, UsageError
from fedex_lora.rounds import versions
from fedex_lora.runner import InProcess
from fedex_lora.storage import plain_json, read_events, write_text

__all__ = [
    "Curve",
    "Variant",
    "compare",
    "configured",
    "controls",
    "footnotes",
    "held_out_score",
    "interval",
    "markdown",
    "rounds_to",
    "summary",
    "table_rows",
    "title",
    "variants",
]

RESULT, TABLE = "compare.json", "compare.md"
Told = Callable[[str, int, int], None]
"""(a line, how many runs are done, how many there are)."""


@dataclass(frozen=True)
class _Plan:
    """All runs that a comparison consists of."""

    config: Config
    variants: Sequence[Variant]
    grid: Sequence[float]
    seeds: Sequence[int]
    out: Path

    def job(self, variant: Variant, rate: float, seed: int) -> Job:
        folder = self.out / "runs" / variant.name / f"lr-{rate:.12g}" / f"seed-{seed}"
        return Job(configured(self.config, variant, rate, seed), folder)

    @property
    def runs(self) -> int:
        return len(self.variants) * (len(self.grid) + len(self.seeds) - 1)


def compare(
    config: Config,
    methods: Sequence[str],
    seeds: Sequence[int],
    out: Path,
    learning_rates: Sequence[float] | None = None,
    reference: str | None = None,
    target: float | None = None,
    with_controls: bool = True,
    jobs: int = 1,
    tell: Told = lambda line, done, total: None,
) -> dict[str, Any]:
    """Run every method with every seed, and say what can be said about their differences.

    The learning rate of each variant is the one of the grid that is best on the clients' own held-out rows (training rows that they keep
    back) with the first seed; the evaluation rows are not looked at. All variants with one seed share its partition, initial weights and
    order of rows, so differences are paired by seed.

    Args:
        config: the run that is varied.
        methods: METHOD, METHOD+GAUGE or METHOD@2r.
        seeds: at least one; two or more for intervals.
        out: gets `compare.json`, `compare.md` and `runs/`; a comparison that was interrupted there continues.
        learning_rates: the grid; None: a third of the configured one, it, and three times it.
        reference: the variant that differences are from; None: `fedit` if it is there, else the first that has a global model.
        target: of the column "rounds to"; None: the reference's mean at the end.
        with_controls: add `fedit+balanced`, and `ffa@2r` where `ffa` is, as far as the configuration allows.
        jobs: runs at once, each in its own process.
        tell: told of every run that is done.

    Raises:
        UsageError: an unknown method, no seeds, a reference that is not compared, or another comparison in `out`.
        ConfigError: a variant that the configuration does not allow. Nothing has been written then.
        TrainingError: a variant that diverges with a seed at the rate that was chosen, or at every rate.
    """
    grid = _checked(config, seeds, learning_rates, target)
    config = _with_threads(config, jobs, out)
    plan = _admitted(_Plan(config, variants(methods), grid, seeds, out), with_controls, tell)
    reference = _reference(reference, plan.variants)
    _claim(out, config)
    tuning = {(variant.name, rate): plan.job(variant, rate, seeds[0]) for variant in plan.variants for rate in grid}
    tuned = _run(tuning, jobs, tell, plan.runs, {})
    facts = _facts(tuned)
    sign = 1 if facts["greater_is_better"] else -1
    rates = {variant.name: _best_rate(variant.name, grid, tuned, sign) for variant in plan.variants}
    final = {(variant.name, seed): plan.job(variant, rates[variant.name], seed) for seed in seeds for variant in plan.variants}
    told = {outcome.job.folder: outcome for outcome in tuned.values()}
    curves = _curves(_run(final, jobs, tell, plan.runs, told), rates)
    apart = [variant.name for variant in plan.variants if method_named(variant.method).exactness == "personalised"]
    goal, rows = summary(curves, reference, target, sign, apart)
    result = {
        **{key: facts[key] for key in ("task", "base_model", "headline")},
        "reference": reference,
        "target": goal,
        "seeds": list(seeds),
        "rounds": config.rounds,
        "learning_rates": grid,
        "methods": [
            row | _described(variant, grid, rates[variant.name], tuned, sign) for row, variant in zip(rows, plan.variants, strict=True)
        ],
        "config": config.model_dump(mode="json", exclude_none=True),
        "versions": versions(),
    }
    write_text(out / RESULT, plain_json(result) + "\n")
    write_text(out / TABLE, markdown(result))
    return result


def _checked(config: Config, seeds: Sequence[int], learning_rates: Sequence[float] | None, target: float | None) -> list[float]:
    """The grid, if the options make sense."""
    if not seeds or len(set(seeds)) < len(seeds):
        raise UsageError(f"seeds {list(seeds)}: give at least one, each once")
    if target is not None and not math.isfinite(target):
        raise UsageError(f"target {target}: give a finite number")
    if config.clients.holdout == 0:
        raise UsageError("clients.holdout is 0, so there are no rows to choose learning rates on: set it to 0.1, say")
    grid = sorted({float(f"{rate:.12g}") for rate in learning_rates or grid_around(config)})
    if any(not math.isfinite(rate) or rate <= 0 for rate in grid):
        raise UsageError(f"learning rates {grid}: give finite numbers greater than zero")
    return grid


def _with_threads(config: Config, jobs: int, out: Path) -> Config:
    """Several runs at once share the cores; a comparison that continues keeps its number of threads, because the last bits depend on it."""
    if config.torch_threads is not None:
        return config
    threads = max(1, (os.cpu_count() or 1) // jobs) if jobs > 1 else None
    mark = out / "config.toml"
    if mark.is_file():
        threads = tomllib.loads(mark.read_text(encoding="utf-8")).get("torch_threads")
    return config.model_copy(update={"torch_threads": threads})


def _admitted(plan: _Plan, with_controls: bool, tell: Told) -> _Plan:
    """The plan with its controls, after every variant's model, data and settings were tried out; controls that cannot be are left out.

    Raises:
        FedexLoraError: what is wrong with a variant that was asked for.
    """
    quiet()
    for variant in plan.variants:
        _try_out(plan, variant)
    admitted = list(plan.variants)
    for control in controls(plan.variants) if with_controls else ():
        try:
            _try_out(plan, control)
        except FedexLoraError as error:
            tell(f"without the control {control.name}: {error}", 0, 0)
        else:
            admitted.append(control)
    return _Plan(plan.config, admitted, plan.grid, plan.seeds, plan.out)


def _try_out(plan: _Plan, variant: Variant) -> None:
    """Build what a variant's runs need, unless its first one is done already; validate all seeds."""
    first, *_ = [plan.job(variant, plan.grid[0], seed) for seed in plan.seeds]
    if not done(first):
        InProcess(first.config, lambda event, **fields: None)


def _reference(reference: str | None, chosen: Sequence[Variant]) -> str:
    """The variant that differences are from.

    Raises:
        UsageError: it is not compared, or has no global model.
    """
    named = {variant.name: method_named(variant.method) for variant in chosen}
    if reference is None:
        reference = "fedit" if "fedit" in named else next((n for n, m in named.items() if m.exactness != "personalised"), chosen[0].name)
    if reference not in named:
        raise UsageError(f"the reference {reference!r} is not among the methods compared: {', '.join(named)}; set --reference")
    if named[reference].exactness == "personalised":
        raise UsageError(
            f"{reference} has no global model, so it cannot be the reference: compare it with another method, and set --reference to that"
        )
    return reference


def _claim(out: Path, config: Config) -> None:
    """The folder is new, or holds this comparison."""
    mark, text = out / "config.toml", write_config(config)
    if mark.is_file():
        if mark.read_text(encoding="utf-8") != text:
            raise UsageError(f"{out} holds a comparison of another configuration: give another --out, or remove it")
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} exists and is no comparison: give another --out")
    write_text(mark, text)


def _run(jobs: Mapping[Any, Job], at_once: int, tell: Told, total: int, told: dict[Path, Outcome]) -> dict[Any, Outcome]:
    """Every job's outcome by its key; tells of those that are not in `told` yet."""
    keys = {job.folder: key for key, job in jobs.items()}
    found: dict[Any, Outcome] = {}
    for outcome in outcomes(jobs.values(), at_once):
        found[keys[outcome.job.folder]] = outcome
        if outcome.job.folder in told:
            continue
        told[outcome.job.folder] = outcome
        config, end = outcome.job.config, outcome.curve
        came = f"{end.metric[-1]:.4f} in {end.seconds:.0f} s" if end else f"failed: {outcome.reason}"
        name = outcome.job.folder.parent.parent.name
        tell(f"{name}  learning rate {config.training['learning_rate']:g}  seed {config.seed}: {came}", len(told), total)
    return found


def _curves(ran: Mapping[Any, Outcome], rates: Mapping[str, float]) -> dict[str, dict[int, Curve]]:
    """Variant -> seed -> curve."""
    curves: dict[str, dict[int, Curve]] = {name: {} for name in rates}
    for (name, seed), outcome in ran.items():
        if outcome.curve is None:
            raise TrainingError(f"{name} at learning rate {rates[name]:g}, seed {seed}: {outcome.reason}; leave that rate out of the grid")
        curves[name][seed] = outcome.curve
    return curves


def _facts(tuned: Mapping[Any, Outcome]) -> dict[str, Any]:
    """The first event of a run: task, model, headline."""
    folders = [outcome.job.folder for outcome in tuned.values() if outcome.curve]
    if not folders:
        name, rate = next(iter(tuned))
        raise TrainingError(f"{name} fails at every learning rate, as does the rest: {tuned[name, rate].reason}")
    return read_events(folders[0] / "events.jsonl")[0]


def _best_rate(name: str, grid: Sequence[float], tuned: Mapping[Any, Outcome], sign: int) -> float:
    scores = {rate: held_out_score(run, sign) for rate in grid if (run := tuned[name, rate].curve) is not None}
    if not scores:
        raise TrainingError(f"{name} fails at every learning rate of {grid}: {tuned[name, grid[0]].reason}")
    return max(scores, key=lambda rate: (scores[rate], -rate))


def _described(variant: Variant, grid: Sequence[float], rate: float, tuned: Mapping[Any, Outcome], sign: int) -> dict[str, Any]:
    """What a row says beside its numbers."""
    scores = {f"{one:g}": sign * held_out_score(run, sign)[0] if (run := tuned[variant.name, one].curve) else None for one in grid}
    method = method_named(variant.method)
    return {
        "method": variant.method,
        "rank_times": variant.times,
        "exactness": method.exactness,
        "measured_on": "clients' held-out rows" if method.exactness == "personalised" else "evaluation rows",
        "learning_rate": rate,
        "learning_rate_at_edge": len(grid) > 1 and rate in (grid[0], grid[-1]),
        "held_out_by_learning_rate": scores,
    }

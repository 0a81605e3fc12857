"""`fedex-lora compare`: variants by seeds, paired, each at its own best settings."""

import hashlib
import math
import os
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedex_lora.aggregation import get_method
from fedex_lora.client.arguments import training_arguments
from fedex_lora.client.trainers import find_trainer
from fedex_lora.client.training import silence_libraries
from fedex_lora.config import Config, flat, plain_config, write_config
from fedex_lora.errors import ConfigError, FedexLoraError, TrainingError, UsageError
from fedex_lora.experiments import Progress, silent
from fedex_lora.experiments.compare._picture import draw_curves
from fedex_lora.experiments.compare._plan import RATE, Plan, admissible, canonical, hashed, is_protocol, label, planned, settled_plan
from fedex_lora.experiments.compare._protocol import (
    Hypothesis,
    Protocol,
    equivalent_option,
    grid_option,
    parse_protocol,
    primary_option,
    read_protocol,
    variant_option,
)
from fedex_lora.experiments.compare._runs import RunJob, RunOutcome, done, is_config, nobody, outcomes, require_own
from fedex_lora.experiments.compare._statistics import Curve, at_rounds, later_half, summary
from fedex_lora.experiments.compare._tables import COSTS, markdown, result_tables
from fedex_lora.experiments.compare._tests import answers, interval
from fedex_lora.experiments.compare._tuning import Choice, best_point
from fedex_lora.experiments.compare._variants import Variant, configured, controls, require_heeded, with_settings
from fedex_lora.runs.round_loop import versions
from fedex_lora.runs.simulation import LocalSimulation
from fedex_lora.storage.events import Started, of_kind, read_events
from fedex_lora.storage.files import finite_json, write_text
from fedex_lora.storage.run_folder import EVENTS, barely_begun, locked

__all__ = [
    "COSTS",
    "RATE",
    "Hypothesis",
    "Protocol",
    "Variant",
    "answers",
    "compare",
    "configured",
    "equivalent_option",
    "grid_option",
    "interval",
    "later_half",
    "parse_protocol",
    "primary_option",
    "read_protocol",
    "require_heeded",
    "result_tables",
    "variant_option",
]

RESULT, TABLE, PICTURE, PROTOCOL, CONFIG = "compare.json", "compare.md", "compare.png", "protocol.toml", "config.toml"
Key = tuple[str, str, int]
"""(variant, label of its settings, seed)."""


def compare(config: Config, protocol: Protocol, out: Path, jobs: int = 1, tell: Progress = silent) -> dict[str, Any]:
    """Run every variant with every seed, and say what can be said about their differences.

    The settings of each variant are those of the grid that are best on the clients' own held-out rows (training rows that they keep
    back) with the tuning seeds; the evaluation rows are not looked at. All variants with one seed share its partition, initial weights
    and order of rows, so differences are paired by seed.

    Args:
        config: the run that is varied.
        protocol: what is compared.
        out: gets `protocol.toml`, `compare.json`, `compare.md`, `compare.png` (with Matplotlib) and `runs/`; a comparison that was
            interrupted there continues.
        jobs: runs at once, each in its own process.
        tell: told of every run that is done.

    Raises:
        UsageError: what the protocol asks cannot be, or there is another comparison in `out`.
        ConfigError: a variant or a setting that the configuration does not allow. Nothing has been written then.
        TrainingError: a variant that diverges at all settings, or with all seeds at the chosen ones. One that diverges with some of the
            seeds has no numbers there: its tests have failed.
    """
    config = with_settings(config, flat(protocol.set))
    if protocol.config_sha256 not in (None, hashed(config)):
        raise UsageError(
            f"the protocol is for another configuration: its config_sha256 is {protocol.config_sha256}, this one's {hashed(config)}"
        )
    plan = _admitted(planned(_with_threads(config, jobs, out), protocol, out), protocol.controls, tell)
    plan = settled_plan(plan, protocol)
    sha256 = _claim(plan)
    with locked(out):
        result = _result(plan, *_ran(plan, jobs, tell), sha256)
        write_text(out / RESULT, finite_json(result) + "\n")
        write_text(out / TABLE, markdown(result))
        try:
            draw_curves(result, out / PICTURE)
        except ImportError:
            tell(f"without {PICTURE}: it needs Matplotlib: pip install '.[report]'", 0, 0)
    return result


def _ran(plan: Plan, jobs: int, tell: Progress) -> tuple[dict[str, Choice], dict[Key, RunOutcome]]:
    """Run all: what was chosen for each variant, and what came of it with each seed."""
    told: dict[Path, RunOutcome] = {}
    tuning = {
        (variant.name, label(point), seed): plan.job(variant, point, seed)
        for seed in plan.tuning_seeds
        for variant in plan.variants
        if plan.tuned(variant)
        for point in plan.points(variant)
    }
    tuned = _run(tuning, jobs, tell, plan.runs, told)
    sign = 1 if not tuning or _facts(tuned).greater_is_better else -1
    choices = {variant.name: best_point(plan, variant, tuned, sign) for variant in plan.variants}
    final = {
        (variant.name, label(choices[variant.name].settings), seed): plan.job(variant, choices[variant.name].settings, seed)
        for seed in plan.seeds
        for variant in plan.variants
    }
    ended = _run(final, jobs, tell, plan.runs, told)
    require_own([*tuned.values(), *ended.values()])
    return choices, ended


def _result(plan: Plan, choices: Mapping[str, Choice], ran: Mapping[Key, RunOutcome], sha256: str) -> dict[str, Any]:
    """All that `compare.json` says."""
    facts, curves = _facts(ran), _curves(ran)
    sign = 1 if facts.greater_is_better else -1
    metrics = {name: {seed: run.metric for seed, run in by_seed.items()} for name, by_seed in curves.items()}
    goal, rows = summary(curves, plan.reference, plan.target, sign, plan.personal)
    return {
        **facts.model_dump(include={"task", "base_model", "headline", "greater_is_better"}),
        "protocol_sha256": sha256,
        "reference": plan.reference,
        "target": goal,
        "seeds": list(plan.seeds),
        "tuning_seeds": list(plan.tuning_seeds),
        "tuning_apart": plan.apart,
        "rounds": plan.config.rounds,
        "grid": {key: list(values) for key, values in plan.grid.items()},
        "methods": [row | _described(plan, variant, choices[variant.name]) for row, variant in zip(rows, plan.variants, strict=True)],
        "tests": answers(metrics, plan.tests, sign, {name: choice.score for name, choice in choices.items()}),
        "failed": [
            {"method": name, "seed": seed, "reason": outcome.reason} for (name, _, seed), outcome in ran.items() if outcome.curve is None
        ],
        "at": at_rounds(metrics, plan.reference, plan.at, plan.personal),
        "config": plain_config(plan.config),
        "versions": versions(),
    }


def _described(plan: Plan, variant: Variant, choice: Choice) -> dict[str, Any]:
    """What a row says beside its numbers."""
    method = get_method(variant.method)
    return {
        "method": variant.method,
        "rank_times": variant.times,
        "overrides": dict(variant.overrides),
        "exactness": method.exactness,
        "measured_on": "clients' held-out rows" if method.exactness == "personalised" else "evaluation rows",
        "settings": {key: {**choice.settings, **variant.overrides}[key] for key in plan.grid},
        "at_edge": choice.at_edge,
        "tuning": choice.tried,
    }


def _with_threads(config: Config, jobs: int, out: Path) -> Config:
    """Several runs at once share the cores; a comparison that continues keeps its number of threads, because the last bits depend on it."""
    if config.torch_threads is not None:
        return config
    threads = max(1, (os.cpu_count() or 1) // jobs) if jobs > 1 else None
    mark = out / CONFIG
    if mark.is_file():
        threads = tomllib.loads(mark.read_text(encoding="utf-8")).get("torch_threads")
    return config.model_copy(update={"torch_threads": threads})


def _admitted(plan: Plan, with_controls: bool, tell: Progress) -> Plan:
    """The plan with its controls, after every variant's model, data and settings were tried out; controls that cannot be are left out.

    Raises:
        FedexLoraError: what is wrong with a variant that was asked for.
    """
    silence_libraries()
    tried: set[str] = set()
    for variant in plan.variants:
        _try_out(plan, variant, tried)
    admitted = list(plan.variants)
    for control in controls(plan.variants) if with_controls else ():
        try:
            admissible(plan, control)
            _try_out(plan, control, tried)
        except FedexLoraError as error:
            tell(f"without the control {control.name}: {error}", 0, 0)
        else:
            admitted.append(control)
    return replace(plan, variants=admitted)


def _try_out(plan: Plan, variant: Variant, tried: set[str]) -> None:
    """Build what a variant's runs need, once for all that differ in `[training]` only, unless the first one is done; and look at that."""
    seed = (plan.tuning_seeds if plan.tuned(variant) else plan.seeds)[0]
    for point in plan.points(variant):
        job = plan.job(variant, point, seed)
        kind = write_config(job.config.model_copy(update={"training": {}}))
        if not done(job):
            try:
                training_arguments(job.config, own=find_trainer(job.config.local.trainer))
            except ConfigError as error:
                raise ConfigError(f"{variant.name}, {label(point)}: {error}") from None
            if kind not in tried:
                LocalSimulation(job.config, nobody)
        tried.add(kind)


def _claim(plan: Plan) -> str:
    """The folder is new, or holds this comparison.

    Returns:
        The protocol's hash.
    """
    out, texts = plan.out, {PROTOCOL: canonical(plan), CONFIG: write_config(plan.config)}  # written in this order: the first one claims it
    found = {name: (out / name).read_text(encoding="utf-8") for name in texts if (out / name).is_file()}
    if PROTOCOL not in found and CONFIG in found and (out / "runs").exists():
        raise UsageError(f"{out} holds a comparison without a protocol, of an earlier version: give another --out, or remove it")
    if PROTOCOL not in found and out.exists() and not barely_begun(out):
        raise UsageError(f"{out} exists and is no comparison: give another --out")
    if CONFIG in found and not is_config(found[CONFIG], plan.config):
        raise UsageError(f"{out} holds a comparison of another configuration: give another --out, or remove it")
    if PROTOCOL in found and not is_protocol(found[PROTOCOL], texts[PROTOCOL]):
        raise UsageError(f"{out} holds a comparison with another protocol ({PROTOCOL} in it): give another --out, or remove it")
    for name in [name for name in texts if name not in found]:
        write_text(out / name, texts[name])
    return hashlib.sha256(texts[PROTOCOL].encode()).hexdigest()


def _run(jobs: Mapping[Key, RunJob], at_once: int, tell: Progress, total: int, told: dict[Path, RunOutcome]) -> dict[Key, RunOutcome]:
    """Every job's outcome by its key; tells of those that are not in `told` yet."""
    keys = {job.folder: key for key, job in jobs.items()}
    found: dict[Key, RunOutcome] = {}
    for outcome in outcomes(jobs.values(), at_once):
        name, settings, seed = keys[outcome.job.folder]
        found[name, settings, seed] = outcome
        if outcome.job.folder in told:
            continue
        told[outcome.job.folder] = outcome
        end = outcome.curve
        came = f"{end.metric[-1]:.4f} in {end.seconds:.0f} s" if end else f"failed: {outcome.reason}"
        tell(f"{name}  {settings}  seed {seed}: {came}", len(told), total)
    return {key: found[key] for key in jobs}


def _curves(ran: Mapping[Key, RunOutcome]) -> dict[str, dict[int, Curve]]:
    """Variant -> seed -> curve; of a run that failed all numbers are NaN."""
    found: dict[str, dict[int, RunOutcome]] = {}
    for (name, _, seed), outcome in ran.items():
        found.setdefault(name, {})[seed] = outcome
    curves: dict[str, dict[int, Curve]] = {}
    for name, by_seed in found.items():
        whole = next((outcome.curve for outcome in by_seed.values() if outcome.curve), None)
        if whole is None:
            raise TrainingError(f"{name} fails with every seed at the settings chosen for it: {next(iter(by_seed.values())).reason}")
        lost = replace(whole, metric=[math.nan] * len(whole.metric), held_out={}, held_out_loss={}, exactness=math.nan)
        curves[name] = {seed: outcome.curve or lost for seed, outcome in by_seed.items()}
    return curves


def _facts(ran: Mapping[Key, RunOutcome]) -> Started:
    """The first event of a run: task, model, headline."""
    folders = [outcome.job.folder for outcome in ran.values() if outcome.curve]
    if not folders:
        (name, settings, _), outcome = next(iter(ran.items()))
        raise TrainingError(f"{name} fails at every point of the grid, as does the rest: {settings}: {outcome.reason}")
    return of_kind(read_events(folders[0] / EVENTS), Started)[0]

"""What a comparison runs: variants, each over a grid of settings, with seeds."""

import hashlib
import itertools
import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import tomli_w

from fedex_lora.aggregation import get_method
from fedex_lora.config import Config, flat
from fedex_lora.errors import UsageError
from fedex_lora.experiments.compare._protocol import Hypothesis, Protocol
from fedex_lora.experiments.compare._runs import RunJob
from fedex_lora.experiments.compare._variants import Settings, Variant, configured, is_common, variants

RATE = "training.learning_rate"


def grid_around(config: Config) -> list[float]:
    """The configured learning rate, a third of it, and three times it."""
    middle = config.training.get("learning_rate", 5e-5)
    if isinstance(middle, bool) or not isinstance(middle, int | float):
        raise UsageError(f"training.learning_rate = {middle!r} is no number: mend it, or give --learning-rates")
    return [float(f"{middle * factor:.3g}") for factor in (1 / 3, 1, 3)]


def normal(grid: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Each key's values once; numbers in order, to twelve digits.

    Raises:
        UsageError: an empty list, numbers that are not finite, a learning rate that is not positive, keys that are not varied this way.
    """
    made: dict[str, list[Any]] = {}
    for key, values in grid.items():
        if key in ("method", "rounds") or is_common(key):
            raise UsageError(f"{key} cannot be varied by a grid: " + ("see the seeds" if key == "seed" else "make variants"))
        if not isinstance(values, list) or not values:
            raise UsageError(f"grid {key}: give a list of values")
        if numeric(values):
            if any(not math.isfinite(value) or (key == RATE and value <= 0) for value in values):
                kind = "learning rates" if key == RATE else f"grid {key}"
                raise UsageError(f"{kind} {values}: give finite numbers{' greater than zero' * (key == RATE)}")
            whole = key != RATE and all(isinstance(value, int) for value in values)
            made[key] = sorted({value if whole else float(f"{value:.12g}") for value in values})
        else:
            made[key] = [value for index, value in enumerate(values) if value not in values[:index]]
        if len({label({key: value}) for value in made[key]}) < len(made[key]):
            raise UsageError(f"grid {key}: two of {values} would have one folder: give each value once")
    return made


def numeric(values: Sequence[Any]) -> bool:
    """Are all of them numbers?"""
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def label(settings: Settings) -> str:
    """Settings as one word, which is a folder's name too.

    Example:
        >>> label({"training.learning_rate": 0.003, "server.momentum": 0.5})
        'training.learning_rate=0.003,server.momentum=0.5'
    """
    words = ",".join(f"{key}={value:.12g}" if isinstance(value, float) else f"{key}={value}" for key, value in settings.items())
    words = quote(words, safe="=,+@") or "as-configured"
    return words if len(words) < 200 else hashlib.sha256(words.encode()).hexdigest()


@dataclass(frozen=True)
class Plan:
    """All runs that a comparison consists of, and what is made of them.

    Attributes:
        tuning_seeds: seeds on which settings are chosen.
        apart: are they apart from `seeds`?
        reference, tests: settled last, when it is known which controls can be.
    """

    config: Config
    variants: Sequence[Variant]
    grid: Mapping[str, Sequence[Any]]
    seeds: Sequence[int]
    tuning_seeds: Sequence[int]
    apart: bool
    at: Sequence[int]
    target: float | None
    out: Path
    reference: str = ""
    tests: Sequence[Hypothesis] = ()

    def points(self, variant: Variant) -> list[Settings]:
        """The grid, without the keys that are the variant's own."""
        keys = [key for key in self.grid if key not in variant.overrides]
        return [dict(zip(keys, values, strict=True)) for values in itertools.product(*(self.grid[key] for key in keys))]

    def job(self, variant: Variant, settings: Settings, seed: int) -> RunJob:
        folder = self.out / "runs" / variant.name / label(settings) / f"seed-{seed}"
        return RunJob(configured(self.config, variant, settings, seed), folder)

    def tuned(self, variant: Variant) -> bool:
        """Must it run on the tuning seeds? Not where nothing is to be chosen, neither its settings nor it among controls."""
        among = any(variant.name in test.sides[1] and len(test.sides[1]) > 1 for test in self.tests)
        return among or not self.apart or len(self.points(variant)) > 1

    @property
    def runs(self) -> int:
        """How many in all."""
        tuning = sum(len(self.points(variant)) * len(self.tuning_seeds) for variant in self.variants if self.tuned(variant))
        return tuning + len(self.variants) * (len(self.seeds) - (not self.apart))

    @property
    def personal(self) -> list[str]:
        """The variants without a global model, which are measured on other rows."""
        return [variant.name for variant in self.variants if get_method(variant.method).exactness == "personalised"]


def planned(config: Config, protocol: Protocol, out: Path) -> Plan:
    """The plan, all of whose configurations are valid; without controls, reference and tests (see `settled_plan`).

    Raises:
        UsageError: options that make no sense.
        ConfigError: a variant, a setting or a seed that the configuration does not allow.
    """
    seeds, tuning = protocol.seeds, protocol.tuning_seeds
    for name, given in (("seeds", seeds), ("tuning seeds", tuning or [0])):
        if not given or len(set(given)) < len(given):
            raise UsageError(f"{name} {given}: give at least one, each once")
    if both := sorted(set(seeds) & set(tuning or [])):
        raise UsageError(f"seed {both[0]} is among the seeds and the tuning seeds: what is chosen on a seed is not tested on it")
    if config.clients.holdout == 0:
        mend = "remove privacy.epsilon, for private rows are not measured on" if config.privacy.is_on else "set it to 0.1, say"
        raise UsageError(f"clients.holdout is 0, so there are no rows to choose settings on: {mend}")
    if odd := [number for number in protocol.at if not 1 <= number <= config.rounds]:
        raise UsageError(f"round {odd[0]} is out of range: the runs have rounds 1 to {config.rounds}")
    grid = normal(flat(protocol.grid) if protocol.grid is not None else {RATE: grid_around(config)})
    chosen = variants(protocol.methods, protocol.variants)
    if not chosen:
        raise UsageError("nothing to compare: give methods, or variants")
    made = Plan(config, chosen, grid, seeds, tuning or seeds[:1], tuning is not None, sorted(set(protocol.at)), protocol.target, out)
    for variant in chosen:
        admissible(made, variant)
    return made


def admissible(plan: Plan, variant: Variant) -> None:
    """Validate every run of a variant, but for what only the model and the data can tell."""
    for point in plan.points(variant):
        for seed in (*plan.tuning_seeds, *plan.seeds):
            made = configured(plan.config, variant, point, seed)
    if made.rounds != plan.config.rounds:
        raise UsageError(f"variant {variant.name!r} sets rounds, which are the same for all variants: compare rounds by the tests")


def settled_plan(plan: Plan, protocol: Protocol) -> Plan:
    """The plan with its reference and tests, when all variants are known."""
    made = replace(plan, reference=_reference(protocol.reference, plan))
    tests = [test.settled(plan.config.rounds) for test in protocol.tests]
    names = [variant.name for variant in plan.variants]
    if tests and len(plan.seeds) < 2:
        raise UsageError("a test needs two seeds or more: give more seeds")
    for test in tests:
        one, others = test.sides
        for name in (one, *others):
            if name not in names:
                raise UsageError(f"test {test.name!r}: {name!r} is not among the variants compared: {', '.join(names)}")
            if name in plan.personal:
                raise UsageError(f"test {test.name!r}: {name} has no global model, so it is measured on other rows: leave it out")
        if one in others:
            raise UsageError(f"test {test.name!r}: {one} is on both sides")
        for number in test.rounds:
            if not test.mean_of <= number <= plan.config.rounds:
                raise UsageError(
                    f"test {test.name!r}: round {number} (mean of {test.mean_of}) is out of range: the runs have 1 to {plan.config.rounds}"
                )
    if twice := next((test.name for test in tests if [other.name for other in tests].count(test.name) > 1), None):
        raise UsageError(f"two tests are named {twice!r}: rename one")
    return replace(made, tests=tests)


def _reference(reference: str | None, plan: Plan) -> str:
    """The variant that differences are from."""
    names, personal = [variant.name for variant in plan.variants], plan.personal
    if reference is None:
        reference = "fedit" if "fedit" in names else next((name for name in names if name not in personal), names[0])
    if reference not in names:
        raise UsageError(f"the reference {reference!r} is not among the methods compared: {', '.join(names)}; set --reference")
    if reference in personal:
        raise UsageError(
            f"{reference} has no global model, so it cannot be the reference: compare it with another method, and set --reference to that"
        )
    return reference


def hashed(config: Config) -> str:
    """Of what a configuration sets, so that keys of later versions change nothing; threads are none of the protocol's."""
    tree = config.model_copy(update={"torch_threads": None}).model_dump(mode="json", exclude_defaults=True)
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def is_protocol(text: str, wanted: str) -> bool:
    """Do two say the same?"""
    try:
        return tomllib.loads(text) == tomllib.loads(wanted)
    except tomllib.TOMLDecodeError:
        return False


def canonical(plan: Plan) -> str:
    """The whole plan as a protocol, which read again gives this plan."""
    spelt = {
        variant.name: {
            "method": variant.method + (f"@{variant.times}r" if variant.times > 1 else ""),
            **dict(sorted(variant.overrides.items())),
        }
        for variant in plan.variants
    }
    tree: dict[str, Any] = {"config_sha256": hashed(plan.config), "seeds": list(plan.seeds)}
    tree |= {"tuning_seeds": list(plan.tuning_seeds)} if plan.apart else {}
    tree |= {"reference": plan.reference, "at": list(plan.at), "controls": False}
    tree |= {} if plan.target is None else {"target": plan.target}
    tree |= {"grid": {key: list(values) for key, values in plan.grid.items()}, "variants": spelt}
    tree |= {"tests": [test.model_dump(mode="json", exclude_none=True) for test in plan.tests]} if plan.tests else {}
    return tomli_w.dumps(tree)

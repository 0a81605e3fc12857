"""What a comparison runs: variants of one configuration."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from fedex_lora.aggregation import method_named
from fedex_lora.config import Config, parse_config
from fedex_lora.errors import UsageError

CONTROL, TWICE = "fedit+balanced", "ffa@2r"


@dataclass(frozen=True)
class Variant:
    """METHOD[+GAUGE][@Nr]: a method, and what its rank is multiplied by.

    Example:
        >>> Variant.parse("ffa@2r")
        Variant(name='ffa@2r', method='ffa', times=2)
    """

    name: str
    method: str
    times: int = 1

    @classmethod
    def parse(cls, name: str) -> "Variant":
        method, at, factor = name.strip().partition("@")
        match = re.fullmatch(r"([1-9]\d?)r", factor)
        if at and not match:
            raise UsageError(f"{name!r}: write METHOD, METHOD+GAUGE, or METHOD@2r for twice the rank")
        method_named(method)
        return cls(name=name.strip(), method=method, times=int(match[1]) if match else 1)


def variants(names: Sequence[str]) -> list[Variant]:
    """The variants named, each once."""
    return [Variant.parse(name) for name in dict.fromkeys(name.strip() for name in names)]


def controls(chosen: Sequence[Variant]) -> list[Variant]:
    """What should stand beside them.

    A gauge alone can change training more than exactness does, so `fedit+balanced` stands in every comparison of LoRA methods; and
    `ffa` trains half of the numbers, so it also runs at twice the rank.
    """
    names = [variant.name for variant in chosen]
    wanted = [CONTROL] if any(method_named(variant.method).lora for variant in chosen) else []
    wanted += [TWICE] if "ffa" in names else []
    return [Variant.parse(name) for name in wanted if name not in names]


def configured(config: Config, variant: Variant, learning_rate: float, seed: int) -> Config:
    """The run of one variant: method, learning rate, seed, and the rank (alpha in proportion, so the scaling stays).

    `[truncation]` is for the variants that truncate.

    Raises:
        ConfigError: a seed out of range, say.
    """
    tree, times = config.model_dump(mode="json", exclude_none=True), variant.times
    lora, clients = tree["lora"], tree["clients"]
    for key in ("r", "alpha"):
        lora[key] *= times
    for key in ("rank_pattern", "alpha_pattern"):
        lora[key] = {pattern: value * times for pattern, value in lora[key].items()}
    if "ranks" in clients:
        clients["ranks"] = [rank * times for rank in clients["ranks"]]
    if method_named(variant.method).rest != "truncate":
        tree["truncation"] = {}
    tree["training"]["learning_rate"] = learning_rate
    return parse_config(tree | {"method": variant.method, "seed": seed})


def grid_around(config: Config) -> list[float]:
    """The configured learning rate, a third of it, and three times it."""
    middle = config.training.get("learning_rate", 5e-5)
    if isinstance(middle, bool) or not isinstance(middle, int | float):
        raise UsageError(f"training.learning_rate = {middle!r} is no number: mend it, or give --learning-rates")
    return [float(f"{middle * factor:.3g}") for factor in (1 / 3, 1, 3)]

"""What a comparison runs: variants of one configuration."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from fedex_lora.aggregation import METHODS, method_named
from fedex_lora.config import Config
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


def variants(names: Sequence[str], controls: bool = True) -> list[Variant]:
    """The variants named, each once, and the standing controls.

    A gauge alone can change training more than exactness does, so `fedit+balanced` stands in every comparison of LoRA methods; and
    `ffa` trains half of the numbers, so it also runs at twice the rank.
    """
    wanted = list(dict.fromkeys(name.strip() for name in names))
    if controls and any(METHODS[name.partition("+")[0].partition("@")[0]].lora for name in wanted if _known(name)):
        wanted += [CONTROL] if CONTROL not in wanted else []
        wanted += [TWICE] if "ffa" in wanted and TWICE not in wanted else []
    return [Variant.parse(name) for name in wanted]


def _known(name: str) -> bool:
    return Variant.parse(name).method.partition("+")[0] in METHODS


def configured(config: Config, variant: Variant, learning_rate: float, seed: int) -> Config:
    """The run of one variant: method, learning rate, seed, and the rank (alpha in proportion, so the scaling stays)."""
    times = variant.times
    lora = config.lora.model_copy(
        update={
            "r": config.lora.r * times,
            "alpha": config.lora.alpha * times,
            "rank_pattern": {pattern: rank * times for pattern, rank in config.lora.rank_pattern.items()},
            "alpha_pattern": {pattern: alpha * times for pattern, alpha in config.lora.alpha_pattern.items()},
        }
    )
    clients = config.clients
    if clients.ranks and times > 1:
        clients = clients.model_copy(update={"ranks": [rank * times for rank in clients.ranks]})
    return config.model_copy(
        update={
            "method": variant.method,
            "seed": seed,
            "lora": lora,
            "clients": clients,
            "training": {**config.training, "learning_rate": learning_rate},
        }
    )


def grid_around(config: Config) -> list[float]:
    """The configured learning rate, a third of it, and three times it."""
    middle = float(config.training.get("learning_rate", 5e-5))
    return [float(f"{middle * factor:.3g}") for factor in (1 / 3, 1, 3)]

"""Variants of one configuration: a method, the factor of its rank, and keys of its own."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedex_lora.aggregation import get_method
from fedex_lora.config import Config, flat, parse_config, plain_config, plain_value
from fedex_lora.config.reading import put
from fedex_lora.errors import UsageError

CONTROL, TWICE = "fedit+balanced", "ffa@2r"
Settings = Mapping[str, Any]
"""Dotted keys of the configuration -> values."""


@dataclass(frozen=True)
class Variant:
    """A method, what its rank is multiplied by, and keys of the configuration that are its own.

    Example:
        >>> Variant.parse("ffa@2r")
        Variant(name='ffa@2r', method='ffa', times=2, overrides={})
    """

    name: str
    method: str
    times: int = 1
    overrides: Settings = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str, name: str = "", overrides: Settings | None = None) -> "Variant":
        """METHOD[+GAUGE][@Nr]."""
        method, at, factor = text.strip().partition("@")
        match = re.fullmatch(r"([1-9]\d?)r", factor)
        if at and not match:
            raise UsageError(f"{text!r}: write METHOD, METHOD+GAUGE, or METHOD@2r for twice the rank")
        get_method(method)
        return cls(name or text.strip(), method, int(match[1]) if match else 1, overrides or {})


def is_common(key: str) -> bool:
    """Is a key the same for all variants? Else they would not be compared on the same rows."""
    return key in ("seed", "clients.holdout", "task.eval", "task.eval_rows", "task.data", "task.name")


def variants(names: Sequence[str], tables: Mapping[str, Mapping[str, Any]] | None = None) -> list[Variant]:
    """The variants named, each once; and those that are spelt out.

    Raises:
        UsageError: a method that there is not, a name twice, or one that cannot be a folder's.
    """
    made = [Variant.parse(name) for name in dict.fromkeys(name.strip() for name in names)]
    for name, table in (tables or {}).items():
        keys = flat(table)
        if not isinstance(method := keys.pop("method", None), str):
            raise UsageError(f"variant {name!r} has no method: give it one, such as method=fedex")
        if odd := [key for key in keys if is_common(key)]:
            raise UsageError(f"variant {name!r} sets {', '.join(odd)}, which is the same for all variants: remove it")
        if not re.fullmatch(r"\w[\w.,+@ -]{0,99}", name):
            raise UsageError(f"variant {name!r}: a name has letters, digits, and . , + @ - _ or blanks, because its runs get a folder")
        if re.search(r"@\d+$", name):
            raise UsageError(f"variant {name!r}: @ and a number at the end of a name mean a round: call it otherwise")
        made.append(Variant.parse(method, name, keys))
    names = [variant.name for variant in made]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UsageError(f"two variants are named {twice!r}: rename one")
    return made


def controls(chosen: Sequence[Variant]) -> list[Variant]:
    """What should stand beside them.

    A gauge alone can change training more than exactness does, so `fedit+balanced` stands in every comparison of LoRA methods; and
    `ffa` trains half of the numbers, so it also runs at twice the rank.
    """
    there = [(variant.method, variant.times) for variant in chosen]
    wanted = [CONTROL] if any(get_method(variant.method).lora for variant in chosen) else []
    wanted += [TWICE] if ("ffa", 1) in there else []
    return [one for name in wanted if ((one := Variant.parse(name)).method, one.times) not in there]


def configured(config: Config, variant: Variant, settings: Settings, seed: int) -> Config:
    """The run of one variant: method, settings, its own keys, seed, and the rank (alpha in proportion, so the scaling stays).

    `[truncation]` is for the variants that truncate.

    Raises:
        ConfigError: a key that there is not, a value that cannot be, a seed out of range.
    """
    tree, times = plain_config(config), variant.times
    if get_method(variant.method).residual_policy != "truncate":
        tree["truncation"] = {}
    for key, value in {**settings, **variant.overrides}.items():
        put(tree, key, value)
    if times > 1:
        if "start" in tree["base"]:
            raise UsageError(f"{variant.name}: base.start goes on with an adapter as it is: leave @{times}r out, or remove base.start")
        lora, clients = tree["lora"], tree["clients"]
        for key, by in (("r", times), ("alpha", times**0.5 if lora["rslora"] else times)):
            pattern = f"{'rank' if key == 'r' else key}_pattern"
            lora[key] *= by
            lora[pattern] = {name: value * by for name, value in lora[pattern].items()}
        if "ranks" in clients:
            clients["ranks"] = [rank * times for rank in clients["ranks"]]
    return parse_config(tree | {"method": variant.method, "seed": seed})


def with_settings(config: Config, settings: Settings) -> Config:
    """The configuration with keys that every run has."""
    if odd := [key for key in settings if key in ("seed", "method")]:
        raise UsageError(f"[set] has {odd[0]}, which every run sets by itself: give seeds, and methods or variants")
    tree = plain_config(config)
    for key, value in settings.items():
        put(tree, key, value)
    return parse_config(tree)


def require_heeded(overrides: Sequence[str], grid: Settings, settings: Settings) -> None:
    """What `--set` says holds for the runs.

    Raises:
        UsageError: a key that every run sets by itself, or that the grid or [set] has, to something else.
    """
    for key, _, text in (override.partition("=") for override in overrides):
        if (name := key.strip()) in ("seed", "method"):
            raise UsageError(f"--set {name}: every run sets it by itself: give seeds, and methods or variants")
        if name in grid or settings.get(name, value := plain_value(text)) != value:
            raise UsageError(f"--set {name} would change nothing, for {'the grid' if name in grid else '[set]'} has it: change it there")

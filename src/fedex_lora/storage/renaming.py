"""Module paths that differ by a wrapper only: `model.layers.0` is `model.language_model.layers.0` in another version of transformers."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any, TypeVar

from fedex_lora.types import ClientUpdate, LoRAPair

WRAPPERS = ("model", "language_model")  # what versions put around a language model, or take away
T = TypeVar("T")


@dataclass(frozen=True)
class Renaming:
    """Paths that begin with `old` begin with `new`; others stay as they are.

    Example:
        >>> rule = Renaming("model", "model.language_model")
        >>> rule("model.layers.0.q_proj.lora_A.weight"), rule("lm_head.weight")
        ('model.language_model.layers.0.q_proj.lora_A.weight', 'lm_head.weight')
    """

    old: str
    new: str

    def __call__(self, name: str) -> str:
        if self.old and not f"{name}.".startswith(f"{self.old}."):
            return name
        return ".".join(part for part in (self.new, name.removeprefix(self.old).removeprefix(".")) if part)

    def keys(self, values: Mapping[str, T]) -> dict[str, T]:
        """The same values by their new names."""
        return {self(name): value for name, value in values.items()}

    def config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """A PEFT configuration whose `modules_to_save` are called so; PEFT compares the ends of paths, so short names stay."""
        whole = [self(name) if "." in name and self.old else name for name in config.get("modules_to_save") or []]
        return {**config, "modules_to_save": whole} if whole else dict(config)

    def update(self, update: ClientUpdate) -> ClientUpdate:
        """A client's update by the new names."""
        return replace(update, adapter=self.keys(update.adapter), other=self.keys(update.other))

    def told(self, who: str) -> str:
        """What is said of it, in one line."""
        old, new = (f"{name}.*" if name else "*" for name in (self.old, self.new))
        return f"{who} names its modules {old}, as another version of transformers does: they are read as {new}"


def shapes_of(adapter: Mapping[str, LoRAPair]) -> dict[str, Collection[tuple[int, int]]]:
    """Module -> the one shape that its update has."""
    return {module: [pair.shape] for module, pair in adapter.items()}


def find_renaming(
    adapter: Mapping[str, LoRAPair],
    onto: Mapping[str, Collection[tuple[int, int]]],
    others: Collection[str] = (),
    known: Collection[str] = (),
    all_of_them: bool = True,
) -> Renaming | None:
    """The one renaming of a wrapper under which every module of an adapter is another one of the same shape.

    Args:
        adapter: module path -> factors.
        onto: module path -> shapes, one of which its update must have.
        others, known: tensors beside the adapter, and those beside `onto`: of several ways to say one renaming of the modules, the one by
            which most of these have their names, too.
        all_of_them: every module of `onto` is wanted, too.

    Returns:
        None: the names are the same already, or no renaming fits, or several do.
    """
    first = next((name for name in adapter if name not in onto), None)
    if first is None or (all_of_them and len(adapter) != len(onto)):
        return None
    found: dict[tuple[str, ...], list[Renaming]] = {}
    for rule in {rule for name in onto for rule in _rules(first, name)}:
        names = tuple(map(rule, adapter))
        fits = all(pair.shape in onto.get(name, ()) for name, pair in zip(names, adapter.values(), strict=True))
        if fits and len(set(names)) == len(names):
            found.setdefault(names, []).append(rule)
    if len(found) != 1:
        return None
    (rules,) = found.values()
    return max(rules, key=lambda rule: (sum(rule(name) in known for name in others), len(rule.old), len(rule.new)))


def _rules(one: str, other: str) -> Iterator[Renaming]:
    """The renamings of a wrapper that make one path the other: they end alike, and begin with the same words but wrappers, unnumbered."""
    left, right = one.split("."), other.split(".")
    alike = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(reversed(left), reversed(right), strict=False)))
    for count in range(alike, 0, -1):
        old, new = left[:-count], right[:-count]
        plain = [[word for word in words if word not in WRAPPERS] for words in (old, new)]
        if plain[0] == plain[1] and old != new and not any(word.isdecimal() for word in (*old, *new)):
            yield Renaming(".".join(old), ".".join(new))

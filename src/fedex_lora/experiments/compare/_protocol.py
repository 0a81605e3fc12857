"""What a comparison is asked, as data: what `protocol.toml` says, or the options of the command."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from fedex_lora.config import nearest, plain_value
from fedex_lora.config.reading import toml_tree
from fedex_lora.errors import UsageError


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Hypothesis(_Table):
    """One test of two variants, paired by seed: is `better` different from (or better than) `than`, or are two `equivalent`?

    Attributes:
        name: in the result; by default what is asked.
        better, than: variants.
        than_best_of: instead of `than`: of these the one whose score on the tuning seeds is best.
        equivalent: two variants.
        bound: of the equivalence, in units of the metric.
        round: of both sides; None: the last.
        round_better, round_than: of each, where they differ.
        mean_of: the metric is its mean over so many rounds, up to and including that one.
        primary: corrected, together with all primary ones, by Holm's method.
        alternative: "two-sided"; or "greater": `better` is better.
    """

    name: str | None = None
    better: str | None = None
    than: str | None = None
    than_best_of: list[str] | None = Field(None, min_length=1)
    equivalent: tuple[str, str] | None = None
    bound: FiniteFloat | None = Field(None, gt=0)
    round: int | None = Field(None, ge=1)
    round_better: int | None = Field(None, ge=1)
    round_than: int | None = Field(None, ge=1)
    mean_of: int = Field(1, ge=1)
    primary: bool = False
    alternative: Literal["two-sided", "greater"] = "two-sided"

    @model_validator(mode="after")
    def _one_question(self) -> "Hypothesis":
        sides = (self.than is not None) + (self.than_best_of is not None)
        if (self.better is None) == (self.equivalent is None) or sides != (self.better is not None):
            raise ValueError("a test has `better` with one of `than` and `than_best_of`, or `equivalent`")
        if (self.bound is None) != (self.equivalent is None):
            raise ValueError("`bound` belongs to `equivalent`: give both or neither")
        if self.round is not None and (self.round_better, self.round_than) != (None, None):
            raise ValueError("give `round`, or `round_better` and `round_than`")
        if self.equivalent is not None and ((self.round_better, self.round_than) != (None, None) or self.alternative != "two-sided"):
            raise ValueError("`equivalent` takes `round`, and no alternative")
        return self

    @property
    def sides(self) -> tuple[str, list[str]]:
        """A variant, and the one that it is tested against, or those of which the best is."""
        if self.equivalent is not None:
            return self.equivalent[0], [self.equivalent[1]]
        return str(self.better), self.than_best_of or [str(self.than)]

    @property
    def rounds(self) -> tuple[int, int]:
        """Of each side; of one that is `settled`."""
        return (self.round_better or self.round or 0), (self.round_than or self.round or 0)

    def settled(self, last: int) -> "Hypothesis":
        """The same with its name and its rounds said."""
        one, others = self.sides
        if self.equivalent is not None:
            name, rounds = f"{one} = {others[0]}", {"round": self.round or last}
        else:
            name = f"{one} > {others[0] if len(others) == 1 else 'the best of ' + ', '.join(others)}"
            rounds = {"round_better": self.round_better or self.round or last, "round_than": self.round_than or self.round or last}
        return self.model_copy(update={"name": self.name or name, "round": None, **rounds})


class Protocol(_Table):
    """All of a comparison but the configuration that it varies.

    Attributes:
        methods: METHOD, METHOD+GAUGE or METHOD@2r, each a variant with that name.
        variants: name -> `method` and any keys of the configuration, as tables or dotted.
        seeds: at least one; two or more for intervals and tests.
        tuning_seeds: seeds on which settings are chosen, none of them in `seeds`; None: the first of `seeds`.
        grid: key of the configuration -> values; every combination is tried. None: a third of the learning rate, it, three times it.
        reference: the variant that differences are from; None: `fedit` if it is there, else the first that has a global model.
        target: of the column "rounds to"; None: the reference's mean at the end.
        at: rounds at which all variants are set side by side.
        controls: add `fedit+balanced`, and `ffa@2r` where `ffa` is, as far as the configuration allows.
        tests: see `Hypothesis`.
        set: keys of the configuration that every run has, as tables or dotted.
        config_sha256: of the configuration that the protocol is for; another one is refused.
    """

    methods: list[str] = []
    variants: dict[str, dict[str, Any]] = {}
    seeds: list[int] = [0, 1, 2]
    tuning_seeds: list[int] | None = Field(None, min_length=1)
    grid: dict[str, Any] | None = None
    reference: str | None = None
    target: FiniteFloat | None = None
    at: list[int] = []
    controls: bool = True
    tests: list[Hypothesis] = []
    set: dict[str, Any] = {}
    config_sha256: str | None = None


def parse_protocol(tree: Mapping[str, Any]) -> Protocol:
    """A protocol from plain values.

    Raises:
        UsageError: what is wrong, in one line.
    """
    try:
        return Protocol.model_validate(dict(tree))
    except ValidationError as error:
        raise UsageError("; ".join(_one_line(detail) for detail in error.errors()[:3])) from None


def read_protocol(path: Path) -> Protocol:
    """The protocol in a TOML file.

    Raises:
        UsageError: there is no such file, or what is wrong with it.
    """
    tree = toml_tree(path)
    try:
        return parse_protocol(tree)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def _one_line(detail: Any) -> str:
    where = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        near = nearest(str(detail["loc"][-1]), list((Hypothesis if detail["loc"][0] == "tests" else Protocol).model_fields))
        return f"unknown key {where}" + (f": did you mean {near}?" if near else "")
    message = detail["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" if detail["type"] == "value_error" else f"{where} {detail['input']!r}: {message[:1].lower()}{message[1:]}"


def grid_option(texts: Iterable[str]) -> dict[str, list[Any]]:
    """`--grid KEY=V1,V2`: several options, and several in one, apart by spaces.

    Example:
        >>> grid_option(["training.learning_rate=1e-3,3e-3 local.optimizer_state=keep,reset"])
        {'training.learning_rate': [0.001, 0.003], 'local.optimizer_state': ['keep', 'reset']}
    """
    grid: dict[str, list[Any]] = {}
    for part in " ".join(texts).split():
        key, equals, values = part.partition("=")
        if not equals or not key or not values:
            raise UsageError(f"--grid {part!r}: write KEY=VALUE,VALUE")
        if key in grid:
            raise UsageError(f"--grid {key} is there twice: write all of its values in one list")
        listed = plain_value(f"[{values}]")
        grid[key] = listed if isinstance(listed, list) else [plain_value(value) for value in values.split(",")]
    return grid


def variant_option(text: str) -> tuple[str, dict[str, Any]]:
    """`--variant "NAME: method=METHOD KEY=VALUE"`.

    Example:
        >>> variant_option("mine: method=fedex local.optimizer_state=keep")
        ('mine', {'method': 'fedex', 'local.optimizer_state': 'keep'})
    """
    name, colon, rest = text.partition(":")
    pairs = [part.partition("=") for part in rest.split()]
    if not colon or not all(key and equals for key, equals, _ in pairs):
        raise UsageError(f'--variant {text!r}: write "NAME: method=METHOD KEY=VALUE"')
    return name.strip(), {key: plain_value(value) for key, _, value in pairs}


def primary_option(text: str) -> dict[str, Any]:
    """`--primary "A > B"`, or `"A@4 > B@8"` for their rounds.

    Example:
        >>> primary_option("ffa@2r@4 > fedit@8")
        {'better': 'ffa@2r', 'than': 'fedit', 'primary': True, 'round_better': 4, 'round_than': 8}
    """
    match = re.fullmatch(r"\s*(.+?)(?:@(\d+))?\s*>\s*(.+?)(?:@(\d+))?\s*", text)
    if not match:
        raise UsageError(f'--primary {text!r}: write "A > B", or "A@4 > B@8" for rounds')
    rounds = {key: int(value) for key, value in (("round_better", match[2]), ("round_than", match[4])) if value}
    return {"better": match[1], "than": match[3], "primary": True, **rounds}


def equivalent_option(text: str) -> dict[str, Any]:
    """`--equivalent "A = B : 0.01"`.

    Example:
        >>> equivalent_option("fedex = fedit: 0.01")
        {'equivalent': ['fedex', 'fedit'], 'bound': 0.01}
    """
    match = re.fullmatch(r"\s*(.+?)\s*=\s*(.+?)\s*:\s*([^:\s]+)\s*", text)
    bound = plain_value(match[3]) if match else None
    if match is None or not isinstance(bound, int | float):
        raise UsageError(f'--equivalent {text!r}: write "A = B: 0.01"')
    return {"equivalent": [match[1], match[2]], "bound": bound}

"""Recipes: a table or figure of the paper as data, and the runs that it consists of."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fedex_lora.config import Config, nearest, overridden, parse_config
from fedex_lora.config.reading import merged, toml_tree
from fedex_lora.errors import ConfigError, UsageError
from fedex_lora.experiments.compare import RATE, Variant, configured

NOT_PUBLISHED = "not published here"


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Row(_Table):
    """A method, as the paper calls it; METHOD, METHOD+GAUGE or METHOD@2r, as `compare` takes it."""

    label: str
    method: str
    set: dict[str, Any] = {}
    added: bool = Field(False, description="A row of ours that the paper's table does not have.")


class Column(_Table):
    """A number of a run: which metric, on which task."""

    label: str
    metric: str
    factor: float = 100.0
    digits: int = 2
    folder: str = Field("", description="Of the task's files, below the folder of all data.")
    test: str | None = Field(None, description="The task whose test rows the final model answers in writing; the metric is of that.")
    set: dict[str, Any] = {}


class Panel(_Table):
    """A part of the table with its own settings and its own numbers in the paper."""

    label: str
    set: dict[str, Any] = {}
    metrics: dict[str, str] = Field({}, description="Column -> metric, where it differs.")
    source: str = Field(NOT_PUBLISHED, description="Where the paper's numbers were found.")
    paper: dict[str, list[float]] = Field({}, description="Row -> a number for each column, and the average; nan where it is not known.")


class Scale(_Table):
    """What a scale changes: settings (after all others), and how much of the table is run."""

    note: str
    label: str = Field("here", description="What the rows of our numbers are called.")
    seeds: list[int] = [0, 1, 2]
    config: dict[str, Any] = {}
    columns: list[str] | None = None
    panels: dict[str, dict[str, Any]] | None = None
    rows: list[str] | None = None
    learning_rates: dict[str, float] = Field({}, description="METHOD -> learning rate, where it differs.")
    generation: dict[str, Any] = Field({}, description="For tests in writing: over the task's settings of GenerationConfig.")
    tiny: bool = Field(False, description="On rows that the package makes.")


class Recipe(_Table):
    """A table or figure."""

    target: str
    title: str
    source: str
    layout: Literal["scores", "layers", "rounds", "bytes"]
    average: str | None = None
    config: dict[str, Any]
    rows: list[Row]
    columns: list[Column]
    panels: list[Panel]
    contrasts: list[tuple[str, str]] = []
    choices: list[str] = Field([], description="What the paper does not say, and is chosen here.")
    scale: dict[str, Scale]

    @model_validator(mode="after")
    def _labels_are_there(self) -> "Recipe":
        rows, columns, panels = ([one.label for one in part] for part in (self.rows, self.columns, self.panels))
        wide = len(columns) + (self.average is not None)
        for panel in self.panels:
            _require(panel.paper, rows, "paper row")
            _require(panel.metrics, columns, "column")
            for row, numbers in panel.paper.items():
                if len(numbers) != wide:
                    raise ValueError(f"panel {panel.label}: {row} has {len(numbers)} numbers of the paper for {wide} columns")
        for scale in self.scale.values():
            _require(scale.rows or (), rows, "row")
            _require(scale.columns or (), columns, "column")
            _require(scale.panels or (), panels, "panel")
        _require([name for pair in self.contrasts for name in pair], rows, "row")
        return self

    def scaled(self, name: str) -> Scale:
        """The scale called so.

        Raises:
            UsageError: there is none; those that are there are named.
        """
        if name not in self.scale:
            raise UsageError(f"{self.target} has no scale {name!r}: it has {', '.join(self.scale)}")
        return self.scale[name]


def _require(names: Any, known: Sequence[str], what: str) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"no {what} {name!r}: there are {', '.join(known)}")


CellPlace: TypeAlias = tuple[str, str, str, int]
"""(panel, row, column, seed)."""


@dataclass(frozen=True)
class Cell:
    """One number of a table, and the run that it comes from.

    Attributes:
        config: the run without what differs between machines (`task.data`).
        folder: of the task's files, below the folder of all data.
        test: the task whose test rows the final model answers in writing.
    """

    panel: str
    row: str
    column: str
    seed: int
    config: Config
    folder: str
    test: str | None = None

    @property
    def place(self) -> CellPlace:
        return self.panel, self.row, self.column, self.seed

    @property
    def key(self) -> str:
        """The run's identity: cells of any table with the same settings share it."""
        text = json.dumps(identity(self.config), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def name(self) -> str:
        """Of the record's file."""
        task = self.config.task.name.replace("/", "-")
        return f"{task}_{self.config.method}_seed-{self.config.seed}_{self.key}"


@dataclass(frozen=True)
class Only:
    """A part of a target, by labels and seeds; empty: all of them."""

    panels: Sequence[str] = ()
    rows: Sequence[str] = ()
    columns: Sequence[str] = ()
    seeds: Sequence[int] = ()

    def holds(self, cell: Cell) -> bool:
        wanted = (self.panels, self.rows, self.columns, self.seeds)
        return all(not names or name in names for names, name in zip(wanted, cell.place, strict=True))

    def require_known(self, wanted: Sequence[Cell], where: str) -> None:
        """Every label and seed is there.

        Raises:
            UsageError: one is not; the nearest is named.
        """
        kinds = (("panel", self.panels), ("row", self.rows), ("column", self.columns), ("seed", self.seeds))
        for place, (kind, names) in enumerate(kinds):
            known = list(dict.fromkeys(str(cell.place[place]) for cell in wanted))
            for name in map(str, names):
                if name not in known:
                    near = nearest(name, known)
                    raise UsageError(
                        f"{where} has no {kind} {name!r}: " + (f"did you mean {near!r}?" if near else f"it has {', '.join(known)}")
                    )


PAST_DEFAULTS: dict[str, dict[str, Any]] = {
    "task": {"max_length": 128},
    "lora": {"r": 4, "alpha": 8},
}  # of keys whose default has changed since the first records


def identity(config: Config) -> dict[str, Any]:
    """What makes a run's numbers: settings that are not at the defaults of the first records, so that new ones leave old records valid."""
    tree, full = config.model_dump(mode="json", exclude_defaults=True), config.model_dump(mode="json")
    for table, keys in PAST_DEFAULTS.items():
        for key, value in keys.items():
            tree[table] = {**{name: one for name, one in tree.get(table, {}).items() if name != key}}
            tree[table] |= {key: full[table][key]} if full[table][key] != value else {}
    return tree


def folder_of_recipes() -> Path:
    """In an installed package beside the code, in a checkout at the top."""
    installed = Path(str(files("fedex_lora"))) / "recipes"
    return installed if installed.is_dir() else Path(__file__).parents[4] / "recipes"


def targets() -> list[str]:
    """The names of all tables and figures."""
    names = (path.stem for path in folder_of_recipes().glob("*.toml") if not path.stem.startswith("_"))
    return sorted(names, key=lambda name: (name.rstrip("0123456789"), len(name), name))


def read_recipe(target: str) -> Recipe:
    """The recipe of a table or figure, or in a TOML file.

    Raises:
        UsageError: unknown (the nearest is named).
        ConfigError: the file is no recipe.
    """
    own = target.endswith(".toml")
    path = Path(target) if own else folder_of_recipes() / f"{target}.toml"
    if not (path.is_file() if own else target in targets()):
        near = nearest(target, targets())
        raise UsageError(f"unknown target {target!r}: " + (f"did you mean {near}?" if near else f"known: {', '.join(targets())}"))
    try:
        return Recipe.model_validate({"target": path.stem, **_read(path)})
    except ValidationError as error:
        detail = error.errors()[0]
        raise ConfigError(f"{path}: {'.'.join(map(str, detail['loc']))}: {detail['msg']}") from None


def _read(path: Path, heirs: Sequence[Path] = ()) -> dict[str, Any]:
    """A TOML file, upon the one that it extends."""
    if path in heirs:
        raise ConfigError(f"{path} extends itself, by way of {heirs[-1].name}: remove one `extends`")
    if not path.is_file():
        raise ConfigError(f"{heirs[-1]} extends {path}, which does not exist")
    tree = toml_tree(path)
    parent = tree.pop("extends", None)
    return merged(_read(path.parent / f"{parent}.toml", [*heirs, path]), tree) if parent else tree


def cells(recipe: Recipe, scale_name: str, overrides: Sequence[str] = ()) -> Iterator[Cell]:
    """Every number of a target at a scale, the first seed of all of them first.

    Raises:
        UsageError: a seed or a method among the overrides, which each run has of its own.
        ConfigError: settings that cannot be.
    """
    scale, given = recipe.scaled(scale_name), {override.partition("=")[0].strip() for override in overrides}
    if odd := sorted(given & {"seed", "method"}):
        raise UsageError(f"--set {odd[0]}: every run of a table has its own: choose among them by --seed and --row")
    rates = {} if given & {RATE, "training"} else scale.learning_rates
    for seed in scale.seeds:
        for panel in chosen(recipe.panels, scale.panels):
            for column in chosen(recipe.columns, scale.columns):
                for row in chosen(recipe.rows, scale.rows):
                    own = (scale.panels or {}).get(panel.label, {})
                    tree = merged(recipe.config, panel.set, column.set, scale.config, own, row.set)
                    config = parse_config(overridden(tree, overrides))
                    rate = rates.get(row.method, config.training.get("learning_rate", 1e-3))
                    config = configured(config, Variant.parse(row.method), {RATE: rate}, seed)
                    yield Cell(panel.label, row.label, column.label, seed, config, column.folder, column.test)


def chosen(parts: Sequence[Any], wanted: Any) -> list[Any]:
    """The parts that a scale runs; all where it does not say."""
    return [part for part in parts if wanted is None or part.label in wanted]

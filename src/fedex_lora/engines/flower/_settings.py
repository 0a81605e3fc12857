"""What a party says of itself (Flower's node config), and what a run says beside its configuration (Flower's run config)."""

import os
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from fedex_lora.config import DEMO, Config, Privacy, located, nearest, parse_config
from fedex_lora.errors import ConfigError

NEEDED = {
    "epsilon": "of a run, at most",
    "stated_rows": "the number of rows that it states",
    "ledger": "where it writes down what was spent",
}
MORE = ("delta", "budget", "accountant")  # what else it may say of its privacy
SIMULATION = ("partition-id", "num-partitions")  # Flower's own keys: in a simulation all rows are on this machine
T = TypeVar("T")


@dataclass(frozen=True)
class NodeSettings:
    """A party's own settings, of its file or `flower-supernode --node-config 'client="ward-a"'`; the server has no say in them.

    Attributes:
        client: who this is; a message for somebody else is refused.
        data: the folder of this party's rows (`task.data`).
        train: the file of them, for task custom (`task.train`).
        model: this party's copy of the base (`base.model`).
        start: this party's copy of the result that the run goes on from (`base.start`).
        state: the folder where it keeps its base delta, optimiser state and last answer.
        threads: CPU threads (`torch_threads`).
        worker: the socket of a `fedex-lora flower worker`, which keeps the base in memory between messages.
        max_rows: train on no more rows of `data` than this, nor than the run says (`task.train_rows`); not with privacy.
        max_megabytes: refuse a message that is larger.
        trust_remote_code: let the base run code of its own, if the run says so too.
        trainer: what this party trains with (`local.trainer`); a folder in front is better absolute.
        rows: "own", or "dealt": this party's share of the rows that the run's configuration names (experiments on one machine).
        epsilon: of a run, at most: this party's training is private, whatever the run says (`privacy.epsilon`).
        delta: of (epsilon, delta), at most (`privacy.delta`).
        stated_rows: the number of rows that it states (`privacy.rows`).
        budget: the most epsilon of all runs together; by default `epsilon`.
        ledger: the file in which all of them are written down.
        accountant: "prv" or "rdp" (`privacy.accountant`).
    """

    client: str = ""
    data: str = ""
    train: str = ""
    model: str = ""
    start: str = ""
    state: str = ""
    threads: int = 0
    worker: str = ""
    max_rows: int = 0
    max_megabytes: float = 4096.0
    trust_remote_code: bool = False
    trainer: str = ""
    rows: str = "own"
    epsilon: float = 0.0
    delta: float = 0.0
    stated_rows: int = 0
    budget: float = 0.0
    ledger: str = ""
    accountant: str = ""

    def deals(self, config: Config) -> bool:
        """Are the rows this party's share of those that the run itself names (or of the demo's, which code writes)?"""
        return self.rows == "dealt" or (config.task.name == DEMO and not self.data)

    @property
    def folder(self) -> Path:
        """Where this party remembers."""
        home = os.environ.get("XDG_STATE_HOME", "") or "~/.local/state"
        return Path(self.state or f"{home}/fedex-lora").expanduser()

    def applied(self, config: Config) -> Config:
        """The run's configuration on this party's machine: what the server says of paths and code does not count here.

        Raises:
            ConfigError: this party has not said where its rows are, with what it trains or how private it is, or the run has not said which
                classes there are.
        """
        base: dict[str, Any] = {"trust_remote_code": config.base.trust_remote_code and self.trust_remote_code}
        base |= {"model": self.model} if self.model else {}
        base |= {"start": Path(self.start)} if self.start else {}
        config = config.model_copy(update={"base": config.base.model_copy(update=base)})
        config = config.model_copy(update={"local": config.local.model_copy(update={"trainer": self._trainer(config)})})
        config = config.model_copy(update={"privacy": self._privacy(config.privacy)})
        if self.threads:
            config = config.model_copy(update={"torch_threads": self.threads})
        if self.deals(config):
            if self.max_rows:
                raise ConfigError("max_rows is for rows of this node's own, and these are the run's: remove it, or give data", "settings")
            return config
        if not self.data:
            raise ConfigError('this node has not said where its rows are: give it data = "FOLDER" (or rows = "dealt")', "no-data")
        if config.task.needs_labels:
            raise ConfigError(
                "task.labels is not set: name all classes there, or a party whose rows lack one would train another head", "labels-unset"
            )
        train = self.train or Path(config.task.train or "").name or None
        limits = [rows for rows in (self.max_rows, config.task.train_rows) if rows and not config.privacy.is_on]
        update = {"data": Path(self.data), "train": train, "eval": train, "train_rows": min(limits, default=None)}
        return config.model_copy(update={"task": config.task.model_copy(update=update)})

    def _privacy(self, run: Privacy) -> Privacy:
        """This party's own: of the run's it is the clip norm, and an epsilon or a delta that is smaller still."""
        said = self._said
        if not said and not run.is_on:
            return run
        if missing := [key for key, value in NEEDED.items() if not getattr(self, key)]:
            raise ConfigError(
                f"{'this run' if run.is_on else 'this node'} is private, and this node's file lacks "
                + ", ".join(f"{key} ({NEEDED[key]})" for key in missing)
                + ": add "
                + ("them" if len(missing) > 1 else "it"),
                "privacy",
            )
        if problems := self.private_problems(NEEDED):
            raise ConfigError(f"this node's privacy: {'; '.join(problems)}", "privacy")
        own = Privacy.model_validate({"clip_norm": run.clip_norm, "budget": self.epsilon, **said})
        smaller = {"epsilon": min(self.epsilon, run.epsilon), "delta": min(own.delta, run.delta)} if run.epsilon else {}
        return own.model_copy(update={"epsilon": self.epsilon, **smaller})

    @property
    def _said(self) -> dict[str, Any]:
        """What it says of its privacy, under the names of `[privacy]`."""
        said = {name: getattr(self, name) for name in (*NEEDED, *MORE) if name != "stated_rows"} | {"rows": self.stated_rows}
        return {name: value for name, value in said.items() if value}

    def private_problems(self, named: Collection[str]) -> list[str]:
        """What of this party's own privacy is missing, or cannot be; nothing where it says nothing of it.

        Args:
            named: the keys that it was given, also with values that were refused.
        """
        keys = {key.replace("-", "_") for key in named}
        if not keys & {*NEEDED, *MORE}:
            return []
        problems = [f"{name} is missing ({words}): add it" for name, words in NEEDED.items() if name not in keys]
        try:
            Privacy.model_validate(self._said)
        except ValidationError as error:
            problems += [f"{one['loc'][0]} = {one['input']}: {one['msg'][:1].lower()}{one['msg'][1:]}" for one in error.errors()]
        if self.stated_rows and 1 / self.stated_rows <= (delta := self.delta or Privacy().delta) < 1:
            problems.append(f"delta = {delta:g} is not below 1 / {self.stated_rows} stated rows: one record might be shown: set it lower")
        if 0 < self.budget < self.epsilon:
            problems.append(f"budget = {self.budget:g} does not pay for one run of epsilon = {self.epsilon:g}: raise it, or lower epsilon")
        if self.max_rows:
            problems.append("max_rows does not go with privacy: one row more or less would draw others: remove it")
        if self.trainer:
            problems.append("trainer does not go with privacy: another's loop clips and adds noise where it likes: remove it")
        return problems

    def _trainer(self, config: Config) -> str | None:
        """This party's own, never the server's; but ours is no substitute for another."""
        if config.local.trainer and not self.trainer:
            raise ConfigError(
                f"this run is trained by {config.local.trainer}, and this node has not said that it does: set "
                'trainer = "trl:SFTTrainer", or a function of its own, in its file',
                "settings",
            )
        return located(self.trainer, [Path.cwd()]) if self.trainer else None


@dataclass(frozen=True)
class RunSettings:
    """The run config of the app folder, `flwr run DIR --run-config 'out="runs/second"'`.

    Attributes:
        out: the run folder, on the server's machine; a run that is there goes on.
        clients: comma-separated names of the parties, which are the names of their registered nodes; empty: as the run deals its rows.
    """

    out: str = "run"
    clients: str = ""

    @property
    def names(self) -> list[str]:
        """The parties, sorted; empty where the run deals its rows."""
        return sorted({name.strip() for name in self.clients.split(",")} - {""})


def node_settings(given: Mapping[str, Any]) -> NodeSettings:
    """From Flower's node config.

    Raises:
        ConfigError: an unknown key (the nearest is named), or a value of another kind.
    """
    simulated = any(key in given for key in SIMULATION)
    settings = read_settings(NodeSettings(), {key: value for key, value in given.items() if key not in SIMULATION}, "node config")
    if settings.rows not in ("own", "dealt"):
        raise ConfigError(f'node config rows = {settings.rows!r}: give "own" or "dealt"', "settings")
    for key in given:
        name = key.replace("-", "_")
        value, private = getattr(settings, name, None), name in ("epsilon", "delta", "stated_rows", "budget")
        if isinstance(value, int | float) and not (value > 0 if private else value >= 0):
            low = "above 0" if private else "from zero up"
            raise ConfigError(f"node config {key} = {value:g}: give a number {low}", "settings")
    return replace(settings, rows="dealt") if simulated else settings


def is_private(node: Mapping[str, Any], config: str) -> bool:
    """Is this party's training private? Where that cannot be told, it may be.

    Args:
        node: see `node_settings`.
        config: the run's, as TOML.
    """
    try:
        return node_settings(node).applied(parse_config(tomllib.loads(config))).privacy.is_on
    except Exception:  # a parser's own, too: of arrays in arrays without end, for instance
        return True


def read_settings(default: T, given: Mapping[str, Any], where: str) -> T:
    """A record of settings with the values that are `given`, of its own kinds.

    Args:
        default: a dataclass of plain values.
        given: field -> value; "-" stands for "_".
        where: it is from, in words.

    Raises:
        ConfigError: an unknown key (the nearest is named), or a value of another kind.
    """
    record: Any = default
    known = {field.name: type(getattr(record, field.name)) for field in fields(record)}
    found = {}
    for key, value in given.items():
        name = key.replace("-", "_")
        if name not in known:
            near = nearest(name, list(known))
            hint = f": did you mean {near}?" if near else f": it has {', '.join(known)}"
            raise ConfigError(f"unknown key {key} in the {where}{hint}", "settings")
        kind = known[name]
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise ConfigError(f"{where} {key} = {value!r}: give a value of kind {kind.__name__} (text in double quotes)", "settings")
        found[name] = value
    changed: T = replace(record, **found)
    return changed

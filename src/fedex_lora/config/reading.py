"""TOML to a validated configuration and back, overridden by `--set a.b=v`. An unknown key is an error that names the nearest."""

import difflib
import os
import tomllib
from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import ValidationError

from fedex_lora.config.run import Config, trainer_parts
from fedex_lora.config.tables import DEMO, WRITTEN
from fedex_lora.errors import ConfigError, UsageError

WRITTEN_RANK, READ_RANK, WRITTEN_RATE, READ_RATE = 16, 8, 3e-4, 1e-3
OWN_KEYS = ("data", "rows", "rank_pattern", "alpha_pattern")  # tables whose keys are the user's: a client that is left out is out


def with_defaults(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The same with what suits LoRA, privacy and the kind of task, where it says nothing: rank, alpha, learning rate, held-out rows."""
    made, task, lora = dict(tree), tree.get("task", {}), tree.get("lora", {})
    clients, training, privacy = tree.get("clients", {}), tree.get("training", {}), tree.get("privacy", {})
    if not all(isinstance(table, Mapping) for table in (task, lora, clients, training, privacy)):
        return made  # the models say what is wrong
    read = task.get("kind", "classification") not in WRITTEN and str(task.get("name", "")).startswith(("custom", "glue/"))
    ranks = [rank for rank in given if isinstance(rank, int)] if isinstance(given := clients.get("ranks"), list | tuple) else []
    rank = lora.get("r", max(ranks, default=READ_RANK if read else WRITTEN_RANK))
    base = tree.get("base", {})
    if not (isinstance(base, Mapping) and base.get("start")):  # whose adapter goes on as it is
        made["lora"] = {"r": rank, "alpha": 2 * float(rank) if str(rank).strip().replace(".", "", 1).isdecimal() else rank, **lora}
    if tree.get("method") != "full-ft":
        made["training"] = {"learning_rate": READ_RATE if read else WRITTEN_RATE, **training}
    if privacy.get("epsilon") is not None:
        made["clients"] = {"holdout": 0.0, **clients}
    return made


def read_config(path: Path, overrides: Sequence[str] = (), begun: Path | None = None) -> Config:
    """The configuration in a TOML file, with `a.b=v` overrides (v as in TOML, or a bare string).

    Paths in the file are relative to its folder, those of overrides to where the command runs; what is made of them is absolute.

    Args:
        path: the file.
        overrides: `a.b=v`.
        begun: a run folder that goes on: what the file does not say is as it began, whatever defaults are now; of `OWN_KEYS` it says all.
    """
    tree = toml_tree(path)
    if begun is not None and (begun / "config.toml").is_file():
        tree = merged(toml_tree(begun / "config.toml"), tree, whole=OWN_KEYS)
    given = {override.partition("=")[0].strip() for override in overrides}
    return _with_absolute_paths(parse_config(overridden(tree, overrides)), path.parent, given)


def merged(*trees: Mapping[str, Any], whole: Collection[str] = ()) -> dict[str, Any]:
    """Nested tables, later ones first; lists, values and tables that `whole` names are replaced."""
    result: dict[str, Any] = {}
    for tree in trees:
        for key, value in tree.items():
            both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping) and key not in whole
            result[key] = merged(result[key], value, whole=whole) if both else value
    return result


def toml_tree(path: Path) -> dict[str, Any]:
    """A TOML file as plain values; a `ConfigError` says why there are none."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist: give the path of a TOML file") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a folder: give the path of a TOML file") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}: give the path of a TOML file that this user can read") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None


def _with_absolute_paths(config: Config, folder: Path, given: Collection[str]) -> Config:
    """Paths below `folder`, but for keys that were `given` on the command line; what is no folder or file is a name of the hub."""

    def absolute(key: str, value: str | Path) -> Path:
        return Path(os.path.abspath((Path() if key in given else folder) / value))

    base, task, clients = config.base, config.task, config.clients
    if base.model != DEMO and (there := absolute("base.model", base.model)).is_dir():
        base = base.model_copy(update={"model": str(there)})
    if base.start is not None:
        base = base.model_copy(update={"start": absolute("base.start", base.start)})
    if task.data is not None:
        task = task.model_copy(update={"data": absolute("task.data", task.data)})
    else:
        files = {name: absolute(f"task.{name}", value) for name in ("train", "eval") if (value := getattr(task, name))}
        task = task.model_copy(update={name: str(file) for name, file in files.items() if file.is_file()})
        own = {client: absolute(f"clients.data.{client}", file) for client, file in clients.data.items()}
        clients = clients.model_copy(update={"data": {**clients.data, **{name: str(file) for name, file in own.items() if file.is_file()}}})
    privacy = config.privacy
    if privacy.ledger is not None:
        privacy = privacy.model_copy(update={"ledger": absolute("privacy.ledger", privacy.ledger)})
    local, folders = config.local, [Path(), folder] if "local.trainer" in given else [folder, Path()]
    if local.trainer:
        local = local.model_copy(update={"trainer": located(local.trainer, folders)})
    return config.model_copy(update={"base": base, "task": task, "clients": clients, "local": local, "privacy": privacy})


def located(trainer: str, folders: Sequence[Path]) -> str:
    """`local.trainer` with the absolute folder of its module, of those named the first that has it; what none has must be installed."""
    try:
        folder, module, function = trainer_parts(trainer)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    path = Path(*module.split("."))
    for one in (folders[0] / folder,) if folder else folders:
        if folder or (one / path.with_suffix(".py")).is_file() or (one / path / "__init__.py").is_file():
            return f"{os.path.abspath(one)}/{module}:{function}"
    return f"{module}:{function}"


def parse_config(tree: Mapping[str, Any]) -> Config:
    """A validated configuration from plain values, with `with_defaults`; errors in one line."""
    try:
        return Config.model_validate(with_defaults(_without_past_defaults(tree)))
    except ValidationError as error:
        raise ConfigError("; ".join(_one_line(detail) for detail in error.errors()[:3])) from None


def _without_past_defaults(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The same without what older versions wrote into every run folder: `messages.per_client = false`."""
    messages = tree.get("messages")
    if isinstance(messages, Mapping) and messages.get("per_client") is False:
        return {**tree, "messages": {key: value for key, value in messages.items() if key != "per_client"}}
    return dict(tree)


def plain_config(config: Config) -> dict[str, Any]:
    """The configuration as plain values, complete but for what is unset."""
    tree = config.model_dump(mode="json", exclude_none=True)
    if config.base.start is not None:
        tree["lora"] = config.lora.model_dump(mode="json", exclude_unset=True)  # what is not said is the start's
    return tree


def write_config(config: Config) -> str:
    """The same as TOML."""
    return tomli_w.dumps(plain_config(config))


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as dotted keys.

    Raises:
        UsageError: a key that is there twice.

    Example:
        >>> flat({"training": {"learning_rate": 1e-3}, "local.schedule": "run"})
        {'training.learning_rate': 0.001, 'local.schedule': 'run'}
    """
    made: dict[str, Any] = {}
    for key, value in tree.items():
        found = flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
        if twice := made.keys() & found.keys():
            raise UsageError(f"{min(twice)} is there twice, as a table and dotted: write it once")
        made |= found
    return made


def overridden(tree: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A tree of plain values with `a.b=v` overrides; the one that was given stays as it is."""
    made = deepcopy(dict(tree))
    for override in overrides:
        _set(made, override)
    return made


def _set(tree: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path.strip():
        raise ConfigError(f"--set {override!r}: write it as table.key=value")
    put(tree, path.strip(), plain_value(text))


def plain_value(text: str) -> Any:
    """A value as in TOML, or a bare string."""
    try:
        return tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        return text


def put(tree: dict[str, Any], path: str, value: Any) -> None:
    """Set a dotted key."""
    *tables, key = path.split(".")
    for name in tables:
        tree = tree.setdefault(name, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"{path}: {name} is a value, not a table")
    tree[key] = value


REMOVED_KEYS = {
    "messages.per_client": "delete the line (each client is sent the residual of the round)",
    "base.compact_rank": "delete the line (a side path keeps the whole base delta)",
    "base.compact_tolerance": "delete the line (a side path keeps the whole base delta)",
}  # key -> how to mend a configuration that sets it


def _one_line(detail: Any) -> str:
    where = ".".join(str(part) for part in detail["loc"])
    if where in REMOVED_KEYS:
        return f"{where} was removed: {REMOVED_KEYS[where]}"
    if detail["type"] == "extra_forbidden":
        *tables, key = map(str, detail["loc"])
        model: Any = Config.model_fields[tables[0]].annotation if tables else Config
        near = nearest(key, list(model.model_fields))
        return f"unknown key {where}" + (f": did you mean {'.'.join([*tables, near])}?" if near else "")
    if detail["type"] == "missing":
        return f"{where} is missing: add it to the file, or --set {where}=..."
    said = detail["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    message = "give a whole number" if detail["type"].startswith("int_") else said
    return f"{where} = {detail['input']!r}: {message[:1].lower()}{message[1:]}" if where and detail["type"] != "value_error" else message


ALSO = {
    "rank": "r",
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "lora_alpha": "alpha",
}


def nearest(name: str, known: Sequence[str], cutoff: float = 0.5) -> str | None:
    """The known name that is most like `name`, or is what others call so, if there is any."""
    if ALSO.get(name) in known:
        return ALSO[name]
    return next(iter(difflib.get_close_matches(name, known, n=1, cutoff=cutoff)), None)

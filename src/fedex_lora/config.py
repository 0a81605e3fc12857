"""The configuration: pydantic models read from TOML, overridden by `--set a.b=v`. An unknown key is an error that names the nearest."""

import difflib
import os
import tomllib
from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_args

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, field_validator, model_validator

from fedex_lora.errors import ConfigError

DEMO = "demo"
IMAGES: Final = "image-classification"


def base_folder() -> Path:
    """The folder of the tiny base that the package carries (made by scripts/pretrain_demo_base.py)."""
    return Path(str(files("fedex_lora"))) / "data" / "demo_base"


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Base(_Table):
    """The frozen model."""

    model: str = Field(
        min_length=1, description='Hub name, local folder in Transformers format, or "demo", the tiny model that comes with the package.'
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="Precision of the weights that are not quantised, and of the computation. Adapters and heads stay float32."
    )
    quantization: Literal["none", "nf4", "fp4", "int8"] = Field(
        "none",
        description="Linear layers in 4 or 8 bits, by bitsandbytes (the extra `quantized`); heads and embeddings are left as they are.",
    )
    delta: Literal["auto", "fold", "side"] = Field(
        "auto",
        description="Where the base delta lives: folded into the weights (float32, not tied), beside them as a frozen low-rank path, or "
        "(auto) folded where that is exact.",
    )
    random_weights: bool = Field(False, description="Only read the folder's config and start from random weights (tests, benchmarks).")
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the model. Off unless you trust its author.")

    @model_validator(mode="after")
    def _delta_has_a_home(self) -> "Base":
        if self.delta == "fold" and (self.quantization != "none" or self.dtype != "float32"):
            kind = self.dtype if self.quantization == "none" else self.quantization
            raise ValueError(f"base.delta = 'fold' would lose the base delta in {kind} weights: use 'auto' or 'side'")
        if self.quantization != "none" and self.random_weights:
            raise ValueError("base.quantization needs a checkpoint: remove base.random_weights")
        return self

    @property
    def source(self) -> str:
        """What transformers loads: the name or folder, or where "demo" is."""
        return str(base_folder()) if self.model == DEMO else self.model


class Lora(_Table):
    """The adapters; names as in `peft.LoraConfig`."""

    r: int = Field(8, ge=1, description="Rank; by default 16 for texts that are written.")
    alpha: FiniteFloat = Field(16, gt=0, description="The scaling is alpha / r, or alpha / sqrt(r) with rslora; by default alpha = 2 r.")
    dropout: float = Field(0.0, ge=0, lt=1, description="On the adapters' input.")
    target_modules: list[str] | str | None = Field(
        None, description='Module names, a regular expression, "all-linear", or PEFT\'s default.'
    )
    rslora: bool = Field(False, description="Rank-stabilised scaling.")
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = Field({}, description="Module pattern -> rank, where it differs.")
    alpha_pattern: dict[str, FiniteFloat] = Field({}, description="Module pattern -> alpha, where it differs.")
    modules_to_save: list[str] | None = Field(
        None, description="Modules trained whole beside the adapters (a classification head is added by itself)."
    )


class Task(_Table):
    """What is learnt, from which rows."""

    name: str = Field(
        description='"glue/mrpc" and its like, "e2e", "arithmetic/gsm8k" or "/math", "commonsense/boolq" and its like, "custom", "demo".'
    )
    data: Path | None = Field(None, description="Folder of the data in its published layout; without it, the hub.")
    train: str | None = Field(
        None,
        description="custom: a jsonl, csv, tsv or parquet file, or HUB_NAME:SPLIT. arithmetic, commonsense: the same instead of MetaMathQA "
        'and Commonsense170K; "" for no training rows.',
    )
    eval: str | None = Field(None, description="custom: the same for the rows that only measure.")
    kind: Literal["classification", "regression", "causal-lm", "image-classification"] = Field(
        "classification", description="custom: what is predicted: a class, a score, a text, the class of an image."
    )
    text: list[str] = Field(["text"], min_length=1, max_length=2, description="custom classification: one or two text columns.")
    image: str | None = Field(
        None,
        description="custom image-classification: the column of the image (`image` by default): a file relative to task.data, or the "
        "encoded bytes (also as the hub's {bytes, path}).",
    )
    label: str = Field("label", description="custom classification and regression: the column of the class, or of the score.")
    labels: list[str | int] | None = Field(
        None,
        min_length=2,
        description="custom classification: all classes, as they are written in the rows, where a party's own may lack some; by default "
        "those there are.",
    )
    prompt: str = Field(
        "{prompt}",
        description="causal-lm: template of what the model reads; column names in braces, {{ and }} for a brace. [[ ... ]] is left out of "
        "rows in which a column in it is empty.",
    )
    completion: str = Field("{completion}", description="causal-lm: template of what it must say; the loss is on this part only.")
    max_length: int | None = Field(
        None,
        ge=2,
        description="Tokens; longer inputs are cut at their right end, and counted. By default 1024 for texts that are written, 256 for "
        "texts that are read, and no more than the model has positions for.",
    )
    on_bad_row: Literal["refuse", "drop"] = Field(
        "refuse", description="custom: what to do with rows that cannot be used: refuse them all in one line, or leave them out and say so."
    )
    train_rows: int | None = Field(None, ge=1, description="Use this many training rows, drawn with the run's seed.")
    eval_rows: int | None = Field(None, ge=1, description="The same for the rows that only measure.")

    @model_validator(mode="after")
    def _images_are_for_images(self) -> "Task":
        if self.image is not None and self.kind != IMAGES:
            raise ValueError(f'task.image is for task.kind = "{IMAGES}", and the kind is {self.kind}: set the kind, or remove task.image')
        if self.kind == IMAGES and self.name != "custom":
            raise ValueError(f'task.kind = "{IMAGES}" is for task custom, and the task is {self.name}: set task.name = "custom"')
        return self

    @property
    def needs_labels(self) -> bool:
        """Must all classes be named, where parties have rows of their own?"""
        return self.name == "custom" and self.kind in ("classification", IMAGES) and not self.labels

    @property
    def length(self) -> int:
        """Tokens of a row, at most."""
        written = self.kind == "causal-lm" or not self.name.startswith(("glue/", "custom"))
        return self.max_length or (1024 if written else 256)


class Clients(_Table):
    """Who takes part, and who holds which rows."""

    count: int = Field(3, ge=1, description='How many; not used with partition = "column".')
    fraction: float = Field(1.0, gt=0, le=1, description="Share of the clients that take part in a round.")
    partition: Literal["iid", "dirichlet", "column"] = Field("iid", description="How the training rows are dealt out.")
    dirichlet_alpha: float = Field(0.5, gt=0, description="dirichlet: small is skewed.")
    column: str | None = Field(
        None, description="column: one client for each of its values; dirichlet: the classes (the task's label by default)."
    )
    ranks: list[Annotated[int, Field(ge=1)]] | None = Field(
        None, description="A rank for each client, in the order of their names; the largest is lora.r."
    )
    holdout: float = Field(0.1, ge=0, lt=1, description="Share of a client's rows that it keeps to measure on.")
    quorum: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Share of a round's participants whose updates must be there and accepted for the round to go on without the others. "
        "All of them by default: nobody is left out of the mean unless you allow it.",
    )
    min_clients: int = Field(1, ge=1, description="The same as a number; both must hold.")
    deadline: float | None = Field(
        None,
        gt=0,
        description="Seconds that the clients of a round have to answer, over a network; without it everyone is waited for. In one "
        "process clients take turns, and nobody is late.",
    )
    below_quorum: Literal["stop", "wait", "skip"] = Field(
        "stop",
        description="What to do when too few updates are there: stop the run (it can go on by --resume), ask those without one again until "
        "there are enough, or skip the round: the model stays as it was.",
    )
    late: Literal["refuse", "next"] = Field(
        "refuse",
        description="An update that comes after the deadline: refused, or, when it comes during the next round, part of that round's mean, "
        "with the base that it was trained on (exact too).",
    )

    @model_validator(mode="after")
    def _column_is_named(self) -> "Clients":
        if self.partition == "column" and not self.column:
            raise ValueError('partition = "column" needs clients.column')
        return self


class Server(_Table):
    """How the server moves from one global model to the next (docs/momentum.md)."""

    momentum: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="b of W_t = W_(t-1) + h (E_t - W_(t-1)) + b (W_(t-1) - W_(t-2)): how much of its last change the model repeats. W is "
        "the effective weight W0 + D + s B A, E_t what the method makes of the clients' models; the frozen base takes up the change, and "
        "no message is larger for it.",
    )
    learning_rate: float = Field(1.0, gt=0, le=10, description="h of the same equation: 1 goes all the way to E_t.")
    momentum_on: Literal["adapters", "all"] = Field(
        "adapters",
        description="What both act on: the adapted weights, or heads and other tensors too. Where clients lack classes, a head with "
        "momentum may collapse.",
    )
    momentum_of: Literal["products", "factors"] = Field(
        "products",
        description="fedit: of the products B A through the base, as above, or of the factors A and B by themselves, which is plain "
        "FedAvgM (Hsu et al. 2019): a control.",
    )

    @property
    def moves(self) -> bool:
        """Is the next global model another than what the method makes of the clients' models?"""
        return self.momentum != 0 or self.learning_rate != 1

    @property
    def through_base(self) -> bool:
        """Does the frozen base take up what it adds?"""
        return self.moves and self.momentum_of == "products"


class Local(_Table):
    """How local training continues from round to round."""

    schedule: Literal["round", "run"] = Field("round", description="The learning-rate schedule spans one round, or the whole run.")
    optimizer_state: Literal["reset", "keep"] = Field(
        "reset", description="Adam's moments start anew each round, or each client keeps its own."
    )


class Truncation(_Table):
    """How much of the residual the base gains under fedex-svd; nothing said: as many ranks as the adapter has."""

    rank: int | None = Field(None, ge=1, description="fedex-svd: so many ranks of every module's residual.")
    energy: float | None = Field(None, gt=0, le=1, description="fedex-svd: the smallest rank with this share of |R|^2, for each module.")
    bytes: int | None = Field(None, ge=1, description="fedex-svd: bytes of residual that one client downloads a round, over all modules.")

    @model_validator(mode="after")
    def _one_of_them(self) -> "Truncation":
        if sum(value is not None for value in (self.rank, self.energy, self.bytes)) > 1:
            raise ValueError("truncation: give one of rank, energy and bytes")
        return self


class Messages(_Table):
    """What travels to a client (docs/participation.md)."""

    catch_up: Literal["smallest", "log"] = Field(
        "smallest",
        description="What a client lacks of the base delta, for each module: its past gains, their recompressed sum or a snapshot, "
        "whichever is smallest; or always the past gains, which the server then keeps for as long as some client lacks them.",
    )
    tolerance: float = Field(
        1e-7,
        ge=1e-7,
        lt=1,
        description="Relative Frobenius error of a recompressed sum. Larger is lossy, and the exactness error does not show it.",
    )
    max_examples: int = Field(10_000_000, ge=1, le=2**53, description="An update that claims more training rows than this is refused.")
    norm_bound: float | None = Field(
        10.0,
        ge=0,
        description="An update whose change (of the weights, the factors, the other tensors) has a Frobenius norm above so many times the "
        "round's median is refused. Only where at least three updates came: a median of two says nothing. 0: no bound.",
    )


OWNED = (
    "seed",
    "data_seed",
    "output_dir",
    "overwrite_output_dir",
    "report_to",
    "run_name",
    "push_to_hub",
    "do_train",
    "do_eval",
    "do_predict",
    "eval_do_concat_batches",
    "eval_on_start",
    "batch_eval_metrics",
    "prediction_loss_only",
    "label_names",
)
OWNED_PREFIXES = (
    "save_",
    "hub_",
    "resume_",
    "load_best",
    "logging_",
    "eval_str",
    "eval_st",
    "eval_delay",
    "metric_for",
    "greater_is",
    "disable_tqdm",
)


def is_ours(key: str) -> bool:
    """Is a field of `TrainingArguments` set by fedex-lora itself?"""
    return key in OWNED or key.startswith(OWNED_PREFIXES)


class Config(_Table):
    """One run."""

    method: str = Field("fedex", description="See docs/methods.md; METHOD or METHOD+GAUGE.")
    rounds: int = Field(5, ge=1, description="Aggregation rounds.")
    seed: int = Field(0, ge=0, lt=2**32, description="Everything random derives from it.")
    keep_rounds: int | None = Field(
        None, ge=2, description="Keep the folders of so many rounds (and of older ones whose base an absent client has); all by default."
    )
    weights: Literal["num_examples", "uniform"] = Field("num_examples", description="What a client counts for.")
    torch_threads: int | None = Field(None, ge=1, le=1024, description="CPU threads; recorded, because other numbers give other last bits.")
    trackers: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = Field(
        [], description="Experiment trackers that are told of every round (docs/reports.md); each must be installed."
    )
    base: Base
    lora: Lora = Lora()
    task: Task
    clients: Clients = Clients()
    server: Server = Server()
    local: Local = Local()
    truncation: Truncation = Truncation()
    messages: Messages = Messages()
    training: dict[str, Any] = Field(
        {},
        description="Any field of transformers.TrainingArguments but seeds, output, saving, hub and reporting. `learning_rate` is by "
        "default 1e-3, for texts that are written 3e-4: what suits LoRA, ten times and more of what suits full fine-tuning.",
    )

    @field_validator("method")
    @classmethod
    def _one_name(cls, value: str) -> str:
        """FedAvg of LoRA factors is what the literature calls FedIT."""
        return f"fedit{value.removeprefix('fedavg')}" if value.partition("+")[0] == "fedavg" else value

    @field_validator("training")
    @classmethod
    def _not_ours(cls, value: dict[str, Any]) -> dict[str, Any]:
        for key in value:
            if is_ours(key):
                raise ValueError(f"{key} is set by fedex-lora itself: remove it (seeds derive from `seed`, files go to --out)")
        return value


WRITTEN_RANK, READ_RANK, WRITTEN_RATE, READ_RATE = 16, 8, 3e-4, 1e-3


def with_defaults(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The same with what suits LoRA and the kind of task, where it says nothing: rank, alpha, learning rate."""
    made, task, lora = dict(tree), tree.get("task", {}), tree.get("lora", {})
    clients, training = tree.get("clients", {}), tree.get("training", {})
    if not all(isinstance(table, Mapping) for table in (task, lora, clients, training)):
        return made  # the models say what is wrong
    read = task.get("kind", "classification") != "causal-lm" and str(task.get("name", "")).startswith(("custom", "glue/"))
    ranks = [rank for rank in clients.get("ranks") or () if isinstance(rank, int)]
    rank = lora.get("r", max(ranks, default=READ_RANK if read else WRITTEN_RANK))
    made["lora"] = {"r": rank, "alpha": 2 * rank if isinstance(rank, int) else rank, **lora}
    if tree.get("method") != "full-ft":
        made["training"] = {"learning_rate": READ_RATE if read else WRITTEN_RATE, **training}
    return made


def read_config(path: Path, overrides: Sequence[str] = (), begun: Path | None = None) -> Config:
    """The configuration in a TOML file, with `a.b=v` overrides (v as in TOML, or a bare string).

    Paths in the file are relative to its folder, those of overrides to where the command runs; what is made of them is absolute.

    Args:
        path: the file.
        overrides: `a.b=v`.
        begun: a run folder that goes on: what the file does not say is as the run began, whatever today's defaults are.
    """
    tree = _tree(path)
    if begun is not None and (begun / "config.toml").is_file():
        tree = _over(_tree(begun / "config.toml"), tree)
    given = {override.partition("=")[0].strip() for override in overrides}
    return _with_absolute_paths(parse_config(overridden(tree, overrides)), path.parent, given)


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Two trees as one; where both say something, `above` holds."""
    both = {
        key: _over(below[key], above[key])
        for key in below.keys() & above.keys()
        if isinstance(below[key], dict) and isinstance(above[key], dict)
    }
    return {**below, **above, **both}


def _tree(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist: give the path of a TOML file") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a folder: give the path of a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None


def _with_absolute_paths(config: Config, folder: Path, given: Collection[str]) -> Config:
    """Paths below `folder`, but for keys that were `given` on the command line; what is no folder or file is a name of the hub."""

    def absolute(key: str, value: str | Path) -> Path:
        return Path(os.path.abspath((Path() if key in given else folder) / value))

    base, task = config.base, config.task
    if base.model != DEMO and (there := absolute("base.model", base.model)).is_dir():
        base = base.model_copy(update={"model": str(there)})
    if task.data is not None:
        task = task.model_copy(update={"data": absolute("task.data", task.data)})
    else:
        files = {name: absolute(f"task.{name}", value) for name in ("train", "eval") if (value := getattr(task, name))}
        task = task.model_copy(update={name: str(file) for name, file in files.items() if file.is_file()})
    return config.model_copy(update={"base": base, "task": task})


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


def write_config(config: Config) -> str:
    """The configuration as TOML, complete but for what is unset."""
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))


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
    try:
        value = tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        value = text
    *tables, key = path.strip().split(".")
    for name in tables:
        tree = tree.setdefault(name, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"--set {override!r}: {name} is a value, not a table")
    tree[key] = value


REMOVED = {
    "messages.per_client": "delete the line (each client is sent the residual of the round)",
    "base.compact_rank": "delete the line (a side path keeps the whole base delta)",
    "base.compact_tolerance": "delete the line (a side path keeps the whole base delta)",
}  # key -> how to mend a configuration that sets it


def _one_line(detail: Any) -> str:
    where = ".".join(str(part) for part in detail["loc"])
    if where in REMOVED:
        return f"{where} was removed: {REMOVED[where]}"
    if detail["type"] == "extra_forbidden":
        *tables, key = (str(part) for part in detail["loc"])
        near = nearest(key, _fields(tables))
        return f"unknown key {where}" + (f": did you mean {'.'.join([*tables, near])}?" if near else "")
    if detail["type"] == "missing":
        return f"{where} is missing: add it to the file, or --set {where}=..."
    message = "give a whole number" if detail["type"].startswith("int_") else detail["msg"].removeprefix("Value error, ")
    return f"{where} = {detail['input']!r}: {message[:1].lower()}{message[1:]}" if where and detail["type"] != "value_error" else message


def _fields(tables: Sequence[str]) -> list[str]:
    model: type[BaseModel] = Config
    for name in tables:
        annotation: Any = model.model_fields[name].annotation
        model = next(
            (option for option in (annotation, *get_args(annotation)) if isinstance(option, type) and issubclass(option, BaseModel)), model
        )
    return list(model.model_fields)


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

"""What is trained, on which rows, by whom: the tables `[base]`, `[lora]`, `[task]` and `[clients]`."""

import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationInfo, field_validator, model_validator

DEMO = "demo"
MEMORY = "memory:"  # what the sources of rows that a run was given in memory begin with
IMAGES: Final = "image-classification"
CHAT: Final = "chat"
WRITTEN: Final = ("causal-lm", CHAT)  # kinds of custom tasks whose answer is a text, which takes more than a class


def base_folder() -> Path:
    """The folder of the tiny base that the package carries (made by scripts/pretrain_demo_base.py)."""
    return Path(str(files("fedex_lora"))) / "data" / "demo_base"


def _of_numbers(kind: Any) -> bool:
    return kind in (int, float) or any(map(_of_numbers, get_args(kind)))


class ConfigTable(BaseModel):
    """A table of a configuration: frozen; a key that it does not have is an error, and so is true or false where a number belongs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_not_one(cls, value: Any, info: ValidationInfo) -> Any:
        inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else [value]
        if any(isinstance(one, bool) for one in inner) and _of_numbers(cls.model_fields[info.field_name or ""].annotation):
            raise AssertionError("give a number, not true or false")
        return value


class Base(ConfigTable):
    """The frozen model."""

    model: str = Field(
        min_length=1, description='Hub name, local folder in Transformers format, or "demo", the tiny model that comes with the package.'
    )
    start: Path | None = Field(
        None,
        description="Go on from a result: a run folder, a round's, `final/`, or the OUT of `aggregate`, of adapters trained anywhere. Its "
        "adapter, heads and base delta are where every client starts; `lora.r` and `lora.alpha`, where set, must be the adapter's.",
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


class Lora(ConfigTable):
    """The adapters; names as in `peft.LoraConfig`."""

    r: int = Field(8, ge=1, description="Rank; by default 16 for texts that are written.")
    alpha: FiniteFloat = Field(16, gt=0, description="The scaling is alpha / r, or alpha / sqrt(r) with rslora; by default alpha = 2 r.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Share of the adapters' inputs that training sets to zero.")
    target_modules: list[str] | str | None = Field(
        None, description='Module names, a regular expression, "all-linear", or PEFT\'s default.'
    )
    rslora: bool = Field(False, description="Rank-stabilised scaling.")
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = Field({}, description="Module pattern -> rank, where it differs.")
    alpha_pattern: dict[str, FiniteFloat] = Field({}, description="Module pattern -> alpha, where it differs.")
    modules_to_save: list[str] | None = Field(
        None, description="Modules trained whole beside the adapters (a classification head is added by itself)."
    )


class TaskSettings(ConfigTable):
    """What is learnt, from which rows."""

    name: str = Field(
        description='"glue/mrpc" and its like, "e2e", "arithmetic/gsm8k" or "/math", "commonsense/boolq" and its like, "custom", "demo".'
    )
    data: Path | None = Field(None, description="Folder of the data in its published layout; without it, the hub.")
    train: str | None = Field(
        None,
        description="custom: a jsonl, json, csv, tsv or parquet file, or HUB_NAME:SPLIT. arithmetic, commonsense: the same for MetaMathQA "
        'and Commonsense170K; "" for no training rows.',
    )
    eval: str | None = Field(None, description="custom: the same for the evaluation set.")
    kind: Literal["classification", "regression", "causal-lm", "chat", "image-classification"] = Field(
        "classification",
        description="custom: what is predicted: a class, a score, a text, what the assistant says in a chat, the class of an image.",
    )
    text: list[str] = Field(["text"], min_length=1, max_length=2, description="custom class or score: one or two text columns.")
    image: str | None = Field(
        None,
        description="custom image-classification: the column of the image (`image` by default): a file relative to task.data, or the "
        "encoded bytes (also as the hub's {bytes, path}).",
    )
    label: str = Field("label", description="custom, also images: the column of the class, or of the score.")
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
    eval_rows: int | None = Field(None, ge=1, description="The same for the evaluation set.")

    @field_validator("labels", mode="before")
    @classmethod
    def _as_json_writes_them(cls, value: Any) -> Any:
        if not isinstance(value, list | tuple):
            return value
        if odd := [one for one in value if isinstance(one, float)]:
            raise ValueError(f"task.labels: put {odd[0]} in quotes, as it is written in the rows")
        return [json.dumps(one) if isinstance(one, bool) else one for one in value]

    @model_validator(mode="after")
    def _kinds_go_with_the_rest(self) -> "TaskSettings":
        if self.image is not None and self.kind != IMAGES:
            raise ValueError(f'task.image is for task.kind = "{IMAGES}", and the kind is {self.kind}: set the kind, or remove task.image')
        if self.kind in (IMAGES, CHAT) and self.name != "custom":
            raise ValueError(f'task.kind = "{self.kind}" is for task custom, and the task is {self.name}: set task.name = "custom"')
        if len(set(map(str, self.labels or ()))) < len(self.labels or ()):
            raise ValueError("task.labels names a class twice: name each once")
        return self

    @property
    def needs_labels(self) -> bool:
        """Must all classes be named, where parties have rows of their own?"""
        return self.name == "custom" and self.kind in ("classification", IMAGES) and not self.labels

    @property
    def length(self) -> int:
        """Tokens of a row, at most."""
        written = self.kind in WRITTEN or not self.name.startswith(("glue/", "custom"))
        return self.max_length or (1024 if written else 256)


class Clients(ConfigTable):
    """Who takes part, and who holds which rows."""

    count: int = Field(3, ge=1, description='How many; not used with clients.data or partition = "column".')
    fraction: float = Field(1.0, gt=0, le=1, description="Share of the clients that take part in a round.")
    partition: Literal["iid", "dirichlet", "column"] = Field("iid", description="Rows are dealt at random, by class, or by a column.")
    dirichlet_alpha: float = Field(0.5, gt=0, description="dirichlet: concentration of each class's shares; small is skewed.")
    column: str | None = Field(
        None, description="column: one client for each of its values; dirichlet: the classes (the task's label by default)."
    )
    data: dict[str, str] = Field(
        {},
        description="custom: client -> the file of its training rows, as in `task.train`, which is then left out; on one machine. "
        "`task.train_rows` and the checks of rows are each file's.",
    )
    ranks: list[Annotated[int, Field(ge=1)]] | None = Field(
        None, description="A rank for each client, in the order of their names; the largest is lora.r."
    )
    holdout: float = Field(0.1, ge=0, lt=1, description="Share of a client's rows that it keeps to measure on; with privacy 0.")
    quorum: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Share of a round's participants whose updates must be there and accepted for the round to go on without the others. "
        "All of them by default: nobody is left out of the mean unless you allow it.",
    )
    min_clients: int = Field(1, ge=1, description="The least number of such updates; quorum must hold too.")
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
        description="An update that comes after the deadline: rejected, or, when it comes during the next round, part of that round's "
        "mean, with the base that it was trained on (exact too).",
    )

    @model_validator(mode="after")
    def _column_is_named(self) -> "Clients":
        if self.data and (self.partition != "iid" or self.column):
            raise ValueError("clients.data says who holds which rows: remove partition and column from [clients]")
        if self.partition == "column" and not self.column:
            raise ValueError('partition = "column" needs clients.column')
        if self.column and "partition" not in self.model_fields_set:
            raise ValueError('clients.column is set, and clients.partition is not: set it to "column", to "dirichlet", or to "iid"')
        return self

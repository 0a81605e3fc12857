"""One run: its method, its server, its messages, and the tables of `config.tables`."""

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from fedex_lora.config.privacy import Privacy
from fedex_lora.config.tables import Base, Clients, ConfigTable, Lora, TaskSettings


class ServerOptimizer(ConfigTable):
    """How the server moves from one global model to the next (docs/momentum.md)."""

    momentum: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="b of W_t = W_(t-1) + h (E_t - W_(t-1)) + b (W_(t-1) - W_(t-2)): how much of its last change the model repeats. W is "
        "the effective weight W0 + D + s B A, E_t what the method makes of the clients' models; the frozen base takes up the change, and "
        "no message is larger for it.",
    )
    learning_rate: float = Field(
        1.0,
        ge=0.1,
        le=10,
        description="h of the same equation: 1 goes all the way to E_t. Below 0.1 the rounding of what the base takes up would show.",
    )
    momentum_on: Literal["adapters", "all"] = Field(
        "adapters",
        description="What momentum and learning_rate act on: the adapted weights, or heads and other tensors too. Where clients lack "
        "classes, a head with momentum may collapse. With `local.head_rounds` adapters only: a frozen head would go on moving.",
    )
    momentum_of: Literal["products", "factors"] = Field(
        "products",
        description="What momentum repeats: changes of the products s B A, through the base; or, fedit only, of the factors A and B by "
        "themselves, which is plain FedAvgM (Hsu et al. 2019): a control.",
    )

    @property
    def moves(self) -> bool:
        """Is the next global model another than what the method makes of the clients' models?"""
        return self.momentum != 0 or self.learning_rate != 1

    @property
    def through_base(self) -> bool:
        """Does the frozen base take up what it adds?"""
        return self.moves and self.momentum_of == "products"


class Local(ConfigTable):
    """How local training continues from round to round."""

    schedule: Literal["round", "run"] = Field("round", description="The learning-rate schedule spans one round, or the whole run.")
    optimizer_state: Literal["reset", "keep"] = Field(
        "reset", description="Adam's moments start anew each round, or each client keeps its own."
    )
    head_rounds: int = Field(
        0,
        ge=0,
        description="In so many first rounds only what is trained whole (the head) is trained, and then it is frozen and only the adapters "
        "are. 0: all of it in all rounds.",
    )
    trainer: str | None = Field(
        None,
        description="What trains instead of `transformers.Trainer`: `package.module:function` of your own, beside the file, in the working "
        'folder or installed; or "trl:SFTTrainer", "trl:DPOTrainer" (docs/trainers.md). Over Flower each node names its own.',
    )

    @field_validator("trainer")
    @classmethod
    def _is_a_function(cls, value: str | None) -> str | None:
        if value is not None:
            trainer_parts(value)
        return value


def trainer_parts(name: str) -> tuple[str, str, str]:
    """Folder ("" for what is installed), module and function of `[FOLDER/]package.module:function`.

    Raises:
        ValueError: it is not written so.

    Example:
        >>> trainer_parts("/srv/ward-a/my_trainer:make")
        ('/srv/ward-a', 'my_trainer', 'make')
    """
    path, _, function = name.rpartition(":")
    folder, slash, module = path.rpartition("/")
    module = module.removesuffix(".py")
    if not function.isidentifier() or not all(part.isidentifier() for part in module.split(".")):
        raise ValueError(f"local.trainer = {name!r}: write it as package.module:function")
    return folder or slash, module, function


class Truncation(ConfigTable):
    """How much of the residual the base gains under fedex-svd; by default as many ranks as the adapter has."""

    rank: int | None = Field(None, ge=1, description="fedex-svd: so many ranks of every module's residual.")
    energy: float | None = Field(None, gt=0, le=1, description="fedex-svd: the smallest rank with this share of |R|^2, for each module.")
    bytes: int | None = Field(None, ge=1, description="fedex-svd: bytes of residual that one client downloads a round, over all modules.")

    @model_validator(mode="after")
    def _one_of_them(self) -> "Truncation":
        if sum(value is not None for value in (self.rank, self.energy, self.bytes)) > 1:
            raise ValueError("truncation: give one of rank, energy and bytes")
        return self


ADMISSION: Any = {  # of the rules: whose updates count, which may change when a run goes on
    "clients": {"quorum", "min_clients", "deadline", "below_quorum", "late"},
    "messages": {"norm_bound", "max_examples"},
}


class Messages(ConfigTable):
    """What travels to a client (docs/participation.md)."""

    catch_up: Literal["smallest", "log"] = Field(
        "smallest",
        description="What a client is missing of the base delta, for each module: the past residuals, their recompressed sum or a "
        "snapshot, whichever is smallest; or always the residuals, which the server then keeps for as long as some client misses them.",
    )
    tolerance: float = Field(
        1e-7,
        ge=1e-7,
        lt=1,
        description="Relative Frobenius error of a recompressed sum. Larger is lossy, and the exactness error does not show it.",
    )
    max_examples: int = Field(10_000_000, ge=1, le=2**53, description="An update that claims more training rows than this is rejected.")
    norm_bound: float | None = Field(
        10.0,
        ge=0,
        description="An update whose change (of the weights, the factors, the other tensors) has a Frobenius norm above so many times the "
        "round's median is rejected. Only where at least three updates came: a median of two says nothing. 0: no bound.",
    )


OWNED = frozenset(  # of the last three, two would cast the model that is trained on, and one would send a party's memory use
    "seed data_seed output_dir overwrite_output_dir report_to run_name push_to_hub do_train do_eval do_predict eval_do_concat_batches "
    "eval_on_start batch_eval_metrics prediction_loss_only label_names bf16_full_eval fp16_full_eval skip_memory_metrics".split()
)
OWNED_PREFIXES = tuple("save_ hub_ resume_ load_best logging_ eval_st eval_delay metric_for greater_is disable_tqdm".split())


def is_ours(key: str) -> bool:
    """Is a field of `TrainingArguments` set by fedex-lora itself?"""
    return key in OWNED or key.startswith(OWNED_PREFIXES)


def method_name(name: str) -> str:
    """FedAvg of LoRA factors is what the literature calls FedIT.

    >>> method_name("fedavg+balanced"), method_name("fedex")
    ('fedit+balanced', 'fedex')
    """
    return f"fedit{name.removeprefix('fedavg')}" if name.partition("+")[0] == "fedavg" else name


class Rules(ConfigTable):
    """What server and clients agree on (`agreed`), with the tables that are one side's own; not the model, the rows or `[training]`.

    Example:
        >>> Rules(method="fedex", clients={"quorum": 0.6}).clients.quorum
        0.6
    """

    method: Annotated[str, AfterValidator(method_name)] = Field("fedex", description="METHOD[+GAUGE], of docs/methods.md (fedavg: fedit).")
    seed: int = Field(0, ge=0, lt=2**32, description="Everything random derives from it.")
    weights: Literal["num_examples", "uniform"] = Field("num_examples", description="Clients count by their training rows, or all alike.")
    clients: Clients = Clients()
    server: ServerOptimizer = ServerOptimizer()
    local: Local = Local()
    truncation: Truncation = Truncation()
    messages: Messages = Messages()

    @property
    def agreed(self) -> dict[str, str]:
        """What server and clients must say alike, each as JSON, where it is not as by default; the method always.

        Whose updates count (`clients`, `messages`) is the server's own affair, and how a client trains (`local`) the client's.

        >>> Rules(method="fedit", server={"momentum": 0.5}).agreed
        {'method': '"fedit"', 'server': '{"momentum": 0.5}'}
        """
        said = self.model_dump(mode="json", include={"seed", "weights", "server", "truncation"}, exclude_defaults=True)
        return {key: json.dumps(value, sort_keys=True) for key, value in {"method": self.method, **said}.items()}


class Config(Rules):
    """One run."""

    rounds: int = Field(5, ge=1, le=10**9, description="Aggregation rounds.")
    keep_rounds: int | None = Field(
        None,
        ge=2,
        description="Keep the folders of so many last rounds (of older ones the best by the clients' held-out rows, and those whose base "
        "an absent client has); all by default.",
    )
    torch_threads: int | None = Field(None, ge=1, le=1024, description="CPU threads; recorded, because other numbers give other last bits.")
    trackers: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = Field(
        [], description="Experiment trackers that are told of every round (docs/reports.md); each must be installed."
    )
    base: Base
    lora: Lora = Lora()
    task: TaskSettings
    privacy: Privacy = Privacy()
    training: dict[str, Any] = Field(
        {},
        description="Any field of transformers.TrainingArguments but seeds, output, saving, hub and reporting. `learning_rate` is by "
        "default 1e-3, for texts that are written 3e-4: what suits LoRA, ten times and more of what suits full fine-tuning.",
    )

    @model_validator(mode="after")
    def _goes_together(self) -> "Config":
        if self.clients.data and (self.task.name != "custom" or self.task.train):
            raise ValueError('clients.data names the training rows of task "custom": remove task.train, or clients.data')
        if self.clients.data and self.task.needs_labels:
            raise ValueError("task.labels is not set: name all classes there, for a client's own file may lack some")
        if self.privacy.is_on and "holdout" in self.clients.model_fields_set and self.clients.holdout:
            raise ValueError(
                f"clients.holdout = {self.clients.holdout:g} does not go with privacy.epsilon, for nothing is measured on private rows: "
                "set it to 0, or remove it"
            )
        if self.base.start is not None and self.clients.ranks:
            raise ValueError("base.start goes on with one adapter for all: remove clients.ranks")
        return self

    @field_validator("training")
    @classmethod
    def _not_ours(cls, value: dict[str, Any]) -> dict[str, Any]:
        for key in value:
            if is_ours(key):
                raise ValueError(f"{key} is set by fedex-lora itself: remove it (seeds derive from `seed`, files go to --out)")
        return value

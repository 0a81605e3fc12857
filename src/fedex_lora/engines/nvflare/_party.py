"""What a site trains: a function of its own, which gives a PEFT model and what trains it."""

from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from nvflare.apis.fl_constant import SystemConfigs
from nvflare.fuel.utils.config_service import ConfigService
from pydantic import ValidationError
from torch import Tensor

from fedex_lora.aggregation import get_method
from fedex_lora.client.agreement import require_trained
from fedex_lora.config import Rules
from fedex_lora.errors import ConfigError, TrainingError, UsageError
from fedex_lora.models.adapted import AdaptedModel
from fedex_lora.protocol.messages import EXAMPLES
from fedex_lora.protocol.records import uncountable
from fedex_lora.types import Adapter, ClientUpdate, Delta

PARTY = "fedex_lora_party"
HOW = "set NVFLARE_FEDEX_LORA_PARTY=module:function in the site's environment, or fedex_lora_party in its local/resources.json"


OF_RUNS = {
    "local": {"schedule", "optimizer_state", "head_rounds", "trainer"},
    "clients": {"count", "partition", "dirichlet_alpha", "column", "ranks", "holdout"},
}
"""Rules that only a run keeps which deals the rows, makes the model and trains it: here each site's script does."""


def rules_of(given: Mapping[str, Any]) -> Rules:
    """The rules of a federation of scripts.

    Raises:
        ConfigError: a key or value that they do not have.
        UsageError: they say what a site's script alone decides, or name a method that sites cannot keep.
    """
    try:
        rules = Rules.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"rules: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    said = rules.model_dump(exclude_defaults=True)
    if theirs := [f"{table}.{key}" for table, keys in OF_RUNS.items() for key in said.get(table, {}) if key in keys]:
        raise UsageError(f"rules: {', '.join(theirs)}: over NVFlare each site's own script decides that: remove it from the rules")
    row = get_method(rules.method)
    if not row.lora or row.centralised or row.core or row.exactness == "personalised":
        raise UsageError(f"rules: method {rules.method} is none of sites that share one adapter, A and B: over NVFlare use fedex, say")
    return rules


class ScriptLearner:
    """The `Learner` of a site: a PEFT model, and a function that trains it in place.

    Args:
        name: of the site.
        model: as `peft.get_peft_model` gives it.
        train: (round) -> how many rows it was trained on.
    """

    folder: Path | None = None  # the script keeps its own files

    def __init__(self, name: str, model: Any, train: Callable[[int], int]) -> None:
        self._model, self._train = AdaptedModel(model), train
        self.rows, self.first = {name: 0}, self._model.read()[0]
        self.base = dict[str, Delta]()
        self._start: tuple[Adapter, Mapping[str, Tensor]] = {}, {}

    def load(self, start: Adapter, delta: Mapping[str, Delta], other: Mapping[str, Tensor]) -> str:
        self._start = start, other
        return self._model.load(start, delta, other)

    def read(self) -> tuple[Adapter, Mapping[str, Tensor]]:
        return self._model.read()

    def measure(self, client: str) -> dict[str, float]:
        return {}

    def train(self, client: str, round: int, optimizer: Mapping[str, Any] | None) -> tuple[ClientUpdate, None]:
        rows = self._train(round)
        if wrong := uncountable(rows, "train", EXAMPLES):
            raise TrainingError(f"the party's train(round) gave {type(rows).__name__}: let it return how many rows it trained on ({wrong})")
        adapter, other = self._model.read()
        require_trained(*self._start, (adapter, other))
        return ClientUpdate(client, adapter, rows, other), None


def party_of(name: str) -> ScriptLearner:
    """What trains at a site, as its own setting says: `module:function`, a function (name) -> (model, train).

    Raises:
        UsageError: it says nothing, names what is not there, or gives another thing.
    """
    said = ConfigService.get_str_var(PARTY, conf=SystemConfigs.RESOURCES_CONF, default="")
    module, _, function = said.partition(":")
    if not (module and function):
        raise UsageError(f"this site has not said what trains ({PARTY} is {said!r}): {HOW}")
    try:
        prepare = getattr(import_module(module), function)
    except ModuleNotFoundError as error:
        hint = "is its folder in PYTHONPATH?" if error.name == module else "install it at this site"
        raise UsageError(f"{PARTY} = {said!r}: no module {error.name}: {hint}", "package") from None
    except AttributeError:
        raise UsageError(f"{PARTY} = {said!r}: module {module} has no {function}: {HOW}") from None
    made = prepare(name)
    if not isinstance(made, tuple) or len(made) != 2 or not callable(made[1]):
        raise UsageError(f"{said} gave {type(made).__name__}: let it return (model, train), a PEFT model and a function of the round")
    return ScriptLearner(name, *made)

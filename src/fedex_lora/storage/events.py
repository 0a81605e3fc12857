"""The events of a run: typed records, one JSON object a line of events.jsonl.

Numbers that are not finite are null in the file, and NaN in a record. None means that a run did not say it.
"""

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from fedex_lora.errors import StorageError
from fedex_lora.storage.files import cannot_write, finite_json

_Null = BeforeValidator(lambda value: math.nan if value is None else value)
Number = Annotated[float, _Null]
Said = Annotated[float | None, _Null]  # null is NaN here, too: None is what nobody said
Metrics = dict[str, Number]


class Event(BaseModel):
    """Something that happened in a run; fields that this version does not know are in `model_extra`."""

    model_config = ConfigDict(frozen=True, extra="allow")
    name: ClassVar[str]
    time: float | None = None  # seconds since 1970, when it was written

    def __init_subclass__(cls, name: str = "", **options: Any) -> None:
        cls.name = name
        super().__init_subclass__(**options)

    def __getitem__(self, key: str) -> Any:  # an event may be read as the line that it is in the file, too
        return {"event": self.name, **self.fields()}[key]

    def get(self, key: str, default: Any = None) -> Any:
        return {"event": self.name, **self.fields()}.get(key, default)

    def __contains__(self, key: str) -> bool:
        return key in self.fields()

    def fields(self) -> dict[str, Any]:
        """What was said, by name."""
        return self.model_dump(exclude_unset=True)


class Started(Event, name="started"):
    """Before round 1: the run's facts, and the metrics of the untrained model."""

    method: str
    clients: list[str]
    rounds: int = 0
    seed: int | None = None
    metrics: Metrics = {}
    base_model: str = ""
    base_fingerprint: str = ""
    base_identity: str = ""
    base_dtype: str = ""
    base_quantization: str = ""
    base_random_seed: int | None = None
    base_delta: dict[str, int] = {}
    base_bytes: int | None = None
    start: dict[str, str | int] = {}
    privacy: dict[str, str | float] = {}
    private_clients: dict[str, dict[str, float]] = {}
    task: str = ""
    task_type: str = ""
    headline: str = "loss"
    greater_is_better: bool = True
    trainable_parameters: int | None = None
    total_parameters: int | None = None
    device: str = ""
    settings: Metrics = {}
    disk_bytes: int | None = None
    train_rows: dict[str, int] = {}
    torch_threads: int | None = None
    versions: dict[str, str] = {}


class Resumed(Event, name="resumed"):
    """A run goes on, with its first unfinished round: it was interrupted, or it gets more rounds."""

    round: int
    rounds: int


class Finished(Event, name="finished"):
    """A run is resumed that is done; shown, not kept."""

    rounds: int


class RoundStarted(Event, name="round_started"):
    """A round begins, with its participants."""

    round: int
    clients: list[str]


class Step(Event, name="step"):
    """A training step; shown, not kept."""

    client: str
    step: int
    steps: int


class ClientDone(Event, name="client_done"):
    """A client's update arrived and is valid by itself; `late`: it was asked for so many rounds ago."""

    round: int
    client: str
    num_examples: int | None = None
    bytes_up: int | None = None
    late: int = 0
    train_loss: Said = None
    steps: Said = None
    seconds: Said = None


class ClientRejected(Event, name="rejected"):
    """A client's update is not part of the round's mean. (Earlier versions wrote `refused`.)"""

    round: int
    client: str
    reason: str


class PartyFailed(Event, name="party_failed"):
    """The full text of a client's failure, for the console of a run in one process; never in the file."""

    client: str
    message: str


class Waiting(Event, name="waiting"):
    """Nobody has answered for a while; or, with a reason, clients will be asked again in so many seconds."""

    round: int
    clients: list[str]
    since: float
    reason: str = ""
    seconds: float | None = None


class Warned(Event, name="warning"):
    """Something is legal and useless, or went another way than meant."""

    message: str
    round: int | None = None
    client: str | None = None
    tail: Said = None


class HeldOut(Event, name="held_out"):
    """The clients' own held-out rows, on the model after `round`: the mean weighted by rows, and each client's."""

    round: int
    metrics: Metrics
    clients: dict[str, Metrics] = {}


class Modules(BaseModel):
    """A round's deviation as columns, a row a module; see `exactness.measure.per_module`."""

    model_config = ConfigDict(frozen=True)
    module: list[str] = []
    deviation: list[Number] = []
    ideal: list[Number] = []
    scaled: list[Number] = []
    effective_rank: list[Number] = []


class RoundDone(Event, name="round_done"):
    """A round's folder is written; what each number is stands in docs/events.md."""

    round: int
    metrics: Metrics
    bytes_down: int
    bytes_up: int
    seconds: Said = None
    accepted: list[str] | None = None
    exactness_error: Said = None
    exactness_error_total: Said = None
    realised_error: Said = None
    floor: Said = None
    deviation: Said = None
    dropped: Said = None
    side_error: Said = None
    change_error: Said = None
    not_finite: list[str] = []
    modules: Modules | None = None
    drift: Metrics = {}
    skipped: str = ""


class Evaluated(Event, name="evaluated"):
    """The final model was sent to all clients, to be measured."""

    bytes_down: int
    bytes_up: int
    round: int | None = None


class RunDone(Event, name="run_done"):
    """The end; `held_out` is by round, `best_round` the best there by `headline`, `skipped` the rounds without a mean."""

    rounds: int = 0
    best_round: int | None = None
    headline: str = ""
    held_out: dict[str, Metrics] = {}
    skipped: list[int] = []


class Unreadable(Event, name="unreadable"):
    """An event of another version, or one whose fields in `complaint` are missing or wrong."""

    event: str
    complaint: list[str] = []


KINDS = {kind.name: kind for kind in Event.__subclasses__() if kind is not Unreadable} | {"refused": ClientRejected}
EventT = TypeVar("EventT", bound=Event)


def record(event: str | Event, **fields: Any) -> Event:
    """The record of an event by its name; a record is returned as it is.

    Raises:
        StorageError: there is no such event, or it lacks a field.
    """
    made = event if isinstance(event, Event) else _made(event, fields)
    if isinstance(made, Unreadable):
        raise StorageError(f"a `{made.event}` event without {', '.join(made.complaint) or 'a meaning'}")
    return made


def _made(name: str, fields: dict[str, Any]) -> Event:
    try:
        return KINDS[name](**fields) if name in KINDS else Unreadable(event=name)
    except ValidationError as error:
        return Unreadable(event=name, complaint=list(dict.fromkeys(str(one["loc"][0]) for one in error.errors())))


def append_event(path: Path, event: str | Event, **fields: Any) -> None:
    """One event as one line at the end of `events.jsonl`."""
    made = record(event, **fields)
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(finite_json({"event": made.name, **made.fields(), "time": time.time()}) + "\n")
    except OSError as error:
        raise cannot_write(path, error) from None


def read_event(line: str | bytes) -> Event | None:
    """The event in a line; None where there is none."""
    try:
        fields = json.loads(line)
    except ValueError:
        return None
    return _made(fields.pop("event"), fields) if isinstance(fields, dict) and isinstance(fields.get("event"), str) else None


def read_events(path: Path) -> list[Event]:
    """All events of a run; a torn last line is left out.

    Raises:
        StorageError: another line cannot be read.
    """
    *whole, last = (read_event(line) for line in path.read_bytes().split(b"\n"))
    if None in whole:
        raise StorageError(f"{path}: line {whole.index(None) + 1} is damaged: copy the file again from where it came")
    return [event for event in (*whole, last) if event]


def of_kind(events: Sequence[Event], kind: type[EventT]) -> list[EventT]:
    """The events of one kind, in their order."""
    return [event for event in events if isinstance(event, kind)]


def is_over(events: Sequence[Event]) -> bool:
    """Is a run done, and was it given no more rounds since?"""
    return isinstance(next((event for event in reversed(events) if isinstance(event, RunDone | Resumed)), None), RunDone)

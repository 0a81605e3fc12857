"""Experiment trackers, through accelerate: what a run's events say in numbers, with the round as the step. Off by default."""

import importlib.util
import math
import re
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any

from fedex_lora.config import Config, flat
from fedex_lora.errors import UsageError
from fedex_lora.runs.emit import Emit
from fedex_lora.storage.events import ClientDone, Event, HeldOut, RoundDone, Started, Warned
from fedex_lora.storage.run_folder import TRACKERS

PROJECT, FOLDER = "fedex-lora", TRACKERS


def scalars(event: Event) -> tuple[int, dict[str, float]]:
    """The round and the numbers of one event.

    Example:
        >>> scalars(RoundDone(round=2, metrics={"accuracy": 0.5}, bytes_down=9, bytes_up=7))
        (2, {'eval/accuracy': 0.5, 'round/bytes_down': 9, 'round/bytes_up': 7})
    """
    found: dict[str, Any] = {}
    if isinstance(event, Started | RoundDone | HeldOut):
        found |= {f"{'held_out' if isinstance(event, HeldOut) else 'eval'}/{name}": value for name, value in event.metrics.items()}
    if isinstance(event, RoundDone):
        found |= {f"round/{name}": value for name, value in event.fields().items() if name not in ("round", "time")}
    if isinstance(event, ClientDone):
        client = re.sub(r"[^\w.-]", "_", event.client)
        found |= {f"client_{client}/{name}": getattr(event, name) for name in ("train_loss", "seconds", "bytes_up")}
    finite = {name: value for name, value in found.items() if isinstance(value, int | float) and math.isfinite(value)}
    return getattr(event, "round", None) or 0, finite


class Trackers:
    """An `Emit` that tells the configured trackers; a context, so that they are closed however the run ends.

    A round's numbers are sent when the next one is done (the clients measure a round's model in the next), in the order of the rounds,
    which some trackers insist on. They are opened before anything is trained; one that fails later is told nothing more; the run goes on.

    Args:
        config: the run; `config.trackers` names them.
        out: the run folder; its name is the run's, and trackers with files write into `out/trackers`.
        emit: told of a tracker that failed, as a `warning`.

    Raises:
        UsageError: one of them is not installed (nothing has been written then), or, as a context, cannot be opened.
    """

    def __init__(self, config: Config, out: Path, emit: Emit) -> None:
        for name in config.trackers:
            if importlib.util.find_spec(name) is None:
                raise UsageError(f"trackers: {name} is not installed: pip install {name}, or remove it from trackers")
        self._config, self._out, self._emit = config, out, emit
        self._open: dict[str, Any] = {}
        self._waiting: dict[int, dict[str, float]] = {}

    def __enter__(self) -> "Trackers":
        found = (self._out / FOLDER).exists()
        for name in self._config.trackers:
            try:
                self._open[name] = _opened(name, self._config, self._out)
            except Exception as error:
                self.__exit__(None, None, None)
                if not found:
                    shutil.rmtree(self._out / FOLDER, ignore_errors=True)
                raise UsageError(
                    f"trackers: {name} cannot be opened: {_line(error)}: mend its address, or remove it from trackers"
                ) from None
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._send(math.inf)
        for name in list(self._open):
            self._try(name, "finish")

    def __call__(self, event: Event) -> None:
        """Take up one event."""
        if not self._config.trackers:
            return
        number, values = scalars(event)
        if values:
            self._waiting.setdefault(number, {}).update(values)
        if isinstance(event, RoundDone):
            self._send(number)

    def _send(self, before: float) -> None:
        """Send the rounds before this one."""
        for number in sorted(number for number in self._waiting if number < before):
            values = self._waiting.pop(number)
            for name in list(self._open):
                self._try(name, "log", values, step=number)

    def _try(self, name: str, what: str, *args: Any, **options: Any) -> None:
        """Whatever a tracker does, the run goes on."""
        try:
            getattr(self._open[name], what)(*args, **options)
        except Exception as error:
            del self._open[name]
            self._emit(Warned(message=f"tracker {name} failed and is told nothing more: {_line(error)}"))


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _opened(name: str, config: Config, out: Path) -> Any:
    """A tracker of accelerate, started, with the run's settings."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    folder = out / FOLDER
    folder.mkdir(exist_ok=True)
    tree = flat(config.model_dump(mode="json", exclude_none=True))
    settings = {key: value if isinstance(value, bool | int | float | str) else str(value) for key, value in tree.items()}
    arguments: dict[str, dict[str, Any]] = {
        "tensorboard": {"run_name": name, "logging_dir": folder},
        "mlflow": {"experiment_name": PROJECT, "run_name": out.name},
        "wandb": {"run_name": PROJECT, "name": out.name, "dir": folder, "config": settings},
        "trackio": {"run_name": PROJECT, "name": out.name, "config": settings},
    }
    tracker = LOGGER_TYPE_TO_CLASS[name](**arguments[name])
    tracker.start()
    if "config" not in arguments[name]:
        tracker.store_init_configuration(settings)
    return tracker

"""One run into its folder: begun or gone on with, round by round, in this process or wherever its home is."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from fedex_lora.aggregation import get_method
from fedex_lora.client.arguments import spare_devices
from fedex_lora.config import Config, flat, read_config, write_config
from fedex_lora.config.run import ADMISSION
from fedex_lora.errors import FedexLoraError, UsageError
from fedex_lora.runs.emit import Emit, log_to
from fedex_lora.runs.global_state import alone, undone
from fedex_lora.runs.privacy import noise_warning, start_warning
from fedex_lora.runs.round_loop import Federation, handed_on, run_rounds
from fedex_lora.runs.simulation import LocalSimulation
from fedex_lora.runs.trackers import Trackers
from fedex_lora.server.checkpoint import last_checkpoint, require_space
from fedex_lora.storage.events import Event, Finished, Resumed, RoundDone, Started, Warned, is_over, of_kind, read_events, record
from fedex_lora.storage.files import write_text, writing_failed
from fedex_lora.storage.run_folder import CONFIG, EVENTS, barely_begun, locked, not_begun_removed, remove_temporaries, run_rounds_of, strays
from fedex_lora.types import ServerState


class Home(Protocol):
    """Where a run lives: `LocalSimulation`, or the server of a deployment."""

    def require(self, out: Path) -> None: ...
    def initial(self) -> ServerState: ...
    def federation(self) -> Federation: ...
    def remember_in(self, out: Path) -> None: ...


def run(config: Config, out: Path, emit: Emit, resume: bool = False, home: Callable[[Config, Emit], Home] = LocalSimulation) -> ServerState:
    """One whole run into the run folder `out`; in this process, unless another home is given.

    Args:
        config: the run.
        out: the run folder.
        emit: told of everything.
        resume: go on with what `out` holds, if anything: the last whole round, and the answers of clients that finished in the next one.
            A run that is done goes on, too, where the configuration has more rounds.
        home: makes the place where the run lives.

    Raises:
        UsageError: `out` is not empty; with `resume`, it holds no run, another run, or one that another process is at work on. Or another
            thread of this process runs.
        FedexLoraError: see `run_rounds`, and the home; or `out` cannot be written.
        OSError: what is none of `out`'s: a connection, a file of the rows.
    """
    resolved = write_config(config)
    before = {path.name for path in out.iterdir()} if out.is_dir() else None
    if (found := out.exists() and before != set()) and not resume:
        raise UsageError(f"{out} exists and is not empty: give another out, remove it, or resume it")
    if found:
        _require_run(out, config)
    with alone(), undone():
        trackers = Trackers(config, out, emit)
        place = home(config, emit)
        place.require(out)
        facts = place.federation().facts
        _require_base(out, facts, config)
        require_space(out, facts["disk_bytes"])
        try:
            out.mkdir(parents=True, exist_ok=True)
            with locked(out), trackers:
                remove_temporaries(out)
                with not_begun_removed(out, before):
                    write_text(out / CONFIG, resolved)
                    return _resume_or_start(config, place, out, log_to(out / EVENTS, emit, trackers))
        except OSError as error:
            if not writing_failed(error, out):
                raise
            raise FedexLoraError(f"cannot write to {out}: {error.strerror}: give another out, or mend it and resume") from None


def _require_run(out: Path, config: Config) -> None:
    """`out` is the folder of a run with this configuration."""
    if barely_begun(out):
        return  # killed before anything was in its place
    if not _is_run(out):
        raise UsageError(f"{out} holds something that is no run: give another out")
    if (rounds := run_rounds_of(out)) and config.rounds < (done := int(rounds[0].name)):
        raise UsageError(f"{out} has {done} rounds already, and rounds = {config.rounds}: give rounds = {done} or more")
    begun = read_config(out / CONFIG)
    if config.rounds != begun.rounds and "run" in (config.local.schedule, begun.local.schedule):
        raise UsageError(
            f'{out} has {begun.rounds} rounds, over which local.schedule = "run" spreads the learning rate: with {config.rounds} they '
            "would have been other rounds: give as many, or another out"
        )
    if config.rounds != begun.rounds and begun.privacy.is_on:
        raise UsageError(
            f"{out} has {begun.rounds} rounds, over which privacy.epsilon = {begun.privacy.epsilon:g} was spread: more would spend more: "
            "begin another run from its result by base.start, which the ledger charges by itself"
        )
    here, there = _bits(config), _bits(begun)
    if odd := next((key for key in here | there if here.get(key) != there.get(key)), None):
        yours, theirs = (f"{keys[odd]!r}" if odd in keys else "unset" for keys in (here, there))
        raise UsageError(
            f"{out} is a run with another configuration ({odd}: yours {yours}, the run's {theirs}): "
            f"go on with {out / 'config.toml'}, or give another out"
        )


def _require_base(out: Path, facts: Mapping[str, Any], config: Config) -> None:
    """The rounds of `out` were trained on this base, with this tokenizer, from this start."""
    events = read_events(out / EVENTS) if (out / EVENTS).exists() else []
    begun = list(of_kind(events, Started))
    kept = get_method(config.method).lora  # of the whole model, which is trained, the rounds have all
    if kept and any(one.base_fingerprint not in ("", facts.get("base_fingerprint", "")) for one in begun):
        raise UsageError(f"{out} was trained on another base than {config.base.model} is now: give the one it began with, or another out")
    if any(one.base_identity not in ("", facts.get("base_identity", "")) for one in begun):
        raise UsageError(f"{out} began with another tokenizer, or another base.start, than there is now: give those, or another out")


def _is_run(out: Path) -> bool:
    """Has it the configuration and the events of a run? One that was killed in between left its configuration, as we write it, alone."""
    mark = out / CONFIG
    if not mark.is_file() or (out / EVENTS).is_file():
        return mark.is_file()
    return not strays(out) and mark.read_text(encoding="utf-8") == write_config(read_config(mark))


def _bits(config: Config) -> dict[str, Any]:
    """What makes a run's bits, by dotted keys: without how long it goes, whose updates count, what is kept and what pays."""
    free: Any = {**ADMISSION, "privacy": {"budget", "ledger"}, "rounds": True, "keep_rounds": True, "trackers": True}
    return flat(config.model_dump(mode="json", exclude_none=True, exclude=free))


def _other_parties(events: Sequence[Event], clients: Iterable[str]) -> str:
    """Who is gone and who is new, where a run goes on with other parties than it began with, as over Flower it may; else nothing."""
    began = [set(one.clients) for one in of_kind(events, Started)] or [set(clients)]
    changes = {"gone": began[-1].difference(clients), "new": set(clients) - began[-1]}
    said = "; ".join(f"{word}: {', '.join(sorted(names))}" for word, names in changes.items() if names)
    return said and f"the run goes on with other parties than it began with: {said}"


def _other_machine(events: Sequence[Event], facts: Mapping[str, Any]) -> str:
    """What may make other bits, where a run goes on with other threads, on another device or with other libraries; else nothing."""
    began: Any = next(reversed(of_kind(events, Started)), {})
    before, now = (
        {**one.get("versions", {}), "torch_threads": one.get("torch_threads"), "device": one.get("device")} for one in (began, facts)
    )
    said = "; ".join(f"{key} {was}, now {now[key]}" for key, was in before.items() if was and now.get(key) not in (None, was))
    return said and f"the run goes on elsewhere than it began, so its next bits may be others ({said})"


def _resume_or_start(config: Config, place: Home, out: Path, emit: Emit) -> ServerState:
    """The rounds that are not there yet; all of them in a new folder."""
    checkpoint, complaints = last_checkpoint(out)
    for complaint in complaints:
        emit(Warned(message=f"a broken round was set aside: {complaint}"))
    if spare := spare_devices(config):
        emit(Warned(message=spare))
    events = read_events(out / EVENTS) if (out / EVENTS).exists() else []
    if checkpoint is not None:
        number = checkpoint.state.round
        if is_over(events) and number == config.rounds and handed_on(out, number):
            emit(Finished(rounds=number))
            return checkpoint.state
        emit(Resumed(round=number + 1, rounds=config.rounds))
        if not any(isinstance(event, RoundDone) and event.round == number for event in events):
            emit(record("round_done", **checkpoint.done))
    place.remember_in(out)
    begun, there = checkpoint or place.initial(), place.federation()
    for others in filter(None, (_other_parties(events, there.clients), _other_machine(events, there.facts))):
        emit(Warned(message=others))
    if isinstance(begun, ServerState):
        said = [noise_warning(config, begun.adapter, there.clients), start_warning(config, there.facts.get("start", {}))]
        for warning in filter(None, said):
            emit(Warned(message=warning))
    return run_rounds(config, begun, there, out, emit)

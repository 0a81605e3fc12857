"""What `run` says before a run and after it."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from rich.console import Console

from fedex_lora.aggregation import get_method
from fedex_lora.aggregation.growth import growth
from fedex_lora.cli._shared import print_json
from fedex_lora.cli.console import Display
from fedex_lora.config import Config
from fedex_lora.errors import FedexLoraError
from fedex_lora.privacy.account import Account
from fedex_lora.runs.emit import Emit
from fedex_lora.runs.estimate import estimate
from fedex_lora.runs.global_state import undone
from fedex_lora.runs.private import of_one_file, spent_lines
from fedex_lora.runs.simulation import LocalSimulation
from fedex_lora.storage.events import Started, of_kind, read_events
from fedex_lora.storage.run_folder import word_of
from fedex_lora.types import ServerState


def said_before(config: Config, emit: Emit, console: Console, begins: bool = True) -> LocalSimulation:
    """The place of a run, after what it promises, and where it begins will take, was said; where the first steps fail, the run says why."""
    place, privacy = LocalSimulation(config, emit), config.privacy
    if privacy.is_on:
        promised = f"epsilon {privacy.epsilon:g} at delta {privacy.delta:g} for each client"
        console.print(f"private: {promised}, ledger {privacy.ledger}", highlight=False, markup=False)
    if twice := of_one_file(config):
        console.print(f"! task.eval = {twice!r} is trained on, too: metrics on it say nothing of other rows", highlight=False, markup=False)
    with suppress(FedexLoraError):
        for line in estimate(place).lines() if begins else ():
            console.print(line, highlight=False)
    return place


def dry_run_of(config: Config, console: Console, as_json: bool) -> None:
    """Everything before round 1, without a folder."""
    with undone(), Display(console) as display:
        place = said_before(config, display, console, begins=False)
        found = estimate(place)
    for line in found.lines():
        console.print(line, highlight=False)
    if as_json:
        print_json(vars(found))


def ending_lines(state: ServerState, out: Path, accounts: Mapping[str, Account]) -> list[str]:
    """What a private run has spent, where the model of a run is, and how large it is as one adapter."""
    lines = [*spent_lines(accounts, word_of(out, make=False)), f"final model: {out / 'final'}   check it: fedex-lora verify {out}"]
    started = next(iter(of_kind(read_events(out / "events.jsonl"), Started)), None)
    if not state.adapter or started is None or get_method(state.method).exactness == "personalised":
        return lines
    numbers = (started.total_parameters or 0) - (started.trainable_parameters or 0)
    grown = growth(state.adapter, state.base_delta, state.round, numbers, int(started.start.get("base_rank", 0)))
    return [*lines, f"{grown.line()}; see fedex-lora export --help"]

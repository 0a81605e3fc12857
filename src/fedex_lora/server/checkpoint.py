"""What a server needs to go on after a round, beside the result folder of the round: one file in it, written with it in one step."""

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from torch import Tensor

from fedex_lora.aggregation import get_method
from fedex_lora.config import Config
from fedex_lora.errors import StorageError
from fedex_lora.protocol.delta_sync import Log
from fedex_lora.server.registry import Books
from fedex_lora.storage.result import DELTA, read_result
from fedex_lora.storage.run_folder import run_rounds_of
from fedex_lora.storage.tensors import Tensors, deltas_of, load_delta, load_tensors, moving_tensors
from fedex_lora.types import Delta, LoRAPair, LowRank, MovingDense, MovingLowRank, ServerState, adapter_from, factors_of, scalings_of

FILE = "server.safetensors"


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The server between two rounds.

    Attributes:
        state: after the round.
        books: what it remembers of its clients.
        held_out: round -> the clients' own metrics.
        done: the fields of the round's event `round_done`.
        skipped: the rounds so far without a mean.
    """

    state: ServerState
    books: Books = field(default_factory=Books)
    held_out: Mapping[int, dict[str, float]] = field(default_factory=dict)
    done: Mapping[str, Any] = field(default_factory=dict)
    skipped: Sequence[int] = ()


def to_file(checkpoint: Checkpoint) -> Tensors:
    """What the result folder does not hold: the log, kept factors, and exact scalings (PEFT's alpha / r rounds them), in their order."""
    state, books, log = checkpoint.state, checkpoint.books, checkpoint.books.log
    tensors: dict[str, Tensor] = {}
    for number, gains in log.gains.items():
        for module, gain in gains.items():
            tensors |= {f"log|{number}|{module}|U": gain.U, f"log|{number}|{module}|V": gain.V}
    for number, past in log.adapters.items():
        tensors |= {name: tensor.clone() for name, tensor in factors_of(f"past{number}", past).items()}  # rounds may share them
    tensors |= {f"moving|{name}": tensor for name, tensor in moving_tensors(_moving(state.base_delta)).items()}
    tensors |= {f"velocity|{name}": tensor for name, tensor in state.velocity.items()}
    for index, adapter in enumerate(state.personal.values()):
        tensors |= factors_of(f"personal{index}", adapter)
    about = {
        "seed": state.seed,
        "adapter": scalings_of(state.adapter),
        "base_delta": list(state.base_delta),
        "other": list(state.other),
        "personal": [[client, scalings_of(adapter)] for client, adapter in state.personal.items()],
        "log": {str(number): list(gains) for number, gains in log.gains.items()},
        "whole": log.whole,
        "past": [[number, scalings_of(past)] for number, past in log.adapters.items()],
        "halts": list(log.halts),
        "version": books.version,
        "changed": books.changed,
        "lost": sorted(books.lost),
        "accepted": books.accepted,
        "told": books.told,
        "held_out": [[number, metrics] for number, metrics in checkpoint.held_out.items()],
        "done": checkpoint.done,
        "skipped": list(checkpoint.skipped),
    }
    return tensors, {"server": json.dumps(about)}


def load_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint in a round's result folder.

    Raises:
        StorageError: something is missing or altered.
    """
    result = read_result(folder)
    tensors, metadata = load_tensors(folder / FILE)
    try:
        about = json.loads(metadata["server"])
        adapter = {module: LoRAPair(A=pair.A, B=pair.B, scaling=about["adapter"][module]) for module, pair in result.adapter.items()}
        gains = {
            int(number): {
                module: LowRank(U=tensors[f"log|{number}|{module}|U"], V=tensors[f"log|{number}|{module}|V"]) for module in modules
            }
            for number, modules in about["log"].items()
        }
        personal = {
            client: adapter_from(f"personal{index}", scalings, tensors) for index, (client, scalings) in enumerate(about["personal"])
        }
        state = ServerState(
            method=result.manifest["method"],
            round=int(result.manifest["round"]),
            adapter={module: adapter[module] for module in about["adapter"]},
            base_delta=_base_delta(result.base_delta, about["base_delta"], tensors, folder),
            other={name: result.other[name] for name in about["other"]},
            seed=about["seed"],
            personal=personal,
            velocity={name.removeprefix("velocity|"): tensor for name, tensor in tensors.items() if name.startswith("velocity|")},
        )
        books = Books(
            log=Log(
                gains=gains,
                whole=about["whole"],
                adapters={number: adapter_from(f"past{number}", scalings, tensors) for number, scalings in about.get("past", ())},
                halts=tuple(about.get("halts", ())),
            ),
            version=about["version"],
            changed=about["changed"],
            lost=frozenset(about["lost"]),
            accepted=about["accepted"],
            told=about["told"],
        )
        return Checkpoint(
            state=state,
            books=books,
            held_out={number: metrics for number, metrics in about["held_out"]},
            done=about["done"],
            skipped=about["skipped"],
        )
    except (KeyError, ValueError, TypeError) as error:
        raise StorageError(
            f"{folder / FILE} is not what this version writes ({error!r}): resume with the version that began the run"
        ) from None


def _moving(base_delta: Mapping[str, Delta]) -> dict[str, Delta]:
    return {module: delta for module, delta in base_delta.items() if isinstance(delta, MovingLowRank | MovingDense)}


def _base_delta(stored: Mapping[str, Delta], order: Sequence[str], tensors: Mapping[str, Tensor], folder: Path) -> dict[str, Delta]:
    """What the base gained, in the order of the modules, with the velocities that the result folder's own file has no place for."""
    moving = deltas_of({name.removeprefix("moving|"): tensor for name, tensor in tensors.items() if name.startswith("moving|")}, folder)
    return {module: moving[module] if module in moving else stored[module] for module in order}


def load_base(folder: Path) -> dict[str, Delta]:
    """The server's base delta in a round's result folder, with its velocities.

    Raises:
        StorageError: something is missing or altered.
    """
    stored, (tensors, metadata) = load_delta(folder / DELTA), load_tensors(folder / FILE)
    try:
        return _base_delta(stored, json.loads(metadata["server"])["base_delta"], tensors, folder)
    except (KeyError, ValueError, TypeError) as error:
        raise StorageError(f"{folder / FILE} is not what this version writes ({error!r}): begin a new run") from None


def last_checkpoint(out: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint of a run that is whole; broken ones before it are renamed to NAME.broken, and what was wrong is returned."""
    complaints: list[str] = []
    for folder in run_rounds_of(out):
        try:
            return load_checkpoint(folder), complaints
        except StorageError as error:
            aside = (folder.with_name(f"{folder.name}.broken{number or ''}") for number in count())
            folder.rename(next(path for path in aside if not path.exists()))  # a round may break again
            complaints.append(str(error))
    return None, complaints


def bytes_needed(config: Config, state: ServerState, clients: int) -> int:
    """About what a run folder holds in the end, from above: rounds with their updates, base deltas and log; `final`; clients' memories."""
    row = get_method(config.method)
    taking_part = max(1, math.ceil(config.clients.fraction * clients - 1e-9))
    other = sum(tensor.numel() * tensor.element_size() for tensor in state.other.values())
    adapter = other + 4 * sum(pair.A.numel() + pair.B.numel() for pair in state.adapter.values())

    def base_delta(round: int) -> int:
        columns = (taking_part if row.residual_policy != "drop" else 0) * round + (2 * round if config.server.through_base else 0)
        return 4 * sum(min(columns * pair.rank * sum(pair.shape), math.prod(pair.shape)) for pair in state.adapter.values())

    rounds = [adapter * (1 + taking_part) + 3 * base_delta(number) for number in range(1, config.rounds + 1)]
    kept = rounds if config.keep_rounds is None else rounds[-config.keep_rounds :]
    return sum(kept) + adapter + base_delta(config.rounds) + clients * adapter * 5


def require_space(out: Path, needed: int) -> None:
    """So many bytes are free where `out` is or will be.

    Raises:
        StorageError: they are not.
    """
    there = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise StorageError(
            f"the run needs about {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free at {there}: set keep_rounds, or another --out"
        )

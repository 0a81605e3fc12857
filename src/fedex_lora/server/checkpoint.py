"""What a server needs to go on after a round, beside the result folder of the round: one file in it, written with it in one step."""

import json
import math
import shutil
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from torch import Tensor

from fedex_lora.aggregation import get_method
from fedex_lora.config import Config
from fedex_lora.errors import StorageError, UnreadableError, UnwritableError, UsageError
from fedex_lora.server.checks import participants
from fedex_lora.server.dump import base_delta_of, server_state_of, server_table
from fedex_lora.server.registry import ClientRegistry
from fedex_lora.storage.result import DELTA, read_result
from fedex_lora.storage.run_folder import run_rounds_of
from fedex_lora.storage.tensors import Tensors, load_delta, load_tensors
from fedex_lora.types import Adapter, Delta, ServerState

FILE = "server.safetensors"


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The server between two rounds.

    Attributes:
        state: after the round.
        registry: what it remembers of its clients.
        held_out: round -> the clients' own metrics.
        done: the fields of the round's event `round_done`.
        skipped: the rounds so far without a mean.
    """

    state: ServerState
    registry: ClientRegistry = field(default_factory=ClientRegistry)
    held_out: Mapping[int, dict[str, float]] = field(default_factory=dict)
    done: Mapping[str, Any] = field(default_factory=dict)
    skipped: Sequence[int] = ()


def to_file(checkpoint: Checkpoint) -> Tensors:
    """What the result folder does not hold."""
    tensors, about = server_table(checkpoint.state, checkpoint.registry, whole=False)
    about |= {"held_out": list(checkpoint.held_out.items()), "done": checkpoint.done, "skipped": list(checkpoint.skipped)}
    return tensors, {"server": json.dumps(about)}


def load_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint in a round's result folder.

    Raises:
        StorageError: something is missing or altered.
        UsageError: another version wrote it.
    """
    result, (tensors, about) = read_result(folder), _read(folder)
    try:
        state, registry = server_state_of(tensors, about, result)
        return Checkpoint(state, registry, dict(about["held_out"]), about["done"], about["skipped"])
    except (StorageError, KeyError, ValueError, TypeError) as error:
        raise _odd(folder, error) from None


def load_base_delta(folder: Path) -> dict[str, Delta]:
    """The server's base delta in a round's result folder, with its velocities.

    Raises:
        StorageError: something is missing or altered.
    """
    stored, (tensors, about) = load_delta(folder / DELTA), _read(folder)
    try:
        return base_delta_of(tensors, about, stored)
    except (KeyError, ValueError, TypeError) as error:
        raise _odd(folder, error) from None


def _read(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, metadata = load_tensors(folder / FILE)
    try:
        return tensors, dict(json.loads(metadata["server"]))
    except (KeyError, ValueError, TypeError) as error:
        raise _odd(folder, error) from None


def _odd(folder: Path, error: Exception) -> UsageError:
    """Its sums are right, so it is another version's: it is not broken, and stays where it is."""
    return UsageError(f"{folder / FILE} is not what this version writes ({error!r}): resume with the version that began the run")


def last_checkpoint(out: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint of a run that is whole; broken ones before it are renamed to NAME.broken, and what was wrong is returned.

    Raises:
        UnreadableError: one of them cannot be read now: it stays where it is.
    """
    complaints: list[str] = []
    for folder in run_rounds_of(out):
        try:
            return load_checkpoint(folder), complaints
        except UnreadableError:
            raise
        except StorageError as error:
            aside = (folder.with_name(f"{folder.name}.broken{number or ''}") for number in count())
            folder.rename(next(path for path in aside if not path.exists()))  # a round may break again
            complaints.append(str(error))
    return None, complaints


def bytes_needed(config: Config, state: ServerState, clients: int) -> int:
    """About what a run folder holds in the end, from above: rounds with their updates, base deltas and log; `final`; clients' memories."""
    taking_part = participants(config.clients.fraction, clients)
    own = 1 if get_method(config.method).client_state else 0  # what a client alone holds
    adapter, pace = adapter_bytes(state), config.server
    started = 0 if not pace.moves else 1 if pace.through_base and pace.momentum_on == "adapters" else 4  # adapters of motion and velocity
    copies = (5, 7) if pace.through_base else (3, 3)  # the base delta, the one before, the log; that with its velocity, the last change
    last = config.rounds
    first = 1 if config.keep_rounds is None else max(1, last - config.keep_rounds)  # and the best of the older ones

    def gained(round: int) -> int:
        return gained_bytes(config, state.adapter, taking_part, round, copies)

    full = bisect_left(range(last + 1), gained(last), key=gained)  # from here on all of it is matrices
    sizes = sum(map(gained, range(first, full))) + (last + 1 - max(first, full)) * gained(last)
    rounds = (last + 1 - first) * adapter * (1 + started + taking_part * (1 + own)) + sizes
    return rounds + adapter + gained_bytes(config, state.adapter, taking_part, last) + clients * adapter * (5 + own)


def adapter_bytes(state: ServerState) -> int:
    """Of the factors and of what is trained whole."""
    other = sum(tensor.numel() * tensor.element_size() for tensor in state.other.values())
    return other + 4 * sum(part.numel() for pair in state.adapter.values() for part in {**pair.parts, "B": pair.B}.values())


def gained_bytes(config: Config, adapter: Adapter, taking_part: int, rounds: int, copies: tuple[int, int] = (1, 1)) -> int:
    """What the base has gained after so many rounds, from above: factors, or the matrix where that is smaller, each in so many copies."""
    row = get_method(config.method)
    products = taking_part * (2 if row.client_state else 1) if row.residual_policy != "drop" else 0  # two, where the start is their own
    columns = rounds * (products + (2 if config.server.through_base else 0))
    sizes = ((columns * pair.rank * sum(pair.shape), math.prod(pair.shape)) for pair in adapter.values())
    return 4 * sum(copies[0] * factors if factors < matrix else copies[1] * matrix for factors, matrix in sizes)


def require_space(out: Path, needed: int) -> None:
    """So many bytes are free where `out` is or will be.

    Raises:
        UnwritableError: they are not.
    """
    there = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise UnwritableError(
            f"the run needs about {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free at {there}: set keep_rounds, or another out"
        )

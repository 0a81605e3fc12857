"""What server momentum costs: how fast the base delta grows, memory, the time of a step and of a side path, bytes for who was absent.

    python benchmarks/bench_momentum.py [--size 576] [--clients 3] [--rank 8] [--rounds 30] [--out results.json]

Clients move at random. "Appended" is the plain way, in which each round appends b times the last change to the factors of D: it is counted,
not run. Times are medians of ratios, side by side.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_catch_up import trained
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fedex_lora import ClientUpdate, LoRAPair
from fedex_lora.aggregation import server_state as server
from fedex_lora.aggregation.lowrank import parts
from fedex_lora.config import Messages, ServerOptimizer
from fedex_lora.protocol.delta_sync import CatchUp, Log, lacking
from fedex_lora.types import Delta, Dense, ServerState

PACES = {"at rest": ServerOptimizer(), "momentum": ServerOptimizer(momentum=0.5)}


def numbers(delta: Delta) -> int:
    """That are kept in memory: of D and of what its velocity needs."""
    own = {id(tensor): tensor.numel() for tensor in parts(delta).values()}
    return sum(own.values()) + (0 if isinstance(delta, Dense) or "left" not in parts(delta) else delta.U.numel())


def travels(message: CatchUp) -> int:
    gains = [part for log in message.log.values() for part in log.values()] + [*message.gain.values(), *message.snapshot.values()]
    return sum(part.numel for part in gains) + sum(p.A.numel() + p.B.numel() for past in message.adapters.values() for p in past.values())


def seconds(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def side(delta: Delta, x: Tensor) -> Tensor:
    """What a side path adds."""
    return x @ delta.W.T if isinstance(delta, Dense) else (x @ delta.V.T) @ delta.U.T


def appended(rounds: int, clients: int, rank: int, size: int) -> int | None:
    """The round in which D is a matrix where changes are appended: `q_t = q_(t-1) + (k-1) r + (change of t-1)`."""
    columns, change = 0, 0
    for number in range(1, rounds + 1):
        gain = (clients - 1) * rank + change
        columns, change = columns + gain, gain + 2 * rank
        if columns * 2 >= size:
            return number
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("size", 576), ("clients", 3), ("rank", 8), ("rounds", 30)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, help="also write the JSON there")
    options = parser.parse_args()
    generator, size = torch.Generator().manual_seed(0), options.size
    first = LoRAPair(torch.randn(options.rank, size, generator=generator) / size**0.5, torch.zeros(size, options.rank), 2.0)
    states: dict[str, ServerState] = {name: server.init({"m": first}, {}) for name in PACES}
    x, table, results = torch.randn(64, size), Table("round", "", "columns of D", "MB", "step", "side path", "absent for 2"), []
    logs = {name: Log() for name in PACES}
    for number in range(1, options.rounds + 1):
        took: dict[str, float] = {}
        for name, pace in PACES.items():
            state = states[name]
            updates = [ClientUpdate(str(index), trained(state.adapter, generator), 1) for index in range(options.clients)]
            made: list[Any] = []
            took[name] = statistics.median(
                seconds(lambda: made.append(server.step(state, updates, pace=pace)))  # noqa: B023 (called at once)
                for _ in range(5)
            )
            after, result = made[0]
            log = logs[name]
            past = {**log.adapters, state.round: state.adapter} if pace.moves and state.round else {}
            logs[name], states[name] = Log(gains={**log.gains, number: result.residual}, adapters=past), after
        deltas = {name: state.base_delta["m"] for name, state in states.items()}
        ways = {name: statistics.median(seconds(lambda: side(delta, x)) for _ in range(25)) for name, delta in deltas.items()}  # noqa: B023
        for name, pace in PACES.items():
            delta = deltas[name]
            message = lacking(logs[name], states[name].base_delta, max(0, number - 3), number, Messages(), pace.moves)
            row = {
                "round": number,
                "server": name,
                "columns": None if isinstance(delta, Dense) else delta.rank,
                "megabytes": 4 * numbers(delta) / 1e6,
                "step_ratio": took[name] / took["at rest"],
                "side_path_ratio": ways[name] / ways["at rest"],
                "absent_for_two": travels(message),
            }
            results.append(row)
            if number in (1, 4, 8, 12, 16, 20, options.rounds):
                columns = "a matrix" if row["columns"] is None else str(row["columns"])
                ratios = (f"{row[key]:.2f}" for key in ("step_ratio", "side_path_ratio"))
                table.add_row(str(number), name, columns, f"{row['megabytes']:.2f}", *ratios, f"{row['absent_for_two']:,}")
    when = {name: next((row["round"] for row in results if row["server"] == name and row["columns"] is None), None) for name in PACES}
    when["appended"] = appended(options.rounds, options.clients, options.rank, size)
    Console().print(table, "D is a matrix from round", when)
    if options.out:
        options.out.write_text(
            json.dumps({"options": vars(options) | {"out": None}, "matrix_from": when, "rows": results}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()

"""What a client is sent that missed rounds.

    python benchmarks/bench_catch_up.py [--size 768] [--clients 5] [--rank 4] [--rounds 60] [--out results.json]

Clients move at random from what they start with (the worst case for recompression: no residual lies in the span of another). For a
client that missed the last m rounds: numbers of the log, of the recompressed gain, of the snapshot, what the server chooses, how
long choosing takes, and how far the client's D is from the server's.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fedex_lora import ClientUpdate, LoRAPair
from fedex_lora.aggregation import server_state as server
from fedex_lora.aggregation.lowrank import linear_combination
from fedex_lora.config import Messages
from fedex_lora.exactness.algebra import norm
from fedex_lora.protocol.delta_sync import CatchUp, Log, ModelCopy, caught_up, lacking
from fedex_lora.types import Adapter, Delta


def trained(adapter: Adapter, generator: torch.Generator) -> Adapter:
    return {
        name: LoRAPair(
            pair.A + 0.1 * torch.randn(pair.A.shape, generator=generator) / pair.A.shape[1] ** 0.5,
            pair.B + 0.1 * torch.randn(pair.B.shape, generator=generator) / pair.B.shape[1] ** 0.5,
            pair.scaling,
        )
        for name, pair in adapter.items()
    }


def distance(got: Delta, want: Delta) -> float:
    return norm(linear_combination([(1.0, got), (-1.0, want)])) / norm(want)


def numbers(message: CatchUp) -> int:
    parts = [part for gains in message.log.values() for part in gains.values()] + [*message.gain.values(), *message.snapshot.values()]
    return sum(part.numel for part in parts)


def form(message: CatchUp) -> str:
    return "gain" if message.gain else "snapshot" if message.snapshot else "log"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("size", 768), ("clients", 5), ("rank", 4), ("rounds", 60)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, help="also write the JSON there")
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(options.rank, options.size, generator=generator) / options.size**0.5
    state = server.init({"m": LoRAPair(A, torch.zeros(options.size, options.rank), 2.0)}, {})
    log, copies = Log(), {0: ModelCopy()}
    for number in range(1, options.rounds + 1):
        updates = [ClientUpdate(f"c{i:03d}", trained(state.adapter, generator), 10 + i) for i in range(options.clients)]
        state, result = server.step(state, updates)
        log = Log(gains={**log.gains, number: result.residual})
        copies[number] = caught_up(copies[number - 1], lacking(log, state.base_delta, number - 1, number, Messages(catch_up="log")), {})
    rows: list[dict[str, Any]] = []
    for missed in (m for m in (1, 2, 5, 10, 20, 30, 40, options.rounds) if m <= options.rounds):
        since = options.rounds - missed
        began = time.perf_counter()
        sent = lacking(log, state.base_delta, since, state.round, Messages())
        seconds = time.perf_counter() - began
        whole = lacking(log, state.base_delta, since, state.round, Messages(catch_up="log"))
        error = distance(caught_up(copies[since], sent, {}).delta["m"], state.base_delta["m"])
        row = {"missed": missed, "log": numbers(whole), "snapshot": state.base_delta["m"].numel, "sent": numbers(sent), "form": form(sent)}
        rows.append(row | {"seconds": seconds, "error": error})
    table = Table(*rows[0], title=f"rounds missed: {options.size} x {options.size}, {options.clients} clients, r = {options.rank}")
    for row in rows:
        table.add_row(*(f"{one:.3g}" if isinstance(one, float) else f"{one:,}" if isinstance(one, int) else one for one in row.values()))
    Console(width=140).print(table)
    if options.out:
        facts = {"threads": torch.get_num_threads(), "torch": torch.__version__, **{k: v for k, v in vars(options).items() if k != "out"}}
        options.out.write_text(json.dumps({"facts": facts, "missed": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

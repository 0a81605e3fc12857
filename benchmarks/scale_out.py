"""Beyond one machine: bytes, server time and memory for 10 to 100,000 clients, for every method, on paper and by simulation.

    python benchmarks/scale_out.py [--out benchmarks/results/scale_out.json]

Counted: the messages of every method for 3 and 10 clients over four rounds, by the library's own wire format, against the formulas of
`Method.message_size`; FedEx's against the floor krN, and the paper's (k+1) r N.
Measured: `server.step` of single modules for a few dozens or hundreds of clients, and decoding an update, in this run.
Extrapolated: everything beyond. For each method and model, seconds of a module = a + b x numbers that arrive + c x floating-point
operations (of QR and SVD where the method cuts, of the dense product where what the base gains has more numbers than the matrix), fitted to
the measured points with a, b, c >= 0; one more point is measured and not fitted, and `check` is predicted over measured there. Bytes beyond
10 clients follow from the formulas. Memory is that of what must be there at once: the updates of all clients, the result, the base delta.
A tree has regional servers that each sum up `--fan-in` clients or servers, and send on their mean factors and what its base gains.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls

from fedex_lora import METHODS, ClientUpdate, LoRAPair
from fedex_lora.aggregation import Method
from fedex_lora.aggregation import server_state as server
from fedex_lora.aggregation.core_pair import CorePair
from fedex_lora.config import Rules
from fedex_lora.protocol.delta_sync import CatchUp
from fedex_lora.protocol.frame import split
from fedex_lora.protocol.messages import Body, Download, decode_update, encode_update
from fedex_lora.protocol.records import Request
from fedex_lora.server.server import Server
from fedex_lora.types import Adapter

CLIENTS = (10, 100, 1_000, 10_000, 100_000)
NAMES = [name for name, row in METHODS.items() if row.lora and not row.centralised]
CUTS = ("fedex-best", "fedex-svd", "flexlora")  # by an SVD of all clients' factors
Shape = tuple[int, int]


@dataclass(frozen=True)
class Model:
    """Shapes of its modules (out, in) with their number, the rank; (shape, clients) that are measured, and that are predicted to check."""

    shapes: dict[Shape, int]
    rank: int
    measured: tuple[tuple[Shape, int], ...]
    check: tuple[Shape, int]


SQUARE, LOW, HIGH, WIDE, TALL = (768, 768), (1024, 3072), (3072, 3072), (3072, 8192), (8192, 3072)
MODELS = {
    "RoBERTa-base q, v, r=4": Model({SQUARE: 24}, 4, tuple((SQUARE, k) for k in (2, 8, 32, 128, 256)), (SQUARE, 192)),
    "Llama-3.2-3B all linear, r=32": Model(
        {HIGH: 56, LOW: 56, TALL: 56, WIDE: 28}, 32, (*((LOW, k) for k in (2, 4, 8, 16, 40)), (TALL, 2), (TALL, 6)), (HIGH, 12)
    ),
}


def first_adapter(shape: Shape, rank: int, modules: int, core: bool = False) -> Adapter:
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(modules, rank, shape[1], generator=generator) / shape[1] ** 0.5

    def pair(index: int) -> LoRAPair:
        if core:
            return CorePair(A[index], 2.0, U=torch.eye(shape[0], rank), C=torch.zeros(rank, rank))
        return LoRAPair(A[index], torch.zeros(shape[0], rank), 2.0)

    return {f"layer.{index}.module": pair(index) for index in range(modules)}


def trained(adapter: Adapter, part: str, generator: torch.Generator) -> Adapter:
    """The factors after local training: a random step in those that are trained."""

    def moved(x: torch.Tensor, which: str) -> torch.Tensor:
        return x + 0.1 * torch.randn(x.shape, generator=generator) / max(x.shape) ** 0.5 if which in part else x

    def changed(pair: LoRAPair) -> LoRAPair:
        for which, tensor in pair.parts.items():
            pair = pair.with_part(which, moved(tensor, which))
        return pair

    return {name: changed(pair) for name, pair in adapter.items()}


def tensor_bytes(payload: bytes) -> int:
    """Of a message's body, without its header."""
    _, body = split(payload, len(payload))
    return len(body) - 8 - int.from_bytes(body[:8], "little")


def counted(name: str, k: int, shape: Shape = SQUARE, rank: int = 4, modules: int = 2, rounds: int = 4) -> dict[str, float]:
    """Bytes of one client's messages in a later round (the mean of the last two), as they were sent, and what the formulas say."""
    row, clients, generator = METHODS[name], [f"client-{index:03d}" for index in range(k)], torch.Generator().manual_seed(1)
    rules = Rules(method=row.name)
    central = Server(rules, server.init(first_adapter(shape, rank, modules, row.core), {}, row.name), clients)
    own, sums = dict[str, Adapter](), dict.fromkeys(("down", "up", "headers"), 0)
    for number in range(1, rounds + 1):
        round, updates, left = central.open_round(clients), [], row.withheld(number)
        for client in clients:
            start, _ = server.start_of(row.name, central.state.adapter, None, own.get(client))
            update = ClientUpdate(client, trained(start, row.trained(number), generator), 10)
            own |= {client: update.adapter} if row.client_state else {}
            request = Request(kind="train", run=central.run, round=number, client=client)
            payload, sent = encode_update(update, request, row.name, number - 1, left), round.messages[client]
            updates.append(central.receive(client, payload).update)
            if number > rounds - 2:
                parts = {"down": tensor_bytes(sent), "up": tensor_bytes(payload)}
                parts["headers"] = len(sent) + len(payload) - sum(parts.values())
                sums = {key: sums[key] + value for key, value in parts.items()}
        round.close(updates)
    down, up = travels(name, k, shape, rank)
    return {key: value / (2 * k) for key, value in sums.items()} | {"down_formula": down * modules, "up_formula": up * modules}


def travels(name: str, k: int, shape: Shape, rank: int) -> tuple[float, float]:
    """Bytes of one module to and from one client in a later round, by the formulas (the mean of two rounds)."""
    row = METHODS[name]
    truncated = rank if row.residual_policy == "truncate" else None
    numbers = [row.message_size([rank] * k, 0, shape, number, truncated) for number in (3, 4)]
    down, up = (2.0 * sum(getattr(one, way) for one in numbers) for way in ("down", "up"))  # four bytes a number, half of the sum
    return down, up


def numbers_in(k: int, shape: Shape, rank: int) -> float:
    return float(k * rank * sum(shape))


def columns_of(row: Method, k: int, shape: Shape, rank: int) -> int:
    """Columns of what the base gains."""
    columns = row.residual_rank([rank] * k, min(shape)) if row.residual_rank else 0
    return min(columns, rank) if row.residual_policy == "truncate" else columns


def flops(name: str, k: int, shape: Shape, rank: int) -> float:
    """Of what grows faster than the numbers that arrive: the SVD of all products, and the dense base delta where that is smaller."""
    columns, entries = columns_of(METHODS[name], k, shape, rank), math.prod(shape)
    dense = 2.0 * entries * columns if columns * sum(shape) >= entries else 0.0
    if name not in CUTS:
        return dense
    q = float(k * rank)
    sides = [min(q, side) for side in shape]
    qr = sum(2 * max(q, side) * p**2 - 2 / 3 * p**3 for side, p in zip(shape, sides, strict=True))
    return dense + qr + 2 * q * sides[0] * sides[1] + 20 * min(sides) ** 3


def measured_seconds(name: str, shape: Shape, k: int, rank: int) -> float:
    """`server.step` of one module."""
    row, generator = METHODS[name], torch.Generator().manual_seed(2)
    state = server.init(first_adapter(shape, rank, 1), {}, row.name)
    updates = [ClientUpdate(f"{index:06d}", trained(state.adapter, row.trained(1), generator), 10) for index in range(k)]
    seconds: list[float] = []
    while len(seconds) < 4 and sum(seconds) < 0.5:
        began = time.perf_counter()
        server.step(state, updates)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:] or seconds)


@dataclass(frozen=True)
class Cost:
    """Seconds of one module: a + b numbers + c operations; what it was fitted to, and the point that was not fitted."""

    a: float
    b: float
    c: float
    points: list[dict[str, Any]]
    check: float

    def seconds(self, name: str, k: int, shape: Shape, rank: int) -> float:
        return self.a + self.b * numbers_in(k, shape, rank) + self.c * flops(name, k, shape, rank)


def fitted(name: str, model: Model) -> Cost:
    points = [{"shape": shape, "clients": k, "seconds": measured_seconds(name, shape, k, model.rank)} for shape, k in model.measured]
    rows = [[1.0, numbers_in(p["clients"], p["shape"], model.rank), flops(name, p["clients"], p["shape"], model.rank)] for p in points]
    table, seconds = np.array(rows), np.array([p["seconds"] for p in points])
    scale = np.maximum(table.max(axis=0), 1e-300)
    solution, _ = nnls(table / scale / seconds[:, None], np.ones(len(points)))  # relative errors
    a, b, c = (float(x) for x in solution / scale)
    cost, (shape, k) = Cost(a, b, c, points, 0.0), model.check
    return replace(cost, check=cost.seconds(name, k, shape, model.rank) / measured_seconds(name, shape, k, model.rank))


def decoding() -> float:
    """Seconds a byte: an update's checksum, table and tensors, and the check that all is finite."""
    shape, modules, rank = TALL, 4, 32
    adapter = trained(first_adapter(shape, rank, modules), "AB", torch.Generator().manual_seed(3))
    request, first = Request(kind="train", run="run", round=1, client="client"), first_adapter(shape, rank, modules)
    payload = encode_update(ClientUpdate("client", adapter, 10), request, "fedex", 0)
    sent = Download(request, Body("fedex", first, {}, CatchUp(0, 0)))
    seconds = []
    for _ in range(4):
        began = time.perf_counter()
        decode_update(payload, sent)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:]) / len(payload)


def over(model: Model, of: Callable[[Shape], float]) -> float:
    """The sum over all modules."""
    return math.fsum(count * of(shape) for shape, count in model.shapes.items())


def gained(k: int, shape: Shape, rank: int) -> float:
    """Numbers of FedEx's residual of k clients: factors, or the matrix."""
    return float(min((k - 1) * rank * sum(shape), math.prod(shape)))


def scaled(name: str, k: int, model: Model, cost: Cost, decode: float) -> dict[str, Any]:
    """One method, one number of clients, one flat server."""
    down, up = (over(model, lambda shape, way=way: travels(name, k, shape, model.rank)[way]) for way in (0, 1))
    seconds = over(model, lambda shape: cost.seconds(name, k, shape, model.rank))
    base = over(model, lambda shape: 4.0 * min(math.prod(shape), columns_of(METHODS[name], k, shape, model.rank) * sum(shape)))
    result = over(model, lambda shape: 4.0 * model.rank * sum(shape)) + base
    return {
        "clients": k,
        "down_bytes": down,
        "up_bytes": up,
        "decoding_seconds": k * up * decode,
        "aggregation_seconds": seconds,
        "memory_bytes": k * up + result,
    }


def tree(k: int, fan_in: int, model: Model, cost: Cost, decode: float) -> dict[str, Any]:
    """FedEx over regional servers against one flat server: what the root receives, sends and computes, and the longest path."""
    counts, sums = [k], [1]  # servers (or clients) of each level, and clients that one of them stands for
    while counts[-1] > 1:
        counts.append(math.ceil(counts[-1] / fan_in))
        sums.append(min(k, sums[-1] * fan_in))

    def partial(clients: int) -> float:
        """Bytes that a server of so many clients sends on."""
        return over(model, lambda shape: 4 * (model.rank * sum(shape) + (gained(clients, shape, model.rank) if clients > 1 else 0)))

    def work(level: int) -> float:
        children, each = min(fan_in, counts[level - 1]), sums[level - 1]
        between = over(model, lambda shape: cost.seconds("fedex", children, shape, model.rank))
        within = over(model, lambda shape: cost.b * children * gained(each, shape, model.rank)) if each > 1 else 0.0
        return between + within + children * partial(each) * decode

    flat, top = scaled("fedex", k, model, cost, decode), len(counts) - 1
    children = min(fan_in, counts[-2])
    return {
        "clients": k,
        "levels": top,
        "servers": sum(counts[1:]),
        "flat": {
            "in_bytes": k * flat["up_bytes"],
            "out_bytes": k * flat["down_bytes"],
            "seconds": flat["decoding_seconds"] + flat["aggregation_seconds"],
            "memory_bytes": flat["memory_bytes"],
        },
        "tree": {
            "in_bytes": children * partial(sums[-2]),
            "out_bytes": children * flat["down_bytes"],
            "seconds": math.fsum(work(level) for level in range(1, top + 1)),
            "memory_bytes": children * partial(sums[-2]) + partial(k),
        },
    }


def simulated(model: Model, names: Sequence[str], fan_in: int, decode: float) -> dict[str, Any]:
    costs = {name: fitted(name, model) for name in names}
    return {
        "fits": {name: vars(cost) for name, cost in costs.items()},
        "methods": {name: [scaled(name, k, model, costs[name], decode) for k in CLIENTS] for name in names},
        "trees": [tree(k, fan_in, model, costs["fedex"], decode) for k in CLIENTS],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fan-in", type=int, default=50)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    wire = {name: {str(k): counted(name, k) for k in (3, 10)} for name in NAMES}
    decode = decoding()
    report: dict[str, Any] = {"torch": torch.__version__, "threads": torch.get_num_threads(), "fan_in": options.fan_in}
    report |= {"wire": wire, "decoding_seconds_per_byte": decode, "models": {}}
    for title, model in MODELS.items():
        report["models"][title] = simulated(model, NAMES, options.fan_in, decode)
        for name, rows in report["models"][title]["methods"].items():
            cells = [f"{row['down_bytes'] / 1e6:9.3g} {row['decoding_seconds'] + row['aggregation_seconds']:8.2g}" for row in rows]
            print(
                f"{title:30} {name:18} MB, s: {' |'.join(cells)} | check {report['models'][title]['fits'][name]['check']:.2f}", flush=True
            )
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

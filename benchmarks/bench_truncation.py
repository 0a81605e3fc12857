"""Truncating a residual (FedEx-SVD): from the factors against forming the dense matrix, side by side in one run.

    python benchmarks/bench_truncation.py [--size 4096] [--clients 100] [--rank 16] [--keep 64] [--out results.json]

    factored   `fedex_lora.aggregation.truncation.truncate`: QR of both factors, SVD of the core, fp64
    dense      R formed in fp32, `torch.linalg.svd`, first r' components: what the other packages do
    dense64    the same in fp64

Two residuals: `flat`, of clients that moved at random (the worst case), and `falling`, whose singular values fall like 1/j. Errors
are relative to `|R|_F` in fp64: `tail` is what the best approximation must leave (from the singular values of the fp64 matrix), `error`
what each way leaves, `excess` the difference. The reported tail is compared with the true one.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fedex_lora import ClientUpdate, LoRAPair, aggregate
from fedex_lora.aggregation.truncation import truncate
from fedex_lora.config import Truncation
from fedex_lora.types import LowRank


def residual(kind: str, size: int, clients: int, rank: int) -> LowRank:
    """R of clients around a common start; `falling` clients mostly move in shared directions."""
    generator = torch.Generator().manual_seed(0)
    A0, B0 = torch.randn(rank, size, generator=generator), torch.randn(size, rank, generator=generator)
    if kind == "falling":
        columns = clients * rank
        falloff = 1 / torch.arange(1, columns + 1)
        directions = (
            torch.randn(columns, size, generator=generator) * falloff[:, None].sqrt(),
            torch.randn(size, columns, generator=generator) * falloff.sqrt(),
        )
    updates = []
    for index in range(clients):
        if kind == "flat":
            dA, dB = torch.randn(A0.shape, generator=generator), torch.randn(B0.shape, generator=generator)
        else:
            mix = torch.randn(rank, clients * rank, generator=generator) / (clients * rank) ** 0.5
            dA, dB = mix @ directions[0], directions[1] @ mix.T
        updates.append(ClientUpdate(f"c{index:03d}", {"m": LoRAPair(A=A0 + 0.1 * dA, B=B0 + 0.1 * dB, scaling=1.0)}, index + 1))
    return aggregate(updates).residual["m"]


def dense(gain: LowRank, keep: int, dtype: torch.dtype) -> LowRank:
    U, S, V = torch.linalg.svd(gain.U.to(dtype) @ gain.V.to(dtype), full_matrices=False)
    return LowRank(U=U[:, :keep] * S[:keep], V=V[:keep])


def timed(run: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        result = run()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds), result


def norm(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("size", 4096), ("clients", 100), ("rank", 16), ("keep", 64), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, help="also write the JSON there")
    options = parser.parse_args()
    rows = []
    for kind in ("flat", "falling"):
        gain = residual(kind, options.size, options.clients, options.rank)
        exact = gain.dense()
        spectrum, size = torch.linalg.svdvals(exact), norm(exact)
        tail = float(spectrum[options.keep :].norm()) / size
        factored, (kept, dropped) = timed(lambda gain=gain: truncate({"m": gain}, Truncation(rank=options.keep), 1), options.repeats)
        ways = {"factored": (factored, kept["m"])}
        for name, dtype in (("dense", torch.float32), ("dense64", torch.float64)):
            ways[name] = timed(lambda gain=gain, dtype=dtype: dense(gain, options.keep, dtype), 1)
        for name, (seconds, result) in ways.items():
            error = norm(exact - result.dense()) / size
            rows.append(
                {
                    "residual": kind,
                    "way": name,
                    "seconds": seconds,
                    "times_faster_than_dense": ways["dense"][0] / seconds,
                    "tail": tail,
                    "error": error,
                    "excess": error - tail,
                    "reported_tail": dropped["m"] / size if name == "factored" else None,
                }
            )
    shape = f"{options.size} x {options.size}, {options.clients} clients, r = {options.rank}, columns {gain.rank}, keep {options.keep}"
    table = Table(*rows[0], title=f"{shape}, {torch.get_num_threads()} threads")
    for row in rows:
        table.add_row(*(value if isinstance(value, str) else "" if value is None else f"{value:.3g}" for value in row.values()))
    Console(width=160).print(table)
    if options.out:
        facts = {"threads": torch.get_num_threads(), "torch": torch.__version__, **{k: v for k, v in vars(options).items() if k != "out"}}
        options.out.write_text(json.dumps({"facts": facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Server aggregation of a whole model: the closed form against the paper's dense formula, side by side in one run.

    python benchmarks/bench_aggregation.py [--out results.json] [--repeats 7]

Three ways to make the same round's result from the same factors in memory:

    closed   `fedex_lora.aggregate`: R as factors of rank (k-1) r
    loop     the paper's formula (eq. 11-12) with one product a client: R = sum_i p_i B_i A_i - Bbar Abar, dense
    gemm     the same with one product: R = [p_1 B_1 .. p_k B_k] [A_1; ..; A_k] - Bbar Abar, dense

and `copy`, the floor, which reads all factors once and writes as many numbers as the closed form does, to memory that is kept as its
result is. Every way is run twice and the second is timed, in turns, `repeats` times; a ratio is the median of the ratios of the turns.
Memory is the peak of a fresh process, less what it had before the factors were made, over the bytes of the factors in and out (Linux only).
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fedex_lora import ClientUpdate, LoRAPair, aggregate

LLAMA = [
    ("q", 3072, 3072),
    ("k", 1024, 3072),
    ("v", 1024, 3072),
    ("o", 3072, 3072),
    ("gate", 8192, 3072),
    ("up", 8192, 3072),
    ("down", 3072, 8192),
]
MODELS = {
    "RoBERTa-base q, v, r=4": ([(name, 768, 768) for name in ("query", "value")], 12, 4),
    "Llama-3.2-3B all linear, r=32": (LLAMA, 28, 32),
}
CASES = [
    ("RoBERTa-base q, v, r=4", 3),
    ("RoBERTa-base q, v, r=4", 10),
    ("RoBERTa-base q, v, r=4", 50),
    ("Llama-3.2-3B all linear, r=32", 3),
]


def make_updates(model: str, k: int) -> list[ClientUpdate]:
    modules, layers, rank = MODELS[model]
    generator = torch.Generator().manual_seed(0)

    def pair(out: int, inner: int) -> LoRAPair:
        return LoRAPair(
            A=torch.randn(rank, inner, generator=generator) * 0.02, B=torch.randn(out, rank, generator=generator) * 0.02, scaling=2.0
        )

    return [
        ClientUpdate(
            f"client-{i:03d}", {f"{layer}.{name}": pair(out, inner) for layer in range(layers) for name, out, inner in modules}, 10 + i
        )
        for i in range(k)
    ]


def closed(updates: list[ClientUpdate]) -> None:
    aggregate(updates)


def loop(updates: list[ClientUpdate]) -> None:
    total = sum(update.num_examples for update in updates)
    p = [update.num_examples / total for update in updates]
    for name, first in updates[0].adapter.items():
        pairs = [update.adapter[name] for update in updates]
        A = sum(w * pair.A for w, pair in zip(p, pairs, strict=True))
        B = sum(w * pair.B for w, pair in zip(p, pairs, strict=True))
        M = p[0] * (first.B @ first.A)
        for w, pair in zip(p[1:], pairs[1:], strict=True):
            M += w * (pair.B @ pair.A)
        M -= B @ A
        M *= first.scaling


def gemm(updates: list[ClientUpdate]) -> None:
    total = sum(update.num_examples for update in updates)
    p = [update.num_examples / total for update in updates]
    for name, first in updates[0].adapter.items():
        pairs = [update.adapter[name] for update in updates]
        A = sum(w * pair.A for w, pair in zip(p, pairs, strict=True))
        B = sum(w * pair.B for w, pair in zip(p, pairs, strict=True))
        M = torch.cat([w * pair.B for w, pair in zip(p, pairs, strict=True)], dim=1) @ torch.cat([pair.A for pair in pairs])
        M -= B @ A
        M *= first.scaling


def copy(updates: list[ClientUpdate]) -> None:
    _kept = [factor.clone() for update in updates for pair in update.adapter.values() for factor in (pair.A, pair.B)]


WAYS: dict[str, Callable[[list[ClientUpdate]], None]] = {"closed": closed, "loop": loop, "gemm": gemm, "copy": copy}


def timed(model: str, k: int, repeats: int) -> dict[str, float]:
    """Medians of seconds, and of the ratios to the closed form turn by turn."""
    updates = make_updates(model, k)
    for way in WAYS.values():
        way(updates)
    turns: list[dict[str, float]] = []
    for _ in range(repeats):
        turn = {}
        for name, way in WAYS.items():
            way(updates)  # every way finds the caches as it leaves them, not as the way before did
            started = time.perf_counter()
            way(updates)
            turn[name] = time.perf_counter() - started
        turns.append(turn)
    seconds = {f"{name}_seconds": statistics.median(turn[name] for turn in turns) for name in WAYS}
    ratios = {f"{name}_over_closed": statistics.median(turn[name] / turn["closed"] for turn in turns) for name in WAYS if name != "closed"}
    return seconds | ratios


def peak_memory(model: str, k: int) -> float:
    """Run in a fresh process: peak memory of factors in, aggregation and result, over the bytes of factors in and out."""
    aggregate([ClientUpdate("a", {"m": LoRAPair(torch.ones(2, 4), torch.ones(4, 2))}, 1)])
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far was importing torch: forget it
    before = _status("VmRSS")
    updates = make_updates(model, k)
    result = aggregate(updates)
    pairs = [pair for update in updates for pair in update.adapter.values()] + list(result.adapter.values())
    size = sum(4 * (pair.A.numel() + pair.B.numel()) for pair in pairs) + sum(4 * gain.numel for gain in result.residual.values())
    return (_status("VmHWM") - before) / size


def _status(field: str) -> int:
    """Bytes, from /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--memory", nargs=2, metavar=("MODEL", "K"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        print(peak_memory(arguments.memory[0], int(arguments.memory[1])))
        return
    rows = []
    print(f"{'model':32} {'k':>3} {'closed':>10} {'loop/closed':>12} {'gemm/closed':>12} {'closed/copy':>12} {'memory':>8}")
    for model, k in CASES:
        repeats = arguments.repeats if "3B" not in model else min(3, arguments.repeats)
        row = {"model": model, "k": k, **timed(model, k, repeats)}
        child = subprocess.run([sys.executable, __file__, "--memory", model, str(k)], capture_output=True, text=True, check=True)
        row["peak_memory_over_factors_in_and_out"] = float(child.stdout)
        rows.append(row)
        print(
            f"{model:32} {k:3d} {1000 * row['closed_seconds']:8.1f}ms {row['loop_over_closed']:12.1f} {row['gemm_over_closed']:12.1f} "
            f"{1 / row['copy_over_closed']:12.1f} {row['peak_memory_over_factors_in_and_out']:8.2f}",
            flush=True,
        )
    if arguments.out:
        machine = {"machine": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__, "threads": torch.get_num_threads()}
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""A step of private training beside the plain one: seconds, and memory.

    python benchmarks/bench_private.py [--rows 512] [--tokens 64] [--batch 8] [--steps 12] [--turns 5] [--out results.json]

The model and the rows of `bench_training.py`: an encoder of MiniLM-L6's shapes, r = 4 on q and v, and its head. Turns alternate in one
process, and a ratio is the median of the ratios of the turns; both draw batches of the same (expected) size. Memory is the peak of a fresh
process, less what it had before it trained.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from bench_training import configuration, make_inputs
from datasets import Dataset

from fedex_lora.client.training import _trainer, silence_libraries
from fedex_lora.privacy.accounting import Mechanism, PrivacyPlan
from fedex_lora.runs.context import ModelContext
from fedex_lora.tasks import load_task


class Bench:
    """One model, trained in private or not, with the same number of steps."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        make_inputs(folder, options.rows, options.tokens)
        config = configuration(folder, options)
        config.training["max_steps"] = options.steps
        task = load_task(config.task, config.seed)
        self.place = ModelContext(config, task)
        self.rows: Dataset = self.place.work.tokens(task.train)
        mechanism = Mechanism(sigma=1.0, rate=options.batch / options.rows, steps=options.steps)
        self.plan = PrivacyPlan(mechanism, 1, options.batch, 1.0, options.rows, epsilon=0.0, delta=1e-5)

    def train(self, private: bool) -> float:
        """Seconds of all steps."""
        with _trainer(self.place.model, self.place.work, 0, self.rows, None, None, self.plan if private else None) as trainer:
            started = time.perf_counter()
            trainer.train()
            return time.perf_counter() - started


def peak(folder: Path, options: argparse.Namespace) -> float:
    """MiB that training takes beyond what was there, in this process."""
    bench, before = Bench(folder, options), psutil.Process().memory_info().rss
    bench.train(options.peak == "private")
    return float((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before) / 2**20)


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a step of each turn, and the peaks of two more processes."""
    bench = Bench(folder, options)
    for private in (False, True):
        bench.train(private)
    turns = [{name: bench.train(name == "private") / options.steps for name in ("plain", "private")} for _ in range(options.turns)]
    peaks = {}
    for name in ("plain", "private"):
        command = [sys.executable, __file__, *sys.argv[1:], "--peak", name]
        peaks[name] = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    return {
        "seconds_per_step": {name: statistics.median(turn[name] for turn in turns) for name in ("plain", "private")},
        "ratio": statistics.median(turn["private"] / turn["plain"] for turn in turns),
        "ratios": sorted(turn["private"] / turn["plain"] for turn in turns),
        "peak_mib": peaks,
        "settings": {key: value for key, value in vars(options).items() if key not in ("out", "peak")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    for name, default in (("rows", 512), ("tokens", 64), ("batch", 8), ("steps", 12), ("turns", 5), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--peak", choices=("plain", "private"))
    options = parser.parse_args()
    options.rounds, options.clients = 1, 1
    silence_libraries()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        if options.peak:
            print(peak(Path(folder), options))
            return
        found = measure(Path(folder), options)
    print(json.dumps(found, indent=1))
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Aggregation from files to files against copying the same bytes, and its memory against the number of clients.

    python benchmarks/bench_streaming.py [--out results.json] [--repeats 3] [--folder FOLDER]
    python benchmarks/bench_streaming.py --clients 250 --folder FOLDER     one round of Llama-3.2-3B shapes, 48.6 GB of files

Adapters of random numbers (fp32, all linear layers) are written to FOLDER (by default a temporary one), which is removed afterwards. Every
turn runs, one after the other:

    aggregate     `aggregate_folders`, no copies of the inputs kept, the error not measured
    copy          every byte of the inputs read once, as many bytes written as the result has, in pieces of 8 MiB; synced, as the result is
    copy, sums    the same, and a sha256 of what is written, which the result's manifest has
    audit         what measuring the error costs beside it

The inputs are in the page cache when they fit there (they were just written); with `--cold` they are dropped from it
before each way. Ratios are medians over turns. Memory is the growth of a fresh process over what it had after its imports and one small
aggregation (Linux only).
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fedex_lora.offline.aggregate_folders import aggregate_folders
from fedex_lora.storage.adapter_folder import WEIGHTS
from fedex_lora.storage.peft_rules import PREFIX
from fedex_lora.storage.safetensors_io import TensorWriter

LLAMA = {
    "self_attn.q_proj": (3072, 3072),
    "self_attn.k_proj": (1024, 3072),
    "self_attn.v_proj": (1024, 3072),
    "self_attn.o_proj": (3072, 3072),
    "mlp.gate_proj": (8192, 3072),
    "mlp.up_proj": (8192, 3072),
    "mlp.down_proj": (3072, 8192),
}
ROBERTA = {"attention.self.query": (768, 768), "attention.self.value": (768, 768)}
MODELS = {"RoBERTa-base q, v, r=4": (ROBERTA, 12, 4), "Llama-3.2-3B all linear, r=32": (LLAMA, 28, 32)}
SMALL, LARGE = MODELS
CASES = [(SMALL, 3), (SMALL, 10), (SMALL, 50), (LARGE, 3)]
PIECE = 8 * 2**20


def write_adapters(folder: Path, model: str, k: int, layers: int | None = None) -> list[Path]:
    """k adapters; their numbers come from one stream, so that no two are alike."""
    modules, depth, rank = MODELS[model]
    names = {f"model.layers.{layer}.{name}": shape for layer in range(layers or depth) for name, shape in modules.items()}
    shapes = {}
    for name, (out, inner) in names.items():
        shapes[f"{PREFIX}{name}.lora_A.weight"] = torch.float32, (rank, inner)
        shapes[f"{PREFIX}{name}.lora_B.weight"] = torch.float32, (out, rank)
    config = json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": "all-linear"})
    numbers = torch.randn(2**24, generator=torch.Generator().manual_seed(0)) * 0.02
    folders = [folder / f"client-{index:04d}" for index in range(k)]
    for index, one in enumerate(folders):
        with TensorWriter(one / WEIGHTS, shapes) as file:
            for position, (_, shape) in enumerate(shapes.values()):
                start = (7919 * (index * len(shapes) + position)) % (2**24 - shape[0] * shape[1])
                file.write(numbers[start : start + shape[0] * shape[1]])
        (one / "adapter_config.json").write_text(config)
    return folders


def copy(folders: list[Path], out: Path, written: int, sums: bool) -> None:
    """Read every input, write `written` bytes, sync."""
    buffer, total = memoryview(bytearray(PIECE)), hashlib.sha256()
    with out.open("wb", buffering=0) as target:
        for folder in folders:
            with (folder / WEIGHTS).open("rb", buffering=0) as file:
                while got := file.readinto(buffer):
                    piece = buffer[: min(got, written)]
                    written -= target.write(piece)
                    if sums:
                        total.update(piece)
        while written > 0:
            piece = buffer[: min(PIECE, written)]
            written -= target.write(piece)
            if sums:
                total.update(piece)
        os.fsync(target.fileno())


def forget(folders: list[Path]) -> None:
    """Drop the inputs from the page cache."""
    for folder in folders:
        descriptor = os.open(folder / WEIGHTS, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def turns(folder: Path, model: str, k: int, repeats: int, cold: bool) -> dict[str, Any]:
    """Medians of seconds, of the ratios to copying turn by turn, and the sizes."""
    inputs, out = write_adapters(folder, model, k), folder / "out"
    report = aggregate_folders(inputs, out, "fedex", None, None, keep_updates=False, audit="auto")
    written = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    shutil.rmtree(out)
    ways: dict[str, Callable[[], object]] = {
        "aggregate": lambda: aggregate_folders(inputs, out, "fedex", None, None, keep_updates=False, audit="none"),
        "copy": lambda: copy(inputs, out, written, sums=False),
        "copy_sums": lambda: copy(inputs, out, written, sums=True),
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            if cold:
                forget(inputs)
            started = time.perf_counter()
            way()
            taken[name].append(time.perf_counter() - started)
            shutil.rmtree(out) if out.is_dir() else out.unlink()
    over = {f"over_{name}": statistics.median(a / b for a, b in zip(taken["aggregate"], taken[name], strict=True)) for name in ways}
    return {
        **{f"{name}_seconds": statistics.median(seconds) for name, seconds in taken.items()},
        **{name: ratio for name, ratio in over.items() if name != "over_aggregate"},
        "audit_seconds": report["audit_seconds"],
        "max_relative_error": report["max_relative_error"],
        "bytes_read": sum((one / WEIGHTS).stat().st_size for one in inputs),
        "bytes_written": written,
        "dense_modules": report["dense_modules"],
        "page_cache": "cold" if cold else "warm",
    }


def memory(folder: Path, model: str, k: int) -> dict[str, float]:
    """Run in a fresh process: megabytes that it grew by, over two modules of all clients, and what it had before."""
    aggregate_folders(sorted(folder.glob("client-*"))[:1], folder / "warm", "fedex", None, None)
    shutil.rmtree(folder / "warm")
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    aggregate_folders(sorted(folder.glob("client-*")), folder / "measured", "fedex", None, None, keep_updates=False)
    shutil.rmtree(folder / "measured")
    modules, _, rank = MODELS[model]
    module = max(4 * k * rank * (out + inner) for out, inner in modules.values())
    return {"grew_mb": (status("VmHWM") - before) / 1e6, "two_modules_mb": 2 * module / 1e6, "imports_mb": before / 1e6}


def status(field: str) -> int:
    """Bytes, from /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def in_fresh_process(folder: Path, model: str, k: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", model, str(k), "--folder", str(folder)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)  # type: ignore[no-any-return]


def large(folder: Path, k: int, layers: int, audit: Any) -> dict[str, Any]:
    """One round of Llama-3.2-3B shapes, once, in this process; what it grew by, and the seconds."""
    started = time.perf_counter()
    inputs = write_adapters(folder, LARGE, k, layers)
    written = time.perf_counter() - started
    aggregate_folders(inputs[:1], folder / "warm", "fedex", None, None, keep_updates=False)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    report = aggregate_folders(inputs, folder / "out", "fedex", None, None, keep_updates=False, audit=audit)
    grew = status("VmHWM") - before
    modules, _, rank = MODELS[LARGE]
    module = max(4 * k * rank * (out + inner) for out, inner in modules.values())
    return {
        "model": LARGE,
        "k": k,
        "layers": layers,
        "seconds": report["seconds"],
        "audit_seconds": report["audit_seconds"],
        "writing_the_inputs_seconds": written,
        "max_relative_error": report["max_relative_error"],
        "dense_modules": report["dense_modules"],
        "bytes_read": sum((one / WEIGHTS).stat().st_size for one in inputs),
        "bytes_written": sum(path.stat().st_size for path in (folder / "out").rglob("*") if path.is_file()),
        "grew_mb": grew / 1e6,
        "two_modules_mb": 2 * module / 1e6,
        "imports_mb": before / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the adapters are written; by default the system's temporary folder")
    parser.add_argument("--clients", type=int, help="only one round of Llama-3.2-3B shapes with so many clients")
    parser.add_argument("--layers", type=int, default=28, help="with --clients: of so many layers only")
    parser.add_argument("--audit", default="auto", help="with --clients: auto, exact, estimate or none")
    parser.add_argument("--cold", action="store_true", help="drop the inputs from the page cache before each way")
    parser.add_argument("--measure", nargs=2, metavar=("MODEL", "K"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(memory(arguments.folder, arguments.measure[0], int(arguments.measure[1]))))
        return
    results = json.loads(arguments.out.read_text()) if arguments.out and arguments.out.exists() else {}
    results["machine"] = {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    if arguments.folder:
        arguments.folder.mkdir(parents=True, exist_ok=True)
    if arguments.clients:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            results["large"] = large(Path(folder), arguments.clients, arguments.layers, arguments.audit)
        print(json.dumps(results["large"], indent=1))
    else:
        results["rows"] = []
        print(f"{'model':32} {'k':>3} {'aggregate':>10} {'over copy':>10} {'with sums':>10} {'audit':>8} {'grew by':>10} {'2 modules':>10}")
        for model, k in CASES:
            with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
                row = {"model": model, "k": k, **turns(Path(folder), model, k, arguments.repeats, arguments.cold)}
                row |= in_fresh_process(Path(folder), model, k)
            results["rows"].append(row)
            print(
                f"{model:32} {k:3d} {row['aggregate_seconds']:9.2f}s {row['over_copy']:10.2f} {row['over_copy_sums']:10.2f} "
                f"{row['audit_seconds']:7.2f}s {row['grew_mb']:7.0f} MB {row['two_modules_mb']:7.0f} MB",
                flush=True,
            )
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

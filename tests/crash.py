"""Kill a run, again and again, and let it go on: does it end in the same bits, and leave nothing behind?

    python -m tests.crash --kills 40        # the long form: make crash
    python -m tests.crash --kills 0 --faults 60
    python -m tests.crash --every           # every operation on a file of a run of two rounds fails once

A run of three clients and six rounds works in a forked process. It is killed with SIGKILL at a random instant, or by itself right before
or after a random operation on a file (open, write, fsync, rename, remove). With --faults, one such operation fails with "no space left on
device" or "input/output error" instead: the run must stop with one of our errors, of one line, and go on afterwards.
"""

import argparse
import errno
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fedex_lora.storage.tensors as storage
from fedex_lora.config import Config, base_folder, parse_config
from fedex_lora.errors import FedexLoraError
from fedex_lora.runs.run import run
from fedex_lora.storage.run_folder import run_rounds_of
from fedex_lora.storage.tensors import load_tensors

FORK = multiprocessing.get_context("fork")
OPERATIONS = [
    (os, "fsync"),
    (os, "open"),
    (Path, "open"),
    (Path, "rename"),
    (Path, "replace"),
    (Path, "write_text"),
    (shutil, "rmtree"),
    (storage, "save_file"),
]


def configuration(rounds: int = 6) -> Config:
    return parse_config(
        {
            "rounds": rounds,
            "torch_threads": 1,
            "keep_rounds": 2,
            "base": {"model": str(base_folder())},
            "task": {"name": "demo", "train_rows": 36, "eval_rows": 9},
            "lora": {"r": 2, "alpha": 8, "target_modules": ["q_proj", "down_proj"]},
            "clients": {"partition": "column", "column": "hospital"},
            "local": {"optimizer_state": "keep"},
            "training": {"learning_rate": 5e-3, "per_device_train_batch_size": 16},
        }
    )


class Meddler:
    """Counts operations on the files of a folder, and does something at the n-th: before it, or after it."""

    def __init__(self, folder: Path, at: int, action: Callable[[], None], after: bool = False) -> None:
        self._folder, self.count, self._at, self._action, self._after = str(folder), 0, at, action, after
        for holder, name in OPERATIONS:
            setattr(holder, name, self._watched(getattr(holder, name)))

    def _watched(self, original: Any) -> Any:
        def watched(*args: Any, **options: Any) -> Any:
            ours = isinstance(args[0], int) or any(self._folder in str(arg) for arg in args if isinstance(arg, str | Path))
            self.count += ours
            mine = ours and self.count == self._at
            if mine and not self._after:
                self._action()
            result = original(*args, **options)
            if mine and self._after:
                self._action()
            return result

        return watched

    def stop(self) -> int:
        """Nothing happens any more: what follows are files of the test's own. How many operations there were."""
        self._at = 0
        return self.count


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def failing(code: int) -> Callable[[], None]:
    def fail() -> None:
        raise OSError(code, os.strerror(code))

    return fail


def attempt(config: Config, out: Path, at: int, after: bool, code: int | None) -> None:
    """In a process of its own. Exit status 0: finished; 3: one of our errors; anything else is a failure of the test."""
    meddler = Meddler(out.parent, at, kill if code is None else failing(code), after)
    try:
        run(config, out, lambda event: None, resume=True)
    except FedexLoraError as error:
        meddler.stop()
        (out.parent / "error").write_text(str(error))
        os._exit(3)
    (out.parent / "operations").write_text(str(meddler.stop()))
    os._exit(0)


def child(config: Config, out: Path, at: int = 0, after: bool = False, code: int | None = None, seconds: float | None = None) -> int:
    """Let one process work on the run; its exit status (-9: killed)."""
    process = FORK.Process(target=attempt, args=(config, out, at, after, code))
    process.start()
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
    assert process.exitcode is not None
    return process.exitcode


def contents(out: Path) -> dict[str, torch.Tensor]:
    """All tensors of the final model, and of the updates that its last round was made of."""
    found: dict[str, torch.Tensor] = {}
    updates = run_rounds_of(out)[0] / "updates"
    for path in sorted([*(out / "final").rglob("*.safetensors"), *updates.glob("*.safetensors")]):
        found |= {f"{path.relative_to(out)}/{name}": tensor for name, tensor in load_tensors(path)[0].items()}
    return found


def require_same(out: Path, reference: Path) -> None:
    """The same final bits, and the same files, no more."""
    here, there = contents(out), contents(reference)
    assert here, "no final model"
    assert here.keys() == there.keys(), "other tensors"
    odd = [name for name, tensor in here.items() if not torch.equal(tensor, there[name])]
    assert not odd, f"other bits in {odd}"
    files = [{str(path.relative_to(folder)) for path in folder.rglob("*")} for folder in (out, reference)]
    assert files[0] == files[1], f"other files: {files[0] ^ files[1]}"


def campaign(kills: int, faults: int, seed: int = 0, rounds: int = 6, tell: Callable[[str], None] = print) -> dict[str, int]:
    """Kill and resume until so many kills (and failing operations) are done; every run that ends is compared.

    Returns:
        Kills by kind, failures of operations, runs that ended.
    """
    config, rng = configuration(rounds), random.Random(seed)
    done = {"kills at an instant": 0, "kills at an operation": 0, "failed operations": 0, "runs": 0}
    with tempfile.TemporaryDirectory(prefix="fedex-lora-crash-") as folder:
        reference = Path(folder) / "reference" / "run"
        reference.parent.mkdir()
        began = time.perf_counter()
        assert child(config, reference) == 0
        took, operations = time.perf_counter() - began, int((reference.parent / "operations").read_text())
        tell(f"the whole run: {took:.1f} s, {operations} operations on files")
        while sum(done.values()) - done["runs"] < kills + faults:
            out = Path(folder) / f"{done['runs']}" / "run"
            out.parent.mkdir()
            status = 1
            while status:
                left = kills + faults - (sum(done.values()) - done["runs"])
                faulty = faults > done["failed operations"] and (left <= 0 or rng.random() < faults / (kills + faults))
                where = rng.randint(1, max(2, operations // 2))
                if left <= 0:
                    status = child(config, out)
                elif faulty:
                    status = child(config, out, where, code=rng.choice([errno.ENOSPC, errno.EIO]))
                    assert status in (0, 3), f"a failing operation ended the process with {status}"
                    done["failed operations"] += status == 3
                elif rng.random() < 0.5:
                    status = child(config, out, where, after=rng.random() < 0.5)
                    done["kills at an operation"] += status == -signal.SIGKILL
                else:
                    status = child(config, out, seconds=rng.uniform(0.1, 0.8) * took)
                    done["kills at an instant"] += status == -signal.SIGKILL
                assert status in (0, 3, -signal.SIGKILL), f"the process ended with {status}"
            require_same(out, reference)
            done["runs"] += 1
            tell(", ".join(f"{count} {name}" for name, count in done.items()))
            shutil.rmtree(out.parent)
    return done


def sweep(rounds: int = 2, step: int = 1, first: int = 1, tell: Callable[[str], None] = print) -> dict[str, int]:
    """Let each operation on a file fail once, in a run of its own, with either error in turn, and resume that run.

    Returns:
        How many operations failed, and how many of those stopped the run (the others are cleaning up, which may fail).
    """
    config, done = configuration(rounds), {"failed operations": 0, "stops": 0}
    with tempfile.TemporaryDirectory(prefix="fedex-lora-crash-") as folder:
        reference = Path(folder) / "reference" / "run"
        reference.parent.mkdir()
        assert child(config, reference) == 0
        operations = int((reference.parent / "operations").read_text())
        for at in range(first, operations + 1, step):
            out = Path(folder) / f"{at}" / "run"
            out.parent.mkdir()
            status = child(config, out, at, code=(errno.ENOSPC, errno.EIO)[at % 2])
            assert status in (0, 3), f"operation {at}: the process ended with {status}"
            if status:
                said = (out.parent / "error").read_text()
                assert said, f"operation {at}: no reason"
                assert "\n" not in said, f"operation {at}: {said!r} is not one line"
                assert child(config, out) == 0, f"operation {at}: the run did not go on"
            require_same(out, reference)
            done["failed operations"] += 1
            done["stops"] += status == 3
            shutil.rmtree(out.parent)
            if at % 10 == 0:
                tell(f"{at} of {operations}: {done}")
    tell(f"all of {operations}: {done}" if step == 1 else f"{done}")
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--faults", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", action="store_true", help="fail every operation once, instead")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.every:
        sweep(tell=lambda line: print(line, flush=True))
        sys.exit(0)
    campaign(args.kills, args.faults, args.seed, tell=lambda line: print(line, flush=True))
    sys.exit(0)


if __name__ == "__main__":
    main()

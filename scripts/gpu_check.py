"""Runs the checks of `gpu_checks.py`, each in a process of its own, so one that dies, hangs or fills the memory ends no other."""

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from scripts.gpu_checks import STEPS, MissingError, on_gpu

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = "torch transformers peft accelerate safetensors datasets tokenizers numpy pandas pydantic bitsandbytes".split()


def one(name: str) -> dict[str, Any]:
    """A check's numbers, or why there are none."""
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        try:
            found = {"status": "ok", **STEPS[name][0](Path(folder))}
        except MissingError as error:
            return {"status": "skipped", "why": str(error)}
        except Exception as error:
            return {"status": "failed", "why": f"{type(error).__name__}: {str(error)[:1000]}"}
        if on_gpu():
            import torch

            found["peak_bytes"] = torch.cuda.max_memory_allocated()
        return found


def in_a_process(name: str, limit: float) -> dict[str, Any]:
    """The same, from another process, which prints it last."""
    try:
        command, paths = [sys.executable, "-m", "scripts.gpu_check", "--step", name], [str(ROOT), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False, env=environment)
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found
    except subprocess.TimeoutExpired:
        return {"status": "failed", "why": f"took more than {limit:.0f} seconds"}
    except (IndexError, ValueError):
        return {"status": "failed", "why": f"ended with status {done.returncode}: {done.stderr[-1000:]}"}


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def main(arguments: list[str] | None = None) -> int:
    """Exit status 1 if a check failed, or none is ok; one that is skipped has not failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("gpu_check.json"))
    parser.add_argument("--seconds", type=float, default=480, help="in all")
    parser.add_argument("--steps", nargs="+", choices=tuple(STEPS), default=list(STEPS))
    parser.add_argument("--step", choices=tuple(STEPS), help="one, in this process, printed")
    options = parser.parse_args(arguments)
    if options.step:
        print("\n" + json.dumps(one(options.step)))
        return 0
    began = time.monotonic()
    report: dict[str, Any] = {"versions": versions(), "platform": platform.platform(), "steps": {}}
    for name in options.steps:
        left, since = options.seconds - (time.monotonic() - began), time.monotonic()
        found = in_a_process(name, min(left, STEPS[name][1])) if left > 5 else {"status": "failed", "why": "no time left"}
        report["steps"][name] = {"seconds": round(time.monotonic() - since, 2), **found}
        report["seconds"] = round(time.monotonic() - began, 2)
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(f"{name:16} {report['steps'][name]['seconds']:7.1f} s  {found['status']}  {found.get('why', '')}", flush=True)
    states = [step["status"] for step in report["steps"].values()]
    print(f"{states.count('ok')} ok, {states.count('skipped')} skipped, {states.count('failed')} failed; {options.out}")
    return 1 if "failed" in states or "ok" not in states else 0


if __name__ == "__main__":
    sys.exit(main())

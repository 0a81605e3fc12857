"""Start-up of the command line: wall and CPU seconds of `fedex-lora --help` in fresh processes, beside an empty Python process.

python benchmarks/bench_startup.py [--repeats 15] [--out results.json]
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "fedex-lora --help": ["-m", "fedex_lora.cli", "--help"],
    "fedex-lora run --help": ["-m", "fedex_lora.cli", "run", "--help"],
}


def once(command: list[str]) -> tuple[float, float]:
    """(wall, CPU) seconds of one process."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, *command], stdout=subprocess.DEVNULL, check=True)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    for command in COMMANDS.values():
        once(command)  # writes .pyc files, fills the disk's cache
    turns = [{name: once(command) for name, command in COMMANDS.items()} for _ in range(arguments.repeats)]
    rows = []
    for name in COMMANDS:
        wall, cpu = (statistics.median(turn[name][index] for turn in turns) for index in (0, 1))
        rows.append({"command": name, "wall_seconds": wall, "cpu_seconds": cpu})
        print(f"{name:24} wall {wall:6.3f} s   CPU {cpu:6.3f} s", flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps({"repeats": arguments.repeats, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

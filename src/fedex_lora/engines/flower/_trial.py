"""`flower try`: does a real deployment end in the bits of the run in process?"""

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fedex_lora.config import Config, overridden, parse_config
from fedex_lora.engines.flower._local import local_deployment
from fedex_lora.engines.flower.app_folder import write_app
from fedex_lora.errors import TrainingError, UsageError
from fedex_lora.report.analysis import sent
from fedex_lora.runs.run import run
from fedex_lora.storage.events import read_events
from fedex_lora.storage.files import FINAL
from fedex_lora.storage.tensors import load_tensors
from fedex_lora.tasks.dealt import dealt
from fedex_lora.tasks.demo import configuration


def short_demo(overrides: Sequence[str] = ()) -> Config:
    """Two rounds of the demo on a few rows."""
    tree = configuration("fedex", 2).model_dump(mode="json", exclude_none=True)
    tree["task"] |= {"train_rows": 60, "eval_rows": 15}
    return parse_config(overridden(tree, overrides))


def trial(config: Config, folder: Path | None, seconds: float, tell: Callable[[str], None]) -> dict[str, Any]:
    """Run `config` in process, and over a deployment with TLS and node keys on this machine; compare.

    Args:
        config: the run; `torch_threads` must be set, or the bits may differ.
        folder: where everything goes; None: a temporary folder, which stays.
        seconds: until the deployment's run must have ended.
        tell: told of each step, in words.

    Returns:
        `same_bits`, seconds, bytes as we count them and as Flower does.

    Raises:
        UsageError: the folder holds something, or the run is private.
        TrainingError: a process or the run failed, or the bits differ.
    """
    if config.privacy.is_on:
        raise UsageError("flower try compares bits, and private noise is never the same twice: remove [privacy] (nothing was spent)")
    if folder is not None and folder.exists() and any(folder.iterdir()):
        raise UsageError(f"{folder} exists and is not empty: give another --out")
    root = (folder or Path(tempfile.mkdtemp(prefix="fedex-lora-try-"))).absolute()
    clients = sorted(dealt(config)[1])
    began = time.perf_counter()
    tell(f"in process: {config.rounds} rounds, clients {', '.join(clients)}")
    run(config, root / "in-process", lambda event: None)
    took = time.perf_counter() - began
    tell(f"done in {took:.0f} s; now a SuperLink with TLS and {len(clients)} SuperNodes with registered keys, logs in {root / 'logs'}")
    write_app(root / "app", config, str(root / "deployed"), [])
    node = {"rows": "dealt", **({"trainer": config.local.trainer} if config.local.trainer else {})}
    with local_deployment(root, clients, dict.fromkeys(clients, node)) as deployment:
        began = time.perf_counter()
        status = deployment.finish(deployment.submit(root / "app"), seconds)
        result = {"seconds_in_process": took, "seconds_deployed": time.perf_counter() - began, **bytes_sent(root / "deployed", status)}
    odd = differing(root / "in-process", root / "deployed")
    if odd:
        raise TrainingError(f"the deployment ended in other bits than the run in process ({odd[0]} and {len(odd) - 1} more): see {root}")
    tell(f"the deployment took {result['seconds_deployed']:.0f} s, and ended in the same bits; everything is stopped")
    return {"same_bits": True, "folder": str(root), **result}


def differing(one: Path, other: Path) -> list[str]:
    """The tensors of the final models of two runs, adapter and base delta, that are not the same bit for bit."""
    here, there = _tensors(one / FINAL), _tensors(other / FINAL)
    odd = {name for name in here.keys() & there.keys() if not torch.equal(here[name], there[name])}
    return sorted(odd | (here.keys() ^ there.keys()))


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{path.relative_to(folder)}: {name}": tensor
        for path in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_tensors(path)[0].items()
    }


def bytes_sent(out: Path, status: dict[str, Any]) -> dict[str, int]:
    """Bytes of a run's messages, down and up, as its events (`analysis.sent`) and as Flower count them."""
    (down, up), theirs = sent(read_events(out / "events.jsonl")), status["network-traffic"]
    return {
        "bytes_down": down,
        "bytes_up": up,
        "flower_bytes_down": theirs["outbound-bytes"],
        "flower_bytes_up": theirs["inbound-bytes"],
    }

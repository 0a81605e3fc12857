"""Memory of a federation in one process against the number of its clients: the base is there once, so it grows by what clients train only.

    python benchmarks/bench_clients_memory.py [--clients 3 50] [--out benchmarks/results/clients_memory.json]

A model of RoBERTa-base's shapes (`--layers` of its twelve; random weights, 512 tokens), LoRA on query and value with r = 4, its own head,
two short rows a client, three rounds of one step. Every number of clients runs in a fresh process (Linux only). `peak` is the most
resident memory of the run, less what it was when the libraries were imported. `growth` is what one more client costs: the difference of two
peaks over the difference of clients, in units of what a client trains (adapter and head, float32).
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
STATES = ("reset", "keep")


def status(field: str) -> int:
    """Bytes, from /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def measure(k: int, optimizer: str, layers: int) -> dict[str, Any]:
    """One run in this process."""
    import torch
    from scripts.untrained_models import ROBERTA, tokenizer
    from transformers import RobertaConfig

    from fedex_lora.config import parse_config
    from fedex_lora.runs.run import run

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        RobertaConfig(**ROBERTA | {"vocab_size": 512}, num_hidden_layers=layers).save_pretrained(folder / "base")
        tokenizer().save_pretrained(folder / "base")
        rows = "".join(json.dumps({"text": f"words of row {index}", "label": index % 2}) + "\n" for index in range(2 * k))
        (folder / "rows.jsonl").write_text(rows, encoding="utf-8")
        config = parse_config(
            {
                "method": "fedex",
                "rounds": 3,
                "torch_threads": torch.get_num_threads(),
                "keep_rounds": 2,
                "base": {"model": str(folder / "base"), "random_weights": True},
                "lora": {"r": 4, "alpha": 8, "target_modules": ["query", "value"]},
                "task": {"name": "custom", "kind": "classification", "data": place, "train": "rows.jsonl", "eval": "rows.jsonl"}
                | {"text": ["text"], "label": "label", "max_length": 16, "eval_rows": 2},
                "clients": {"count": k, "holdout": 0.0},
                "local": {"optimizer_state": optimizer},
                "training": {"per_device_train_batch_size": 2, "max_steps": 1, "learning_rate": 1e-3},
            }
        )
        before, facts = status("VmRSS"), dict[str, Any]()

        def emit(event: Any) -> None:
            if event.name in ("started", "round_done"):
                facts.update(event.fields())
                facts.setdefault("after_rounds", []).append(status("VmRSS") - before)

        run(config, folder / "run", emit)
        numbers = {"peak_bytes": status("VmHWM") - before, "trained_bytes": 4 * facts["trainable_parameters"]}
        return {"clients": k, "optimizer_state": optimizer, **numbers, "after_rounds_bytes": facts["after_rounds"][1:]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[3, 50])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--states", nargs="+", choices=STATES, default=STATES, help="of the clients' optimisers between rounds")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", nargs=2, metavar=("CLIENTS", "STATE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(int(options.one[0]), options.one[1], options.layers)))
        return
    report: dict[str, Any] = {"layers": options.layers, "rows": [], "growth": {}}
    for state in options.states:
        rows = []
        for k in options.clients:
            command = [sys.executable, __file__, "--one", str(k), state, "--layers", str(options.layers)]
            rows.append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
            print(f"optimiser {state:6} {k:4d} clients: peak {rows[-1]['peak_bytes'] / 1e6:7.0f} MB", flush=True)
        growth = (rows[-1]["peak_bytes"] - rows[0]["peak_bytes"]) / (rows[-1]["clients"] - rows[0]["clients"])
        report["rows"] += rows
        report["growth"][state] = growth / rows[0]["trained_bytes"]
        print(f"optimiser {state:6} one client more: {growth / 1e6:.2f} MB, {report['growth'][state]:.2f} times what it trains", flush=True)
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

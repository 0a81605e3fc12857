"""Large adapters over a real deployment: do rounds complete, and what does each process need at its peak?

    python benchmarks/flower_payload.py [--megabytes 300] [--rounds 2] [--out results.json]

Three nodes with random weights of a small Llama whose adapters are as large as asked for (rank 256 on layers of 1024 x 1024), one
optimiser step a round. Peaks are the high-water marks of resident memory that Linux keeps (VmHWM), the largest of each kind of process.
"""

import argparse
import json
import tempfile
import threading
from pathlib import Path

from transformers import AutoTokenizer, LlamaConfig

from fedex_lora.config import base_folder, parse_config
from fedex_lora.engines.flower._local import local_deployment
from fedex_lora.engines.flower._trial import bytes_sent
from fedex_lora.engines.flower.app_folder import write_app
from fedex_lora.errors import TrainingError
from fedex_lora.storage.events import ClientDone, RoundDone, of_kind, read_events

SIDE, RANK = 1024, 256
CLIENTS = ["bone", "chest", "skin"]
KINDS = ("flower-superlink", "flwr-serverapp", "flower-supernode", "flwr-clientapp")


def write_base(folder, megabytes):
    """A folder with config and tokenizer; each layer has seven modules of SIDE x SIDE, 2 SIDE RANK numbers of adapter each."""
    layers = max(1, round(megabytes * 1e6 / (7 * 2 * SIDE * RANK * 4)))
    tokenizer = AutoTokenizer.from_pretrained(base_folder())
    LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=SIDE,
        intermediate_size=SIDE,
        num_hidden_layers=layers,
        num_attention_heads=16,
        max_position_embeddings=64,
        architectures=["LlamaForCausalLM"],
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=0,
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def configuration(base, rounds):
    return parse_config(
        {
            "rounds": rounds,
            "torch_threads": 1,
            "base": {"model": str(base), "random_weights": True},
            "lora": {"r": RANK, "alpha": RANK, "target_modules": "all-linear"},
            "task": {"name": "demo", "train_rows": 12, "eval_rows": 3},
            "clients": {"partition": "column", "column": "hospital", "holdout": 0.0},
            "training": {"learning_rate": 1e-5, "per_device_train_batch_size": 16, "max_steps": 1},
        }
    )


class Peaks(threading.Thread):
    """Looks at all processes of the deployment now and then."""

    def __init__(self, folder):
        super().__init__(daemon=True)
        self.folder, self.seen, self.over = str(folder), {}, threading.Event()

    def run(self):
        while not self.over.wait(0.3):
            for path in Path("/proc").glob("[0-9]*"):
                try:
                    words = (path / "cmdline").read_bytes().decode(errors="replace")
                    kind = next((kind for kind in KINDS if kind in words.split("\0")[1]), None) if words.count("\0") > 1 else None
                    if kind and self.folder in (path / "environ").read_bytes().decode(errors="replace"):
                        status = dict(line.split(":", 1) for line in (path / "status").read_text().splitlines())
                        self.seen[kind] = max(self.seen.get(kind, 0), int(status["VmHWM"].split()[0]) // 1024)
                except (OSError, KeyError):
                    continue


def attempt(deployment, root, failures):
    """One `flwr run` to its end; None after a failure, of which there may be two: the run then goes on from its last whole round."""
    try:
        return deployment.finish(deployment.submit(root / "app"), 3600)
    except TrainingError as error:
        failures.append(str(error).partition(": see ")[0])
        if len(failures) > 2:
            print("\n".join(f"{name}: {deployment.log(name)[-3000:]}" for name in deployment.processes))
            raise
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=300)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fedex-lora-payload-") as place:
        root = Path(place)
        write_base(root / "base", arguments.megabytes)
        write_app(root / "app", configuration(root / "base", arguments.rounds), str(root / "run"), [])
        peaks = Peaks(root)
        peaks.start()
        with local_deployment(root, CLIENTS, {client: {"rows": "dealt"} for client in CLIENTS}) as deployment:
            failures = []
            while (status := attempt(deployment, root, failures)) is None:
                print(f"started again after: {failures[-1]}", flush=True)
        peaks.over.set()
        events = read_events(root / "run" / "events.jsonl")
        done, uploads = of_kind(events, RoundDone), [event.bytes_up for event in of_kind(events, ClientDone)]
        result = {
            "megabytes_of_an_upload": max(uploads) / 1e6,
            "rounds": [event.model_dump(include={"round", "seconds", "bytes_down", "bytes_up", "exactness_error"}) for event in done],
            "peak_megabytes": peaks.seen,
            "failures": failures,
            **bytes_sent(root / "run", status),
        }
    print(json.dumps(result, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""How exact a base of 16 or 4 bits is after ten federated rounds: the base delta beside its weights, and folded into them.

Real runs (MiniLM on SST-2, stories260K on E2E), then the last round's model against the same base, dequantised and upcast, plus the ideal
update in fp64, through the logits, relative to the change of logits that the base delta causes. Each in the precision that the run
computes in, and in float32. `floor` is the same without any delta: what computing in that precision costs. `missing` is how much of the
delta's effect is not there (one minus the least-squares factor between the model's change and the ideal one), which rounding hides less.

    python benchmarks/precision.py --data FOLDER --minilm FOLDER --stories FOLDER --out benchmarks/results/precision.json
"""

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fedex_lora.client.training import silence_libraries
from fedex_lora.config import parse_config
from fedex_lora.models.build import build_model
from fedex_lora.models.layers import Layer, is_quantised
from fedex_lora.models.lora import lora_layers
from fedex_lora.models.merge import in_float32, logits
from fedex_lora.offline import verify
from fedex_lora.runs.run import run
from fedex_lora.storage.result import read_result
from fedex_lora.storage.run_folder import run_rounds_of

ROWS = 256  # of 16 random tokens
CASES = [  # method, dtype, quantization
    ("fedex", "bfloat16", "none"),
    ("fedex", "float32", "nf4"),
    ("fedex", "bfloat16", "nf4"),
    ("fedex", "float32", "int8"),
    ("fedex", "float32", "none"),
    ("reinit", "bfloat16", "none"),  # all of the update goes into the base
    ("reinit", "bfloat16", "nf4"),
]


def configuration(which: str, args: argparse.Namespace, method: str, dtype: str, quantization: str) -> dict[str, Any]:
    shared = {
        "method": method,
        "rounds": args.rounds,
        "torch_threads": 1,
        "clients": {"count": 3, "partition": "dirichlet", "dirichlet_alpha": 1.0},
    }
    base = {"dtype": dtype, "quantization": quantization}
    if which == "MiniLM":
        return shared | {
            "base": base | {"model": str(args.minilm)},
            "task": {"name": "glue/sst2", "data": str(args.data / "glue"), "max_length": 64, "train_rows": args.rows, "eval_rows": 16},
            "lora": {"r": 4, "alpha": 8, "target_modules": ["query", "value"]},
            "training": {"learning_rate": 1e-2, "per_device_train_batch_size": 16, "num_train_epochs": 1},
        }
    shared["clients"] = {"count": 3}
    task = {
        "name": "custom",
        "kind": "causal-lm",
        "train": "trainset.csv",
        "eval": "devset.csv",
        "prompt": "{mr} ||",
        "completion": " {ref}",
    }
    return shared | {
        "base": base | {"model": str(args.stories)},
        "task": task | {"data": str(args.data / "e2e"), "max_length": 256, "train_rows": args.rows, "eval_rows": 16},
        "lora": {"r": 4, "alpha": 8, "target_modules": "all-linear"},
        "training": {"learning_rate": 1e-2, "per_device_train_batch_size": 8, "num_train_epochs": 1},
    }


def fold(layer: Layer, update: torch.Tensor) -> None:
    """Put an update into the weight as it is stored, rounding or quantising as that does."""
    weight = layer.base.weight
    total = layer.weight().double() + update
    if not is_quantised(layer.base):
        layer.weight().copy_(total.to(weight.dtype))
        return
    import bitsandbytes as bnb

    if type(weight).__name__ == "Params4bit":
        options = {"quant_type": weight.quant_type, "blocksize": weight.blocksize, "compress_statistics": weight.compress_statistics}
        packed, state = bnb.functional.quantize_4bit(total.to(weight.quant_state.dtype).contiguous(), **options)
        weight.data, weight.quant_state, layer.base.quant_state = packed, state, state
    else:
        packed, scale, _ = bnb.functional.int8_vectorwise_quant(total.half())
        weight.data, weight.SCB, layer.base.state.SCB, layer.base.state.CB = packed, scale, scale, packed


@torch.no_grad()
def folded_answers(result: Any, base: str, float32: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """As `verify.model_logits`, of a base with the delta in its stored weights (folded first, then upcast)."""
    answers = []
    for with_delta in (True, False):
        model, frozen = build_model(result, base)
        frozen.set({})
        for name, layer in lora_layers(model).items() if with_delta else ():
            fold(layer, result.base_delta[name].dense())
        answers.append(logits(in_float32(model) if float32 else model, ROWS))
    return answers[0], answers[1]


def relative_size(result: Any, base: str) -> float:
    """|D| / |W0| over all modules."""
    model, _ = build_model(result, base)
    layers, norm = lora_layers(model), torch.linalg.matrix_norm
    delta = torch.stack([norm(gain.dense()) for gain in result.base_delta.values()]).norm()
    return float(delta / torch.stack([norm(layers[name].weight().double()) for name in result.base_delta]).norm())


def measured(which: str, args: argparse.Namespace, method: str, dtype: str, quantization: str) -> dict[str, Any]:
    config = parse_config(configuration(which, args, method, dtype, quantization))
    with tempfile.TemporaryDirectory() as folder:
        out, last = Path(folder) / "run", {}
        run(config, out, lambda event: last.update(event.fields()) if event.name == "round_done" else None)
        result, base = read_result(run_rounds_of(out)[0]), config.base.model
        want, numbers = verify.ideal_logits(result, base, ROWS), {}
        for home, answers in (("side", partial(verify.model_logits, rows=ROWS)), ("fold", folded_answers)):
            for precision, float32 in (("", False), ("_float32", True)):
                got = answers(result, base, float32)
                found, change = verify.compared(*got, *want), want[0] - want[1]
                shown = float(((got[0] - got[1]) * change).sum() / (change * change).sum())  # by least squares
                numbers |= {f"{home}{precision}": found["error"], f"{home}{precision}_missing": abs(1 - shown)}
                numbers[f"floor{precision}"] = found["floor"]
        return {
            "model": which,
            "method": method,
            "dtype": dtype,
            "quantization": quantization,
            **numbers,
            "delta_size": relative_size(result, base),
            "exactness_error": last["exactness_error"],
            "realised_error": last["realised_error"],
            "realised_floor": last["floor"],
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("data", "minilm", "stories", "out"):
        parser.add_argument(f"--{name}", type=Path, required=name != "out")
    parser.add_argument("--models", nargs="+", default=["stories260K", "MiniLM"])
    parser.add_argument("--methods", nargs="+", default=["fedex", "reinit"])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--rows", type=int, default=300)
    args = parser.parse_args()
    silence_libraries()
    rows = []
    for which in args.models:
        for method, dtype, quantization in CASES:
            if method not in args.methods:
                continue
            rows.append(measured(which, args, method, dtype, quantization))
            print(
                json.dumps({key: float(f"{value:.3g}") if isinstance(value, float) else value for key, value in rows[-1].items()}),
                flush=True,
            )
            if args.out:
                args.out.write_text(json.dumps({"rounds": args.rounds, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

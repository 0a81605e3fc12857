"""One federated round of 3B to 9B models on a GPU, against plain PEFT: for a bare machine with a CUDA GPU and this package.

    python benchmarks/gpu.py --out gpu.json
    python benchmarks/gpu.py --device cpu --scale tiny          the same code in seconds: tiny models of the same architectures

Llama-3.2-3B, Mistral-7B and Gemma-2-9B are made from their configurations with random weights, in bfloat16, with LoRA on all linear layers;
the tokens are random. Nothing is downloaded. For each of them:

round        three clients in turn, each from the global adapter, `steps` steps by `local_update`, which gives updates
             on the CPU, `server_state.step`, the base delta and the adapter back into the model. `plain` is PEFT with
             `transformers.Trainer` on all of the clients' rows with the same settings: as many steps. The two take turns; a ratio is the
             median of the ratios of the turns. The first turn is not counted. Messages as bytes are not part of it.
aggregation  `fedex_lora.aggregate` against the paper's dense formula (eq. 11-12: one product a client), fp32, the same factors; on the CPU
             and on the GPU. The error is the round's, from the factors in fp64.
side path    forward and backward of one batch with the base delta U V beside the frozen weights, against the same without it.
MFU          FLOPs a token that the model needs, times tokens a second, over the peak: 4 P + 6 P_lora + 6 L s h d. P: weights of linear
             layers (forward, and backward for the activations; frozen weights have no gradient); P_lora: of adapters; L layers of h heads
             of size d attend to s / 2 tokens on average. The peak is `--peak-tflops`, or that of a GPU that is known here (dense bfloat16).
"""

import argparse
import gc
import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # Trainer would split batches among several
NEEDED = "torch transformers peft accelerate safetensors pydantic tomli_w datasets pandas sklearn numpy".split()
if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
    sys.exit(f"not installed: {', '.join(missing)}: pip install fedex-lora, or bring their wheels")

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import peft  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from datasets import Dataset  # noqa: E402
from tokenizers import Tokenizer, models  # noqa: E402
from torch import nn  # noqa: E402

from fedex_lora import aggregate  # noqa: E402
from fedex_lora.aggregation import server_state as server  # noqa: E402
from fedex_lora.client.arguments import TrainingContext, training_arguments  # noqa: E402
from fedex_lora.client.training import ClientData, local_update, silence_libraries  # noqa: E402
from fedex_lora.config import Config, parse_config  # noqa: E402
from fedex_lora.errors import TrainingError  # noqa: E402
from fedex_lora.exactness import measure  # noqa: E402
from fedex_lora.models.base_weights import FrozenBase  # noqa: E402
from fedex_lora.models.loading import Loaded  # noqa: E402
from fedex_lora.models.lora import add_lora, read_model, set_trained, write_model  # noqa: E402
from fedex_lora.tasks import Task, collator  # noqa: E402
from fedex_lora.types import ClientUpdate, LoRAPair  # noqa: E402

PEAKS = {"H200": 989.4, "H100": 989.4, "A100": 312.0, "L40S": 362.0, "RTX 4090": 165.2}  # TFLOP/s, dense bfloat16, their makers' numbers
SHARED = {"max_position_embeddings": 8192, "rms_norm_eps": 1e-5}
ARCHITECTURES: dict[str, Callable[..., Any]] = {
    "Llama-3.2-3B": lambda **small: transformers.LlamaConfig(
        **SHARED
        | {"vocab_size": 128256, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24}
        | {"num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True}
        | small
    ),
    "Mistral-7B": lambda **small: transformers.MistralConfig(
        **SHARED
        | {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
        | {"num_key_value_heads": 8, "head_dim": 128, "sliding_window": None, "tie_word_embeddings": False}
        | small
    ),
    "Gemma-2-9B": lambda **small: transformers.Gemma2Config(
        **SHARED
        | {"vocab_size": 256000, "hidden_size": 3584, "intermediate_size": 14336, "num_hidden_layers": 42, "num_attention_heads": 16}
        | {"num_key_value_heads": 8, "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 4096, "tie_word_embeddings": True}
        | small
    ),
}
TINY = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY |= {"num_key_value_heads": 2, "head_dim": 16}
SCALES: dict[str, dict[str, int]] = {
    "full": {"rank": 32, "steps": 10, "batch": 2, "length": 1024, "turns": 3},
    "tiny": {"rank": 4, "steps": 2, "batch": 2, "length": 32, "turns": 1},
}
HELP = {"steps": "of each client", "batch": "rows of a step", "length": "tokens of a row", "turns": "that are counted"}


class Clock:
    """Times work on a device, which runs behind the program, and the most memory that it took there."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"

    def seconds(self, work: Callable[[], Any]) -> float:
        self.wait()
        began = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - began

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def forget(self) -> None:
        if self.cuda:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int | None:
        """Bytes since `forget`; None on a CPU."""
        return torch.cuda.max_memory_allocated() if self.cuda else None


def settings(options: argparse.Namespace) -> Config:
    return parse_config(
        {
            "method": "fedex",
            "rounds": 2,
            "base": {"model": "random", "dtype": "bfloat16"},
            "lora": {"r": options.rank, "alpha": options.rank, "target_modules": "all-linear"},
            "task": {"name": "custom", "kind": "causal-lm", "train": "random.csv", "eval": "random.csv", "prompt": "x", "completion": "x"},
            "clients": {"count": options.clients},
            "training": {
                "per_device_train_batch_size": options.batch,
                "num_train_epochs": 1,
                "learning_rate": 1e-4,
                "lr_scheduler_type": "constant",
                "use_cpu": options.device == "cpu",
                "bf16": options.autocast,
            },
        }
    )


def task() -> Task:
    """Rows that are tokens already."""
    nothing = pd.DataFrame()
    return Task("causal-lm", nothing, nothing, lambda tokenizer, rows: rows, lambda prediction: {}, "loss", {}, np.zeros(0))


def padder() -> transformers.PreTrainedTokenizerFast:
    """What the collator asks of a tokenizer."""
    return transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0}, "<pad>")), pad_token="<pad>")


def random_rows(count: int, length: int, vocabulary: int) -> Dataset:
    tokens = np.random.default_rng(0).integers(1, vocabulary, (count, length)).tolist()
    return Dataset.from_dict({"input_ids": tokens, "attention_mask": [[1] * length] * count, "labels": tokens})


def make_model(name: str, config: Config, options: argparse.Namespace) -> nn.Module:
    shape = ARCHITECTURES[name](**(TINY if options.scale == "tiny" else {}))
    transformers.set_seed(0)
    with torch.device(options.device):  # 9B in float32 on the CPU first would take minutes and 37 GB
        model = transformers.AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)
    model.config.use_cache = False
    wrapped = add_lora(Loaded(model, []), config.lora, "causal-lm").to(options.device)
    set_trained(wrapped, "AB")
    return wrapped


def on_device(update: ClientUpdate, device: str) -> ClientUpdate:
    adapter = {name: LoRAPair(pair.A.to(device), pair.B.to(device), pair.scaling) for name, pair in update.adapter.items()}
    return replace(update, adapter=adapter)


@contextmanager
def without_hooks(model: nn.Module) -> Iterator[None]:
    """The model as PEFT made it: without the hooks by which layers add their base delta."""
    hooked = {module: dict(module._forward_hooks) for module in model.modules() if hasattr(module, "base_delta")}
    for module in hooked:
        module._forward_hooks.clear()
    try:
        yield
    finally:
        for module, hooks in hooked.items():
            module._forward_hooks.update(hooks)


class Bench:
    """One architecture: its model with new adapters, its rows, the state before the round."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.options, self.clock, config = options, Clock(options.device), settings(options)
        self.model = make_model(name, config, options)
        self.base = FrozenBase(self.model)
        self.work = TrainingContext(config, task(), padder())
        mine = options.steps * options.batch
        self.rows = random_rows(options.clients * mine, options.length, self.model.config.vocab_size)
        self.mine = [self.rows.select(range(start, start + mine)) for start in range(0, len(self.rows), mine)]
        self.start = server.init(read_model(self.model), {})
        self.tokens = len(self.rows) * options.length

    def set(self, state: Any) -> None:
        self.base.set(state.base_delta)
        write_model(self.model, state.adapter, state.other)

    def round(self) -> tuple[list[ClientUpdate], Any, Any]:
        """What the clients answer, the server's state after it and the aggregate."""
        updates = []
        for index, rows in enumerate(self.mine):
            self.set(self.start)
            update, _ = local_update(self.model, f"client-{index}", 1, ClientData(rows, rows.select([])), self.work)
            updates.append(update)
        state, result = server.step(self.start, updates)
        self.set(state)
        return updates, state, result

    def plain(self) -> None:
        """Plain PEFT and Trainer on all rows."""
        with without_hooks(self.model):
            trainer = transformers.Trainer(
                model=self.model,
                args=training_arguments(self.work.config, "unused", 0),
                train_dataset=self.rows,
                data_collator=collator("causal-lm", self.work.processor),
            )
            trainer.remove_callback(transformers.PrinterCallback)
            trainer.train()

    def training(self) -> dict[str, Any]:
        """Tokens a second, alternating turns; the first is a warm-up."""
        turns, peaks = [], {}
        for _ in range(1 + self.options.turns):
            turn = {}
            for name, way in (("plain", self.plain), ("round", self.round)):
                self.set(self.start)
                self.clock.forget()
                turn[name] = self.clock.seconds(way)
                peaks[f"{name}_peak_bytes"] = self.clock.peak()
            turns.append(turn)
        rates = {f"{name}_tokens_per_second": self.tokens / statistics.median(turn[name] for turn in turns[1:]) for name in turns[0]}
        return {**rates, "round_over_plain": statistics.median(turn["round"] / turn["plain"] for turn in turns[1:]), **peaks}

    def aggregation(self, updates: list[ClientUpdate]) -> dict[str, Any]:
        numbers: dict[str, Any] = {}
        for device in dict.fromkeys(("cpu", self.options.device)):
            here = [on_device(update, device) for update in updates]
            ways = (("closed", lambda here=here: aggregate(here)), ("dense", lambda here=here: dense(here)))
            turns = []
            for turn in range(1 + self.options.turns):
                seconds = {name: self.clock.seconds(way) for name, way in ways}
                turns += [seconds] if turn else []
            numbers |= {f"{name}_seconds_{device}": statistics.median(turn[name] for turn in turns) for name, _ in ways}
            numbers[f"dense_over_closed_{device}"] = statistics.median(turn["dense"] / turn["closed"] for turn in turns)
        return numbers

    def side_path(self, state: Any) -> dict[str, Any]:
        """Forward and backward of a batch with and without the base delta beside the weights."""
        batch = collator("causal-lm", self.work.processor)([self.rows[index] for index in range(self.options.batch)])
        batch = {name: tensor.to(self.options.device) for name, tensor in batch.items()}

        def step() -> None:
            self.model.train()
            self.model(**batch).loss.backward()
            self.model.zero_grad(set_to_none=True)

        turns: list[dict[str, float]] = []
        peaks: dict[str, Any] = {}
        for _ in range(1 + 3 * self.options.turns):
            turn = {}
            for name, delta in (("without", {}), ("with", state.base_delta)):
                self.base.set(delta)
                self.clock.forget()
                step()  # the first one after `forget` asks for memory anew
                turn[name] = self.clock.seconds(step)
                peaks[f"{name}_peak_bytes"] = self.clock.peak()
            turns.append(turn)
        seconds = {f"{name}_seconds": statistics.median(turn[name] for turn in turns[1:]) for name in turns[0]}
        overhead = statistics.median(turn["with"] / turn["without"] for turn in turns[1:]) - 1
        return {**seconds, "overhead": overhead, "rank": max(gain.rank for gain in state.base_delta.values()), **peaks}

    def flops_per_token(self) -> float:
        """See the top of the file."""
        shape = self.model.config
        frozen = sum(
            module.weight.numel() for name, module in self.model.named_modules() if type(module) is nn.Linear and "lora_" not in name
        )
        lora = sum(pair.A.numel() + pair.B.numel() for pair in self.start.adapter.values())
        attention = shape.num_hidden_layers * self.options.length * shape.num_attention_heads * shape.head_dim
        return 4.0 * frozen + 6.0 * lora + 6.0 * attention

    def measured(self) -> dict[str, Any]:
        trained = self.training()
        updates, state, result = self.round()
        audit = measure.audit(self.start, updates, result.weights, state)
        flops, peak = self.flops_per_token(), peak_tflops(self.options)
        utilisation = {
            f"{name}_mfu": flops * trained[f"{name}_tokens_per_second"] / (1e12 * peak) if peak else None for name in ("plain", "round")
        }
        return {
            "parameters": sum(parameter.numel() for name, parameter in self.model.named_parameters() if "lora_" not in name),
            "adapter_bytes": sum(4 * (pair.A.numel() + pair.B.numel()) for pair in self.start.adapter.values()),
            "attention": self.model.config._attn_implementation,
            "flops_per_token": flops,
            "training": {**trained, **utilisation},
            "aggregation": {**self.aggregation(updates), "exactness_error": audit.max_relative_error},
            "side_path": self.side_path(state),
        }


def dense(updates: list[ClientUpdate]) -> None:
    """The paper's formula: `R = sum_i p_i B_i A_i - Bbar Abar`, one product a client, module by module."""
    total = sum(update.num_examples for update in updates)
    p = [update.num_examples / total for update in updates]
    for name, first in updates[0].adapter.items():
        pairs = [update.adapter[name] for update in updates]
        A = sum(w * pair.A for w, pair in zip(p, pairs, strict=True))
        B = sum(w * pair.B for w, pair in zip(p, pairs, strict=True))
        M = p[0] * (first.B @ first.A)
        for w, pair in zip(p[1:], pairs[1:], strict=True):
            M += w * (pair.B @ pair.A)
        M -= B @ A
        M *= first.scaling


def peak_tflops(options: argparse.Namespace) -> float | None:
    if options.peak_tflops or options.device == "cpu":
        return options.peak_tflops
    return next((peak for name, peak in PEAKS.items() if name in torch.cuda.get_device_name()), None)


def facts(options: argparse.Namespace) -> dict[str, Any]:
    given = {key: value for key, value in vars(options).items() if key not in ("out", "models", "peak_tflops")}
    device = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    versions = {module.__name__: module.__version__ for module in (torch, transformers, peft)}
    precision = {"dtype": "bfloat16", "adapters": "float32", "float32_matmul_precision": torch.get_float32_matmul_precision()}
    return {**given, "device_name": device, "weights": "random", "peak_tflops": peak_tflops(options), **precision, "versions": versions}


def one(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One architecture's numbers, or why there are none; the next one finds the memory free."""
    try:
        return {"model": name, **Bench(name, options).measured()}
    except (torch.OutOfMemoryError, TrainingError) as error:
        return {"model": name, "error": str(error).splitlines()[0]}


def show(row: dict[str, Any], device: str) -> None:
    print(f"\n{row['model']}, random weights")
    if "error" in row:
        print(f"  {row['error']}")
        return
    training, aggregation, side = row["training"], row["aggregation"], row["side_path"]

    def size(count: int | None) -> str:
        return "?" if count is None else f"{count / 1e9:.1f} GB"

    for name in ("plain", "round"):
        mfu = training[f"{name}_mfu"]
        used = f"MFU {mfu:.3f}" if mfu is not None else "MFU unknown (--peak-tflops)"
        print(f"  {name:12} {training[f'{name}_tokens_per_second']:12,.0f} tokens/s   {used}   peak {size(training[f'{name}_peak_bytes'])}")
    print(f"  {'':12} the round takes {training['round_over_plain']:.3f} times as long as plain PEFT")
    for where in dict.fromkeys(("cpu", device)):
        closed, ratio = aggregation[f"closed_seconds_{where}"], aggregation[f"dense_over_closed_{where}"]
        print(f"  aggregation  {closed:.4f} s on {where}, the dense formula {ratio:.1f} times as long")
    print(f"  {'':12} exactness error {aggregation['exactness_error']:.1e}")
    before, after = size(side["without_peak_bytes"]), size(side["with_peak_bytes"])
    print(f"  side path    rank {side['rank']}: {side['overhead']:+.1%} on forward and backward, peak {before} -> {after}", flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--scale", choices=tuple(SCALES), default="full")
    parser.add_argument("--models", nargs="+", choices=tuple(ARCHITECTURES), default=list(ARCHITECTURES))
    parser.add_argument("--clients", type=int, default=3)
    for name in SCALES["full"]:
        parser.add_argument(f"--{name}", type=int, help=HELP.get(name))
    parser.add_argument("--autocast", action="store_true", help="bfloat16 autocast (training.bf16), for plain PEFT too")
    parser.add_argument("--tf32", action="store_true", help="float32 products (adapters, side path, dense formula) in TF32")
    parser.add_argument("--peak-tflops", type=float, help="of dense bfloat16, for the MFU; known for some GPUs")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    for name, value in SCALES[options.scale].items():
        setattr(options, name, getattr(options, name) or value)
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA GPU is to be seen: give --device cpu --scale tiny")
    if options.tf32:
        torch.set_float32_matmul_precision("high")
    silence_libraries()
    report = {"facts": facts(options), "rows": []}
    print(json.dumps(report["facts"]))
    for name in options.models:
        row = one(name, options)
        report["rows"].append(row)
        Clock(options.device).forget()
        show(row, options.device)
        if options.out:
            options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""One federated round beside the same training steps of plain PEFT: in a `transformers.Trainer`, and in a bare loop.

    python benchmarks/bench_training.py [--rows 960] [--tokens 64] [--batch 16] [--rounds 5] [--clients 3] [--out results.json]

An encoder of MiniLM-L6's shapes (6 layers of 384, random weights), r = 4 on q and v, sentences of words drawn at random. The federated
round is a whole one of `fedex-lora run`: messages, training of every client, aggregation, the measured errors, evaluation, checkpoint.
The plain run trains on all rows in as many steps of the same size, without any of that. Turns alternate in one process; ratios are
medians over the rounds after the first.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, DataCollatorWithPadding, Trainer, TrainingArguments

from fedex_lora.client.training import silence_libraries
from fedex_lora.config import Config, base_folder, parse_config
from fedex_lora.runs.run import run
from fedex_lora.storage.events import ClientDone, Event, RoundDone, RoundStarted

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["query", "value"]}


def make_inputs(folder: Path, rows: int, tokens: int) -> None:
    """A tokenizer, a config of MiniLM-L6's shapes, and rows of `tokens` words."""
    tokenizer = AutoTokenizer.from_pretrained(base_folder())
    tokenizer.save_pretrained(folder / "base")
    BertConfig(
        vocab_size=30522,
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        pad_token_id=tokenizer.pad_token_id,
    ).save_pretrained(folder / "base")
    words = [word for word in tokenizer.get_vocab() if word.isalpha()]
    draw = random.Random(0)
    for name, count in (("train", rows), ("eval", 16)):
        lines = [json.dumps({"text": " ".join(draw.choices(words, k=tokens)), "label": f"class {number % 2}"}) for number in range(count)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


def configuration(folder: Path, options: argparse.Namespace) -> Config:
    return parse_config(
        {
            "rounds": options.rounds + 1,
            "torch_threads": options.threads,
            "base": {"model": str(folder / "base"), "random_weights": True},
            "lora": {"r": LORA["r"], "alpha": LORA["lora_alpha"], "target_modules": LORA["target_modules"]},
            "task": {"name": "custom", "data": str(folder), "train": "train.jsonl", "eval": "eval.jsonl", "max_length": options.tokens},
            "clients": {"count": options.clients, "holdout": 0.0},
            "training": {"per_device_train_batch_size": options.batch, "num_train_epochs": 1, "learning_rate": 1e-4, "use_cpu": True},
        }
    )


class Plain:
    """The same rows, model and steps without a federation."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.options, self.tokenizer = options, AutoTokenizer.from_pretrained(folder / "base")
        lines = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
        encoded = self.tokenizer([line["text"] for line in lines], truncation=True, max_length=options.tokens)
        self.rows = Dataset.from_dict({**encoded, "labels": [int(line["label"][-1]) for line in lines]})
        base = BertForSequenceClassification(BertConfig.from_pretrained(folder / "base"))
        self.model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", **LORA))
        self.collate = DataCollatorWithPadding(self.tokenizer)

    def trainer(self) -> float:
        """Seconds of one epoch in a Trainer, with making the Trainer."""
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=self.options.batch,
                num_train_epochs=1,
                learning_rate=1e-4,
                report_to="none",
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
                use_cpu=True,
            )
            Trainer(model=self.model, args=arguments, train_dataset=self.rows, data_collator=self.collate).train()
        return time.perf_counter() - started

    def bare(self) -> float:
        """Seconds of one epoch of AdamW in a loop."""
        started = time.perf_counter()
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-4)
        columns = self.rows.remove_columns(
            [name for name in self.rows.column_names if name not in ("input_ids", "attention_mask", "labels")]
        )
        self.model.train()
        for batch in torch.utils.data.DataLoader(columns, self.options.batch, shuffle=True, collate_fn=self.collate):  # type: ignore[arg-type]
            self.model(**batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return time.perf_counter() - started


def measure(folder: Path, options: argparse.Namespace) -> list[dict[str, float]]:
    """Seconds of each round, whole and without what is not training, and of the plain turns after it."""
    make_inputs(folder, options.rows, options.tokens)
    plain, turns, clock = Plain(folder, options), list[dict[str, float]](), dict[str, float]()

    def emit(event: Event) -> None:
        if isinstance(event, RoundStarted):
            clock.update(start=time.perf_counter(), training=0.0)
        elif isinstance(event, ClientDone):
            clock["training"] += event.seconds or 0.0
        elif isinstance(event, RoundDone):
            federated = time.perf_counter() - clock["start"]
            turns.append({"round": federated, "clients": clock["training"], "trainer": plain.trainer(), "bare": plain.bare()})

    run(configuration(folder, options), folder / "run", emit)
    return turns[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("rows", 960), ("tokens", 64), ("batch", 16), ("rounds", 5), ("clients", 3), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, help="also write the JSON there")
    options = parser.parse_args()
    silence_libraries()
    with tempfile.TemporaryDirectory() as folder:
        turns = measure(Path(folder), options)
    ratios = {
        f"{ours} over {theirs}": statistics.median(turn[ours] / turn[theirs] for turn in turns)
        for ours in ("round", "clients")
        for theirs in ("trainer", "bare")
    }
    table = Table(
        "", "median", title=f"{options.clients} clients, {options.rows} rows, batches of {options.batch} x {options.tokens} tokens"
    )
    for name in turns[0]:
        table.add_row(f"{name}, s", f"{statistics.median(turn[name] for turn in turns):.2f}")
    for name, ratio in ratios.items():
        table.add_row(name, f"{ratio:.3f}")
    Console().print(table)
    if options.out:
        settings = {name: value for name, value in vars(options).items() if name != "out"}
        options.out.write_text(json.dumps({"settings": settings, "ratios": ratios, "turns": turns}, indent=2) + "\n")


if __name__ == "__main__":
    main()

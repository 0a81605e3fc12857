"""Runs on an accelerator, as far as a machine without one can show it: on an emulated device they end in the bits of the CPU."""

import itertools
import json

import bitsandbytes.autograd._functions as bitsandbytes_kernels
import huggingface_hub.constants
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from tests.fake_accelerator import accelerator
from tests.test_runner import ignore
from transformers import AutoTokenizer, BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, ViTConfig, ViTModel

from fedex_lora.config import base_folder, parse_config
from fedex_lora.runner import run
from fedex_lora.storage import load_tensors, read_events

COMMIT = "0" * 40
LABELS = ("low", "mid", "high")
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
KINDS = {  # name -> (kind of task, adapted modules)
    "head": ("classification", ["query", "dense"]),
    "causal-lm": ("causal-lm", ["q_proj", "down_proj"]),
    "images": ("image-classification", ["q_proj", "v_proj"]),
}
BASES = {"folded": {}, "side": {"delta": "side"}, "nf4": {"quantization": "nf4"}, "int8": {"quantization": "int8"}, "bf16": {"dtype": "bfloat16"}}
METHODS = {
    "fedex": {},
    "fedex-best, ranks": {"method": "fedex-best", "clients": {"ranks": [2, 1]}},
    "keep": {"method": "keep"},
    "fedsa": {"method": "fedsa"},
    "fedsvd": {"method": "fedsvd"},
    "reinit": {"method": "reinit"},
    "rolora": {"method": "rolora"},
    "moments": {"local": {"optimizer_state": "keep"}},
    "per client": {"messages": {"per_client": True}, "clients": {"count": 3}},
    "full-ft": {"method": "full-ft"},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Rows, and three tiny bases: in folders `bases/KIND`, and as `tests/KIND` in a hub's cache."""
    folder = tmp_path_factory.mktemp("accelerator")
    texts = [f"the patient number {index} waits and is {LABELS[index % 3]}" for index in range(30)]
    rows = pd.DataFrame({"text": texts, "label": [LABELS[index % 3] for index in range(30)]})
    pixels = np.random.default_rng(0).integers(0, 255, (30, 16, 16, 3), dtype=np.uint8)
    for index, picture in enumerate(pixels):
        Image.fromarray(picture).save(folder / f"{index}.png")
    rows["image"] = [f"{index}.png" for index in range(30)]
    rows[:24].to_csv(folder / "train.csv", index=False)
    rows[24:].to_csv(folder / "eval.csv", index=False)
    tokenizer = AutoTokenizer.from_pretrained(base_folder())
    text = {**SIZES, "vocab_size": len(tokenizer), "max_position_embeddings": 64, "pad_token_id": 0}
    torch.manual_seed(0)
    models = {
        "head": BertModel(BertConfig(**text), add_pooling_layer=False),
        "causal-lm": LlamaForCausalLM(LlamaConfig(**text, num_key_value_heads=1, bos_token_id=1, eos_token_id=1)),
        "images": ViTModel(ViTConfig(**SIZES, image_size=16, patch_size=8), add_pooling_layer=False),
    }
    for kind, model in models.items():
        snapshot = folder / "hub" / f"models--tests--{kind}" / "snapshots" / COMMIT
        for where in (folder / "bases" / kind, snapshot):
            model.save_pretrained(where)
            if kind != "images":
                tokenizer.save_pretrained(where)
        (snapshot.parent.parent / "refs").mkdir()
        (snapshot.parent.parent / "refs" / "main").write_text(COMMIT)
    return folder


def settings(place, kind, base, method, source):
    task, modules = KINDS[kind]
    columns = {"causal-lm": {"prompt": "{text}", "completion": " {label}"}, "images": {"image": "image", "label": "label"}}
    tree = {
        "rounds": 2,
        "torch_threads": 1,
        "base": {"model": {"folder": str(place / "bases" / kind)}.get(source, f"tests/{kind}"), **BASES[base]},
        "task": {"name": "custom", "kind": task, "data": str(place), "train": "train.csv", "eval": "eval.csv"},
        "lora": {"r": 2, "target_modules": modules},
        "clients": {"partition": "iid", "count": 2},
        "training": {"learning_rate": 1e-2, "num_train_epochs": 1, "per_device_train_batch_size": 8},
    }
    tree["task"] |= columns.get(kind, {"text": ["text"], "label": "label"})
    tree["base"] |= {"random_weights": True} if source == "random" else {}
    for key, value in METHODS[method].items():
        tree[key] = {**tree[key], **value} if isinstance(value, dict) and key in tree else value
    return parse_config(tree)


def numbers(folder):
    """All that a run leaves behind: every tensor (its clients' too), and every number of its events but the clock's."""
    tensors = {}
    for path in sorted(folder.rglob("*.safetensors")):
        found = load_tensors(path)[0].items()
        tensors |= {f"{path.relative_to(folder)}/{name}": tensor for name, tensor in found if name != "reply"}  # it says how long it took
    clock = ("time", "seconds", "bytes_up", "device")
    events = [{name: value for name, value in event.items() if name not in clock} for event in read_events(folder / "events.jsonl")]
    return tensors, events

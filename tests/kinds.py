"""Tiny bases, adapters of many kinds made with plain PEFT, and what plain PEFT's merge says of their mean, in fp64."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

VOCABULARY, NEW, WEIGHTS = 40, 3, (0.3, 0.7)
IDS = torch.arange(3, 27).reshape(2, 12)
CAUSAL = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"]}
BERT = {"target_modules": ["query", "value"]}


def llama(**more):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=32, pad_token_id=0, **sizes, **more))


def bert(**more):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 32}
    return BertModel(BertConfig(vocab_size=VOCABULARY, pad_token_id=0, **sizes, **more))


def distilbert():
    sizes = {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 32}
    return DistilBertModel(DistilBertConfig(vocab_size=VOCABULARY, **sizes))


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=32, eos_token_id=2))


def grow(model):
    """New tokens, alike at all parties."""
    model.resize_token_embeddings(VOCABULARY + NEW, mean_resizing=False)
    generator = torch.Generator().manual_seed(7)
    for end in (model.get_input_embeddings(), model.get_output_embeddings()):
        end.weight.data[-NEW:] = torch.randn(NEW, 32, generator=generator)


BASES: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "wide": lambda: llama(head_dim=16),
    "tied": lambda: llama(tie_word_embeddings=True),
    "gpt2": gpt2,
    "bert": bert,
    "named": lambda: bert(id2label={0: "no", 1: "yes", 2: "maybe"}, label2id={"no": 0, "yes": 1, "maybe": 2}),
    "distilbert": distilbert,
}


def make_bases(root):
    """A folder for each base, with a tokenizer (GPT-2's has no padding token)."""
    words = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>", *(f"w{n}" for n in range(VOCABULARY - 3))])}
    for name, make in BASES.items():
        torch.manual_seed(1)
        make().save_pretrained(root / name)
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="<s>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        padding = {} if name == "gpt2" else {"pad_token": "<pad>"}
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", **padding).save_pretrained(root / name)
        said = json.loads((root / name / "tokenizer_config.json").read_text())
        (root / name / "tokenizer_config.json").write_text(json.dumps(said | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    torch.manual_seed(1)
    grown = AutoModelForCausalLM.from_pretrained(root / "llama")
    grow(grown)
    grown.save_pretrained(root / "grown")
    return root


@dataclass
class Kind:
    """How the adapters of two parties are made.

    Attributes:
        base: a name in `BASES`.
        lora: settings of PEFT; `second`: what the second party has differently.
        auto, options: the class of the model, and what it is loaded with.
        prepare: what is done to the base before LoRA.
        edit: what is done to a folder after it was saved, as older versions and other tools write it.
        ids: tokens that it is tried on.
    """

    base: str = "llama"
    lora: dict[str, Any] = field(default_factory=lambda: dict(CAUSAL))
    second: dict[str, Any] = field(default_factory=dict)
    auto: Any = AutoModelForCausalLM
    options: dict[str, Any] = field(default_factory=dict)
    prepare: Callable[[Any], None] = lambda model: None
    edit: Callable[[Path, int], None] = lambda folder, party: None
    ids: torch.Tensor = field(default_factory=lambda: IDS)

    def load(self, folder):
        torch.manual_seed(5)  # a head that the checkpoint does not hold
        model = self.auto.from_pretrained(folder, **self.options)
        self.prepare(model)
        return model


def configured(**changes):
    def edit(folder, party):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def rewritten(change):
    def edit(folder, party=0):
        path = folder / "adapter_model.safetensors"
        save_file(change(load_file(path)), path, {"format": "pt"})

    return edit


def as_inside(tensors):
    """A head as the first versions of PEFT wrote it: with the wrapper's names, and the one it had before."""
    old = {name.replace("classifier.", "classifier.modules_to_save."): tensor for name, tensor in tensors.items()}
    inner = {name.replace("classifier.", "classifier.original_module."): 0 * tensor for name, tensor in tensors.items()}
    return old | {name: tensor for name, tensor in inner.items() if "original_module" in name}


def only_second(edit):
    return lambda folder, party: edit(folder, party) if party else None


def trained(kind, base, folder, party):
    """An adapter as after training: all that is trained has moved."""
    settings = {"r": 4, "lora_alpha": 8, **kind.lora, **(kind.second if party else {})}
    model = get_peft_model(kind.load(base), LoraConfig(**settings))
    generator = torch.Generator().manual_seed(party)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    kind.edit(folder, party)
    return folder


def ideal(kind, base, folders):
    """In fp64 the model whose weights are the mean of those of the models that plain PEFT merges."""
    mean: dict[str, torch.Tensor] = {}
    for share, folder in zip(WEIGHTS, folders, strict=True):
        merged = PeftModel.from_pretrained(kind.load(base).double(), folder).double().merge_and_unload()
        for name, tensor in merged.state_dict().items():
            mean[name] = mean.get(name, 0) + share * tensor.double()
    for name, _ in list(merged.named_parameters(remove_duplicate=False)):
        module, _, leaf = name.rpartition(".")
        setattr(merged.get_submodule(module), leaf, torch.nn.Parameter(mean[name]))
    return merged


@torch.no_grad()
def answers(model, ids):
    return model.eval()(ids)[0].double()


def off(model, want, plain, ids):
    """Relative to the largest change of an output that the update makes."""
    return float((answers(model, ids) - want).abs().max() / (want - plain).abs().max())


def pair(bases, tmp_path, kind=None):
    kind = kind or Kind()
    return [trained(kind, bases / kind.base, tmp_path / f"site-{party}", party) for party in range(2)]

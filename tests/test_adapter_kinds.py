"""Adapters as people have them, made with plain PEFT: aggregated, verified, exported in three forms, against PEFT's own merge in fp64."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
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

from fedex_lora.adapters import aggregate_folders
from fedex_lora.errors import FedexLoraError
from fedex_lora.export import export
from fedex_lora.peft_io import load_model
from fedex_lora.verify import verify

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
    "tied": lambda: llama(tie_word_embeddings=True),
    "gpt2": gpt2,
    "bert": bert,
    "named": lambda: bert(id2label={0: "no", 1: "yes", 2: "maybe"}, label2id={"no": 0, "yes": 1, "maybe": 2}),
    "distilbert": distilbert,
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A folder for each base, with a tokenizer (GPT-2's has no padding token)."""
    root = tmp_path_factory.mktemp("bases")
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
        onto: the base that is exported onto; None: the same.
        ids: tokens that it is tried on.
    """

    base: str = "llama"
    lora: dict[str, Any] = field(default_factory=lambda: dict(CAUSAL))
    second: dict[str, Any] = field(default_factory=dict)
    auto: Any = AutoModelForCausalLM
    options: dict[str, Any] = field(default_factory=dict)
    prepare: Callable[[Any], None] = lambda model: None
    edit: Callable[[Path, int], None] = lambda folder, party: None
    onto: str | None = None
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


HEAD = {"auto": AutoModelForSequenceClassification, "options": {"num_labels": 3}}
TOKENS = torch.tensor([[5, 6, VOCABULARY, VOCABULARY + 1, 9, VOCABULARY + 2]])
PATTERNS = {"rank_pattern": {"layers.0.self_attn.q_proj": 2}, "alpha_pattern": {"v_proj": 3}}
KINDS = {
    "q and v": Kind(),
    "all-linear": Kind(lora=CAUSAL | {"target_modules": "all-linear"}),
    "rank and alpha patterns": Kind(lora=CAUSAL | PATTERNS),
    "rsLoRA at one party, another alpha": Kind(second={"use_rslora": True, "lora_alpha": 6}),
    "bfloat16 factors": Kind(edit=rewritten(lambda tensors: {name: tensor.bfloat16() for name, tensor in tensors.items()})),
    "GPT-2's Conv1D": Kind("gpt2", {"task_type": "CAUSAL_LM", "target_modules": ["c_attn", "c_proj"]}),
    "LoRA on embeddings": Kind(lora=CAUSAL | {"target_modules": ["q_proj", "embed_tokens"]}),
    "some layers only": Kind(lora=CAUSAL | {"layers_to_transform": [1]}),
    "modules left out": Kind(lora=CAUSAL | {"target_modules": "all-linear", "exclude_modules": ["down_proj"]}),
    "BERT classifier, classes named": Kind("named", BERT | {"task_type": "SEQ_CLS"}, **HEAD),
    "DistilBERT classifier": Kind("distilbert", {"task_type": "SEQ_CLS", "target_modules": ["q_lin", "v_lin"]}, **HEAD),
    "GPT-2 classifier, no padding token": Kind("gpt2", {"task_type": "SEQ_CLS", "target_modules": ["c_attn"]}, ids=IDS[:1], **HEAD),
    "tokens classified": Kind("bert", BERT | {"task_type": "TOKEN_CLS"}, {}, AutoModelForTokenClassification, {"num_labels": 5}),
    "answers in a text": Kind("bert", BERT | {"task_type": "QUESTION_ANS"}, {}, AutoModelForQuestionAnswering),
    "a head before PEFT 0.10": Kind("bert", BERT | {"task_type": "SEQ_CLS"}, edit=configured(modules_to_save=None), **HEAD),
    "norms trained whole": Kind(lora=CAUSAL | {"modules_to_save": ["norm"]}),
    "an output layer trained whole, tied before": Kind("tied", CAUSAL | {"modules_to_save": ["lm_head"]}),
    "tied embeddings": Kind("tied"),
    "a vocabulary resized alike": Kind(prepare=grow, ids=TOKENS),
    "new tokens trained whole": Kind(lora=CAUSAL | {"modules_to_save": ["embed_tokens", "lm_head"]}, prepare=grow, ids=TOKENS),
    "no task type at one party": Kind(edit=only_second(configured(task_type=None))),
    "no base at one party": Kind(edit=only_second(configured(base_model_name_or_path=None))),
}


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
    for name, parameter in merged.named_parameters(remove_duplicate=False):
        module, _, leaf = name.rpartition(".")
        setattr(merged.get_submodule(module), leaf, torch.nn.Parameter(mean[name]))
    return merged


@torch.no_grad()
def answers(model, ids):
    return model.eval()(ids)[0].double()


def off(model, want, plain, ids):
    """Relative to the largest change of an output that the update makes."""
    return float((answers(model, ids) - want).abs().max() / (want - plain).abs().max())


@pytest.fixture(params=KINDS)
def made(request, bases, tmp_path):
    """The kind, its base, the parties' folders, the ideal answers and the base's own."""
    kind = KINDS[request.param]
    folders = [trained(kind, bases / kind.base, tmp_path / f"site-{party}", party) for party in range(2)]
    sources = folders
    if request.param == "a head before PEFT 0.10":  # which today's PEFT reads in newer words
        sources = [shutil.copytree(folder, tmp_path / f"new-{folder.name}") for folder in folders]
        for folder in folders:
            rewritten(as_inside)(folder)
    want = answers(ideal(kind, bases / kind.base, sources), kind.ids)
    return kind, bases / kind.base, folders, want, answers(kind.load(bases / kind.base).double(), kind.ids)


def test_what_people_have_comes_out_right(made, tmp_path):
    """Aggregated, verified, exported in three forms; every one within 1e-5 of the change that the update makes."""
    kind, base, folders, want, plain = made
    out = tmp_path / "out"
    assert aggregate_folders(folders, out, "fedex", WEIGHTS, None)["max_relative_error"] < 1e-6
    assert verify(out, str(base))["max_relative_error"] < 1e-6
    assert off(load_model(out, base), want, plain, kind.ids) < 1e-5
    for form in ("merged", "adapter", "base+adapter"):
        export(out, form, tmp_path / form, str(base))
    merged = kind.auto.from_pretrained(tmp_path / "merged")
    assert off(merged, want, plain, kind.ids) < 1e-5
    assert off(PeftModel.from_pretrained(kind.load(base), tmp_path / "adapter"), want, plain, kind.ids) < 1e-5
    below = kind.auto.from_pretrained(tmp_path / "base+adapter" / "base")
    assert off(PeftModel.from_pretrained(below, tmp_path / "base+adapter" / "adapter"), want, plain, kind.ids) < 1e-5
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.pad_token_id == merged.config.pad_token_id is not None
    assert json.loads((tmp_path / "merged" / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    if kind.base == "named":
        assert merged.config.id2label == {0: "no", 1: "yes", 2: "maybe"}


def pair(bases, tmp_path, kind=None):
    kind = kind or Kind()
    return [trained(kind, bases / kind.base, tmp_path / f"site-{party}", party) for party in range(2)]

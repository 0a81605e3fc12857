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
    "wide": lambda: llama(head_dim=16),
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
    loaded = load_model(out, base)
    assert off(loaded, want, plain, kind.ids) < 1e-5
    assert off(load_model(out, kind.load(base)), want, plain, kind.ids) < 1e-5
    assert answers(loaded, kind.ids.repeat(2, 1)).shape[0] == 2 * len(kind.ids)  # several texts need a token to pad with
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


# What is refused, by the line that says why


def without_keys(folder, party):
    """Settings as another tool writes them, so that only the tensors tell."""
    path = folder / "adapter_config.json"
    changes = {"use_dora": False, "lora_bias": False, "kasa_config": None, "init_lora_weights": True, "trainable_token_indices": None}
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def emptied(tensors):
    return {name: tensor.new_empty(0) if "layers.1" in name else tensor for name, tensor in tensors.items()}


def inner_names(tensors):
    return {name.replace("lora_A.", "lora_A.default."): tensor for name, tensor in tensors.items()}


REFUSED = {
    "DoRA": (Kind(lora=CAUSAL | {"use_dora": True}), "use_dora is set"),
    "DoRA's magnitude": (Kind(lora=CAUSAL | {"use_dora": True}, edit=without_keys), "lora_magnitude_vector is no factor of plain LoRA"),
    "a LoRA bias": (Kind(lora=CAUSAL | {"lora_bias": True}), "lora_bias is set"),
    "a LoRA bias's tensor": (Kind(lora=CAUSAL | {"lora_bias": True}, edit=without_keys), r"lora_B\.bias is no factor of plain LoRA"),
    "PiSSA": (Kind(lora=CAUSAL | {"init_lora_weights": "pissa"}), "init_lora_weights='pissa' changes the base"),
    "single tokens": (Kind(lora=CAUSAL | {"trainable_token_indices": [3, 4]}), "trainable_token_indices is set"),
    "single tokens' tensor": (
        Kind(lora=CAUSAL | {"trainable_token_indices": [3, 4]}, edit=without_keys),
        "trainable_tokens_delta is no factor of plain LoRA",
    ),
    "biases": (Kind(lora=CAUSAL | {"bias": "all"}), "bias='all' trains biases"),
    "a setting of tomorrow": (Kind(edit=configured(use_sigmoid_gate=True)), "use_sigmoid_gate is set"),
    "ZeRO-3": (Kind(edit=rewritten(emptied)), "is empty: DeepSpeed ZeRO-3 or FSDP saved it before its parts were gathered"),
    "names inside PEFT": (Kind(edit=rewritten(inner_names)), "is a name inside PEFT, not of its files"),
    "other tasks": (Kind(edit=only_second(configured(task_type="SEQ_CLS"))), "different task types"),
    "a vocabulary resized otherwise": (
        Kind(
            prepare=grow,
            edit=only_second(rewritten(lambda tensors: {k: t + ("embed" in k) for k, t in tensors.items()})),
        ),
        r"differ in model\.embed_tokens\.weight, which by PEFT's rule was not trained",
    ),
    "a name where a list belongs": (Kind(edit=configured(modules_to_save="lm_head")), "modules_to_save must be a list"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_exact_mean_is_refused_by_name(name, bases, tmp_path):
    kind, line = REFUSED[name]
    with pytest.raises(FedexLoraError, match=line) as caught:
        aggregate_folders(pair(bases, tmp_path, kind), tmp_path / "out", "fedex", None, None)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_kasa_is_refused_by_its_setting_and_by_its_tensors(bases, tmp_path):
    """Its third factor, a diagonal: named as PEFT names it."""
    folder, other = pair(bases, tmp_path)
    configured(kasa_config={"beta": 1e-4})(folder, 0)
    with pytest.raises(FedexLoraError, match="kasa_config is set"):
        aggregate_folders([folder, other], tmp_path / "out", "fedex", None, None)
    configured(kasa_config=None)(folder, 0)
    diagonal = "base_model.model.model.layers.0.self_attn.q_proj.lora_diag"
    rewritten(lambda tensors: tensors | {diagonal: torch.ones(4)})(folder)
    with pytest.raises(FedexLoraError, match=r"q_proj\.lora_diag is no factor of plain LoRA"):
        aggregate_folders([folder, other], tmp_path / "out", "fedex", None, None)


def test_folders_that_are_none_name_the_one_that_is(bases, tmp_path):
    inner = trained(Kind(), bases / "llama", tmp_path / "run" / "checkpoint-500", 0)
    with pytest.raises(FedexLoraError, match=r"has no adapter_config.json; give one of the 1 folders in it that do: .*checkpoint-500"):
        aggregate_folders([inner.parent, inner], tmp_path / "out", "fedex", None, None)
    with pytest.raises(FedexLoraError, match="if it is a name on the hub, fetch it first: hf download someone/lora"):
        aggregate_folders([Path("someone/lora"), inner], tmp_path / "out", "fedex", None, None)
    with pytest.raises(FedexLoraError, match="is not there at all"):
        aggregate_folders([tmp_path / "absent", inner], tmp_path / "out", "fedex", None, None)


# One base, or several


def test_one_base_at_two_places_is_told_by_its_weights(bases, tmp_path):
    """Copies are one base, also in 16 bits; a base with one other row is not, whatever is said."""
    folders = pair(bases, tmp_path)
    copy, half, other = (tmp_path / name for name in ("copy", "half", "other"))
    shutil.copytree(bases / "llama", copy)
    AutoModelForCausalLM.from_pretrained(bases / "llama", dtype=torch.bfloat16).save_pretrained(half)
    changed = AutoModelForCausalLM.from_pretrained(bases / "llama")
    changed.model.norm.weight.data[3] += 0.5
    changed.save_pretrained(other)
    for place in (copy, half):
        configured(base_model_name_or_path=str(place))(folders[1], 1)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        assert aggregate_folders(folders, tmp_path / "out", "fedex", None, None)["max_relative_error"] < 1e-6
    configured(base_model_name_or_path=str(other))(folders[1], 1)
    for base in (None, str(bases / "llama")):
        with pytest.raises(FedexLoraError, match=r"they differ in model\.norm\.weight, and adapters of different bases have no mean"):
            aggregate_folders(folders, tmp_path / "no", "fedex", None, None, base=base)
    configured(base_model_name_or_path=str(bases / "gpt2"))(folders[1], 1)
    with pytest.raises(FedexLoraError, match="they differ in model_type"):
        aggregate_folders(folders, tmp_path / "no", "fedex", None, None)


def test_bases_that_are_elsewhere_are_one_if_somebody_says_so(bases, tmp_path):
    folders = pair(bases, tmp_path)
    for folder, name in zip(folders, ("unsloth/Llama-3.2-1B-bnb-4bit", "/mnt/nas/llama"), strict=True):
        configured(base_model_name_or_path=name)(folder, 0)
    with pytest.raises(FedexLoraError, match="if they are one base at several places, or in other bits, say which by --base MODEL"):
        aggregate_folders(folders, tmp_path / "out", "fedex", None, None)
    aggregate_folders(folders, tmp_path / "out", "fedex", None, None, base=str(bases / "llama"))
    assert verify(tmp_path / "out", str(bases / "llama"))["max_relative_error"] < 1e-6
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(bases / "llama")
    with pytest.raises(FedexLoraError, match=r"q_proj is 32 x 32, and 64 x 32 in .*wide: give the base that it was trained on"):
        aggregate_folders(folders, tmp_path / "no", "fedex", None, None, base=str(bases / "wide"))


# A second round


def second(bases, tmp_path, result, name):
    """Adapters trained on from a result, saved as a party saves them."""
    folders = []
    for party in range(2):
        model = load_model(result, bases / "llama")
        generator = torch.Generator().manual_seed(20 + party)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        folders.append(tmp_path / f"{name}-{party}")
        model.save_pretrained(folders[-1])
    return folders


def test_a_second_round_without_its_state_or_with_a_stale_one_is_refused(bases, tmp_path):
    """The mark travels with `save_pretrained`; with the right state the result is the mean of the parties' models, in fp64."""
    one, two = tmp_path / "one", tmp_path / "two"
    aggregate_folders(pair(bases, tmp_path), one, "fedex", WEIGHTS, None, parties=tmp_path / "one-for-parties")
    folders = second(bases, tmp_path, tmp_path / "one-for-parties", "second")
    with pytest.raises(FedexLoraError, match="not on the plain base: give by --state the result folder"):
        aggregate_folders(folders, two, "fedex", WEIGHTS, None)
    assert not two.exists()
    aggregate_folders(folders, two, "fedex", WEIGHTS, one)
    merged = [load_model(one, bases / "llama").double() for _ in folders]
    for model, folder in zip(merged, folders, strict=True):
        tensors = load_file(folder / "adapter_model.safetensors")
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.data = tensors[name.replace(".default", "")].double()
    states = [model.merge_and_unload().state_dict() for model in merged]
    want_model = AutoModelForCausalLM.from_pretrained(bases / "llama").double()
    plain = answers(want_model, IDS)
    want_model.load_state_dict({name: sum(share * state[name] for share, state in zip(WEIGHTS, states, strict=True)) for name in states[0]})
    assert off(load_model(two, bases / "llama"), answers(want_model, IDS), plain, IDS) < 1e-5
    third = second(bases, tmp_path, two, "third")
    with pytest.raises(FedexLoraError, match="was trained on another base delta than the one in --state"):
        aggregate_folders(third, tmp_path / "three", "fedex", WEIGHTS, one)
    plain_folder = trained(Kind(), bases / "llama", tmp_path / "plain", 9)
    with pytest.raises(FedexLoraError, match="does not say what its base had gained, and others do"):
        aggregate_folders([third[0], plain_folder], tmp_path / "three", "fedex", WEIGHTS, two)


def test_a_lost_frozen_tensor_is_found(bases, tmp_path):
    """`verify` looks for the embeddings that all parties brought, too."""
    from fedex_lora.storage import sha256

    out = tmp_path / "out"
    aggregate_folders(pair(bases, tmp_path, Kind(prepare=grow)), out, "fedex", None, None)
    assert verify(out)["max_relative_error"] < 1e-6
    rewritten(lambda tensors: {name: tensor for name, tensor in tensors.items() if "embed" not in name})(out / "adapter")
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["files"]["adapter/adapter_model.safetensors"] = sha256(out / "adapter" / "adapter_model.safetensors")
    (out / "manifest.json").write_text(json.dumps(manifest))
    assert verify(out)["max_relative_error"] == float("inf")


def test_embeddings_that_nobody_brings_are_asked_for(bases, tmp_path):
    """Input embeddings of a grown base were trained, and its output embeddings are nowhere: the line says which base to give."""
    kind = Kind(lora=CAUSAL | {"modules_to_save": ["embed_tokens"]}, prepare=grow)
    folders = pair(bases, tmp_path, kind)
    for folder in folders:
        rewritten(lambda tensors: {name: tensor for name, tensor in tensors.items() if "lm_head" not in name})(folder)
    aggregate_folders(folders, tmp_path / "out", "fedex", None, None)
    with pytest.raises(FedexLoraError, match=f"embeddings of {VOCABULARY + NEW} tokens, the base of {VOCABULARY}.*by --base"):
        load_model(tmp_path / "out", bases / "llama")
    load_model(tmp_path / "out", bases / "grown")

"""Adapters as people have them, made with plain PEFT: aggregated, verified, exported in three forms, against PEFT's own merge in fp64."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from tests.kinds import (
    BERT,
    CAUSAL,
    IDS,
    NEW,
    VOCABULARY,
    WEIGHTS,
    Kind,
    answers,
    as_inside,
    configured,
    grow,
    ideal,
    off,
    only_second,
    rewritten,
    trained,
)
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from fedex_lora.evaluation._model import open_source
from fedex_lora.models.build import load_model, model_kind
from fedex_lora.models.export import export
from fedex_lora.offline.aggregate_folders import aggregate_folders
from fedex_lora.offline.verify import verify
from fedex_lora.storage.result import read_result

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
        tokens = export(out, form, tmp_path / form, str(base))["tokens"]
        assert tokens == (VOCABULARY + NEW if kind.ids is TOKENS and form == "adapter" else None)
    merged = kind.auto.from_pretrained(tmp_path / "merged")
    assert off(merged, want, plain, kind.ids) < 1e-5
    assert off(PeftModel.from_pretrained(kind.load(base), tmp_path / "adapter"), want, plain, kind.ids) < 1e-5
    measured = open_source(str(tmp_path / "adapter"), model_kind(read_result(out), str(base)), **kind.options)
    assert off(measured.model, want, plain, kind.ids) < 1e-5
    below = kind.auto.from_pretrained(tmp_path / "base+adapter" / "base")
    assert off(PeftModel.from_pretrained(below, tmp_path / "base+adapter" / "adapter"), want, plain, kind.ids) < 1e-5
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.pad_token_id == merged.config.pad_token_id is not None
    assert json.loads((tmp_path / "merged" / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    if kind.base == "named":
        assert merged.config.id2label == {0: "no", 1: "yes", 2: "maybe"}

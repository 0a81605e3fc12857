"""Adapters that have no exact mean, of several bases, or on another base delta: what is refused, and by which line."""

import json
import shutil
from itertools import product
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tests.kinds import CAUSAL, IDS, NEW, VOCABULARY, WEIGHTS, Kind, answers, configured, grow, off, only_second, pair, rewritten, trained
from transformers import (
    AutoModelForCausalLM,
)

from fedex_lora import METHODS
from fedex_lora.config import Lora
from fedex_lora.errors import FedexLoraError, ModelError
from fedex_lora.evaluation._model import open_source
from fedex_lora.models.build import load_model
from fedex_lora.models.export import export
from fedex_lora.models.start import read_start
from fedex_lora.offline.aggregate_folders import aggregate_folders
from fedex_lora.offline.merge_results import merge_folders
from fedex_lora.offline.together import distinct_names
from fedex_lora.offline.verify import verify


def test_folders_of_one_name_are_told_apart_by_their_paths():
    folders = [Path(name) for name in ("/x/a_b/c", "/x/a/b_c", "/x/y/c")]
    assert distinct_names(folders) == ["x/a_b/c", "x/a/b_c", "x/y/c"]
    assert distinct_names(folders[:2]) == ["c", "b_c"]


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


def test_a_configuration_without_end_is_refused(bases, tmp_path):
    folder = trained(Kind(), bases / "llama", tmp_path / "a", 0)
    (folder / "adapter_config.json").write_text("[" * 100_000)
    with pytest.raises(FedexLoraError, match=r"adapter_config\.json cannot be read"):
        aggregate_folders([folder], tmp_path / "out")


# One base, or several


def test_one_base_at_two_places_is_told_by_its_weights(bases, tmp_path):
    """Copies are one base, also in 16 bits, or with layers packed in 4; a base with one other number is not, whatever is said."""
    folders = pair(bases, tmp_path)
    copy, half, packed, other, nothing = (tmp_path / name for name in ("copy", "half", "packed", "other", "nothing"))
    shutil.copytree(bases / "llama", copy)
    AutoModelForCausalLM.from_pretrained(bases / "llama", dtype=torch.bfloat16).save_pretrained(half)
    shutil.copytree(half, packed)
    tensors = load_file(packed / "model.safetensors")
    layers = {name: torch.zeros(tensor.numel() // 2, 1, dtype=torch.uint8) for name, tensor in tensors.items() if "proj" in name}
    save_file(tensors | layers, packed / "model.safetensors", {"format": "pt"})
    changed = AutoModelForCausalLM.from_pretrained(bases / "llama")
    changed.model.norm.weight.data[3] += 0.5
    changed.save_pretrained(other)
    for place in (copy, half, packed):
        configured(base_model_name_or_path=str(place))(folders[1], 1)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        assert aggregate_folders(folders, tmp_path / "out", "fedex", None, None)["max_relative_error"] < 1e-6
    configured(base_model_name_or_path=str(other))(folders[1], 1)
    for base in (None, str(bases / "llama")):
        with pytest.raises(FedexLoraError, match=r"they differ in model\.norm\.weight, and adapters of different bases have no mean"):
            aggregate_folders(folders, tmp_path / "no", "fedex", None, None, base=base)
    shutil.copytree(copy, nothing)
    (nothing / "model.safetensors").unlink()
    configured(base_model_name_or_path=str(nothing))(folders[1], 1)
    with pytest.raises(FedexLoraError, match="say which by --base MODEL"):
        aggregate_folders(folders, tmp_path / "no", "fedex", None, None)
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


def revised(folders, *revisions):
    for folder, revision in zip(folders, revisions, strict=True):
        configured(base_model_name_or_path="org/llama", revision=revision)(folder, 0)


def test_a_revision_is_another_base_and_is_kept(bases, tmp_path):
    """Of a name on the hub; none is "main". By its name no other one is loaded."""
    folders, out, place = pair(bases, tmp_path), tmp_path / "out", str(bases / "llama")
    revised(folders, "v2", None)
    with pytest.raises(FedexLoraError, match=r"on revision main of org/llama, .* on v2: adapters of different bases have no mean; if they"):
        aggregate_folders(folders, out)
    aggregate_folders(folders, tmp_path / "said", base=place)
    for folder, revision in zip(folders, ("v2", "main"), strict=True):
        revised([folder], revision)
        aggregate_folders([folder], tmp_path / revision)
    with pytest.raises(FedexLoraError, match="adapters of different bases have no mean"):
        merge_folders([tmp_path / "v2", tmp_path / "main"], out, None)
    merge_folders([tmp_path / "v2", tmp_path / "main"], tmp_path / "merged", None, base=place)
    revised(folders, "v2", "v2")
    aggregate_folders(folders, out)
    for folder in second(bases, tmp_path, out, "second"):
        revised([folder], json.loads((folder / "adapter_config.json").read_text())["revision"])
    aggregate_folders([tmp_path / "second-0", tmp_path / "second-1"], tmp_path / "two", previous=out)
    wanted = {"said": None, "v2": "v2", "main": None, "merged": None, "out": "v2", "two": "v2"}
    for name, part in product(wanted, ("adapter", "trainable")):
        assert json.loads((tmp_path / name / part / "adapter_config.json").read_text())["revision"] == wanted[name]
    for load in (
        lambda: load_model(out, "org/llama"),
        lambda: open_source(str(out / "adapter"), "causal-lm"),
        lambda: read_start(out, "causal-lm", "org/llama", METHODS["fedex"], Lora(), []),
    ):
        with pytest.raises(ModelError, match="hf download org/llama --revision v2 --local-dir FOLDER, and give FOLDER as the base"):
            load()
    export(out, "adapter", tmp_path / "export", place)
    assert json.loads((tmp_path / "export" / "adapter_config.json").read_text())["revision"] is None


# A second round


def second(bases, tmp_path, result, name, **how):
    """Adapters trained on from a result, saved as a party saves them."""
    folders = []
    for party in range(2):
        model = load_model(result, bases / "llama")
        generator = torch.Generator().manual_seed(20 + party)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        folders.append(tmp_path / f"{name}-{party}")
        model.save_pretrained(folders[-1], **how)
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
    with pytest.warns(UserWarning, match="fedex_lora_base_delta"):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bases / "llama"), folders[0])  # which is not right, and says so
    third = second(bases, tmp_path, two, "third")
    with pytest.raises(FedexLoraError, match="was trained on another base delta than that of --state"):
        aggregate_folders(third, tmp_path / "three", "fedex", WEIGHTS, one)
    plain_folder = trained(Kind(), bases / "llama", tmp_path / "plain", 9)
    with pytest.raises(FedexLoraError, match="does not say what its base had gained, and others do: save it from"):
        aggregate_folders([third[0], plain_folder], tmp_path / "three", "fedex", WEIGHTS, two)
    said = aggregate_folders(pair(bases, tmp_path), tmp_path / "three", "fedex", WEIGHTS, one)  # the first round's once more
    assert [note.partition(":")[0] for note in said["notes"]] == ["no adapter says what its base had gained"]


def test_a_vocabulary_that_only_the_state_holds_goes_on(bases, tmp_path):
    """PEFT need not save embeddings that nobody trains."""
    one, two = tmp_path / "one", tmp_path / "two"
    aggregate_folders(pair(bases, tmp_path, Kind(prepare=grow)), one)
    folders = second(bases, tmp_path, one, "second", save_embedding_layers=False)
    assert not any("embed" in name for name in load_file(folders[0] / "adapter_model.safetensors"))
    aggregate_folders(folders, two, previous=one)
    grown, loaded = AutoModelForCausalLM.from_pretrained(bases / "grown"), load_model(two, bases / "llama")
    for name in ("get_input_embeddings", "get_output_embeddings"):
        assert torch.equal(getattr(loaded, name)().weight, getattr(grown, name)().weight)
    assert verify(two)["max_relative_error"] < 1e-6
    folders = second(bases, tmp_path, two, "third", save_embedding_layers=True)
    for folder in folders:
        rewritten(lambda tensors: {name: tensor + ("lm_head" in name) for name, tensor in tensors.items()})(folder)
    with pytest.raises(FedexLoraError, match=r"the result of --state differ in lm_head\.weight, which was not trained: save the adapters"):
        aggregate_folders(folders, tmp_path / "three", previous=two)


def test_a_lost_frozen_tensor_is_found(bases, tmp_path):
    """`verify` looks for the embeddings that all parties brought, too."""
    from fedex_lora.storage.files import checksum

    out = tmp_path / "out"
    aggregate_folders(pair(bases, tmp_path, Kind(prepare=grow)), out, "fedex", None, None)
    assert verify(out)["max_relative_error"] < 1e-6
    rewritten(lambda tensors: {name: tensor for name, tensor in tensors.items() if "embed" not in name})(out / "adapter")
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["files"]["adapter/adapter_model.safetensors"] = checksum(out / "adapter" / "adapter_model.safetensors")
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

"""Real PEFT models: our factors, base deltas and folders against the logits of an fp64 model that holds the ideal weights."""

import copy
import json
import shutil
from contextlib import suppress
from dataclasses import replace
from functools import partial

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tests import oracle
from transformers import AutoModelForCausalLM, BertConfig, BertForSequenceClassification
from transformers.pytorch_utils import Conv1D

from fedex_lora import aggregate, load_model
from fedex_lora.aggregation import server_state as server
from fedex_lora.config import Base, Lora, base_folder
from fedex_lora.errors import AdapterError, AggregationError, FedexLoraError, ModelError, StorageError, UsageError
from fedex_lora.evaluation._model import open_source
from fedex_lora.models.base_weights import FrozenBase
from fedex_lora.models.loading import config_of, load_base
from fedex_lora.models.lora import add_lora, lora_layers, read_model, read_other, write_model
from fedex_lora.models.processor import load_processor
from fedex_lora.offline.aggregate_folders import aggregate_folders
from fedex_lora.offline.verify import verify
from fedex_lora.storage.adapter_folder import read_adapter_folder
from fedex_lora.types import ClientUpdate

TARGETS = {"demo": "all-linear", "gpt2": ["c_attn", "c_proj", "c_fc"]}


@pytest.fixture(params=["demo", "gpt2"])
def base(request, gpt2):
    """A real Llama with grouped queries (square, wide and tall nn.Linear), and a GPT-2 (Conv1D)."""
    return request.param, str(base_folder() if request.param == "demo" else gpt2)


def adapted(base, seed, **lora):
    """A PEFT model with adapters as after training: both factors random."""
    name, folder = base
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder),
        LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 10, "target_modules": TARGETS[name], **lora}),
    )
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in model.named_parameters():
        if ".lora_" in key:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def ideal_logits(base, adapters, p, ids):
    """Logits of the base in fp64 with `W0 + sum p_i s_i B_i A_i` written into it, orientation by hand."""
    model = AutoModelForCausalLM.from_pretrained(base[1]).double().eval()
    modules = dict(model.named_modules())
    for name in adapters[0]:
        delta = torch.from_numpy(oracle.ideal([adapter[name] for adapter in adapters], p))
        layer = modules[name]
        layer.weight.data += delta.T if isinstance(layer, Conv1D) else delta
    with torch.no_grad():
        return model(ids).logits


def error(model, want, ids):
    with torch.no_grad():
        return float((model(ids).logits.double() - want).abs().max() / want.abs().max())


IDS = torch.arange(2, 26).reshape(2, 12)
VARIANTS = {
    "alpha != r": [{"lora_alpha": 10}] * 3,
    "rslora": [{"use_rslora": True}] * 3,
    "alphas that differ": [{"lora_alpha": 4}, {"lora_alpha": 10}, {"lora_alpha": 16, "use_rslora": True}],
    "patterns": [{"rank_pattern": {"0.*q_proj": 2, "h.0.attn.c_attn": 2}, "alpha_pattern": {"o_proj": 3, "c_fc": 3}}] * 3,
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_aggregated_folders_give_the_logits_of_the_ideal(base, variant, tmp_path):
    """`adapter/` in plain PEFT, and `load_model(OUT, base)`, both within 1e-5 of the fp64 ideal; the trainable part alone is far off."""
    folders, p = [], oracle.shares([2, 3, 5])
    for i, lora in enumerate(VARIANTS[variant]):
        folders.append(tmp_path / f"site-{i}")
        adapted(base, i, **lora).save_pretrained(folders[-1])
    out = tmp_path / "out"
    summary = aggregate_folders(folders, out, "fedex", [2, 3, 5], None)
    assert summary["max_relative_error"] < 1e-6
    want = ideal_logits(base, [read_adapter_folder(folder).adapter for folder in folders], p, IDS)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base[1]), out / "adapter").eval()
    assert error(plain, want, IDS) < 1e-5
    assert error(load_model(out, base[1]), want, IDS) < 1e-5
    alone = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base[1]), out / "trainable").eval()
    assert error(alone, want, IDS) > 1e-3
    checked = verify(out, base[1])
    assert checked["max_relative_error"] < 1e-6
    assert checked["realised_error"] < 3 * checked["floor"]


def test_fedit_folders_miss_the_ideal(base, tmp_path):
    folders = [tmp_path / name for name in "ab"]
    for i, folder in enumerate(folders):
        adapted(base, i).save_pretrained(folder)
    assert aggregate_folders(folders, tmp_path / "out", "fedit", None, None)["max_relative_error"] > 0.1


def test_a_second_round_on_top_of_a_result(base, tmp_path):
    """--state: the ideal is the mean of models that start from the earlier base delta."""
    first = [tmp_path / name for name in "ab"]
    for i, folder in enumerate(first):
        adapted(base, i).save_pretrained(folder)
    aggregate_folders(first, tmp_path / "one", "fedex", None, None)
    second = [tmp_path / name for name in "cd"]
    for i, folder in enumerate(second):
        adapted(base, 10 + i).save_pretrained(folder)
    summary = aggregate_folders(second, tmp_path / "two", "fedex", None, tmp_path / "one")
    assert summary["max_relative_error"] < 1e-6
    assert verify(tmp_path / "two")["max_relative_error"] < 1e-6
    adapters = [read_adapter_folder(folder).adapter for folder in second]
    model = AutoModelForCausalLM.from_pretrained(base[1]).double().eval()
    from fedex_lora.storage.result import read_result

    earlier = read_result(tmp_path / "one").base_delta
    for name, layer in model.named_modules():
        if name in adapters[0]:
            delta = torch.from_numpy(oracle.ideal([adapter[name] for adapter in adapters], [0.5, 0.5])) + earlier[name].dense()
            layer.weight.data += delta.T if isinstance(layer, Conv1D) else delta
    with torch.no_grad():
        want = model(IDS).logits
    assert error(load_model(tmp_path / "two", base[1]), want, IDS) < 1e-5
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base[1]), tmp_path / "two" / "adapter").eval()
    assert error(plain, want, IDS) < 1e-5


def test_a_round_in_a_model_gives_the_ideal_logits(base):
    """The loop's own path: read the factors of a model, step, fold, write back."""
    models = [adapted(base, i) for i in range(3)]
    updates = [ClientUpdate(f"c{i}", read_model(model), i + 1, read_other(model)) for i, model in enumerate(models)]
    model = models[0]
    folded = FrozenBase(model)
    state, result = server.step(server.init(updates[0].adapter, {}), updates)
    folded.set(state.base_delta)
    write_model(model, state.adapter, state.other)
    want = ideal_logits(base, [update.adapter for update in updates], oracle.shares([1, 2, 3]), IDS)
    assert error(model, want, IDS) < 1e-5
    assert result.residual.keys() == state.adapter.keys()


def test_setting_the_base_twice_is_setting_it_once(base):
    model = adapted(base, 0)
    pristine = {name: parameter.clone() for name, parameter in model.named_parameters()}
    folded = FrozenBase(model)
    delta = aggregate([ClientUpdate(f"c{i}", read_model(adapted(base, i)), 1) for i in range(2)]).residual
    folded.set({name: replace(gain) for name, gain in delta.items()})
    once = {name: parameter.clone() for name, parameter in model.named_parameters()}
    folded.set(delta)
    assert all(torch.equal(parameter, once[name]) for name, parameter in model.named_parameters())
    assert any(not torch.equal(parameter, pristine[name]) for name, parameter in model.named_parameters())
    folded.set({})
    assert all(torch.equal(parameter, pristine[name]) for name, parameter in model.named_parameters())


def test_pristine_weights_are_read_from_the_checkpoint_not_copied():
    """Two bases of one file: after the weights in memory change, W0 still comes from the file."""
    model = adapted(("demo", str(base_folder())), 0)
    frozen = FrozenBase(model)
    name, layer = next(iter(lora_layers(model).items()))
    want = layer.weight().clone()
    layer.base.weight.data += 1
    assert torch.equal(frozen._homes[name].w0(), want)


def test_a_stray_file_beside_a_checkpoint_is_none_of_its_weights(tmp_path):
    """A pointer of Git LFS, say, that transformers does not read either."""
    folder = shutil.copytree(base_folder(), tmp_path / "base")
    (folder / "consolidated.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123\n")
    names = [FrozenBase(adapted(("demo", str(where)), 0)).fingerprint() for where in (folder, base_folder())]
    assert names[0] == names[1]


def test_a_tied_weight_is_never_folded(gpt2):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(gpt2), LoraConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(ModelError, match=r"shares its weight with transformer.wte, and folding would change both: set base.delta"):
        FrozenBase(model, "fold")
    assert FrozenBase(model).homes == {"fold": 0, "side": 1}


def test_a_half_precision_base_is_not_folded():
    model = AutoModelForCausalLM.from_pretrained(base_folder(), dtype=torch.bfloat16)
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ModelError, match=r"bfloat16, and folding is exact in float32 only: set base.delta"):
        FrozenBase(model, "fold")
    assert FrozenBase(model).homes["fold"] == 0


def classifier(seed):
    torch.manual_seed(seed)
    config = BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, num_labels=3)
    return BertForSequenceClassification(config)


def test_a_classification_head_is_averaged_and_loaded(tmp_path):
    """`modules_to_save`: the head travels as `other`, in the folder and in the model."""
    base, heads = classifier(0), []
    for i in range(2):
        model = get_peft_model(copy.deepcopy(base), LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"]))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
        assert read_other(model).keys() == {"classifier.weight", "classifier.bias"}
        heads.append(read_other(model)["classifier.weight"])
        model.save_pretrained(tmp_path / f"{i}")
    aggregate_folders([tmp_path / "0", tmp_path / "1"], tmp_path / "out", "fedex", None, None)
    model = load_model(tmp_path / "out", copy.deepcopy(base))
    assert torch.allclose(read_other(model)["classifier.weight"], (heads[0] + heads[1]) / 2)
    plain = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "out" / "adapter").eval()
    ids = torch.arange(2, 14).reshape(2, 6)
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, plain(ids).logits, atol=1e-5)


# What is refused, and what is said of it


def saved(tmp_path, name="site", **lora):
    adapted(("demo", str(base_folder())), 0, **lora).save_pretrained(tmp_path / name)
    return tmp_path / name


def edit_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"init_lora_weights": "corda"}, "corda"),
        ({"init_lora_weights": "loftq"}, "loftq"),
        ({"lora_bias": True}, "lora_bias"),
        ({"target_parameters": ["w"]}, "target_parameters"),
        ({"alora_invocation_tokens": [1]}, "alora"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"init_lora_weights": "lora_ga"}, "lora_ga"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"lora_alpha": "x"}, "lora_alpha is x, not a number"),
        ({"lora_alpha": 10**400}, "lora_alpha is 1000000"),
        ({"base_model_name_or_path": 5}, "base_model_name_or_path must be a text"),
        ({"task_type": ["CAUSAL_LM"]}, "task_type must be a text"),
        ({"alpha_pattern": {"(": 3}}, "no regular expression"),
    ],
)
def test_what_the_algebra_does_not_cover_is_refused_by_name(changes, message, tmp_path):
    folder = saved(tmp_path)
    edit_config(folder, **changes)
    with pytest.raises(AdapterError, match=message):
        read_adapter_folder(folder)


def truncate(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


BROKEN = {
    "truncated": (truncate, StorageError, "truncated"),
    "missing weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), StorageError, "missing"),
    "missing config": (lambda folder: (folder / "adapter_config.json").unlink(), StorageError, "no adapter_config.json"),
    "broken config": (lambda folder: (folder / "adapter_config.json").write_text("{"), StorageError, "cannot be read"),
    "other base": (lambda folder: edit_config(folder, base_model_name_or_path="other"), AggregationError, "different bases"),
    "other task": (lambda folder: edit_config(folder, task_type="SEQ_CLS"), AggregationError, "task types"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_folders_are_refused_and_nothing_is_written(case, tmp_path):
    breaks, kind, message = BROKEN[case]
    folders = [saved(tmp_path, "a"), saved(tmp_path, "b")]
    breaks(folders[1])
    with pytest.raises(kind, match=message):
        aggregate_folders(folders, tmp_path / "out", "fedex", None, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_different_targets_and_ranks_are_refused(tmp_path):
    one = saved(tmp_path, "a")
    fewer, lower = saved(tmp_path, "b", target_modules=["q_proj"]), saved(tmp_path, "c", r=2)
    for other, words in ((fewer, "modules"), (lower, "rank")):
        with pytest.raises(AggregationError, match=words):
            aggregate_folders([one, other], tmp_path / "out", "fedex", None, None)


def test_one_folder_twice_is_refused(tmp_path):
    one = saved(tmp_path, "a")
    with pytest.raises(UsageError, match="twice"):
        aggregate_folders([one, one], tmp_path / "out", "fedex", None, None)


def test_clients_whose_names_differ_in_odd_characters_only(tmp_path):
    folders = [saved(tmp_path, "sp ace"), saved(tmp_path, "sp_ace")]
    aggregate_folders(folders, tmp_path / "out", "fedex", None, None)
    assert len(list((tmp_path / "out" / "updates").iterdir())) == 2
    assert verify(tmp_path / "out")["max_relative_error"] < 1e-6


def test_verify_checks_the_stand_alone_adapter(tmp_path):
    from fedex_lora.storage.files import checksum
    from fedex_lora.storage.tensors import load_tensors, save_tensors

    folders = [saved(tmp_path, "a"), saved(tmp_path, "b")]
    aggregate_folders(folders, tmp_path / "out", "fedex", None, None)
    path = tmp_path / "out" / "adapter" / "adapter_model.safetensors"
    tensors, metadata = load_tensors(path)
    save_tensors(path, {name: 2 * tensor for name, tensor in tensors.items()}, metadata)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    manifest["files"]["adapter/adapter_model.safetensors"] = checksum(path)
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    assert verify(tmp_path / "out")["max_relative_error"] > 0.1


def test_an_output_inside_an_input_is_refused(tmp_path):
    folder = saved(tmp_path, "a")
    with pytest.raises(UsageError, match="lies in one of the folders that are read"):
        aggregate_folders([folder], folder / "out", "fedex", None, None)


def test_a_full_output_folder_is_left_alone(tmp_path):
    one, out = saved(tmp_path, "a"), tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("mine")
    with pytest.raises(UsageError, match="not empty"):
        aggregate_folders([one], out, "fedex", None, None)
    assert [path.name for path in out.iterdir()] == ["thesis.tex"]


def test_another_base_is_refused(tmp_path, gpt2):
    aggregate_folders([saved(tmp_path, "a")], tmp_path / "out", "fedex", None, None)
    with pytest.raises(FedexLoraError, match=r"this base has not the modules of the adapter: .*: is it another model\?"):
        load_model(tmp_path / "out", str(gpt2))


def test_real_mnli_adapter_factors(data_folder):
    """The LoRA paper's own adapter for roberta-base: aggregated with a perturbed twin, exact against fp64."""
    path = data_folder.parent / "models" / "adapters" / "roberta_base_lora_mnli.bin"
    if not path.exists():
        pytest.skip("no models/adapters/roberta_base_lora_mnli.bin beside FEDEX_LORA_DATA")
    from fedex_lora.types import LoRAPair

    tensors = torch.load(path, weights_only=True, map_location="cpu")
    modules = sorted(key.removesuffix(".lora_A") for key in tensors if key.endswith(".lora_A"))
    assert len(modules) == 24
    generator, updates = torch.Generator().manual_seed(0), []
    for i in range(3):
        adapter = {}
        for module in modules:
            A, B = tensors[f"{module}.lora_A"].float(), tensors[f"{module}.lora_B"].float()
            noise = [i * 0.01 * factor.std() * torch.randn(factor.shape, generator=generator) for factor in (A, B)]
            adapter[module] = LoRAPair(A=A + noise[0], B=B + noise[1], scaling=2.0)
        updates.append(ClientUpdate(f"c{i}", adapter, 1 + i))
    result, p = aggregate(updates), oracle.shares([1, 2, 3])
    worst = max(oracle.relative(oracle.total(result, m), oracle.ideal([u.adapter[m] for u in updates], p)) for m in modules)
    assert worst < 1e-6


def test_a_pickle_is_never_opened(tmp_path, monkeypatch):
    """Neither an adapter's, by whatever command, nor a base's."""
    folder, base = saved(tmp_path), tmp_path / "base"
    shutil.copytree(base_folder(), base)
    for file, pickle in ((folder / "adapter_model.safetensors", "adapter_model.bin"), (base / "model.safetensors", "pytorch_model.bin")):
        torch.save(load_file(file), file.with_name(pickle))
        file.unlink()
    opened_pickles = []
    monkeypatch.setattr(torch, "load", lambda *given, **options: opened_pickles.append(given) or {})
    averaged = partial(aggregate_folders, [folder], tmp_path / "out", "fedex", None, None)
    for opened in (averaged, partial(open_source, folder, "causal-lm", None)):
        with pytest.raises(StorageError, match=r"pickled adapter_model\.bin"):
            opened()
    with pytest.raises(ModelError):
        load_base(Base(model=str(base)), "causal-lm")
    assert opened_pickles == []


def test_a_model_s_own_code_is_not_run(tmp_path):
    base, ran = tmp_path / "base", tmp_path / "ran"
    shutil.copytree(base_folder(), base)
    (base / "own.py").write_text(f"open({str(ran)!r}, 'w')\nclass Own: pass\n")
    model = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}
    for name, maps in {"config.json": model, "tokenizer_config.json": {"AutoTokenizer": ["own.Own", None]}}.items():
        said = json.loads((base / name).read_text())
        (base / name).write_text(json.dumps({**said, "auto_map": maps}))
    for load in (lambda given: load_base(given, "causal-lm"), lambda given: load_processor(given, "causal-lm"), config_of):
        with suppress(FedexLoraError):
            load(Base(model=str(base)))
    assert not ran.exists()


def test_patterns_reach_the_adapter(gpt2):
    lora = Lora(r=4, alpha=8, rslora=True, rank_pattern={"c_fc": 2}, alpha_pattern={"c_fc": 3}, target_modules=["c_attn", "c_fc"])
    pairs = read_model(add_lora(load_base(Base(model=str(gpt2)), "causal-lm"), lora, "causal-lm"))
    assert {name.rpartition(".")[2] for name in pairs} == {"c_attn", "c_fc"}
    for name, pair in pairs.items():
        rank, alpha = (2, 3) if name.endswith("c_fc") else (4, 8)
        assert (pair.rank, pair.scaling) == (rank, pytest.approx(alpha / rank**0.5))
    with pytest.raises(AdapterError, match=r"lora\.rank_pattern: no adapted module is called 'nope'"):
        add_lora(load_base(Base(model=str(gpt2)), "causal-lm"), lora.model_copy(update={"rank_pattern": {"nope": 1}}), "causal-lm")
    with pytest.raises(AdapterError, match=r"lora\.target_modules: no module is called 'mlp\.c_atn'"):
        add_lora(load_base(Base(model=str(gpt2)), "causal-lm"), Lora(target_modules=["mlp.c_atn", "c_fc"]), "causal-lm")

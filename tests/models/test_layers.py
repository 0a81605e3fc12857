"""Every kind of layer that LoRA adapts: a federated round in the model, and from folders, against an fp64 model with the ideal weights."""

import copy

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tests import oracle
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, ResNetConfig, ResNetForImageClassification
from transformers.pytorch_utils import Conv1D

from fedex_lora import load_model
from fedex_lora.aggregation import server_state as server
from fedex_lora.errors import AdapterError, ModelError, TrainingError
from fedex_lora.models.adapted import AdaptedModel
from fedex_lora.models.base_weights import FrozenBase
from fedex_lora.models.loading import Loaded
from fedex_lora.models.lora import add_lora, lora_layers, read_model, read_other, write_model
from fedex_lora.offline.aggregate_folders import aggregate_folders
from fedex_lora.storage.layout import Layout
from fedex_lora.types import ClientUpdate, LoRAPair, LowRank

IDS = torch.arange(2, 26).reshape(2, 12)
PIXELS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(5))
SHARES = [1 / 6, 2 / 6, 3 / 6]


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=60, n_positions=32, n_embd=24, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=1)
    return GPT2LMHeadModel(config).eval()


def resnet():
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", num_labels=3)
    return ResNetForImageClassification(config).eval()


def answer(model):
    """The logits of whatever kind of model."""
    with torch.no_grad():
        image = model.main_input_name == "pixel_values" if hasattr(model, "main_input_name") else False
        return (model(pixel_values=PIXELS.to(next(model.parameters()).dtype)) if image else model(IDS)).logits.double()


CASES = {
    "conv2d": (resnet, {"target_modules": ["convolution"]}),
    "conv2d, rsLoRA": (resnet, {"target_modules": ["convolution"], "use_rslora": True}),
    "embedding": (gpt2, {"target_modules": ["wpe"]}),
    "tied embedding": (gpt2, {"target_modules": ["wte", "c_attn"]}),
    "tied output": (gpt2, {"target_modules": ["lm_head", "mlp.c_proj"]}),
    "both ends of a tie": (gpt2, {"target_modules": ["wte", "lm_head"]}),
    "everything, patterns": (
        gpt2,
        {
            "target_modules": ["wte", "wpe", "c_attn", "c_fc", "lm_head"],
            "rank_pattern": {"wte": 5, "h.1.attn.c_attn": 2},
            "alpha_pattern": {"c_fc": 3},
        },
    ),
    "everything, rsLoRA": (gpt2, {"target_modules": ["wte", "wpe", "c_attn", "lm_head"], "use_rslora": True}),
    "modules_to_save": (resnet, {"target_modules": ["convolution"], "modules_to_save": ["classifier"]}),
}


def adapted(make, options, seed):
    """As after training: every trained number is random."""
    model = get_peft_model(make(), LoraConfig(r=3, lora_alpha=7, **options))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = 0.1 if ".lora_" in name else 1.0
            parameter.data = scale * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def client_weights(model):
    """Every module's own weight, `W0 + PEFT's delta`, read through PEFT alone, in fp64; a tied module's too."""
    found = {}
    for name, module in model.get_base_model().named_modules():
        if hasattr(module, "get_delta_weight"):
            found[name] = (module.get_base_layer().weight.detach().double() + module.get_delta_weight("default").double()).detach().numpy()
    return found


def ideal_answer(make, models):
    """The logits of an fp64 model whose weights are the mean of the clients' weights (heads too): plain numpy, PEFT's own deltas."""
    model = make().double()
    weights = [client_weights(one) for one in models]
    with torch.no_grad():
        for name in weights[0]:
            mean = sum(p * one[name] for p, one in zip(SHARES, weights, strict=True))
            model.get_submodule(name).weight = nn.Parameter(torch.from_numpy(np.ascontiguousarray(mean)))
        for name in read_other(models[0]):
            mean = sum(p * read_other(one)[name].double() for p, one in zip(SHARES, models, strict=True))
            model.get_parameter(name).copy_(mean)
    return answer(model)


def relative(got, want):
    return float(torch.linalg.vector_norm(got - want) / torch.linalg.vector_norm(want))


@pytest.mark.parametrize("where", ["auto", "side"])
@pytest.mark.parametrize("case", CASES)
def test_a_round_gives_the_ideal_logits(case, where):
    """Three clients, one round; the model that goes on has the logits of the mean of the clients' models. Plain averaging has not."""
    make, options = CASES[case]
    models = [adapted(make, options, seed) for seed in range(3)]
    updates = [ClientUpdate(f"c{i}", read_model(model), i + 1, read_other(model)) for i, model in enumerate(models)]
    want = ideal_answer(make, models)
    state, _ = server.step(server.init(updates[0].adapter, updates[0].other), updates)
    model = models[0]
    base = FrozenBase(model, where)
    write_model(model, state.adapter, state.other)
    plain = relative(answer(model), want)
    base.set(state.base_delta)
    assert relative(answer(model), want) < 1e-5
    assert plain > 1e-3
    base.set({})
    assert relative(answer(model), want) == pytest.approx(plain, rel=1e-3)


@pytest.mark.parametrize("case", CASES)
def test_folders_of_every_kind_of_layer(case, tmp_path):
    """PEFT saves, we aggregate, PEFT loads: the stacked adapter and the trainable one with its base delta give the ideal logits."""
    make, options = CASES[case]
    models = [adapted(make, options, seed) for seed in range(3)]
    for i, model in enumerate(models):
        model.save_pretrained(tmp_path / f"{i}")
    folders = [tmp_path / f"{i}" for i in range(3)]
    summary = aggregate_folders(folders, tmp_path / "out", "fedex", [1, 2, 3], None)
    assert summary["max_relative_error"] < 1e-6
    want = ideal_answer(make, models)
    assert relative(answer(load_model(tmp_path / "out", make())), want) < 1e-5
    assert relative(answer(PeftModel.from_pretrained(make(), tmp_path / "out" / "adapter").eval()), want) < 1e-5


@pytest.mark.parametrize("case", CASES)
def test_what_is_written_into_a_model_is_read_from_it(case):
    """And with another rank: factors of zeros beside the old ones change nothing."""
    make, options = CASES[case]
    model = adapted(make, options, 0)
    before, adapter = answer(model), read_model(model)
    wider = {
        name: LoRAPair(
            A=torch.cat([pair.A, torch.ones(2, pair.shape[1])]),
            B=torch.cat([pair.B, torch.zeros(pair.shape[0], 2)], 1),
            scaling=pair.scaling,
        )
        for name, pair in adapter.items()
    }
    write_model(model, wider, read_other(model))
    again = read_model(model)
    assert all(torch.equal(again[name].A, pair.A) and torch.equal(again[name].B, pair.B) for name, pair in wider.items())
    assert relative(answer(model), before) < 1e-6


def test_the_factors_of_an_adapter_are_those_of_its_weight():
    """`s B A` in our orientation is PEFT's own delta of the weight, whatever the layer."""
    for case, (make, options) in CASES.items():
        model = adapted(make, options, 1)
        for name, pair in read_model(model).items():
            delta = model.get_base_model().get_submodule(name).get_delta_weight("default").double().flatten(1)
            if isinstance(model.get_base_model().get_submodule(name).get_base_layer(), Conv1D):
                delta = delta.T
            assert oracle.relative(oracle.product(pair), delta.detach().numpy()) < 1e-6, (case, name)


def test_a_fresh_adapter_changes_nothing_and_trains_what_a_method_says():
    """PEFT starts embeddings with a zero lora_embedding_A: in our orientation it is B that is zero, as everywhere."""
    from fedex_lora.config import Lora
    from fedex_lora.models.lora import set_trained

    model = add_lora(Loaded(gpt2(), []), Lora(r=2, target_modules=["wte", "c_attn"]), "causal-lm")
    assert all(not pair.B.any() and pair.A.any() for pair in read_model(model).values())
    set_trained(model, "B")
    trained = {name.split(".lora_")[1] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"embedding_A.default", "B.default.weight"}


class Net(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.config = None

    def forward(self, x):
        return self.layer(x)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.Conv2d(4, 4, 3, groups=2), "groups"),
        (nn.Conv2d(4, 4, 3, dilation=2), "dilation"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), "reflect padding"),
        (nn.MultiheadAttention(4, 2), "MultiheadAttention"),
    ],
)
def test_layers_that_the_algebra_does_not_cover_are_refused_by_name(layer, message):
    model = get_peft_model(Net(layer), LoraConfig(r=2, target_modules=["layer"]))
    with pytest.raises(AdapterError, match=message):
        read_model(model)


def test_what_is_written_into_another_memory_format_is_there():
    """Also where the model was given that format after the base was looked at."""
    model = adapted(resnet, {"target_modules": ["convolution"]}, 0)
    frozen, adapter = FrozenBase(model), read_model(model)
    model.to(memory_format=torch.channels_last)
    assert not all(layer.base.weight.is_contiguous() for layer in lora_layers(model).values())
    more = {name: LoRAPair(A=pair.A + 1, B=pair.B - 1, scaling=pair.scaling) for name, pair in adapter.items()}
    delta = {name: LowRank(U=torch.ones(pair.shape[0], 1), V=torch.ones(1, pair.shape[1])) for name, pair in adapter.items()}
    before = {name: layer.weight().clone() for name, layer in lora_layers(model).items()}
    write_model(model, more, {})
    frozen.set(delta)
    for name, pair in read_model(model).items():
        assert torch.equal(pair.A, more[name].A)
        assert torch.equal(pair.B, more[name].B)
        assert torch.equal(lora_layers(model)[name].weight(), before[name] + 1)


def test_running_statistics_that_move_are_noticed():
    """They are in no answer; batch normalisation that is held in evaluation mode is a layer like others."""
    party = AdaptedModel(get_peft_model(resnet(), LoraConfig(r=2, target_modules=["convolution"])))
    party.load(*party.read()[:1], {}, {})
    party.model.eval()(pixel_values=PIXELS)
    party.read()
    party.model.train()(pixel_values=PIXELS)
    with pytest.raises(TrainingError, match=r"changed .*running_mean \([0-9]+ such\), .* batch normalisation in eval"):
        party.read()


@pytest.mark.parametrize("kernel", [(), (3, 3), (3, 5, 5)])
def test_layouts_are_read_as_they_are_stored(kernel):
    inner = int(np.prod(kernel)) if kernel else 7
    pair = LoRAPair(A=torch.randn(2, inner), B=torch.randn(5, 2))
    layout, A, B = Layout.read(Layout(kernel=kernel).stored(pair))
    assert layout.kernel == kernel
    assert torch.equal(A, pair.A)
    assert torch.equal(B, pair.B)


def test_a_tied_weight_is_not_folded_even_between_two_targets():
    model = adapted(gpt2, {"target_modules": ["wte", "lm_head", "c_attn"]}, 0)
    assert FrozenBase(copy.deepcopy(model)).homes == {"fold": 2, "side": 2}
    with pytest.raises(ModelError, match="shares its weight"):
        FrozenBase(model, "fold")


def test_an_adapter_that_peft_saved_with_its_embedding_is_read(tmp_path):
    """PEFT may put the frozen embedding into the file; it is no trained tensor, and is not averaged as one."""
    model = adapted(gpt2, {"target_modules": ["wte"]}, 0)
    model.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    from fedex_lora.storage.adapter_folder import read_adapter_folder

    read = read_adapter_folder(tmp_path / "a")
    assert list(read.adapter) == ["transformer.wte"]
    assert not [name for name in read.other if "base_layer" in name]


def test_causal_models_load_from_folders_with_a_tied_target(gpt2, tmp_path):
    """The stand-alone adapter of a tied GPT-2 on disk, as a user would load it."""
    base = AutoModelForCausalLM.from_pretrained(gpt2)
    models = [
        adapted(lambda: copy.deepcopy(base), {"target_modules": ["wte", "lm_head"], "task_type": "CAUSAL_LM"}, seed) for seed in (0, 1)
    ]
    for i, model in enumerate(models):
        model.save_pretrained(tmp_path / f"{i}")
    aggregate_folders([tmp_path / "0", tmp_path / "1"], tmp_path / "out", "fedex", [1, 1], None)
    model = load_model(tmp_path / "out", str(gpt2))
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(gpt2), tmp_path / "out" / "adapter").eval()
    assert relative(answer(model), answer(plain)) < 1e-5

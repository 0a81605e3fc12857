"""Bases of 16, 8 and 4 bits: the base delta beside the weights, against the base as it is stored, upcast, plus the ideal update in fp64."""

import random

import numpy as np
import pytest
import torch
import transformers
from tests import oracle
from tests.models.test_sixteen_bits import as_the_card_says, share
from tests.runs.test_run import assert_same_bits, configuration, events_of, ignore
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from fedex_lora import load_model
from fedex_lora.config import Base, Lora, base_folder
from fedex_lora.errors import AdapterError, ModelError
from fedex_lora.models.base_weights import FrozenBase, SidePath
from fedex_lora.models.build import build_model
from fedex_lora.models.export import export
from fedex_lora.models.layers import disable_cpu_repacking
from fedex_lora.models.loading import load_base
from fedex_lora.models.lora import add_lora, lora_layers, read_other
from fedex_lora.models.merge import in_float32, logits, plain_model
from fedex_lora.offline.verify import verify
from fedex_lora.runs.run import run
from fedex_lora.runs.simulation import LocalSimulation
from fedex_lora.storage.result import read_result
from fedex_lora.storage.run_folder import run_rounds_of
from fedex_lora.types import LowRank

BASES = [("bfloat16", "none"), ("float16", "none"), ("float32", "nf4"), ("bfloat16", "nf4"), ("float32", "fp4"), ("float32", "int8")]


def small(dtype, quantization, **changes):
    """Few rows and a high learning rate, so that the base delta is large beside the rounding of the computation."""
    base = {"dtype": dtype, "quantization": quantization}
    return configuration(base=base, rounds=2, training={"learning_rate": 3e-2}, task={"train_rows": 60, "eval_rows": 12}, **changes)


@pytest.fixture(scope="module", params=BASES, ids=lambda pair: "-".join(pair))
def finished(request, tmp_path_factory):
    out = tmp_path_factory.mktemp("precision") / "run"
    run(small(*request.param), out, ignore)
    return request.param, out


def dequantised(dtype, quantization):
    """Name -> weight of the base as it is stored, in fp64, straight from transformers and bitsandbytes."""
    if quantization == "none":
        model = AutoModelForCausalLM.from_pretrained(base_folder(), dtype=getattr(torch, dtype))
        return {name: tensor.double() for name, tensor in model.state_dict().items()}
    import bitsandbytes as bnb

    kind = {"load_in_8bit": True} if quantization == "int8" else {"load_in_4bit": True, "bnb_4bit_quant_type": quantization}
    settings = BitsAndBytesConfig(**kind, llm_int8_skip_modules=["lm_head"], bnb_4bit_compute_dtype=getattr(torch, dtype))
    model = AutoModelForCausalLM.from_pretrained(base_folder(), dtype=getattr(torch, dtype), quantization_config=settings)
    found = {name: parameter.detach().double() for name, parameter in model.named_parameters()}
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            state = module.weight.quant_state
            codes = torch.stack([module.weight.data >> 4, module.weight.data & 15], -1).reshape(-1, state.blocksize).long()
            values = state.code.double()[codes] * state.absmax.double()[:, None]  # two codes a byte, one scale a block
            found[f"{name}.weight"] = values.reshape(state.shape)
        elif isinstance(module, bnb.nn.Linear8bitLt):
            found[f"{name}.weight"] = module.weight.data.double() * module.weight.SCB.double()[:, None] / 127
    return found


def ideal_model(out, dtype, quantization, with_delta=True):
    """A plain fp64 model: stored weights plus the mean of the participants' products (numpy), plus what they started from."""
    result = read_result(run_rounds_of(out)[0])
    model = AutoModelForCausalLM.from_pretrained(base_folder()).double()
    stored = dequantised(dtype, quantization)
    p = [result.weights[update.client_id] for update in result.updates]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(stored[name])
        for name in result.adapter:
            mean = oracle.ideal([update.adapter[name] for update in result.updates], p)
            mean = mean + result.previous_delta[name].dense().numpy() if name in result.previous_delta else mean
            removed = 0 if with_delta else result.base_delta[name].dense().numpy()
            model.get_submodule(name).weight += torch.from_numpy(mean - removed)
    return model


def test_a_side_path_gives_the_ideal_logits(finished):
    """Relative to the change that the base delta causes: 1e-4 in float32; in 16 bits no more than computing in them costs anyway.

    (bitsandbytes' int8 layers quantise what goes into them as well, whatever the dtype: they are compared in their own precision only.)
    """
    (dtype, quantization), out = finished
    want, without = (logits(ideal_model(out, dtype, quantization, with_delta)) for with_delta in (True, False))
    change = torch.linalg.vector_norm(want - without)
    model = load_model(out, str(base_folder()))
    own = float(torch.linalg.vector_norm(logits(model) - want) / change)
    bare = _without_delta(load_model(out, str(base_folder())))
    floor = float(torch.linalg.vector_norm(logits(bare) - without) / change)
    assert own < max(2 * floor, 1e-4)
    if quantization != "int8":
        upcast = float(torch.linalg.vector_norm(logits(in_float32(model)) - want) / change)
        assert upcast < 1e-4
    numbers = verify(out, str(base_folder()))
    assert numbers["max_relative_error"] < 1e-6
    assert numbers["output_error"] == pytest.approx(own, rel=0.05, abs=1e-5)
    assert numbers["output_floor"] == pytest.approx(floor, rel=0.05, abs=1e-5)
    assert numbers["compute_dtype"] == dtype


def _without_delta(model):
    for layer in lora_layers(model).values():
        layer.base.base_delta.hold(None)
    return model


def test_every_round_says_what_the_layers_compute(finished):
    """The audit: from the factors below 1e-6; of the layers' own outputs within a few floors of their precision."""
    (_, quantization), out = finished
    started = events_of(out, "started")[0]
    assert started["base_delta"] == {"fold": 0, "side": 14}
    for event in events_of(out, "round_done"):
        assert event["exactness_error"] < 1e-6
        # By the CPU: on one with AMX the float32 sums of NF4's layers were off by 2.4 floors, where others stay below 2.
        assert event["realised_error"] < (8 if quantization == "int8" else 4) * event["floor"]


def test_folding_into_such_weights_loses_the_delta(finished):
    """Why there is a side path: the same delta added to the stored weights misses, measured in float32."""
    (dtype, quantization), out = finished
    if quantization != "none":
        pytest.skip("benchmarks/precision.py measures it for quantised weights")
    result = read_result(out / "final")
    want, without = (logits(ideal_model(out, dtype, quantization, with_delta)) for with_delta in (True, False))
    model = _without_delta(load_model(out, str(base_folder())))
    with torch.no_grad():
        for name, layer in lora_layers(model).items():
            layer.base.weight.copy_((layer.base.weight.double() + result.base_delta[name].dense()).to(layer.base.weight.dtype))
    error = torch.linalg.vector_norm(logits(in_float32(model)) - want) / torch.linalg.vector_norm(want - without)
    assert error > 1e-4


@pytest.mark.parametrize("form", ["merged", "adapter", "base+adapter"])
def test_exports_of_such_a_run(form, finished, tmp_path):
    """In float32 the three forms have the run's logits; merged is a plain float32 model, adapter is for the base as it is stored."""
    (dtype, quantization), out = finished
    done = export(out, form, tmp_path / "out")
    if quantization == "int8" and form != "adapter":  # its layers quantise their inputs as well, a plain model does not: the number says so
        assert 1e-4 < done["output_error"] < 5e-2
        return
    assert done["output_error"] < 1e-5
    if form == "merged":
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert {parameter.dtype for parameter in plain.parameters()} == {torch.float32}
        want = logits(ideal_model(out, dtype, quantization))
        assert float((logits(plain) - want).abs().max() / want.abs().max()) < 1e-5
    if form == "adapter":  # by the lines of its card; those of a packed base compute in the base's dtype
        want, model = logits(in_float32(load_model(out, str(base_folder())))), as_the_card_says(tmp_path / "out")
        disable_cpu_repacking(model)  # by which bitsandbytes is 0.8 % off on some CPUs
        assert share(logits(model), want) < (5e-2 if (dtype, quantization) == ("bfloat16", "nf4") else 1e-5)


def test_the_same_bits_from_the_same_seeds(tmp_path):
    for name in "ab":
        run(small("bfloat16", "nf4"), tmp_path / name, ignore)
    assert_same_bits(tmp_path / "a", tmp_path / "b")


def test_a_side_path_in_float32_is_the_fold(tmp_path):
    """The same run with either home: the same numbers to rounding."""
    ends = {}
    for where in ("fold", "side"):
        place = LocalSimulation(configuration(base={"delta": where}), ignore)
        generator = torch.Generator().manual_seed(1)
        delta = {
            name: LowRank(U=0.1 * torch.randn(pair.shape[0], 3, generator=generator), V=torch.randn(3, pair.shape[1], generator=generator))
            for name, pair in place.initial().adapter.items()
        }
        place.host.place.base.set(delta)
        ends[where] = logits(place.host.place.model)
    assert float((ends["side"] - ends["fold"]).abs().max() / ends["fold"].abs().max()) < 1e-4


def test_what_is_trained_is_float32_on_a_base_of_16_bits(tmp_path):
    """Adapters, and modules that are trained whole: a head, and an embedding in the middle whose outputs go on in the base's precision."""
    for modules in (["lm_head"], ["embed_tokens"]):
        loaded = load_base(Base(model=str(base_folder()), dtype="bfloat16"), "causal-lm")
        model = add_lora(loaded, Lora(r=2, target_modules=["q_proj"], modules_to_save=modules), "causal-lm")
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        assert {parameter.dtype for parameter in trained} == {torch.float32}
        output = model(input_ids=torch.arange(2, 10)[None], labels=torch.arange(2, 10)[None])
        output.loss.backward()
        assert all(parameter.grad is not None for parameter in trained)
        assert read_other(model)


def test_a_quantised_base_is_told_from_the_plain_one(tmp_path):
    """A result of an nf4 base, on the float32 weights: refused by the fingerprint."""
    run(small("float32", "nf4"), tmp_path / "run", ignore)
    with pytest.raises(ModelError, match="is not the base of this result"):
        load_model(tmp_path / "run", AutoModelForCausalLM.from_pretrained(base_folder()))


def test_a_plain_model_unties_what_gained_something(gpt2, tmp_path):
    """lm_head gained and wte did not: saved, reloaded and untied, the logits stay."""
    base = AutoModelForCausalLM.from_pretrained(gpt2)
    before = base.transformer.wte.weight.detach().clone()
    gained = {"lm_head": LowRank(U=torch.randn(base.lm_head.weight.shape[0], 2), V=torch.randn(2, 32))}
    plain = plain_model(base, gained, {})
    want = logits(plain)
    plain.save_pretrained(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(again.transformer.wte.weight, before)
    assert not torch.equal(again.lm_head.weight, before)
    assert float((logits(again) - want).abs().max()) < 1e-6
    assert isinstance(again.lm_head, nn.Linear)


def test_saving_a_model_with_side_paths_warns_that_the_delta_is_missing(finished, tmp_path):
    """Merged or not: the state dict holds no D, and without a word the bare base would be taken for the run."""
    (_, quantization), out = finished
    if quantization != "none":
        pytest.skip("one precision is enough")
    model = load_model(out, str(base_folder()))
    SidePath.warned = False
    with pytest.warns(UserWarning, match="use fedex-lora export"):
        model.merge_and_unload().save_pretrained(tmp_path / "out")


def test_a_base_is_not_used_twice(finished):
    """A second load_model on the same object would take W0 + D for W0."""
    (dtype, quantization), out = finished
    if quantization != "none":
        pytest.skip("one precision is enough")
    base = AutoModelForCausalLM.from_pretrained(base_folder(), dtype=getattr(torch, dtype))
    model = load_model(out, base)
    for used in (base, model):
        with pytest.raises(ModelError, match="is no base: give its name or folder, or load it anew"):
            load_model(out, used)


def test_the_side_path_s_own_error_shows_in_16_bits_whether_the_delta_is_there(finished):
    """Beside rounding of 1e-2 the layers' outputs cannot tell; what the path adds can."""
    _, out = finished
    assert 0 < events_of(out, "round_done")[-1]["side_error"] < 1e-5
    result = read_result(out / "final")
    _, frozen = build_model(result, str(base_folder()))
    assert frozen.side_error < 1e-5
    one = next(iter(frozen._layers.values()))
    one.base.base_delta.last = 0.9 * one.base.base_delta.last
    assert frozen.side_error == pytest.approx(0.1, rel=0.1)


@pytest.mark.parametrize("change", ["scale", "other"])
def test_the_fingerprint_sees_scales_and_weights_without_adapters(change):
    """Codes of 4 bits stay when a weight is scaled; and an embedding is under no adapter."""
    prints = []
    for changed in (False, True):
        loaded = load_base(Base(model=str(base_folder()), quantization="nf4"), "causal-lm")
        with torch.no_grad():
            if changed and change == "scale":
                loaded.model.model.layers[0].self_attn.q_proj.weight.quant_state.absmax.mul_(2)
            elif changed:
                loaded.model.model.norm.weight.mul_(1.5)
        model = add_lora(loaded, Lora(r=2, target_modules=["q_proj"]), "causal-lm")
        prints.append(FrozenBase(model).fingerprint())
    assert prints[0] != prints[1]


def test_a_checkpoint_that_is_quantised_already_is_refused(tmp_path):
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["lm_head"])
    AutoModelForCausalLM.from_pretrained(base_folder(), quantization_config=settings).save_pretrained(tmp_path / "nf4")
    with pytest.raises(ModelError, match=r"is quantised already: give the plain checkpoint, and set base\.quantization"):
        load_base(Base(model=str(tmp_path / "nf4")), "causal-lm")


def test_a_quantised_module_is_not_trained_whole():
    loaded = load_base(Base(model=str(base_folder()), quantization="nf4"), "causal-lm")
    with pytest.raises(AdapterError, match="q_proj is quantised and cannot be trained whole"):
        add_lora(loaded, Lora(r=2, target_modules=["v_proj"], modules_to_save=["q_proj"]), "causal-lm")


def test_a_run_from_random_weights_can_be_opened(tmp_path):
    """The weights come from the run's seed, and are drawn again."""
    config = configuration(base={"random_weights": True}, rounds=1, task={"train_rows": 48})
    run(config, tmp_path / "run", ignore)
    assert verify(tmp_path / "run", str(base_folder()))["output_error"] < 1e-3
    assert export(tmp_path / "run", "merged", tmp_path / "out")["change_error"] < 1e-2


def test_what_is_loaded_leaves_the_process_as_it_was(tmp_path, monkeypatch):
    """Progress bars, and what is drawn next: no seed of the run's stays."""
    run(configuration(base={"random_weights": True}, rounds=1, task={"train_rows": 48}), tmp_path / "run", ignore)
    drawn = []
    for seed in (1, 2):
        transformers.set_seed(seed)
        monkeypatch.setattr(transformers.utils.logging, "_tqdm_active", True)
        load_model(tmp_path / "run", base_folder())
        assert transformers.logging.is_progress_bar_enabled()
        drawn.append((random.random(), np.random.rand(), float(torch.rand(1))))
    assert all(one != other for one, other in zip(*drawn, strict=True))

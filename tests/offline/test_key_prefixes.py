"""Adapters whose module paths differ by a wrapper only, as versions of transformers name them: one mean, in numbers and in answers."""

import json
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tests import oracle
from tests.kinds import CAUSAL, IDS, WEIGHTS, Kind, answers, ideal, off, pair, rewritten, trained
from tests.offline.test_streaming import write_adapter
from transformers import AutoModelForCausalLM, CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration
from typer.testing import CliRunner

from fedex_lora import LoRAPair
from fedex_lora.cli import app
from fedex_lora.errors import FedexLoraError, ModelError
from fedex_lora.evaluation._model import open_source
from fedex_lora.models.build import load_model
from fedex_lora.models.export import export
from fedex_lora.offline.aggregate_folders import aggregate_folders
from fedex_lora.offline.verify import verify
from fedex_lora.storage.adapter_folder import Format, read_adapter_folder, write_adapter_config, write_adapter_folder
from fedex_lora.storage.renaming import find_renaming, shapes_of
from fedex_lora.storage.result import read_result

NAMINGS = ["model.layers", "model.language_model.layers", "language_model.model.layers", "layers"]
PREFIX = "base_model.model."


def shapes(layers):
    return {f"{layers}.{index}.{name}": shape for index in range(2) for name, shape in (("q", (48, 48)), ("up", (96, 48)))}


def moved(folder, old, new):
    """The folder as another version writes it."""
    rewritten(
        lambda tensors: {
            PREFIX + (new + name[len(PREFIX + old) :] if name.startswith(PREFIX + old) else name[len(PREFIX) :]): tensor
            for name, tensor in tensors.items()
        }
    )(folder)
    return folder


def factors(folder):
    """Module, from its layer on -> factors, by the plain formulas: scaling alpha / r."""
    tensors, config = load_file(folder / "adapter_model.safetensors"), json.loads((folder / "adapter_config.json").read_text())
    found = {}
    for name, A in tensors.items():
        if ".lora_A." in name:
            B = tensors[name.replace("lora_A", "lora_B")]
            found["layers" + name.partition("layers")[2].removesuffix(".lora_A.weight")] = LoRAPair(A, B, config["lora_alpha"] / len(A))
    return found


def gained(result, module):
    """What the model of a result has more than its base: s B A + D."""
    delta = result.base_delta.get(module)
    return oracle.product(result.adapter[module]) + (0 if delta is None else oracle.numpy64(delta.dense()))


def assert_mean_of(out, folders, naming, before=None):
    result, updates = read_result(out), [factors(folder) for folder in folders]
    assert set(result.adapter) == {f"{naming}{name.removeprefix('layers')}" for name in updates[0]}
    for name in updates[0]:
        want = oracle.ideal([update[name] for update in updates], WEIGHTS)
        module = f"{naming}{name.removeprefix('layers')}"
        if before is not None:
            want = want + oracle.numpy64(before.base_delta[module].dense())
        assert oracle.relative(gained(result, module), want) < 1e-6
    assert verify(out)["max_relative_error"] < 1e-6


@pytest.mark.parametrize("method", ["fedex", "fedex-best"])  # from files to files, and in memory
@pytest.mark.parametrize("first", NAMINGS)
@pytest.mark.parametrize("second", NAMINGS)
def test_the_mean_is_exact_by_the_first_one_s_names(first, second, method, tmp_path):
    folders = [
        write_adapter(tmp_path / name, seed, alpha=4 + seed, shapes=shapes(naming))
        for seed, (name, naming) in enumerate((("b", first), ("a", second)))
    ]
    report = aggregate_folders(folders, tmp_path / "out", method, WEIGHTS, None)
    assert report["max_relative_error"] < 1e-6
    assert_mean_of(tmp_path / "out", folders, first)
    line = f"{folders[1]} names its modules {second}.*, as another version of transformers does: they are read as {first}.*"
    assert report["notes"] == ([] if first == second else [line])
    heads = [oracle.numpy64(load_file(folder / "adapter_model.safetensors")[f"{PREFIX}score.weight"]) for folder in folders]
    want = sum(share * head for share, head in zip(WEIGHTS, heads, strict=True))
    assert oracle.relative(oracle.numpy64(read_result(tmp_path / "out").other["score.weight"]), want) < 1e-6


def test_results_merge_and_go_on_by_the_names_that_they_have(tmp_path):
    """Regions of two namings; and adapters trained on top of a result under another version."""
    folders = [
        write_adapter(tmp_path / name, seed, shapes=shapes(naming))
        for seed, (name, naming) in enumerate(zip("abcd", NAMINGS[:2] * 2, strict=True))
    ]
    for region, some in (("north", folders[::2]), ("south", folders[1::2])):
        aggregate_folders(some, tmp_path / region, "fedex", None, None)
    done = CliRunner().invoke(
        app,
        ["aggregate", "--merge", str(tmp_path / "south"), str(tmp_path / "north"), "--weights", "0.3,0.7", "-o", str(tmp_path / "all")],
    )
    assert done.exit_code == 0, done.output
    assert f"! {tmp_path / 'north'} names its modules model.layers.*" in done.stdout
    result = read_result(tmp_path / "all")
    each = dict(zip("abcd", map(factors, folders), strict=True))
    for name in each["a"]:
        want = oracle.ideal([each[party][name] for party in "bdac"], [0.15, 0.15, 0.35, 0.35])
        assert oracle.relative(gained(result, f"model.language_model.{name}"), want) < 1e-6
    assert verify(tmp_path / "all")["max_relative_error"] < 1e-6
    mark = read_result(tmp_path / "north").mark
    for folder in folders[1::2]:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"fedex_lora_base_delta": mark}))
    report = aggregate_folders(folders[1::2], tmp_path / "next", "fedex", WEIGHTS, tmp_path / "north")
    assert len(report["notes"]) == 2
    assert report["max_relative_error"] < 1e-6
    assert_mean_of(tmp_path / "next", folders[1::2], "model.layers", read_result(tmp_path / "north"))


@pytest.mark.parametrize("foreign", [0, 1])
def test_a_model_of_the_other_naming_answers_as_the_mean(foreign, bases, tmp_path):
    """One of two adapters of a Llama is as another version writes it. With the first the result's names are foreign to the base, too."""
    kind = Kind(lora=CAUSAL | {"target_modules": "all-linear", "modules_to_save": ["lm_head", "model.norm"]})
    folders, base = pair(bases, tmp_path, kind), bases / "llama"
    plain, want = answers(kind.load(base).double(), IDS), answers(ideal(kind, base, folders), IDS)
    own = answers(PeftModel.from_pretrained(kind.load(base), folders[foreign]), IDS)
    moved(folders[foreign], "model.", "model.language_model.")
    if foreign == 0:
        path = folders[0] / "adapter_config.json"
        path.write_text(path.read_text().replace('"model.norm"', '"model.language_model.norm"'))
        assert off(open_source(str(folders[0]), "causal-lm", str(base)).model, own, plain, IDS) < 1e-5
        read = read_adapter_folder(folders[0])
        write_adapter_config(folders[0], read.adapter, read.format)  # which names whole paths, as all that we write does
        assert off(open_source(str(folders[0]), "causal-lm", str(base)).model, own, plain, IDS) < 1e-5
    out = tmp_path / "out"
    assert aggregate_folders(folders, out, "fedex", WEIGHTS, None)["max_relative_error"] < 1e-6
    naming = "model.language_model.layers" if foreign == 0 else "model.layers"
    assert all(name.startswith(naming) for name in read_result(out).adapter)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        loaded = load_model(out, base)
    assert [str(one.message) for one in said if "transformers" in str(one.message)] == (
        ["the result names its modules model.language_model.*, as another version of transformers does: they are read as model.*"]
        if foreign == 0
        else []
    )
    assert off(loaded, want, plain, IDS) < 1e-5
    report = verify(out, str(base))
    assert (report["max_relative_error"] < 1e-6, report["realised_error"] < 1e-5, len(report["notes"])) == (True, True, 1 - foreign)
    for form in ("merged", "adapter", "base+adapter"):
        assert len(export(out, form, tmp_path / form, str(base))["notes"]) == 1 - foreign
    assert off(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), want, plain, IDS) < 1e-5
    assert off(PeftModel.from_pretrained(kind.load(base), tmp_path / "adapter"), want, plain, IDS) < 1e-5
    if foreign == 0:  # what is saved from it goes on, by the base's names, from a result with others
        for seed in (5, 6):
            generator = torch.Generator().manual_seed(seed)
            for name, parameter in loaded.named_parameters():
                if ".lora_" in name:
                    parameter.data = torch.randn(parameter.shape, generator=generator)
            loaded.save_pretrained(tmp_path / f"next-{seed}")
        after = [tmp_path / "next-5", tmp_path / "next-6"]
        aggregate_folders(after, tmp_path / "two", "fedex", WEIGHTS, out)
        assert_mean_of(tmp_path / "two", after, naming, read_result(out))


def test_an_adapter_without_factors_for_its_modules_is_not_measured_as_the_base(bases, tmp_path):
    kind = Kind(lora=CAUSAL | {"target_modules": ["q_proj"]})
    folder = moved(pair(bases, tmp_path, kind)[0], "model.", "encoder.")
    with pytest.raises(ModelError, match="it has no factors for modules that it adapts there: give its own base by --base"):
        open_source(str(folder), "causal-lm", str(bases / "llama"))


@pytest.fixture(scope="module")
def llava(bases):
    """A model of images and texts whose language model is the tiny Llama: its layers are `model.language_model.layers`."""
    text = AutoModelForCausalLM.from_pretrained(bases / "llama")
    vision = CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4)
    torch.manual_seed(3)
    model = LlavaForConditionalGeneration(LlavaConfig(text_config=text.config, vision_config=vision, image_token_index=39))
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.lm_head.load_state_dict(text.lm_head.state_dict())
    return model


def test_a_language_model_in_a_wrapper_and_without(llava, bases, tmp_path):
    """One adapter of the Llama alone, one of the same Llama inside a Llava: their mean on either answers as the mean of the models."""
    kind, base = Kind(), bases / "llama"
    folders = pair(bases, tmp_path, kind)
    plain, want = answers(kind.load(base).double(), IDS), answers(ideal(kind, base, folders), IDS)
    inside = get_peft_model(llava, LoraConfig(r=4, lora_alpha=8, target_modules=r".*language_model.*\.(q|v)_proj"))
    tensors = load_file(folders[1] / "adapter_model.safetensors")
    for name, parameter in inside.named_parameters():
        if ".lora_" in name:
            parameter.data = tensors[name.replace(".default", "").replace("model.language_model.", "model.")].clone()
    inside.save_pretrained(tmp_path / "llava")
    bare = inside.unload()
    assert off(bare, plain, want, IDS) < 1e-6  # the same answers, before anything is trained
    assert set(read_adapter_folder(tmp_path / "llava").adapter) == {
        f"model.language_model.layers.{layer}.self_attn.{name}_proj" for layer in range(2) for name in "qv"
    }
    mixed = [folders[0], tmp_path / "llava"]
    for path in (folder / "adapter_config.json" for folder in mixed):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": None}))
    aggregate_folders(mixed, tmp_path / "out", "fedex", WEIGHTS, None)
    assert off(load_model(tmp_path / "out", base), want, plain, IDS) < 1e-5
    with pytest.warns(UserWarning, match=r"names its modules model\.layers\.\*.*read as model\.language_model\.layers\.\*"):
        assert off(load_model(tmp_path / "out", bare), want, plain, IDS) < 1e-5


@pytest.mark.parametrize(
    ("first", "second", "why"),
    [
        (shapes("model.layers"), {name.replace("layers.", "layers.1"): shape for name, shape in shapes("model.layers").items()}, "layers"),
        (shapes("encoder.layers"), shapes("decoder.layers"), "other parts"),
        (shapes("model.layers"), shapes("model.vision_tower.layers"), "another tower"),
        (shapes("layers"), {**shapes("model.layers"), "model.layers.1.up": (48, 96)}, "a shape"),
        (shapes("layers"), {f"model.{name}": shape for name, shape in list(shapes("layers").items())[:3]}, "not all"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_modules_are_no_other_names(first, second, why, tmp_path):
    """And the line says which module is the nearest."""
    folders = [write_adapter(tmp_path / name, 0, shapes=some, head=False) for name, some in (("a", first), ("b", second))]
    near = r"have different modules \((\S+) and \d+ more in one only; in the other \S+ is the nearest\): train the same ones everywhere"
    with pytest.raises(FedexLoraError, match=near):
        aggregate_folders(folders, tmp_path / "out", "fedex", None, None)
    with pytest.raises(FedexLoraError, match=near):
        aggregate_folders(folders, tmp_path / "out", "fedex-best", None, None)
    assert not (tmp_path / "out").exists()


def test_two_places_that_fit_are_none(bases, tmp_path):
    """Layers that lie in two wrappers of one size could be either's."""
    made = {name: LoRAPair(torch.ones(2, 48), torch.ones(rows, 2)) for name, (rows, _) in shapes("layers").items()}
    one, other = ({name: LoRAPair(p.A, p.B) for name, p in zip(shapes(place), made.values(), strict=True)} for place in NAMINGS[:2])
    assert find_renaming(made, shapes_of(one)).new == "model.layers"
    assert find_renaming(made, shapes_of(one | other), all_of_them=False) is None
    folder = trained(Kind(), bases / "llama", tmp_path / "a", 0)
    moved(folder, "model.layers", "blocks")
    aggregate_folders([folder], tmp_path / "out", "fedex", None, None)
    with pytest.raises(
        FedexLoraError, match=r"has not the modules of the adapter: .*the nearest to blocks\.\S+ is model\.layers\."
    ) as error:
        load_model(tmp_path / "out", bases / "llama")
    assert "\n" not in str(error.value)


def test_the_reference_can_fail(tmp_path):
    """Plain averaging of the same adapters is far off."""
    folders = [write_adapter(tmp_path / name, seed, shapes=shapes(NAMINGS[seed])) for seed, name in enumerate("ab")]
    aggregate_folders(folders, tmp_path / "out", "fedit", WEIGHTS, None)
    name = "layers.0.q"
    want = oracle.ideal([factors(folder)[name] for folder in folders], WEIGHTS)
    assert oracle.relative(gained(read_result(tmp_path / "out"), f"model.{name}"), want) > 0.1


def test_a_path_that_ends_another_has_its_own_rank_and_scaling(tmp_path):
    """As PEFT reads the folder, and as we do."""
    layers = {"block.mix": (2, 2.0), "block.up": (2, 2.0), "mix": (3, 8.0), "up": (2, 2.0)}
    mean = {name: LoRAPair(torch.randn(rank, 6), torch.randn(4, rank), scaling) for name, (rank, scaling) in layers.items()}
    write_adapter_folder(tmp_path, mean, {}, Format(config={}))
    assert {name: pair.scaling for name, pair in read_adapter_folder(tmp_path).adapter.items()} == {
        name: scaling for name, (_, scaling) in layers.items()
    }
    plain = torch.nn.ModuleDict({"mix": torch.nn.Linear(6, 4), "up": torch.nn.Linear(6, 4)})
    plain["block"] = torch.nn.ModuleDict({"mix": torch.nn.Linear(6, 4), "up": torch.nn.Linear(6, 4)})
    model = PeftModel.from_pretrained(plain, tmp_path)
    for name, want in mean.items():
        layer = model.base_model.model.get_submodule(name)
        assert torch.allclose(layer.get_delta_weight("default"), want.scaling * want.B @ want.A, atol=1e-5)
    patterns = json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"]
    assert patterns == {"^mix": 3}  # and no other mark where no path ends so


@pytest.mark.parametrize("chosen", [{"target_modules": "mix|other.mix"}, {"target_modules": ["mix"], "exclude_modules": ["block.mix"]}])
def test_a_module_at_the_root_is_not_those_inside_that_are_called_so(chosen, tmp_path):
    """Plain PEFT makes of the result the layers that were trained, and no other."""

    def plain():
        torch.manual_seed(0)
        inside = {name: torch.nn.ModuleDict({"mix": torch.nn.Linear(6, 4)}) for name in ("block", "other")}
        return torch.nn.ModuleDict({**inside, "mix": torch.nn.Linear(6, 4)})

    for seed in (1, 2):
        model = get_peft_model(plain(), LoraConfig(r=2, **chosen))
        torch.manual_seed(seed)
        for name, parameter in model.named_parameters():
            parameter.data += torch.randn_like(parameter) if ".lora_" in name else 0
        model.save_pretrained(tmp_path / f"site-{seed}")
    folders = [tmp_path / "site-1", tmp_path / "site-2"]
    aggregate_folders(folders, tmp_path / "one", weights=WEIGHTS)
    aggregate_folders([tmp_path / "one" / "adapter"], tmp_path / "two")  # whose settings say it by now
    for out in ("one", "two"):
        model = PeftModel.from_pretrained(plain(), tmp_path / out / "adapter")
        layers = {name.removeprefix("base_model.model."): one for name, one in model.named_modules() if hasattr(one, "lora_A")}
        assert layers.keys() == {"mix", "other.mix"}
        for name, layer in layers.items():
            own = [PeftModel.from_pretrained(plain(), folder).base_model.model.get_submodule(name) for folder in folders]
            want = sum(p * oracle.numpy64(one.get_delta_weight("default")) for p, one in zip(WEIGHTS, own, strict=True))
            assert oracle.relative(oracle.numpy64(layer.get_delta_weight("default")), want) < 1e-5


def test_a_run_s_base_is_told_by_its_own_names(bases, tmp_path):
    """Its fingerprint holds the names of the parameters, so under others nothing is claimed."""
    folder = moved(trained(Kind(), bases / "llama", tmp_path / "a", 0), "model.", "model.language_model.")
    aggregate_folders([folder], tmp_path / "out", "fedex", None, None)
    path = tmp_path / "out" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_fingerprint": "0" * 64, "versions": {"transformers": "4.50.0"}}))
    line = r"can be told only by its own names: use transformers 4\.50\.0$"
    with pytest.raises(FedexLoraError, match=line), pytest.warns(UserWarning, match="read as"):
        load_model(tmp_path / "out", bases / "llama")

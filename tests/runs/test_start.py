"""A run goes on from a result: of another run, or of adapters that were trained anywhere."""

import io
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from rich.console import Console
from safetensors.torch import load_file
from tests.offline.test_key_prefixes import moved
from tests.runs.test_resume import StopError, stopping
from tests.runs.test_run import assert_same_bits, configuration, events_of, ignore
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from fedex_lora import aggregate, load_model
from fedex_lora.cli import app
from fedex_lora.cli.console import Display
from fedex_lora.config import base_folder, parse_config, read_config
from fedex_lora.errors import ConfigError, ModelError, StorageError, UsageError
from fedex_lora.models.export import export
from fedex_lora.offline.aggregate_folders import aggregate_folders
from fedex_lora.offline.verify import verify
from fedex_lora.runs.run import run
from fedex_lora.storage.events import Warned
from fedex_lora.storage.files import read_manifest
from fedex_lora.storage.result import read_result
from fedex_lora.types import Dense

NOTES = Path(__file__).parents[2] / "examples" / "notes.toml"
IDS = torch.arange(3, 27).reshape(2, 12)


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    out = tmp_path_factory.mktemp("first") / "run"
    run(configuration(), out, ignore)
    return out


def test_a_run_is_not_resumed_from_another_start(first, tmp_path):
    """Its start got a round since: clients that were not asked yet would begin there, and the round be called exact."""
    shutil.copytree(first, tmp_path / "first")
    run(going_on(tmp_path / "first", rounds=1), tmp_path / "run", ignore)
    run(configuration(rounds=3), tmp_path / "first", ignore, resume=True)
    before = (tmp_path / "run" / "events.jsonl").read_bytes()
    with pytest.raises(UsageError, match=r"began with another tokenizer, or another base\.start"):
        run(going_on(tmp_path / "first", rounds=2), tmp_path / "run", ignore, resume=True)
    assert (tmp_path / "run" / "events.jsonl").read_bytes() == before


def test_a_run_that_is_resumed_with_other_threads_says_so(first, tmp_path):
    told = []
    run(going_on(first, rounds=1), tmp_path / "other", ignore)
    events = tmp_path / "other" / "events.jsonl"
    events.write_text(re.sub(r'"torch_threads": ?\d+', '"torch_threads": 99', events.read_text()))
    run(going_on(first, rounds=2), tmp_path / "other", told.append, resume=True)
    said = [event.message for event in told if isinstance(event, Warned)]
    assert [message for message in said if "the run goes on elsewhere than it began" in message and "torch_threads 99" in message]


def going_on(start, **changes):
    tree = configuration(**changes).model_dump(mode="json", exclude_none=True)
    tree["base"]["start"], tree["lora"] = str(start), changes.get("lora", {"r": 2, "target_modules": "all-linear"})
    return parse_config(tree)


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits


@pytest.mark.parametrize("method", ["fedex", "reinit", "fedsvd", "ffa"])
def test_a_run_goes_on_from_another(method, first, tmp_path):
    """It begins where that one ended, and what it ends in is one exact update of the untouched base."""
    out = tmp_path / "run"
    run(going_on(first, method=method), out, ignore)
    started = events_of(out, "started")[0]
    assert started["start"] == {
        "folder": "run",
        "method": "fedex",
        "round": 2,
        "base_rank": 8,
        "privacy": "none",
    }  # two rounds, three clients, rank 2
    assert started["metrics"] == events_of(first, "round_done")[-1]["metrics"]
    report = verify(out)
    if method in ("fedex", "reinit"):
        assert report["max_relative_error"] < 1e-6
        assert [event["realised_error"] < 1e-6 for event in events_of(out, "round_done")] == [True, True]
    assert read_manifest(out / "final")["start"] == started["start"]
    exported = export(out, "adapter", tmp_path / "adapter")
    gained = (exported["rank"] - 2 - 8) // 2  # in each of its two rounds
    sums = f"rank {exported['rank']}: 2, 8 of its start, and {gained} a round"
    assert (sums if gained else "rank 10, which more rounds") in exported["growth"]
    assert 2 + 8 + 2 * gained == exported["rank"]
    plain = AutoModelForCausalLM.from_pretrained(base_folder())
    plain.load_adapter(str(tmp_path / "adapter"))
    want = logits(load_model(out, base_folder()))
    assert (logits(plain.eval()) - want).norm() <= 1e-5 * want.norm()
    assert (want - logits(load_model(first, base_folder()))).norm() > 1e-3 * want.norm()  # and it learnt something


def test_whole_matrices_that_a_start_gained_are_said(tmp_path):
    """Factors of five rounds have more numbers than the matrices, which are kept; one rank of them is said, that of what is written."""
    run(configuration(rounds=5, lora={"r": 8}, training={"max_steps": 1}), tmp_path / "first", ignore)
    whole = [name for name, delta in read_result(tmp_path / "first" / "final").base_delta.items() if isinstance(delta, Dense)]
    assert whole
    lines = io.StringIO()
    with Display(Console(file=lines, width=300)) as display:
        run(going_on(tmp_path / "first", lora={}, rounds=1, training={"max_steps": 1}), tmp_path / "run", display)
    assert f"whose base gained rank 64 and a whole matrix in {len(whole)} modules" in lines.getvalue()
    exported = export(tmp_path / "run", "adapter", tmp_path / "adapter")
    assert f"it has rank {exported['rank']}" in exported["growth"]
    written = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert max(len(tensor) for name, tensor in written.items() if "lora_A" in name) == exported["rank"]


def test_a_run_that_goes_on_is_resumed_to_the_same_bits(first, tmp_path):
    config = going_on(first, clients={"fraction": 0.6}, rounds=3)
    run(config, tmp_path / "want", ignore)
    with pytest.raises(StopError):
        run(config, tmp_path / "run", stopping("client_done", 3))
    run(read_config(tmp_path / "run" / "config.toml"), tmp_path / "run", ignore, True)
    assert_same_bits(tmp_path / "run", tmp_path / "want")


def adapters(base, folder):
    """Two sites' adapters, as PEFT saves them."""
    for number, name in enumerate(("site-a", "site-b")):
        model = get_peft_model(
            AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=3, target_modules=["c_attn"], task_type="CAUSAL_LM")
        )
        generator = torch.Generator().manual_seed(number)
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(folder / name)
    return [folder / "site-a", folder / "site-b"]


@pytest.mark.parametrize("foreign", [False, True])
def test_a_run_goes_on_from_aggregated_adapters(foreign, gpt2, tmp_path):
    """By the command line: `aggregate`, then `run` on the OUT; also where both name their modules as another version does."""
    sites = adapters(gpt2, tmp_path)
    if foreign:
        sites = [moved(site, "transformer.", "model.transformer.") for site in sites]
    aggregate_folders(sites, tmp_path / "out", "fedex", None, None)
    words = [word for word in AutoTokenizer.from_pretrained(gpt2).get_vocab() if word.isalpha()]
    rows = [{"prompt": words[i], "completion": " " + words[i + 1]} for i in range(24)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "run.toml").write_text(
        f'rounds = 2\ntorch_threads = 1\n[base]\nmodel = "{gpt2}"\nstart = "out"\n[task]\nname = "custom"\nkind = "causal-lm"\n'
        'train = "rows.jsonl"\neval = "rows.jsonl"\n[clients]\ncount = 2\n'
    )
    done = CliRunner().invoke(app, ["run", str(tmp_path / "run.toml"), "--out", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    assert "goes on from out: round 1 of fedex, whose base gained rank 3" in done.output
    assert "rank 3, alpha 8" in done.output
    assert ("names its modules model.transformer.h.*" in done.output) == foreign
    begun = events_of(tmp_path / "run", "round_done")
    assert verify(tmp_path / "run")["max_relative_error"] < 1e-6
    assert begun[-1]["metrics"]["loss"] < events_of(tmp_path / "run", "started")[0]["metrics"]["loss"]
    with torch.no_grad():
        mean = sum(load_model_of(gpt2, folder) for folder in (tmp_path / "site-a", tmp_path / "site-b")) / 2
        block = load_model(tmp_path / "out", str(gpt2)).base_model.model.transformer.h[0].attn.c_attn
        got = block(torch.eye(32))
    assert (got - mean).norm() <= 1e-6 * mean.norm()  # what it started from, by the plain formula


def load_model_of(base, folder):
    """What the first layer of one site's model computes on the unit vectors, in fp64."""
    layer = AutoModelForCausalLM.from_pretrained(base).transformer.h[0].attn.c_attn
    held = load_file(folder / "adapter_model.safetensors")
    (A,), (B,) = ([held[key].double() for key in held if "h.0." in key and f"lora_{part}" in key] for part in "AB")
    return (layer.weight.double() + (8 / 3) * (B @ A).T + layer.bias.double()).float()


WARDS = {"north": ("sprain", "green", 0.3), "south": ("itch", "red", 0.7)}  # a sign, its colour, the weight


@pytest.fixture(scope="module")
def trained_by_trl(tmp_path_factory):
    """Two sites' adapters of the demo's Llama, each trained by TRL on rows of its own, as it saves them."""
    trl, folder = pytest.importorskip("trl", reason="the extra trl is not installed"), tmp_path_factory.mktemp("trl")
    for name, (sign, colour, _) in WARDS.items():
        rows = [{"prompt": f"the {who} has {sign} . triage :", "completion": f" {colour}"} for who in ("woman", "man", "girl", "boy")]
        quiet = {"bf16": False, "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
        arguments = trl.SFTConfig(f"{folder}/work", max_steps=8, learning_rate=1e-2, dataloader_pin_memory=False, **quiet)
        trainer = trl.SFTTrainer(
            AutoModelForCausalLM.from_pretrained(base_folder()),
            args=arguments,
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(base_folder()),
            peft_config=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
        trainer.train()
        trainer.save_model(f"{folder}/{name}")
    return folder


def test_a_run_from_an_aggregate_of_trl_adapters(trained_by_trl, tmp_path):
    """It starts from W + sum_i p_i s_i B_i A_i, worked out in fp64 from what TRL saved: clients that do not move leave that model."""
    shares = {name: share for name, (*_, share) in WARDS.items()}
    aggregate([trained_by_trl / name for name in WARDS], weights=shares).save(tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(base_folder()).double()
    before, weights = logits(plain), plain.state_dict()
    for name, share in shares.items():
        held = load_file(trained_by_trl / name / "adapter_model.safetensors")
        for key in [key for key in held if "lora_A" in key]:
            A, B = held[key].double(), held[key.replace("lora_A", "lora_B")].double()
            weights[key.removeprefix("base_model.model.").replace("lora_A.", "")] += share * (8 / 4) * B @ A
    want = logits(plain)
    assert (want - before).norm() > 0.1 * before.norm()
    notes = NOTES.read_text().replace('model = "demo"', 'model = "demo"\nstart = "out"').replace('"notes"', f'"{NOTES.parent}/notes"')
    (tmp_path / "run.toml").write_text(notes)
    still, moved = (
        CliRunner(env={"COLUMNS": "300"}).invoke(
            app, ["run", f"{tmp_path}/run.toml", "--out", f"{tmp_path}/{name}", "--rounds", "1", "--set", f"training.learning_rate={rate}"]
        )
        for name, rate in (("still", 1e-30), ("moved", 5e-3))
    )
    assert (still.exit_code, moved.exit_code) == (0, 0), still.output + moved.output
    assert "goes on from out: round 1 of fedex, whose base gained rank 4" in moved.output
    assert (logits(load_model(tmp_path / "still", base_folder())) - want).norm() <= 1e-6 * want.norm()
    assert (logits(load_model(tmp_path / "moved", base_folder())) - want).norm() > 1e-3 * want.norm()
    assert verify(tmp_path / "moved")["max_relative_error"] < 1e-6
    assert (
        events_of(tmp_path / "moved", "round_done")[-1]["metrics"]["loss"] < events_of(tmp_path / "moved", "started")[0]["metrics"]["loss"]
    )


def test_what_does_not_go_on_is_refused_in_one_line(first, gpt2, tmp_path):
    def refused(error, words, config):
        with pytest.raises(error, match=words):
            run(config, tmp_path / "run", ignore)
        assert not (tmp_path / "run").exists()

    refused(ModelError, r"lora\.r = 4, and that of base\.start .* is 2: remove the key", going_on(first, lora={"r": 4}))
    refused(ModelError, r"leaves out .*down_proj, which base\.start adapts", going_on(first, lora={"target_modules": ["q_proj"]}))
    everything = {"target_modules": r".*(proj|lm_head)"}
    refused(ModelError, r"target_modules names lm_head, which base\.start does not adapt: remove the key", going_on(first, lora=everything))
    refused(ModelError, r"modules_to_save names norm, which base\.start does", going_on(first, lora={"modules_to_save": ["norm"]}))
    for key, value in {"rslora": True, "rank_pattern": {"q_proj": 1}, "alpha_pattern": {"q_proj": 1}}.items():
        refused(ModelError, rf"lora\.{key} is of new adapters", going_on(first, lora={key: value}))
    for form in ("merged", "base+adapter"):
        export(first, form, tmp_path / form)
        refused(StorageError, r"is an export \(.*\) and no result: give the run, or its final/", going_on(tmp_path / form))
    with pytest.raises(ConfigError, match=r"remove clients\.ranks"):
        going_on(first, clients={"ranks": [1, 2, 2]})
    refused(ModelError, "method fedsa keeps adapters for the untouched base", going_on(first, method="fedsa"))
    refused(ModelError, "trained by adapters, and this method trains the whole model", going_on(first, method="full-ft"))
    aggregate_folders(adapters(gpt2, tmp_path), tmp_path / "out", "fedex", None, None)
    refused(ModelError, r"base\.start does not fit this base: .* is it another model\?", going_on(tmp_path / "out", lora={}))
    other = going_on(first).model_dump(mode="json", exclude_none=True)
    other["base"] |= {"random_weights": True}
    other["lora"] = {}
    refused(ModelError, r"base\.model is not the base of base\.start", parse_config(other))

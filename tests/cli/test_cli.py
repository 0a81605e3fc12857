"""The command line in process: what people type, what they read, and what the exit status says."""

import importlib.metadata
import json
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import fedex_lora
from fedex_lora import __version__, load_model
from fedex_lora.cli import app, demo, main
from fedex_lora.client.arguments import require_device, training_arguments
from fedex_lora.config import base_folder, overridden, parse_config
from fedex_lora.errors import ConfigError, UsageError, require_system
from fedex_lora.report.analysis import sent
from fedex_lora.storage.events import read_events
from fedex_lora.storage.result import read_result

CONFIG = f"""
method = "fedex"
rounds = 1
[base]
model = "{base_folder()}"
[lora]
r = 2
target_modules = "all-linear"
[task]
name = "demo"
train_rows = 60
eval_rows = 15
[clients]
partition = "column"
column = "hospital"
[training]
num_train_epochs = 1
per_device_train_batch_size = 16
"""


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def adapters(tmp_path):
    folders = []
    for name in ("one", "two", "three"):
        model = get_peft_model(
            AutoModelForCausalLM.from_pretrained(base_folder()),
            LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=6, target_modules=["q_proj"], init_lora_weights=False),
        )
        folders.append(tmp_path / name)
        model.save_pretrained(folders[-1])
    return folders


def test_help_names_the_commands():
    result = call("--help")
    assert result.exit_code == 0
    for command in ("demo", "run", "aggregate", "verify", "doctor"):
        assert command in result.stdout


def test_version():
    assert call("--version").stdout.strip() == __version__


def test_run_then_verify(config, tmp_path):
    ran = call("run", config, "--out", tmp_path / "out", "--json")
    assert ran.exit_code == 0, ran.stderr
    numbers = json.loads(ran.stdout)
    assert numbers["exactness_error"] < 1e-6
    assert "exactness error" in ran.stderr
    checked = call("verify", tmp_path / "out", "--base", base_folder(), "--json")
    assert checked.exit_code == 0
    result = json.loads(checked.stdout)
    assert result["max_relative_error"] < 1e-6
    assert result["realised_error"] < 3 * result["floor"]
    shown = call("verify", tmp_path / "out")
    assert shown.exit_code == 0
    assert shown.stdout.splitlines()[-1].startswith("exact: worst ")
    assert shown.stdout.rstrip().endswith("(limit 1e-06)")
    assert "q_proj" not in shown.stdout
    assert "layers.0.self_attn.q_proj" in call("verify", tmp_path / "out", "--modules").stdout


def test_rows_that_are_measured_and_trained_on_are_said():
    notes = Path(__file__).parents[2] / "examples" / "notes"
    same = call("run", f"{notes}.toml", "--dry-run", "--set", "task.train_rows=60", "--set", f"task.eval={notes / 'train.jsonl'}")
    assert same.exit_code == 0, same.stderr
    assert same.stdout.count("is trained on, too: metrics on it say nothing of other rows") == 1


def test_aggregate_and_verify(adapters, tmp_path):
    out = tmp_path / "out"
    done = call("aggregate", *adapters, "--weights", "0.2,0.3,0.5", "-o", out, "--json")
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)
    assert list(result["weights"].items()) == [("one", 0.2), ("two", 0.3), ("three", 0.5)]  # as they were given
    assert result["max_relative_error"] < 1e-6
    assert result["residual_rank"] == 4
    assert call("verify", out).exit_code == 0


def test_aggregate_truncates_as_it_is_told(adapters, tmp_path):
    """In one step and on top of a state, each of which reads the option by itself."""
    cut = ("--method", "fedex-svd", "--truncate", "rank=1")
    assert call("aggregate", *adapters, *cut, "-o", tmp_path / "cut").exit_code == 0
    assert {delta.rank for delta in read_result(tmp_path / "cut").base_delta.values()} == {1}
    for number, folder in enumerate(adapters):
        model = load_model(tmp_path / "cut", str(base_folder()))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
        model.save_pretrained(tmp_path / f"next-{folder.name}")
    following = [tmp_path / f"next-{folder.name}" for folder in adapters]
    done = call("aggregate", *following, "--state", tmp_path / "cut", *cut, "-o", tmp_path / "again")
    assert done.exit_code == 0, done.stderr
    assert {delta.rank for delta in read_result(tmp_path / "again").base_delta.values()} == {2}


def test_an_exact_result_that_is_not_exact_fails_verification(adapters, tmp_path):
    """A result that lost its base delta (with a manifest that agrees) is off, and verify says so with a non-zero exit."""
    from fedex_lora.storage.files import MANIFEST, checksum
    from fedex_lora.storage.tensors import save_delta

    out = tmp_path / "out"
    call("aggregate", *adapters, "-o", out)
    save_delta(out / "base_delta.safetensors", {})
    manifest = json.loads((out / MANIFEST).read_text())
    manifest["files"]["base_delta.safetensors"] = checksum(out / "base_delta.safetensors")
    (out / MANIFEST).write_text(json.dumps(manifest))
    result = call("verify", out)
    assert result.exit_code == 1
    assert "is off by" in result.stderr


def test_doctor():
    result = call("doctor", "--json")
    assert result.exit_code == 0
    facts = json.loads(result.stdout)["facts"]
    assert {"python", "torch", "transformers", "peft", "exactness here"} <= facts.keys()
    assert call("doctor").exit_code == 0


def one_line(result, status):
    lines = result.stderr.strip().splitlines()
    assert result.exit_code == status, (result.exit_code, result.stdout, result.stderr)
    assert len(lines) == 1, lines
    assert "Traceback" not in result.stderr
    return lines[0]


@pytest.mark.parametrize(
    ("overrides", "status", "message"),
    [
        (["lora.rnk=3"], 2, "unknown key lora.rnk"),
        (["rounds=many"], 2, "rounds = 'many'"),
        (["method=fedexx"], 2, "did you mean 'fedex'"),
        (["base.model=nobody/nothing"], 1, "neither a local folder nor to be had from the hub"),
        (["task.name=glue/mrpc"], 1, "task.data"),
        (["clients.column=ward"], 1, "no column"),
        (["clients.partition=iid", "clients.count=50", "task.train_rows=20"], 1, "gets no examples"),
        (["lora.target_modules=['nothing']"], 1, "set lora.target_modules"),
        (["lora.modules_to_save=['nothing']"], 1, "lora.modules_to_save names no module called nothing"),
        (["base.dtype=bfloat16", "base.delta=fold"], 2, "base.delta = 'fold' would lose the base delta in bfloat16 weights: use 'auto'"),
        (["base.quantization=nf4", "base.delta=fold"], 2, "base.delta = 'fold' would lose the base delta in nf4 weights: use 'auto'"),
        (["base.quantization=nf4", "base.random_weights=true"], 2, "needs a checkpoint"),
        (["base.compact_rank=3"], 2, "base.compact_rank was removed: delete the line"),
        (["method=fedex+gl-aligned"], 2, "the gauge gl-aligned was removed: use procrustes or balanced"),
        (["method=full-ft", "base.dtype=bfloat16"], 2, "full-ft trains the base itself: set base.dtype = 'float32'"),
        (["lora.target_modules=['norm']"], 1, "set lora.target_modules"),
        (["training.learning_rat=1"], 2, "did you mean training.learning_rate"),
        (["training.seed=1"], 2, "seed is set by fedex-lora"),
        (["training.learning_rate=abc"], 2, "training.learning_rate = 'abc': give a finite number"),
        (["training.learning_rate=-1"], 2, "must be greater than zero"),
        (["training.max_steps=0"], 2, "training.max_steps = 0: it must be greater than zero"),
        (["training.per_device_train_batch_size=0"], 2, "must be greater than zero"),
        (["training.optim=lomo"], 2, "refused by transformers"),
        (["training.eval_on_start=true"], 2, "eval_on_start is set by fedex-lora"),
        (["seed=5000000000"], 2, "seed = 5000000000"),
        (["lora.target_modules=*"], 1, "set lora.target_modules"),
    ],
)
def test_bad_configurations(overrides, status, message, config, tmp_path):
    options = [part for override in overrides for part in ("--set", override)]
    line = one_line(call("run", config, *options, "--out", tmp_path / "out"), status)
    assert message in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--weights", "1,2"], 1, "2 weights for 3 updates"),
        (["--weights", "1,x,2"], 2, "comma-separated numbers"),
        (["--weights", "1,-1,1"], 1, "not negative"),
        (["--weights", "0,0,0"], 1, "sum to zero"),
        (["--method", "fedsa"], 2, "no global model to write"),
        (["--method", "keep", "--state", "somewhere"], 2, "needs every client's own last factors"),
        (["--truncate", "rank=2"], 2, "--truncate is for fedex-svd"),
        (["--method", "fedex-svd", "--truncate", "rank=0"], 2, "write rank=8, energy=0.99 or bytes=1000000"),
        (["--method", "fedex-svd", "--truncate", "half"], 2, "write rank=8"),
        (["--method", "fedex+balance"], 2, "did you mean 'balanced'"),
        (["--method", "centralised"], 2, "use fedex, say"),
        (["--method", "ffa"], 1, "needs one A"),
        (["--state", "/nowhere"], 1, "/nowhere does not exist: give a folder that fedex-lora wrote"),
    ],
)
def test_bad_aggregations(options, status, message, adapters, tmp_path):
    line = one_line(call("aggregate", *adapters, *options, "-o", tmp_path / "out"), status)
    assert message in line
    assert not (tmp_path / "out").exists()


def test_missing_paths(tmp_path):
    assert "not a PEFT adapter" in one_line(call("aggregate", tmp_path / "nothing", "-o", tmp_path / "out"), 1)
    assert "nothing does not exist" in one_line(call("verify", tmp_path / "nothing"), 1)
    (tmp_path / "empty").mkdir()
    assert "has no manifest.json" in one_line(call("verify", tmp_path / "empty"), 1)
    assert "does not exist" in one_line(call("run", tmp_path / "nothing.toml"), 2)


def test_wrong_usage_is_status_2():
    assert call("aggregate").exit_code == 2
    assert call("nonsense").exit_code == 2


def test_debug_shows_the_trace(config):
    result = call("run", config, "--set", "method=fedexx", "--debug")
    assert result.exception is not None
    assert not isinstance(result.exception, SystemExit)


def test_demo(tmp_path, monkeypatch):
    """One round of each method on a few rows: the table, the JSON, the run folders; never over somebody else's folder."""
    whole = demo.configuration

    def short(*how):
        return parse_config(overridden(whole(*how).model_dump(exclude_none=True), ["task.train_rows=96", "task.eval_rows=30"]))

    monkeypatch.setattr(demo, "configuration", short)
    out = tmp_path / "demo"
    shown = call("demo", "--rounds", 1, "--out", out)
    assert shown.exit_code == 0, shown.stderr
    for method in ("fedex", "fedit", "ffa", "centralised"):
        assert method in shown.stdout
        assert (out / method / "final" / "manifest.json").exists()
    methods = json.loads((out / "demo.json").read_text())["methods"]
    assert methods["fedex"]["exactness_error"] < 1e-6 < methods["fedit"]["exactness_error"]
    for method, row in methods.items():  # with the message that brings the final model
        assert (row["bytes_down"], row["bytes_up"]) == sent(read_events(out / method / "events.jsonl"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("mine")
    assert "no earlier demo" in one_line(call("demo", "--out", tmp_path / "mine"), 2)
    assert Path(tmp_path / "mine" / "thesis.tex").read_text() == "mine"
    monkeypatch.setattr(demo, "SHOWN", ("fedex",))
    monkeypatch.setitem(sys.modules, "jinja2", None)
    bare = call("demo", "--rounds", 1, "--out", tmp_path / "bare")
    assert bare.exit_code == 0, bare.stderr
    assert "without charts: reports need jinja2, which is not installed" in bare.stdout
    assert json.loads((tmp_path / "bare" / "demo.json").read_text())["methods"]["fedex"]["accuracy"] > 0


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["run"], "error: Missing argument 'CONFIG'. (see fedex-lora run --help)\n"),
        (["agregate"], "error: No such command 'agregate'. Did you mean 'aggregate'? (see fedex-lora --help)\n"),
        (["run", "--nope"], "error: No such option '--nope'. (see fedex-lora run --help)\n"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_arguments_are_one_line(arguments, line, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["fedex-lora", *arguments])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    assert capsys.readouterr() == ("", line)


def test_where_it_does_not_run_is_said_at_the_start(tmp_path, monkeypatch):
    """Windows has no locks, syncs and renames of folders as runs need them; Apple's GPUs have no fp64."""
    with pytest.raises(UsageError, match="this is Windows: use it in WSL 2"):
        require_system("win32")
    require_system("darwin")
    with pytest.raises(ConfigError, match=r"set training\.use_cpu = true"):
        require_device("mps")
    require_device("cuda")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert (
        training_arguments(parse_config({"base": {"model": "demo"}, "task": {"name": "demo"}})).device.type == "cpu"
    )  # so the demo, and what is only measured, need no word
    monkeypatch.setattr("fedex_lora.cli._shared.require_system", lambda: require_system("win32"))
    assert "this is Windows" in one_line(call("run", "examples/quickstart.toml", "--out", tmp_path / "run"), 2)
    assert not (tmp_path / "run").exists()


def test_versions_that_it_does_not_work_with_are_said_at_the_start(tmp_path, monkeypatch):
    """All of them, before anything is read or written; the doctor still looks at everything."""
    here = {"torch": "2.5.1", "transformers": "4.57.0", "peft": "0.17.0"}
    monkeypatch.setattr(importlib.metadata, "version", lambda name, real=importlib.metadata.version: here.get(name) or real(name))
    said = one_line(call("run", "examples/quickstart.toml", "--out", tmp_path / "run"), 2)
    for name, needed in (("torch", ">=2.6"), ("transformers", "<6,>=5.17"), ("peft", "<1,>=0.21")):
        assert f"{name} {here[name]} does not satisfy {needed}: pip install '{name}{needed}'" in said
    assert not (tmp_path / "run").exists()
    with pytest.raises(UsageError, match=r"torch 2\.5\.1 does not satisfy"):
        fedex_lora.run({})
    problems = json.loads(call("doctor", "--json").stdout)["problems"]
    assert [line.partition(" ")[0] for line in problems if "does not satisfy" in line] == sorted(here)
    here["torch"] = "2.6.0a0+container"  # a build of somebody's
    assert "torch" not in one_line(call("run", "examples/quickstart.toml", "--out", tmp_path / "run"), 2)

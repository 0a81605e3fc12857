"""A check that cannot be computed has failed: NaN and infinity are refused or said, wherever they come from, in one line."""

import errno
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.cli.test_cli import call, one_line
from tests.conftest import make_updates
from tests.fake import raising
from tests.finished_runs import event, written
from tests.offline.test_streaming import write_adapter
from tests.runs.test_run import configuration, events_of, ignore

from fedex_lora import LoRAPair, aggregate, load_model
from fedex_lora.aggregation import merge
from fedex_lora.aggregation import server_state as server
from fedex_lora.config import Base, Lora, base_folder, write_config
from fedex_lora.errors import AggregationError, StorageError, UnreadableError
from fedex_lora.exactness import algebra, measure
from fedex_lora.exactness.measure import Exactness
from fedex_lora.models.base_weights import FrozenBase, _MergedDelta
from fedex_lora.models.loading import load_base
from fedex_lora.models.lora import add_lora
from fedex_lora.offline.verify import complaint, verify
from fedex_lora.report import write_report
from fedex_lora.runs.run import run
from fedex_lora.server.checkpoint import last_checkpoint
from fedex_lora.storage.files import MANIFEST, checksum
from fedex_lora.storage.result import read_result, write_result
from fedex_lora.storage.tensors import load_tensors
from fedex_lora.types import Dense, LowRank

ODD = [math.nan, math.inf]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return [write_adapter(folder / name, seed) for seed, name in enumerate(("one", "two", "three"))]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two rounds."""
    out = tmp_path_factory.mktemp("finished") / "run"
    run(configuration(), out, ignore)
    return out


def signed(folder, file):
    """The manifest agrees with what was done to the file: only the numbers are wrong."""
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][file] = checksum(folder / file)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def spoilt(folder, file, value, part=""):
    """One number of the last tensor whose name has `part` becomes `value`."""
    tensors = load_file(folder / file)
    name = [name for name in sorted(tensors) if part in name][-1]
    tensors[name].view(-1)[-1] = value
    about = load_tensors(folder / file)[1]
    (folder / file).unlink()  # it may be a link to an input
    save_file(tensors, folder / file, about)
    signed(folder, file)


@pytest.mark.parametrize("value", ODD)
@pytest.mark.parametrize(
    ("file", "part"),
    [
        ("trainable/adapter_model.safetensors", "lora_B"),
        ("trainable/adapter_model.safetensors", "score"),
        ("adapter/adapter_model.safetensors", "lora_A"),
        ("base_delta.safetensors", ""),
        ("updates/one/adapter_model.safetensors", "lora_A"),
        ("updates/one/adapter_model.safetensors", "score"),
    ],
)
def test_a_result_that_is_not_finite_is_refused(file, part, value, adapters, tmp_path):
    out = tmp_path / "out"
    assert call("aggregate", *adapters, "-o", out).exit_code == 0
    assert call("verify", out).exit_code == 0
    spoilt(out, file, value, part)
    assert "holds NaN or infinity in " in one_line(call("verify", out), 1)
    assert "holds NaN or infinity in " in one_line(call("aggregate", *adapters, "--state", out, "-o", tmp_path / "next"), 1)
    with pytest.raises(StorageError, match="holds NaN or infinity"):
        load_model(out, base_folder())
    assert not (tmp_path / "next").exists()


@pytest.mark.parametrize("weight", [math.nan, math.inf, -1.0, None])
def test_weights_that_are_none(weight, adapters, tmp_path):
    out = tmp_path / "out"
    call("aggregate", *adapters, "-o", out)
    manifest = json.loads((out / MANIFEST).read_text())
    manifest["inputs"][1]["weight"] = weight
    (out / MANIFEST).write_text(json.dumps(manifest))
    assert "a weight that is no number from zero up" in one_line(call("verify", out), 1)


def test_one_round_of_a_run(finished, tmp_path):
    """Only the first of two rounds, and of that the weights of one module: the whole run fails."""
    shutil.copytree(finished, tmp_path / "run")
    assert call("verify", tmp_path / "run").exit_code == 0
    spoilt(tmp_path / "run" / "rounds" / "0001", "trainable/adapter_model.safetensors", math.nan)
    assert "rounds/0001/trainable holds NaN" in one_line(call("verify", tmp_path / "run"), 1)


def test_a_round_that_was_set_aside_is_no_round(finished, tmp_path):
    """`verify` looks at the rounds that a run goes on from."""
    out = shutil.copytree(finished, tmp_path / "run")
    for name in ("0002.broken", "0002.broken1"):
        aside = shutil.copytree(out / "rounds" / "0002", out / "rounds" / name)
        (aside / "base_delta.safetensors").write_bytes(b"torn")
    found = call("verify", out, "--json")
    assert found.exit_code == 0, found.stderr
    assert [row["round"] for row in json.loads(found.stdout)["rounds"]] == [1, 2]


@pytest.mark.parametrize("file", ["manifest.json", "adapter_config.json"])
def test_what_cannot_be_read_now_is_not_set_aside(file, finished, tmp_path, monkeypatch):
    """A disk that fails to read once says nothing of the round."""
    out = shutil.copytree(finished, tmp_path / "run")
    read = Path.read_text

    def failing(path, *args, **options):
        if path.name == file:
            raise OSError(errno.EIO, "Input/output error", str(path))
        return read(path, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", failing)
        with pytest.raises(UnreadableError, match="Input/output error"):
            last_checkpoint(out)
    checkpoint, complaints = last_checkpoint(out)
    assert (checkpoint.state.round, complaints) == (2, [])


@pytest.mark.parametrize("alpha", [math.nan, math.inf, -math.inf, 0])
def test_a_scaling_is_a_finite_number_and_not_zero(alpha, finished, tmp_path):
    """In what names nobody's updates: `final/`, where no error is recomputed, and every sum is right."""
    out = shutil.copytree(finished / "final", tmp_path / "final")
    path = out / "trainable" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alpha": alpha, "alpha_pattern": {}}))
    signed(out, "trainable/adapter_config.json")
    assert "trainable" in one_line(call("verify", out), 1)
    with pytest.raises(StorageError, match="a scaling is a finite number, and not zero"):
        read_result(out)


@pytest.mark.parametrize("scaling", [math.nan, 0.0, "2", None, True])
def test_nor_is_an_update_s_scaling_anything_else(scaling, finished, adapters, tmp_path):
    """In the update that a run stored, and in the adapter that `aggregate` kept."""
    out = shutil.copytree(finished / "rounds" / "0001", tmp_path / "round")
    path = next((out / "updates").iterdir())
    tensors, about = load_tensors(path)
    update = json.loads(about["update"])
    about["update"] = json.dumps({**update, "scalings": dict.fromkeys(update["scalings"], scaling)})
    save_file(tensors, path, about)
    signed(out, f"updates/{path.name}")
    assert "a scaling is a finite number, and not zero" in one_line(call("verify", out), 1)
    kept = tmp_path / "out"
    assert call("aggregate", *adapters, "-o", kept).exit_code == 0
    path = kept / "updates" / "one" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alpha": scaling}))
    signed(kept, "updates/one/adapter_config.json")
    assert one_line(call("verify", kept), 1)


@pytest.mark.parametrize("options", [[], ["--method", "fedex-best"], ["--method", "fedit"]])
@pytest.mark.parametrize(
    ("part", "said"), [("lora_A", "client two sent NaN"), ("lora_B", "client two sent NaN"), ("score", "score.weight of")]
)
def test_adapters_that_are_not_finite_are_not_aggregated(part, said, options, adapters, tmp_path):
    folders = [shutil.copytree(folder, tmp_path / folder.name) for folder in adapters]
    tensors = load_file(folders[1] / "adapter_model.safetensors")
    next(tensor for name, tensor in sorted(tensors.items()) if part in name).view(-1)[0] = math.nan
    save_file(tensors, folders[1] / "adapter_model.safetensors", {"format": "pt"})
    assert said in one_line(call("aggregate", *folders, *options, "-o", tmp_path / "out"), 1)
    assert not (tmp_path / "out").exists()


def far_apart(size, scaling=1.0):
    """Two clients whose means are finite, as is each factor."""
    signs = (1.0, -1.0)
    pairs = [LoRAPair(A=sign * torch.full((1, 4), size), B=sign * torch.full((6, 1), size), scaling=scaling) for sign in signs]
    return [replace(update, adapter={"m": pair}, num_examples=1) for update, pair in zip(make_updates(2), pairs, strict=True)]


def test_a_residual_that_overflows_is_refused():
    """By the scaling, or as a matrix: of factors that are finite, with finite means."""
    assert math.isfinite(aggregate(far_apart(1e15)).residual["m"].U.sum())
    with pytest.raises(AggregationError, match="the residual of m overflows"):
        aggregate(far_apart(1e15, scaling=1e30))
    with pytest.raises(AggregationError, match="the base delta of m overflows"):
        server.advance({"m": Dense(W=torch.zeros(6, 4))}, {"m": LowRank(U=torch.full((6, 1), 1e30), V=torch.full((1, 4), 1e30))})


def test_a_matrix_that_overflows_is_not_written(tmp_path):
    """From files to files: the factors of what the base gains are finite, and smaller is their product, which is not."""
    folders = [write_adapter(tmp_path / f"{seed}", seed, shapes={"m": (8, 8)}, head=False) for seed in range(3)]
    for folder in folders:
        tensors = {name: 1e20 * tensor for name, tensor in load_file(folder / "adapter_model.safetensors").items()}
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    assert "the update of m overflows" in one_line(call("aggregate", *folders, "-o", tmp_path / "out"), 1)
    assert not (tmp_path / "out").exists()


def test_a_partial_aggregate_that_is_not_finite_is_not_merged():
    north, south = aggregate(make_updates(2)), aggregate([replace(one, client_id=f"s{one.client_id}") for one in make_updates(2, seed=5)])
    south.residual["m1"].U[0, 0] = math.nan
    with pytest.raises(AggregationError, match="NaN or infinity in the residual of m1"):
        merge([north, south], [1, 1])


@pytest.mark.parametrize("part", ["adapter", "base_delta", "other"])
def test_no_result_is_written_that_is_not_finite(part, finished, tmp_path):
    result = read_result(finished / "rounds" / "0002")
    state = server.init(result.adapter, {"head": torch.ones(3)}, "fedex")
    state = replace(state, base_delta=result.base_delta)
    name = next(iter(result.adapter))
    spoilt = {
        "adapter": {**state.adapter, name: replace(result.adapter[name], A=result.adapter[name].A * math.inf)},
        "base_delta": {**state.base_delta, name: Dense(W=torch.full(result.adapter[name].shape, math.nan))},
        "other": {"head": torch.tensor([1.0, math.nan, 2.0])},
    }
    with pytest.raises(AggregationError, match=r"the result holds NaN or infinity in "):
        write_result(tmp_path / "out", replace(state, **{part: spoilt[part]}), [], {}, result.format, {}, standalone=True)
    assert not list(tmp_path.iterdir())


def test_the_worst_error_is_the_one_that_is_no_number():
    """Whatever its place: `max` keeps a NaN only if it comes first."""
    for errors in ([1e-8, math.nan, 1e-9], [math.nan, 1e-8], [1e-8, None]):
        assert math.isnan(algebra.worst(errors))
    assert algebra.worst([1e-8, 3e-8, 2e-8]) == 3e-8
    found = Exactness(error={"a": 1e-9, "b": math.nan, "c": 1e-9}, ideal={"a": 1.0, "b": 1.0, "c": 1.0})
    assert math.isnan(found.max_relative_error)
    assert math.isnan(Exactness(error={"a": 1.0}, ideal={"a": math.inf}).max_relative_error)  # 1 / inf is no small error
    ideal = {"a": LowRank(torch.ones(3, 1), torch.ones(1, 4)), "b": LowRank(torch.full((3, 1), math.nan), torch.ones(1, 4))}
    adapter = {name: LoRAPair(torch.ones(1, 4), torch.ones(3, 1)) for name in ideal}
    assert math.isnan(measure.exactness(ideal, adapter, {}).max_relative_error)
    updates = make_updates(3)
    updates[1].adapter["m1"].B[0, 0] = math.nan
    assert all(math.isnan(far) for far in measure.drift(updates, dict.fromkeys(["client-0", "client-1", "client-2"], 1 / 3)).values())


@pytest.mark.parametrize("method", ["fedex", "fedit"])
def test_verify_complains_of_what_is_no_number(method):
    """Of an inexact method too, and of what the model computes."""
    fine = {"method": method, "exact_method": method == "fedex", "recomputed": True, "max_relative_error": 1e-8, "compute_dtype": "float16"}
    assert complaint(fine) is None
    for error in (math.nan, math.inf):
        assert "is not finite" in complaint(fine | {"max_relative_error": error})
    assert (complaint(fine | {"max_relative_error": 1e-3}) is None) == (method == "fedit")
    layers = {"realised_error": 1e-4, "floor": 1e-4, "output_error": 1e-3, "output_floor": 1e-3}
    layers |= {"output_error_float32": 1e-6, "output_floor_float32": 1e-6}
    assert complaint(fine | layers) is None
    for name in ("realised_error", "output_error", "output_error_float32"):
        assert "overflows in its precision" in complaint(fine | layers | {name: math.nan})
    plain = fine | layers | {"compute_dtype": "float32", "base_quantization": "none"}
    for name in ("realised_error", "output_error_float32"):
        assert (complaint(plain | {name: 0.9}) is None) == (method == "fedit")  # which misses the ideal by itself
        assert "rounding explains" in complaint(plain | {name: 0.9, "recomputed": False})
        assert complaint(plain | {name: 0.9, "base_quantization": "nf4"}) is None


def test_verify_complains_of_a_base_that_lacks_its_delta(finished, monkeypatch):
    assert complaint(verify(finished / "final", str(base_folder()))) is None
    set_one = _MergedDelta.set
    monkeypatch.setattr(_MergedDelta, "set", lambda self, delta: set_one(self, None))
    assert "the error of the model's own layers is" in complaint(verify(finished / "final", str(base_folder())))


def side_model(dtype):
    loaded = load_base(Base(model=str(base_folder()), dtype=dtype), "causal-lm")
    model = add_lora(loaded, Lora(r=2, target_modules=["q_proj", "v_proj"]), "causal-lm")
    frozen = FrozenBase(model)
    shapes = {name: layer.shape for name, layer in frozen._layers.items()}
    return frozen, {name: LowRank(torch.ones(out, 1), torch.ones(1, inner)) for name, (out, inner) in shapes.items()}


def test_a_side_path_that_overflows_in_16_bits_shows():
    """One module of many: its outputs are infinite in float16, so the round's number is NaN, not the largest of the others."""
    frozen, deltas = side_model("float16")
    frozen.set(deltas)
    before = frozen.realised(deltas)
    assert before.max_relative_error < 1e-2
    assert frozen.side_error < 1e-5
    second = list(frozen._layers.values())[1]
    with torch.no_grad():
        second.base.weight.fill_(6e4)
    realised = frozen.realised(deltas)
    assert math.isnan(realised.max_relative_error)
    assert math.isnan(realised.worst[0])
    second.base.base_delta.last = second.base.base_delta.last * math.nan
    assert math.isnan(frozen.side_error)


def test_a_module_without_an_update_hides_no_other_s_error():
    """Relative to an update of zero its own rounding is infinite, and whatever the other layers compute was below that."""
    frozen, deltas = side_model("float32")
    first, second = list(frozen._layers)[:2]
    deltas[first] = LowRank(torch.zeros_like(deltas[first].U), deltas[first].V)
    frozen.set(deltas)
    error, floor = frozen.realised(deltas).worst
    assert error <= 10 * floor < 1e-3
    with torch.no_grad():
        frozen._layers[second].base.weight += 0.5 * deltas[second].dense(torch.float32)
    error, floor = frozen.realised(deltas).worst
    assert 0.4 < error < 0.6
    assert floor < 1e-3


def test_a_delta_that_could_not_be_set_is_set_the_next_time(monkeypatch):
    """Memory ends between two modules: what the first has got is not what the base is said to have."""
    frozen, deltas = side_model("float32")
    pristine = {name: frozen._layers[name].weight().clone() for name in frozen._layers}
    with monkeypatch.context() as patched:
        patched.setattr(frozen._homes[list(frozen._homes)[1]], "set", raising(MemoryError()))
        with pytest.raises(MemoryError):
            frozen.set(deltas)
    frozen.set({})
    assert all(torch.equal(frozen._layers[name].weight(), weight) for name, weight in pristine.items())


def test_a_round_whose_errors_cannot_be_computed_says_so(tmp_path, monkeypatch):
    """The event names them, null is not read as fine, the command ends with 1; and what reads events later says it too."""
    realised = FrozenBase.realised

    def overflowing(self, ideal):
        found = realised(self, ideal)
        return replace(found, error={**found.error, list(found.error)[-1]: math.inf})

    monkeypatch.setattr(FrozenBase, "realised", overflowing)
    (tmp_path / "run.toml").write_text(write_config(configuration(rounds=1)))
    result = call("run", tmp_path / "run.toml", "--out", tmp_path / "run")
    assert result.exit_code == 1
    assert "error: the errors of round 1 cannot be computed" in result.stderr
    done = events_of(tmp_path / "run", "round_done")[0]
    assert done.not_finite == ["realised_error"]
    assert math.isnan(done.realised_error)
    assert done["exactness_error"] < 1e-6
    assert "realised_error cannot be computed" in events_of(tmp_path / "run", "warning")[0]["message"]


def test_the_demo_and_a_comparison_end_with_1_where_an_error_is_no_number(tmp_path, monkeypatch):
    from fedex_lora.cli import demo
    from fedex_lora.experiments import compare

    started = event("started", method="fedex", clients=["a"], metrics={"accuracy": 0.5})
    numbers = {"deviation": 0.1, "exactness_error": 1e-8, "realised_error": 1e-6, "bytes_down": 1, "bytes_up": 1, "seconds": 1.0}
    one, two = (event("round_done", round=number, metrics={"accuracy": 0.5}, **numbers) for number in (1, 2))
    written(tmp_path / "fine", [started, one, two])
    written(tmp_path / "null", [started, one, two | {"exactness_error": None}])
    rows = {name: demo.demo_summary(tmp_path / name) for name in ("fine", "null")}
    assert rows["fine"]["exactness_error"] == 1e-8
    assert math.isnan(rows["null"]["exactness_error"])
    for names, status in ((["fine"], 0), (["fine", "null"], 1)):
        monkeypatch.setattr(demo, "run_demo", lambda *_, names=names: {"methods": {name: rows[name] for name in names}})
        result = call("demo", "--out", tmp_path / "demo")
        assert result.exit_code == status
        assert ("the errors of null cannot be computed" in result.stderr) == bool(status)
        (tmp_path / "run.toml").write_text(write_config(configuration(rounds=1)))
        table = {"methods": [{"name": name, "exactness_error": rows[name]["exactness_error"]} for name in names], "failed": []}
        monkeypatch.setattr(compare, "compare", lambda *_, table=table: table)
        assert call("compare", tmp_path / "run.toml", "--json").exit_code == status
    table |= {"failed": [{"method": "fedex", "seed": 1, "reason": "training diverged"}]}
    assert "training failed of fedex with seed 1" in one_line(call("compare", tmp_path / "run.toml", "--json"), 1)


def test_a_null_in_the_events_is_not_fine(finished, tmp_path):
    """The report says "not finite" where one round of two has a null, and a number where none has."""
    shutil.copytree(finished, tmp_path / "run")
    write_report([tmp_path / "run"], tmp_path / "before.html")
    events = tmp_path / "run" / "events.jsonl"
    lines = [json.loads(line) for line in events.read_text().splitlines()]
    first = next(line for line in lines if line["event"] == "round_done")
    first["exactness_error"] = None
    events.write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_report([tmp_path / "run"], tmp_path / "after.html")
    first["not_finite"] = ["exactness_error"]
    events.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "  no number: exactness_error  " in call("watch", tmp_path / "run", "--once").stdout
    assert "not finite" not in (tmp_path / "before.html").read_text()
    assert "not finite" in (tmp_path / "after.html").read_text()

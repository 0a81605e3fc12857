"""From files to files: the same bits as in memory, the same refusals, and no more memory than a module of all clients."""

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import oracle
from tests.conftest import make_pair
from typer.testing import CliRunner

from fedex_lora import ClientUpdate, LoRAPair, aggregate
from fedex_lora.aggregation import METHODS
from fedex_lora.cli import app
from fedex_lora.errors import AggregationError, StorageError, UsageError
from fedex_lora.offline import streaming
from fedex_lora.offline.aggregate_folders import aggregate_folders
from fedex_lora.offline.merge_results import merge_folders
from fedex_lora.offline.streaming import StreamJob, audit_is_cheap
from fedex_lora.offline.verify import verify
from fedex_lora.storage.adapter_folder import Format, read_adapter_folder
from fedex_lora.storage.files import checksum, read_manifest
from fedex_lora.storage.result import read_result
from fedex_lora.storage.safetensors_io import TensorWriter, read_table, read_tensor
from fedex_lora.storage.updates import save_update

SHAPES = {
    f"model.layers.{layer}.{name}": shape for layer in range(2) for name, shape in (("q", (48, 48)), ("up", (96, 48)), ("k", (32, 48)))
}


def write_adapter(folder, seed, rank=4, alpha=8, dtype=torch.float32, shapes=SHAPES, head=True):
    folder.mkdir()
    tensors = {}
    for index, (module, (out, inner)) in enumerate(shapes.items()):
        pair = make_pair(100 * seed + index, out, inner, rank)
        tensors |= {
            f"base_model.model.{module}.lora_A.weight": pair.A.to(dtype),
            f"base_model.model.{module}.lora_B.weight": pair.B.to(dtype),
        }
    if head:
        tensors["base_model.model.score.weight"] = torch.randn(3, 48, generator=torch.Generator().manual_seed(seed))
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "base_model_name_or_path": "base", "modules_to_save": ["score"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def in_memory(folders, method, weights):
    read = [read_adapter_folder(folder) for folder in folders]
    updates = [ClientUpdate(folder.name, one.adapter, 1, one.other) for folder, one in zip(folders, read, strict=True)]
    return updates, aggregate(updates, method, weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["fedex", "fedit", "fedit+balanced"])
def test_the_same_bits_as_in_memory(method, dtype, tmp_path):
    """Scalings, weights and names in an order that is not that of the clients' ids."""
    folders = [
        write_adapter(tmp_path / name, seed, alpha=4 + 4 * seed, dtype=dtype) for seed, name in enumerate(("north", "east", "south"))
    ]
    weights = [3.0, 1.0, 2.0]
    report = aggregate_folders(folders, tmp_path / "out", method, weights, None)
    updates, want = in_memory(folders, method, weights)
    got = read_result(tmp_path / "out")  # checks every checksum that was taken while writing
    assert report["weights"] == dict(want.weights)
    assert got.adapter.keys() == want.adapter.keys()
    assert got.base_delta.keys() == want.residual.keys()
    for module, pair in want.adapter.items():
        assert torch.equal(got.adapter[module].A, pair.A)
        assert torch.equal(got.adapter[module].B, pair.B)
        assert got.adapter[module].scaling == pytest.approx(pair.scaling, rel=1e-15)
        whole = got.standalone.adapter[module]
        assert oracle.relative(oracle.product(whole), oracle.total(want, module)) < 1e-7
    for module, gain in want.residual.items():
        assert torch.equal(got.base_delta[module].U, gain.U)
        assert torch.equal(got.base_delta[module].V, gain.V)
    assert torch.equal(got.other["score.weight"], want.other["score.weight"])
    assert [update.client_id for update in got.updates] == sorted(update.client_id for update in updates)
    checked = verify(tmp_path / "out")
    if method == "fedex":
        assert report["max_relative_error"] < 1e-6
        assert checked["max_relative_error"] < 1e-6
    else:
        assert report["deviation"] == pytest.approx(report["total_relative_error"], rel=1e-6)
    assert not report["error_estimated"]
    for name in ("max", "total"):
        assert report[f"{name}_relative_error"] == pytest.approx(checked[f"{name}_relative_error"], rel=1e-6)


@pytest.mark.parametrize("k", [3, 12])
@pytest.mark.parametrize("method", ["fedex", "fedit"])
def test_audits(method, k, tmp_path):
    """The core (3 clients), or the matrix (12): what `verify` finds, to its last digits; on random directions nearly that."""
    folders = [write_adapter(tmp_path / f"client-{seed:02d}", seed, alpha=4 + seed) for seed in range(k)]
    for audit, tolerance in (("exact", 1e-6), ("estimate", 0.35)):
        report = aggregate_folders(folders, tmp_path / audit, method, None, None, audit=audit)
        checked = verify(tmp_path / audit)
        assert report["error_estimated"] == (audit == "estimate")
        assert report["max_relative_error"] == pytest.approx(checked["max_relative_error"], rel=tolerance)
        assert report["total_relative_error"] == pytest.approx(checked["total_relative_error"], rel=tolerance)


@pytest.mark.parametrize(("k", "rank", "cheap"), [(3, 32, True), (20, 32, False), (250, 32, True)])
def test_the_audit_is_estimated_where_it_would_take_longest(k, rank, cheap):
    """Shapes of a 3B model: few clients (core), many (matrix, which the aggregation forms too), and between."""
    pair = LoRAPair(A=torch.empty(rank, 3072, device="meta"), B=torch.empty(8192, rank, device="meta"))
    updates = [ClientUpdate(f"{index:03d}", {"up": pair}, 1) for index in range(k)]
    assert audit_is_cheap(StreamJob(METHODS["fedex"], [None] * k, updates, [1 / k] * k, Format(config={}))) == cheap


@pytest.mark.parametrize("weights", [None, [1.0 + 7 * seed % 50 for seed in range(250)]])
def test_many_independent_clients_stay_exact(weights, tmp_path):
    """250 clients that have nothing in common: the mean is small beside each of them, and rounding is not."""
    shapes = {"layers.0.q": (64, 96)}
    folders = [write_adapter(tmp_path / f"client-{seed:03d}", seed, shapes=shapes, head=False) for seed in range(250)]
    report = aggregate_folders(folders, tmp_path / "out", "fedex", weights, None)
    updates, result = in_memory(folders, "fedex", weights or "uniform")
    want = oracle.ideal([update.adapter["layers.0.q"] for update in updates], oracle.shares(weights or [1] * 250))
    got = read_result(tmp_path / "out")
    streamed = oracle.product(got.adapter["layers.0.q"]) + oracle.numpy64(got.base_delta["layers.0.q"].W)
    assert oracle.relative(oracle.total(result, "layers.0.q"), want) < 3e-7
    assert oracle.relative(streamed, want) < 4e-7
    assert report["max_relative_error"] == pytest.approx(oracle.relative(streamed, want), rel=1e-6)


def test_many_clients_accumulate_the_matrix(tmp_path):
    """Where factors of rank (k-1) r are larger than the matrix, the matrix is written, and it is right."""
    folders = [write_adapter(tmp_path / f"client-{seed:02d}", seed) for seed in range(12)]
    report = aggregate_folders(folders, tmp_path / "out", "fedex", None, None)
    assert report["dense_modules"] == len(SHAPES)
    assert not report["adapter"]
    assert not (tmp_path / "out" / "adapter").exists()
    updates, _ = in_memory(folders, "fedex", "uniform")
    got = read_result(tmp_path / "out")
    for module in SHAPES:
        want = oracle.ideal([update.adapter[module] for update in updates], oracle.shares([1] * 12))
        total = oracle.product(got.adapter[module]) + oracle.numpy64(got.base_delta[module].W)
        assert oracle.relative(total, want) < 5e-7
    assert report["max_relative_error"] < 5e-7
    assert verify(tmp_path / "out")["max_relative_error"] < 5e-7


def test_without_updates_and_audit(tmp_path):
    folders = [write_adapter(tmp_path / name, seed) for seed, name in enumerate("ab")]
    report = aggregate_folders(folders, tmp_path / "out", "fedex", None, None, keep_updates=False, audit="none")
    assert report["max_relative_error"] is None
    assert not (tmp_path / "out" / "updates").exists()
    with pytest.raises(StorageError, match="holds no clients' LoRA updates"):
        verify(tmp_path / "out")


@pytest.mark.parametrize("place", [0, 1])
def test_a_head_in_float64_at_one_party(place, tmp_path):
    folders = [write_adapter(tmp_path / name, seed) for seed, name in enumerate("ab")]
    path = folders[place] / "adapter_model.safetensors"
    save_file({name: x.double() if "score" in name else x for name, x in load_file(path).items()}, path, {"format": "pt"})
    aggregate_folders(folders, tmp_path / "out", weights=[1, 3])
    heads = [load_file(folder / "adapter_model.safetensors")["base_model.model.score.weight"].double() for folder in folders]
    for name in ("trainable", "adapter"):
        mean = read_adapter_folder(tmp_path / "out" / name).other["score.weight"]
        torch.testing.assert_close(mean.double(), 0.25 * heads[0] + 0.75 * heads[1], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", ["fedex", "fedex-best"])  # from files to files, and in memory
@pytest.mark.parametrize("linked", [True, False])
def test_the_inputs_are_kept_as_they_are(linked, method, tmp_path, monkeypatch):
    """Linked, or copied where that cannot be; what becomes of the result afterwards alters no input."""
    folders = [write_adapter(tmp_path / name, seed) for seed, name in enumerate("abc")]
    if not linked:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(errno.EXDEV, "another disk")))
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for folder in folders for path in folder.iterdir()}
    out = tmp_path / "out"
    aggregate_folders(folders, out, method, None, None, parties=tmp_path / "parties")
    assert verify(out)["max_relative_error"] < 1e-6
    sums = read_manifest(out)["files"]
    for folder in folders:
        kept = out / "updates" / folder.name
        assert (kept / "adapter_model.safetensors").samefile(folder / "adapter_model.safetensors") == linked
        assert json.loads((kept / "adapter_config.json").read_text()) == json.loads((folder / "adapter_config.json").read_text())
        assert sums[f"updates/{folder.name}/adapter_model.safetensors"] == checksum(folder / "adapter_model.safetensors")
    assert not any("updates" in name for name in read_manifest(tmp_path / "parties")["files"])
    shutil.rmtree(out)
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in before} == before


def test_results_with_updates_in_the_old_format_are_verified(tmp_path):
    """As releases before this wrote them, and as runs do: one file a client, with other names in it."""
    folders = [write_adapter(tmp_path / name, seed, alpha=4 + seed) for seed, name in enumerate("abc")]
    out = tmp_path / "out"
    aggregate_folders(folders, out, "fedex", [1.0, 2.0, 3.0], None)
    want, found = verify(out), read_result(out)
    manifest = read_manifest(out)
    shutil.rmtree(out / "updates")
    manifest["files"] = {name: digest for name, digest in manifest["files"].items() if not name.startswith("updates/")}
    for update in found.updates:
        name = f"updates/{update.client_id}.safetensors"
        save_update(out / name, update)
        manifest["files"][name] = checksum(out / name)
    (out / "manifest.json").write_text(json.dumps(manifest))
    assert verify(out) == want
    (out / name).unlink()
    del manifest["files"][name]
    (out / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(StorageError, match="names other clients in its manifest than in its updates"):
        verify(out)


def test_nan_is_refused_by_name_and_leaves_nothing(tmp_path):
    folders = [write_adapter(tmp_path / name, seed) for seed, name in enumerate("abc")]
    path = folders[1] / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.model.layers.1.up.lora_B.weight"][0, 0] = float("nan")
    save_file(tensors, path)
    with pytest.raises(AggregationError, match=r"client b sent NaN or infinity in model\.layers\.1\.up"):
        aggregate_folders(folders, tmp_path / "out", "fedex", None, None)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a", "b", "c"]


@pytest.mark.parametrize("damage", ["short", "long", "header", "empty"])
def test_broken_files_are_refused(damage, tmp_path):
    folders = [write_adapter(tmp_path / name, seed) for seed, name in enumerate("ab")]
    path = folders[1] / "adapter_model.safetensors"
    content = path.read_bytes()
    broken = {"short": content[:-8], "long": content + b"12345678", "header": b"\xff" * 8 + content[8:], "empty": b""}
    path.write_bytes(broken[damage])
    with pytest.raises(StorageError, match="truncated or not safetensors"):
        aggregate_folders(folders, tmp_path / "out", "fedex", None, None)
    assert not (tmp_path / "out").exists()


def test_ranks_that_differ_still_go_through_memory(tmp_path):
    folders = [write_adapter(tmp_path / "a", 0, rank=2), write_adapter(tmp_path / "b", 1, rank=4)]
    report = aggregate_folders(folders, tmp_path / "out", "fedex-best", None, None)
    assert not report["error_estimated"]
    assert report["max_relative_error"] < 1e-6
    with pytest.raises(AggregationError, match="rank 2 against"):
        aggregate_folders(folders, tmp_path / "no", "fedex", None, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool])
def test_files_written_in_pieces_are_those_of_safetensors(dtype, tmp_path):
    """Read back by the reference implementation, and by ours what it wrote."""
    tensors = {"b": (torch.randn(6, 5) * 9).to(dtype), "a": (torch.randn(7) * 9).to(dtype), "none": torch.empty(0, 3).to(dtype)}
    with TensorWriter(tmp_path / "ours", {name: (x.dtype, x.shape) for name, x in tensors.items()}, {"k": "v"}) as file:
        for tensor in tensors.values():
            for row in tensor.split(2):
                file.write(row)
    assert file.checksum == checksum(tmp_path / "ours")
    theirs = load_file(tmp_path / "ours")
    save_file(tensors, tmp_path / "theirs", {"k": "v"})
    table = read_table(tmp_path / "theirs")
    for name, tensor in tensors.items():
        assert torch.equal(theirs[name], tensor)
        assert torch.equal(read_tensor(tmp_path / "theirs", table.entries[name]), tensor)


def test_a_writer_holds_to_its_header(tmp_path):
    with pytest.raises(AssertionError, match="fewer"), TensorWriter(tmp_path / "x", {"a": (torch.float32, (2,))}) as file:
        file.write(torch.ones(1))
    with pytest.raises(AssertionError, match="more"), TensorWriter(tmp_path / "x", {"a": (torch.float32, (2,))}) as file:
        file.write(torch.ones(3))


@pytest.mark.parametrize("k", [6, 16])
def test_regions_merge_on_disk(k, tmp_path):
    """Three levels of folders against one: factors (k = 6), and matrices (k = 16)."""
    folders = [write_adapter(tmp_path / f"client-{seed:02d}", seed, alpha=4 + seed) for seed in range(k)]
    weights = [float(10 + seed) for seed in range(k)]
    cut = k // 2
    aggregate_folders(folders[:cut], tmp_path / "north", "fedex", weights[:cut], None)
    aggregate_folders(folders[cut : cut + 1], tmp_path / "isle", "fedex", weights[cut : cut + 1], None)
    aggregate_folders(folders[cut + 1 :], tmp_path / "coast", "fedex", weights[cut + 1 :], None)
    merge_folders([tmp_path / "coast", tmp_path / "isle"], tmp_path / "south", None)
    report = merge_folders([tmp_path / "south", tmp_path / "north"], tmp_path / "all", None)
    updates, _ = in_memory(folders, "fedex", weights)
    p = oracle.shares(weights)
    assert sorted(report["clients"].values()) == pytest.approx(p)
    got = read_result(tmp_path / "all")
    for module in SHAPES:
        want = oracle.ideal([update.adapter[module] for update in updates], p)
        total = oracle.product(got.adapter[module]) + oracle.numpy64(got.base_delta[module].dense())
        assert oracle.relative(total, want) < 1e-6
    assert verify(tmp_path / "all")["max_relative_error"] < 1e-6
    assert report["max_relative_error"] < 1e-6


def test_what_does_not_merge_is_refused(tmp_path):
    folders = [write_adapter(tmp_path / f"client-{seed}", seed) for seed in range(4)]
    for name, two, method in (("one", folders[:2], "fedex"), ("two", folders[2:], "fedit"), ("best", folders[2:], "fedex-best")):
        aggregate_folders(two, tmp_path / name, method, None, None)
    with pytest.raises(AggregationError, match="different methods"):
        merge_folders([tmp_path / "one", tmp_path / "two"], tmp_path / "all", None)
    with pytest.raises(UsageError, match="do not add up"):
        merge_folders([tmp_path / "best"], tmp_path / "all", None)
    with pytest.raises(UsageError, match="given twice"):
        merge_folders([tmp_path / "one", tmp_path / "one"], tmp_path / "all", None)
    with pytest.raises(StorageError, match="is a PEFT adapter and no result: make one by fedex-lora aggregate"):
        merge_folders([tmp_path / "one", folders[0]], tmp_path / "all", None)
    assert not (tmp_path / "all").exists()


MEASURE = """
import json, sys
from pathlib import Path
from fedex_lora.cli import app
from fedex_lora.offline.aggregate_folders import aggregate_folders
from tests.offline.test_streaming import status
folders = sorted(Path(sys.argv[1]).glob("client-*"))
aggregate_folders(folders[:1], Path(sys.argv[1]) / "warm", "fedex", None, None)
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
aggregate_folders(folders, Path(sys.argv[1]) / "out", "fedex", None, None, keep_updates=False)
print(status("VmHWM") - before)
"""


def status(field):
    """Bytes, from /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux's way to forget a peak")
def test_memory_is_a_module_of_all_clients(tmp_path):
    """16 modules of 4 clients: 67 MB of factors pass through a process that grows by far less."""
    shapes = {f"layers.{index}": (2048, 2048) for index in range(16)}
    for seed in range(4):
        write_adapter(tmp_path / f"client-{seed}", seed, rank=64, shapes=shapes, head=False)
    module = 4 * 64 * (2048 + 2048) * 4
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path], capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stderr
    print(f"grew by {int(done.stdout) / 1e6:.0f} MB; a module of all clients has {module / 1e6:.0f} MB")
    assert int(done.stdout) < 2 * module + 60e6  # holding everything, and the result, takes 32 modules


def test_the_command_line(tmp_path):
    """Regions and their merging as typed; what cannot be is one line."""

    def call(*words):
        return CliRunner().invoke(app, [str(word) for word in words])

    folders = [write_adapter(tmp_path / f"client-{seed}", seed) for seed in range(3)]
    north = call("aggregate", *folders[:2], "--weights", "120,80", "-o", tmp_path / "north", "--audit", "none")
    assert north.exit_code == 0, north.stderr
    assert "the error was not measured" in north.stdout
    assert "estimated" in call("aggregate", folders[2], "--weights", "40", "-o", tmp_path / "south", "--audit", "estimate").stdout
    assert "auto, exact" in call("aggregate", *folders, "-o", tmp_path / "x", "--audit", "no").stderr
    done = call("aggregate", "--merge", tmp_path / "north", tmp_path / "south", "-o", tmp_path / "all", "--json")
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["clients"] == pytest.approx({"north/client-0": 0.5, "north/client-1": 1 / 3, "south/client-2": 1 / 6})
    assert report["max_relative_error"] < 1e-6
    assert "of 2 regions" in call("aggregate", "--merge", tmp_path / "north", tmp_path / "south", "-o", tmp_path / "again").stdout
    refused = call("aggregate", "--merge", tmp_path / "north", "--method", "fedit", "-o", tmp_path / "no")
    assert refused.exit_code == 2
    assert len(refused.stderr.strip().splitlines()) == 1
    many = [write_adapter(tmp_path / f"many-{seed:02d}", seed) for seed in range(12)]
    assert "no stand-alone adapter" in call("aggregate", *many, "-o", tmp_path / "dense").stdout


@pytest.mark.parametrize("how", ["replaced", "written"])
def test_a_file_that_changes_while_it_is_read_is_refused(how, tmp_path, monkeypatch):
    folders = [write_adapter(tmp_path / name, seed) for seed, name in enumerate("abc")]
    path, read, count = folders[1] / "adapter_model.safetensors", streaming.read_into, iter(range(10**6))
    other = (write_adapter(tmp_path / "other", 9) / "adapter_model.safetensors").read_bytes()

    def and_then(*args):
        read(*args)
        if next(count) == 5:
            if how == "replaced":
                path.unlink()
            path.write_bytes(other)

    monkeypatch.setattr(streaming, "read_into", and_then)
    with pytest.raises(StorageError, match="changed while it was read"):
        aggregate_folders(folders, tmp_path / "out", "fedex", None, None)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        ({"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}, "not safetensors"),
        ({"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}, "not safetensors"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}, "not safetensors"),
        ({"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}, "which is not read here"),
    ],
    ids=["negative", "float", "gap", "type"],
)
def test_headers_that_lie_are_refused(tensor, message, tmp_path):
    raw = json.dumps({"x": tensor}).encode()
    (tmp_path / "f.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(8 if tensor["data_offsets"][0] else 4))
    with pytest.raises(StorageError, match=message):
        read_table(tmp_path / "f.safetensors")


def test_a_header_without_end_is_refused(tmp_path):
    raw = b'{"x":' + b"[" * 100_000
    (tmp_path / "f.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw)
    with pytest.raises(StorageError, match="not safetensors"):
        read_table(tmp_path / "f.safetensors")


def test_regions_that_share_an_adapter_are_refused(tmp_path):
    folders = [write_adapter(tmp_path / name, seed) for seed, name in enumerate("abc")]
    regions = [tmp_path / "north", tmp_path / "south"]
    for region, members in zip(regions, (folders[:2], folders[1:]), strict=True):
        aggregate_folders(members, region, "fedex", None, None)
    with pytest.raises(AggregationError, match=r"b is in .*north and in .*south"):
        merge_folders(regions, tmp_path / "all", None)
    line = CliRunner().invoke(app, ["aggregate", "--merge", *map(str, regions), "-o", str(regions[0] / "all")]).output
    assert "lies in one of the folders that are read" in line


def test_regions_whose_folders_are_called_alike_merge(tmp_path, monkeypatch):
    """Each server has its own site-1 and site-2; a copy of an adapter under another name is that adapter, over two levels, too."""
    for number, region in enumerate(("north", "south", "west")):
        (tmp_path / region).mkdir()
        monkeypatch.chdir(tmp_path / region)
        sites = [write_adapter(Path(f"site-{site}"), 10 * number + site) for site in (1, 2)]
        if region == "west":
            sites.append(shutil.copytree(tmp_path / "north" / "site-1", Path("site-3")))
        aggregate_folders(sites, Path("out"))
    north, south, west = (tmp_path / region / "out" for region in ("north", "south", "west"))
    monkeypatch.chdir(tmp_path)
    assert merge_folders([north, south], tmp_path / "all", None)["max_relative_error"] < 1e-6
    for first, name in ((north, "site-3"), (tmp_path / "all", "site-3")):
        with pytest.raises(AggregationError, match=f"{name} is in {first} and in {west}"):
            merge_folders([first, west], tmp_path / "never", None)


def told(folder, **facts):
    """The manifest says so, too."""
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))


def test_regions_of_bases_that_differ_are_refused(tmp_path):
    """By what their manifests say, though they call it by one name; `--base` says that they are one, but not of their classes."""
    regions = [tmp_path / "north", tmp_path / "south"]
    for number, region in enumerate(regions):
        aggregate_folders([write_adapter(tmp_path / f"{number}{name}", 10 * number + seed) for seed, name in enumerate("ab")], region)
    one = {"base_fingerprint": "1" * 64, "base_dtype": "bfloat16", "base_quantization": "nf4", "labels": ["x", "y"]}
    told(regions[0], **one)
    merge_folders(regions, tmp_path / "one-says-it", None)
    for key, other in (("base_fingerprint", "2" * 64), ("base_dtype", "float32"), ("base_quantization", "none"), ("labels", ["y", "x"])):
        told(regions[1], **{**one, key: other})
        with pytest.raises(AggregationError, match=f"the regions differ in {key}, so they have no mean") as caught:
            merge_folders(regions, tmp_path / "never", None, base="base" if key == "labels" else None)
        assert "\n" not in str(caught.value)
    told(regions[1], **{**one, "base_dtype": "float32"})
    merge_folders(regions, tmp_path / "said", None, base="base")
    told(regions[1], **one)
    merge_folders(regions, tmp_path / "alike", None)
    for out, facts in (("one-says-it", one), ("alike", one), ("said", {key: one[key] for key in one if key != "base_dtype"})):
        assert {key: value for key, value in read_manifest(tmp_path / out).items() if key in one} == facts


def test_a_result_is_not_written_into_the_state(tmp_path):
    folders = [write_adapter(tmp_path / name, seed) for seed, name in enumerate("ab")]
    aggregate_folders(folders, tmp_path / "first")
    with pytest.raises(UsageError, match="first/next lies in one of the folders"):
        aggregate_folders(folders, tmp_path / "first" / "next", previous=tmp_path / "first")
    assert verify(tmp_path / "first")["max_relative_error"] < 1e-6


def test_a_stopped_command_leaves_nothing_behind(tmp_path):
    shapes = {f"layers.{layer}.proj": (2048, 2048) for layer in range(24)}
    folders = [write_adapter(tmp_path / f"in-{i}", i, rank=32, shapes=shapes) for i in range(3)]
    before = sorted(tmp_path.iterdir())
    command = [sys.executable, "-m", "fedex_lora.cli", "aggregate", *map(str, folders), "--out", str(tmp_path / "out"), "--audit", "exact"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    while process.poll() is None and sorted(tmp_path.iterdir()) == before:
        time.sleep(0.001)
    for _ in range(5):  # whoever is impatient
        process.terminate()
        time.sleep(0.02)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said.splitlines()[-1]) == (130, "interrupted")
    assert sorted(tmp_path.iterdir()) == before

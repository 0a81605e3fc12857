"""Files: whole or not there, and altered ones are recognised."""

import hashlib
import json
import math
import os
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from tests.conftest import make_updates

from fedex_lora.aggregation.flatten import unflatten_deltas
from fedex_lora.errors import StorageError, UnwritableError, UsageError
from fedex_lora.protocol.dumps import unpack
from fedex_lora.storage import files
from fedex_lora.storage.events import KINDS, ClientRejected, RoundStarted, append_event, read_events, record
from fedex_lora.storage.files import TEMPORARY, atomic_folder, read_manifest, replacing
from fedex_lora.storage.tensors import load_delta, load_tensors, save_delta, save_tensors
from fedex_lora.storage.updates import load_update, safe_name, save_update
from fedex_lora.types import Dense, LowRank


def test_base_delta_round_trip(tmp_path):
    deltas = {"a.b": LowRank(U=torch.randn(5, 2), V=torch.randn(2, 7)), "c": Dense(W=torch.randn(3, 4))}
    save_delta(tmp_path / "d.safetensors", deltas)
    got = load_delta(tmp_path / "d.safetensors")
    assert torch.equal(got["a.b"].U, deltas["a.b"].U)
    assert torch.equal(got["a.b"].V, deltas["a.b"].V)
    assert torch.equal(got["c"].W, deltas["c"].W)


def test_update_round_trip(tmp_path):
    update = make_updates(1)[0]
    save_update(tmp_path / "u.safetensors", update)
    got = load_update(tmp_path / "u.safetensors")
    assert (got.client_id, got.num_examples) == (update.client_id, update.num_examples)
    assert all(torch.equal(got.adapter[n].B, p.B) and got.adapter[n].scaling == p.scaling for n, p in update.adapter.items())
    assert torch.equal(got.other["head.weight"], update.other["head.weight"])


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    def torn():
        with atomic_folder(tmp_path / "out", {}) as temporary:
            save_tensors(temporary / "t.safetensors", {"a": torch.ones(2)})
            raise RuntimeError

    with pytest.raises(RuntimeError):
        torn()
    assert not list(tmp_path.iterdir())
    with atomic_folder(tmp_path / "out", {"fact": 1}) as temporary:
        save_tensors(temporary / "t.safetensors", {"a": torch.ones(2)})
        assert not (tmp_path / "out").exists()
    assert read_manifest(tmp_path / "out")["fact"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_altered_and_missing_files_are_recognised(tmp_path):
    for name, damage, message in (
        ("one", lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x07"), "has changed"),
        ("two", lambda path: path.unlink(), "is missing"),
    ):
        with atomic_folder(tmp_path / name, {}) as temporary:
            save_tensors(temporary / "t.safetensors", {"a": torch.ones(2)})
        damage(tmp_path / name / "t.safetensors")
        with pytest.raises(StorageError, match=message):
            read_manifest(tmp_path / name)


def test_an_occupied_folder_is_refused(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").write_text("x")
    with pytest.raises(UsageError, match="not empty"), atomic_folder(tmp_path / "out", {}):
        pass
    assert (tmp_path / "out" / "x").read_text() == "x"


def test_a_name_that_is_too_long_is_said(tmp_path):
    with pytest.raises(UnwritableError, match="File name too long: choose another folder"), atomic_folder(tmp_path / ("o" * 230), {}):
        pass


@pytest.mark.parametrize("cut", [0, 4, 20, -1])
def test_truncated_safetensors(cut, tmp_path):
    path = tmp_path / "t.safetensors"
    save_tensors(path, {"a": torch.ones(100)})
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(StorageError, match=r"t\.safetensors is truncated"):
        load_tensors(path)


def test_events_survive_a_torn_line(tmp_path):
    path = tmp_path / "events.jsonl"
    append_event(path, RoundStarted(round=1, clients=["a"]))
    append_event(path, "run_done", rounds=1)
    path.write_text(path.read_text() + json.dumps({"event": "three"})[:7])
    assert [event.name for event in read_events(path)] == ["round_started", "run_done"]


@pytest.mark.parametrize("kind", [kind for name, kind in KINDS.items() if name == kind.name], ids=lambda kind: kind.name)
def test_what_is_written_of_an_event_is_read_again(tmp_path, kind):
    """Each kind, with what it must have and a field of a later version; a number that is not finite is null between."""
    needed = {name: EXAMPLES[name] for name, field in kind.model_fields.items() if field.is_required()}
    numbers = {name: math.nan for name, field in kind.model_fields.items() if field.annotation == float | None and field.metadata}
    event = kind(**needed, **numbers, later="x")
    append_event(tmp_path / "events.jsonl", event)
    (back,) = read_events(tmp_path / "events.jsonl")
    assert "NaN" not in (tmp_path / "events.jsonl").read_text()
    assert (type(back), back.model_extra) == (kind, {"later": "x"})
    found, said = back.fields(), event.fields()
    assert found.pop("time") <= time.time()
    assert str(found) == str(said)  # NaN is not itself
    for name in needed:
        with pytest.raises(StorageError, match=f"a `{kind.name}` event without {name}$"):
            record(kind.name, **{key: value for key, value in needed.items() if key != name})


EXAMPLES = {"method": "fedex", "clients": ["a"], "round": 1, "rounds": 2, "client": "a", "step": 3, "steps": 4, "reason": "late"}
EXAMPLES |= {"message": "no", "since": 5.0, "metrics": {"f1": 0.5}, "bytes_down": 6, "bytes_up": 7}


def test_events_of_other_versions_are_read(tmp_path):
    """What was called `refused` before, an event that there is not, one that lacks something, and null."""
    path = tmp_path / "events.jsonl"
    lines = [{"event": "refused", "round": 1, "client": "a", "reason": "late"}, {"event": "new", "x": 1}, {"event": "held_out", "round": 1}]
    lines.append({"event": "round_done", "round": 1, "metrics": {"f1": None}, "bytes_down": 1, "bytes_up": 1, "deviation": None})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    refused, new, lacking, done = read_events(path)
    assert refused == ClientRejected(round=1, client="a", reason="late")
    assert (new.event, new.complaint, lacking.event, lacking.complaint) == ("new", [], "held_out", ["metrics"])
    assert math.isnan(done.metrics["f1"])
    assert math.isnan(done.deviation)
    assert done.exactness_error is None  # not said


@pytest.mark.parametrize("writes", [replacing, lambda path: atomic_folder(path, {})])
def test_who_is_interrupted_as_the_temporary_appears_leaves_nothing(tmp_path, monkeypatch, writes):
    interrupts = iter([KeyboardInterrupt])

    def then_interrupted(real):
        def call(path, *args, **options):
            made = real(path, *args, **options)
            if TEMPORARY in str(path) and (interrupt := next(interrupts, None)):
                raise interrupt
            return made

        return call

    monkeypatch.setattr(os, "open", then_interrupted(os.open))
    monkeypatch.setattr(os, "mkdir", then_interrupted(os.mkdir))
    with pytest.raises(KeyboardInterrupt), writes(tmp_path / "out"):
        raise AssertionError("it was interrupted before")
    assert list(tmp_path.iterdir()) == []


def test_sums_of_older_versions_are_checked_as_they_were_written(tmp_path):
    """They were sha256 without a name; whatever is written now says which digest it is."""
    with atomic_folder(tmp_path / "out", {}) as folder:
        (folder / "x").write_bytes(b"content")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["files"]["x"].startswith("blake3:")
    manifest["files"]["x"] = hashlib.sha256(b"content").hexdigest()
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    assert read_manifest(tmp_path / "out")
    (tmp_path / "out" / "x").write_bytes(b"Content")
    with pytest.raises(StorageError, match="has changed since it was written"):
        read_manifest(tmp_path / "out")


def test_no_two_clients_share_a_file():
    names = ["é", "è", "a b", "a_b", "", ".", "..", "a/b", "../a", "north"]
    assert len({safe_name(name) for name in names}) == len(names)
    assert safe_name("north") == "north"
    assert all(safe_name(name).strip(".") for name in names)


def test_all_is_synced_before_a_rename_and_the_folder_after_it(tmp_path, monkeypatch):
    """A killed process loses nothing that the system holds; a machine without power does."""
    log, fsync, rename, replace = [], files.fsync, Path.rename, Path.replace

    def noted(kind, real):
        return lambda path, *more: (log.append((kind, Path(path).name)), real(path, *more))[1]

    monkeypatch.setattr(files, "fsync", noted("sync", fsync))
    monkeypatch.setattr(Path, "rename", noted("rename", rename))
    monkeypatch.setattr(Path, "replace", noted("rename", replace))
    with atomic_folder(tmp_path / "out", {}) as there:
        (there / "x").write_text("1")
    (at,) = [place for place, (kind, name) in enumerate(log) if kind == "rename" and name.startswith(f"{TEMPORARY}out")]
    assert {("sync", "x"), ("sync", "manifest.json"), ("sync", log[at][1])} <= set(log[:at])
    assert ("sync", tmp_path.name) in log[at + 1 :]
    log.clear()
    files.write_bytes(tmp_path / "y", b"2")
    (at,) = [place for place, (kind, _) in enumerate(log) if kind == "rename"]
    assert ("sync", log[at][1]) in log[:at]
    assert ("sync", tmp_path.name) in log[at + 1 :]


def test_dumps_of_older_versions_open():
    """sha256 of the tensors alone, and parts behind a dot."""
    tensors = {"x": torch.ones(2)}
    sums = hashlib.sha256(b"x" + tensors["x"].numpy().tobytes()).hexdigest()
    old = save(tensors, metadata={"client": json.dumps({"round": 3}), "sha256": sums})
    assert unpack("client", old)[1] == {"round": 3}
    with pytest.raises(StorageError, match="has changed"):
        unpack("client", old[:-1] + b"!")
    factors = {"moving|m.0.U": torch.ones(3, 1), "moving|m.0.V": torch.ones(1, 2)}
    assert unflatten_deltas("moving", factors, dotted=True)["m.0"].dense().shape == (3, 2)
    with pytest.raises(ValueError, match="moving"):
        unflatten_deltas("moving", factors)

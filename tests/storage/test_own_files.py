"""Nothing is removed, replaced or overwritten that this program did not write; and of two that write one folder, one is refused."""

import errno
import json
import multiprocessing
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from tests.cli.test_cli import call, one_line
from tests.experiments.test_compare import outcomes
from tests.fake import raising
from tests.finished_runs import small_run
from tests.offline.test_streaming import write_adapter
from tests.runs.test_run import configuration, ignore

from fedex_lora.cli import demo
from fedex_lora.config import write_config
from fedex_lora.errors import FedexLoraError, StorageError, UnwritableError, UsageError
from fedex_lora.experiments.compare._runs import RunJob, done
from fedex_lora.offline.verify import verify
from fedex_lora.runs import run as runner
from fedex_lora.runs.run import run
from fedex_lora.server.checkpoint import load_checkpoint, require_space
from fedex_lora.storage import files as storage
from fedex_lora.storage.files import TEMPORARY, atomic_folder, write_bytes, write_text
from fedex_lora.storage.result import read_result
from fedex_lora.storage.run_folder import remove, remove_temporaries, strays

THEIRS = {
    ".git/HEAD": "ref: refs/heads/main",
    ".env": "TOKEN=1",
    ".dvc/config": "[core]",
    "thesis.tex": "mine",
    "rounds/.keep": "",
    "x/": "",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return small_run(tmp_path_factory.mktemp("finished") / "run")


def fill(folder, names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir() if name.endswith("/") else path.write_text(THEIRS.get(name, "theirs"))


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize("names", [[".git/HEAD"], [".env"], [".git/HEAD", ".env", ".dvc/config", "thesis.tex"], ["rounds/.keep"], ["x/"]])
def test_resume_in_a_folder_of_something_else(names, tmp_path, monkeypatch):
    """`run --resume --out .`, as in a repository: one line, and every byte as it was."""
    (tmp_path / "run.toml").write_text(write_config(configuration(rounds=1)))
    (tmp_path / "here").mkdir()
    fill(tmp_path / "here", names)
    before = contents(tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    assert "holds something that is no run" in one_line(call("run", "../run.toml", "--out", ".", "--resume"), 2)
    assert contents(tmp_path / "here") == before


def test_resume_beside_a_configuration_of_their_own(tmp_path):
    """A repository whose config.toml says the same run in other words is no run folder; nor is one with a file more."""
    config, out = configuration(rounds=1), tmp_path / "here"
    out.mkdir()
    ours = write_config(config)
    for files in ({"config.toml": f"# mine\n{ours}"}, {"config.toml": ours, ".env": "TOKEN=1"}):
        for name, text in files.items():
            (out / name).write_text(text)
        with pytest.raises(UsageError, match="no run"):
            run(config, out, ignore, resume=True)
        assert {path.name: path.read_text() for path in out.iterdir()} == files


def test_a_start_that_fails_leaves_what_was_there_before(tmp_path, monkeypatch):
    """A configuration of one's own, as a killed run leaves one, and an empty folder; a folder that the run made is gone again."""
    text = write_config(configuration(rounds=1))
    for name in ("mine", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "mine" / "config.toml").write_text(text)
    monkeypatch.setattr(runner, "run_rounds", raising(KeyboardInterrupt()))
    for name in ("mine", "empty", "new"):
        with pytest.raises(KeyboardInterrupt):
            run(configuration(rounds=1), tmp_path / name, ignore, resume=True)
    assert contents(tmp_path) == {"mine": None, "empty": None, "mine/config.toml": text.encode()}


def test_only_temporaries_are_swept(finished, tmp_path):
    """In a run that goes on: what has a temporary's name and lies where a run writes goes; every other file stays, dotted or not."""
    out = shutil.copytree(finished, tmp_path / "run")
    fill(out, [".git/HEAD", ".env", "thesis.tex", "rounds/.keep", "clients/bone/.note", f"mine/{TEMPORARY}x", ".config.toml.tmp"])
    before = contents(out)
    ours = [out / f"{TEMPORARY}config.toml", out / "rounds" / f"{TEMPORARY}0003.abc" / "x", out / "clients/bone" / f"{TEMPORARY}memory"]
    for path in ours:
        path.parent.mkdir(exist_ok=True)
        path.write_text("half")
    (out / f"{TEMPORARY}link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    log = (out / "events.jsonl").read_bytes() + b"\xff\n"
    (out / "events.jsonl").write_bytes(log + b'{"event": "ro')  # torn, behind a line that is damaged, which is not ours to mend
    remove_temporaries(out)
    assert contents(out) == before | {"events.jsonl": log}
    assert (tmp_path / "elsewhere").is_dir()


def test_a_run_folder_holds_nothing_that_it_does_not_know(finished, tmp_path):
    """`strays` knows all that runs of any kind write, and nothing else; `remove` leaves a folder alone that holds more."""
    fedsa = small_run(tmp_path / "fedsa", rounds=1, method="fedsa")
    for out in (finished, fedsa, small_run(tmp_path / "full", rounds=1, method="full-ft", training={"learning_rate": 1e-3})):
        assert strays(out) == []
    named_alike = "final/adapter/adapter_model.safetensors", "final/model.safetensors", "rounds/0001/trainable/own.safetensors"
    odd = "rounds/0001/notes.txt", "final/.git/HEAD", "clients/bone/rows.csv", "thesis.tex", "empty/"
    for number, name in enumerate(odd + named_alike):
        out = shutil.copytree(finished, tmp_path / f"{number}")
        fill(out, [name])
        before = contents(out)
        assert strays(out) == [out / name]
        with pytest.raises(UsageError, match="was not written by a run"):
            remove(out)
        assert contents(out) == before
    remove(fedsa)
    assert not fedsa.exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_old_rounds_with_notes_in_them_stay(tmp_path):
    def emit(event):
        if event.name == "round_done" and event.round == 1:
            (tmp_path / "run" / "rounds" / "0001" / "notes.txt").write_text("mine")

    run(configuration(rounds=4, keep_rounds=2), tmp_path / "run", emit)
    assert {path.name for path in (tmp_path / "run" / "rounds").iterdir()} - {"0002"} == {"0001", "0003", "0004"}
    assert (tmp_path / "run" / "rounds" / "0001" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("rate", [1e-9, 5e-3])
def test_of_old_rounds_the_best_so_far_stays(rate, tmp_path):
    """What is kept is counted from the events; where nothing is learnt all rounds are alike, but for their loss."""
    out, there, scores = tmp_path / "run", [], {}

    def emit(event):
        if event.name == "round_started":
            there.append({int(path.name) for path in (out / "rounds").glob("*")})
        elif event.name == "held_out":
            scores[event.round] = event.metrics["accuracy"], -event.metrics["loss"]
        elif event.name == "run_done":
            there.append(event.best_round)

    training = {"learning_rate": rate, "num_train_epochs": 1, "per_device_train_batch_size": 16}
    run(configuration(rounds=5, keep_rounds=2, training=training), out, emit)
    for number, folders in enumerate(there[:-1]):  # that are there when round number + 1 begins
        best = max(range(1, number), key=lambda one: (scores[one], -one), default=0)
        assert folders == {one for one in (best, number - 1, number) if one > 0}
    assert there[-1] == max(range(1, 6), key=lambda one: (scores[one], -one))
    assert {int(path.name) for path in (out / "rounds").iterdir()} == {there[-1], 4, 5}


@pytest.fixture
def quick_demo(monkeypatch, finished, tmp_path_factory):
    """The demo with runs that are copied, not trained."""
    made = {method: tmp_path_factory.mktemp("demo") / method for method in demo.SHOWN}
    for method, folder in made.items():
        shutil.copytree(finished, folder)
        (folder / "config.toml").write_text(write_config(demo.configuration(method, 3)))
    monkeypatch.setattr(demo, "run", lambda config, out, emit: shutil.copytree(made[out.name], out))


def test_a_demo_replaces_a_demo_and_nothing_else(quick_demo, tmp_path):
    out = tmp_path / "demo"
    for _ in range(2):
        assert call("demo", "--out", out).exit_code == 0
    shutil.rmtree(out / "ffa" / "final")  # as one that was killed
    (out / f"{TEMPORARY}report.html").write_text("half")
    assert call("demo", "--out", out).exit_code == 0
    inside = ["fedex/notes.txt", "fedex/trackers/thesis.tex", "fedex/report.html", "fedex/rounds/0001/.git/HEAD", "fedit/final/x.py"]
    for name in [".git/HEAD", ".env", "thesis.tex", "ffa2/config.toml", "report.html", *inside]:
        (tmp_path / "kept").mkdir()
        kept = shutil.copytree(out, tmp_path / "kept" / "demo")
        fill(kept, [name])
        before = contents(kept)
        assert "give another --out" in one_line(call("demo", "--out", kept), 2)
        assert contents(kept) == before
        shutil.rmtree(tmp_path / "kept")


def test_a_report_replaces_a_report_and_nothing_else(finished, tmp_path):
    out = shutil.copytree(finished, tmp_path / "run")
    for _ in range(2):
        assert call("report", out).exit_code == 0
    assert strays(out) == []
    (out / "report.html").write_text("<html>my own</html>")
    assert "is no report of fedex-lora" in one_line(call("report", out), 2)
    assert (out / "report.html").read_text() == "<html>my own</html>"


def test_a_run_that_is_called_like_a_demo_s_stays(quick_demo, finished, tmp_path):
    """A run of their own in a folder `fedex`, beside a file demo.json of their own; or that file alone."""
    for words in ("no table", "[]", '{"base_accuracy": 1}'):
        (tmp_path / "demo.json").write_text(words)
        assert "no part of a demo" in one_line(call("demo", "--out", tmp_path), 2)
        assert (tmp_path / "demo.json").read_text() == words
    shutil.copytree(finished, tmp_path / "fedex")
    (tmp_path / "demo.json").write_text("{}")
    before = contents(tmp_path)
    assert "no part of a demo" in one_line(call("demo", "--out", tmp_path), 2)
    assert contents(tmp_path) == before


def test_looking_whether_a_run_is_done_changes_nothing(tmp_path):
    config = configuration(rounds=1)
    run(config, tmp_path / "run", ignore)
    before, job = contents(tmp_path), RunJob(config, tmp_path / "run")
    assert done(job)
    assert contents(tmp_path) == before
    (tmp_path / "run" / "rounds" / "notes.txt").write_text("mine")
    assert next(outcomes([job], 1)).curve
    assert (tmp_path / "run" / "rounds" / "notes.txt").exists()
    (tmp_path / "run" / "rounds" / "notes.txt").unlink()
    assert next(outcomes([job], 1)).curve
    assert not (tmp_path / "run" / "rounds").exists()
    assert verify(tmp_path / "run")["recomputed"] is False  # final/ alone: its sums


def test_a_comparison_does_not_run_over_what_it_did_not_write(tmp_path):
    job = RunJob(configuration(rounds=1), tmp_path / "run")
    fill(job.folder, ["thesis.tex"])
    with pytest.raises(UsageError, match=r"thesis\.tex was not written by a run"):
        list(outcomes([job], 1))
    assert (job.folder / "thesis.tex").exists()


def aggregating(folders, out, barrier, found):
    """One process: it waits for the other one when its own folder is whole and not yet in its place."""
    from fedex_lora.offline.aggregate_folders import aggregate_folders
    from fedex_lora.storage import files as storage

    fsync, waited = storage.fsync, []

    def together(path):
        if not waited and path.parent.name.startswith(TEMPORARY):
            waited.append(path)
            barrier.wait(60)
        fsync(path)

    storage.fsync = together
    try:
        found.put(("done", aggregate_folders(folders, out, "fedex", None, None)["max_relative_error"]))
    except FedexLoraError as error:
        found.put(("refused", str(error)))


def test_two_that_aggregate_into_one_folder(tmp_path):
    """Two processes, neither of which finds anything in OUT at its start: one is refused in one line, and the other's result is whole."""
    context = multiprocessing.get_context("fork")
    folders = [write_adapter(tmp_path / name, seed) for seed, name in enumerate(("one", "two"))]
    barrier, found = context.Barrier(2), context.Queue()
    both = [context.Process(target=aggregating, args=(folders, tmp_path / "out", barrier, found)) for _ in range(2)]
    for process in both:
        process.start()
    results = dict(found.get(timeout=120) for _ in both)
    for process in both:
        process.join()
    assert results.keys() == {"done", "refused"}
    assert "was written by another process meanwhile" in results["refused"]
    assert "\n" not in results["refused"]
    assert verify(tmp_path / "out")["max_relative_error"] < 1e-6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "out", "two"]


@pytest.mark.parametrize("theirs", ["folder", "file"])
def test_what_somebody_put_there_meanwhile_stays(theirs, tmp_path):
    def written():
        with atomic_folder(tmp_path / "out", {}) as temporary:
            (temporary / "x").write_text("ours")
            fill(tmp_path, ["out/thesis.tex" if theirs == "folder" else "out"])

    with pytest.raises(UsageError, match="written by another process meanwhile"):
        written()
    assert (tmp_path / "out" / "thesis.tex" if theirs == "folder" else tmp_path / "out").read_text() in ("mine", "theirs")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "out").mkdir()
    with atomic_folder(tmp_path / "out", {}) as temporary:
        (temporary / "x").write_text("ours")
    assert (tmp_path / "out" / "x").read_text() == "ours"


ELSEWHERE = [
    ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET)),
    FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "/data/images/scan-0007.png"),
    PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/data/rows.csv"),
    TimeoutError("timed out"),
]
DISK = [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), OSError(errno.EIO, os.strerror(errno.EIO))]


@pytest.mark.parametrize("error", ELSEWHERE + DISK, ids=repr)
def test_only_errors_of_writing_are_said_to_be(error, tmp_path, monkeypatch):
    """Of a run, and of a result folder; whatever else happens meanwhile is said as what it is, in one line."""

    def raising(*args):
        raise error

    def written():
        with atomic_folder(tmp_path / "out", {}):
            raise error

    monkeypatch.setattr(runner, "_resume_or_start", raising)
    (tmp_path / "run.toml").write_text(write_config(configuration(rounds=1)))
    line = one_line(call("run", tmp_path / "run.toml", "--out", tmp_path / "run"), 1)
    with pytest.raises(StorageError if error in DISK else type(error)) as caught:
        written()
    assert "None" not in line
    assert ("cannot write" in line) == ("cannot write" in str(caught.value)) == (error in DISK)
    if error not in DISK:
        assert error.filename is None or str(error.filename) in line
        assert str(error.strerror or error) in line


def test_a_file_of_the_run_that_cannot_be_written_names_the_run(tmp_path, monkeypatch):
    def raising(config, place, out, emit):
        raise PermissionError(errno.EACCES, "Permission denied", str(out / "rounds" / "x"))

    monkeypatch.setattr(runner, "_resume_or_start", raising)
    with pytest.raises(FedexLoraError, match=r"cannot write to .*run: Permission denied"):
        run(configuration(rounds=1), tmp_path / "run", ignore)


def test_temporaries_have_a_name_that_nobody_else_gives(tmp_path, monkeypatch):
    """What stands there under the old names is not ours, and stays."""
    seen = []
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda self, target: (seen.append(self.name), replace(self, target))[1])
    (tmp_path / ".x.toml.tmp").write_text("mine")
    write_text(tmp_path / "x.toml", "ours")
    assert [name[:-16] for name in seen] == [f"{TEMPORARY}x.toml."]
    assert (tmp_path / "x.toml").stat().st_mode == (tmp_path / ".x.toml.tmp").stat().st_mode
    assert (tmp_path / ".x.toml.tmp").read_text() == "mine"


@pytest.mark.parametrize("write", [lambda path: write_text(path, "ours"), lambda path: write_bytes(path, b"ours")])
def test_a_link_under_a_temporary_s_name_is_not_followed(write, tmp_path, monkeypatch):
    """Whatever name is drawn; and a file that cannot be written leaves none behind."""
    (tmp_path / "theirs").write_text("mine")
    (tmp_path / "out").mkdir()
    for name in (f"{TEMPORARY}x", f"{TEMPORARY}x.0"):
        (tmp_path / "out" / name).symlink_to(tmp_path / "theirs")
    write(tmp_path / "out" / "x")
    assert (tmp_path / "out" / "x").is_file()
    monkeypatch.setattr(storage.secrets, "token_hex", lambda length: "0")
    before = contents(tmp_path)
    with pytest.raises((FileExistsError, StorageError)):
        write(tmp_path / "out" / "x")
    assert contents(tmp_path) == before
    assert before["theirs"] == b"mine"
    (tmp_path / "out" / f"{TEMPORARY}x.0").unlink()
    (tmp_path / "folder").mkdir()
    with pytest.raises((IsADirectoryError, StorageError)):
        write(tmp_path / "folder")
    assert not list(tmp_path.glob(f"{TEMPORARY}*"))


def test_a_figure_and_predictions_overwrite_nothing(finished, tmp_path):
    (tmp_path / "mine.svg").write_text("mine")
    (tmp_path / "mine.pdf").symlink_to(tmp_path / "nowhere")
    for name in ("mine.svg", "mine.pdf"):
        assert f"{name} exists, and is not overwritten" in one_line(call("figure", 2, finished, "-o", tmp_path / name), 2)
        assert f"{name} exists, and is not overwritten" in one_line(call("evaluate", finished, "--predictions", tmp_path / name), 2)
    assert (tmp_path / "mine.svg").read_text() == "mine"
    assert not (tmp_path / "nowhere").exists()


def test_trackers_are_those_of_a_run_that_has_some(finished, tmp_path):
    """And a report in a run folder is ours if it says so itself."""
    out = shutil.copytree(finished, tmp_path / "run")
    fill(out, ["trackers/events.out", "report.html"])
    assert strays(out) == [out / "report.html", out / "trackers" / "events.out"]
    (out / "config.toml").write_text('trackers = ["tensorboard"]')
    assert strays(out) == [out / "report.html"]
    (out / "report.html").unlink()
    (out / "report.html").symlink_to(tmp_path / "elsewhere")
    assert strays(out) == [out / "report.html"]
    (out / "report.html").unlink()
    remove(out)


@pytest.mark.parametrize("change", [{"inputs": ["a"]}, {"inputs": [{"client": "a"}]}, {"inputs": {}}, {"round": None}, {"method": 3}])
def test_a_manifest_that_says_something_else_is_one_line(change, finished, tmp_path):
    shutil.copytree(finished / "rounds" / "0001", tmp_path / "round")
    path = tmp_path / "round" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    for read in (read_result, load_checkpoint):
        with pytest.raises(StorageError, match="is not the result of an aggregation"):
            read(tmp_path / "round")


def test_a_disk_that_is_too_full_is_said_before_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(UnwritableError, match=r"GB are free at .*: set keep_rounds"):
        run(configuration(rounds=1), tmp_path / "run", ignore)
    assert not (tmp_path / "run").exists()
    require_space(tmp_path / "not" / "yet", 1000)

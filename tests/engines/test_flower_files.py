"""`flower node`, `flower server`, `flower register` and the files that they read; what supervisors and containers start by them."""

import configparser
import datetime
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import tomllib
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import tomli_w
import yaml
from typer.testing import CliRunner

flwr = pytest.importorskip("flwr", reason="the extra flower is not installed")

from flwr.common.config import parse_config_args  # noqa: E402
from flwr.superlink.cli.flower_superlink import _parse_args_run_superlink  # noqa: E402
from flwr.supernode.cli.flower_supernode import _parse_args_run_supernode  # noqa: E402

from fedex_lora.cli import app  # noqa: E402
from fedex_lora.cli.doctor import superlink_problems  # noqa: E402
from fedex_lora.engines.flower import ENVIRONMENT, _keys, _register  # noqa: E402
from fedex_lora.engines.flower._examples import SERVER_EXAMPLE, node_example  # noqa: E402
from fedex_lora.engines.flower._files import Superlink, Supernode, node_file, server_file  # noqa: E402
from fedex_lora.engines.flower._register import connect, register_nodes  # noqa: E402
from fedex_lora.engines.flower._settings import NodeSettings, node_settings  # noqa: E402
from fedex_lora.errors import FedexLoraError, UsageError  # noqa: E402

ROOT = Path(__file__).parents[2]
PROGRAM = "/opt/fedex-lora/bin/fedex-lora"


def fedex_lora(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What `flower keys` makes: a server's folder and a node's."""
    root = tmp_path_factory.mktemp("made")
    for words in (["server", "--hosts", "federation.example.org"], ["ward", "--node", "ward-a", "--node", "ward-b"]):
        done = fedex_lora("flower", "keys", root / words[0], *words[1:])
        assert done.exit_code == 0, done.output
    for name in ("ca.crt", "server.pem"):
        shutil.copy(root / "server" / name, root / "ward")
    return root


def node(made, text, name="own"):
    """A node's file beside its keys."""
    path = made / "ward" / f"{name}.toml"
    path.write_text('superlink = "example.org:443"\nauth_supernode_private_key = "ward-a"\n' + text)
    return path


def server(made, text, name="own"):
    path = made / "server" / f"{name}.toml"
    path.write_text(text)
    return path


def parsed(command):
    """What Flower itself reads from the command line: its options, and the node's settings as the ClientApp gets them."""
    options = _parse_args_run_supernode().parse_args(command[1:])
    return options, node_settings(parse_config_args([options.node_config]))


def test_flower_reads_what_the_file_says(made):
    (made / "ward" / "rows").mkdir()
    (made / "ward" / "rows" / "my rows.csv").write_text("text,label\n")
    text = """
        root-certificates = "ca.crt"
        port = 9100
        client = "Zürich ward=a, 'new' #1"
        data = "rows"
        train = "my rows.csv"
        model = "org/base"
        state = "a\\\\b/state"
        worker = "w.sock"
        threads = 2
        max-rows = 7
        max_megabytes = 5
        trust-remote-code = true
    """
    found = node_file(node(made, text))
    assert found.problems == []
    options, settings = parsed(found.command)
    folder = made / "ward"
    assert (options.superlink, options.port, options.root_certificates) == ("example.org:443", 9100, str(folder / "ca.crt"))
    assert options.auth_supernode_private_key == str(folder / "ward-a")
    assert not options.insecure
    assert not options.runtime_dependency_install
    assert settings == NodeSettings(
        client="Zürich ward=a, 'new' #1",
        data=str(folder / "rows"),
        train="my rows.csv",
        model="org/base",
        state=str(folder / "a\\b" / "state"),
        worker=str(folder / "w.sock"),
        threads=2,
        max_rows=7,
        max_megabytes=5.0,
        trust_remote_code=True,
    )
    (folder / "org" / "base").mkdir(parents=True)  # now it is a folder, which counts before a name of the hub
    assert parsed(node_file(node(made, text)).command)[1].model == str(folder / "org" / "base")
    shutil.rmtree(folder / "org")


def test_all_problems_of_a_node_s_file_are_said_at_once(made):
    (made / "ward" / "text").write_text("")
    text = f'''
        clinet = "a"
        threads = "2"
        max-rows = -1
        rows = "all"
        port = 70000
        root_certificates = "ward-a"
        trusted_entities = "none"
        data = "nowhere"
        model = "./nowhere"
        start = "text"
        state = "text/state"
        max-megabytes = nan
        zzz = 1
        worker = "{"w" * 120}"
    '''
    path = node(made, text)
    path.write_text(path.read_text().replace("example.org:443", "https://example.org").replace('"ward-a"', '"ward-a.pub"', 1))
    done = fedex_lora("flower", "node", path)
    assert done.exit_code == 2
    lines = done.stderr.splitlines()
    assert all(line.startswith(f"error: {path}: ") for line in lines)
    words = (
        "superlink = 'https://example.org': give HOST:PORT",
        "ward-a.pub is no private key of a node",
        "unknown key clinet: did you mean client?",
        "threads = '2': give a value of kind int",
        "max_rows = -1: give a number from zero up",
        "rows = 'all': give \"own\"",
        "port = 70000: give a number from 1 to 65535",
        "ward-a holds no certificate",
        "none does not exist",
        "data: .*nowhere does not exist",
        "model: .*nowhere does not exist",
        "start: .*text is no folder",
        "state: .*text is no folder",
        "max_megabytes = nan",
        "unknown key zzz: it has superlink",
        "too long for a socket",
    )
    assert_one_each(words, lines)


def assert_one_each(words, lines):
    """Each of the expressions is found in one line, and there are no more lines."""
    assert {word: count for word in words if (count := sum(bool(re.search(word, line)) for line in lines)) != 1} == {}
    assert len(lines) == len(words)


def test_what_a_node_lacks_is_said(made):
    path = made / "ward" / "own.toml"
    for text, told in (
        ("", ["superlink is missing: add it", "auth_supernode_private_key is missing: add it"]),
        ('superlink = "a:1"\nauth_supernode_private_key = "ward-a"\ntrain = "x"\n', ["train is a file in data, which is missing: add it"]),
    ):
        path.write_text(text)
        assert node_file(path).problems == told
    dealt = node_file(node(made, 'rows = "dealt"\ndata = "few"\nmax_rows = 3\n')).problems
    assert dealt[1:] == [f'{name} says nothing beside rows = "dealt": remove one of them' for name in ("data", "max_rows")]
    assert "double quote" in node_file(node(made, "client = 'a\"b'\n")).problems[0]
    (made / "ward" / "few").mkdir()
    assert "few/x.csv does not exist" in node_file(node(made, 'data = "few"\ntrain = "x.csv"\n')).problems[0]
    path = node(made, "threads = 99999999999\nmax_megabytes = 0\n")
    path.write_text(path.read_text().replace("example.org:443", "example.org:99999"))
    problems = node_file(path).problems
    assert [any(problem.startswith(key) for problem in problems) for key in ("superlink = ", "threads = ", "max_megabytes = ")] == [
        True
    ] * 3
    path.write_text("client = ")
    for wrong, told in ((path, "is not TOML"), (made / "none.toml", "does not exist"), (made, "is a folder")):
        done = fedex_lora("flower", "node", wrong)
        assert (done.exit_code, told in done.stderr, len(done.stderr.splitlines())) == (2, True, 1), done.stderr


def test_a_certificate_that_has_expired_is_named(made, monkeypatch, tmp_path):
    past = SimpleNamespace(now=lambda zone: datetime.datetime.now(zone) - datetime.timedelta(days=_keys.DAYS + 1))
    there = SimpleNamespace(datetime=past, timedelta=datetime.timedelta, UTC=datetime.UTC)
    with monkeypatch.context() as then:
        then.setattr(_keys, "datetime", there)
        _keys.make_certificates(tmp_path, ["localhost"])
    chain = tmp_path / "chain.crt"
    chain.write_bytes((tmp_path / "server.pem").read_bytes() + (made / "server" / "ca.crt").read_bytes())
    tls = f'ssl_certfile = "{chain}"\n'
    assert any("chain.crt expired on" in problem for problem in server_file(server(made, tls)).problems)
    assert "ca.crt expired on" in node_file(node(made, f'root_certificates = "{tmp_path / "ca.crt"}"\n')).problems[0]


def test_the_server_is_safe_and_its_problems_are_said(made):
    found = server_file(made / "server" / "server.toml")
    assert found.problems == []
    assert superlink_problems(found.command) == []
    assert found.command[0] == "flower-superlink"
    given = _parse_args_run_superlink().parse_args(found.command[1:])
    assert (given.host, given.port, given.insecure, given.enable_supernode_auth) == ("127.0.0.1", 8000, False, True)
    files = [str(made / "server" / name) for name in ("ca.crt", "server.pem", "server.key")]
    assert [given.ssl_ca_certfile, given.ssl_certfile, given.ssl_keyfile] == files
    tls = 'ssl_ca_certfile = "ca.crt"\nssl_certfile = "server.pem"\nssl_keyfile = "server.key"\n'
    public = made / "ward" / "ward-a.pub"
    nodes = f'[nodes]\na = "{public}"\nb = "{public}"\nc = "ca.crt"\nd = "no"'
    wrong = server(made, f'{tls.replace("server.key", "ca.crt")}database = "x"\nport = true\n{nodes}')
    words = [
        "ca.crt is no private key",
        "unknown key database",
        "port = True",
        "a and b have the same key",
        "c: .*no public key",
        "d: .*/no does",
    ]
    assert_one_each(words, fedex_lora("flower", "server", wrong).stderr.splitlines())
    assert server_file(server(made, 'nodes = ["a"]')).problems[-1].startswith("nodes: write a table")
    assert [problem.split()[0] for problem in server_file(server(made, "")).problems] == ["ssl_ca_certfile", "ssl_certfile", "ssl_keyfile"]
    open_ = server_file(server(made, f'{tls}host = "192.0.2.1"'))
    assert ["server.pem is not for 192.0.2.1" in problem for problem in open_.problems] == [True]  # else its own processes do not trust it
    assert "listens on 192.0.2.1" in superlink_problems(open_.command)[0]


def test_files_of_the_server_that_do_not_go_together_are_named(made, tmp_path):
    """Its certificate may have a chain behind it, and the authority's own."""
    _keys.make_certificates(tmp_path, ["127.0.0.1"])
    tls = {"ssl_ca_certfile": "ca.crt", "ssl_certfile": "server.pem", "ssl_keyfile": "server.key"}

    def problems(**changes):
        return server_file(server(made, tomli_w.dumps(tls | {name: str(tmp_path / file) for name, file in changes.items()}))).problems

    assert_one_each(["ssl_keyfile: .*/server.key is not the key of .*/server.pem: give"], problems(ssl_keyfile="server.key"))
    assert_one_each(["ssl_ca_certfile: .*/ca.crt did not sign .*/server.pem: give"], problems(ssl_ca_certfile="ca.crt"))
    assert len(problems(ssl_certfile="server.pem")) == 2
    chain = tmp_path / "chain.pem"
    for behind in ("server/ca.crt", "ward/ca.crt"):
        chain.write_bytes((made / "server" / "server.pem").read_bytes() + (made / behind).read_bytes())
        assert problems(ssl_certfile="chain.pem") == []
    assert problems(ssl_certfile="chain.pem", ssl_ca_certfile="chain.pem") == []  # a certificate of itself


def test_show_prints_what_a_shell_understands_and_starts_nothing(made, monkeypatch):
    monkeypatch.setattr(os, "execvpe", lambda *given: pytest.fail("started"))
    for kind, path in (("node", made / "ward" / "ward-a.toml"), ("server", made / "server" / "server.toml")):
        done = fedex_lora("flower", kind, path, "--show")
        assert done.exit_code == 0, done.stderr
        found = {"node": node_file, "server": server_file}[kind](path)
        assert shlex.split(done.stdout) == [*(f"{name}={value}" for name, value in ENVIRONMENT.items()), *found.command]


def test_the_process_becomes_flower_s(made, tmp_path):
    """With the words of the file, in the same process, telling nobody; the program is looked for beside the interpreter first."""
    bin = tmp_path / "bin"
    bin.mkdir()
    (bin / "python").symlink_to(sys.executable)
    program = bin / "flower-supernode"
    program.write_text('#!/bin/sh\necho $$ "$FLWR_TELEMETRY_ENABLED" "$FLWR_DISABLE_UPDATE_CHECK" "$2"\nexit 7\n')
    program.chmod(0o755)
    code = f"import sys; sys.executable = {str(bin / 'python')!r}; from fedex_lora.cli import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "flower", "node", node(made, "")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    out, err = process.communicate(timeout=60)
    assert out.split() == [str(process.pid), "0", "1", "example.org:443"]
    assert process.returncode == 7
    assert "party.log" in err
    assert "demo only" in err


def settable(text):
    """The keys of an example's lines, commented out or not, with their values."""
    lines = [line.removeprefix("# ") for line in text.splitlines() if re.match(r"(# )?\w+ = ", line)]
    return tomllib.loads("\n".join(lines))


def test_examples_have_every_key_and_defaults_that_are_the_code_s():
    known = {field.name for kind in (Supernode, NodeSettings) for field in fields(kind)} - {"rows"}
    example = settable(node_example("ward-a"))
    assert example.keys() == known, "engines/flower/_examples.py"
    assert {name: example[name] for name in ("port", "trust_remote_code")} == {"port": Supernode.port, "trust_remote_code": False}
    assert settable(SERVER_EXAMPLE.partition("[nodes]")[0]).keys() == {field.name for field in fields(Superlink)}
    page = (ROOT / "docs" / "deployment.md").read_text()
    assert f"```toml\n{node_example('ward-a')}```" in page
    assert f"```toml\n{SERVER_EXAMPLE}```" in page


def test_keys_takes_no_file_s_place(tmp_path):
    (tmp_path / "a.toml").write_text("mine")
    for words, told in (
        (["--node", "a"], "a.toml exists"),
        (["--node", "server"], "none of ca.crt"),
        (["--node", "ca.crt"], "none of"),
        (["--node", "x.pub", "--node", "x"], "no other party's"),
    ):
        done = fedex_lora("flower", "keys", tmp_path, *words)
        assert (done.exit_code, told in done.stderr) == (2, True), done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a.toml"]


def test_flower_s_own_configuration_is_added_to_and_never_changed(tmp_path):
    path = tmp_path / "config.toml"
    connect(path, "127.0.0.1:8000", "/ca.crt")
    wanted = {"address": "127.0.0.1:8000", "root-certificates": "/ca.crt"}
    assert tomllib.loads(path.read_text()) == {"superlink": {"default": "federation", "federation": wanted}}
    before = '# mine\n[superlink]\ndefault = "other"\n[superlink.other]\naddress = "x:1"\n'
    path.write_text(before)
    for _ in range(2):
        connect(path, "127.0.0.1:8000", "/ca.crt")
    assert path.read_text().startswith(before)
    assert tomllib.loads(path.read_text())["superlink"]["federation"] == wanted
    text = path.read_text()
    with pytest.raises(UsageError, match=r"another server as federation, 127\.0\.0\.1:8000"):
        connect(path, "127.0.0.1:8001", "/ca.crt")
    assert path.read_text() == text
    path.unlink()
    for before in ('superlink = "x"', 'superlink = {default = "x"}', '[superlink]\nfederation = "x"', "bad["):
        path.write_text(before)
        with pytest.raises(UsageError, match=r"config\.toml"):
            connect(path, "127.0.0.1:8000", "/ca.crt")
        assert path.read_text() == before


def test_flower_s_configuration_stays_a_link_that_others_may_not_read(tmp_path):
    connect(tmp_path / "new.toml", "127.0.0.1:8000", "/ca.crt")
    real, path = tmp_path / "real.toml", tmp_path / "config.toml"
    real.write_text("# mine")
    real.chmod(0o640)
    path.symlink_to(real)
    connect(path, "127.0.0.1:8000", "/ca.crt")
    assert path.is_symlink()
    assert [file.stat().st_mode & 0o777 for file in (tmp_path / "new.toml", real)] == [0o600, 0o640]
    assert tomllib.loads(real.read_text()) == tomllib.loads((tmp_path / "new.toml").read_text())


def test_register_runs_flower_s_command_for_each_node(made, tmp_path, monkeypatch):
    """By a `flwr` that writes down what it is asked, knows the second key already, and lists three nodes."""
    fake = tmp_path / "flwr"
    known = 'case "$*" in *ward-b*) echo "Error: Public key already in use." >&2; exit 1;; *list*)'
    known += """ for id in 1 2 3; do echo '"node-id": 1,'; done;; esac"""
    fake.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n{known}\n')
    fake.chmod(0o755)
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(_register, "flower_environment", lambda: {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"})
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    names = "".join(f'ward-{name} = "../ward/ward-{name}.pub"\n' for name in "ab")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=listener.accept, daemon=True).start()
        port = listener.getsockname()[1]
        path = server(made, SERVER_EXAMPLE.replace("8000", str(port)) + names)
        lines = []
        register_nodes(server_file(path), lines.append)
    folder = made / "ward"
    asked = [f"supernode register {folder}/ward-{name}.pub federation --name ward-{name}" for name in "ab"]
    assert (tmp_path / "asked").read_text().splitlines() == [*asked, "supernode list federation --format json"]
    assert lines[0] == f"flwr {asked[0]}"
    assert lines[1].startswith("ward-b: its key is registered already, under the name that it had then; for another name start the SuperL")
    assert lines[2:] == ["! the SuperLink lets in 1 more than the file names: to shut them out start the SuperLink anew"]
    with pytest.raises(FedexLoraError, match="no SuperLink listens"):
        register_nodes(server_file(path), lines.append, patience=0.1)


def units():
    return sorted((ROOT / "deploy").glob("*.service"))


def started():
    """(where, words) of each `fedex-lora` that a unit or a container starts."""
    for path in units():
        unit = configparser.ConfigParser(interpolation=None)
        unit.optionxform = str
        unit.read(path)
        yield from ((path.name, shlex.split(unit["Service"][key])) for key in ("ExecStart", "ExecStartPost") if key in unit["Service"])
    for path in sorted((ROOT / "deploy").glob("compose*.yaml")):
        services = yaml.safe_load(path.read_text())["services"]
        yield from ((path.name, service["command"]) for service in services.values() if "command" in service)


def test_units_and_containers_start_what_the_command_line_has(made):
    """Each `fedex-lora flower COMMAND FILE`, tried on the file of this name that `flower keys` makes."""
    seen = []
    for where, (program, group, command, file) in started():
        assert (program, group) == (PROGRAM if where.endswith(".service") else "fedex-lora", "flower"), where
        name = file.removeprefix("/etc/fedex-lora/").replace("%i", "ward-a")
        path = made / ("ward" if command == "node" else "server") / name
        done = fedex_lora(group, command, *(["--help"] if command == "register" else [path, "--show"]))
        assert done.exit_code == 0, (where, done.output)
        seen.append((where.partition(".")[0], command))
    units = [("fedex-lora-node@", "node"), ("fedex-lora-server", "server"), ("fedex-lora-server", "register")]
    assert sorted(seen) == sorted([*units, ("compose", "node"), ("compose", "server")])


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
@pytest.mark.parametrize("path", units(), ids=lambda path: path.name)
def test_systemd_finds_nothing_wrong_with_a_unit(path, tmp_path):
    def complaints(text):
        unit = tmp_path / path.name.replace("@", "@ward-a")
        unit.write_text(text.replace(PROGRAM, shutil.which("true")))
        done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
        return [line for line in (done.stdout + done.stderr).splitlines() if path.stem.rstrip("@") in line]

    text = path.read_text()
    assert complaints(text) == []
    assert complaints(text.replace("ProtectHome", "ProtektHome"))  # the check can fail


def test_units_give_flower_its_minute_and_their_user_no_more_than_a_folder():
    for path in units():
        unit = configparser.ConfigParser(interpolation=None)
        unit.optionxform = str
        unit.read(path)
        service = unit["Service"]
        assert (service["Restart"], service["RestartPreventExitStatus"], service["ProtectSystem"]) == ("on-failure", "2", "strict")
        assert (service["User"], service["StateDirectory"], service["Environment"]) == ("fedex-lora", "fedex-lora", "HOME=%S/fedex-lora")
        assert "@" not in path.name or float(service["RestartSec"]) > 60

"""`flower node FILE.toml` and `flower server FILE.toml`: one file each in place of a long command line of Flower."""

import datetime
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import tomli_w
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_ssh_private_key, load_ssh_public_key

from fedex_lora.config import located, nearest
from fedex_lora.config.reading import toml_tree
from fedex_lora.engines.flower import ENVIRONMENT
from fedex_lora.engines.flower._keys import mismatches
from fedex_lora.engines.flower._settings import NodeSettings, node_settings, read_settings
from fedex_lora.errors import ConfigError, FedexLoraError
from fedex_lora.privacy.ledger import read_ledger

SAFE = ("--enable-supernode-auth", "--disable-runtime-dependency-installation")  # without: any node joins, runs fetch packages


@dataclass(frozen=True)
class Supernode:
    """The options of `flower-supernode` that a node's file may give, under Flower's names.

    Attributes:
        superlink: the server's address, HOST:PORT.
        root_certificates: the certificate by which it is trusted; unset: a public authority's.
        auth_supernode_private_key: this node's key.
        trusted_entities: whose signed apps this node runs, and no others.
        port: of this machine only; nodes that share a machine need one each.
    """

    superlink: str = ""
    root_certificates: str = ""
    auth_supernode_private_key: str = ""
    trusted_entities: str = ""
    port: int = 9094


@dataclass(frozen=True)
class Superlink:
    """The options of `flower-superlink` that a server's file may give, under Flower's names.

    Attributes:
        host: where it listens; whoever reaches it there can submit code to every node.
        port: there.
        ssl_ca_certfile: the authority's certificate, which the parties have, too.
        ssl_certfile: the server's certificate.
        ssl_keyfile: the key of it.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    ssl_ca_certfile: str = ""
    ssl_certfile: str = ""
    ssl_keyfile: str = ""


@dataclass(frozen=True)
class Startable:
    """What a file says to start.

    Attributes:
        command: the command line of Flower.
        problems: what is wrong with the file, a line each; with any, the command is not to be started.
        given: the values of the file by their names, with absolute paths.
        nodes: of a server's file: party -> the file of its public key.
    """

    command: list[str]
    problems: list[str]
    given: Mapping[str, Any]
    nodes: Mapping[str, Path] = field(default_factory=dict)


def node_file(path: Path) -> Startable:
    """The command line of a node's file.

    Raises:
        ConfigError: it is not there, or is not TOML.
    """
    tree = toml_tree(path)
    given, problems = _read(tree, path.absolute().parent, Supernode, NodeSettings)
    problems += [f"{name} is missing: add it" for name in ("superlink", "auth_supernode_private_key") if not given.get(name)]
    address = str(given.get("superlink", ""))
    if address and not (re.fullmatch(r"([\w.-]+|\[[0-9a-fA-F:]+\]):\d{1,5}", address) and 0 < int(address.rpartition(":")[2]) < 2**16):
        problems.append(f"superlink = {address!r}: give HOST:PORT, such as federation.example.org:443")
    if given.get("train") and not given.get("data"):
        problems.append("train is a file in data, which is missing: add it")
    elif given.get("train") and Path(given["data"]).is_dir() and (fault := _file(Path(given["data"], given["train"]))):
        problems.append(f"train: {fault}")
    if not 0 <= given.get("threads", 0) <= 1024:
        problems.append(f"threads = {given['threads']}: give a number from 1 to 1024, or leave it out")
    if not given.get("max_megabytes", 1) > 0:
        problems.append(f"max_megabytes = {given['max_megabytes']}: every message would be refused: raise it, or leave it out")
    about = {name: value for name, value in given.items() if name in _names(NodeSettings)}
    problems += NodeSettings(**about).private_problems({key for key, value in tree.items() if value != ""})
    if given.get("rows") == "dealt":
        problems += [f'{name} says nothing beside rows = "dealt": remove one of them' for name in ("data", "max_rows") if given.get(name)]
    problems += [f"{name} = {value!r}: Flower cannot take a double quote" for name, value in about.items() if '"' in str(value)]
    return Startable(["flower-supernode", *_options(given, Supernode), "--node-config", node_words(about)], problems, given)


def server_file(path: Path) -> Startable:
    """The command line of a server's file, and the nodes that it names.

    Raises:
        ConfigError: it is not there, or is not TOML.
    """
    tree, folder = toml_tree(path), path.absolute().parent
    named = tree.pop("nodes", {})
    given, problems = _read(tree, folder, Superlink)
    given = {"host": Superlink.host, "port": Superlink.port, **given}
    problems += [f"{name} is missing: add it" for name in _names(Superlink) if name.startswith("ssl_") and not given.get(name)]
    host, tls = own_host(given["host"]), {name: Path(value) for name, value in given.items() if name.startswith("ssl_")}
    sound = {name: path for name, path in tls.items() if not CHECKS[name](path)}
    problems += mismatches(**sound) if len(sound) == 3 else []
    if (certificate := sound.get("ssl_certfile")) and host not in _hosts(certificate):
        problems.append(f"ssl_certfile: {certificate} is not for {host}, where Flower's own processes reach it (see flower keys)")
    if not isinstance(named, dict) or not all(isinstance(file, str) for file in named.values()):
        problems.append('nodes: write a table [nodes] with lines such as ward-a = "ward-a.pub"')
        named = {}
    nodes = {name: _absolute(file, folder) for name, file in named.items()}
    public = partial(_key, what="public key of a node", load=load_ssh_public_key, kind=EllipticCurvePublicKey)
    faults = {name: fault for name, key in nodes.items() if (fault := public(key))}
    problems += [f"nodes.{name}: {fault}" for name, fault in faults.items()]
    keys = {name: key.read_bytes().split()[1] for name, key in nodes.items() if name not in faults}
    twice = [name for name, key in keys.items() if Counter(keys.values())[key] > 1]
    problems += [f"nodes: {' and '.join(twice)} have the same key: each party makes its own"] if twice else []
    return Startable(["flower-superlink", *_options(given, Superlink), *SAFE], problems, given, nodes)


def own_host(host: str) -> str:
    """Where a SuperLink's own machine reaches it.

    >>> own_host("0.0.0.0"), own_host("192.0.2.1")
    ('127.0.0.1', '192.0.2.1')
    """
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


def node_words(settings: Mapping[str, Any]) -> str:
    """A node config as `flower-supernode --node-config` takes it.

    >>> node_words({"client": "ward-a", "threads": 2})
    'client="ward-a" threads=2'
    """
    return " ".join(f"{name}={tomli_w.dumps({'v': value})[4:-1]}" for name, value in settings.items())


def flower_environment() -> dict[str, str]:
    """Of every process of Flower: nothing is told to anybody outside the federation, and our interpreter's commands come first."""
    return {**os.environ, **ENVIRONMENT, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])}


def _read(tree: Mapping[str, Any], folder: Path, *kinds: type) -> tuple[dict[str, Any], list[str]]:
    """(name -> value, problems) of a file whose keys are these records' fields; paths are made absolute, and looked at."""
    given: dict[str, Any] = {}
    problems = []
    known = {name: kind for kind in kinds for name in _names(kind)}
    for key, value in tree.items():
        name = key.replace("-", "_")
        if name not in known:
            near = nearest(name, list(known))
            problems.append(f"unknown key {key}: " + (f"did you mean {near}?" if near else f"it has {', '.join(known)}"))
            continue
        try:
            kind = known[name]
            read = node_settings({name: value}) if kind is NodeSettings else read_settings(kind(), {name: value}, "option")
            given[name] = value = getattr(read, name)
            if name == "trainer" and value:
                given[name] = located(value, [folder])
        except ConfigError as error:
            problems.append(str(error))
            continue
        if name == "port" and not 0 < value < 2**16:
            problems.append(f"port = {value}: give a number from 1 to 65535")
        if value and name in CHECKS and not (name == "model" and _of_the_hub(value, folder)):
            given[name] = str(_absolute(value, folder))
            problems += [f"{name}: {fault}"] if (fault := CHECKS[name](Path(given[name]))) else []
    return {name: value for name, value in given.items() if value != ""}, problems


def _names(kind: type) -> list[str]:
    return [one.name for one in fields(kind)]


def _options(given: Mapping[str, Any], kind: type) -> list[str]:
    return [word for name in _names(kind) if name in given for word in (f"--{name.replace('_', '-')}", str(given[name]))]


def _absolute(value: str, folder: Path) -> Path:
    return Path(os.path.abspath(folder / os.path.expanduser(value)))


def _of_the_hub(model: str, folder: Path) -> bool:
    return not model.startswith((".", "/", "~")) and not (folder / model).exists()


def _file(path: Path, folder: bool = False) -> str:
    if not path.exists():
        return f"{path} does not exist"
    if not (path.is_dir() if folder else path.is_file()):
        return f"{path} is no {'folder' if folder else 'file'}"
    return "" if os.access(path, os.R_OK | os.X_OK * folder) else f"this user cannot read {path}"


_folder = partial(_file, folder=True)


def _state(path: Path) -> str:
    there = next(place for place in (path, *path.parents) if place.exists())
    if not there.is_dir():
        return f"{there} is no folder"
    return "" if os.access(there, os.W_OK | os.X_OK) else f"this user cannot write to {there}"


def _ledger(path: Path) -> str:
    try:
        read_ledger(path)
    except FedexLoraError as error:
        return str(error)
    return "" if os.access(path, os.W_OK) else f"this user cannot write to {path}"


def _certificate(path: Path, own: bool = False) -> str:
    """Expired if all are; of a server's own file if the first is, for those behind it are of who signed it."""
    if fault := _file(path):
        return fault
    try:
        ends = max(one.not_valid_after_utc for one in x509.load_pem_x509_certificates(path.read_bytes())[: 1 if own else None])
    except ValueError:
        return f"{path} holds no certificate (fedex-lora flower keys makes them)"
    return "" if ends > datetime.datetime.now(datetime.UTC) else f"the certificate {path} expired on {ends:%Y-%m-%d}"


def _hosts(certificate: Path) -> list[str]:
    """The names and addresses that a server's certificate is for."""
    one = x509.load_pem_x509_certificate(certificate.read_bytes())
    try:
        names = one.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return [*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))]


def _key(path: Path, what: str, load: Callable[[bytes], object], kind: type = object) -> str:
    if fault := _file(path):
        return fault
    try:
        fits = isinstance(load(path.read_bytes()), kind)
    except (ValueError, TypeError, UnsupportedAlgorithm):  # TypeError: it has a password
        fits = False
    return "" if fits else f"{path} is no {what} (fedex-lora flower keys makes them)"


CHECKS: dict[str, Callable[[Path], str]] = {
    "root_certificates": _certificate,
    "auth_supernode_private_key": partial(
        _key, what="private key of a node", load=partial(load_ssh_private_key, password=None), kind=EllipticCurvePrivateKey
    ),
    "trusted_entities": _file,
    "ssl_ca_certfile": _certificate,
    "ssl_certfile": partial(_certificate, own=True),
    "ssl_keyfile": partial(_key, what="private key without a password", load=partial(load_pem_private_key, password=None)),
    "data": _folder,
    "model": _folder,
    "start": _folder,
    "state": _state,
    "ledger": _ledger,
    "worker": lambda path: "" if len(os.fsencode(path)) < 100 else f"{path} is too long for a socket: give less than 100 characters",
}  # what is a path -> what is wrong with it, or nothing

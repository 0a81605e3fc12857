"""A real deployment on this machine: the same bits as in process, whatever dies, and exactness all the way."""

import os
import signal
from contextlib import contextmanager, suppress
from unittest import mock

import psutil
import pytest
import torch
from tests.engines.flower.conftest import CLIENTS, COLD, PATIENCE, configuration, events, wait_for

from fedex_lora.engines.flower._keys import make_certificates, make_node_key
from fedex_lora.engines.flower._local import LocalDeployment
from fedex_lora.engines.flower._trial import bytes_sent, differing
from fedex_lora.engines.flower.app_folder import write_app
from fedex_lora.offline.verify import verify
from fedex_lora.storage.tensors import load_tensors

QUORUM = {"quorum": 0.6}
MOMENTUM = {"momentum": 0.5}
LOG = {"catch_up": "log"}  # who was away adds the past gains one by one: the server's bits; a recompressed sum is within 1e-7 only


@contextmanager
def local_simulation(folder):
    """A SuperLink that simulates nodes by Ray; stopped at the end."""
    simulation = LocalDeployment(folder)
    try:
        simulation.connect("insecure = true")
        with mock.patch.dict(os.environ, RAY_worker_niceness="0"):  # else its actors wait for whatever else runs here
            simulation.start_superlink("--simulation", "--insecure")
        yield simulation
    finally:
        simulation.stop_all()


def exact(out):
    return all(event["exactness_error"] < 1e-6 for event in events(out, "round_done")) and verify(out)["max_relative_error"] < 1e-6


def base_of(path):
    return {name: tensor for name, tensor in load_tensors(path)[0].items() if name.startswith(("base|", "adapter|"))}


def words(process):
    """A process's command line; "" for one that has just ended."""
    with suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def same_copies(federation, out, clients=CLIENTS):
    """The clients' own copies of base delta and adapter, from their files, are the same bits."""
    copies = [base_of(federation.memory(client, out)) for client in clients]
    assert copies[0]
    assert any(name.startswith("base|") for name in copies[0])
    return all(copy.keys() == copies[0].keys() and all(torch.equal(copy[n], t) for n, t in copies[0].items()) for copy in copies)


def test_the_same_bits_in_process_in_simulation_and_deployed_and_the_same_bytes(cold_federation, tmp_path):
    federation, config = cold_federation, configuration()
    deployed, status = federation.finish(config, "contract")
    assert differing(federation.reference(config), deployed) == []
    assert exact(deployed)
    assert same_copies(federation, deployed)
    counted = bytes_sent(deployed, status)
    ours, theirs = (counted[f"{whose}bytes_down"] + counted[f"{whose}bytes_up"] for whose in ("", "flower_"))
    assert theirs == pytest.approx(ours, rel=0.03), counted
    write_app(tmp_path / "app", config, str(tmp_path / "run"), [])
    nodes = ["--federation-config", "num-supernodes=3 client-resources-num-cpus=1"]
    with local_simulation(tmp_path) as simulation:
        simulation.finish(simulation.submit(tmp_path / "app", *nodes), PATIENCE)
    assert differing(deployed, tmp_path / "run") == []
    other = configuration(training={"learning_rate": 1e-3})
    assert differing(federation.reference(other), deployed)  # the comparison can fail


def test_a_node_killed_while_training_returns_and_equals_the_others(cold_federation):
    """It is killed for good in round 1, which goes on at quorum; from its return on it takes part. The server has momentum."""
    federation, config = cold_federation, configuration(4, clients=QUORUM, messages=LOG, server=MOMENTUM)
    before = federation.deployment.log(COLD).count("Start `flwr-clientapp`")
    _, out = federation.submit(config, "killed")
    wait_for(lambda: federation.deployment.log(COLD).count("Start `flwr-clientapp`") > before)
    federation.deployment.stop(COLD, signal.SIGKILL)
    wait_for(lambda: events(out, "round_done"))
    assert [event["client"] for event in events(out, "rejected")] == [COLD]
    federation.restart(COLD)
    wait_for(lambda: events(out, "run_done"))
    assert {event["client"] for event in events(out, "client_done") if event["round"] == 4} == set(CLIENTS)
    assert exact(out)
    assert same_copies(federation, out)


def test_all_nodes_gone_and_back_end_in_the_same_bits(federation):
    """Nobody is left: the round waits, asks again, and nothing of the result shows that."""
    config = configuration(2, clients={"below_quorum": "wait"})
    _, out = federation.submit(config, "below")
    wait_for(lambda: events(out, "client_done"))
    for client in CLIENTS:
        federation.deployment.stop(client, signal.SIGKILL)
    wait_for(lambda: any("reason" in event for event in events(out, "waiting")))
    for client in CLIENTS:
        federation.restart(client)
    wait_for(lambda: events(out, "run_done"))
    assert differing(federation.reference(configuration()), out) == []


def test_a_server_app_killed_and_started_again_ends_in_the_same_bits(federation):
    config = configuration(3, server=MOMENTUM)
    _, out = federation.submit(config, "resumed")
    wait_for(lambda: len(events(out, "client_done")) >= 4)
    apps = [process for process in federation.deployment.family("superlink") if "flwr-serverapp" in words(process)]
    assert len(apps) == 1
    apps[0].kill()
    federation.finish(config, "resumed")
    assert len(events(out, "resumed")) == 1
    assert differing(federation.reference(config), out) == []
    assert same_copies(federation, out)


def test_a_client_that_lost_its_folder_asks_for_what_it_lacks(federation):
    config = configuration(3, clients={"below_quorum": "wait"}, server=MOMENTUM)
    _, out = federation.submit(config, "wiped")
    wait_for(lambda: any((event["client"], event["round"]) == ("skin", 2) for event in events(out, "client_done")))
    federation.memory("skin", out).unlink()
    wait_for(lambda: events(out, "run_done"))
    assert [(event["round"], event["client"]) for event in events(out, "warning")] == [(3, "skin")]
    assert events(out, "rejected") == []
    assert differing(federation.reference(configuration(3, server=MOMENTUM)), out) == []  # every round had everyone after all
    assert same_copies(federation, out)


ROGUE = """
import os
from pathlib import Path

from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp

from fedex_lora.engines.flower._messages import to_record
from fedex_lora.engines.flower.client import client_app

honest = client_app(Path(__file__).with_name("config.toml"))
app = ClientApp()


@app.train()
def train(message, context):
    round = message.metadata.group_id if context.node_config["client"] == "skin" else ""
    if round == "1":
        return 1 / 0
    if round == "2":
        return Message(to_record(os.urandom(70_000), {}), reply_to=message)
    if round == "3":
        return Message(RecordDict(), reply_to=message)
    return honest(message, context)
"""


def test_a_client_that_raises_or_answers_garbage_is_refused_and_may_come_back(federation):
    config = configuration(4, clients=QUORUM, messages=LOG)
    out, _ = federation.finish(config, "rogue", lambda folder: (folder / "federation" / "client_app.py").write_text(ROGUE))
    refused = events(out, "rejected")
    assert [(event["round"], event["client"]) for event in refused] == [(1, "skin"), (2, "skin"), (3, "skin")]
    assert "outside of fedex-lora" in refused[0]["reason"]
    assert not any("division" in event["reason"] for event in refused)
    assert "not of this protocol" in refused[2]["reason"]
    assert {event["client"] for event in events(out, "client_done") if event["round"] == 4} == set(CLIENTS)
    assert exact(out)
    assert same_copies(federation, out)


def test_strangers_are_not_let_in(federation, tmp_path):
    """A key that nobody registered; and a node that does not trust the certificate."""
    deployment = federation.deployment
    make_node_key(deployment.folder / "keys" / "stranger")
    make_certificates(tmp_path, ["localhost", "127.0.0.1"])
    deployment.start_node("stranger")
    deployment.start_node(
        "elsewhere", root_certificates=str(tmp_path / "ca.crt"), auth_supernode_private_key=str(deployment.folder / "keys" / COLD)
    )
    try:
        wait_for(lambda: "PermissionDenied" in deployment.log("stranger") or deployment.processes["stranger"].poll() is not None)
        wait_for(lambda: "CERTIFICATE_VERIFY_FAILED" in deployment.log("elsewhere"))
        assert "SuperNode ID" not in deployment.log("stranger") + deployment.log("elsewhere")
    finally:
        deployment.stop("stranger")
        deployment.stop("elsewhere")


def test_a_superlink_killed_and_started_anew(federation):
    """It forgets runs and keys; the run folder and the clients' do not."""
    config = configuration(3)
    deployment, (_, out) = federation.deployment, federation.submit(config, "superlink")
    wait_for(lambda: len(events(out, "client_done")) >= 4)
    for name in ("superlink", *CLIENTS):
        deployment.stop(name, signal.SIGKILL)
    deployment.start_superlink()
    for client in CLIENTS:
        deployment.register(client)
        deployment.start_node(client)
    federation.finish(config, "superlink")
    assert len(events(out, "resumed")) == 1
    assert differing(federation.reference(config), out) == []

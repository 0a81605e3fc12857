"""docs/join-transports.md over Flower: the script of examples/join on a real deployment ends in the bits of one process."""

import shutil

import pytest
from tests.engines.flower.conftest import wait_for

pytest.importorskip("trl", reason="the extra trl is not installed")

from tests.engines.test_join import JOIN, digest, one_process  # noqa: F401

from fedex_lora.engines.flower._local import ENDED


def test_a_trl_script_over_a_deployment(federation, one_process, tmp_path):  # noqa: F811
    """`flwr run` of the folder: TLS, registered nodes that are called as the parties, a process for every message."""
    app, out = tmp_path / "join", federation.root / "join"
    shutil.copytree(JOIN, app)
    run = federation.deployment.submit(app, "--run-config", f'out="{out}"')
    wait_for(lambda: federation.deployment.is_over(run), pause=1)
    wait_for(lambda: federation.deployment.run_status(run)["status"] in ENDED, pause=3)
    assert federation.deployment.run_status(run)["status"] == ENDED[0], federation.deployment.log("superlink")[-3000:]
    assert digest(out) == digest(one_process)

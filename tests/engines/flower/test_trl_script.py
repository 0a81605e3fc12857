"""docs/join-transports.md over Flower: the script of examples/join on a real deployment ends in the bits of one process."""

import shutil

import pytest
from tests.engines.flower.conftest import PATIENCE

pytest.importorskip("trl", reason="the extra trl is not installed")

from tests.engines.test_join import JOIN, digest, one_process  # noqa: F401


def test_a_trl_script_over_a_deployment(federation, one_process, tmp_path):  # noqa: F811
    """`flwr run` of the folder: TLS, registered nodes that are called as the parties, a process for every message."""
    app, out = tmp_path / "join", federation.root / "join"
    shutil.copytree(JOIN, app)
    run = federation.deployment.submit(app, "--run-config", f'out="{out}"')
    federation.deployment.finish(run, PATIENCE)
    assert digest(out) == digest(one_process)

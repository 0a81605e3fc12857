"""deploy/nginx.conf in front of the SuperLink: nodes get through, runs do not."""

import shutil
import socket
import ssl
import subprocess
import time
from pathlib import Path

import pytest
from tests.engines.flower.conftest import configuration, events, wait_for

from fedex_lora.engines.flower._local import CONNECTION, free_port
from fedex_lora.errors import FedexLoraError

CONF = Path(__file__).parents[3] / "deploy" / "nginx.conf"
NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
AROUND = """
pid {0}/nginx.pid;
error_log {0}/error.log;
events {{}}
http {{
    access_log {0}/access.log;
    {1}
    include {0}/server.conf;
}}
"""


@pytest.fixture
def proxy(federation, tmp_path):
    """nginx with the file as it is, but for port, addresses and places."""
    if NGINX is None:
        pytest.skip("nginx is not installed: apt-get install nginx-light")
    deployment, port = federation.deployment, free_port()
    text = CONF.read_text()
    for old, new in (
        ("listen 443 ssl", f"listen 127.0.0.1:{port} ssl"),
        ("127.0.0.1:8000", f"127.0.0.1:{deployment.port}"),
        ("federation.example.org", "localhost"),
        ("/etc/fedex-lora", str(deployment.folder / "keys")),
    ):
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "server.conf").write_text(text)
    places = " ".join(f"{kind}_temp_path {tmp_path}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    (tmp_path / "nginx.conf").write_text(AROUND.format(tmp_path, places))
    process = subprocess.Popen([NGINX, "-p", str(tmp_path), "-c", str(tmp_path / "nginx.conf"), "-g", "daemon off;"])
    try:
        end = time.monotonic() + 30
        while socket.socket().connect_ex(("127.0.0.1", port)):
            assert process.poll() is None, (tmp_path / "error.log").read_text()
            assert time.monotonic() < end
            time.sleep(0.1)
        yield port, tmp_path
    finally:
        process.terminate()
        process.wait(30)


def status(port, ca, path, length=0):
    """What is answered to a request for exactly this path, which says that so many bytes follow."""
    plain = socket.create_connection(("127.0.0.1", port), 30)
    with ssl.create_default_context(cafile=str(ca)).wrap_socket(plain, server_hostname="localhost") as stream:
        stream.sendall(f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n".encode())
        return int(stream.recv(4096).split()[1])


def test_a_node_behind_nginx_takes_part_and_a_run_cannot_be_submitted_there(federation, proxy):
    port, folder = proxy
    deployment = federation.deployment
    deployment.stop("skin")
    deployment.start_node("skin", superlink=f"127.0.0.1:{port}")
    try:
        wait_for(lambda: "SuperNode ID" in deployment.log("skin").rsplit("Starting Flower SuperNode", 1)[-1])
        _, out = federation.submit(configuration(1), "proxied")
        wait_for(lambda: events(out, "run_done"))
        assert "skin" in {event["client"] for event in events(out, "client_done")}
        assert "/v1/fleet/push-object" in (folder / "access.log").read_text()
        home = deployment.folder / "flwr" / "config.toml"
        direct = home.read_text()
        try:
            home.write_text(direct.replace(f"127.0.0.1:{deployment.port}", f"127.0.0.1:{port}"))
            with pytest.raises(FedexLoraError, match="flwr run failed"):
                federation.submit(configuration(1), "through-the-door")
        finally:
            home.write_text(direct)
        assert '"POST /v1/control/start-run HTTP/1.1" 403' in (folder / "access.log").read_text()
        assert not (federation.root / "through-the-door").exists()
        for path in (
            "/v1/control/list-runs%3f/../../fleet/x",
            "//v1//control/list-runs",
            "/v1/fleet/../control/list-runs",
            "/v1/fleet/%2e%2e/x",
        ):
            assert status(port, deployment.folder / "keys" / "ca.crt", path) == 403, path
        assert status(port, deployment.folder / "keys" / "ca.crt", "/v1/fleet/push-object", length=33 * 2**20) == 413
        assert deployment.flwr("ls", CONNECTION)["success"]
    finally:
        deployment.stop("skin")
        federation.restart("skin")

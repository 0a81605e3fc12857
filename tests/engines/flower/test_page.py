"""docs/deployment.md as a new user follows it: every command as written, in one shell, from an empty folder."""

import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from tests.engines.flower.conftest import PATIENCE

from fedex_lora.engines.flower import ENVIRONMENT
from fedex_lora.engines.flower._local import free_port
from fedex_lora.storage.events import read_events

PAGE = Path(__file__).parents[3] / "docs" / "deployment.md"


def test_the_page(tmp_path):
    blocks = re.findall(r"```bash\n(.*?)```", PAGE.read_text(), flags=re.S)
    assert len(blocks) == 4
    script = "\n".join(blocks)
    for old, new in (("PORT=8000", f"PORT={free_port()}"), ("rounds = 2", "rounds = 1")):  # a message costs each node eight seconds
        assert old in script
        script = script.replace(old, new)
    assert "8000" not in script
    bare = {name: value for name, value in os.environ.items() if name not in ENVIRONMENT and not name.startswith("FLWR")}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    shell = subprocess.Popen(
        ["bash", "-euo", "pipefail", "-c", f"trap 'kill $(jobs -p) 2>/dev/null' EXIT\n{script}"],
        cwd=tmp_path,
        env={**bare, "PATH": path, "HOME": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = shell.communicate(timeout=PATIENCE)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(shell.pid, signal.SIGKILL)  # not the command `kill`: procps 4.0.2 reads -KILL -123 as -KILL -1, all processes
    assert shell.returncode == 0, output
    assert "exact: worst" in output
    assert [event["rounds"] for event in read_events(tmp_path / "run" / "events.jsonl") if event["event"] == "run_done"] == [1]

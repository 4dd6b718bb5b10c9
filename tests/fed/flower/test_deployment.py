"""A real SuperLink and SuperNodes on loopback, with TLS and node authentication, started by `flwr run`."""

import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest

pytest.importorskip("flwr")

from lora_dp.fed.flower.keys import make_keys
from lora_dp.fed.flower.without_telemetry import QUIET
from lora_dp.privacy.accounting import Ledger

APP = Path(__file__).parents[3] / "examples" / "flower_app"
# Beside pytest's own interpreter, so that apps run with the same packages.
BIN = Path(sys.executable).parent
PATIENCE = 400.0
SUPERNODE = BIN / "flower-supernode"
# A SuperLink gives a node up after two heartbeats: this one has one every 10 s instead of 30, so nobody waits a minute.
SHORT_OF_BREATH = (
    sys.executable,
    "-c",
    (
        "import flwr.common.constant as constant; constant.HEARTBEAT_DEFAULT_INTERVAL = 10\n"
        "from flwr.supernode.cli import flower_supernode; flower_supernode()"
    ),
)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Deployment:
    """Processes of Flower in a folder of their own, each with a log there."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.keys, self.port = folder, folder / "keys", free_port()
        home = folder / "home"
        home.mkdir()
        self.env = {
            **os.environ,
            **QUIET,
            "FLWR_HOME": str(home),
            "OMP_NUM_THREADS": "1",
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
        }
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        make_keys(self.keys, ["127.0.0.1"], 4)
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{self.port}"\n'
            f'root-certificates = "{self.keys / "ca.crt"}"\n'
        )

    def start(self, name: str, *command: object) -> None:
        with (self.folder / f"{name}.log").open("wb") as log:
            self.processes[name] = subprocess.Popen(
                [str(part) for part in command],
                env=self.env,
                cwd=self.folder,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def start_node(self, name: str, key: int, client: int, supernode: Sequence[object] = (SUPERNODE,)) -> None:
        self.start(
            name,
            *supernode,
            "--superlink",
            f"127.0.0.1:{self.port}",
            "--root-certificates",
            self.keys / "ca.crt",
            "--auth-supernode-private-key",
            self.keys / f"node-{key}",
            "--host",
            "127.0.0.1",
            "--port",
            free_port(),
            "--max-retries",
            3,
            "--node-config",
            f'partition-id={client} ledger="{self.folder / f"{name}.json"}" epsilon=8.0 delta=1e-5',
        )

    def flwr(self, *commands: Sequence[object]) -> None:
        """Runs flwr with the arguments of each command, all at once."""
        asked = [
            subprocess.Popen(
                [str(BIN / "flwr"), *map(str, command)],
                env=self.env,
                cwd=self.folder,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for command in commands
        ]
        for process in asked:
            said, _ = process.communicate(timeout=PATIENCE)
            assert process.returncode == 0, said

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def until(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + PATIENCE
        while not condition():
            if time.monotonic() > end or self.processes["superlink"].poll() is not None:
                pytest.fail("\n".join(f"--- {name}\n{self.log(name)[-3000:]}" for name in self.processes))
            time.sleep(0.1)

    def answers(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
        except OSError:
            return False
        return True

    def kill(self, name: str) -> None:
        os.killpg(self.processes[name].pid, signal.SIGKILL)
        self.processes[name].wait()

    def close(self) -> None:
        """Asks all processes to end, and ends those that do not, with all that they have started in sessions of
        their own."""
        started = [psutil.Process(process.pid) for process in self.processes.values() if process.poll() is None]
        started += [child for process in started for child in process.children(recursive=True)]
        for process in self.processes.values():
            if process.poll() is None:
                process.terminate()
        _, left = psutil.wait_procs(started, timeout=3)
        for process in left:
            process.kill()
        psutil.wait_procs(left, timeout=10)
        for process in self.processes.values():
            process.wait()


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[Deployment]:
    made = Deployment(tmp_path)
    try:
        yield made
    finally:
        made.close()


@pytest.mark.long
def test_a_job_ends_though_a_node_is_killed_in_the_middle_of_a_round(deployment: Deployment) -> None:
    there = deployment
    there.start(
        "superlink",
        BIN / "flower-superlink",
        "--host",
        "127.0.0.1",
        "--port",
        there.port,
        "--enable-supernode-auth",
        "--disable-runtime-dependency-installation",
        "--ssl-ca-certfile",
        there.keys / "ca.crt",
        "--ssl-certfile",
        there.keys / "server.crt",
        "--ssl-keyfile",
        there.keys / "server.key",
    )
    there.until(there.answers)
    there.flwr(*(("supernode", "register", there.keys / f"node-{client}.pub", "here") for client in range(3)))
    for client in range(3):
        there.start_node(f"node-{client}", client, client, SHORT_OF_BREATH if client == 2 else (SUPERNODE,))
    there.start_node("stranger", 3, 0)  # nobody has registered its key

    output = there.folder / "run"
    there.flwr(
        (
            "run",
            APP,
            "here",
            "--run-config",
            f'rounds=2 local-steps=2 batch-size=16 accountant="rdp" client-timeout=90.0 output="{output}"',
        )
    )
    there.until(lambda: "ROUND 1" in there.log("node-2"))
    there.kill("node-2")
    there.until((output / "summary.json").exists)

    summary = json.loads((output / "summary.json").read_text())
    assert (summary["status"], summary["rounds"]) == ("finished", 2)
    rounds = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()][1:]
    assert [entry["participants"] for entry in rounds] == [[0, 1], [0, 1]]
    assert [[failed["client"] for failed in entry["failed"]] for entry in rounds] == [[2], [2]]
    # Each client's own ledger and the server's say the same.
    for client in (0, 1):
        account = json.loads((output / "ledger.json").read_text())["clients"][client]
        own = Ledger.load(there.folder / f"node-{client}.json")
        assert own.state_dict() == account["ledger"] and own.steps == 4
        assert own.epsilon(1e-5, "rdp") == account["epsilon"] <= 8
    # The stranger got no task, and the server speaks TLS that only its own authority vouches for.
    assert not (there.folder / "stranger.json").exists() and "ROUND" not in there.log("stranger")
    trusting = ssl.create_default_context(cafile=str(there.keys / "ca.crt"))
    for context, trusted in ((trusting, True), (ssl.create_default_context(), False)):
        with socket.create_connection(("127.0.0.1", there.port)) as plain:
            if trusted:
                context.wrap_socket(plain, server_hostname="127.0.0.1").close()
            else:
                with pytest.raises(ssl.SSLCertVerificationError):
                    context.wrap_socket(plain, server_hostname="127.0.0.1")

"""A real ``python -m moe_engine.serve`` in a process of its own."""

import socket
import subprocess
import sys
import time
from contextlib import contextmanager

import httpx
import psutil


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """The running server: its address, and its rank processes by rank."""

    def __init__(self, process, port):
        self.process = process
        self.url = f"http://127.0.0.1:{port}"

    def health(self):
        """Status code of /health; None if nobody answers."""
        try:
            return httpx.get(f"{self.url}/health", timeout=5).status_code
        except httpx.HTTPError:
            return None

    def metric(self, name):
        """Value of a metric without labels."""
        for line in httpx.get(f"{self.url}/metrics").text.splitlines():
            if line.startswith((f"{name} ", f"{name}{{")):
                return float(line.rsplit(" ", 1)[1])
        raise AssertionError(f"no metric {name}")

    def ranks(self):
        """The rank processes, by rank."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return {int(c.environ()["RANK"]): c for c in children if "RANK" in c.environ()}


@contextmanager
def running_server(*arguments, wait=True, timeout=120):
    """Start the server with ``arguments`` and wait until it is ready; killed at the end."""
    port = free_port()
    command = [sys.executable, "-m", "moe_engine.serve", "--port", str(port), "--device", "cpu"]
    process = subprocess.Popen(
        [*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    server = Server(process, port)
    ranks = {}
    try:
        deadline = time.monotonic() + timeout
        while wait and server.health() != 200:
            assert process.poll() is None, process.stdout.read()
            assert time.monotonic() < deadline, "the server was not ready in time"
            time.sleep(0.1)
        ranks = server.ranks()
        yield server
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        _, alive = psutil.wait_procs(ranks.values(), timeout=10)
        for rank in alive:
            rank.kill()
        assert not alive, f"rank processes were left behind: {alive}"

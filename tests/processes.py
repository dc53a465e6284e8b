"""Redis, nginx and `geocentroids serve` as processes of this machine, on the loopback interface only."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import httpx

ROOT = Path(__file__).parents[1]
NGINX_CONF = ROOT / "deploy" / "nginx.conf"
START_S = 60.0
"""Longest wait for a process to answer."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


class Process:
    """A server on a port of 127.0.0.1, whose output goes to a file."""

    def __init__(
        self, command: Sequence[str], port: int, log: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        self.port, self.log = port, log
        self._output = log.open("ab")
        self._process = subprocess.Popen(
            command, env={**os.environ, **(environment or {})}, stdout=self._output, stderr=subprocess.STDOUT, cwd=ROOT
        )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """What it ended with; None while it runs."""
        return self._process.poll()

    def await_start(self, path: str | None = None) -> None:
        """Wait until it listens, or answers 200 to a path."""
        deadline_s = time.monotonic() + START_S
        while not self._answers(path):
            assert self._process.poll() is None, self.text()
            assert time.monotonic() < deadline_s, self.text()
            time.sleep(0.05)

    def _answers(self, path: str | None) -> bool:
        if path is None or not listens(self.port):
            return path is None and listens(self.port)
        try:
            return httpx.get(self.url + path, timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    def text(self) -> str:
        """Return what it printed."""
        return self.log.read_text(errors="replace")

    def metric(self, name: str, **labels: str) -> float:
        """Return a Prometheus metric, summed over the labels that are not given."""
        found = 0.0
        for given, value in re.findall(
            rf"^geocentroids_{name}(?:{{(.*)}})? (\S+)$", httpx.get(f"{self.url}/metrics").text, re.M
        ):
            if all(f'{label}="{text}"' in given for label, text in labels.items()):
                found += float(value)
        return found

    def kill(self) -> None:
        """End it as a power cut would."""
        self._process.kill()
        self._process.wait(10)

    def close(self) -> None:
        """End it, and give it time for that."""
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self.kill()
        self._output.close()


def start_redis(folder: Path, port: int | None = None) -> Process:
    """Start a Redis that keeps nothing on disk."""
    port = port or free_port()
    options = {"port": port, "bind": "127.0.0.1", "save": "", "appendonly": "no", "maxmemory": "64mb"}
    command = ["redis-server", *(part for key, value in options.items() for part in (f"--{key}", str(value)))]
    redis = Process([*command, "--maxmemory-policy", "allkeys-lru"], port, folder / "redis.log")
    redis.await_start()
    return redis


def start_serve(root: Path, log: Path, *options: str, **settings: object) -> Process:
    """Begin to start `geocentroids serve`, without waiting for it; ``settings`` as in ``Settings``."""
    port = free_port()
    environment = {f"GEOCENTROIDS_{name.upper()}": str(value) for name, value in settings.items()}
    command = [sys.executable, "-m", "geocentroids_tiler.cli", "serve", "--port", str(port), "--root", str(root)]
    return Process([*command, *options], port, log, environment)


def nginx() -> str | None:
    """Return where nginx is, which is often on no ordinary user's path."""
    return shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


def start_nginx(folder: Path, upstreams: Sequence[int], conf: Path = NGINX_CONF) -> Process:
    """Start nginx with our configuration: addresses, ports and paths are of this machine, the rest is as it is."""
    port = free_port()
    text = conf.read_text()
    servers = re.findall(r"server (10\.[\d.]+:8000)", text)
    assert len(servers) == len(upstreams)
    own = {server: f"127.0.0.1:{upstream}" for server, upstream in zip(servers, upstreams, strict=True)}
    for old, new in {
        **own,
        "listen 8080": f"listen 127.0.0.1:{port}",
        "/tmp/nginx": str(folder / "nginx"),
        "/dev/stdout": str(folder / "nginx-access.log"),
    }.items():
        assert old in text, old
        text = text.replace(old, new)
    path = folder / "nginx.conf"
    path.write_text(text)
    command = [str(nginx()), "-c", str(path), "-e", "stderr", "-g", "daemon off;"]
    server = Process(command, port, folder / "nginx.log")
    server.await_start()
    return server

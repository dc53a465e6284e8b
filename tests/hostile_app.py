"""A server with a fake encoder and its own resolver in a process of its own, for strangers to attack."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fakes import fake_service, write_codebooks, write_images
from hostile_cases import NAMES, World
from hostile_servers import Listener, listening
from telling_server import serve_and_tell

from geocentroids_tiler.app import create_app
from geocentroids_tiler.settings import Settings
from geocentroids_tiler.source import open_remote

SETTINGS: dict[str, Any] = {
    "source_http": True,
    "source_networks": ["127.0.0.1/32"],
    "source_connect_timeout_s": 5,
    "source_timeout_s": 5,
    "source_total_timeout_s": 12,
    "failure_ttl_s": 0,
    "source_ttl_s": 0,
}
"""Only 127.0.0.1 itself may be read from: all else on this machine stands for what must not be reached.

The deadlines are long enough that good answers meet them on a busy machine too."""


@dataclass
class Attacked:
    """A server under attack.

    Attributes:
        url: of the server.
        pid: of its process.
        world: the servers around it.
    """

    url: str
    pid: int
    world: World


@contextmanager
def attacked_server(folder: Path, **settings: float) -> Iterator[Attacked]:
    """Run a server, a hostile one beside it, and a canary that the environment names in every way it can.

    Args:
        folder: empty, for images, codebooks and files.
        **settings: over ``SETTINGS``.
    """
    write_images(folder / "images")
    for name in ("codebooks", "files"):
        (folder / name).mkdir()
    write_codebooks(folder / "codebooks")
    folders = str(folder / "images"), str(folder / "codebooks")
    command = [sys.executable, __file__, *folders, json.dumps(NAMES), json.dumps(SETTINGS | settings)]
    with listening(Listener()) as attacker, listening(Listener("::", socket.AF_INET6)) as canary:
        place = f"127.0.0.2:{canary.port}"
        environment = {
            **os.environ,
            **dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), f"http://{place}"),
            "AWS_ACCESS_KEY_ID": "id",
            "AWS_SECRET_ACCESS_KEY": "geheim",
            "AWS_REGION": "nowhere",
            "AWS_S3_ENDPOINT": place,
            "AWS_HTTPS": "NO",
            "AWS_VIRTUAL_HOSTING": "FALSE",
        }
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        try:
            port = int((process.stdout.readline() if process.stdout else "").removeprefix("port "))
            yield Attacked(f"http://127.0.0.1:{port}", process.pid, World(attacker, canary, folder / "files"))
        finally:
            process.kill()
            process.communicate()


def main() -> None:
    """Serve the images and codebooks that the command line names, and print `port N` once that is possible.

    Names resolve to what the third argument says as JSON: lists of addresses, of which each question gets the next one.
    The fourth holds settings.
    """
    images, codebooks = Path(sys.argv[1]), Path(sys.argv[2])
    names: dict[str, list[list[str]]] = json.loads(sys.argv[3])
    lock = threading.Lock()

    def resolver(host: str, port: int) -> list[str]:
        with lock:
            answers = names.get(host)
            if not answers:
                raise OSError(f"{host} is not known")
            return answers.pop(0) if len(answers) > 1 else answers[0]

    settings = json.loads(sys.argv[4])
    service, _ = fake_service(images, codebooks, remote=open_remote(Settings(**settings), resolver), **settings)
    service.engine(service.codebook(None)).result()
    serve_and_tell(create_app(service=service), log_level="error", http="h11", h11_max_incomplete_event_size=2**17)


if __name__ == "__main__":
    main()

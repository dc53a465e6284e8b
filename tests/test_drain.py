"""A server that is told to end: what it was asked is answered, nothing new is taken, and what it computed is kept."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from fakes import PATIENCE_S, fake_service, open_image, until, write_codebooks, write_images

from geocentroids_tiler.grid import PatchRange


@pytest.fixture
def server(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    write_images(tmp_path / "images")
    (tmp_path / "codebooks").mkdir()
    write_codebooks(tmp_path / "codebooks")
    script = Path(__file__).with_name("served_app.py")
    command = [sys.executable, str(script), *(str(tmp_path / name) for name in ("images", "codebooks", "store"))]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    yield process
    process.kill()
    process.communicate()


def refused(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def test_sigterm(server: subprocess.Popen[str], tmp_path: Path) -> None:
    assert server.stdout is not None
    assert server.stdin is not None
    port = int(server.stdout.readline().removeprefix("port "))
    service, loader = fake_service(tmp_path / "images", tmp_path / "codebooks", label_store_dir=tmp_path / "store")
    dataset = open_image(service, "whole.tif", "blend")
    area = dataset.footprint
    part = PatchRange(area.row_start, area.row_start + 9, area.col_start, area.col_start + 9)
    left, bottom, right, top = dataset.grid.bounds_of(part)
    address = f"http://127.0.0.1:{port}/cog/geocentroids/bbox/{left},{bottom},{right},{top}.tif"
    query = {"url": "whole.tif", "coord_crs": "EPSG:32721"}
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(httpx.get, address, params=query, timeout=PATIENCE_S)
        assert server.stdout.readline() == "run\n"
        server.send_signal(signal.SIGTERM)
        until(lambda: refused(port))
        assert not asked.done()
        server.stdin.write("go on\n")
        server.stdin.flush()
        answer = asked.result(PATIENCE_S)
    assert answer.status_code == 200
    assert server.wait(PATIENCE_S) in (0, -signal.SIGTERM), "ended by itself"

    engine = service.engine(service.codebook("blend")).result(PATIENCE_S)
    loader.made["blend"].forget()
    engine.block(dataset, part)
    assert not loader.made["blend"].runs, "its last labels are in the store"
    service.close()

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from ray_cluster import RAY_WARNINGS, cluster

import geocentroids_tiler
from geocentroids_tiler.distributed import alive_nodes, ask, check_agreement, code_version, connected
from geocentroids_tiler.errors import ClusterError, InputError

pytestmark = RAY_WARNINGS

_DRIVER = """
import sys
from geocentroids_tiler.distributed import connected
from geocentroids_tiler.errors import ClusterError

try:
    with connected(sys.argv[1]):
        print("connected")
except ClusterError as error:
    print(error)
"""


def process_node() -> str:
    import ray

    return str(ray.get_runtime_context().get_node_id())


def test_no_cluster_is_told_at_once() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.2", 0))
        address = f"127.0.0.2:{free.getsockname()[1]}"
    with pytest.raises(ClusterError, match=f"no Ray cluster at '{address}'"), connected(address):
        pass


@pytest.mark.parametrize("address", ["", "nowhere", "host:0", "host:70000", "ray://host:10001", "a b:1"])
def test_what_is_no_address(address: str) -> None:
    accepted = "is no address of a Ray cluster; accepted: auto, local, or HOST:PORT"
    with pytest.raises(InputError, match=accepted), connected(address):
        pass


def test_every_node_is_asked() -> None:
    with cluster(nodes=2) as running, connected(running.address) as nodes:
        assert len(nodes) == 2
        assert ask(nodes, process_node) == [node.id for node in nodes]
        check_agreement(nodes, "code", code_version)
        with pytest.raises(ClusterError, match=f"node {nodes[0].address} .* has node"):
            check_agreement(nodes, "node", _own_node_is_none)
        assert {node.id for node in alive_nodes()} == {node.id for node in nodes}


def _own_node_is_none() -> str:
    import ray

    context = ray.get_runtime_context()
    return "here" if context.worker.mode == 0 else process_node()


def test_a_node_with_another_version_is_named(tmp_path: Path) -> None:
    """A node whose package is a copy of ours with one line more."""
    package = Path(geocentroids_tiler.__file__).parent
    shutil.copytree(package, tmp_path / package.name, ignore=shutil.ignore_patterns("codebooks", "__pycache__"))
    with (tmp_path / package.name / "pools.py").open("a") as file:
        file.write("\n# changed\n")
    with cluster(nodes=1) as running:
        running.add_node(env_vars={"PYTHONPATH": str(tmp_path)})
        # A process of its own: Ray lets the nodes import what lies in the driver's folder, here this checkout.
        driver = tmp_path / "elsewhere" / "driver.py"
        driver.parent.mkdir()
        driver.write_text(_DRIVER)
        ended = subprocess.run(
            [sys.executable, driver, running.address], cwd=driver.parent, capture_output=True, text=True, timeout=120
        )
    assert re.fullmatch(
        r"node 127\.0\.0\.2 \(\w+\) has geocentroids-tiler (\S+), this machine has (?!\1)\S+; "
        r"install the same on all nodes",
        ended.stdout.strip(),
    ), ended

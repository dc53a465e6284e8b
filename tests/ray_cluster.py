"""Ray clusters of several nodes on this machine, which talk over the loopback interface only."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when Ray is imported: nothing is reported to anybody
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

LOOPBACK = "127.0.0.2"
"""Ray takes 127.0.0.1 for a name of the machine and looks for an address that others can reach."""
STORE_BYTES = 256 * 2**20

RAY_WARNINGS = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # Ray leaves its log files and sockets to the collector
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


class RunningCluster:
    """A cluster that tests add nodes to and take them from."""

    def __init__(self, nodes: int, cpus: float, store_bytes: int) -> None:
        from ray.cluster_utils import Cluster

        self._options: dict[str, Any] = {"node_ip_address": LOOPBACK, "object_store_memory": store_bytes}
        self._cpus = cpus
        self._cluster = Cluster(
            initialize_head=True, head_node_args={**self._options, "num_cpus": cpus, "include_dashboard": False}
        )
        self.added = [self.add_node() for _ in range(nodes - 1)]

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def add_node(self, **options: Any) -> Any:
        return self._cluster.add_node(**{**self._options, "num_cpus": self._cpus, **options})

    def kill(self, node: Any) -> None:
        """End a node as a power cut would."""
        self._cluster.remove_node(node, allow_graceful=False)

    def close(self) -> None:
        self._cluster.shutdown()


@contextmanager
def cluster(nodes: int = 2, cpus: float = 1, store_bytes: int = STORE_BYTES) -> Iterator[RunningCluster]:
    """Run a cluster for the length of a ``with`` block; the first node is the head. Its nodes can import our tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        running = RunningCluster(nodes, cpus, store_bytes)
        try:
            yield running
        finally:
            running.close()

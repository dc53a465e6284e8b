"""Connecting to a cluster whose nodes all run this code."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from geocentroids_fit import __version__
from geocentroids_tiler.distributed import Node, check_agreement, code_digest, connected

SOURCE_VARIABLES = "GEOCENTROIDS_SOURCE_"
"""What may be read from where; the nodes do as this machine is told."""


@contextmanager
def connected_to_fit(address: str) -> Iterator[list[Node]]:
    """Connect to a cluster for the length of a ``with`` block, and yield its nodes.

    Args:
        address: see ``connected``.

    Raises:
        InputError: if Ray is not installed or the address is none.
        ClusterError: if there is no cluster, or a node has other versions of our packages.
    """
    environment = {key: value for key, value in os.environ.items() if key.startswith(SOURCE_VARIABLES)}
    with connected(address, environment) as nodes:
        check_agreement(nodes, "geocentroids-fit", fit_version)
        yield nodes


def fit_version() -> str:
    """Return the version of this package as it runs here, with a digest of its code."""
    return f"{__version__}+{code_digest(Path(__file__).parent)}"

"""A Ray cluster: reaching one, and making sure that all its nodes would compute the same."""

from __future__ import annotations

import hashlib
import re
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from geocentroids_tiler import __version__
from geocentroids_tiler.errors import ClusterError, InputError

ACCEPTED = "auto, local, or HOST:PORT as `ray start --head` prints it"
CONNECT_S = 5.0
"""How long a cluster has to accept a connection; Ray itself would try for minutes."""
ANSWER_S = 120.0
"""How long a node may take to start a worker and answer a question."""
_ADDRESS = re.compile(r"(?P<host>[\w.-]+|\[[0-9A-Fa-f:]+\]):(?P<port>\d{1,5})")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Node:
    """A machine of the cluster.

    Attributes:
        id: Ray's name of it.
        address: its IP address.
        cpus: CPUs that it offers to Ray.
        gpus: GPUs that it offers to Ray.
    """

    id: str
    address: str
    cpus: float
    gpus: float

    def __str__(self) -> str:
        return f"{self.address} ({self.id[:8]})"


@contextmanager
def connected(address: str, environment: Mapping[str, str] | None = None) -> Iterator[list[Node]]:
    """Connect this process to a Ray cluster for the length of a ``with`` block, and yield its nodes.

    Args:
        address: ``HOST:PORT`` of a running cluster, ``auto`` for the one of this machine, ``local`` for a new one that
            ends with the block.
        environment: variables that processes on the nodes get beside their own.

    Raises:
        InputError: if Ray is not installed or the address is none.
        ClusterError: if there is no cluster, or a node has another version of this package.
    """
    ray = import_ray()
    _check_reachable(address)
    options: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    if (match := _ADDRESS.fullmatch(address)) and match["host"].startswith("127."):
        options["_node_ip_address"] = match["host"]
    try:
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level="ERROR",
            namespace="geocentroids",
            runtime_env={"env_vars": dict(environment)} if environment else None,
            **options,
        )
    except (ConnectionError, TimeoutError, RuntimeError, ValueError) as error:
        raise ClusterError(f"there is no Ray cluster at {address!r} that can be used: {_short(error)}") from error
    try:
        nodes = alive_nodes()
        check_versions(nodes)
        yield nodes
    finally:
        ray.shutdown()


def import_ray() -> Any:
    """Return the module ``ray``.

    Raises:
        InputError: if it is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise InputError("Ray is not installed: pip install 'geocentroids-tiler[ray]'") from error
    return ray


def alive_nodes() -> list[Node]:
    """Return the nodes that are there now, those with most to offer first."""
    nodes = [
        Node(
            entry["NodeID"],
            entry["NodeManagerAddress"],
            float(entry["Resources"].get("CPU", 0)),
            float(entry["Resources"].get("GPU", 0)),
        )
        for entry in import_ray().nodes()
        if entry["Alive"]
    ]
    return sorted(nodes, key=lambda node: (-node.gpus, -node.cpus, node.id))


def on_node(node: Node, *, soft: bool = False) -> Any:
    """Return the scheduling strategy that keeps a task or an actor on a node; ``soft``: while it is there."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node.id, soft=soft)


def ask(nodes: Sequence[Node], question: Callable[..., T], *args: Any) -> list[T]:
    """Call a function on every node at the same time and return the answers, in the order of the nodes.

    Args:
        nodes: where.
        question: what is called; a function of a module that is installed on all nodes.
        args: its arguments.

    Raises:
        ClusterError: if a node does not answer, or its answer is an error; the text names the node.
    """
    ray = import_ray()
    remote = ray.remote(num_cpus=0, max_retries=0)(question)
    asked = [remote.options(scheduling_strategy=on_node(node)).remote(*args) for node in nodes]
    answers: list[T] = []
    for node, answer in zip(nodes, asked, strict=True):
        try:
            answers.append(ray.get(answer, timeout=ANSWER_S))
        except ray.exceptions.RayTaskError as error:
            raise ClusterError(f"node {node}: {_short(error.cause or error)}") from error
        except ray.exceptions.RayError as error:
            raise ClusterError(f"node {node} does not answer: {_short(error)}") from error
    return answers


def check_versions(nodes: Sequence[Node]) -> None:
    """Make sure that all nodes run the same code as this process.

    Raises:
        ClusterError: naming the node that does not, and both versions.
    """
    own = code_version()
    for node, found in zip(nodes, ask(nodes, code_version), strict=True):
        if found != own:
            raise ClusterError(
                f"node {node} has geocentroids-tiler {found}, this machine has {own}; install the same on all nodes"
            )


def check_agreement(nodes: Sequence[Node], what: str, question: Callable[..., object], *args: Any) -> None:
    """Make sure that a function has the same answer on all nodes as here.

    Args:
        nodes: where.
        what: name of the answer, for the message.
        question: what is called.
        args: its arguments.

    Raises:
        ClusterError: naming the node with another answer, and both.
    """
    own = question(*args)
    for node, found in zip(nodes, ask(nodes, question, *args), strict=True):
        if found != own:
            raise ClusterError(f"node {node} has {what} {found}, this machine has {own}; they must be the same")


def code_version() -> str:
    """Return the version of this package as it runs here, with a digest of its code."""
    return f"{__version__}+{code_digest(Path(__file__).parent)}"


def code_digest(package: Path) -> str:
    """Return a digest of all modules in a folder."""
    hashed = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        hashed.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return hashed.hexdigest()[:12]


def _check_reachable(address: str) -> None:
    """Raise unless something listens at the address."""
    if address in ("auto", "local"):
        return
    match = _ADDRESS.fullmatch(address)
    if match is None or not 0 < int(match["port"]) < 65536:
        raise InputError(f"{address!r} is no address of a Ray cluster; accepted: {ACCEPTED}")
    try:
        socket.create_connection((match["host"].strip("[]"), int(match["port"])), CONNECT_S).close()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ClusterError(f"there is no Ray cluster at {address!r} ({reason}); accepted: {ACCEPTED}") from error


def _short(error: BaseException) -> str:
    """Return the first line of an error that says something, Ray's own run over pages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__

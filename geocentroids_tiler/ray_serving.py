"""``serve --ray``: the server as an application of Ray Serve, for as long as the command runs."""

from __future__ import annotations

import logging
import math
import secrets
import signal
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from geocentroids_tiler.distributed import Node, check_agreement, connected, import_ray
from geocentroids_tiler.errors import ClusterError
from geocentroids_tiler.settings import Settings

if TYPE_CHECKING:
    from types import FrameType

APP_NAME = "geocentroids"
DEVICE_REQUESTS = 1000
"""Batches under way at one device, more than all ingress replicas together send: those have eight each."""
DEVICE_TARGET = 4
"""Batches under way at a device on average at which there are enough of them: one computes, the next is there."""
INGRESS_TARGET = 16
"""Requests under way at an ingress replica on average at which there are enough of them."""
HEALTH_REQUESTS = 16
"""Requests for health beside those that ``requests_at_once`` allows."""
ANSWER_S = 60.0


def serve_on_ray(settings: Settings, address: str, host: str, port: int, started: Callable[[], None]) -> None:
    """Serve on a Ray cluster until SIGINT or SIGTERM; call ``started`` when the first request would be answered.

    Args:
        settings: of the server; they travel to all nodes.
        address: of the cluster; see ``distributed.connected``.
        host: address to listen on, on every node with a replica.
        port: to listen on.
        started: tells the user.

    Raises:
        InputError: if Ray is not installed or the address is none.
        ClusterError: if there is no cluster, its nodes do not agree, or nothing can be served there.
    """
    ended = threading.Event()
    with connected(address) as nodes:
        from ray import serve

        from geocentroids_tiler.ray_replicas import codebook_digest

        check_agreement(
            nodes, f"codebook {settings.codebook!r} with digest", codebook_digest, settings.codebook, settings
        )
        agreement = f"agreement-{secrets.token_hex(8)}"
        digest = codebook_digest(settings.codebook, settings)
        before = _end_on_signals(ended)
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        try:
            serve.start(proxy_location="EveryNode", http_options={"host": host, "port": port})
            try:
                serve.run(application(settings, nodes, digest, agreement), name=APP_NAME, route_prefix="/")
            except RuntimeError as error:
                raise ClusterError(f"the server did not start on the cluster: {_reason(error, serve)}") from error
            _await_answer(host, port, ended)
            if not ended.is_set():
                started()
            ended.wait()
        finally:
            _stop(agreement)
            for number, handler in before.items():
                signal.signal(number, handler)


def application(settings: Settings, nodes: Sequence[Node], digest: str, agreement: str) -> Any:
    """Return the application: ingress replicas in front of replicas with a device each.

    Args:
        settings: of the server.
        nodes: of the cluster.
        digest: of the default codebook.
        agreement: name of the actor that remembers the first device.
    """
    from ray import serve
    from ray.serve.config import RequestRouterConfig

    from geocentroids_tiler.ray_replicas import Encoders, Ingress, OwnerRouter

    gpus = int(sum(node.gpus for node in nodes))
    devices = settings.ray_encoder_replicas or str(gpus or len(nodes))
    encoders = serve.deployment(
        Encoders,
        name="Encoders",
        **_replicas(devices, DEVICE_TARGET),
        max_ongoing_requests=DEVICE_REQUESTS,
        max_constructor_retry_count=3,
        graceful_shutdown_timeout_s=math.ceil(settings.request_timeout_s),
        request_router_config=RequestRouterConfig(request_router_class=OwnerRouter),
        # Without GPUs a device is all cores of a node.
        **({"ray_actor_options": {"num_gpus": 1}} if gpus else {"max_replicas_per_node": 1}),
    )
    ingress = serve.deployment(
        serve.ingress()(Ingress),
        name="Ingress",
        **_replicas(settings.ray_ingress_replicas, INGRESS_TARGET),
        # One more than the application lets in: it is our refusal that clients see, with a time to come back.
        max_ongoing_requests=settings.requests_at_once + HEALTH_REQUESTS,
        max_queued_requests=settings.requests_at_once,
        max_constructor_retry_count=3,
        graceful_shutdown_timeout_s=math.ceil(settings.request_timeout_s),
    )
    return ingress.bind(settings, encoders.bind(settings, digest, agreement))


def _replicas(text: str, target: int) -> dict[str, Any]:
    """Return the options of ``N`` replicas, or of ``MIN-MAX`` by what is under way."""
    least, _, most = text.partition("-")
    if not most:
        return {"num_replicas": int(least)}
    scaling = {"min_replicas": int(least), "max_replicas": int(most), "target_ongoing_requests": target}
    return {"autoscaling_config": scaling}


def _await_answer(host: str, port: int, ended: threading.Event) -> None:
    """Wait until the server answers.

    Raises:
        ClusterError: if it does not.
    """
    shown = "127.0.0.1" if host in ("0.0.0.0", "::") else host  # noqa: S104
    deadline_s = time.monotonic() + ANSWER_S
    while not ended.is_set():
        with suppress(OSError), urllib.request.urlopen(f"http://{shown}:{port}/healthz", timeout=5) as answer:
            if answer.status == 200:
                return
        if time.monotonic() > deadline_s:
            raise ClusterError(
                f"nothing answers at {shown}:{port}; if Ray Serve ran on this cluster before, it keeps the port it was "
                "started with: `serve shutdown` ends it"
            )
        ended.wait(0.2)


def _end_on_signals(ended: threading.Event) -> dict[int, Any]:
    """Have SIGINT and SIGTERM set the event; return what they did before."""

    def end(number: int, frame: FrameType | None) -> None:
        ended.set()

    return {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}


def _stop(agreement: str) -> None:
    """End the application, and Ray Serve if it runs nothing else."""
    from ray import serve

    from geocentroids_tiler.ray_replicas import NAMESPACE

    ray = import_ray()
    with suppress(TimeoutError):  # a replica that does not end is ended with Ray Serve
        serve.delete(APP_NAME)
    if not any(name != APP_NAME for name in serve.status().applications):
        serve.shutdown()
    with suppress(ValueError):
        ray.kill(ray.get_actor(agreement, namespace=NAMESPACE))


def _reason(error: BaseException, serve: Any) -> str:
    """Return what a replica said that could not start, else the first line of the error."""
    found = serve.status().applications.get(APP_NAME)
    told = [deployment.message for deployment in found.deployments.values()] if found is not None else []
    lines = [line.strip() for text in [str(error), *told] for line in text.splitlines() if line.strip()]
    ours = [line.partition(": ")[2] for line in lines if line.startswith("geocentroids_tiler.errors.")]
    reason: str = (ours[-1:] or lines[:1] or [type(error).__name__])[0]
    return reason[:500]

"""What runs on a Ray cluster: replicas that read images and answer clients, and replicas with a device each.

Imported where Ray is installed only. Which device labels which image: ``labels/owners.py``.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

import ray
from fastapi import FastAPI
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from geocentroids_tiler.app import create_app
from geocentroids_tiler.errors import BusyError, ClusterError, CodebookError, EncoderError, GeocentroidsError
from geocentroids_tiler.hub import find_codebook
from geocentroids_tiler.labels.device import DeviceLabeller
from geocentroids_tiler.labels.futures import follow
from geocentroids_tiler.labels.labeller import DeviceFigures, device_name
from geocentroids_tiler.labels.owners import ranked
from geocentroids_tiler.labels.remote import DeviceDescription, LabelDesk, LabelReply, LabelRequest, RemoteLabeller
from geocentroids_tiler.labels.service import Service, load_codebook_encoder
from geocentroids_tiler.settings import Settings

logger = logging.getLogger(__name__)

NAMESPACE = "geocentroids"
LOAD_S = 600.0
"""Longest wait for a device to load a codebook; an engine for a GPU may have to be built."""
FIGURES_S = 2.0
"""Longest wait for the devices' figures."""
RETRY_AFTER_S = 5.0


class OwnerRouter(RequestRouter):  # type: ignore[misc]
    """Takes each call to the replica that owns what its first argument names, and to no other while that one lives."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Return the owner alone: one that is slow to answer is waited for, one that died is no candidate."""
        if pending_request is None or not pending_request.args:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        return [[by_name[ranked(str(pending_request.args[0]), list(by_name))[0]]]]


class Agreement:
    """Remembers what the first one who asks has, for all that come later."""

    def __init__(self) -> None:
        self._first: tuple[str, str] | None = None

    def first(self, node: str, value: str) -> tuple[str, str]:
        """Return node and value of whoever asked first."""
        if self._first is None:
            self._first = node, value
        return self._first


def check_device(node: str, device: str, first_node: str, first_device: str) -> None:
    """Refuse a device that computes in another way than the first.

    Raises:
        ClusterError: naming both nodes and both devices.
    """
    if device != first_device:
        raise ClusterError(
            f"node {node} computes on {device}, node {first_node} on {first_device}; labels are shared by all, so "
            "all must be of one kind (GEOCENTROIDS_BACKEND, _PROVIDER and _PRECISION choose it)"
        )


class Encoders:
    """A replica with a device."""

    def __init__(self, settings: Settings, digest: str, agreement: str) -> None:
        """Load the default codebook, and make sure that this node computes what the others do.

        Args:
            settings: of the server.
            digest: of the default codebook.
            agreement: name of the actor that remembers the first device.

        Raises:
            GeocentroidsError: if it cannot be loaded here, or would compute something else.
        """
        log_to_stderr()
        self._settings = settings
        self._digest = digest
        self._node = str(ray.util.get_node_ip_address())
        self._loading = ThreadPoolExecutor(1, "geocentroids-load")
        self._lock = threading.Lock()
        self._desks: dict[str, Future[LabelDesk]] = {}
        device = device_name(self._desk_of(settings.codebook, digest).result(LOAD_S).describe().device)
        remembered = (
            ray.remote(num_cpus=0)(Agreement)
            .options(name=agreement, namespace=NAMESPACE, lifetime="detached", get_if_exists=True)
            .remote()
        )
        check_device(self._node, device, *ray.get(remembered.first.remote(self._node, device)))

    async def describe(self, _: str, codebook: str, digest: str) -> DeviceDescription:
        """Return what labels the chunks of a codebook."""
        return (await asyncio.wrap_future(follow(self._desk_of(codebook, digest)))).describe()

    async def label(self, _: str, request: LabelRequest) -> LabelReply:
        """Label chunks; cancelled, what nobody else wants is given up."""
        desk = await asyncio.wrap_future(follow(self._desk_of(request.codebook, request.digest)))
        return await desk.label(request)

    async def figures(self, digest: str) -> DeviceFigures | None:
        """Return what was done with a codebook since the start."""
        desk = self._desks.get(digest)
        return desk.result().figures() if desk is not None and desk.done() and desk.exception() is None else None

    def _desk_of(self, codebook: str, digest: str) -> Future[LabelDesk]:
        """Return what labels with a codebook, loaded once; a failed load is tried again when next asked."""
        name = self._settings.codebook if digest == self._digest else codebook
        with self._lock:
            desk = self._desks.get(digest)
            if desk is None or (desk.done() and desk.exception() is not None):
                desk = self._desks[digest] = self._loading.submit(self._load, name, digest)
            return desk

    def _load(self, name: str, digest: str) -> LabelDesk:
        settings = self._settings
        codebook = find_codebook(name, settings.codebooks_dir, allow_path=name == settings.codebook)
        if codebook.digest != digest:
            raise CodebookError(
                f"node {self._node} has codebook {name!r} with digest {codebook.digest[:12]}, {digest[:12]} is wanted; "
                "install the same on all nodes"
            )
        encoder = load_codebook_encoder(codebook, settings)
        try:
            labeller = DeviceLabeller(codebook, encoder, token_cache_bytes=settings.token_cache_bytes)
        except BaseException:
            encoder.close()
            raise
        return LabelDesk(labeller, label_cache_bytes=settings.label_cache_bytes)


class Ingress:
    """A replica that answers clients: it reads and draws, and has no device."""

    def __init__(self, settings: Settings, devices: Any) -> None:
        """Hold what the application is built from.

        Args:
            settings: of the server.
            devices: handle of the deployment of ``Encoders``.
        """
        log_to_stderr()
        self._settings = settings
        self._devices = devices

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Return the application, as it is without Ray but for its devices."""
        carrier = HandleCarrier(self._devices)
        app = create_app(service=Service(self._settings, labeller=lambda codebook: RemoteLabeller(codebook, carrier)))
        serving = app.router.lifespan_context

        @asynccontextmanager
        async def lifespan(app: FastAPI) -> AsyncIterator[Any]:
            async with serving(app) as state:
                yield state
                carrier.close()  # before the service waits for what devices that go as well will not answer

        app.router.lifespan_context = lifespan
        return app


class HandleCarrier:
    """Takes requests to replicas of ``Encoders`` through a deployment's handle. Safe for threads."""

    def __init__(self, handle: Any) -> None:
        """Start the thread in which replies are waited for."""
        self._handle = handle
        self._closed = False
        self._asked: set[Future[Any]] = set()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="geocentroids-carry", daemon=True).start()

    def describe(self, codebook: str, digest: str) -> DeviceDescription:
        """Return what labels the chunks of a codebook, waiting for it to be loaded."""
        description: DeviceDescription = self._begin("describe", digest, codebook, digest).result(LOAD_S)
        return description

    def label(self, owner: str, request: LabelRequest) -> Future[LabelReply]:
        """Have chunks labelled by the owner of a block, or once more by the next if it dies."""
        return self._begin("label", owner, request)

    def figures(self, digest: str) -> list[DeviceFigures]:
        """Return what each device did with a codebook; all are left out if one of them does not answer soon."""

        async def ask() -> list[Any]:
            response = self._handle.broadcast("figures", digest)
            return list(await response.results_async(timeout_s=FIGURES_S, return_exceptions=True))

        try:
            found = asyncio.run_coroutine_threadsafe(ask(), self._loop).result(2 * FIGURES_S)
        except (TimeoutError, RayError, RayServeException) as error:
            logger.warning("the devices do not say what they did: %s", type(error).__name__)
            return []
        return [figures for figures in found if isinstance(figures, DeviceFigures)]

    def close(self) -> None:
        """Give up what was asked for, and refuse what is asked for from now on."""
        self._closed = True
        for asked in list(self._asked):
            asked.cancel()

    def _begin(self, method: str, owner: str, *args: Any) -> Future[Any]:
        asked = asyncio.run_coroutine_threadsafe(self._ask(method, owner, *args), self._loop)
        self._asked.add(asked)
        asked.add_done_callback(self._asked.discard)
        return asked

    async def _ask(self, method: str, owner: str, *args: Any) -> Any:
        """Call a method of the owner; one that goes meanwhile is replaced by the next owner, once."""
        if self._closed:
            raise EncoderError("the server is shutting down")
        for tried_before in (False, True):
            response = getattr(self._handle, method).remote(owner, *args)
            try:
                return await response
            except asyncio.CancelledError:
                response.cancel()
                raise
            except RayTaskError as error:
                if isinstance(error.cause, GeocentroidsError):
                    raise error.cause from None
                raise EncoderError(f"the device failed: {_first_line(error.cause or error)}") from error
            except (RayError, RayServeException) as error:
                logger.warning("a device is gone while it was asked: %s", type(error).__name__)
                if tried_before:
                    raise BusyError("two devices went while they labelled this; try again", RETRY_AFTER_S) from error
        return None


def codebook_digest(name: str, settings: Settings) -> str:
    """Return the digest of an installed codebook, to be asked on every node."""
    return find_codebook(name, settings.codebooks_dir, allow_path=True).digest


def log_to_stderr() -> None:
    """Write our log to this process' error output, which Ray keeps in a file."""
    own = logging.getLogger("geocentroids_tiler")
    if not own.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        own.addHandler(handler)
        own.setLevel(logging.INFO)
        own.propagate = False


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]

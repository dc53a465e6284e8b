"""Encoders on the nodes of a cluster: starting them, and how much they may read ahead."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from geocentroids_fit.extract import CHUNKS_PER_BATCH
from geocentroids_fit.files import read_json
from geocentroids_fit.images import ImageFolder
from geocentroids_fit.ledger import SETTINGS_FILE
from geocentroids_fit.node_encoder import IMAGES_AT_ONCE, EncoderRecipe, Failed, NodeEncoder, SampleJob
from geocentroids_fit.shards import FeatureSettings
from geocentroids_fit.stream import layout_of
from geocentroids_tiler.codebook import ENCODER_FILE
from geocentroids_tiler.distributed import Node, import_ray, on_node
from geocentroids_tiler.errors import ClusterError

STORE_SHARE = 0.5
"""Of a node's object store that windows and features may fill; Ray begins to write to disk at 0.8."""
LOAD_S = 600.0
"""How long the nodes may take to load the encoder; a model of the hub may have to be fetched first."""


@dataclass(frozen=True)
class Team:
    """What an extraction on a cluster needs to start an encoder.

    Attributes:
        recipe: which encoder.
        onnx: reference to the content of ``encoder.onnx``, None if the encoder is found by its name.
        onnx_bytes: length of that.
        on_gpus: whether encoders are started on GPUs, one on each; else on nodes.
    """

    recipe: EncoderRecipe
    onnx: Any
    onnx_bytes: int
    on_gpus: bool


@dataclass(eq=False)
class Worker:
    """An encoder on a node; ``images`` are those it works on."""

    node: Node
    actor: Any
    loading: Any
    images: list[str] = field(default_factory=list)
    ready: bool = False


def make_team(recipe: EncoderRecipe, folder: Path, nodes: Sequence[Node]) -> Team:
    """Put the encoder into the object store, from where each node fetches it once.

    Args:
        recipe: which encoder.
        folder: of ``encoder.onnx``, if it is one that the codebook carries.
        nodes: of the cluster.
    """
    on_gpus = any(node.gpus >= 1 for node in nodes)
    if recipe.section.source != ENCODER_FILE:
        return Team(recipe, None, 0, on_gpus)
    content = (folder / ENCODER_FILE).read_bytes()
    return Team(recipe, import_ray().put(content), len(content), on_gpus)


def start_workers(team: Team, nodes: Sequence[Node], out: Path) -> tuple[list[Worker], str]:
    """Start an encoder on each GPU or node and wait until all are loaded.

    Args:
        team: how.
        nodes: of the cluster.
        out: folder of features, which may hold some already.

    Returns:
        The workers, and backend, provider and precision of their encoders.

    Raises:
        ClusterError: if no node can have one, one cannot be loaded, or they would not all compute the same tokens.
    """
    ray = import_ray()
    workers = [start_worker(team, node) for node in nodes for _ in range(places_on(team, node))]
    if not workers:
        raise ClusterError(
            f"none of the {len(nodes)} nodes offers a CPU to read images with; start one with --num-cpus"
        )
    found = []
    deadline = time.monotonic() + LOAD_S
    for worker in workers:
        try:
            device = ray.get(worker.loading, timeout=max(0.1, deadline - time.monotonic()))
        except ray.exceptions.GetTimeoutError as error:
            what = "a GPU is not free" if team.on_gpus else "it does not answer"
            raise ClusterError(f"node {worker.node} has not loaded the encoder in {LOAD_S:.0f} s: {what}") from error
        except ray.exceptions.RayError as error:
            raise ClusterError(f"node {worker.node} cannot run an encoder: {type(error).__name__}") from error
        if isinstance(device, Failed):
            raise ClusterError(f"node {worker.node} cannot load the encoder: {device.reason}")
        worker.ready = True
        found.append(device)
    for worker, device in zip(workers, found, strict=True):
        if device != found[0]:
            raise ClusterError(
                f"node {worker.node} computes with {device}, node {workers[0].node} with {found[0]}; features must "
                "come from one kind of device: set encoder.provider and encoder.precision, or leave nodes out"
            )
    kept = (read_json(out / SETTINGS_FILE) or {}).get("device", found[0])
    if kept != found[0]:
        raise ClusterError(
            f"node {workers[0].node} computes with {found[0]}, but {out} holds features computed with {kept}; "
            "name another work folder, or remove this one"
        )
    return workers, found[0]


def make_job(images: ImageFolder, settings: FeatureSettings, readers: int, node: Node, room_bytes: float) -> SampleJob:
    """Return a job whose windows and features fit the object store.

    Each image that an encoder works on has ``batches`` batches read ahead, one that is encoded, and its features at the
    end. A batch is at most ``chunks`` chunks and all the windows that cover them.

    Args:
        images: where images lie.
        settings: what features depend on.
        readers: batches that are read at the same time, and one more waits.
        node: for the message.
        room_bytes: room for one encoder.

    Raises:
        ClusterError: if there is no room for a chunk.
    """
    pre, section = settings.preprocess, settings.encoder
    chunk_bytes = len(layout_of(settings).parts) * 3 * (pre.window_patches * section.patch_px) ** 2
    feature_bytes = settings.per_image * (2 * section.dim + 3 + 16)
    room = room_bytes / IMAGES_AT_ONCE - feature_bytes
    for batches in range(readers + 1, 0, -1):
        chunks = min(CHUNKS_PER_BATCH, int(room / ((batches + 1) * chunk_bytes)))
        if chunks >= 1:
            folder = None if images.folder is None else images.folder.resolve()
            return SampleJob(settings, folder, images.options, batches, chunks)
    needed = IMAGES_AT_ONCE * (2 * chunk_bytes + feature_bytes)
    raise ClusterError(
        f"node {node} has room for {max(room_bytes, 0) / 2**20:.0f} MiB of an encoder's windows and features in its "
        f"object store, and {needed / 2**20:.0f} MiB are needed; start it with a larger --object-store-memory"
    )


def start_worker(team: Team, node: Node) -> Worker:
    """Start an encoder on a node; it takes a GPU, or no CPU: those are for the tasks that read."""
    ray = import_ray()
    actor_class = ray.remote(num_cpus=0, num_gpus=int(team.on_gpus), max_concurrency=IMAGES_AT_ONCE)(NodeEncoder)
    actor = actor_class.options(scheduling_strategy=on_node(node)).remote()
    return Worker(node, actor, actor.load.remote(team.recipe, team.onnx))


def places_on(team: Team, node: Node) -> int:
    """Return how many encoders a node can have: one for each GPU, or one; none where nothing could read."""
    if node.cpus < 1:
        return 0
    return int(node.gpus) if team.on_gpus else 1


def store_bytes() -> dict[str, float]:
    """Return the size of each node's object store."""
    return {node["NodeID"]: float(node["Resources"].get("object_store_memory", 0)) for node in import_ray().nodes()}

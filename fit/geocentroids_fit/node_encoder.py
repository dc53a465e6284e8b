"""What runs on the nodes of a cluster while features are computed: an encoder, and tasks that read windows for it.

Pixels go from the tasks to the encoder of the same node through that node's object store, and nowhere else.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from geocentroids_fit.config import EncoderConfig
from geocentroids_fit.encoders import load_described
from geocentroids_fit.images import ImageFolder
from geocentroids_fit.node_reader import node_remote, read_on_node, without_remote
from geocentroids_fit.pack import draft_codebook
from geocentroids_fit.ray_nodes import fit_version
from geocentroids_fit.reading import Batch, ReadBatch, Unreadable
from geocentroids_fit.shards import Features, FeatureSettings
from geocentroids_fit.stream import FeatureStream, ReadingAhead, layout_of
from geocentroids_tiler.codebook import ENCODER_FILE, EncoderSection, PreprocessSection
from geocentroids_tiler.distributed import code_version, import_ray
from geocentroids_tiler.encoder import Encoder
from geocentroids_tiler.errors import ClusterError, GeocentroidsError
from geocentroids_tiler.grid import Bounds
from geocentroids_tiler.source import Dataset, ReadOptions

IMAGES_AT_ONCE = 2
"""Images that an encoder works on, so that it has windows of one while the other is opened and read."""
READ_RETRIES = 2
"""How often a batch is read again after the process that read it ended."""


@dataclass(frozen=True)
class EncoderRecipe:
    """Which encoder a node loads.

    Attributes:
        section: as the manifest describes it.
        preprocess: windows and normalising.
        config: what to run it on.
        code: version of our packages where the features are asked for; a node that joins later may have another.
    """

    section: EncoderSection
    preprocess: PreprocessSection
    config: EncoderConfig
    code: tuple[str, str]


@dataclass(frozen=True)
class SampleJob:
    """What is the same for all images of an encoder.

    Attributes:
        settings: what features depend on.
        folder: where local images lie.
        options: how bands become RGB.
        batches: batches read ahead for an image.
        chunks: chunks of a batch.
    """

    settings: FeatureSettings
    folder: Path | None
    options: ReadOptions
    batches: int
    chunks: int


@dataclass(frozen=True)
class Sampled:
    """The features of an image.

    Attributes:
        identity: of the image that was read.
        bounds: west, south, east, north of it in degrees.
        features: the features.
        encoding_s: seconds in which the encoder was given windows of it.
    """

    identity: str
    bounds: Bounds
    features: Features
    encoding_s: float


@dataclass(frozen=True)
class LeftOut:
    """An image that cannot be used, and why, in the words of a run without a cluster."""

    reason: str


@dataclass(frozen=True)
class Unseen:
    """A local image that this node does not see as the machine that asked does; ``found`` says what it sees."""

    found: str


@dataclass(frozen=True)
class Failed:
    """Something that ends the run: a sentence for the user."""

    reason: str


@dataclass(frozen=True)
class ReaderLost:
    """Processes that read windows of the image ended again and again."""

    reason: str


Outcome = Sampled | LeftOut | Unseen | Failed | ReaderLost


class NodeEncoder:
    """An encoder on a node, as a Ray actor whose calls run in ``IMAGES_AT_ONCE`` threads."""

    def __init__(self) -> None:
        self._behind = ThreadPoolExecutor(1, "geocentroids-blend")
        self._turn = threading.Lock()
        self._encoder: Encoder | None = None

    def load(self, recipe: EncoderRecipe, onnx: bytes | None) -> str | Failed:
        """Load the encoder and return its backend, provider and precision.

        Args:
            recipe: which.
            onnx: content of ``encoder.onnx``, whose SHA-256 is in the recipe; None: the encoder is found by its name.
        """
        if own_code() != recipe.code:
            return Failed(f"it runs geocentroids-tiler and geocentroids-fit {own_code()}, not {recipe.code}")
        with TemporaryDirectory(prefix="geocentroids-") as folder:
            if onnx is not None:
                (Path(folder) / ENCODER_FILE).write_bytes(onnx)
            try:
                self._encoder = load_described(recipe.section, recipe.preprocess, Path(folder), recipe.config)
            except GeocentroidsError as error:
                return Failed(str(error))
        return device_of(self._encoder)

    def sample(self, name: str, identity: str | None, job: SampleJob) -> Outcome:
        """Compute the features of an image.

        Args:
            name: of the image.
            identity: of a local image, as the machine that asks sees it; None: the image is remote.
            job: what is the same for all images.
        """
        ray = import_ray()
        if self._encoder is None:
            raise ClusterError("an image was sent to a node before its encoder was loaded")
        images = ImageFolder(job.folder, (name,), job.options, None if identity else node_remote())
        try:
            if identity is not None and (found := _identity(images, name)) != identity:
                return Unseen(found or "nothing")
            dataset = images.open(name, draft_codebook(job.settings))
        except GeocentroidsError as error:
            return LeftOut(str(error))
        outcomes = _Outcomes()
        reading = ReadingAhead(self._reader(job), job.batches, job.chunks)
        stream = FeatureStream(self._encoder, job.settings, reading, self._behind, outcomes, self._turn)
        try:
            stream.run([(name, dataset)])
        except GeocentroidsError as error:
            return Failed(str(error))
        except ray.exceptions.RayTaskError:
            raise  # reading raised what it should not; that it cannot read is no error of the task
        except ray.exceptions.RayError as error:
            return ReaderLost(type(error).__name__)
        if outcomes.features is None:
            return LeftOut(outcomes.reason)
        return Sampled(dataset.identity, dataset.geographic_bounds, outcomes.features, stream.encoding_s)

    def _reader(self, job: SampleJob) -> Any:
        """Return what begins to read a batch in a process of this node."""
        ray = import_ray()
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        task = ray.remote(num_cpus=1, max_retries=READ_RETRIES, scheduling_strategy=here)(read_on_node)
        layout, patch_px = layout_of(job.settings), job.settings.encoder.patch_px

        def read(batch: Batch) -> Future[ReadBatch | Unreadable]:
            found: Future[ReadBatch | Unreadable] = task.remote(without_remote(batch), layout, patch_px).future()
            return found

        return read


class _Outcomes:
    """Keeps what becomes of one image; see ``Sink``."""

    def __init__(self) -> None:
        self.features: Features | None = None
        self.reason = ""

    def finish(self, name: str, dataset: Dataset, features: Features) -> None:
        self.features = features

    def skip(self, name: str, reason: str) -> None:
        self.reason = reason

    def advance(self, features: int, *, expected: bool = False) -> None:
        """Do nothing: progress is shown of whole images."""


def own_code() -> tuple[str, str]:
    """Return the versions of our packages that this process runs."""
    return code_version(), fit_version()


def device_of(encoder: Encoder) -> str:
    """Return backend, provider and precision of an encoder."""
    info = encoder.info
    return f"{info.backend}/{info.provider}/{info.precision}"


def _identity(images: ImageFolder, name: str) -> str | None:
    try:
        return images.identity(name)
    except GeocentroidsError:
        return None

"""A fit under way: what is to be done, where results are kept, how to tell of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from geocentroids_fit.clusters import Clusters
from geocentroids_fit.config import FitConfig
from geocentroids_fit.exemplars import ImageSource, source_of
from geocentroids_fit.images import ImageFolder, list_images
from geocentroids_fit.kept import Kept, load_kept
from geocentroids_tiler.errors import InputError
from geocentroids_tiler.settings import load_settings
from geocentroids_tiler.source import ReadOptions, Remote, open_remote


@dataclass(frozen=True)
class Fit:
    """A fit under way: what is to be done, where results are kept, and how to tell of it.

    Attributes:
        config: what to do.
        say: told in one line what begins or was found.
        progress: whether progress bars are drawn.
        overwrite: whether a codebook that is there already is replaced.
        ray: address of the Ray cluster that extracts and clusters; None: this machine does. Results are the same.
    """

    config: FitConfig
    say: Callable[[str], None]
    progress: bool = True
    overwrite: bool = False
    ray: str | None = None

    @property
    def prepared(self) -> Path:
        """Folder of prepared images."""
        return self.config.workspace / "prepared"

    @property
    def features(self) -> Path:
        """Folder of features."""
        return self.config.workspace / "features"

    @property
    def encoder(self) -> Path:
        """Folder of the exported encoder."""
        return self.config.workspace / "encoder"

    @property
    def results(self) -> Path:
        """Folder of clusters, colours and tree."""
        return self.config.workspace / "results"

    @property
    def exemplars(self) -> Path:
        """Folder of exemplars."""
        return self.config.workspace / "exemplars"

    @property
    def report(self) -> Path:
        """Folder of the report."""
        return self.config.workspace / "report"

    def source(self, image: str) -> ImageSource:
        """Return where an image comes from."""
        rules = [(rule.match, ImageSource(rule.licence, rule.attribution, rule.url)) for rule in self.config.sources]
        return source_of(image, rules)

    def images(self) -> ImageFolder:
        """Return the images to fit on: the prepared ones if that is asked for.

        Raises:
            InputError: if there are none.
        """
        images = self.config.images
        if images.prepare:
            return ImageFolder(self.prepared, (*list_images(self.prepared), *images.urls), remote=_remote(images.urls))
        listed = list_images(images.folder, images.exclude) if images.folder is not None else []
        if not listed and not images.urls:
            raise InputError("no images are named; name a folder of GeoTIFFs, or urls in the configuration")
        options = ReadOptions(images.bidx, images.rescale)
        return ImageFolder(images.folder, (*listed, *images.urls), options, _remote(images.urls))

    def clusters(self) -> tuple[Clusters, Kept]:
        """Return the clusters, and the same as they are kept.

        Raises:
            InputError: if they are not there yet, or broken.
        """
        kept = load_kept(self.results, "cluster")
        return clusters_of(kept), kept

    def say_skipped(self, skipped: Iterable[tuple[str, str]]) -> None:
        """Tell which images are left out, and why."""
        for name, reason in skipped:
            self.say(f"  left out: {name}: {reason}")


def clusters_of(kept: Kept) -> Clusters:
    """Return kept clusters as such."""
    return Clusters(**kept.arrays, record=kept.record)


def _remote(urls: Sequence[str]) -> Remote | None:
    """Return what opens these URLs, as the ``GEOCENTROIDS_SOURCE_*`` variables allow it; None if there are none."""
    return open_remote(load_settings()) if urls else None

"""What an extraction has finished, what it left out and what is to do; images become shards as they are finished."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from geocentroids_fit.files import read_json, write_json
from geocentroids_fit.images import ImageFolder, ahead, in_pool
from geocentroids_fit.shards import (
    MANIFEST_FILE,
    SHARDS_DIR,
    FeatureManifest,
    Features,
    FeatureSettings,
    FeatureStore,
    ShardRecord,
    SkippedImage,
    finished_shard,
    write_shard,
)
from geocentroids_tiler.errors import GeocentroidsError, InputError
from geocentroids_tiler.grid import Bounds
from geocentroids_tiler.source import Dataset

SETTINGS_FILE = "settings.json"


class Ledger:
    """The books of one extraction: it knows each image, and alone writes to the folder of features.

    Attributes:
        pending: images to do.
        computed: features computed by this run.
        reused: images whose features were there already.
    """

    def __init__(self, images: ImageFolder, settings: FeatureSettings, out: Path) -> None:
        """Begin, or go on with what is there.

        Raises:
            InputError: if ``out`` holds features of other settings.
        """
        _check_settings(out, settings)
        self._images, self._settings, self._out = images, settings, out
        self._records: dict[str, ShardRecord] = {}
        self._skipped: dict[str, str] = {}
        self._bar: tqdm[NoReturn] | None = None
        self.pending: list[str] = []
        self.computed = self.reused = 0

    def find_finished(self, pool: Executor) -> None:
        """Sort images into those with a shard, those that are not there, and those to do."""
        for name, found in ahead(in_pool(pool, self._finished), self._images.names, 64):
            try:
                record = found.result()
            except GeocentroidsError as error:
                self.skip(name, str(error))
                continue
            if record is None:
                self.pending.append(name)
            else:
                self._records[name] = record
        self.reused = len(self._records)

    @contextmanager
    def bar(self, shown: bool) -> Iterator[None]:
        """Draw a progress bar for the length of a ``with`` block, if it is wanted."""
        expected = len(self.pending) * self._settings.per_image
        with tqdm(total=expected, unit="feature", disable=not shown, smoothing=0.1) as self._bar:
            yield

    def finish(self, name: str, dataset: Dataset, features: Features) -> None:
        """Write the shard of an image; see ``Sink``."""
        self.write(name, dataset.identity, dataset.geographic_bounds, features)

    def write(self, name: str, identity: str, bounds: Bounds, features: Features) -> None:
        """Write the shard of an image.

        Raises:
            InputError: if there is no room.
        """
        self._records[name] = write_shard(self._out / SHARDS_DIR, name, identity, features, bounds)
        self.computed += len(features)

    def skip(self, name: str, reason: str) -> None:
        """Leave an image out."""
        self._skipped[name] = reason

    def advance(self, features: int, *, expected: bool = False) -> None:
        """Move the bar; with ``expected``, features that an image turned out not to have are not waited for either."""
        if self._bar is None:
            return
        if expected:
            self._bar.total = (self._bar.total or 0) + features
        self._bar.update(features)

    def close(self) -> FeatureStore:
        """Write the manifest and return the features.

        Raises:
            InputError: if no patch has data.
        """
        names, records, skipped = self._images.names, self._records, self._skipped
        manifest = FeatureManifest(
            settings=self._settings,
            images=tuple(records[name] for name in names if name in records),
            skipped=tuple(SkippedImage(image=name, reason=skipped[name]) for name in names if name in skipped),
        )
        store = FeatureStore(self._out, manifest)
        if not len(store):
            reasons = "; ".join(f"{image.image}: {image.reason}" for image in manifest.skipped[:3])
            raise InputError(
                f"no patch of the {len(names)} images has data; there is nothing to fit"
                + (f" ({reasons})" if reasons else "")
            )
        write_json(self._out / MANIFEST_FILE, manifest.model_dump(mode="json"))
        return store

    def _finished(self, name: str) -> ShardRecord | None:
        return finished_shard(self._out / SHARDS_DIR, name, self._images.identity(name))


def _check_settings(out: Path, settings: FeatureSettings) -> None:
    """Raise InputError if a directory holds features made in another way; else note how they are made."""
    found, wanted = read_json(out / SETTINGS_FILE), settings.model_dump(mode="json")
    if found is None:
        write_json(out / SETTINGS_FILE, wanted)
    elif found != wanted:
        changed = ", ".join(key for key in wanted if found.get(key) != wanted[key])
        raise InputError(
            f"{out} holds features made with another {changed}; name another work folder, or remove this one"
        )

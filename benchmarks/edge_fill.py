"""How to fill pixels that are no data: labels near a cut edge against labels of the uncut image, as they are served.

Regions of real images are cut along random star-shaped polygons, half of them kept inside and half outside of the
polygon. All windows of a region see the same cut; each is filled, encoded, blended with its neighbours and assigned as
the server does it. For each way of filling, the share of patches within three patches of the cut that keep their
class is printed, for all classes and for the merge tree cut into 24, and by distance to the cut: 1 touches it.

    python benchmarks/edge_fill.py --images FOLDER
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy.ndimage import distance_transform_cdt, distance_transform_edt

from geocentroids_tiler.encoder import Assigner
from geocentroids_tiler.grid import ChunkIndex, PatchRange, window_patches_of
from geocentroids_tiler.labels.engine import LabelEngine
from geocentroids_tiler.labels.service import Service
from geocentroids_tiler.settings import Settings
from geocentroids_tiler.source import Dataset, PatchPixels, ReadOptions, labelled_patches, read_patches
from geocentroids_tiler.source.fill import fill_invalid

IMAGES = (
    "south_america/uruguay_business_park.tif",
    "south_america/bolivia_river_town.tif",
    "manila_river.tif",
    "europe/netherlands_epsg28992.tif",
)
REGION_CHUNKS = 2
"""Chunks a side of a region."""
NEAR_PATCHES = 3
CORNERS = 16
"""Of a polygon."""
REACH = 0.6
"""How far from a polygon's middle a corner may be, in sides of a region: a little beyond its border."""
MERGED = 24
Pixels = NDArray[np.uint8]
Mask = NDArray[np.bool_]


def black(pixels: Pixels, valid: Mask) -> Pixels:
    """Leave nothing but black."""
    return np.where(valid[..., None], pixels, np.uint8(0))


def mean(pixels: Pixels, valid: Mask) -> Pixels:
    """Fill with the mean colour of the window."""
    return np.where(valid[..., None], pixels, pixels[valid].mean(axis=0).astype(np.uint8))


def noise(pixels: Pixels, valid: Mask) -> Pixels:
    """Fill with pixels drawn from the window at random."""
    known = pixels[valid]
    drawn = known[np.random.default_rng(0).integers(0, len(known), valid.shape)]
    return np.where(valid[..., None], pixels, drawn)


def nearest_edge(pixels: Pixels, valid: Mask) -> Pixels:
    """Fill with the nearest pixel that is data."""
    row, col = distance_transform_edt(~valid, return_distances=False, return_indices=True)
    return np.asarray(pixels[row, col])


def smooth(pixels: Pixels, valid: Mask) -> Pixels:
    """Fill with means of ever larger squares around a pixel, the smallest that hold data: pull-push.

    Source: Gortler et al., "The Lumigraph", SIGGRAPH 1996, section 3.4.
    """
    weight = valid[..., None].astype(np.float32)
    filled = _pull_push(pixels * weight, weight)
    return np.where(valid[..., None], pixels, np.rint(filled).clip(0, 255).astype(np.uint8))


def _pull_push(total: NDArray[np.float32], weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return colours of shape (H, W, 3) of their sums (H, W, 3) and weights (H, W, 1) from 0 to 1."""
    own = np.asarray(total / np.maximum(weight, np.float32(1e-6)), np.float32)
    height, width = weight.shape[:2]
    if weight.min() >= 1 or max(height, width) == 1:
        return own
    even = ((0, height % 2), (0, width % 2), (0, 0))
    shape = (height + height % 2) // 2, 2, (width + width % 2) // 2, 2, -1
    coarse_total, coarse = (np.pad(x, even).reshape(shape).sum(axis=(1, 3)) for x in (total, weight))
    full = np.maximum(coarse, 1)  # one pixel of data makes its square known
    below = _pull_push(coarse_total / full, coarse / full)
    return weight * own + (np.float32(1) - weight) * _twice(below)[:height, :width]


def _twice(image: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return an image of shape (H, W, 3) at twice its size, interpolated linearly."""
    for axis in (0, 1):
        image = np.moveaxis(image, axis, 0)
        before, after = np.concatenate([image[:1], image[:-1]]), np.concatenate([image[1:], image[-1:]])
        pair = np.stack([0.75 * image + 0.25 * before, 0.75 * image + 0.25 * after], axis=1, dtype=np.float32)
        image = np.moveaxis(pair.reshape(-1, *image.shape[1:]), 0, axis)
    return image


FILLS: dict[str, Callable[[Pixels, Mask], Pixels]] = {
    "black": black,
    "mean": mean,
    "random": noise,
    "mirror": fill_invalid,
    "nearest": nearest_edge,
    "smooth": smooth,
}


@dataclass(frozen=True)
class Region:
    """A square of chunks with everything that their windows see.

    Attributes:
        patches: its patches.
        around: the patches of all its windows.
        read: pixels of ``around``.
    """

    patches: PatchRange
    around: PatchRange
    read: PatchPixels


@dataclass(frozen=True)
class Kept:
    """Patches near cuts and how many of them keep their class, by distance to the cut.

    Attributes:
        patches: of shape (NEAR_PATCHES,).
        label: those with the same label, of the same shape.
        merged: those with the same merged class, of the same shape.
    """

    patches: NDArray[np.int64]
    label: NDArray[np.int64]
    merged: NDArray[np.int64]


class Labeller:
    """Labels regions by the served way: windows are encoded, blended and assigned."""

    def __init__(self, engine: LabelEngine) -> None:
        self.layout, self._encoder = engine.layout, engine.labeller.encoder
        codebook = engine.codebook
        self.patch_px = codebook.manifest.encoder.patch_px
        self._assigner: Assigner = self._encoder.assigner(
            codebook.centroids.astype(np.float32), codebook.manifest.assignment.metric, self.layout
        )

    @property
    def windows(self) -> int:
        """Windows of a region."""
        return (REGION_CHUNKS + self.layout.overlap - 1) ** 2

    def region(self, dataset: Dataset, first: ChunkIndex) -> Region:
        """Read the region whose first chunk is given."""
        n, s, m = self.layout.overlap, self.layout.stride_patches, self.layout.margin_patches
        start = window_patches_of(ChunkIndex(first.row - n + 1, first.col - n + 1), self.layout.window_patches, m, s)
        end = window_patches_of(
            ChunkIndex(first.row + REGION_CHUNKS - 1, first.col + REGION_CHUNKS - 1), self.layout.window_patches, m, s
        )
        around = PatchRange(start.row_start, end.row_stop, start.col_start, end.col_stop)
        side = REGION_CHUNKS * s
        row, col = first.row * s, first.col * s
        patches = PatchRange(row, row + side, col, col + side)
        return Region(patches, around, read_patches(dataset, [around], self.patch_px)[0])

    def labels(self, region: Region, valid: Mask, fill: Callable[[Pixels, Mask], Pixels]) -> NDArray[np.uint16]:
        """Label a region, each of its windows filled by itself.

        Args:
            region: the region.
            valid: pixels of ``region.around`` that are data.
            fill: fills the others.

        Returns:
            Of shape ``region.patches.shape``.
        """
        s = self.layout.stride_patches
        chunks = list(region.patches.chunks(s))
        windows = list(dict.fromkeys(window for chunk in chunks for window in self.layout.windows_of(chunk)))
        pixels = [self._filled(region, window, valid, fill) for window in windows]
        tokens = dict(zip(windows, self._encoder.encode(pixels), strict=True))
        labels, _ = self._assigner.assign([[tokens[w] for w in self.layout.windows_of(chunk)] for chunk in chunks])
        n = REGION_CHUNKS
        return labels.reshape(n, n, s, s).transpose(0, 2, 1, 3).reshape(n * s, n * s)

    def _filled(
        self, region: Region, window: ChunkIndex, valid: Mask, fill: Callable[[Pixels, Mask], Pixels]
    ) -> Pixels:
        layout, n = self.layout, self.patch_px
        patches = window_patches_of(window, layout.window_patches, layout.margin_patches, layout.stride_patches)
        rows, cols = patches.within(region.around)
        at = slice(rows.start * n, rows.stop * n), slice(cols.start * n, cols.stop * n)
        pixels, known = region.read.pixels[at], valid[at]
        if known.all() or not known.any():
            return np.ascontiguousarray(pixels if known.all() else np.zeros_like(pixels))
        return fill(pixels, known)


def random_cut(rng: np.random.Generator, size: int, reach: float) -> Mask:
    """Return the inside or the outside of a star-shaped polygon about the middle of a square.

    Args:
        rng: draws it.
        size: pixels a side of the square.
        reach: how far from its middle, in pixels, a corner may be.

    Returns:
        Of shape (size, size), True on what is kept.
    """
    centre = size / 2 + rng.uniform(-0.25, 0.25, 2) * reach
    angle = 2 * np.pi * (np.arange(CORNERS) + rng.uniform(0.1, 0.9, CORNERS)) / CORNERS
    radius = rng.uniform(0.3, 1.0, CORNERS) * reach
    points = centre + radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)  # (CORNERS, 2)
    image = Image.new("1", (size, size))
    ImageDraw.Draw(image).polygon([(float(x), float(y)) for x, y in points], fill=1)
    inside = np.asarray(image, bool)
    return inside if rng.random() < 0.5 else ~inside


def regions_of(dataset: Dataset, labeller: Labeller, count: int, rng: np.random.Generator) -> Iterator[Region]:
    """Yield random regions of an image whose own patches all have data; their margins may reach beyond the image."""
    s, n = labeller.layout.stride_patches, REGION_CHUNKS
    whole = dataset.footprint
    firsts = [
        first
        for first in whole.chunks(s)
        if (patches := PatchRange(first.row * s, (first.row + n) * s, first.col * s, (first.col + n) * s))
        == patches.intersect(whole)
    ]
    found = 0
    for _ in range(4 * count):  # some lie on a collar
        if found == count or not firsts:
            return
        region = labeller.region(dataset, firsts[rng.integers(len(firsts))])
        if labelled_patches(region.read.valid, labeller.patch_px)[region.patches.within(region.around)].all():
            found += 1
            yield region


def compare(
    labeller: Labeller, region: Region, cut: Mask, classes: NDArray[np.uint16], fills: Sequence[str]
) -> dict[str, Kept]:
    """Cut a region, label it with each filling and compare with the uncut one.

    Args:
        labeller: labels.
        region: the region.
        cut: pixels of ``region.around`` that are kept.
        classes: merged class of each label, of shape (K,).
        fills: names of fillings.
    """
    valid = region.read.valid & cut
    inside = region.patches.within(region.around)
    labelled = labelled_patches(valid, labeller.patch_px)
    # Beyond the edge of the image there is no data in either: only what the cut took counts as a cut.
    taken = labelled_patches(region.read.valid, labeller.patch_px) & ~labelled
    if not taken.any() or not labelled[inside].any():
        return {}
    distance = distance_transform_cdt(~taken, "chessboard")[inside]
    whole = labeller.labels(region, region.read.valid, fill_invalid)
    near = [np.asarray(labelled[inside] & (distance == d)) for d in range(1, NEAR_PATCHES + 1)]
    result = {}
    for name in fills:
        found = labeller.labels(region, valid, FILLS[name])
        same, merged = found == whole, classes[found] == classes[whole]
        result[name] = Kept(
            *(np.array([int(hits[at].sum()) for at in near]) for hits in (np.ones_like(same), same, merged))
        )
    return result


def report(kept: dict[str, list[Kept]]) -> None:
    """Print the table."""
    steps = [str(d) for d in range(1, NEAR_PATCHES + 1)]
    print(f"{'fill':8s} {'same label':>10s} {'same of 24':>10s}   label at {'':2s}class at")
    print(f"{'':30s} " + " ".join(f"{d:>6s}" for d in steps) + "  " + " ".join(f"{d:>6s}" for d in steps))
    for name, rows in kept.items():
        patches, label, merged = (
            np.sum([getattr(row, key) for row in rows], axis=0) for key in ("patches", "label", "merged")
        )
        by_distance = "  ".join(" ".join(f"{share:6.3f}" for share in hits / patches) for hits in (label, merged))
        print(
            f"{name:8s} {label.sum() / patches.sum():10.3f} {merged.sum() / patches.sum():10.3f} {by_distance}",
            flush=True,
        )


def main() -> None:
    """Cut regions of each image and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder with the test imagery")
    parser.add_argument("--codebook", default="nano")
    parser.add_argument("--windows", type=int, default=90, help="windows per image, about")
    arguments = parser.parse_args()
    start = time.perf_counter()
    service = Service(Settings(root=arguments.images, codebook=arguments.codebook))
    codebook = service.codebook(None)
    labeller = Labeller(service.engine(codebook).result())
    classes, rng = codebook.classes(MERGED).lookup, np.random.default_rng(1)
    reach = REACH * REGION_CHUNKS * labeller.layout.stride_patches * labeller.patch_px
    kept: dict[str, list[Kept]] = {name: [] for name in FILLS}
    for image in IMAGES:
        dataset = service.dataset(image, ReadOptions(), codebook).result()
        for region in regions_of(dataset, labeller, max(1, arguments.windows // labeller.windows), rng):
            cut = random_cut(rng, len(region.read.pixels), reach)
            for name, row in compare(labeller, region, cut, classes, list(FILLS)).items():
                kept[name].append(row)
    patches = int(sum(row.patches.sum() for row in kept["mirror"]))
    if not patches:
        raise SystemExit("no region of the images is whole and has a cut through it; nothing was compared")
    print(
        f"codebook {codebook.name}, {len(kept['mirror'])} cut regions of {len(IMAGES)} images, {patches} patches near"
    )
    report(kept)
    print(f"{time.perf_counter() - start:.0f} s in all")
    service.close()


if __name__ == "__main__":
    main()

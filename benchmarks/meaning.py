"""Do the classes mean something? Features of patches against land cover that no feature and no cluster was fitted on.

    python benchmarks/meaning.py --images IMAGERY --encoder start=DIR --codebook nano=nano --cache DIR

Compared are hand-made features (``colour``: mean and deviation of R, G, B; ``texture``: a bank of filters), the tokens
of encoders, blended as they are served, and the labels of finished codebooks. Features are clustered with the K-Means
of the fit package on up to 4,000 random patches of each image (not Zurich, not Kampala; the scenes of oam_buildings
are fitted on without their masks): hand-made ones z-scored by squared distance, tokens by cosine. Codebooks keep
their own centroids. All are scored on the same patches, and a class is given the land cover it is met with most.

A row is a feature and a number of classes: K, or ``512>24``, where Ward's method merged 512 centroids into 24 (the
tree of a codebook; of others one of their centroids). A cell is the mean over the seeds of K-Means and, after the ±,
their standard deviation (population), in percent. ``one class`` knows nothing: what always saying the commonest gives.

    zurich, oam  Chessboard of 12 patches, the map of classes to land cover made on one colour and scored on the other,
                 both ways, one map for the whole set: overall accuracy (OA), mean F1 of the covers, and normalised
                 mutual information (NMI) of classes and covers, which takes no map. Zurich has eight covers, oam two.
    mean         The unweighted mean of these two.
    building     Both sets together, each patch a building or not: one map made on one colour of both chessboards and
                 scored on the other; patches weigh the same, so OA is the patch-weighted mean over the sets. NMI of
                 classes and building or not.
    z>o, o>z     A map of building or not made on all of one set and scored on all of the other.
    place        oam_buildings, each place with the map of the other places.
    cons         Consistency on oam_buildings: OA with one map for all images / OA with a map for each, chessboard.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from geocentroids_fit.blocks import Rows
from geocentroids_fit.cluster import Clustering, kmeans
from geocentroids_fit.config import EncoderConfig, WindowsConfig
from geocentroids_fit.encoders import describe_encoder, load_described
from geocentroids_fit.evaluate.landcover import UNKNOWN, Sample, Score, compare, cover_map, folds_of, score_of
from geocentroids_fit.evaluate.masks import read_cover
from geocentroids_fit.files import digest_of
from geocentroids_fit.images import ImageFolder, list_images
from geocentroids_fit.kmeans import assign, survey
from geocentroids_fit.pretrain import texture
from geocentroids_fit.stream import blend
from geocentroids_fit.tree import ward_tree
from geocentroids_tiler.codebook import NODATA_LABEL, Codebook, Metric, cut_tree, file_sha256
from geocentroids_tiler.encoder import ChunkLayout, Encoder
from geocentroids_tiler.errors import InputError
from geocentroids_tiler.grid import ChunkIndex, PatchRange
from geocentroids_tiler.hub import find_codebook
from geocentroids_tiler.labels.engine import LabelEngine
from geocentroids_tiler.labels.service import load_codebook_encoder, open_engine
from geocentroids_tiler.settings import load_settings
from geocentroids_tiler.source import Dataset, PatchPixels, labelled_patches, read_patches, read_windows

PATCH_PX = 14
GRID_CODEBOOK = "nano"
"""Images are opened with it: its gsd and patches are those of all features here."""
NOT_FITTED = ("*/mask/*", "zurich_summer/*", "kampala_web_mercator_7cm.tif")
ZURICH, OAM = "zurich_summer", "oam_buildings"
BUILDING = {ZURICH: 2, OAM: 1}
"""The value of a set's masks that is a building."""
IGNORE = (255,)
SEED = 0
"""Of the random patches that are fitted on."""
MERGED_K, CLASSES = 512, 24
BLOCK_PATCHES, CONTEXT_PATCHES = 32, 4
"""Hand-made features are computed for blocks of patches, with this much ground around them."""

Array = NDArray[Any]
Compute = Callable[["Picked"], Array]


@dataclass(frozen=True)
class Picked:
    """The patches of an image that are fitted or scored on.

    Attributes:
        name: of the image.
        set_name: of the set it is scored in, or "".
        dataset: the image.
        patches: numbers of the patches in the footprint, row by row, of shape (N,), int64, ascending.
        fitted: whether they are fitted on, of shape (N,), bool.
        cover: their land cover, of shape (N,), int64; ``UNKNOWN`` where they are not scored.
        folds: the parts they are in, each of shape (N,), bool.
    """

    name: str
    set_name: str
    dataset: Dataset
    patches: NDArray[np.int64]
    fitted: NDArray[np.bool_]
    cover: NDArray[np.int64]
    folds: Mapping[str, NDArray[np.bool_]]

    @property
    def scored(self) -> NDArray[np.bool_]:
        """Whether patches are scored, of shape (N,)."""
        return np.asarray(self.cover != UNKNOWN)

    @property
    def digest(self) -> str:
        """Changes with the image and the choice of patches."""
        return digest_of([self.name, self.dataset.identity, hashlib.sha256(self.patches.tobytes()).hexdigest()])


class Feature(Protocol):
    """Something that is known of patches."""

    @property
    def name(self) -> str:
        """Name in the table."""
        ...

    @property
    def key(self) -> list[object]:
        """All that its values depend on beside the image."""
        ...

    @property
    def metric(self) -> Metric | None:
        """How it is clustered; None: its values are labels already."""
        ...

    def opened(self) -> Any:
        """Return a context whose value computes an array of shape (N, D), or (N,) for labels, for an image."""
        ...


@dataclass(frozen=True)
class HandMade:
    """A feature computed from pixels.

    Attributes:
        name: in the table.
        bank: makes (B, F, H // 14, W // 14) of pixels (B, 3, H, W), float32, in [0, 1].
        key: changes with what the bank computes.
    """

    name: str
    bank: Callable[[torch.Tensor], torch.Tensor]
    key: list[object]
    metric: Metric | None = "l2"

    @contextmanager
    def opened(self) -> Iterator[Compute]:
        """Yield what computes an image's features."""
        yield self._compute

    def _compute(self, image: Picked) -> Array:
        footprint = image.dataset.footprint
        values: Array = np.empty((0, 0), np.float32)
        for own, around, read in _blocks(image.dataset, CONTEXT_PATCHES):
            pixels = torch.from_numpy(read.pixels.copy()).permute(2, 0, 1)[None].float() / 255  # (1, 3, H, W)
            found = self.bank(pixels)[0].permute(1, 2, 0).numpy()  # (rows, cols, F)
            if not values.size:
                values = np.empty((*footprint.shape, found.shape[-1]), np.float32)
            values[own.within(footprint)] = found[own.within(around)]
        return values.reshape(-1, values.shape[-1])[image.patches]


@dataclass(frozen=True)
class Tokens:
    """Tokens of an encoder, blended as they are served.

    Attributes:
        name: in the table.
        directory: of the checkpoint.
        windows: how windows are laid.
    """

    name: str
    directory: Path
    windows: WindowsConfig
    metric: Metric | None = "cosine"

    @property
    def key(self) -> list[object]:
        """The weights and the windows."""
        return ["tokens", self._section.sha256, self.windows.preprocess.model_dump(mode="json")]

    @property
    def _config(self) -> EncoderConfig:
        return EncoderConfig(model=str(self.directory), embed=False, precision="fp32")

    @property
    def _section(self) -> Any:
        return describe_encoder(self._config, self.windows.preprocess, Path())

    @contextmanager
    def opened(self) -> Iterator[Compute]:
        """Yield what computes an image's tokens."""
        section = self._section
        if section.patch_px != PATCH_PX:
            raise InputError(f"{self.directory} has patches of {section.patch_px} px; accepted: {PATCH_PX}")
        encoder = load_described(section, self.windows.preprocess, Path(), self._config)
        try:
            yield lambda image: self._compute(encoder, image)
        finally:
            encoder.close()

    def _compute(self, encoder: Encoder, image: Picked) -> Array:
        """Encode the chunks with picked patches, a row of chunks at a time; two rows of windows share memory."""
        dataset = replace(image.dataset, preprocess=self.windows.preprocess)
        pre = self.windows.preprocess
        layout = ChunkLayout(pre.window_patches, pre.margin_patches, pre.stride_patches)
        rows, cols = _places(image)
        values = np.empty((len(image.patches), encoder.dim), np.float32)
        kept: dict[ChunkIndex, Array] = {}
        chunk_row, chunk_col = rows // layout.stride_patches, cols // layout.stride_patches
        for row in np.unique(chunk_row).tolist():
            chunks = [ChunkIndex(row, col) for col in np.unique(chunk_col[chunk_row == row]).tolist()]
            wanted = dict.fromkeys(window for chunk in chunks for window in layout.windows_of(chunk))
            kept = {window: tokens for window, tokens in kept.items() if window.row > row - layout.overlap}
            kept |= _encoded(encoder, dataset, [window for window in wanted if window not in kept])
            for chunk in chunks:
                blended = blend([kept[window] for window in layout.windows_of(chunk)], layout)  # (s, s, D)
                own = (chunk_row == row) & (chunk_col == chunk.col)
                values[own] = blended[rows[own] % layout.stride_patches, cols[own] % layout.stride_patches]
        return values


@dataclass(frozen=True)
class Served:
    """Labels of a finished codebook.

    Attributes:
        name: in the table.
        codebook: the codebook.
    """

    name: str
    codebook: Codebook
    metric: Metric | None = None

    @property
    def key(self) -> list[object]:
        """The codebook's content."""
        return ["served", self.codebook.digest]

    @contextmanager
    def opened(self) -> Iterator[Compute]:
        """Yield what computes an image's labels; one of ``len(codebook)`` stands for no label."""
        settings = load_settings()
        with open_engine(self.codebook, load_codebook_encoder(self.codebook, settings), settings) as engine:
            yield lambda image: self._compute(engine, image)

    def _compute(self, engine: LabelEngine, image: Picked) -> Array:
        dataset = replace(image.dataset, preprocess=self.codebook.manifest.preprocess)
        labels = engine.block(dataset, dataset.footprint).labels.ravel()[image.patches]
        return np.where(labels == NODATA_LABEL, np.uint16(len(self.codebook)), labels)


@dataclass(frozen=True)
class Measures:
    """What classes know of land cover; the module's docstring says what each is. All from 0 to 1 or a little above."""

    zurich_oa: float
    zurich_f1: float
    zurich_nmi: float
    oam_oa: float
    oam_f1: float
    oam_nmi: float
    mean_oa: float
    mean_f1: float
    mean_nmi: float
    building_oa: float
    building_f1: float
    building_nmi: float
    to_oam_oa: float
    to_oam_f1: float
    to_zurich_oa: float
    to_zurich_f1: float
    place_oa: float
    place_f1: float
    consistency: float


@dataclass(frozen=True)
class Result:
    """A row of the table.

    Attributes:
        feature: its name.
        classes: how many, as text.
        seeds: measures of each seed of K-Means; one for a codebook.
    """

    feature: str
    classes: str
    seeds: tuple[Measures, ...]

    @property
    def mean(self) -> dict[str, float]:
        """Mean of each measure over the seeds."""
        return {key: float(np.mean(values)) for key, values in self._values.items()}

    @property
    def std(self) -> dict[str, float]:
        """Standard deviation of each measure over the seeds."""
        return {key: float(np.std(values)) for key, values in self._values.items()}

    @property
    def _values(self) -> dict[str, list[float]]:
        return {key: [getattr(seed, key) for seed in self.seeds] for key in Measures.__dataclass_fields__}


GROUPS = {
    "zurich": ("zurich_oa", "zurich_f1", "zurich_nmi"),
    "oam": ("oam_oa", "oam_f1", "oam_nmi"),
    "mean": ("mean_oa", "mean_f1", "mean_nmi"),
    "building": ("building_oa", "building_f1", "building_nmi"),
    "z>o": ("to_oam_oa", "to_oam_f1"),
    "o>z": ("to_zurich_oa", "to_zurich_f1"),
    "place": ("place_oa", "place_f1"),
    "cons": ("consistency",),
}
"""Columns of the table."""


def colour_bank(pixels: torch.Tensor) -> torch.Tensor:
    """Return mean and standard deviation of R, G, B of each patch: (B, 6, H // 14, W // 14) of (B, 3, H, W)."""
    height, width = pixels.shape[2] // PATCH_PX, pixels.shape[3] // PATCH_PX
    patches = pixels.reshape(-1, 3, height, PATCH_PX, width, PATCH_PX)
    return torch.cat([patches.mean(dim=(3, 5)), patches.std(dim=(3, 5), correction=0)], dim=1)


def hand_made() -> list[HandMade]:
    """Return the hand-made features that there are."""
    source = file_sha256(Path(str(texture.__file__)))
    return [
        HandMade("colour", colour_bank, ["colour", 1]),
        HandMade("texture", texture.texture_bank, ["texture", source, CONTEXT_PATCHES]),
    ]


def pick(folder: ImageFolder, codebook: Codebook, per_image: int, cache: Path | None) -> list[Picked]:
    """Choose the patches of all images: random ones to fit on, those with land cover to score on."""
    fitted = set(list_images(_root(folder), NOT_FITTED))
    picked = []
    for name in folder.names:
        dataset = folder.open(name, codebook)
        path = _cache_path(cache, "labelled", digest_of([name, dataset.identity, codebook.patch_m]))
        labelled = _kept(path, partial(_labelled, dataset))
        mask = _mask_of(_root(folder), name)
        cover = np.full(labelled.shape, UNKNOWN, np.int64)
        if mask is not None:
            cover = read_cover(mask, dataset, dataset.footprint, PATCH_PX, IGNORE)
            cover[~labelled] = UNKNOWN
        chosen = np.zeros(labelled.size, bool)
        if name in fitted:
            able = np.flatnonzero(labelled)
            rng = np.random.default_rng([SEED, *name.encode()])
            chosen[rng.choice(able, min(per_image, len(able)), replace=False)] = True
        patches = np.flatnonzero(chosen | (cover.ravel() != UNKNOWN))
        folds = {split: fold.ravel()[patches] for split, fold in folds_of(labelled.shape).items()}
        set_name = name.split("/")[0] if mask is not None else ""
        picked.append(Picked(name, set_name, dataset, patches, chosen[patches], cover.ravel()[patches], folds))
    return picked


def gather(feature: Feature, images: Sequence[Picked], cache: Path | None) -> list[Array]:
    """Return a feature of the picked patches of each image, of shape (N, D), or (N,) for labels."""
    digest = digest_of(feature.key)
    paths = [_cache_path(cache, feature.name, digest_of([digest, image.digest])) for image in images]
    if all(path is not None and path.is_file() for path in paths):  # the encoder need not be loaded
        return [np.load(path, allow_pickle=False) for path in paths if path is not None]
    with feature.opened() as compute:
        return [_kept(path, partial(compute, image)) for path, image in zip(paths, images, strict=True)]


def results_of(
    feature: Feature, images: Sequence[Picked], ks: Sequence[int], seeds: int, cache: Path | None
) -> list[Result]:
    """Return the rows of a feature."""
    scored = [image for image in images if image.set_name]
    if isinstance(feature, Served):
        codebook = feature.codebook
        labels = [values[image.scored] for values, image in zip(gather(feature, scored, cache), scored, strict=True)]
        cuts = {str(len(codebook)): np.arange(len(codebook), dtype=np.uint16)}
        if codebook.tree is not None and len(codebook) > CLASSES:
            cuts[f"{len(codebook)}>{CLASSES}"] = codebook.classes(CLASSES).lookup
        # no label is a class more
        more = {text: np.append(lookup, lookup.max() + 1).astype(np.uint16) for text, lookup in cuts.items()}
        return [Result(feature.name, text, (measure(scored, labels, lookup),)) for text, lookup in more.items()]
    values = gather(feature, images, cache)
    fit = np.concatenate([own[image.fitted] for own, image in zip(values, images, strict=True)])
    score = np.concatenate([own[image.scored] for own, image in zip(values, images, strict=True)])
    if feature.metric == "l2":
        mean, std = fit.mean(axis=0, dtype=np.float64), fit.std(axis=0, dtype=np.float64)
        fit, score = (((x - mean) / np.where(std > 0, std, 1)).astype(np.float32) for x in (fit, score))
    found: dict[str, list[Measures]] = {}
    for k in ks:
        for seed in range(seeds):
            clustering = kmeans([fit], k, metric=feature.metric or "l2", seed=seed, progress=False)
            labels = np.split(_nearest(score, clustering, feature.metric or "l2"), _ends(scored))
            cuts = {str(k): np.arange(k, dtype=np.uint16)}
            if k == MERGED_K:
                tree = ward_tree(clustering.centroids, clustering.counts.clip(min=1))
                cuts[f"{k}>{CLASSES}"] = cut_tree(tree, CLASSES)
            for text, lookup in cuts.items():
                found.setdefault(text, []).append(measure(scored, labels, lookup))
    return [Result(feature.name, text, tuple(measures)) for text, measures in found.items()]


def measure(images: Sequence[Picked], labels: Sequence[Array], lookup: NDArray[np.uint16]) -> Measures:
    """Score the classes of all scored images.

    Args:
        images: the scored images of both sets.
        labels: labels of the scored patches of each, of shape (M,), uint16.
        lookup: class of each label.
    """
    n = int(lookup.max()) + 1
    samples: dict[str, list[Sample]] = {ZURICH: [], OAM: []}
    binary: dict[str, list[Sample]] = {ZURICH: [], OAM: []}
    for image, own in zip(images, labels, strict=True):
        folds = {split: fold[image.scored] for split, fold in image.folds.items()}
        sample = Sample(image.name, own, image.cover[image.scored], folds)
        samples[image.set_name].append(sample)
        building = (sample.cover == BUILDING[image.set_name]).astype(np.int64)
        binary[image.set_name].append(replace(sample, cover=building))
    zurich, oam = (_chessboard(samples[name], lookup, n) for name in (ZURICH, OAM))
    both = _chessboard([*binary[ZURICH], *binary[OAM]], lookup, n)
    to_oam = _carried(binary[ZURICH], binary[OAM], lookup, n)
    to_zurich = _carried(binary[OAM], binary[ZURICH], lookup, n)
    land = compare(samples[OAM], {n: lookup})
    cut = None if land is None else land.cuts[n]
    split = None if cut is None else cut.splits["blocks"]
    place = None if cut is None else cut.transfer
    mean = (zurich[0] + oam[0]) / 2, (zurich[1] + oam[1]) / 2, (zurich[2] + oam[2]) / 2
    consistency = np.nan if split is None or split.consistency is None else split.consistency
    return Measures(*zurich, *oam, *mean, *both, *to_oam, *to_zurich, *_pair(place), consistency)


def table(results: Sequence[Result]) -> str:
    """Return the rows as aligned text, in percent."""
    width = max(len("feature"), *(len(result.feature) for result in results))
    classes = max(len("classes"), *(len(result.classes) for result in results))
    cell = 9
    over = "".join(f" |{group:^{cell * len(keys)}s}" for group, keys in GROUPS.items())
    lines = [f"{'':{width}s} {'':{classes}s}{over}"]
    titles = "".join(" |" + "".join(f"{_title(key):>{cell}s}" for key in keys) for keys in GROUPS.values())
    lines.append(f"{'feature':{width}s} {'classes':>{classes}s}{titles}")
    for result in results:
        mean, std = result.mean, result.std
        cells = ""
        for keys in GROUPS.values():
            cells += " |"
            for key in keys:
                text = f"{100 * mean[key]:.1f}" + (f"±{100 * std[key]:.1f}" if len(result.seeds) > 1 else "    ")
                cells += f"{text:>{cell}s}"
        lines.append(f"{result.feature:{width}s} {result.classes:>{classes}s}{cells}")
    return "\n".join(line.rstrip() for line in lines)


def _title(key: str) -> str:
    return "OA/OA" if key == "consistency" else key.rsplit("_", 1)[1].upper()


def _chessboard(samples: Sequence[Sample], lookup: NDArray[np.uint16], n: int) -> tuple[float, float, float]:
    """Return overall accuracy, mean F1 and NMI of a chessboard with one map."""
    land = compare(samples, {n: lookup})
    if land is None:
        return np.nan, np.nan, np.nan
    split = land.cuts[n].splits["blocks"]
    return (*_pair(None if split is None else split.one_map), land.cuts[n].nmi)


def _carried(
    made_on: Sequence[Sample], scored_on: Sequence[Sample], lookup: NDArray[np.uint16], n: int
) -> tuple[float, float]:
    """Return overall accuracy and mean F1 of a map made on other images."""
    ids, cover = (
        [np.concatenate([getattr(sample, key) for sample in part]) for part in (made_on, scored_on)]
        for key in ("labels", "cover")
    )
    return _pair(score_of(cover_map(lookup[ids[0]], cover[0], n)[lookup[ids[1]]], cover[1]))


def _pair(score: Score | None) -> tuple[float, float]:
    return (np.nan, np.nan) if score is None else (score.overall_accuracy, score.mean_f1)


def _nearest(values: Array, clustering: Clustering, metric: Metric) -> NDArray[np.uint16]:
    """Return the nearest centroid of values of shape (M, D), of shape (M,)."""
    rows = Rows([values], torch.device("cpu"), scaled=metric == "cosine")
    spherical = metric != "l2"
    return assign(rows, clustering.centroids, survey(rows, spherical=spherical).mean, spherical=spherical).labels


def _ends(images: Sequence[Picked]) -> NDArray[np.int64]:
    """Return where the scored patches of each image but the last end among those of all."""
    return np.cumsum([image.scored.sum() for image in images])[:-1]


def _blocks(dataset: Dataset, context: int) -> Iterator[tuple[PatchRange, PatchRange, PatchPixels]]:
    """Yield an image in blocks: patches of a block, the same with context around them, and the pixels of these."""
    for index in dataset.footprint.chunks(BLOCK_PATCHES):
        own = index.patches(BLOCK_PATCHES).intersect(dataset.footprint)
        around = PatchRange(
            own.row_start - context, own.row_stop + context, own.col_start - context, own.col_stop + context
        )
        yield own, around, read_patches(dataset, [around], PATCH_PX)[0]


def _labelled(dataset: Dataset) -> NDArray[np.bool_]:
    """Return the patches of which at least half of the pixels are data, of the footprint's shape."""
    labelled = np.zeros(dataset.footprint.shape, bool)
    for own, _, read in _blocks(dataset, 0):
        labelled[own.within(dataset.footprint)] = labelled_patches(read.valid, PATCH_PX)
    return labelled


def _places(image: Picked) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return rows and columns of the picked patches on the ground grid."""
    footprint = image.dataset.footprint
    row, col = np.divmod(image.patches, footprint.shape[1])
    return row + footprint.row_start, col + footprint.col_start


def _encoded(encoder: Encoder, dataset: Dataset, windows: Sequence[ChunkIndex]) -> dict[ChunkIndex, Array]:
    """Return tokens of windows, each of shape (P, P, D)."""
    size = max(encoder.windows_at_once, 8)
    found: dict[ChunkIndex, Array] = {}
    for start in range(0, len(windows), size):
        part = windows[start : start + size]
        handles = encoder.encode([read.pixels for read in read_windows(dataset, part, PATCH_PX)])
        found |= {window: encoder.fetch(handle) for window, handle in zip(part, handles, strict=True)}
    return found


def _root(folder: ImageFolder) -> Path:
    return folder.folder or Path()


def _mask_of(root: Path, name: str) -> Path | None:
    """Return the mask of an image of the two labelled sets, or None."""
    if name == f"{ZURICH}/img.tif":
        return root / ZURICH / "mask.tif"
    if name.startswith(f"{OAM}/img/"):
        return root / name.replace("/img/", "/mask/")
    return None


def _kept(path: Path | None, make: Callable[[], Array]) -> Array:
    """Return an array from a file, or make it, and the file whole or not at all."""
    if path is not None and path.is_file():
        return np.asarray(np.load(path, allow_pickle=False))
    array = make()
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        with part.open("wb") as file:
            np.save(file, array)
        part.replace(path)
    return array


def _cache_path(cache: Path | None, name: str, digest: str) -> Path | None:
    return None if cache is None else cache / name / f"{digest[:24]}.npy"


def _named(text: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not (name and sign and value):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder with the test imagery")
    parser.add_argument("--encoder", type=_named, action="append", default=[], metavar="NAME=DIR")
    parser.add_argument("--codebook", type=_named, action="append", default=[], metavar="NAME=DIR_OR_NAME")
    parser.add_argument("--features", nargs="+", metavar="NAME", help="only these; default: all")
    parser.add_argument("--window", type=int, default=32, help="patches a side of an encoder's window")
    parser.add_argument("--margin", type=int, default=3)
    parser.add_argument("--stride", type=int, default=13)
    parser.add_argument("--per-image", type=int, default=4000, help="patches of an image that are fitted on")
    parser.add_argument("--k", type=int, nargs="+", default=[64, MERGED_K])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cache", type=Path, help="folder of features kept between runs")
    parser.add_argument("--json", type=Path, help="file for the same numbers, each seed apart")
    return parser.parse_args()


def _features(arguments: argparse.Namespace, grid: Codebook) -> list[Feature]:
    """Return the features asked for.

    Raises:
        InputError: if one is not there or its patches are not those of the others.
    """
    windows = WindowsConfig(
        window_patches=arguments.window, margin_patches=arguments.margin, stride_patches=arguments.stride
    )
    features: list[Feature] = [*hand_made()]
    features += [Tokens(name, Path(directory), windows) for name, directory in arguments.encoder]
    for name, where in arguments.codebook:
        codebook = find_codebook(where, load_settings().codebooks_dir, allow_path=True)
        if codebook.patch_m != grid.patch_m or codebook.manifest.encoder.patch_px != PATCH_PX:
            raise InputError(f"codebook {where!r} has patches of {codebook.patch_m:g} m; accepted: {grid.patch_m:g} m")
        features.append(Served(name, codebook))
    names = [feature.name for feature in features]
    wanted = names if arguments.features is None else arguments.features
    if len(set(names)) < len(names) or not set(wanted) <= set(names):
        raise InputError(f"features are {', '.join(names)}, asked for {', '.join(wanted)}; each needs one name")
    return [feature for feature in features if feature.name in wanted]


def main() -> None:
    """Print the table."""
    arguments = _arguments()
    began = time.perf_counter()

    def say(text: str) -> None:
        print(f"{time.perf_counter() - began:6.0f} s  {text}", file=sys.stderr, flush=True)

    grid = find_codebook(GRID_CODEBOOK, load_settings().codebooks_dir)
    features = _features(arguments, grid)
    names = list_images(arguments.images, ("*/mask/*", f"{ZURICH}/mask.tif", "kampala_web_mercator_7cm.tif"))
    images = pick(ImageFolder(arguments.images, tuple(names)), grid, arguments.per_image, arguments.cache)
    fitted, scored = (sum(int(getattr(image, key).sum()) for image in images) for key in ("fitted", "scored"))
    say(f"{len(images)} images: {fitted} patches to fit on, {scored} to score on")
    known = [image for image in images if image.set_name]
    nothing = [np.zeros(int(image.scored.sum()), np.uint16) for image in known]
    results = [Result("one class", "1", (measure(known, nothing, np.zeros(1, np.uint16)),))]
    for feature in features:
        results += results_of(feature, images, arguments.k, arguments.seeds, arguments.cache)
        say(f"{feature.name} done")
    print(table(results))
    if arguments.json is not None:
        rows = [
            {
                "feature": r.feature,
                "classes": r.classes,
                "mean": r.mean,
                "std": r.std,
                "seeds": list(map(asdict, r.seeds)),
            }
            for r in results
        ]
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""How much a patch's class depends on where the windows lie, for several ways of laying windows, and what it costs.

Real images are labelled twice under each scheme, the second time with windows that lie elsewhere on the same ground.
Schemes are named window/margin/stride, in patches; where the stride is less than the core, windows are blended. After
a "+", a cure that works on the tokens alone, without training: "mean" takes each window's mean token away and adds
the mean token of other images; "less r" takes the r directions out of tokens and centroids in which tokens of one
patch of other images differ most when windows move (served, it would cost nothing: new centroids do it); "whitened"
makes those differences equally large in all directions instead of taking some out (served, likewise).

    python benchmarks/windows.py --images FOLDER --codebook nano --checkpoint DIR

Columns:
    tokens    tokens encoded for a labelled patch, relative to the first scheme
    work      multiplications for a labelled patch, attention included, relative to the first scheme
    s/1000    seconds that 1,000 labelled patches take on a busy device, measured
    seam      mean OKLab difference of neighbours across borders of chunks, divided by that inside; 1: not to be seen
    moved     how far windows were moved, in patches
    dE ratio  mean OKLab difference of a patch's colours under both, divided by that of random pairs of its image
    same K    share of patches with the same label under both; "same 24", "same 8": of the tree cut into 24 and 8
    in all    effective number of labels of all images together; the next is to be read against it
    in plain  effective number of labels inside the plainest fields of 20 x 20 patches, the mean over fields
    plain sd  standard deviation of the OKLab colours inside them, the mean over fields
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_cdt

from geocentroids_fit.blocks import unit
from geocentroids_fit.evaluate.images import central_part, move_windows, moved
from geocentroids_fit.evaluate.measures import Seam, agreement, seam_along, usage_of
from geocentroids_fit.images import ImageFolder
from geocentroids_tiler.codebook import ENCODER_FILE, NODATA_LABEL, Codebook
from geocentroids_tiler.colors import srgb_to_oklab
from geocentroids_tiler.encoder import ChunkLayout, Encoder
from geocentroids_tiler.grid import PatchRange
from geocentroids_tiler.hub import find_codebook
from geocentroids_tiler.labels.engine import LabelEngine
from geocentroids_tiler.labels.service import load_codebook_encoder, open_engine
from geocentroids_tiler.settings import Settings, load_settings
from geocentroids_tiler.source import Dataset, iterate_windows, read_patches

COLLARED = "south_america/bolivia_river_town.tif"
IMAGES = ("south_america/uruguay_business_park.tif", COLLARED, "south_america/brazil_aragarcas.tif", "manila_river.tif")
WITHOUT_FIELDS = ("manila_river.tif",)
LEARNT_FROM = (
    "europe/netherlands_epsg28992.tif",
    "europe/flanders_024194_200979.tif",
    "europe/flanders_239564_167716.tif",
    "oam_buildings/img/banepa_np_00.tif",
    "oam_buildings/img/nairobi_ke_00.tif",
    "oam_buildings/img/zanzibar_tz_00.tif",
)
SIDE_PATCHES, QUICK_SIDE_PATCHES, LEARNT_SIDE_PATCHES = 130, 78, 64
"""Sides of what is measured of an image, and of what is learnt from of one."""
FIELD_PATCHES, FIELDS, FIELD_STEP, FIELDS_SHARE = 20, 8, 4, 0.25
"""Side of a plain field; how many at most in an image; where they are looked for; how much of an image they take."""
CORE_ONLY_MOVE = 5
CUTS = (24, 8)
RING_PATCHES, OWN_REACH = 3, 8
DIRECTIONS = (1, 4, 16)
WHITENING_FLOOR = 0.01
"""Share of the mean variance that is added to each direction before whitening."""
SAME_MODEL = 0.99
"""Least cosine of tokens of a codebook's encoder and of a checkpoint that is the same model (fp16, bf16: 0.9999)."""

Labels = NDArray[np.uint16]
Floats = NDArray[np.float32]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Scheme:
    """How windows are laid, in patches."""

    window: int
    margin: int
    stride: int

    def __str__(self) -> str:
        return f"{self.window}/{self.margin}/{self.stride}"

    @property
    def layout(self) -> ChunkLayout:
        """The same as the encoders take it."""
        return ChunkLayout(self.window, self.margin, self.stride)

    @property
    def move(self) -> int:
        """How far windows are moved: half of the stride, ``CORE_ONLY_MOVE`` at most where nothing is blended."""
        half = self.stride // 2
        return half if self.layout.overlap > 1 else min(CORE_ONLY_MOVE, half)


BASE = Scheme(16, 3, 10)
SCHEMES = (
    BASE,
    Scheme(16, 5, 6),
    Scheme(16, 3, 5),
    Scheme(32, 3, 26),
    Scheme(32, 6, 20),
    Scheme(32, 8, 16),
    Scheme(32, 4, 12),
    Scheme(32, 3, 13),
    Scheme(32, 0, 16),
    Scheme(48, 4, 40),
)
CURED = (BASE, Scheme(32, 3, 26), Scheme(32, 3, 13))
QUICK = (BASE, Scheme(32, 3, 26), Scheme(32, 3, 13))


@dataclass(frozen=True)
class Scene:
    """The part of an image that is measured.

    Attributes:
        dataset: the image.
        area: which patches of it.
        fields: its plain fields, as parts of arrays of shape ``area.shape``.
    """

    dataset: Dataset
    area: PatchRange
    fields: tuple[tuple[slice, slice], ...]


@dataclass(frozen=True)
class Palette:
    """What labels look like.

    Attributes:
        lab: OKLab colour of each label, of shape (K, 3).
        cuts: class of each label, of shape (K,), for each of ``CUTS``.
    """

    lab: NDArray[np.float64]
    cuts: tuple[NDArray[np.uint16], ...]


@dataclass(frozen=True)
class Pair:
    """Labels of a scene, twice.

    Attributes:
        labels: as served, of shape ``area.shape``.
        again: with windows moved, of the same shape.
    """

    labels: Labels
    again: Labels


@dataclass(frozen=True)
class Cure:
    """A change of tokens and centroids.

    Attributes:
        name: for the table.
        centred: whether each window's mean token is replaced by ``Leak.mean``.
        matrix: of shape (D, D), applied to tokens and centroids; None: they stay.
    """

    name: str
    centred: bool
    matrix: Floats | None


@dataclass(frozen=True)
class Leak:
    """How tokens of one patch differ when windows move, learnt on other images.

    Attributes:
        mean: mean token, of shape (D,).
        within: second moments of the differences of unit tokens, of shape (D, D).
    """

    mean: Floats
    within: NDArray[np.float64]


def variant(codebook: Codebook, scheme: Scheme) -> Codebook:
    """Return the codebook with windows laid otherwise."""
    pre = codebook.manifest.preprocess.model_copy(
        update={
            "window_patches": scheme.window,
            "margin_patches": scheme.margin,
            "stride_patches": scheme.stride,
        }
    )
    return replace(codebook, manifest=codebook.manifest.model_copy(update={"preprocess": pre}))


class Encoders:
    """Loads encoders of a codebook's model for any size of window, as serving loads them."""

    def __init__(self, codebook: Codebook, checkpoint: Path | None, folder: Path, settings: Settings) -> None:
        self._codebook, self._checkpoint, self._folder, self._settings = codebook, checkpoint, folder, settings
        self._own = codebook.manifest.preprocess.window_patches

    def can(self, window_patches: int) -> bool:
        """Tell whether windows of a size can be encoded."""
        return window_patches == self._own or self._checkpoint is not None or self._codebook.encoder_path is None

    def load(self, codebook: Codebook) -> Encoder:
        """Load the encoder for a variant of the codebook."""
        size = codebook.manifest.preprocess.window_patches
        if size == self._own or self._checkpoint is None:
            return load_codebook_encoder(codebook, self._settings)
        section = codebook.manifest.encoder.model_copy(update={"source": ENCODER_FILE, "sha256": None})
        embedded = replace(codebook, manifest=codebook.manifest.model_copy(update={"encoder": section}))
        return load_codebook_encoder(replace(embedded, path=self._exported(size)), self._settings)

    def check(self) -> None:
        """Raise SystemExit unless the checkpoint is the codebook's model."""
        if self._checkpoint is None or self._codebook.encoder_path is None:
            return
        section = self._codebook.manifest.encoder.model_copy(update={"sha256": None})
        loose = replace(self._codebook, manifest=self._codebook.manifest.model_copy(update={"encoder": section}))
        size = self._own * section.patch_px
        window = np.random.default_rng(0).integers(0, 255, (1, size, size, 3), np.uint8)
        tokens = []
        for book in (loose, replace(loose, path=self._exported(self._own))):
            encoder = load_codebook_encoder(book, self._settings)
            tokens.append(unit(encoder.fetch(encoder.encode(window)[0])))
            encoder.close()
        cosine = float((tokens[0] * tokens[1]).sum(axis=-1).min())
        if cosine < SAME_MODEL:
            raise SystemExit(f"{self._checkpoint} is not the model of {self._codebook.name}: cosine {cosine:.3f}")

    def _exported(self, window_patches: int) -> Path:
        """Return a folder that holds the checkpoint as ``encoder.onnx`` for a size of window."""
        from geocentroids_tiler.encoder.export import export_onnx

        folder = self._folder / str(window_patches)
        if not folder.exists():
            folder.mkdir()
            pre = self._codebook.manifest.preprocess
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the tracer
                export_onnx(
                    str(self._checkpoint),
                    folder / ENCODER_FILE,
                    window_patches=window_patches,
                    mean=pre.mean,
                    std=pre.std,
                    weights="fp16",
                    local_files_only=True,
                )
        return folder


def under(dataset: Dataset, engine: LabelEngine) -> Dataset:
    """Return an image as a variant of its codebook reads it."""
    return replace(dataset, preprocess=engine.codebook.manifest.preprocess)


def label_twice(engine: LabelEngine, scene: Scene, by: int) -> Pair:
    """Label a scene with windows as served, and with windows ``by`` patches off."""
    dataset = under(scene.dataset, engine)
    labels = engine.block(dataset, scene.area).labels
    return Pair(labels, engine.block(move_windows(dataset, by), moved(scene.area, by)).labels)


def blended_tokens(engine: LabelEngine, dataset: Dataset, area: PatchRange, centres: Sequence[Floats | None]) -> Floats:
    """Return the blended tokens of an area, once for each way to centre windows.

    Args:
        engine: lends its encoder and its layout.
        dataset: the image.
        area: which patches of it.
        centres: a token of shape (D,) that takes the place of each window's mean, or None: windows stay.

    Returns:
        Of shape (len(centres), H, W, D), float32.
    """
    layout, encoder = engine.layout, engine.labeller.encoder
    s, n, m, c = layout.stride_patches, layout.overlap, layout.margin_patches, layout.core_patches
    weights = layout.weights().reshape(n, n, s, s).transpose(0, 2, 1, 3).reshape(c, c, 1)
    result = np.zeros((len(centres), *area.shape, encoder.dim), np.float32)
    # A core reaches from its own chunk into the n - 1 chunks after it.
    reach = (n - 1) * s
    indices = list(PatchRange(area.row_start - reach, area.row_stop, area.col_start - reach, area.col_stop).chunks(s))
    patch_px = engine.codebook.manifest.encoder.patch_px
    reading = zip(indices, iterate_windows(dataset, indices, patch_px), strict=True)
    for group in batches(reading, encoder.windows_at_once):
        handles = encoder.encode([window.pixels for _, window in group])
        for (index, _), handle in zip(group, handles, strict=True):
            tokens = encoder.fetch(handle)
            core = PatchRange(index.row * s, index.row * s + c, index.col * s, index.col * s + c)
            part = core.intersect(area)
            at, source = part.within(area), part.within(core)
            for i, centre in enumerate(centres):
                own = tokens if centre is None else tokens - tokens.mean(axis=(0, 1)) + centre
                result[i][at] += (own[m : m + c, m : m + c] * weights)[source]
    return result


def batches(items: Iterator[T], size: int) -> Iterator[list[T]]:
    """Yield items in lists of at most ``size``."""
    group: list[T] = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def learn(engine: LabelEngine, scheme: Scheme, datasets: Sequence[Dataset]) -> Leak:
    """Learn how tokens differ when windows move by the scheme's ``move``, on images that are not measured."""
    total, within, count = np.zeros(engine.labeller.encoder.dim), np.zeros((engine.labeller.encoder.dim,) * 2), 0
    for one in datasets:
        dataset, by = under(one, engine), scheme.move
        area = central_part(one.footprint, LEARNT_SIDE_PATCHES**2)
        tokens = blended_tokens(engine, dataset, area, [None])[0].reshape(-1, engine.labeller.encoder.dim)
        again = blended_tokens(engine, move_windows(dataset, by), moved(area, by), [None])[0]
        difference = (unit(tokens) - unit(again.reshape(tokens.shape))).astype(np.float64)
        total += tokens.sum(axis=0)
        within += difference.T @ difference
        count += len(tokens)
    return Leak((total / count).astype(np.float32), within / count)


def cures_of(leak: Leak) -> list[Cure]:
    """Return the cures that can be made of a leak."""
    values, vectors = np.linalg.eigh(leak.within)  # ascending
    cures = [Cure("mean", True, None)]
    for r in DIRECTIONS:
        top = vectors[:, -r:]
        cures.append(Cure(f"less {r}", False, (np.eye(len(top)) - top @ top.T).astype(np.float32)))
    scale = 1 / np.sqrt(values + WHITENING_FLOOR * values.mean())
    cures.append(Cure("whitened", False, ((vectors * scale) @ vectors.T).astype(np.float32)))
    return cures


def assign(tokens: Floats, codebook: Codebook, matrix: Floats | None) -> Labels:
    """Return the nearest centroid of each token by the codebook's metric.

    Args:
        tokens: of shape (H, W, D).
        codebook: whose centroids.
        matrix: of shape (D, D), applied to tokens and centroids first, or None.
    """
    rows, centroids = tokens.reshape(-1, tokens.shape[-1]), codebook.centroids.astype(np.float32)
    if matrix is not None:
        rows, centroids = rows @ matrix.T, centroids @ matrix.T
    metric = codebook.manifest.assignment.metric
    if metric == "cosine":
        centroids = unit(centroids)
    bias = 0.5 * (centroids**2).sum(axis=1) if metric == "l2" else np.float32(0)
    found = [
        (rows[i : i + 8192] @ centroids.T - bias).argmax(axis=1).astype(np.uint16) for i in range(0, len(rows), 8192)
    ]
    return np.concatenate(found).reshape(tokens.shape[:2])


def cured_pairs(
    engine: LabelEngine, scheme: Scheme, scenes: Sequence[Scene], plain: Sequence[Pair], leak: Leak
) -> Iterator[tuple[str, list[Pair]]]:
    """Yield the name of each cure and the scenes' labels under it; "" first, without any cure.

    Args:
        engine: lends its encoder.
        scheme: how its windows are laid.
        scenes: what to label.
        plain: the engine's own labels; what has none of them gets none.
        leak: what the cures are made of.
    """
    cures = [Cure("", False, None), *cures_of(leak)]
    pairs: list[list[Pair]] = [[] for _ in cures]
    for scene, served in zip(scenes, plain, strict=True):
        dataset, by = under(scene.dataset, engine), scheme.move
        both = [
            blended_tokens(engine, dataset, scene.area, [None, leak.mean]),
            blended_tokens(engine, move_windows(dataset, by), moved(scene.area, by), [None, leak.mean]),
        ]
        for cure, found in zip(cures, pairs, strict=True):
            first, second = (assign(tokens[int(cure.centred)], engine.codebook, cure.matrix) for tokens in both)
            first[served.labels == NODATA_LABEL] = NODATA_LABEL
            second[served.again == NODATA_LABEL] = NODATA_LABEL
            found.append(Pair(first, second))
    for cure, found in zip(cures, pairs, strict=True):
        yield cure.name, found


def lab_of(labels: Labels, palette: Palette) -> NDArray[np.float64]:
    """Return OKLab colours of shape (..., 3); those of no data are any."""
    return palette.lab[np.where(labels == NODATA_LABEL, 0, labels)]


def seam_of(scenes: Sequence[Scene], pairs: Sequence[Pair], scheme: Scheme, palette: Palette) -> float:
    """Return the seam index of the labels as served, over all scenes; NaN where it is unknown."""
    seam = Seam()
    for scene, pair in zip(scenes, pairs, strict=True):
        lab, labelled = lab_of(pair.labels, palette), pair.labels != NODATA_LABEL
        for axis, first in enumerate((scene.area.row_start, scene.area.col_start)):
            seam += seam_along(lab, labelled, first, scheme.stride, axis)
    return float("nan") if seam.index is None else seam.index


def shift_of(pairs: Sequence[Pair], palette: Palette) -> tuple[float, ...]:
    """Return the ratio of colour differences, and the shares of equal labels and of equal classes of each cut."""
    rng = np.random.default_rng(0)
    moved_sum = random_sum = 0.0
    firsts, seconds = [], []
    for pair in pairs:
        known = (pair.labels != NODATA_LABEL) & (pair.again != NODATA_LABEL)
        first, second = pair.labels[known], pair.again[known]
        lab = lab_of(first, palette)
        moved_sum += float(np.linalg.norm(lab - lab_of(second, palette), axis=1).sum())
        random_sum += float(np.linalg.norm(lab - lab[rng.integers(0, len(lab), len(lab))], axis=1).sum())
        firsts.append(first)
        seconds.append(second)
    ids, again = np.concatenate(firsts), np.concatenate(seconds)
    shares = [agreement(ids, again), *(agreement(lookup[ids], lookup[again]) for lookup in palette.cuts)]
    ratio = moved_sum / random_sum if random_sum else float("nan")
    return (ratio, *(float("nan") if share is None else share for share in shares))


def spread_of(scenes: Sequence[Scene], pairs: Sequence[Pair], palette: Palette) -> tuple[float, float]:
    """Return the effective number of labels and the spread of colours inside plain fields, means over fields."""
    classes, spread = [], []
    for scene, pair in zip(scenes, pairs, strict=True):
        for field in scene.fields:
            labels = pair.labels[field]
            known = labels[labels != NODATA_LABEL]
            if len(known):
                classes.append(usage_of([known], len(palette.lab)).effective)
                spread.append(float(np.sqrt(lab_of(known, palette).var(axis=0).sum())))
    return (float(np.mean(classes)), float(np.mean(spread))) if classes else (float("nan"), float("nan"))


def plain_fields(dataset: Dataset, area: PatchRange, patch_px: int) -> tuple[tuple[slice, slice], ...]:
    """Return the plainest squares of an area that do not overlap, as parts of arrays of shape ``area.shape``.

    The less patches differ in mean colour and the less pixels differ inside patches, the plainer a square is.
    """
    read = read_patches(dataset, [area], patch_px)[0]
    rows, cols = area.shape
    pixels = read.pixels.reshape(rows, patch_px, cols, patch_px, 3).astype(np.float32)
    colour, texture = pixels.mean(axis=(1, 3)), pixels.std(axis=(1, 3)).mean(axis=-1)  # (rows, cols, 3), (rows, cols)
    whole: NDArray[np.bool_] = np.asarray(read.valid.reshape(rows, patch_px, cols, patch_px).all(axis=(1, 3)))
    side, found = FIELD_PATCHES, []
    for row in range(0, rows - side + 1, FIELD_STEP):
        for col in range(0, cols - side + 1, FIELD_STEP):
            at = slice(row, row + side), slice(col, col + side)
            if whole[at].all():
                spread = float(np.sqrt(colour[at].reshape(-1, 3).var(axis=0).sum()))
                found.append((spread + float(texture[at].mean()), row, col))
    picked: list[tuple[int, int]] = []
    for _, row, col in sorted(found):
        if len(picked) < min(FIELDS, FIELDS_SHARE * rows * cols / side**2) and all(
            max(abs(row - r), abs(col - c)) >= side for r, c in picked
        ):
            picked.append((row, col))
    return tuple((slice(row, row + side), slice(col, col + side)) for row, col in picked)


def collar_line(labels: Labels, palette: Palette) -> str:
    """Describe the patches beside a collar: labels that only they have, and whether they show as a ring.

    Args:
        labels: of a whole image, of shape (H, W); its collar has no data.
        palette: colours of the labels.
    """
    labelled = labels != NODATA_LABEL
    if labelled.all():
        return "no patch is without data"
    distance: NDArray[np.int32] = distance_transform_cdt(labelled, "chessboard")  # 0 on the collar, 1 beside it
    ring = labelled & np.asarray(distance <= RING_PATCHES)
    far = np.asarray(distance > OWN_REACH)
    own = ~np.isin(labels[ring], labels[far])
    inner = far & np.asarray(distance <= OWN_REACH + RING_PATCHES)
    control = ~np.isin(labels[inner], labels[labelled & ~inner])
    across, inside = [], []
    lab = lab_of(labels, palette)
    for axis in (0, 1):
        colours, depth = np.moveaxis(lab, axis, 0), np.moveaxis(distance, axis, 0)
        difference = np.linalg.norm(colours[1:] - colours[:-1], axis=-1)
        low, high = np.minimum(depth[1:], depth[:-1]), np.maximum(depth[1:], depth[:-1])
        across.append(difference[(low == RING_PATCHES) & (high == RING_PATCHES + 1)])
        inside.append(difference[low > RING_PATCHES])
    index = np.concatenate(across).mean() / np.concatenate(inside).mean()
    return (
        f"{int(ring.sum())} patches within {RING_PATCHES} of it, {own.mean():.4f} of them with labels that are nowhere "
        f"farther than {OWN_REACH} from it (control, a ring further in: {control.mean():.4f}); "
        f"seam index of the ring's inner border {index:.3f}"
    )


def work_of(scheme: Scheme, registers: int, dim: int) -> tuple[float, float]:
    """Return the tokens and the multiplications of a block of the transformer, for each labelled patch.

    Matrices take 12 D^2 for a token (an MLP of width 4 D), attention 2 N D. The number of blocks cancels in ratios.
    """
    tokens = scheme.window**2 + 1 + registers
    return tokens / scheme.stride**2, tokens * (12 * dim**2 + 2 * tokens * dim) / scheme.stride**2


class Table:
    """Prints rows as they come."""

    def __init__(self, codebook: Codebook, scenes: Sequence[Scene], palette: Palette) -> None:
        self._encoder, self._scenes, self._palette = codebook.manifest.encoder, scenes, palette
        cuts = " ".join(f"{f'same {n}':>8s}" for n, _ in zip(CUTS, palette.cuts, strict=False))
        print(
            f"{'scheme':20s} {'tokens':>6s} {'work':>6s} {'s/1000':>7s} {'seam':>6s} {'moved':>5s} {'dE ratio':>8s} "
            f"{'same K':>8s} {cuts} {'in all':>6s} {'in plain':>8s} {'plain sd':>8s}"
        )

    def row(self, scheme: Scheme, cure: str, seconds_per_chunk: float, pairs: Sequence[Pair]) -> None:
        """Measure the labels of all scenes under a scheme, and print them."""
        size = self._encoder.register_tokens, self._encoder.dim
        tokens, work = (a / b for a, b in zip(work_of(scheme, *size), work_of(BASE, *size), strict=True))
        seam = seam_of(self._scenes, pairs, scheme, self._palette)
        ratio, *shares = shift_of(pairs, self._palette)
        everything = usage_of([pair.labels[pair.labels != NODATA_LABEL] for pair in pairs], len(self._palette.lab))
        classes, spread = spread_of(self._scenes, pairs, self._palette)
        name = f"{scheme} + {cure}" if cure else f"{scheme}{' blend' if scheme.layout.overlap > 1 else ''}"
        print(
            f"{name:20s} {tokens:6.2f} {work:6.2f} {1000 * seconds_per_chunk / scheme.stride**2:7.3f} {seam:6.3f} "
            f"{scheme.move:5d} {ratio:8.3f} {' '.join(f'{share:8.3f}' for share in shares)} "
            f"{everything.effective:6.1f} {classes:8.2f} {spread:8.4f}",
            flush=True,
        )


def open_scenes(folder: Path, names: Sequence[str], codebook: Codebook, side: int) -> list[Scene]:
    """Open what is measured and find plain fields in it."""
    images = ImageFolder(folder, tuple(names))
    patch_px = codebook.manifest.encoder.patch_px
    scenes = []
    for name in names:
        dataset = images.open(name, codebook)
        area = central_part(dataset.footprint, side**2)
        fields = () if name in WITHOUT_FIELDS else plain_fields(dataset, area, patch_px)
        scenes.append(Scene(dataset, area, fields))
    return scenes


def measure(
    scheme: Scheme, engine: LabelEngine, scenes: Sequence[Scene], learnt_from: Sequence[Dataset], table: Table
) -> str:
    """Print the rows of a scheme; return what to say of its cures, or nothing."""
    plain = [label_twice(engine, scene, scheme.move) for scene in scenes]
    table.row(scheme, "", engine.seconds_per_chunk, plain)
    if scheme not in CURED:
        return ""
    note = ""
    leak = learn(engine, scheme, learnt_from)
    for name, pairs in cured_pairs(engine, scheme, scenes, plain, leak):
        if name:
            table.row(scheme, name, engine.seconds_per_chunk, pairs)
            continue
        same = np.concatenate([(a.labels == b.labels).ravel() for a, b in zip(plain, pairs, strict=True)])
        note = f"{scheme}: uncured tokens get the engine's label on {same.mean():.4f} of the patches"
    values = np.linalg.eigvalsh(leak.within)[::-1]
    shares = ", ".join(f"{r}: {values[:r].sum() / values.sum():.2f}" for r in DIRECTIONS)
    return f"{note}; share of the differences' variance in the first directions: {shares}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder with the test imagery")
    parser.add_argument("--codebook", default="nano", help="name or directory")
    parser.add_argument("--checkpoint", type=Path, help="directory of the codebook's model, for windows of other sizes")
    parser.add_argument("--side", type=int, help=f"patches a side of what is measured of an image ({SIDE_PATCHES})")
    parser.add_argument("--quick", action="store_true", help="one image, few schemes")
    options = parser.parse_args()
    start, settings = time.perf_counter(), load_settings()
    codebook = find_codebook(options.codebook, settings.codebooks_dir, allow_path=True)
    cuts = () if codebook.tree is None else tuple(codebook.classes(n).lookup for n in CUTS)
    palette = Palette(srgb_to_oklab(codebook.colors), cuts)
    side = options.side or (QUICK_SIDE_PATCHES if options.quick else SIDE_PATCHES)
    scenes = open_scenes(options.images, IMAGES[:1] if options.quick else IMAGES, codebook, side)
    others = ImageFolder(options.images, LEARNT_FROM)
    learnt_from = [others.open(name, codebook) for name in (LEARNT_FROM[:2] if options.quick else LEARNT_FROM)]
    patches = sum(scene.area.shape[0] * scene.area.shape[1] for scene in scenes)
    fields = sum(len(scene.fields) for scene in scenes)
    print(f"codebook {codebook.name}, {len(scenes)} images, {patches} patches, {fields} plain fields")
    notes, skipped = [], []
    pre = codebook.manifest.preprocess
    own = Scheme(pre.window_patches, pre.margin_patches, pre.stride_patches)
    with tempfile.TemporaryDirectory() as folder:
        encoders = Encoders(codebook, options.checkpoint, Path(folder), settings)
        encoders.check()
        table = Table(codebook, scenes, palette)
        for scheme in dict.fromkeys([*(QUICK if options.quick else SCHEMES), own]):
            if not encoders.can(scheme.window):
                skipped.append(str(scheme))
                continue
            laid = variant(codebook, scheme)
            with open_engine(laid, encoders.load(laid), settings) as engine:
                notes.append(measure(scheme, engine, scenes, learnt_from, table))
                device = engine.device_name
                if scheme == own and not options.quick:
                    dataset = ImageFolder(options.images, (COLLARED,)).open(COLLARED, codebook)
                    labels = engine.block(dataset, dataset.footprint).labels
                    notes.append(f"collar of {COLLARED}, {own}: {collar_line(labels, palette)}")
    if skipped:
        notes.append(f"without --checkpoint, windows of another size were left out: {', '.join(skipped)}")
    print("\n".join(note for note in notes if note))
    print(f"device {device}, {time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    main()

"""What an evaluation found: the content of ``report.json``, as data."""

from __future__ import annotations

from dataclasses import dataclass

from geocentroids_fit.evaluate.images import LeftOut
from geocentroids_fit.evaluate.landcover import LandCover
from geocentroids_fit.evaluate.measures import Similarity, Usage


@dataclass(frozen=True, slots=True)
class CodebookFacts:
    """Which codebook was evaluated, and on what it ran."""

    name: str
    version: str
    title: str
    digest: str
    centroids: int
    encoder: str
    metric: str
    gsd_m: float
    window_patches: int
    margin_patches: int
    stride_patches: int
    similarity_range: tuple[float, float]
    device: str


@dataclass(frozen=True, slots=True)
class Windows:
    """How visible windows are.

    Attributes:
        seam_index: colour difference across the borders of chunks divided by that elsewhere; 1 is invisible.
        seam_rows: the same for borders between rows.
        seam_cols: for borders between columns.
        agreement: for each number of classes the share of patches that keep theirs under moved windows.
    """

    seam_index: float | None
    seam_rows: float | None
    seam_cols: float | None
    agreement: dict[int, float | None]


@dataclass(frozen=True, slots=True)
class ClassShare:
    """A merged class in the legend: its colour as ``#rrggbb``, its name and its share of all labelled patches."""

    id: int
    color: str
    name: str | None
    share: float


@dataclass(frozen=True, slots=True)
class ImageResult:
    """The measures of one image."""

    set_name: str
    name: str
    rows: int
    cols: int
    patches: int
    similarity: Similarity
    usage: dict[int, Usage]
    windows: Windows
    land_cover: LandCover | None
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SetResult:
    """The measures of one set of images; ``class_names`` are those of its masks."""

    name: str
    images: int
    images_with_masks: int
    patches: int
    class_names: dict[int, str]
    land_cover: LandCover | None


@dataclass(frozen=True, slots=True)
class OverallScore:
    """Scores over all sets with masks: accuracy weighted by patches, F1 and mutual information as plain means.

    The keys of accuracy and F1 are ``blocks``, ``halves``, ``transfer``, and ``commonest`` for always saying the
    commonest cover of the set; None where no set has such a score.
    """

    overall_accuracy: dict[str, float | None]
    mean_f1: dict[str, float | None]
    nmi: float


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Everything an evaluation found; the content of ``report.json``.

    Attributes:
        codebook: what was evaluated.
        max_patches: the most patches of one image.
        moved_patches: how far windows were moved; None where they cannot be.
        cuts: numbers of classes, all first.
        patches: labelled patches of all images.
        similarity: of all patches.
        histogram_edges: edges of the bins of similarity histograms.
        usage: for each number of classes.
        windows: of all images.
        legend: for each number of merged classes, the classes.
        land_cover: for each number of classes, over all sets; empty without masks.
        sets: the sets.
        images: the images.
        left_out: images that could not be evaluated.
    """

    codebook: CodebookFacts
    max_patches: int
    moved_patches: int | None
    cuts: tuple[int, ...]
    patches: int
    similarity: Similarity
    histogram_edges: tuple[float, ...]
    usage: dict[int, Usage]
    windows: Windows
    legend: dict[int, tuple[ClassShare, ...]]
    land_cover: dict[int, OverallScore]
    sets: tuple[SetResult, ...]
    images: tuple[ImageResult, ...]
    left_out: tuple[LeftOut, ...]

"""From labelled images to the numbers of the report."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from geocentroids_fit.evaluate.images import ImageSet, LabelledImage, LeftOut, farthest_move
from geocentroids_fit.evaluate.landcover import SPLITS, UNKNOWN, Sample, Score, compare, folds_of
from geocentroids_fit.evaluate.measures import (
    Seam,
    agreement,
    histogram_edges,
    seam_along,
    similarity_of,
    usage_of,
)
from geocentroids_fit.evaluate.results import (
    ClassShare,
    CodebookFacts,
    Evaluation,
    ImageResult,
    OverallScore,
    SetResult,
    Windows,
)
from geocentroids_tiler.codebook import NODATA_LABEL, Classes, Codebook
from geocentroids_tiler.colors import hex_color, srgb_to_oklab

CUTS = (24, 8)
"""Numbers of merged classes that are measured, besides all."""


def cuts_of(codebook: Codebook) -> dict[int, Classes]:
    """Return all classes and, where the codebook has a tree, the merged ones that are measured."""
    merged = [n for n in CUTS if n < len(codebook)] if codebook.tree is not None else []
    return {len(codebook): codebook.classes(), **{n: codebook.classes(n) for n in merged}}


def summarize(
    codebook: Codebook,
    device: str,
    max_patches: int,
    sets: Sequence[ImageSet],
    images: Sequence[LabelledImage],
    left_out: Sequence[LeftOut],
) -> Evaluation:
    """Compute all measures.

    Args:
        codebook: what was evaluated.
        device: what computed the labels.
        max_patches: the most patches of one image.
        sets: the sets that images are from.
        images: at least one, each with a labelled patch.
        left_out: images that could not be evaluated.
    """
    cuts = cuts_of(codebook)
    lookups = {n: classes.lookup for n, classes in cuts.items()}
    labels = [image.labels[image.labels != NODATA_LABEL] for image in images]
    fit = [image.similarity[image.labels != NODATA_LABEL] for image in images]
    joined = np.concatenate(fit)
    similarity_range = codebook.similarity_range()
    edges = histogram_edges(joined, similarity_range)
    seams = [_seams(image, codebook) for image in images]
    samples = [_sample(image) for image in images]
    usage = {n: usage_of([lookup[part] for part in labels], n) for n, lookup in lookups.items()}
    everything = np.concatenate(labels)
    set_results = tuple(_set_result(one, images, samples, lookups) for one in sets)
    return Evaluation(
        codebook=_facts(codebook, device),
        max_patches=max_patches,
        moved_patches=farthest_move(codebook.manifest.preprocess.stride_patches),
        cuts=tuple(cuts),
        patches=len(everything),
        similarity=similarity_of(joined, similarity_range, edges),
        histogram_edges=tuple(edges.tolist()),
        usage=usage,
        windows=_windows(
            [sum((pair[axis] for pair in seams), Seam()) for axis in (0, 1)], *_joined_labels(images), lookups
        ),
        legend={n: _legend(classes, everything) for n, classes in cuts.items() if n < len(codebook)},
        land_cover=_overall(set_results, tuple(cuts)),
        sets=set_results,
        images=tuple(
            ImageResult(
                set_name=image.opened.set_name,
                name=image.opened.name,
                rows=image.labels.shape[0],
                cols=image.labels.shape[1],
                patches=len(own),
                similarity=similarity_of(own_fit, similarity_range, edges),
                usage={n: usage_of([lookup[own]], n) for n, lookup in lookups.items()},
                windows=_windows(seam, *_joined_labels([image]), lookups),
                land_cover=compare([sample], lookups) if sample is not None else None,
                notes=image.notes,
            )
            for image, own, own_fit, seam, sample in zip(images, labels, fit, seams, samples, strict=True)
        ),
        left_out=tuple(left_out),
    )


def _facts(codebook: Codebook, device: str) -> CodebookFacts:
    manifest, pre = codebook.manifest, codebook.manifest.preprocess
    return CodebookFacts(
        name=manifest.name,
        version=manifest.version,
        title=manifest.title,
        digest=codebook.digest,
        centroids=len(codebook),
        encoder=f"{manifest.encoder.source} ({manifest.encoder.architecture}, {manifest.encoder.dim} dimensions)",
        metric=manifest.assignment.metric,
        gsd_m=pre.gsd_m,
        window_patches=pre.window_patches,
        margin_patches=pre.margin_patches,
        stride_patches=pre.stride_patches,
        similarity_range=codebook.similarity_range(),
        device=device,
    )


def _seams(image: LabelledImage, codebook: Codebook) -> tuple[Seam, Seam]:
    labelled = image.labels != NODATA_LABEL
    lab = srgb_to_oklab(codebook.colors)[np.where(labelled, image.labels, 0)]
    area, stride = image.opened.area, codebook.manifest.preprocess.stride_patches
    return (
        seam_along(lab, labelled, area.row_start, stride, axis=0),
        seam_along(lab, labelled, area.col_start, stride, axis=1),
    )


def _joined_labels(images: Sequence[LabelledImage]) -> tuple[NDArray[np.uint16], NDArray[np.uint16]]:
    """Return labels from windows as served and moved, of patches that have both, each of shape (N,)."""
    pairs = [
        (image.labels[both], image.moved_labels[both])
        for image in images
        if image.moved_labels is not None
        for both in [(image.labels != NODATA_LABEL) & (image.moved_labels != NODATA_LABEL)]
    ]
    empty = np.empty(0, np.uint16)
    return np.concatenate([empty, *(a for a, _ in pairs)]), np.concatenate([empty, *(b for _, b in pairs)])


def _windows(
    seams: Sequence[Seam], labels: NDArray[np.uint16], again: NDArray[np.uint16], lookups: dict[int, NDArray[np.uint16]]
) -> Windows:
    rows, cols = seams
    return Windows(
        seam_index=(rows + cols).index,
        seam_rows=rows.index,
        seam_cols=cols.index,
        agreement={n: agreement(lookup[labels], lookup[again]) for n, lookup in lookups.items()},
    )


def _sample(image: LabelledImage) -> Sample | None:
    if image.cover is None:
        return None
    known = (image.labels != NODATA_LABEL) & (image.cover != UNKNOWN)
    folds = {split: fold[known] for split, fold in folds_of(image.labels.shape).items()}
    return Sample(image.opened.name, image.labels[known], image.cover[known], folds)


def _set_result(
    image_set: ImageSet,
    images: Sequence[LabelledImage],
    samples: Sequence[Sample | None],
    lookups: dict[int, NDArray[np.uint16]],
) -> SetResult:
    own = [i for i, image in enumerate(images) if image.opened.set_name == image_set.name]
    known = [sample for i in own if (sample := samples[i]) is not None]
    return SetResult(
        name=image_set.name,
        images=len(own),
        images_with_masks=len(known),
        patches=sum(int((images[i].labels != NODATA_LABEL).sum()) for i in own),
        class_names=dict(sorted((image_set.class_names or {}).items())),
        land_cover=compare(known, lookups),
    )


def _overall(sets: Sequence[SetResult], cuts: Sequence[int]) -> dict[int, OverallScore]:
    covers = [result.land_cover for result in sets if result.land_cover is not None]
    if not covers:
        return {}
    overall = {}
    for n in cuts:
        scores: dict[str, list[Score]] = {
            split: [split_score.one_map for cover in covers if (split_score := cover.cuts[n].splits[split]) is not None]
            for split in SPLITS
        }
        scores["commonest"] = [cover.commonest for cover in covers]
        scores["transfer"] = [known for cover in covers if (known := cover.cuts[n].transfer) is not None]
        overall[n] = OverallScore(
            overall_accuracy={
                key: sum(s.overall_accuracy * s.patches for s in found) / sum(s.patches for s in found)
                if found
                else None
                for key, found in scores.items()
            },
            mean_f1={
                key: math.fsum(s.mean_f1 for s in found) / len(found) if found else None
                for key, found in scores.items()
            },
            nmi=math.fsum(cover.cuts[n].nmi for cover in covers) / len(covers),
        )
    return overall


def _legend(classes: Classes, labels: NDArray[np.uint16]) -> tuple[ClassShare, ...]:
    share = np.bincount(classes.lookup[labels], minlength=len(classes)) / len(labels)
    return tuple(
        ClassShare(i, hex_color(classes.colors[i]), classes.names[i], float(share[i]))
        for i in np.argsort(-share, kind="stable").tolist()
    )

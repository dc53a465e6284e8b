"""An evaluation from start to end: open, label, measure, draw, write."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from geocentroids_fit.evaluate.images import (
    ImageSet,
    LabelledImage,
    LeftOut,
    OpenImage,
    check_sets,
    chunks_to_label,
    label_image,
    open_set,
)
from geocentroids_fit.evaluate.pictures import maps_of, similarity_plot, spread, usage_plot
from geocentroids_fit.evaluate.report import HTML_FILE, JSON_FILE, to_html, to_json
from geocentroids_fit.evaluate.results import Evaluation
from geocentroids_fit.evaluate.summary import cuts_of, summarize
from geocentroids_fit.files import write_text
from geocentroids_tiler.codebook import NODATA_LABEL, Codebook
from geocentroids_tiler.encoder import Encoder
from geocentroids_tiler.errors import InputError
from geocentroids_tiler.hub import find_codebook
from geocentroids_tiler.labels.service import load_codebook_encoder, open_engine
from geocentroids_tiler.settings import Settings, load_settings

MAX_PATCHES = 65_536


def evaluate(
    codebook: str,
    sets: Sequence[ImageSet],
    out: Path,
    *,
    max_patches: int = MAX_PATCHES,
    codebooks_dir: Path | None = None,
    progress: bool = True,
    settings: Settings | None = None,
    load: Callable[[Codebook, Settings], Encoder] = load_codebook_encoder,
) -> Evaluation:
    """Measure how good a codebook is on images, and write ``report.html`` and ``report.json``.

    Args:
        codebook: its name, or its directory.
        sets: the images, with or without masks of land cover.
        out: folder of the report; it is made if need be.
        max_patches: the most patches of an image that are evaluated, from its middle.
        codebooks_dir: folder of installed codebooks; None: that of the settings.
        progress: whether a progress bar is drawn.
        settings: how the encoder is run; None: those of the environment.
        load: loads the encoder of a codebook.

    Raises:
        CodebookNotFoundError: if there is no such codebook.
        CodebookError: if it is broken.
        EncoderError: if its encoder cannot be run here.
        InputError: if no image can be evaluated, or an argument cannot be used; the text says why.
    """
    if max_patches < 1:
        raise InputError(f"max_patches is {max_patches}; it must be at least 1")
    check_sets(sets)
    settings = settings or load_settings()
    found = find_codebook(codebook, codebooks_dir or settings.codebooks_dir, allow_path=True)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out}: cannot be made a folder: {error.strerror}") from error
    listed = [item for i, one in enumerate(sets) for item in open_set(i, one, found, max_patches)]
    opened = [item for item in listed if isinstance(item, OpenImage)]
    left_out = [item for item in listed if isinstance(item, LeftOut)]
    _refuse_nothing(opened, left_out)
    images: list[LabelledImage] = []
    with open_engine(found, load(found, settings), settings) as engine:
        total = sum(chunks_to_label(item, engine.layout.stride_patches) for item in opened)
        with tqdm(total=total, unit="chunk", disable=not progress) as bar:
            for item in opened:
                bar.set_postfix_str(item.name[-24:], refresh=False)
                result = label_image(item, engine, found.manifest.encoder.patch_px, bar.update)
                if isinstance(result, LabelledImage):
                    images.append(result)
                else:
                    left_out.append(result)
    _refuse_nothing(images, left_out)
    evaluation = summarize(found, engine.device_name, max_patches, sets, images, left_out)
    maps = [maps_of(images[i], list(cuts_of(found).values()), found.similarity_range()) for i in spread(len(images))]
    write_text(out / JSON_FILE, to_json(evaluation))
    write_text(out / HTML_FILE, to_html(evaluation, maps, _plots(evaluation, images)))
    return evaluation


def _refuse_nothing(usable: Sequence[object], left_out: Sequence[LeftOut]) -> None:
    if not usable:
        first = left_out[0]
        raise InputError(f"none of {len(left_out)} images can be evaluated; the first, {first.name}: {first.reason}")


def _plots(evaluation: Evaluation, images: Sequence[LabelledImage]) -> dict[str, str]:
    sets = {
        one.name: np.sum([i.similarity.histogram for i in evaluation.images if i.set_name == one.name], axis=0).tolist()
        for one in evaluation.sets
        if one.images
    }
    labels = np.concatenate([image.labels[image.labels != NODATA_LABEL] for image in images])
    return {
        "similarity": similarity_plot(
            evaluation.similarity, evaluation.histogram_edges, evaluation.codebook.similarity_range, sets
        ),
        "usage": usage_plot(np.bincount(labels, minlength=evaluation.codebook.centroids)),
    }

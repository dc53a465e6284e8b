"""All steps from images to a codebook, in their order."""

from __future__ import annotations

from geocentroids_fit.fitting import cluster_step, color_step, extract_step, prepare_step, tree_step
from geocentroids_fit.publishing import check_out, evaluate_step, exemplars_step, pack_step
from geocentroids_fit.workspace import Fit
from geocentroids_tiler.codebook import Codebook


def run(fit: Fit) -> Codebook:
    """Do all steps.

    Raises:
        GeocentroidsError: if anything is missing or does not fit; the text says what. Finished steps are kept.
    """
    check_out(fit)
    if fit.config.images.prepare:
        prepare_step(fit)
    extract_step(fit)
    cluster_step(fit)
    color_step(fit)
    tree_step(fit)
    exemplars_step(fit)
    codebook = pack_step(fit)
    evaluate_step(fit)
    return codebook

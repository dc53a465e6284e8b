"""Is a codebook any good? Numbers and pictures of how it labels images."""

from geocentroids_fit.evaluate.images import ImageSet, set_names
from geocentroids_fit.evaluate.results import Evaluation
from geocentroids_fit.evaluate.run import MAX_PATCHES, evaluate

__all__ = ["MAX_PATCHES", "Evaluation", "ImageSet", "evaluate", "set_names"]

"""Many images as one layer: documents that name images, and where these lie."""

from geocentroids_tiler.mosaic.document import Document, Member, is_document, read_document
from geocentroids_tiler.mosaic.index import Mosaic, Overlap, Problem, Zone
from geocentroids_tiler.mosaic.members import box

__all__ = ["Document", "Member", "Mosaic", "Overlap", "Problem", "Zone", "box", "is_document", "read_document"]

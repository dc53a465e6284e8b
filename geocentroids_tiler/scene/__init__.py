"""An aerial scene drawn by code, for a demo without network: fields, roads, roofs, trees, water.

It is a georeferenced COG whose land cover is known, good enough to pass for a photograph at first glance.
"""

from geocentroids_tiler.scene.canvas import LAND_COVER
from geocentroids_tiler.scene.files import Scene, ensure_demo_scene, make_scene, write_scene

__all__ = ["LAND_COVER", "Scene", "ensure_demo_scene", "make_scene", "write_scene"]

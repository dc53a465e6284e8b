"""Pictures of images beside their classes, for the docs: the image, all classes, and the classes merged to 24.

python benchmarks/pictures.py --images IMAGERY --codebook nano --out docs/images
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from geocentroids_fit.images import ImageFolder
from geocentroids_tiler.codebook import NODATA_LABEL, Classes
from geocentroids_tiler.grid import PatchRange
from geocentroids_tiler.hub import find_codebook
from geocentroids_tiler.labels.service import load_codebook_encoder, open_engine
from geocentroids_tiler.settings import load_settings
from geocentroids_tiler.source import Dataset, read_patches

PICTURES = {
    "uruguay": "south_america/uruguay_business_park.tif",
    "bolivia": "south_america/bolivia_river_town.tif",
    "manila": "manila_river.tif",
    "neon": "neon/OSBS_051.tif",
}
CLASSES = 24
PANEL_PX = 520
"""Height of a panel, about."""
GAP_PX = 6
QUALITY = 82

Picture = NDArray[np.uint8]


def photograph(dataset: Dataset, patch_px: int, cell_px: int) -> Picture:
    """Return an image on its ground grid, ``cell_px`` pixels for a patch; white where it has no data."""
    rows, cols = dataset.footprint.shape
    read = read_patches(dataset, [dataset.footprint], patch_px)[0]
    pixels = np.where(read.valid[..., None], read.pixels, np.uint8(255))
    return np.asarray(Image.fromarray(pixels).resize((cols * cell_px, rows * cell_px), Image.Resampling.BOX))


def label_map(labels: NDArray[np.uint16], classes: Classes, cell_px: int) -> Picture:
    """Return labels as colours, white where there is none."""
    table = np.full((NODATA_LABEL + 1, 3), 255, np.uint8)
    table[: len(classes)] = classes.colors
    colours = table[classes.of_labels(labels)]
    return colours.repeat(cell_px, axis=0).repeat(cell_px, axis=1)


def main() -> None:
    """Write the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder with the test imagery")
    parser.add_argument("--codebook", default="nano", help="name or directory")
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    options = parser.parse_args()
    settings = load_settings()
    codebook = find_codebook(options.codebook, settings.codebooks_dir, allow_path=True)
    options.out.mkdir(parents=True, exist_ok=True)
    images = ImageFolder(options.images, tuple(PICTURES.values()))
    cuts = codebook.classes(None), codebook.classes(CLASSES)
    with open_engine(codebook, load_codebook_encoder(codebook, settings), settings) as engine:
        for name, image in PICTURES.items():
            dataset = images.open(image, codebook)
            area: PatchRange = dataset.footprint
            cell_px = max(1, round(PANEL_PX / area.shape[0]))
            labels = engine.block(dataset, area).labels
            panels = [photograph(dataset, codebook.manifest.encoder.patch_px, cell_px)]
            panels += [label_map(labels, classes, cell_px) for classes in cuts]
            gap = np.full((panels[0].shape[0], GAP_PX, 3), 255, np.uint8)
            path = options.out / f"{codebook.name}-{name}.webp"
            Image.fromarray(np.concatenate([panels[0], gap, panels[1], gap, panels[2]], axis=1)).save(
                path, "WEBP", quality=QUALITY, method=6
            )
            print(f"{path}: {image}, {len(np.unique(labels[labels != NODATA_LABEL]))} of {len(codebook)} classes")


if __name__ == "__main__":
    main()

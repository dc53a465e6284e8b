"""Every way to run a codebook's encoder that this machine has: milliseconds a window, and labels equal to fp32.

    python benchmarks/devices.py                          # windows of the sample scene
    python benchmarks/devices.py --images FOLDER --windows 72
    python benchmarks/devices.py --checkpoint DIR         # torch as well, from the encoder's checkpoint

Windows come in blocks of four chunks, so that they are blended as in a tile. They are handed over as many at once as
keep the device busy, and a path's time a window is that of its fastest batch, with a chunk labelled for each window:
the fastest, because other work on the machine only adds. Paths take turns. The reference for labels is the first path.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from geocentroids_tiler.codebook import Codebook
from geocentroids_tiler.encoder import Encoder, encoder_source, load_encoder
from geocentroids_tiler.encoder.base import Assigner, ChunkLayout
from geocentroids_tiler.errors import EncoderError
from geocentroids_tiler.grid import ChunkIndex
from geocentroids_tiler.hub import find_codebook
from geocentroids_tiler.scene import make_scene, write_scene
from geocentroids_tiler.source import ReadOptions, open_dataset, read_windows, resolve_source, source_identity

PATHS = (
    ("onnx", "fp32"),
    ("openvino", "fp32"),
    ("openvino", "bf16"),
    ("openvino", "int8"),
    ("torch", "fp32"),
    ("torch", "bf16"),
)
BLOCK = 2
"""Chunks a side of a block."""


@dataclass
class Windows:
    """Windows in blocks.

    Attributes:
        pixels: arrays of shape (S, S, 3), uint8.
        chunks: for each chunk the numbers of the windows that cover it, in the order of ``ChunkLayout.parts``.
    """

    pixels: list[NDArray[np.uint8]] = field(default_factory=list)
    chunks: list[list[int]] = field(default_factory=list)


def read_blocks(folder: Path, codebook: Codebook, layout: ChunkLayout, count: int) -> Windows:
    """Read at least ``count`` windows, in whole blocks without holes, in turns from the images of a folder."""
    rng, found = np.random.default_rng(0), Windows()
    open_images = []
    for path in sorted(folder.rglob("*.tif")):
        source = resolve_source(str(path.relative_to(folder)), folder)
        dataset = open_dataset(source, source_identity(source), ReadOptions(), codebook)
        chunks = list(dataset.footprint.chunks(layout.stride_patches))
        open_images.append((dataset, [chunks[i] for i in rng.permutation(len(chunks))]))
    while len(found.pixels) < count and any(chunks for _, chunks in open_images):
        for dataset, chunks in open_images:
            while chunks and len(found.pixels) < count:
                corner = chunks.pop()
                block = [ChunkIndex(corner.row + a, corner.col + b) for a in range(BLOCK) for b in range(BLOCK)]
                needed = sorted({window for chunk in block for window in layout.windows_of(chunk)})
                windows = read_windows(dataset, needed, codebook.manifest.encoder.patch_px)
                if all(window.labelled.all() for window in windows):
                    number = {window: len(found.pixels) + i for i, window in enumerate(needed)}
                    found.pixels += [window.pixels for window in windows]
                    found.chunks += [[number[window] for window in layout.windows_of(chunk)] for chunk in block]
                    break
    return found


def label(encoder: Encoder, assigner: Assigner, windows: Windows) -> tuple[NDArray[np.uint16], float]:
    """Return the labels of all chunks, of shape (N, s, s), and the seconds that a window and a chunk take."""
    size = encoder.windows_at_once
    tokens, labels, encoding, assigning = [], [], [], []
    for i in range(0, len(windows.pixels), size):
        start = time.perf_counter()
        tokens += encoder.encode(windows.pixels[i : i + size])
        encoding.append((time.perf_counter() - start) / size)
    chunks = [[tokens[i] for i in chunk] for chunk in windows.chunks]
    for i in range(0, len(chunks), size):
        start = time.perf_counter()
        labels.append(assigner.assign(chunks[i : i + size])[0])
        assigning.append((time.perf_counter() - start) / size)
    return np.concatenate(labels), min(encoding) + min(assigning)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder of images; default: the sample scene is drawn")
    parser.add_argument("--codebook", default="nano", help="name of a codebook, or its directory")
    parser.add_argument("--checkpoint", help="directory of the encoder's checkpoint, for torch")
    parser.add_argument("--windows", type=int, default=36)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None)
    arguments = parser.parse_args()
    codebook = find_codebook(arguments.codebook, Path(), allow_path=True)
    pre, manifest = codebook.manifest.preprocess, codebook.manifest
    layout = ChunkLayout(pre.window_patches, pre.margin_patches, pre.stride_patches)
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.images
        if folder is None:
            folder = Path(scratch)
            write_scene(folder / "scene.tif", make_scene(1536))
        windows = read_blocks(folder, codebook, layout, arguments.windows)
    source = encoder_source(manifest.encoder, pre, codebook.encoder_path)
    paths: dict[str, tuple[Encoder, Assigner]] = {}
    for backend, precision in PATHS:
        try:
            chosen = source
            if backend == "torch" and arguments.checkpoint:
                described = manifest.encoder.model_copy(update={"source": arguments.checkpoint, "sha256": None})
                chosen = encoder_source(described, pre, None)
            encoder = load_encoder(chosen, backend=backend, precision=precision, threads=arguments.threads)
        except EncoderError as error:
            print(f"{backend} {precision}: not here: {error}")
            continue
        assigner = encoder.assigner(codebook.centroids.astype(np.float32), manifest.assignment.metric, layout)
        paths[f"{backend} {precision}"] = encoder, assigner
    best: dict[str, float] = dict.fromkeys(paths, float("inf"))
    alone: dict[str, float] = dict.fromkeys(paths, float("inf"))
    labels: dict[str, NDArray[np.uint16]] = {}
    for _ in range(arguments.rounds):
        for name, (encoder, assigner) in paths.items():
            labels[name], seconds = label(encoder, assigner, windows)
            best[name] = min(best[name], seconds)
            start = time.perf_counter()
            encoder.encode(windows.pixels[:1])
            alone[name] = min(alone[name], time.perf_counter() - start)
    side_px = layout.window_patches * manifest.encoder.patch_px
    print(
        f"codebook {codebook.name}, {len(windows.pixels)} windows of {side_px} px, "
        f"{len(windows.chunks)} chunks, {os.cpu_count()} cores, {platform.machine()}"
    )
    merged = codebook.classes(24).lookup if codebook.tree is not None else None
    reference = next(iter(labels))
    print(f"{'path':16s} {'ms/window':>10s} {'one alone':>10s} {'ratio':>6s} {'same label':>10s} {'same of 24':>10s}")
    for name, found in labels.items():
        same = (found == labels[reference]).mean()
        of_24 = f"{(merged[found] == merged[labels[reference]]).mean():10.4f}" if merged is not None else ""
        print(
            f"{name:16s} {1e3 * best[name]:10.1f} {1e3 * alone[name]:10.1f} "
            f"{best[reference] / best[name]:6.2f} {same:10.4f} {of_24}"
        )


if __name__ == "__main__":
    main()

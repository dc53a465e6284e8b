"""Share of the time that the encoder is busy while features are extracted: the rest is waiting for pixels.

    python benchmarks/extract.py IMAGES              # a random ViT-B, the architecture of the large codebooks
    python benchmarks/extract.py IMAGES --encoder DIR --device cuda

Prints the share with windows read ahead by threads, as the command does it, and, for comparison, with everything on
one thread: read a batch, encode it, blend it, read the next. Weights do not change speed, so random ones do.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers

from geocentroids_fit import extract as extract_module
from geocentroids_fit.config import EncoderConfig, WindowsConfig
from geocentroids_fit.encoders import describe_encoder, load_described
from geocentroids_fit.extract import Extraction, extract
from geocentroids_fit.images import ImageFolder, list_images
from geocentroids_fit.pack import draft_codebook
from geocentroids_fit.shards import FeatureSettings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path)
    parser.add_argument("--encoder", help="checkpoint; default: ViT-B with 4 registers and random weights")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--window", type=int, default=16)
    parser.add_argument("--margin", type=int, default=3)
    parser.add_argument("--stride", type=int, default=10)
    parser.add_argument("--per-image", type=int, default=400)
    parser.add_argument("--count", type=int, default=4, help="images")
    parser.add_argument("--readers", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        encoder = options.encoder or random_vit_b(Path(work) / "vit-b")
        for name, executor in (("read ahead", None), ("one thread", SameThread)):
            found, seconds = measure(options, encoder, Path(work) / name, executor)
            print(
                f"{name}: {len(found.store)} features of {len(found.store.images)} images in {seconds:.1f} s, "
                f"{found.features_per_s:.0f} features/s, encoder busy {found.busy:.1%}"
            )


def measure(options: Any, encoder: str, out: Path, executor: type | None) -> tuple[Extraction, float]:
    """Extract features and return what was made, and the seconds it took without loading the encoder."""
    windows = WindowsConfig(
        window_patches=options.window, margin_patches=options.margin, stride_patches=options.stride
    ).preprocess
    config = EncoderConfig(model=encoder, device=options.device, embed=False)
    section = describe_encoder(config, windows, out)
    loaded = load_described(section, windows, out, config)
    settings = FeatureSettings(
        encoder=section, preprocess=windows, device=loaded.info.device, per_image=options.per_image, seed=0
    )
    images = ImageFolder(options.images, tuple(list_images(options.images)[: options.count]))
    start = time.perf_counter()
    with mock.patch.object(extract_module, "ThreadPoolExecutor", executor or extract_module.ThreadPoolExecutor):
        found = extract(images, loaded, draft_codebook(settings), settings, out, readers=options.readers)
    return found, time.perf_counter() - start


class SameThread(Executor):
    """Runs what is submitted at once, on the thread that submits it."""

    def __init__(self, *_: object) -> None:
        """Take what a pool of threads takes."""

    def submit(self, function: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Run a function and return its finished future."""
        future: Future[Any] = Future()
        try:
            future.set_result(function(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


def random_vit_b(folder: Path) -> str:
    """Save a ViT-B with registers and random weights, and return where."""
    torch.manual_seed(0)
    transformers.Dinov2WithRegistersModel(
        transformers.Dinov2WithRegistersConfig(patch_size=14, image_size=518)
    ).save_pretrained(folder)
    return str(folder)


if __name__ == "__main__":
    main()

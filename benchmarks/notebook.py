"""Labels of the same windows by the published notebook's loop and by this project, on every path of this machine.

    python benchmarks/notebook.py                      # a random ViT-B, windows of the sample scene
    python benchmarks/notebook.py --model DIR --windows 32

The notebook puts one sample at a time through the image processor and the fp32 model of transformers, casts its tokens
to float16, and asks a faiss IndexFlatIP for one patch at a time. Our paths get what the network sees of a sample and
give the labels of the same 10 x 10 patches inside the margin. Centroids are 6,144 tokens of other samples.

The time of a window is that of the notebook's fastest sample and of a path's fastest batch, because other work on the
machine only adds; they take turns. Weights do not change speed, so random ones do. They do change how near to a tie
labels are: equal labels of a random model say little of a trained one, for which there is benchmarks/devices.py.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from geocentroids_tiler.encoder import EncoderSource, load_encoder
from geocentroids_tiler.encoder.base import Assigner, ChunkLayout, Encoder
from geocentroids_tiler.encoder.export import export_onnx
from geocentroids_tiler.errors import EncoderError
from geocentroids_tiler.scene import make_scene

PATHS = (
    ("torch", "fp32"),
    ("torch", "bf16"),
    ("onnx", "fp32"),
    ("openvino", "fp32"),
    ("openvino", "bf16"),
    ("openvino", "int8"),
)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SAMPLE_PX = 224
LAYOUT = ChunkLayout(window_patches=16, margin_patches=3, stride_patches=10)
CENTROIDS = 6144
SAMPLES_FOR_CENTROIDS = CENTROIDS // LAYOUT.window_patches**2


def make_processor() -> Any:
    """Return the image processor of facebook/dinov2-with-registers-base, which needs no download."""
    return transformers.BitImageProcessorPil(
        do_resize=True,
        size={"shortest_edge": 256},
        resample=3,
        do_center_crop=True,
        crop_size={"height": SAMPLE_PX, "width": SAMPLE_PX},
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
        image_mean=list(MEAN),
        image_std=list(STD),
    )


def save_random_vit_b(folder: Path) -> str:
    """Save a ViT-B/14 with 4 registers and random weights, none of them left at a neutral value, and return where.

    With transformers' own initial values all tokens of a window are nearly the same, and most labels near ties.
    """
    config = transformers.Dinov2WithRegistersConfig(patch_size=14, image_size=518)
    model = transformers.Dinov2WithRegistersModel(config)
    random = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        neutral = 1.0 if "norm" in name and name.endswith("weight") else 0.5 if "lambda" in name else 0.0
        spread = 0.1 if parameter.ndim == 1 else 0.5 if "embeddings.position" in name else 0.023
        parameter.data = neutral + spread * torch.randn(parameter.shape, generator=random)
    model.save_pretrained(folder)
    return str(folder)


def tokens_of(processor: Any, model: Any, sample: NDArray[np.uint8]) -> NDArray[np.float16]:
    """Return the features (256, D) of a sample as the notebook computes them."""
    inputs = processor(images=sample, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**inputs).last_hidden_state[0, 5:]
    features: NDArray[np.float16] = hidden.numpy().astype(np.float16)
    return features


def by_notebook(processor: Any, model: Any, index: Any, samples: NDArray[np.uint8]) -> tuple[NDArray[np.int64], float]:
    """Return labels of shape (N, 10, 10), one search for each of the 256 patches of a sample, and seconds a sample."""
    m, s, P = LAYOUT.margin_patches, LAYOUT.stride_patches, LAYOUT.window_patches
    labels, seconds = [], []
    for sample in samples:
        start = time.perf_counter()
        features = tokens_of(processor, model, sample).astype(np.float32)
        found = np.array([index.search(feature[None], 1)[1][0, 0] for feature in features])
        labels.append(found.reshape(P, P)[m : m + s, m : m + s])
        seconds.append(time.perf_counter() - start)
    return np.stack(labels), min(seconds)


def by_us(encoder: Encoder, assigner: Assigner, windows: list[NDArray[np.uint8]]) -> tuple[NDArray[np.uint16], float]:
    """Return labels of shape (N, 10, 10), and seconds a window, as many at once as keep the device busy."""
    size, labels, seconds = encoder.windows_at_once, [], []
    for i in range(0, len(windows), size):
        start = time.perf_counter()
        labels.append(assigner.assign([[handle] for handle in encoder.encode(windows[i : i + size])])[0])
        seconds.append((time.perf_counter() - start) / size)
    return np.concatenate(labels), min(seconds)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="directory of a checkpoint; default: ViT-B/14 with registers, random weights")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    image = make_scene(1536).rgb
    rng = np.random.default_rng(0)
    corners = rng.integers(0, len(image) - SAMPLE_PX, (arguments.windows + SAMPLES_FOR_CENTROIDS, 2))
    samples = np.stack([image[row : row + SAMPLE_PX, col : col + SAMPLE_PX] for row, col in corners])
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.model or save_random_vit_b(Path(scratch) / "model")
        file = Path(scratch) / "encoder.onnx"
        export_onnx(folder, file, window_patches=LAYOUT.window_patches, mean=MEAN, std=STD, local_files_only=True)
        compare(arguments, folder, file, samples)


def compare(arguments: argparse.Namespace, folder: str, file: Path, samples: NDArray[np.uint8]) -> None:
    """Measure all paths in turns and print them."""
    processor, model = make_processor(), transformers.AutoModel.from_pretrained(folder, use_safetensors=True).eval()
    others, samples = samples[: -arguments.windows], samples[-arguments.windows :]
    centroids = np.concatenate([tokens_of(processor, model, sample) for sample in others]).astype(np.float32)
    index = faiss.IndexFlatIP(centroids.shape[1])
    index.add(centroids)
    seen = processor(images=list(samples), do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"]
    windows = list(np.ascontiguousarray(seen.transpose(0, 2, 3, 1)))
    source = EncoderSource(
        onnx_path=file,
        model=folder,
        revision=None,
        architecture=model.config.model_type,
        dim=model.config.hidden_size,
        patch_px=model.config.patch_size,
        register_tokens=model.config.num_register_tokens,
        window_patches=LAYOUT.window_patches,
        mean=MEAN,
        std=STD,
        sha256=None,
        allow_download=False,
    )
    paths: dict[str, tuple[Encoder, Assigner]] = {}
    for backend, precision in PATHS:
        try:
            encoder = load_encoder(source, backend=backend, precision=precision)
        except EncoderError as error:
            print(f"{backend} {precision}: not here: {error}")
            continue
        paths[f"{backend} {precision}"] = encoder, encoder.assigner(centroids, "inner_product", LAYOUT)
    by_notebook(processor, model, index, samples[:1])
    baseline = float("inf")
    best: dict[str, float] = dict.fromkeys(paths, float("inf"))
    labels: dict[str, NDArray[np.uint16]] = {}
    for _ in range(arguments.rounds):
        expected, seconds = by_notebook(processor, model, index, samples)
        baseline = min(baseline, seconds)
        for name, (encoder, assigner) in paths.items():
            labels[name], seconds = by_us(encoder, assigner, windows)
            best[name] = min(best[name], seconds)
    print(
        f"{arguments.model or 'random ViT-B/14 with registers'}, {len(samples)} windows of {SAMPLE_PX} px, "
        f"{len(centroids)} centroids, {len(np.unique(expected))} of them seen, {os.cpu_count()} cores"
    )
    print(f"{'path':16s} {'windows/s':>10s} {'ms/window':>10s} {'ratio':>6s} {'same label':>10s}")
    print(f"{'notebook':16s} {1 / baseline:10.2f} {1e3 * baseline:10.1f} {1:6.2f} {1:10.4f}")
    for name, found in labels.items():
        seconds, same = best[name], (found == expected).mean()
        print(f"{name:16s} {1 / seconds:10.2f} {1e3 * seconds:10.1f} {baseline / seconds:6.2f} {same:10.4f}")


if __name__ == "__main__":
    main()

"""ONNX Runtime's execution providers: which there are, which to try, and the options each is opened with."""

from __future__ import annotations

import ctypes.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnxruntime as ort

from geocentroids_tiler.errors import EncoderError

PROVIDERS = {
    "tensorrt": "TensorrtExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "cpu": "CPUExecutionProvider",
}
"""Name in settings -> name in ONNX Runtime, in the order in which ``auto`` tries them."""

TENSORRT, CUDA, CPU = PROVIDERS["tensorrt"], PROVIDERS["cuda"], PROVIDERS["cpu"]

GPU_PROVIDERS = (TENSORRT, CUDA)

_CUDA_OPTIONS = {
    # TF32 rounds inputs to 10 bits, and an exhaustive search may pick other kernels in the next process.
    "use_tf32": "0",
    "cudnn_conv_algo_search": "HEURISTIC",
    # Every run has the same shape, so memory is taken once: rounding it up to powers of two only wastes it.
    "arena_extend_strategy": "kSameAsRequested",
}


def engine_folder() -> Path:
    """Return where TensorRT keeps built engines and kernel timings; building takes minutes."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "geocentroids" / "tensorrt"


def provider_list(provider: str, input_shapes: Mapping[str, tuple[int, ...]]) -> list[Any]:
    """Return the providers of one session with their options, best first; the CPU takes what the others cannot.

    Args:
        provider: name in ONNX Runtime.
        input_shapes: the shape that each input with a dynamic axis has in every run.
    """
    if provider == TENSORRT:
        return [(TENSORRT, _tensorrt_options(input_shapes)), (CUDA, _CUDA_OPTIONS), CPU]
    if provider == CUDA:
        return [(CUDA, _CUDA_OPTIONS), CPU]
    return [provider] if provider == CPU else [provider, CPU]


def _tensorrt_options(input_shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Return options with which the one shape in use is built once, in fp32, and found again in the next process."""
    folder = str(engine_folder())
    options = {
        "trt_fp16_enable": "0",
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": folder,
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": folder,
    }
    if input_shapes:
        shapes = ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in input_shapes.items())
        options |= {f"trt_profile_{bound}_shapes": shapes for bound in ("min", "opt", "max")}
    return options


def prepare(provider: str) -> None:
    """Do what a provider needs done before its first session.

    Raises:
        EncoderError: if the folder for engines cannot be made.
    """
    if provider != TENSORRT:
        return
    # The provider has no option for it; NVIDIA's libraries read this variable when they are loaded.
    os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")
    folder = engine_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EncoderError(f"{folder}: cannot be made to keep TensorRT engines in: {error.strerror}") from error


def has_gpu() -> bool:
    """Return whether this ONNX Runtime has a provider for NVIDIA GPUs and the driver of one is installed."""
    return CUDA in ort.get_available_providers() and ctypes.util.find_library("cuda") is not None


def candidates(provider: str) -> list[str]:
    """Return ONNX Runtime's names of the providers to try for ``auto`` or a key of ``PROVIDERS``, best first.

    Raises:
        EncoderError: if the installed ONNX Runtime lacks it.
    """
    available = ort.get_available_providers()
    usable = {key: name for key, name in PROVIDERS.items() if name in available}
    if provider != "auto":
        if provider not in usable:
            raise EncoderError(
                f"provider {provider!r} is not available in the installed ONNX Runtime; "
                f"available: auto, {', '.join(usable)}"
            )
        return [usable[provider]]
    # Every GPU build of ONNX Runtime lists TensorRT; its libraries are a separate, rare install.
    if "tensorrt" in usable and ctypes.util.find_library("nvinfer") is None:
        del usable["tensorrt"]
    return list(usable.values())

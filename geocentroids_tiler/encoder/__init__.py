"""Vision transformers behind one protocol; backends are imported only when they are used."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from geocentroids_tiler.encoder.base import (
    Assigner,
    ChunkLayout,
    ChunkPart,
    DeviceInfo,
    Encoder,
    EncoderSource,
    Labels,
    TokenHandle,
    Windows,
    encoder_source,
)
from geocentroids_tiler.errors import EncoderError

if TYPE_CHECKING:
    from geocentroids_tiler.encoder.onnx import OnnxEncoder
    from geocentroids_tiler.encoder.openvino import OpenVinoEncoder

__all__ = [
    "Assigner",
    "ChunkLayout",
    "ChunkPart",
    "DeviceInfo",
    "Encoder",
    "EncoderSource",
    "Labels",
    "TokenHandle",
    "Windows",
    "encoder_source",
    "load_encoder",
]

BACKENDS = ("auto", "onnx", "openvino", "torch")

INSTALL_ONNX = "pip install 'geocentroids-tiler[cpu]' (or 'geocentroids-tiler[gpu]' with an NVIDIA GPU)"

INSTALL_OPENVINO = "pip install 'geocentroids-tiler[openvino]'"

INSTALL_TORCH = "pip install 'geocentroids-tiler[torch]'"


@dataclass(frozen=True, slots=True)
class _Backend:
    """What a backend reads, computes in and needs."""

    title: str
    reads_onnx: bool
    precisions: tuple[str, ...]
    modules: tuple[str, ...]
    install: str


_BACKENDS = {
    "openvino": _Backend("OpenVINO", True, ("auto", "fp32", "bf16", "int8"), ("openvino", "onnx"), INSTALL_OPENVINO),
    "onnx": _Backend("ONNX Runtime", True, ("auto", "fp32"), ("onnxruntime", "onnx"), INSTALL_ONNX),
    "torch": _Backend(
        "PyTorch and transformers", False, ("auto", "fp32", "bf16"), ("torch", "transformers"), INSTALL_TORCH
    ),
}
"""In the order in which ``auto`` tries them on a CPU."""


def load_encoder(
    source: EncoderSource,
    *,
    backend: str = "auto",
    provider: str = "auto",
    device: str = "auto",
    precision: str = "auto",
    threads: int | None = None,
    batch_windows: int | None = None,
) -> Encoder:
    """Load an encoder and check that it is the one the codebook was made with.

    Args:
        source: where it comes from and what it has to be.
        backend: ``onnx``, ``openvino``, ``torch``, or ``auto``: the first of these that is installed and can do it:
            ONNX Runtime with a GPU, OpenVINO, ONNX Runtime, where there is an ONNX file; torch.
        provider: ONNX Runtime's execution provider: ``auto``, ``tensorrt``, ``cuda``, ``openvino``, ``cpu``. With a
            name, ``auto`` takes ONNX Runtime rather than OpenVINO.
        device: torch device: ``auto``, ``cpu``, ``cuda``, ``cuda:<n>``.
        precision: ``auto`` (bf16 with torch on CUDA and OpenVINO on a CPU that has it, else fp32), ``fp32``, ``bf16``
            (OpenVINO, torch) or ``int8`` (OpenVINO).
        threads: CPU threads of one run.
        batch_windows: windows of one run; None is 1 on a CPU and 32 on a GPU.

    Raises:
        EncoderError: if a package is missing (with the command that installs it), the files are not what
            they should be, or the encoder is not the one that ``source`` describes.
    """
    if backend not in BACKENDS:
        raise EncoderError(f"backend is {backend!r}, allowed: {', '.join(BACKENDS)}")
    chosen = _choose(source, backend, provider, precision)
    if chosen == "torch":
        return _load_torch(source, device, precision, threads, batch_windows)
    return _load_onnx_file(source, chosen, provider, precision, threads, batch_windows)


def _choose(source: EncoderSource, wanted: str, provider: str, precision: str) -> str:
    """Return the backend that is wanted, or the first that can be had.

    Raises:
        EncoderError: if there is none, saying what to change or to install.
    """
    name = source.architecture
    if source.onnx_path is None and source.model is None:
        raise EncoderError(f"the encoder {name} has neither an ONNX file nor a model")
    if wanted in ("onnx", "openvino") and source.onnx_path is None:
        raise EncoderError(
            f"the encoder {name} comes without an ONNX file; make one with geocentroids export-onnx, "
            "or use the torch backend"
        )
    if wanted == "torch" and source.model is None:
        raise EncoderError(f"the encoder {name} comes as an ONNX file only; use the openvino or the onnx backend")
    offered = [
        key
        for key, backend in _BACKENDS.items()
        if wanted in ("auto", key) and (source.onnx_path if backend.reads_onnx else source.model) is not None
    ]
    able = [key for key in offered if precision in _BACKENDS[key].precisions]
    if not able:
        allowed = "; ".join(f"allowed with {key}: {', '.join(_BACKENDS[key].precisions)}" for key in offered)
        raise EncoderError(f"precision is {precision!r}, {allowed}")
    if wanted == "auto" and "onnx" in able and (provider != "auto" or _has_gpu_runtime()):
        able.sort(key=lambda key: key != "onnx")
    for key in able:
        if _importable(*_BACKENDS[key].modules):
            return key
    needs = ", or ".join(f"{_BACKENDS[key].title}: {_BACKENDS[key].install}" for key in able)
    raise EncoderError(f"the encoder {name} needs {needs}")


def _has_gpu_runtime() -> bool:
    """Return whether the installed ONNX Runtime is one for NVIDIA GPUs, on a machine that has one."""
    if not _importable("onnxruntime", "onnx"):
        return False
    from geocentroids_tiler.encoder.providers import has_gpu

    return has_gpu()


def _importable(*modules: str) -> bool:
    """Return whether all modules can be imported; one that is installed but broken cannot."""
    try:
        for module in modules:
            importlib.import_module(module)
    except ImportError:
        return False
    return True


def _load_onnx_file(
    source: EncoderSource,
    backend: str,
    provider: str,
    precision: str,
    threads: int | None,
    batch_windows: int | None,
) -> Encoder:
    if source.onnx_path is None:
        raise EncoderError(f"the encoder {source.architecture} comes without an ONNX file")
    path, sha256 = source.onnx_path, source.sha256
    encoder: OnnxEncoder | OpenVinoEncoder
    if backend == "openvino":
        from geocentroids_tiler.encoder.openvino import OpenVinoEncoder

        encoder = OpenVinoEncoder(
            path, precision=precision, threads=threads, batch_windows=batch_windows, sha256=sha256
        )
    else:
        from geocentroids_tiler.encoder.onnx import OnnxEncoder

        encoder = OnnxEncoder(path, provider=provider, threads=threads, batch_windows=batch_windows, sha256=sha256)
    spec, metadata = encoder.spec, encoder.spec.metadata
    _compare(str(path), "dim", spec.dim, source.dim)
    _compare(str(path), "window_patches", spec.window_patches, source.window_patches)
    _compare(str(path), "patch_px", spec.patch_px, source.patch_px)
    # A file from elsewhere may not say; what it says has to be right.
    for key, expected in (
        ("registers", str(source.register_tokens)),
        ("mean", str(list(source.mean))),
        ("std", str(list(source.std))),
    ):
        if key in metadata:
            _compare(str(path), key, metadata[key], expected)
    return encoder


def _load_torch(
    source: EncoderSource, device: str, precision: str, threads: int | None, batch_windows: int | None
) -> Encoder:
    from geocentroids_tiler.encoder.torch import TorchEncoder

    if source.model is None:
        raise EncoderError(f"the encoder {source.architecture} comes as an ONNX file only")
    encoder = TorchEncoder(
        source.model,
        window_patches=source.window_patches,
        mean=source.mean,
        std=source.std,
        revision=source.revision,
        device=device,
        precision=precision,
        threads=threads,
        batch_windows=batch_windows,
        local_files_only=not source.allow_download,
        sha256=source.sha256,
    )
    _compare(source.model, "dim", encoder.dim, source.dim)
    _compare(source.model, "patch_px", encoder.patch_px, source.patch_px)
    _compare(source.model, "registers", encoder.register_tokens, source.register_tokens)
    return encoder


def _compare(name: str, what: str, found: object, expected: object) -> None:
    if found != expected:
        raise EncoderError(f"{name}: {what} is {found}, expected {expected}")

"""Vision transformers behind one protocol; backends are imported only when they are used."""

from __future__ import annotations

import importlib

from geocentroids_tiler.encoder.base import (
    Assigner,
    ChunkLayout,
    ChunkPart,
    DeviceInfo,
    Encoder,
    EncoderSource,
    TokenHandle,
    encoder_source,
)
from geocentroids_tiler.errors import EncoderError

__all__ = [
    "Assigner",
    "ChunkLayout",
    "ChunkPart",
    "DeviceInfo",
    "Encoder",
    "EncoderSource",
    "TokenHandle",
    "encoder_source",
    "load_encoder",
]

BACKENDS = ("auto", "onnx", "torch")

INSTALL_ONNX = "pip install 'geocentroids-tiler[cpu]' (or 'geocentroids-tiler[gpu]' with an NVIDIA GPU)"

INSTALL_TORCH = "pip install 'geocentroids-tiler[torch]'"


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
        backend: ``onnx``, ``torch``, or ``auto``: ONNX where there is a file and ONNX Runtime, else torch.
        provider: ONNX Runtime's execution provider: ``auto``, ``tensorrt``, ``cuda``, ``openvino``, ``cpu``.
        device: torch device: ``auto``, ``cpu``, ``cuda``, ``cuda:<n>``.
        precision: ``auto``, ``fp32`` or, with torch, ``bf16``.
        threads: CPU threads of one run.
        batch_windows: windows of one run; None is 1 on a CPU and 32 on a GPU.

    Raises:
        EncoderError: if a package is missing (with the command that installs it), the files are not what
            they should be, or the encoder is not the one that ``source`` describes.
    """
    if backend not in BACKENDS:
        raise EncoderError(f"backend is {backend!r}, allowed: {', '.join(BACKENDS)}")
    if _backend(source, backend) == "onnx":
        encoder = _load_onnx(source, provider, precision, threads, batch_windows)
    else:
        encoder = _load_torch(source, device, precision, threads, batch_windows)
    return encoder


def _backend(source: EncoderSource, wanted: str) -> str:
    """Return ``onnx`` or ``torch``, whichever is wanted or possible."""
    name = source.architecture
    has_onnx, has_model = source.onnx_path is not None, source.model is not None
    if wanted == "onnx" and not has_onnx:
        raise EncoderError(
            f"the encoder {name} comes without an ONNX file; make one with geocentroids export-onnx, "
            "or use the torch backend"
        )
    if wanted == "torch" and not has_model:
        raise EncoderError(f"the encoder {name} comes as an ONNX file only; use the onnx backend")
    if not has_onnx and not has_model:
        raise EncoderError(f"the encoder {name} has neither an ONNX file nor a model")
    onnx_ready = has_onnx and wanted != "torch" and _importable("onnxruntime", "onnx")
    if onnx_ready:
        return "onnx"
    if wanted == "onnx":
        raise EncoderError(f"the encoder {name} needs ONNX Runtime: {INSTALL_ONNX}")
    if has_model and _importable("torch", "transformers"):
        return "torch"
    if wanted == "torch" or not has_onnx:
        raise EncoderError(f"the encoder {name} needs PyTorch and transformers: {INSTALL_TORCH}")
    other = f", or PyTorch and transformers: {INSTALL_TORCH}" if has_model else ""
    raise EncoderError(f"the encoder {name} needs ONNX Runtime: {INSTALL_ONNX}{other}")


def _importable(*modules: str) -> bool:
    """Return whether all modules can be imported; one that is installed but broken cannot."""
    try:
        for module in modules:
            importlib.import_module(module)
    except ImportError:
        return False
    return True


def _load_onnx(
    source: EncoderSource, provider: str, precision: str, threads: int | None, batch_windows: int | None
) -> Encoder:
    from geocentroids_tiler.encoder.onnx import OnnxEncoder

    if source.onnx_path is None:
        raise EncoderError(f"the encoder {source.architecture} comes without an ONNX file")
    if precision not in ("auto", "fp32"):
        raise EncoderError(f"precision is {precision!r}, allowed with onnx: auto, fp32")
    path = source.onnx_path
    encoder = OnnxEncoder(path, provider=provider, threads=threads, batch_windows=batch_windows, sha256=source.sha256)
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

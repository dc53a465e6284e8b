"""Devices that torch computes on."""

from __future__ import annotations

import torch

from geocentroids_tiler.errors import InputError


def find_device(name: str) -> torch.device:
    """Return the device of a name: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        InputError: if there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or not (number or "0").isdecimal():
        raise InputError(f"device is {name!r}; it must be auto, cpu, cuda or cuda:N")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise InputError(f"device is {name!r}, but PyTorch finds {torch.cuda.device_count()} CUDA devices here")
    return torch.device(name if kind == "cuda" else "cpu")


def has_bfloat16(device: torch.device) -> bool:
    """Say whether products in bfloat16 are faster: with instructions for them, else they are emulated."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # Private, and without a public counterpart in torch 2.13; elsewhere than on x86 they say no.
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, check, bool)()) for check in checks)

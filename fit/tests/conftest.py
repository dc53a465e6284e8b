"""What tests of fitting share: a small encoder, and a shorter search for colours."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from geocentroids_fit import color


@pytest.fixture(scope="session", autouse=True)
def _few_rotations() -> Iterator[None]:
    """What is tested does not depend on how many orientations are tried."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(color, "ROTATIONS", 12)
        patch.setattr(color, "SEARCH_SAMPLE", 200)
        yield


@pytest.fixture(scope="session")
def encoder_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the DINOv2 architecture with random weights, for windows of 8 patches."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=2, patch_size=14, image_size=112, initializer_range=0.3
    )
    folder = tmp_path_factory.mktemp("model") / "encoder"
    transformers.Dinov2WithRegistersModel(config).save_pretrained(folder)
    return folder

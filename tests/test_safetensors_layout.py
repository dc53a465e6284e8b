"""Places of arrays against the safetensors library."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from geocentroids_tiler.safetensors_layout import array_places


def test_bytes_at_the_places_are_the_arrays(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "a": rng.normal(size=(3, 5)).astype(np.float16),
        "b": rng.integers(0, 255, 7, np.uint8),
        "none": np.empty((0, 4), np.float32),
        "c": rng.integers(0, 9, (2, 2, 2)),
    }
    save_file(arrays, tmp_path / "x.safetensors", metadata={"not": "an array"})
    content, places = (tmp_path / "x.safetensors").read_bytes(), array_places(tmp_path / "x.safetensors")
    assert set(places) == set(arrays)
    for name, array in load_file(tmp_path / "x.safetensors").items():
        place = places[name]
        assert content[place.offset : place.offset + place.size_bytes] == array.tobytes()
        assert place.shape == array.shape
    assert [places[name].dtype for name in "abc"] == ["F16", "U8", "I64"]

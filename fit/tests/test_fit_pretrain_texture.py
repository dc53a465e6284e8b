"""The bank of hand-made statistics, against numpy and against what is known of simple patterns."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from geocentroids_fit.pretrain.texture import WAVELENGTHS_PX, texture_bank  # noqa: E402

OWN = 24
"""Statistics of a patch itself; as many of its surroundings follow."""
FIRST_ENERGY = 15


def random_image(rows: int = 5, cols: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).random((1, 3, rows * 14, cols * 14), np.float32))


def grating(wavelength: float, angle: float = 0.0) -> torch.Tensor:
    row, col = np.mgrid[:112, :112]
    wave = 0.5 + 0.4 * np.sin(2 * np.pi / wavelength * (np.cos(angle) * col + np.sin(angle) * row))
    return torch.from_numpy(np.broadcast_to(wave, (1, 3, 112, 112)).astype(np.float32).copy())


def test_moments_are_those_of_numpy() -> None:
    image = random_image()
    found = texture_bank(image)[0].numpy()
    blocks = image[0].numpy().astype(np.float64).reshape(3, 5, 14, 6, 14)
    np.testing.assert_allclose(found[:3], blocks.mean(axis=(2, 4)), atol=1e-6)
    np.testing.assert_allclose(np.exp(found[6:9]) - 0.005, blocks.std(axis=(2, 4)), atol=1e-5)
    logs = np.log(blocks.mean(axis=(2, 4)) + 0.03)
    np.testing.assert_allclose(found[3:6], logs - logs.mean(axis=0), atol=1e-6)


def test_surroundings_are_means_of_nine() -> None:
    found = texture_bank(random_image())[0].numpy().astype(np.float64)
    assert len(found) == 2 * OWN
    np.testing.assert_allclose(found[OWN:, 2, 3], found[:OWN, 1:4, 2:5].mean(axis=(1, 2)), atol=1e-5)
    corner = np.pad(found[:OWN], ((0, 0), (1, 1), (1, 1)), mode="edge")[:, :3, :3].mean(axis=(1, 2))
    np.testing.assert_allclose(found[OWN:, 0, 0], corner, atol=1e-5)


@pytest.mark.parametrize("number", range(len(WAVELENGTHS_PX)))
def test_a_grating_is_told_by_its_wavelength(number: int) -> None:
    middle = texture_bank(grating(WAVELENGTHS_PX[number]))[0, :, 4, 4]
    strongest = middle[[FIRST_ENERGY + 3 * k for k in range(3)]]
    assert int(strongest.argmax()) == number


@pytest.mark.parametrize("turn", range(1, 8))
def test_turning_an_image_turns_the_map_and_nothing_else(turn: int) -> None:
    def turned(values: torch.Tensor) -> torch.Tensor:
        for bit, axis in ((1, -1), (2, -2)):
            values = values.flip(axis) if turn & bit else values
        return values.transpose(-1, -2) if turn & 4 else values

    image = random_image()
    torch.testing.assert_close(texture_bank(turned(image)), turned(texture_bank(image)), atol=2e-4, rtol=0)


def test_plain_ground_has_no_texture_and_what_is_not_a_whole_patch_is_left_out() -> None:
    plain = texture_bank(torch.full((1, 3, 33, 47), 0.5))
    assert plain.shape == (1, 2 * OWN, 2, 3)
    np.testing.assert_allclose(plain[0, FIRST_ENERGY:OWN], np.log(0.002), atol=0.02)
    assert torch.isfinite(texture_bank(torch.zeros(1, 3, 28, 28))).all()

"""Views of the ground: they show the ground that they say they show, however they are turned, scaled and cut."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from geocentroids_fit.pretrain.losses import SAME_GROUND_PATCHES, same_ground  # noqa: E402
from geocentroids_fit.pretrain.scenes import Scene  # noqa: E402
from geocentroids_fit.pretrain.views import Sampler, Views, other_camera, sample_maps  # noqa: E402
from geocentroids_tiler.grid import PatchRange  # noqa: E402

ROWS, COLS = 40, 50


def ramp_scene(rows: int = ROWS, cols: int = COLS, collar: int = 0) -> Scene:
    """A scene whose red grows with the row and green with the column, so that a pixel's colour tells its place."""
    row, col = np.mgrid[: rows * 14, : cols * 14]
    pixels = np.stack(
        [(row + 0.5) * 255 / (rows * 14), (col + 0.5) * 255 / (cols * 14), np.full(row.shape, 99)], axis=-1
    )
    valid = np.ones(row.shape, bool)
    valid[:, : collar * 14] = False
    labelled = valid[::14, ::14].copy()
    return Scene("ramp", None, PatchRange(0, rows, 0, cols), pixels.round().astype(np.uint8), valid, labelled)


def place_map(rows: int = ROWS, cols: int = COLS) -> torch.Tensor:
    return torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij"), dim=-1).float()


def draw(scene: Scene, count: int, side: int, seed: int = 0) -> Views:
    return Sampler([scene], 14).draw(count, side, np.random.default_rng(seed))


def test_patches_show_the_ground_at_their_middles() -> None:
    views = draw(ramp_scene(), 60, 8)
    colour = torch.nn.functional.avg_pool2d(views.pixels, 14).permute(0, 2, 3, 1)  # (B, 8, 8, 3)
    shown = torch.stack([colour[..., 0] * ROWS, colour[..., 1] * COLS], dim=-1) - 0.5
    whole = views.valid.flatten(1).all(1)  # others hold mirror images
    assert whole.sum() > 30
    error = (shown - views.centres)[whole].abs()
    assert error.max() < 0.1  # half a level of 8 bits is 0.1 of a patch in columns; measured: 0.015
    assert error.mean() < 0.02


def test_views_are_turned_scaled_aligned_and_cut() -> None:
    views = draw(ramp_scene(), 200, 8)
    down = views.centres[:, 1, 0] - views.centres[:, 0, 0]  # one patch further in the view, on the ground: (B, 2)
    right = views.centres[:, 0, 1] - views.centres[:, 0, 0]
    turns = {
        tuple(torch.sign(torch.cat([a, b]).round(decimals=3)).int().tolist()) for a, b in zip(down, right, strict=True)
    }
    assert len(turns) == 8
    step = down.norm(dim=-1)
    assert step.min() >= 0.77
    assert step.max() <= 1.21
    on_grid = (views.centres == views.centres.round()).flatten(1).all(1)
    assert 0.3 < on_grid.float().mean() < 0.5
    share = views.valid.float().mean((1, 2))
    assert (share == 1).float().mean() > 0.6
    assert (share < 0.9).float().mean() > 0.05
    assert views.valid.flatten(1).any(1).float().mean() > 0.97


def test_a_collar_is_never_valid_and_never_shown() -> None:
    scene = ramp_scene(collar=20)
    scene.pixels[:, : 20 * 14] = (0, 0, 255)  # nothing else is as blue
    views = draw(scene, 60, 8)
    assert not views.valid[views.centres[..., 1] < 19].any()
    assert views.pixels[:, 2].amax((1, 2))[views.valid.flatten(1).any(1)].max() < 0.5


def test_scenes_smaller_than_a_view_are_continued() -> None:
    views = draw(ramp_scene(5, 4), 20, 16)
    inside = ((views.centres > -0.3) & (views.centres < torch.tensor([4.3, 3.3]))).all(-1)
    assert not views.valid[~((views.centres > -0.8) & (views.centres < torch.tensor([4.8, 3.8]))).all(-1)].any()
    assert views.valid[inside].float().mean() > 0.8  # the rest is cut away
    assert views.pixels.amin() >= 0.0
    assert (views.pixels[:, 2] > 0.3).all()


def test_draws_depend_on_the_generator_alone() -> None:
    one, again, other = (draw(ramp_scene(), 5, 8, seed) for seed in (3, 3, 4))
    assert torch.equal(one.pixels, again.pixels)
    assert torch.equal(one.centres, again.centres)
    assert not torch.equal(one.pixels, other.pixels)


def test_larger_folders_are_seen_more_often_but_not_in_proportion() -> None:
    def named(name: str, side: int) -> Scene:
        return replace(ramp_scene(side, side), image=name)

    scenes = [named("small/a", 10), named("large/a", 40), named("large/b", 20)]
    views = Sampler(scenes, 14).draw(900, 4, np.random.default_rng(0))
    share = np.bincount(views.scene, minlength=3) / 900
    # the roots of 100 and 2,000 are as 1 to 4.47; within a folder 1,600 and 400 are as 4 to 1
    np.testing.assert_allclose(share, [0.183, 0.654, 0.163], atol=0.04)


def test_maps_are_sampled_at_the_middles() -> None:
    views = draw(ramp_scene(), 30, 8)
    found = sample_maps([place_map()], views)
    limits = torch.tensor([ROWS, COLS]) - 1.0
    torch.testing.assert_close(found, torch.minimum(views.centres.clamp_min(0), limits), atol=1e-4, rtol=0)


def test_pairs_show_the_same_ground() -> None:
    one, other = Sampler([ramp_scene()], 14).draw_pairs(20, (8, 12), np.random.default_rng(1))
    first, second = same_ground(one, other)
    assert len(first) > 20 * 4
    a, b = one.centres.flatten(0, 2)[first], other.centres.flatten(0, 2)[second]
    assert (a - b).norm(dim=-1).max() < SAME_GROUND_PATCHES
    assert torch.equal(first // 64, second // 144)  # of the same pair
    assert one.valid.flatten()[first].all()
    assert other.valid.flatten()[second].all()
    distance = (one.centres[0].reshape(-1, 1, 2) - other.centres[0].reshape(1, -1, 2)).norm(dim=-1)
    best = distance.min(1)
    expected = (best.values < SAME_GROUND_PATCHES) & one.valid[0].flatten() & other.valid[0].flatten()[best.indices]
    assert int((first < 64).sum()) == int(expected.sum())


def test_pairs_are_found_far_from_the_corner() -> None:
    one, other = Sampler([ramp_scene()], 14).draw_pairs(4, (8, 12), np.random.default_rng(1))
    far = [replace(views, centres=views.centres + 4000) for views in (one, other)]
    assert all(torch.equal(a, b) for a, b in zip(same_ground(one, other), same_ground(*far), strict=True))


def test_views_show_the_place_they_are_drawn_for() -> None:
    scene = ramp_scene()
    only = replace(scene, labelled=np.zeros_like(scene.labelled))
    only.labelled[17, 31] = True
    views = Sampler([only], 14).draw(100, 4, np.random.default_rng(0))
    near = (views.centres - torch.tensor([17.0, 31.0])).norm(dim=-1).flatten(1).amin(1)
    assert near.max() < 0.9


def test_other_cameras_change_what_is_seen_within_bounds() -> None:
    pixels = draw(ramp_scene(), 16, 8).pixels
    assert other_camera(pixels, 0, np.random.default_rng(0)) is pixels
    seen = other_camera(pixels, 1, np.random.default_rng(0))
    assert seen.shape == pixels.shape
    assert seen.amin() >= 0
    assert seen.amax() <= 1
    changes = (seen - pixels).abs().mean((1, 2, 3))
    assert changes.min() > 0.005
    weak = (other_camera(pixels, 0.3, np.random.default_rng(0)) - pixels).abs().mean()
    assert weak < 0.6 * changes.mean()
    assert torch.equal(seen, other_camera(pixels, 1, np.random.default_rng(0)))

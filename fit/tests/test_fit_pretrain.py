"""Training an encoder: first weights, targets, losses, and the command with its state, errors and result."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from small_images import write_image

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from geocentroids_fit.cli import main  # noqa: E402
from geocentroids_fit.images import ImageFolder  # noqa: E402
from geocentroids_fit.pretrain import ModelConfig, make_pretrain_config, pretrain  # noqa: E402
from geocentroids_fit.pretrain import scenes as scenes_module  # noqa: E402
from geocentroids_fit.pretrain.learner import normalised, token_maps  # noqa: E402
from geocentroids_fit.pretrain.losses import Prototypes, sinkhorn, surprise  # noqa: E402
from geocentroids_fit.pretrain.model import (  # noqa: E402
    FLOOR_DIRECTION,
    PLACE_DIMS,
    WHITENED_STD,
    WHITENING_FLOOR,
    Student,
    start,
)
from geocentroids_fit.pretrain.run import _draft  # noqa: E402
from geocentroids_fit.pretrain.scenes import Scene, read_scenes, share_of  # noqa: E402
from geocentroids_fit.pretrain.targets import join  # noqa: E402
from geocentroids_fit.pretrain.train import learning_rate  # noqa: E402
from geocentroids_tiler.errors import InputError  # noqa: E402
from geocentroids_tiler.grid import PatchRange  # noqa: E402
from geocentroids_tiler.source.fill import fill_invalid  # noqa: E402

SMALL = ModelConfig(width=64, depth=2, heads=2, grid_patches=12)
OPTIONS = {
    "width": 64,
    "depth": 2,
    "heads": 2,
    "batch_patches": 128,
    "sides": (4, 6),
    "settle_sides": (4, 6),
    "warmup_steps": 2,
}


def student(config: ModelConfig = SMALL) -> Student:
    torch.manual_seed(0)
    made = Student(config).eval()
    start(made, torch.randn(2000, 3, 14, 14))
    return made


def scene(rows: int = 15, cols: int = 9, collar: int = 0, seed: int = 0) -> Scene:
    pixels = np.random.default_rng(seed).integers(0, 255, (rows * 14, cols * 14, 3), np.uint8)
    valid = np.ones(pixels.shape[:2], bool)
    valid[:, : collar * 14] = False
    return Scene(f"scene {seed}", None, PatchRange(0, rows, 0, cols), pixels, valid, valid[::14, ::14].copy())


@torch.no_grad()
def test_the_student_is_the_model_that_transformers_loads(tmp_path: Path) -> None:
    made = student()
    made.save(tmp_path)
    model = transformers.AutoModel.from_pretrained(tmp_path, attn_implementation="eager")
    pixels = torch.randn(2, 3, 168, 168)
    expected = model(pixel_values=pixels).last_hidden_state[:, 5:].unflatten(1, (12, 12))
    torch.testing.assert_close(made(pixels), expected, atol=1e-5, rtol=0)
    masked = torch.zeros(2, 12, 12, dtype=torch.bool)
    masked[:, 3:5] = True
    expected = model(pixel_values=pixels, bool_masked_pos=masked.flatten(1)).last_hidden_state[:, 5:]
    torch.testing.assert_close(made(pixels, masked).flatten(1, 2), expected, atol=1e-5, rtol=0)
    again = student()
    again.model.encoder.layer[0].mlp.fc1.weight.zero_()
    again.load(tmp_path)
    torch.testing.assert_close(again(pixels), made(pixels))


@torch.no_grad()
def test_first_patch_embeddings_are_whitened_patches() -> None:
    rng = torch.Generator().manual_seed(0)
    patches = torch.randn(4000, 588, generator=rng) @ torch.randn(588, 588, generator=rng) / 20 + 0.3
    made = Student(SMALL)
    start(made, patches.view(-1, 3, 14, 14))
    embedded = made.model.embeddings.patch_embeddings(patches.view(-1, 3, 14, 14))[:, 0].double()
    content = SMALL.width - PLACE_DIMS
    assert embedded.mean(0).abs().max() < 1e-3
    covariance = torch.cov(embedded[:, :content].T)
    assert (covariance - torch.diag(covariance.diag())).abs().max() < 1e-3
    values = np.linalg.eigvalsh(np.cov(patches.double().numpy().T))[::-1]
    expected = WHITENED_STD**2 * values / (values + WHITENING_FLOOR * values[FLOOR_DIRECTION])
    np.testing.assert_allclose(covariance.diag(), expected[:content], rtol=1e-3)
    assert embedded[:, content:].abs().max() == 0


@torch.no_grad()
def test_heads_look_near_at_first() -> None:
    made = student()
    pixels = torch.randn(1, 3, 168, 168)
    before = made(pixels)
    changed = pixels.clone()
    changed[..., 84:98, 84:98] = torch.randn(1, 3, 14, 14)  # patch 6, 6
    effect = (made(changed) - before).norm(dim=-1)[0]  # (12, 12)
    near = torch.cat([effect[5:8, 5:8].flatten()[:4], effect[5:8, 5:8].flatten()[5:]]).mean()
    far = torch.cat([effect[:2].flatten(), effect[-2:].flatten()]).mean()
    assert near > 2 * far  # measured: 32 times


@torch.no_grad()
def test_the_place_in_the_grid_hardly_shows_in_first_tokens() -> None:
    made = student(ModelConfig(width=64, depth=2, heads=2, grid_patches=24))
    pixels = torch.randn(4, 3, 112, 112)
    one, other = made(pixels, None, (0, 0)), made(pixels, None, (9, 14))
    between = (one[0] - one[1]).norm(dim=-1).mean()
    assert (one - other).norm(dim=-1).mean() < 0.5 * between  # measured: 0.27


def test_sinkhorn_uses_all_prototypes_alike() -> None:
    scores = torch.randn(600, 20, generator=torch.Generator().manual_seed(0))
    shares = sinkhorn(scores, 0.5)
    torch.testing.assert_close(shares.sum(1), torch.ones(600))
    assert (shares.sum(0) / 30 - 1).abs().max() < 0.05
    assert (torch.softmax(scores / 0.5, 1).sum(0) / 30 - 1).abs().max() > 0.1  # what it mends
    # float64, many rounds
    exact = np.exp(scores.double().numpy() / 0.5)
    for _ in range(200):
        exact /= exact.sum(0)
        exact /= exact.sum(1, keepdims=True)
    assert np.abs(shares.numpy() - exact).max() < 0.02


def test_surprise_is_cross_entropy() -> None:
    generator = torch.Generator().manual_seed(0)
    scores, shares = torch.randn(50, 7, generator=generator), torch.rand(50, 7, generator=generator).softmax(1)
    expected = torch.nn.functional.cross_entropy(scores / 0.1, shares)
    torch.testing.assert_close(surprise(scores, shares), expected)
    assert surprise(scores[:0], shares[:0]) == 0


def test_scores_of_prototypes_are_cosines() -> None:
    torch.manual_seed(0)
    scores = Prototypes(64, 30)(torch.randn(100, 64) + 5)  # what tokens have in common does not matter
    assert scores.shape == (100, 30)
    assert scores.abs().max() <= 1
    assert scores.mean(0).abs().max() < 0.05


@torch.no_grad()
def test_token_maps_are_weighted_means_over_windows() -> None:
    config = make_pretrain_config(Path(), Path("out"), (), {**OPTIONS, "grid_patches": 12, "precision": "fp32"})
    made, image = student(config.model), scene(15, 9, collar=2)
    found = token_maps(made, [image], config)[0].float()
    assert found.shape == (15, 9, 64)
    row, col = 7, 4
    total, weights = torch.zeros(64), 0.0
    for top in (0, 6, -6):
        for left in (0, -6, 6):
            if not (0 <= row - top < 12 and 0 <= col - left < 12):
                continue
            rows, cols = np.arange(top * 14, (top + 12) * 14), np.arange(left * 14, (left + 12) * 14)
            known = np.isin(rows, np.arange(210))[:, None] & (np.isin(cols, np.arange(28, 126)))
            mirror_rows = np.where(rows < 0, -1 - rows, np.where(rows >= 210, 419 - rows, rows))
            mirror_cols = np.where(cols < 0, -1 - cols, np.where(cols >= 126, 251 - cols, cols))
            pixels = fill_invalid(image.pixels[np.ix_(mirror_rows, mirror_cols)], known)
            seen = normalised(torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255, config)
            weight = min(row - top + 0.5, 11.5 - (row - top)) * min(col - left + 0.5, 11.5 - (col - left))
            total += weight * made(seen)[0, row - top, col - left]
            weights += weight
    torch.testing.assert_close(found[row, col], total / weights, atol=4e-3, rtol=0)  # float16


def test_joined_targets_keep_the_angles_of_both_descriptions() -> None:
    generator = torch.Generator().manual_seed(0)
    scenes = [scene(seed=seed) for seed in range(3)]
    bank = [torch.randn(15, 9, 5, generator=generator) * 3 + 1 for _ in scenes]
    basis = torch.randn(20, 32, generator=generator)
    tokens = [torch.randn(15, 9, 20, generator=generator) @ basis for _ in scenes]  # 20 + 5 directions fit into 32
    joined = torch.cat([own.flatten(0, 1) for own in join(bank, tokens, scenes, 0)]).float()
    assert joined.shape == (405, 32)
    torch.testing.assert_close(joined.norm(dim=1), torch.ones(405), atol=1e-3, rtol=0)

    def described(maps: list[torch.Tensor]) -> np.ndarray:
        rows = torch.cat([own.flatten(0, 1) for own in maps]).double().numpy()
        rows = (rows - rows.mean(0)) / rows.std(0, ddof=1)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    both = np.concatenate([described(bank), 2 * described(tokens)], axis=1)
    for part in np.split(both, 3):
        part -= 0.5 * 135 / 2135 * (part.mean(0) - both.mean(0))  # an image of 135 patches
    both -= both.mean(0)
    both /= np.linalg.norm(both, axis=1, keepdims=True)
    np.testing.assert_allclose((joined @ joined.T).numpy(), both @ both.T, atol=4e-3)
    # no other turn of the same vectors lies nearer to the tokens
    centred = torch.cat([own.flatten(0, 1) for own in tokens])
    centred = centred - centred.mean(0)
    products = joined.T @ centred
    assert torch.trace(products) > 0.97 * torch.linalg.svdvals(products).sum()


def test_the_learning_rate_starts_and_ends_low_in_both_stages() -> None:
    config = make_pretrain_config(Path(), Path("out"), (), {"learn_steps": 100, "settle_steps": 50, "warmup_steps": 10})
    rates = np.array([learning_rate(step, config) for step in range(config.steps)])
    assert rates[0] == pytest.approx(1.5e-4, rel=0.01)
    assert rates.argmax() in range(8, 12)
    assert rates[99] < 0.05 * rates.max()
    assert rates[149] < 0.05 * rates.max()
    assert 0.4 < rates[100:].max() / rates.max() < 0.5


@pytest.fixture(scope="module")
def imagery(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretrain") / "imagery"
    for number in range(3):
        write_image(folder / f"{number}.tif", number, left=560_000.0 + 500 * number)
    (folder / "text.tif").write_text("no image")
    return folder


def train(imagery: Path, out: Path, said: list[str] | None = None, **options: object) -> list[str]:
    said = [] if said is None else said
    given = {**OPTIONS, "learn_steps": 30, "settle_steps": 20, "prototypes": 16, **options}
    pretrain(make_pretrain_config(imagery, out, (), given), said.append)
    return said


@pytest.fixture(scope="module")
def trained(imagery: Path) -> Path:
    out = imagery.parent / "encoder"
    said = train(imagery, out, learn_steps=60, settle_steps=60)
    assert any(line.startswith("left out: text.tif") for line in said)
    return out


def test_a_training_gives_a_dinov2_that_learnt_something(trained: Path) -> None:
    config = json.loads((trained / "config.json").read_text())
    assert (config["model_type"], config["hidden_size"], config["patch_size"]) == ("dinov2_with_registers", 64, 14)
    assert transformers.AutoModel.from_pretrained(trained).config.num_register_tokens == 4
    work = trained.with_name("encoder.work")
    lines = [json.loads(line) for line in (work / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [25, 50, 60, 75, 100, 120]
    assert lines[2]["statistics"] < 0.95 * lines[0]["statistics"]  # measured: 0.84
    assert lines[-1]["distance"] < 0.95 * lines[3]["distance"]
    assert (work / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert (work / "learnt" / "model.safetensors").is_file()


class EndedError(Exception):
    pass


class Until(list[str]):
    """Ends a training when it says something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text

    def append(self, line: str) -> None:
        super().append(line)
        if line.startswith(self.text):
            raise EndedError


@pytest.mark.parametrize("text", ["step 25 ", "second stage", "step 50 "])
def test_a_training_that_was_ended_comes_to_the_same_weights(imagery: Path, tmp_path: Path, text: str) -> None:
    train(imagery, tmp_path / "straight", keep_every_s=0)
    with pytest.raises(EndedError):
        train(imagery, tmp_path / "ended", Until(text), keep_every_s=0)
    with (tmp_path / "ended.work" / "log.jsonl").open("a") as log:
        log.write('{"step": 2')  # torn by a kill
    said = train(imagery, tmp_path / "ended", keep_every_s=0)
    assert any("goes on after step" in line for line in said)
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("straight", "ended"))
    assert one == other


def test_a_training_that_begins_anew_keeps_nothing_of_an_earlier_one(imagery: Path, tmp_path: Path) -> None:
    train(imagery, tmp_path / "fresh")
    with pytest.raises(EndedError):
        train(imagery, tmp_path / "made", Until("step 50 "), seed=1)
    (tmp_path / "made.work" / "state.safetensors").unlink()
    train(imagery, tmp_path / "made")
    for name in ("model.safetensors", "../made.work/learnt/model.safetensors"):
        other = name.replace("made.work", "fresh.work")
        assert (tmp_path / "made" / name).read_bytes() == (tmp_path / "fresh" / other).read_bytes()
    steps = [json.loads(line)["step"] for line in (tmp_path / "made.work" / "log.jsonl").read_text().splitlines()]
    assert steps == [25, 30, 50]


def test_a_second_stage_without_the_first_one_s_result_is_refused(imagery: Path, tmp_path: Path) -> None:
    with pytest.raises(EndedError):
        train(imagery, tmp_path / "made", Until("step 50 "), keep_every_s=0)
    shutil.rmtree(tmp_path / "made.work" / "learnt")
    with pytest.raises(InputError, match="is gone, which the second stage learns from"):
        train(imagery, tmp_path / "made", keep_every_s=0)


def test_weights_are_not_spoilt_by_values_that_are_not_finite(imagery: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the gradient is (nan|inf) at step \d+; a lower learning rate"):
        train(imagery, tmp_path / "made", learning_rate=1e30, precision="fp32")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_the_command_trains(imagery: Path, tmp_path: Path) -> None:
    small = ["--width", 64, "--depth", 1, "--heads", 2, "--batch-patches", 64, "--precision", "fp32"]
    result = run("pretrain", imagery, "--out", tmp_path / "made", "--learn-steps", 2, "--settle-steps", 1, *small)
    assert result.exit_code == 0, result.output
    assert "text.tif" in result.output
    assert (tmp_path / "made" / "model.safetensors").is_file()
    again = run("pretrain", imagery, "--out", tmp_path / "made")
    assert again.exit_code == 1
    assert "is there already" in again.output


def test_values_that_are_not_accepted_are_named(imagery: Path, tmp_path: Path) -> None:
    for options, text in (
        (["--width", 65], "a width of 65 is not shared by 3 heads"),
        (["--width", 600], "width"),
        (["--gsd", 200], "gsd_m"),
        (["--learn-steps", 0], "learn_steps"),
        (["--exclude", "*"], "no GeoTIFF"),
        (["--device", "tpu"], "tpu"),
    ):
        result = run("pretrain", imagery, "--out", tmp_path / "none", *options)
        assert result.exit_code == 1, result.output
        assert text in result.output
    with pytest.raises(InputError, match="sides are 3, 8; accepted: 4 to 32"):
        make_pretrain_config(imagery, tmp_path, (), {"sides": (3, 8)})


def test_a_state_of_other_settings_or_a_broken_one_is_refused(trained: Path, imagery: Path, tmp_path: Path) -> None:
    state = trained.with_name("encoder.work") / "state.safetensors"
    work = tmp_path / "other.work"
    work.mkdir()
    (work / "state.safetensors").write_bytes(state.read_bytes())
    with pytest.raises(InputError, match="belongs to a training of other images or settings"):
        train(imagery, tmp_path / "other", seed=1)
    (work / "state.safetensors").write_bytes(state.read_bytes()[:1000])
    with pytest.raises(InputError, match="cannot be read"):
        train(imagery, tmp_path / "other")


def test_images_without_data_are_refused(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "text.tif").write_text("no image")
    with pytest.raises(InputError, match=r"no patch of the 1 images has data \(text.tif"):
        train(tmp_path / "images", tmp_path / "out")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
def test_it_trains_on_a_gpu(imagery: Path, tmp_path: Path) -> None:
    train(imagery, tmp_path / "made", device="cuda")
    assert (tmp_path / "made" / "model.safetensors").is_file()


def test_large_images_give_less_when_memory_is_short() -> None:
    assert share_of([100, 100, 5000], 60_000, 10_000) == 60_000
    share = share_of([100, 100, 5000], 60_000, 1000)
    assert 700 < share <= 800  # the small ones stay whole
    assert share_of([5, 5], 3, 6) == 3
    assert share_of([10] * 50, 10, 20) == 1


def test_blocks_of_large_images_are_whole_patches_of_them(imagery: Path) -> None:
    config = make_pretrain_config(imagery, Path("out"), (), {"width": 64, "depth": 1, "heads": 2})
    images = ImageFolder(imagery, ("0.tif", "1.tif"))
    whole = read_scenes(images, _draft(config), 60_000, 60_000, 0)
    assert len(whole.scenes) == 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes_module, "BLOCK_PATCHES", 8)
        parts = read_scenes(images, _draft(config), 130, 60_000, 0)
    for image in images.names:
        counts = [int(part.labelled.sum()) for part in parts.scenes if part.image == image]
        assert sum(counts) >= 130 > sum(counts[:-1])
    for part in parts.scenes:
        of = next(own for own in whole.scenes if own.image == part.image)
        rows, cols = part.patches.within(of.patches)
        np.testing.assert_array_equal(part.labelled, of.labelled[rows, cols])
        pixels = of.pixels[rows.start * 14 : rows.stop * 14, cols.start * 14 : cols.stop * 14]
        known = part.valid
        np.testing.assert_array_equal(part.pixels[known], pixels[known])

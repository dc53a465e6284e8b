"""From a folder of images to an encoder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from geocentroids_fit.devices import find_device
from geocentroids_fit.files import PART_SUFFIX, digest_of
from geocentroids_fit.images import ImageFolder, list_images
from geocentroids_fit.pack import draft_codebook
from geocentroids_fit.pretrain import train
from geocentroids_fit.pretrain.checkpoint import State, load_state, save_state
from geocentroids_fit.pretrain.config import PATCH_PX, PretrainConfig
from geocentroids_fit.pretrain.curve import draw_curve
from geocentroids_fit.pretrain.learner import Learner, normalised, token_maps
from geocentroids_fit.pretrain.model import Student, start
from geocentroids_fit.pretrain.scenes import Scenes, read_scenes
from geocentroids_fit.pretrain.targets import join, sample, standard_of, texture_maps
from geocentroids_fit.pretrain.views import Sampler
from geocentroids_fit.shards import FeatureSettings
from geocentroids_tiler.codebook import Codebook, EncoderSection
from geocentroids_tiler.errors import InputError

STATE_FILE, LOG_FILE, CURVE_FILE, LEARNT_DIR = "state.safetensors", "log.jsonl", "curve.png", "learnt"
FIRST_VIEWS = 128
"""Views whose patches the first weights are made of."""
WITHOUT_RESULT = {"images", "exclude", "out", "keep_every_s", "workers"}
"""Settings that change nothing of the result; which images are used is told by the images themselves."""


def pretrain(config: PretrainConfig, say: Callable[[str], None]) -> None:
    """Train an encoder and write it to ``config.out`` as ``config.json`` and ``model.safetensors``.

    Beside it, in ``OUT.work``, are the state (a training that was ended at any moment goes on from there), the log and
    the curve of the losses, and the encoder as it was after the first stage.

    Args:
        config: what to do.
        say: told in one line what begins or was found.

    Raises:
        InputError: if no image can be used, ``out`` is there already, or ``OUT.work`` is of another training.
    """
    if config.out.exists():
        raise InputError(f"{config.out} is there already; choose another --out or delete it")
    work = config.out.with_name(config.out.name + ".work")
    device = find_device(config.device)
    scenes = _read(config, say)
    bank = texture_maps(scenes.scenes)
    standard = standard_of(sample(bank, scenes.scenes, config.seed))
    bank = [standard(own).half() for own in bank]
    sampler = Sampler(scenes.scenes, PATCH_PX)
    state = _fresh(config, sampler, bank[0].shape[-1], device)
    settings = config.model_dump(mode="json", exclude=WITHOUT_RESULT)
    digest = digest_of([settings, [[scene.image, scene.dataset.identity] for scene in scenes.scenes]])
    if load_state(work / STATE_FILE, state, digest):
        say(f"goes on after step {state.step} of {config.steps}")
    else:
        (work / LOG_FILE).unlink(missing_ok=True)
    keep = partial(save_state, work / STATE_FILE, digest)
    log = partial(_log, work / LOG_FILE, say)
    learnt = work / LEARNT_DIR
    if state.step < config.learn_steps:
        train.run_steps(
            state,
            config.learn_steps,
            lambda step: train.draw_pair(sampler, config, step),
            lambda pair: train.learn_losses(state, pair, bank, config),
            train.TEACHER_STEPS,
            config,
            log,
            keep,
        )
    if state.step == config.learn_steps:
        _save(state.averaged.student, learnt)
    if state.step < config.steps:
        if not learnt.is_dir():
            raise InputError(f"{learnt} is gone, which the second stage learns from; delete {work} to begin anew")
        say("second stage: tokens of whole images are computed")
        teacher = Student(config.model).run_on(device)
        teacher.load(learnt)
        targets = join(bank, token_maps(teacher, scenes.scenes, config), scenes.scenes, config.seed)
        train.run_steps(
            state,
            config.steps,
            lambda step: train.draw_one(sampler, config, step),
            lambda seen: train.settle_losses(state, seen, targets, config),
            train.SETTLED_STEPS,
            config,
            log,
            keep,
        )
    _save(state.averaged.student, config.out)
    draw_curve(work / LOG_FILE, work / CURVE_FILE)


def _save(student: Student, folder: Path) -> None:
    """Write an encoder, whole or not at all."""
    part = folder.with_name(folder.name + PART_SUFFIX)
    shutil.rmtree(part, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    try:
        student.save(part)
        part.rename(folder)
    except OSError as error:
        raise InputError(f"{folder} could not be written: {error.strerror or error}") from error


def _read(config: PretrainConfig, say: Callable[[str], None]) -> Scenes:
    images = ImageFolder(config.images, tuple(list_images(config.images, config.exclude)))
    scenes = read_scenes(images, _draft(config), config.per_image, config.max_patches, config.seed)
    for name, reason in scenes.skipped:
        say(f"left out: {name}: {reason}")
    count = len({scene.image for scene in scenes.scenes})
    say(f"{scenes.patches} patches of {count} images, {config.steps} steps")
    return scenes


def _draft(config: PretrainConfig) -> Codebook:
    """Return a codebook to open images with."""
    encoder = EncoderSection(source="pretrain", architecture="dinov2_with_registers", dim=config.model.width)
    return draft_codebook(
        FeatureSettings(
            encoder=encoder,
            preprocess=config.preprocess,
            device=config.device,
            per_image=config.per_image,
            seed=config.seed,
        )
    )


def _fresh(config: PretrainConfig, sampler: Sampler, statistics: int, device: torch.device) -> State:
    """Return the state before the first step."""
    torch.manual_seed(config.seed)
    learner = Learner(config, statistics)
    rng = np.random.default_rng(config.seed)
    pixels = normalised(sampler.draw(FIRST_VIEWS, min(config.sides), rng).pixels, config)  # (B, 3, S, S)
    side = pixels.shape[-1] // PATCH_PX
    patches = pixels.reshape(-1, 3, side, PATCH_PX, side, PATCH_PX).permute(0, 2, 4, 1, 3, 5)
    start(learner.student, patches.flatten(0, 2))
    learner.student.run_on(device)
    return State.fresh(learner.to(device), config.learning_rate, config.weight_decay)


def _log(path: Path, say: Callable[[str], None], values: dict[str, float]) -> None:
    """Add a line to the log and tell it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({name: round(value, 6) for name, value in values.items()}) + "\n")
    say("  ".join(f"{name} {value:.4g}" for name, value in values.items()))

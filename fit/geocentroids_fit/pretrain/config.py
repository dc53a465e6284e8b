"""What a training is to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from geocentroids_tiler.codebook import PreprocessSection, validation_problems
from geocentroids_tiler.errors import InputError

PATCH_PX = 14


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelConfig(_Section):
    """The encoder's size."""

    width: int = Field(default=192, ge=64, le=588, description="length of a token; a patch has 588 values")
    depth: int = Field(default=6, ge=1)
    heads: int = Field(default=3, ge=1)
    registers: int = Field(default=4, ge=0)
    grid_patches: int = Field(default=32, ge=8, le=256, description="side of the largest window, in patches")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.width % self.heads or self.width // self.heads < 16:
            raise ValueError(
                f"a width of {self.width} is not shared by {self.heads} heads; accepted: a multiple of heads, 16 each"
            )
        return self


class PretrainConfig(_Section):
    """A training from images to an encoder.

    Attributes:
        images: folder of GeoTIFFs.
        exclude: patterns of paths below it to leave out.
        out: directory of the encoder.
        gsd_m: metres on the ground per pixel.
        seed: of everything random.
        per_image: patches of one image, about, at most: larger ones give random blocks.
        max_patches: patches of all images, about, at most; about 2 kB of memory each.
        model: the encoder's size.
        learn_steps: steps of self-distillation.
        settle_steps: steps with fixed targets.
        batch_patches: patches of a step, in both views.
        sides: sides of views in the first stage, in patches; one is drawn for each view of a step.
        settle_sides: the same of the second stage, where windows as they are served count more.
        learning_rate: highest, of AdamW.
        weight_decay: of AdamW, of matrices.
        warmup_steps: over which the learning rate rises, in each stage.
        strength: how far other cameras differ from the image, from 0 to 1.
        prototypes: how many patches are compared with.
        keep_every_s: seconds between checkpoints.
        workers: threads that draw views.
        device: auto, cpu, cuda or cuda:N.
        precision: in which matrices are multiplied.
    """

    images: Path
    exclude: tuple[str, ...] = ()
    out: Path
    seed: int = Field(default=0, ge=0)
    gsd_m: float = Field(default=0.25, gt=0, le=100)
    per_image: int = Field(default=60_000, ge=1)
    max_patches: int = Field(default=1_000_000, ge=1)
    model: ModelConfig = ModelConfig()
    learn_steps: int = Field(default=3600, ge=1)
    settle_steps: int = Field(default=2000, ge=0)
    batch_patches: int = Field(default=4096, ge=64)
    sides: tuple[int, ...] = (8, 8, 12, 16, 24, 32)
    settle_sides: tuple[int, ...] = (8, 16, 24, 32, 32)
    learning_rate: float = Field(default=1.5e-3, gt=0)
    weight_decay: float = Field(default=0.04, ge=0)
    warmup_steps: int = Field(default=60, ge=1)
    strength: float = Field(default=0.7, ge=0, le=1)
    prototypes: int = Field(default=1024, ge=2)
    keep_every_s: float = Field(default=120, ge=0)
    workers: int = Field(default=1, ge=1, le=64)
    device: str = "auto"
    precision: Literal["fp32", "bf16"] = "bf16"

    @property
    def steps(self) -> int:
        """All steps."""
        return self.learn_steps + self.settle_steps

    @property
    def preprocess(self) -> PreprocessSection:
        """How images are opened: the ground grid, and ImageNet's mean and deviation."""
        grid = self.model.grid_patches
        return PreprocessSection(gsd_m=self.gsd_m, window_patches=grid, margin_patches=0, stride_patches=grid)

    @model_validator(mode="after")
    def _check(self) -> Self:
        grid = self.model.grid_patches
        for sides in (self.sides, self.settle_sides):
            if not sides or min(sides) < 4 or max(sides) > grid:
                raise ValueError(f"sides are {', '.join(map(str, sides))}; accepted: 4 to {grid} patches")
        return self


def make_pretrain_config(
    images: Path, out: Path, exclude: Sequence[str] = (), options: Mapping[str, Any] | None = None
) -> PretrainConfig:
    """Check what is asked for.

    Args:
        images: folder of GeoTIFFs.
        out: directory of the encoder.
        exclude: patterns of paths to leave out.
        options: other settings by name, those of the model among them; None is not given.

    Raises:
        InputError: naming each value that is wrong and what is accepted.
    """
    given = {name: value for name, value in (options or {}).items() if value is not None}
    model = {name: given.pop(name) for name in list(given) if name in ModelConfig.model_fields}
    try:
        return PretrainConfig.model_validate(
            {"images": images, "out": out, "exclude": exclude, "model": model, **given}
        )
    except ValidationError as error:
        raise InputError(f"the training is not usable: {validation_problems(error)}") from error

"""``geocentroids-fit``: from a folder of images to a codebook. Wiring only; each command imports what it needs."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import click

from geocentroids_fit import __version__
from geocentroids_tiler.cli import ErrorGroup
from geocentroids_tiler.codebook import Metric, Resampling
from geocentroids_tiler.errors import InputError

if TYPE_CHECKING:
    from geocentroids_fit.workspace import Fit

F = TypeVar("F", bound=Callable[..., Any])

_OPTIONS: tuple[tuple[str, str, Any, str], ...] = (
    ("--encoder", "encoder.model", str, "DINOv2 checkpoint: a hub id, a local directory, or an .onnx file."),
    ("--revision", "encoder.revision", str, "Commit of the hub's model."),
    ("--embed/--no-embed", "encoder.embed", bool, "Carry the encoder in the codebook.  [default: unless on the hub]"),
    ("--precision", "encoder.precision", str, "Of the encoder: auto, fp32 or bf16.  [default: auto]"),
    ("--exclude", "images.exclude", (str,), "Pattern of paths to leave out, for example '*/mask/*'. May be repeated."),
    ("--prepare/--no-prepare", "images.prepare", bool, "Bring the images to 0.25 m first.  [default: no-prepare]"),
    ("--gsd", "windows.gsd_m", float, "Metres on the ground per pixel.  [default: 0.25]"),
    ("--resampling", "windows.resampling", click.Choice(get_args(Resampling)), "[default: bilinear]"),
    ("--window", "windows.window_patches", int, "Patches a side of a window.  [default: 32]"),
    ("--margin", "windows.margin_patches", int, "Patches dropped on each side of a window.  [default: 3]"),
    ("--stride", "windows.stride_patches", int, "Patches between windows; half of the core blends.  [default: 13]"),
    ("--per-image", "sample.per_image", int, "Patches that one image gives at most.  [default: 20000]"),
    ("--readers", "sample.readers", int, "Threads that read images.  [default: 2]"),
    ("--k", "cluster.k", int, "Number of classes.  [default: 1024]"),
    ("--metric", "cluster.metric", click.Choice(get_args(Metric)), "Of nearness.  [default: cosine]"),
    ("--init", "cluster.init", click.Choice(["auto", "random", "k-means++"]), "Of K-Means.  [default: auto]"),
    ("--iterations", "cluster.max_iterations", int, "Of K-Means, at most.  [default: 50]"),
    ("--tolerance", "cluster.tolerance", float, "K-Means ends when it gains less than this share.  [default: 1e-4]"),
    ("--anchor", "color.anchor", str, "Codebook whose colours similar centroids keep."),
    ("--name", "codebook.name", str, "Name of the codebook."),
    ("--version", "codebook.version", str, "Version of the codebook.  [default: 1]"),
    ("--title", "codebook.title", str, "One line that says what it is."),
    ("--licence", "codebook.licence", str, "Licence of centroids and encoder."),
    ("--attribution", "codebook.attribution", str, "One line for the corner of a map."),
    ("--region", "codebook.region", str, "Where the images lie."),
    ("--card", "codebook.card", str, "File with the model card's text.  [default: made from the run]"),
    ("--exemplars/--no-exemplars", "codebook.exemplars", bool, "Pictures of typical patches.  [default: exemplars]"),
    ("--seed", "seed", int, "Of everything random.  [default: 0]"),
    ("--work", "work", str, "Folder of what is kept between runs.  [default: OUT.work]"),
    ("--out", "out", str, "Codebook directory to write."),
)
"""Option, the value of the configuration that it sets, its type, and its help. All default to None: not given."""
_ON_A_CLUSTER = ("run", "extract", "cluster")
"""Commands that can work on a Ray cluster."""


def _parameter(path: str) -> str:
    return path.replace(".", "_")


class _FitGroup(ErrorGroup):
    program = "geocentroids-fit"


@click.group(cls=_FitGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="geocentroids-fit")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Fit a codebook for geocentroids-tiler from a folder of overhead images."""


def fit_options(function: F) -> F:
    """Add the argument and the options that describe a fit."""
    for option, path, kind, text in reversed(_OPTIONS):
        repeated = isinstance(kind, tuple)
        function = click.option(
            option,
            _parameter(path),
            type=kind[0] if repeated else kind,
            multiple=repeated,
            default=None,
            help=text,
        )(function)
    function = click.option("--overwrite", is_flag=True, help="Replace a codebook that is there already.")(function)
    return click.argument("source", type=click.Path(path_type=Path))(function)


def ray_option(function: F) -> F:
    """Add the option that names a cluster. It is none of the configuration: results do not depend on it."""
    return click.option(
        "--ray",
        metavar="ADDRESS",
        help="Extract and cluster on a Ray cluster: HOST:PORT as `ray start --head` prints it, or auto.",
    )(function)


def _step(name: str, text: str) -> None:
    def command(source: Path, overwrite: bool, ray: str | None = None, **options: Any) -> None:
        from geocentroids_fit import fitting, pipeline, publishing

        start = time.monotonic()
        steps: dict[str, Callable[[Fit], object]] = {
            "run": pipeline.run,
            "extract": fitting.extract_step,
            "cluster": fitting.cluster_step,
            "color": fitting.color_step,
            "tree": fitting.tree_step,
            "exemplars": publishing.exemplars_step,
            "pack": publishing.pack_step,
        }
        steps[name](make_fit(source, options, overwrite, ray))
        click.echo(f"{name}: done in {time.monotonic() - start:.0f} s")

    options = fit_options(ray_option(command) if name in _ON_A_CLUSTER else command)
    text = f"{text}\n\nSOURCE is a configuration (.toml) or a folder of images; options go before it."
    main.command(name, help=text)(options)


_step("run", "Do all steps from images to a codebook with its report. Steps whose inputs have not changed are skipped.")
_step("extract", "Compute features of the images: sampled patches through the encoder, a shard for each image.")
_step("cluster", "K-Means on the features.")
_step("color", "Choose colours: like ones for like classes.")
_step("tree", "Make the merge tree, from which classes=N is cut.")
_step("exemplars", "Cut a small sheet of typical patches of each class.")
_step("pack", "Write the codebook directory with its card and STAC item.")


@main.command("prepare")
@click.argument("images", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--exclude", multiple=True, help="Pattern of paths to leave out. May be repeated.")
@click.option("--gsd", "gsd_m", default=0.25, show_default=True, help="Metres on the ground per pixel.")
@click.option("--compress", type=click.Choice(["jpeg", "lossless"]), default="jpeg", show_default=True)
@click.option("--bidx", help="Three bands for red, green and blue, for example 4,3,2.")
@click.option("--rescale", help="LOW,HIGH: values that become black and white.")
@click.option("--workers", type=click.IntRange(1), help="Images at once.  [default: the number of cores]")
def prepare_command(
    images: Path, out: Path, exclude: tuple[str, ...], bidx: str | None, rescale: str | None, **options: Any
) -> None:
    """Write the images below IMAGES to OUT as 0.25 m Cloud Optimized GeoTIFFs; what cannot be used is listed."""
    from geocentroids_fit.prepare import prepare
    from geocentroids_tiler.commands import read_options

    read = read_options(bidx, rescale)
    report = prepare(
        images,
        out,
        exclude=exclude,
        bidx=read.bidx,
        rescale=read.rescale,
        progress=sys.stderr.isatty(),
        **options,
    )
    for skipped in report.skipped:
        click.echo(f"left out: {skipped.name}: {skipped.reason}")
    click.echo(
        f"{out}: {len(report.prepared)} images, {report.reused} of them as they were; {len(report.skipped)} left out"
    )


@main.command("pretrain")
@click.argument("images", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Directory of the encoder to write.")
@click.option("--exclude", multiple=True, help="Pattern of paths to leave out. May be repeated.")
@click.option("--learn-steps", type=int, help="Steps of self-distillation.  [default: 3600]")
@click.option("--settle-steps", type=int, help="Steps with fixed targets.  [default: 2000]")
@click.option("--batch-patches", type=int, help="Patches of a step.  [default: 4096]")
@click.option("--learning-rate", type=float, help="Highest, of AdamW.  [default: 1.5e-3]")
@click.option("--per-image", type=int, help="Patches that one image gives at most.  [default: 60000]")
@click.option("--gsd", "gsd_m", type=float, help="Metres on the ground per pixel.  [default: 0.25]")
@click.option("--width", type=int, help="Length of a token.  [default: 192]")
@click.option("--depth", type=int, help="Layers.  [default: 6]")
@click.option("--heads", type=int, help="Attention heads of a layer.  [default: 3]")
@click.option("--device", help="auto, cpu, cuda or cuda:N.  [default: auto]")
@click.option("--precision", type=click.Choice(["fp32", "bf16"]), help="Of products.  [default: bf16]")
@click.option("--workers", type=int, help="Threads that draw views.  [default: 1]")
@click.option("--seed", type=int, help="Of everything random.  [default: 0]")
def pretrain_command(images: Path, out: Path, exclude: tuple[str, ...], **options: Any) -> None:
    """Train a small encoder on the images below IMAGES, without labels.

    The state is kept in OUT.work: the same command goes on where it was ended. There is the curve of the losses too.
    """
    from geocentroids_fit.pretrain import make_pretrain_config, pretrain

    start = time.monotonic()
    pretrain(make_pretrain_config(images, out, exclude, options), click.echo)
    click.echo(f"{out}: done in {time.monotonic() - start:.0f} s")


@main.command("evaluate")
@click.argument("codebook")
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--masks", multiple=True, type=click.Path(path_type=Path), help="Land cover of IMAGES, in their order.")
@click.option("--exclude", multiple=True, help="Pattern of paths to leave out. May be repeated.")
@click.option("--ignore", multiple=True, type=int, default=(255,), show_default=True, help="Value that says nothing.")
@click.option("--max-patches", default=65_536, show_default=True, help="Of one image; a larger one is cut.")
@click.option("--out", default=Path("report"), show_default=True, type=click.Path(path_type=Path), help="Folder.")
def evaluate_command(
    codebook: str,
    images: tuple[Path, ...],
    masks: tuple[Path, ...],
    exclude: tuple[str, ...],
    ignore: tuple[int, ...],
    max_patches: int,
    out: Path,
) -> None:
    """Measure CODEBOOK (a name or a directory) on IMAGES (folders or files), and write a report.

    With several IMAGES each is a data set of its own; then --masks is given once for each, - for none.
    """
    from geocentroids_fit.evaluate import ImageSet, evaluate, set_names

    if masks and len(masks) != len(images):
        raise InputError(
            f"--masks is given {len(masks)} times for {len(images)} IMAGES; give it once for each, - for none"
        )
    covers = [None if str(mask) == "-" else mask for mask in masks] or [None] * len(images)
    sets = [
        ImageSet(name, folder, exclude, cover, ignore)
        for name, folder, cover in zip(set_names(images), images, covers, strict=True)
    ]
    evaluate(codebook, sets, out, max_patches=max_patches, progress=sys.stderr.isatty())
    click.echo(f"{out / 'report.html'} and {out / 'report.json'} are written")


def make_fit(source: Path, options: Mapping[str, Any], overwrite: bool, ray: str | None = None) -> Fit:
    """Return the fit that a configuration or a folder describes; options that were given go first.

    Args:
        source: configuration or folder.
        options: as ``fit_options`` adds them.
        overwrite: whether a codebook that is there already is replaced.
        ray: address of a cluster.

    Raises:
        InputError: naming each value that is wrong or missing.
    """
    from geocentroids_fit.config import make_config, read_config
    from geocentroids_fit.workspace import Fit

    content = read_config(source) if source.suffix == ".toml" else {"images": {"folder": source}}
    for _, path, _, _ in _OPTIONS:
        value = options[_parameter(path)]
        if value is not None and value != ():
            *sections, key = path.split(".")
            table = content
            for section in sections:
                table = table.setdefault(section, {})
            table[key] = value
    return Fit(
        config=make_config(content),
        say=click.echo,
        progress=sys.stderr.isatty(),
        overwrite=overwrite,
        ray=ray,
    )


if __name__ == "__main__":
    main()

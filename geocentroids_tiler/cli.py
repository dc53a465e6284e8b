"""The ``geocentroids`` command: wiring only. Each command imports what it needs when it runs."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import click

from geocentroids_tiler import __version__
from geocentroids_tiler.commands import classify, demo, info, serve, sign
from geocentroids_tiler.commands_bulk import similar
from geocentroids_tiler.errors import GeocentroidsError
from geocentroids_tiler.settings import load_settings

EXIT_ERROR = 1
EXIT_INTERRUPTED = 130
Triple = tuple[float, float, float]


class ErrorGroup(click.Group):
    """A group whose commands end with one sentence on stderr instead of a traceback, unless ``--debug`` is given."""

    program = "geocentroids"
    """The command as it is typed."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; see the class."""
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except KeyboardInterrupt:
            click.echo("Interrupted", err=True)
            ctx.exit(EXIT_INTERRUPTED)
        except Exception as error:
            if ctx.params.get("debug") or (isinstance(error, OSError) and error.errno == errno.EPIPE):
                raise  # click ends quietly on a closed pipe
            click.echo(f"Error: {error_sentence(error, self.program)}", err=True)
            ctx.exit(EXIT_ERROR)


def error_sentence(error: Exception, program: str) -> str:
    """Return one line for the user of ``program``."""
    text = " ".join(str(error).split())
    if isinstance(error, GeocentroidsError):
        return text
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return f"unexpected {type(error).__name__}: {text} ({program} --debug shows where)"


@click.group(cls=ErrorGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="geocentroids")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Map tiles that show what is in an overhead image: every patch of ground in the colour of its class."""


for command in (demo, serve, sign, classify, similar, info):
    main.add_command(command)


@main.group()
def codebook() -> None:
    """Codebooks: the classes and their colours."""


@codebook.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def codebook_list(as_json: bool) -> None:
    """List built-in, installed and known codebooks."""
    from geocentroids_tiler.cli_codebook import list_text
    from geocentroids_tiler.hub import list_codebooks

    click.echo(list_text(list_codebooks(load_settings().codebooks_dir), as_json=as_json))


@codebook.command("show")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def codebook_show(name: str, as_json: bool) -> None:
    """Show all that is known of codebook NAME, or of a codebook directory."""
    from geocentroids_tiler.cli_codebook import show_text
    from geocentroids_tiler.hub import find_codebook

    click.echo(show_text(find_codebook(name, load_settings().codebooks_dir, allow_path=True), as_json=as_json))


@codebook.command("pull")
@click.argument("name")
@click.option("--revision", help="Branch, tag or commit of a hub repository.  [default: its main branch]")
@click.option("--force", is_flag=True, help="Fetch it again, and replace the one installed.")
def codebook_pull(name: str, revision: str | None, force: bool) -> None:
    """Fetch codebook NAME, or hub repository OWNER/NAME, and its encoder. What broke off goes on where it stopped."""
    from geocentroids_tiler.hub import pull_codebook

    found = pull_codebook(name, load_settings().codebooks_dir, revision=revision, force=force)
    click.echo(f"{found.name} {found.manifest.version} is installed in {found.path}")


@codebook.command("import")
@click.argument("centroids", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("colors", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--name", required=True, help="Name it will be known by.")
@click.option("--encoder", required=True, help="Hub id OWNER/NAME, directory with a checkpoint, or .onnx file.")
@click.option("--gsd", "gsd_m", type=float, required=True, help="Metres on the ground per pixel.")
@click.option(
    "--resampling",
    type=click.Choice(["nearest", "bilinear", "cubic", "average"]),
    default="bilinear",
    show_default=True,
)
@click.option("--window", "window_patches", type=int, default=16, show_default=True, help="Patches a side of a window.")
@click.option(
    "--margin", "margin_patches", type=int, default=3, show_default=True, help="Patches dropped on each side."
)
@click.option(
    "--stride", "stride_patches", type=int, help="Patches between windows.  [default: half of window - 2 x margin]"
)
@click.option(
    "--metric", type=click.Choice(["inner_product", "l2", "cosine"]), default="inner_product", show_default=True
)
@click.option("--mean", type=(float, float, float), help="Mean of R, G, B.  [default: ImageNet's]")
@click.option("--std", type=(float, float, float), help="Standard deviation of R, G, B.  [default: ImageNet's]")
@click.option("--revision", help="Commit of the encoder.")
@click.option("--architecture", help="Model type.  [default: the checkpoint's, else dinov2_with_registers]")
@click.option("--register-tokens", type=int, help="Register tokens.  [default: the checkpoint's, else 4]")
@click.option("--title", help="One line for lists and maps.  [default: the name]")
@click.option("--licence", default="unknown", show_default=True, help="Licence of centroids and colours.")
@click.option("--attribution", default="", help="Whom a map that uses it has to name.")
@click.option("--version", default="1", show_default=True, help="Version of the codebook.")
@click.option("--force", is_flag=True, help="Replace a codebook of that name.")
def codebook_import(centroids: Path, colors: Path, **options: Any) -> None:
    """Make a codebook of two arrays: CENTROIDS.npy (K x D) and COLORS.npy (K x 3, uint8)."""
    from geocentroids_tiler.cli_codebook import preprocess_section
    from geocentroids_tiler.hub import import_codebook

    preprocess = preprocess_section(options)
    found = import_codebook(
        centroids, colors, preprocess=preprocess, codebooks_dir=load_settings().codebooks_dir, **options
    )
    click.echo(f"{found.name} {found.manifest.version} is installed in {found.path}")


@main.command("export-onnx")
@click.argument("source")
@click.argument("destination", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--window-patches", type=click.IntRange(1, 256), default=16, show_default=True, help="Patches a side.")
@click.option("--fp16", is_flag=True, help="Store weights in half precision: half the size.")
@click.option("--mean", type=(float, float, float), default=(0.485, 0.456, 0.406), show_default=True)
@click.option("--std", type=(float, float, float), default=(0.229, 0.224, 0.225), show_default=True)
@click.option("--revision", help="Commit, tag or branch on the hub.")
def export_onnx_command(
    source: str, destination: Path, window_patches: int, fp16: bool, mean: Triple, std: Triple, revision: str | None
) -> None:
    """Export a DINOv2 checkpoint, SOURCE (hub id or directory), to DESTINATION.onnx."""
    from geocentroids_tiler.errors import EncoderError

    try:
        from geocentroids_tiler.encoder.export import export_onnx
    except ImportError as error:
        raise EncoderError(f"export needs {error.name}: pip install 'geocentroids-tiler[cpu,torch]'") from error
    report = export_onnx(
        source,
        destination,
        window_patches=window_patches,
        mean=mean,
        std=std,
        weights="fp16" if fp16 else "fp32",
        revision=revision,
    )
    click.echo(
        f"{report.path}: {report.size_bytes / 1e6:.1f} MB, dim {report.dim}, {report.registers} registers, "
        f"differs from the checkpoint by at most {report.max_difference:.1e}, SHA-256 {report.sha256}"
    )


if __name__ == "__main__":
    main()

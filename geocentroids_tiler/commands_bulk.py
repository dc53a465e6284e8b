"""The command about many images at once: similar."""

from __future__ import annotations

import json
from pathlib import Path

import click

from geocentroids_tiler.commands import bidx_option, codebook_option, read_options, rescale_option
from geocentroids_tiler.settings import load_settings


@click.command()
@click.argument("image")
@click.argument("folder", metavar="DIR", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--top", default=10, show_default=True, type=click.IntRange(1), help="How many to show.")
@codebook_option
@bidx_option
@rescale_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def similar(
    image: str, folder: Path, top: int, codebook: str | None, bidx: str | None, rescale: str | None, as_json: bool
) -> None:
    """Show which images of DIR, a folder that classify --list made, look like IMAGE.

    IMAGE is the id or the JSON file of an item of DIR, or any image (a URL or a file), which is labelled first. Shown
    are likenesses from 0 to 1: how much the same ground has the same share in both.
    """
    from tqdm import tqdm

    from geocentroids_tiler.bulk.similar import find_similar

    with tqdm(unit="chunk", desc="labelling", leave=False) as bar:
        found = find_similar(image, folder, load_settings(), read_options(bidx, rescale), codebook, bar.update)
    if found.left_out:
        click.echo(
            f"Warning: {found.left_out} images of {folder} are left out: they were labelled with another codebook, or "
            "have no labelled patch",
            err=True,
        )
    if as_json:
        shown = [
            {"id": one.id, "likeness": one.likeness, "source": one.source, "labels": str(one.labels)}
            for one in found.images[:top]
        ]
        click.echo(json.dumps(shown, indent=2, ensure_ascii=False))
        return
    width = max(len(one.id) for one in found.images[:top])
    for one in found.images[:top]:
        click.echo(f"{one.likeness:.3f}  {one.id:{width}}  {one.source}")

"""The steps that make results public: exemplars, the codebook directory, the report."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from geocentroids_fit.evaluate import ImageSet, evaluate, set_names
from geocentroids_fit.evaluate.pictures import spread
from geocentroids_fit.exemplars import write_exemplars
from geocentroids_fit.files import digest_of, read_json, write_json
from geocentroids_fit.images import list_images
from geocentroids_fit.kept import load_kept
from geocentroids_fit.pack import draft_codebook, make_card, make_manifest, training_bounds, typical_similarities
from geocentroids_fit.shards import FeatureStore, open_features
from geocentroids_fit.stac import mlm_item
from geocentroids_fit.workspace import Fit
from geocentroids_tiler.codebook import ENCODER_FILE, Codebook, load_codebook, save_codebook
from geocentroids_tiler.errors import CodebookError, InputError
from geocentroids_tiler.exemplars import SHEETS_FILE

PACK_RECORD = "pack.json"
EXEMPLARS_RECORD = "exemplars.json"


def check_out(fit: Fit) -> None:
    """Raise CodebookError if the place of the codebook is taken by something that this fit did not make."""
    out = fit.config.out
    taken = out.exists() and (not out.is_dir() or any(out.iterdir()))
    if taken and not fit.overwrite and read_json(fit.config.workspace / PACK_RECORD) is None:
        raise CodebookError(f"{out} exists already; name a new directory, or replace it with --overwrite")


def exemplars_step(fit: Fit) -> None:
    """Cut typical patches of each class from the images."""
    if not fit.config.codebook.exemplars:
        return
    store = open_features(fit.features, verify=False)
    clusters, kept = fit.clusters()
    sources = [asdict(fit.source(image)) for image in store.images]
    inputs = {"file": SHEETS_FILE, "cluster": kept.digest, "sources": sources}
    record = fit.config.workspace / EXEMPLARS_RECORD
    if (read_json(record) or {}).get("inputs") == inputs and fit.exemplars.is_dir():
        fit.say("exemplars: kept")
        return
    record.unlink(missing_ok=True)
    shutil.rmtree(fit.exemplars, ignore_errors=True)
    images, draft = fit.images(), draft_codebook(store.manifest.settings)
    count = write_exemplars(
        fit.exemplars, store, clusters, lambda name: images.open(name, draft), fit.source, progress=fit.progress
    )
    write_json(record, {"inputs": inputs})
    fit.say(f"exemplars: {count} sheets")


def pack_step(fit: Fit) -> Codebook:
    """Write the codebook directory, whole or not at all.

    Raises:
        CodebookError: if it is there already and not the same, unless it may be overwritten.
    """
    check_out(fit)
    config, out = fit.config, fit.config.out
    store = open_features(fit.features, verify=False)
    draft, card = _draft(fit, store)
    embedded = fit.encoder / ENCODER_FILE if draft.manifest.encoder.source == ENCODER_FILE else None
    exemplars = fit.exemplars if config.codebook.exemplars else None
    item = json.dumps(mlm_item(draft, bounds=training_bounds(store), exemplars=exemplars is not None), indent=1) + "\n"
    exemplars_made = read_json(config.workspace / EXEMPLARS_RECORD) if exemplars else None
    made_of = digest_of([draft.digest, card, item, exemplars_made])
    record = config.workspace / PACK_RECORD
    if out.exists() and (read_json(record) or {}).get("made_of") == made_of:
        fit.say(f"pack: {out} kept")
        return load_codebook(out)
    if out.exists() and any(out.iterdir()) and not fit.overwrite:
        raise CodebookError(
            f"{out} was made of other inputs; name a new directory, or replace it with --overwrite (all that was "
            f"computed is kept in {config.workspace})"
        )
    with _set_aside(out):
        codebook = save_codebook(
            draft, out, card=card, encoder=embedded, exemplars=exemplars, extra={"item.json": item}
        )
    write_json(record, {"made_of": made_of})
    fit.say(f"pack: {out}: {len(codebook)} classes of {len(store)} patches")
    return codebook


@contextmanager
def _set_aside(path: Path) -> Iterator[None]:
    """Move a directory out of the way for a ``with`` block; then remove it, or put it back after an error."""
    if not path.exists():
        yield
        return
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    path.replace(old)
    try:
        yield
    except BaseException:
        old.replace(path)
        raise
    shutil.rmtree(old)


def evaluate_step(fit: Fit) -> None:
    """Write the report on the codebook."""
    config = fit.config
    codebook = load_codebook(config.out)
    entries = config.evaluate.sets
    sets = [
        ImageSet(entry.name or name, entry.images, entry.exclude, entry.masks, entry.ignore, entry.classes)
        for name, entry in zip(set_names([entry.images for entry in entries]), entries, strict=True)
    ] or _training_set(fit)
    looked_at = [path for one in sets for path in (one.images, one.masks) if path is not None]
    inputs = {
        "codebook": codebook.digest,
        **config.evaluate.model_dump(mode="json"),
        "files": digest_of([_stamps(path) for path in looked_at]),
    }
    record = fit.report / "inputs.json"
    if read_json(record) == inputs and (fit.report / "report.html").is_file():
        fit.say(f"evaluate: {fit.report / 'report.html'} kept")
        return
    record.unlink(missing_ok=True)
    directory = str(config.out.resolve())  # a path, lest a name such as nano be taken for the built-in one
    evaluate(directory, sets, fit.report, max_patches=config.evaluate.max_patches, progress=fit.progress)
    write_json(record, inputs)
    fit.say(f"evaluate: {fit.report / 'report.html'}")


def _stamps(path: Path) -> list[tuple[str, int, int]]:
    """Return name, time of change and size of a file, or of all images below a folder."""
    root, names = (path, list_images(path)) if path.is_dir() else (path.parent, [path.name])
    found = [(name, (root / name).stat()) for name in names if (root / name).exists()]
    return [(name, stat.st_mtime_ns, stat.st_size) for name, stat in found]


def _draft(fit: Fit, store: FeatureStore) -> tuple[Codebook, str]:
    """Return the codebook as it is to be written, and its card."""
    config = fit.config
    clusters, _ = fit.clusters()
    color, tree = load_kept(fit.results, "color"), load_kept(fit.results, "tree")
    score = color.record["scores"]["likeness"][0]
    training = {
        "images": len(store.images),
        "features": len(store),
        "region": config.codebook.region,
        "seed": config.seed,
        "inertia": round(clusters.record["inertia"], 4),
        "iterations": len(clusters.record["objective"]),
        "color_rank_correlation": round(score["rank_correlation"], 4),
        "color_neighbours_at_15": round(score["neighbours"], 4),
    }
    settings = store.manifest.settings
    attribution = config.codebook.attribution or "; ".join(
        dict.fromkeys(text for image in store.images if (text := fit.source(image).attribution))
    )
    manifest = make_manifest(
        config.codebook.model_copy(update={"attribution": attribution}),
        settings.encoder,
        settings.preprocess,
        config.cluster.metric,
        typical_similarities(clusters),
        training,
    )
    codebook = Codebook(
        manifest=manifest,
        centroids=clusters.centroids,
        colors=color.arrays["colors"],
        counts=clusters.counts,
        tree=tree.arrays["tree"],
    )
    return codebook, _card(fit, codebook, store)


def _card(fit: Fit, codebook: Codebook, store: FeatureStore) -> str:
    path = fit.config.codebook.card
    if path is None:
        return make_card(codebook, store, fit.source, fit.config)
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error


def _training_set(fit: Fit) -> list[ImageSet]:
    """Return some of the training images, spread over all; those on the web are left out."""
    images = fit.images()
    local = [name for name in images.names if "://" not in name]
    if images.folder is None or not local:
        raise InputError("no local image to evaluate on; name some in evaluate.sets")
    return [ImageSet("training images", images.folder, names=tuple(local[i] for i in spread(len(local))))]

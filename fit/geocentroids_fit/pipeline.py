"""All steps from a folder of images to a codebook, in order."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from geocentroids_fit.cluster import kmeans
from geocentroids_fit.color import Coloring, color_centroids
from geocentroids_fit.extract import Features, extract, list_images, open_images
from geocentroids_fit.likeness import likeness_vectors, natural_colors
from geocentroids_fit.pack import (
    Identity,
    default_card,
    draft_codebook,
    make_manifest,
    training_record,
    typical_similarities,
    write_codebook,
)
from geocentroids_fit.tree import ward_tree
from geocentroids_tiler.codebook import (
    ENCODER_FILE,
    Codebook,
    EncoderSection,
    Metric,
    PreprocessSection,
    check_vacant,
)
from geocentroids_tiler.encoder import ChunkLayout, encoder_source, load_encoder
from geocentroids_tiler.errors import EncoderError, InputError

INSTALL = "pip install 'geocentroids-fit[torch]'"


@dataclass(frozen=True, slots=True)
class Plan:
    """What to fit on what.

    Attributes:
        images: folder of GeoTIFFs.
        exclude: patterns of paths below it that are left out.
        encoder: hub id or local directory of a DINOv2 checkpoint; it is exported and embedded.
        out: the codebook directory to write.
        identity: name, licence and so on.
        preprocess: from pixels to windows.
        metric: of assignment.
        k: number of centroids.
        per_image: the most patches that one image may give.
        seed: of everything random.
        card: text of the model card, or None for one made from the run.
        command: how the run was started, for the card.
    """

    images: Path
    exclude: tuple[str, ...]
    encoder: str
    out: Path
    identity: Identity
    preprocess: PreprocessSection
    metric: Metric
    k: int
    per_image: int
    seed: int
    card: str | None
    command: str


@dataclass(frozen=True)
class Result:
    """What a run made.

    Attributes:
        codebook: as loaded from where it was written.
        features: number of features.
        coloring: colours and their measures.
    """

    codebook: Codebook
    features: int
    coloring: Coloring


def run(plan: Plan, say: Callable[[str], None], *, progress: bool = True) -> Result:
    """Fit a codebook.

    Args:
        plan: what to fit on what.
        say: told in one line what begins.
        progress: whether progress bars are drawn.

    Raises:
        GeocentroidsError: if anything is missing or does not fit; the text says what.
    """
    check_vacant(plan.out)
    names = list_images(plan.images, plan.exclude)
    with tempfile.TemporaryDirectory() as work:
        onnx_path = Path(work) / ENCODER_FILE
        say(f"encoder: exporting {plan.encoder}")
        section = _export(plan.encoder, onnx_path, plan.preprocess)
        features = _features(plan, names, section, onnx_path, say, progress)
        say(f"clusters: {plan.k} of {len(features)} patches")
        clustering = kmeans(features.tokens, plan.k, metric=plan.metric, seed=plan.seed, progress=progress)
        say("colours: t-SNE")
        vectors = likeness_vectors(features, clustering, plan.metric)
        coloring = color_centroids(vectors, natural=natural_colors(features, clustering), seed=plan.seed)
        tree = ward_tree(vectors, clustering.counts.clip(min=1))
        manifest = make_manifest(
            plan.identity,
            section,
            plan.preprocess,
            plan.metric,
            typical_similarities(features, clustering, plan.metric),
            training_record(features, clustering, coloring, region=plan.identity.region, seed=plan.seed),
        )
        card = plan.card or default_card(manifest, plan.k, features.images, plan.command)
        codebook = write_codebook(plan.out, manifest, clustering, coloring.colors, tree, encoder=onnx_path, card=card)
    return Result(codebook, len(features), coloring)


def _features(
    plan: Plan,
    names: list[str],
    section: EncoderSection,
    onnx_path: Path,
    say: Callable[[str], None],
    progress: bool,
) -> Features:
    pre = plan.preprocess
    draft = draft_codebook(make_manifest(plan.identity, section, pre, plan.metric))
    datasets = open_images(plan.images, names, draft)
    say(f"features: {len(datasets)} images")
    return extract(
        datasets,
        load_encoder(encoder_source(section, pre, onnx_path)),
        ChunkLayout(pre.window_patches, pre.margin_patches, pre.stride_patches),
        patch_px=section.patch_px,
        per_image=plan.per_image,
        seed=plan.seed,
        progress=progress,
    )


def _export(encoder: str, destination: Path, preprocess: PreprocessSection) -> EncoderSection:
    """Write the encoder as ONNX with fp16 weights and return how a manifest describes it."""
    try:
        from geocentroids_tiler.encoder.checkpoint import locate_checkpoint
        from geocentroids_tiler.encoder.export import export_onnx
    except ImportError as error:
        raise EncoderError(f"exporting an encoder needs PyTorch, transformers and onnx: {INSTALL}") from error
    report = export_onnx(
        encoder,
        destination,
        window_patches=preprocess.window_patches,
        mean=preprocess.mean,
        std=preprocess.std,
        weights="fp16",
    )
    if report.patch_px * preprocess.window_patches > 4096:
        raise InputError(f"a window of {preprocess.window_patches} patches is over 4096 px; choose a smaller one")
    return EncoderSection(
        source=ENCODER_FILE,
        architecture=locate_checkpoint(encoder).architecture,
        dim=report.dim,
        patch_px=report.patch_px,
        register_tokens=report.registers,
        sha256=report.sha256,
    )

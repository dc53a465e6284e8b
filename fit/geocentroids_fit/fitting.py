"""The steps from images to clusters, colours and merge tree. Each is skipped while what it depends on is the same."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geocentroids_fit.blocks import Rows
from geocentroids_fit.cluster import Clustering, NotFiniteError, kmeans_of_table, similarities, unit
from geocentroids_fit.clusters import Clusters
from geocentroids_fit.color import Anchor, anchor_to, color_centroids, score_colors, stretch_axes
from geocentroids_fit.devices import find_device
from geocentroids_fit.encoders import describe_encoder, load_described
from geocentroids_fit.extract import Extraction, extract
from geocentroids_fit.images import ImageFolder
from geocentroids_fit.kept import Kept, keep
from geocentroids_fit.likeness import image_means, likeness_vectors, natural_colors
from geocentroids_fit.node_encoder import EncoderRecipe, device_of, own_code
from geocentroids_fit.pack import draft_codebook
from geocentroids_fit.prepare import prepare
from geocentroids_fit.ray_encoders import make_team, start_workers
from geocentroids_fit.ray_extract import extract_on_nodes
from geocentroids_fit.ray_kmeans import RemoteTable
from geocentroids_fit.ray_nodes import connected_to_fit
from geocentroids_fit.shards import FeatureSettings, FeatureStore, open_features
from geocentroids_fit.tables import LocalTable, Table
from geocentroids_fit.tree import ward_tree
from geocentroids_fit.workspace import Fit, clusters_of
from geocentroids_tiler.codebook import Codebook, EncoderSection
from geocentroids_tiler.errors import InputError
from geocentroids_tiler.hub import find_codebook
from geocentroids_tiler.settings import load_settings

Clustered = tuple[Clustering, NDArray[np.float32], NDArray[np.float64]]
"""Clusters, how well each feature fits its own, of shape (N,), and the mean token of each image, (images, D)."""


def prepare_step(fit: Fit) -> None:
    """Bring the images of the folder to the windows' gsd."""
    images = fit.config.images
    if images.folder is None:
        raise InputError("prepare needs a folder of images; images.folder is not set")
    report = prepare(
        images.folder,
        fit.prepared,
        exclude=images.exclude,
        gsd_m=fit.config.windows.gsd_m,
        compress=images.compress,
        bidx=images.bidx,
        rescale=images.rescale,
        progress=fit.progress,
    )
    fit.say(f"prepare: {len(report.prepared)} images, {report.reused} of them as they were")
    fit.say_skipped([(skipped.name, skipped.reason) for skipped in report.skipped])


def extract_step(fit: Fit) -> FeatureStore:
    """Compute the features of the images, here or on a cluster."""
    images = fit.images()
    found = _extract_here(fit, images) if fit.ray is None else _extract_there(fit, images, fit.ray)
    fit.say(
        f"extract: {len(found.store)} features of {len(found.store.images)} images, {found.reused} of them kept"
        + (f"; {found.features_per_s:.0f} features/s, encoder busy {found.busy:.0%}" if found.features_per_s else "")
    )
    fit.say_skipped([(skipped.image, skipped.reason) for skipped in found.store.manifest.skipped])
    return found.store


def _extract_here(fit: Fit, images: ImageFolder) -> Extraction:
    section = describe_encoder(fit.config.encoder, fit.config.windows.preprocess, fit.encoder)
    encoder = load_described(section, fit.config.windows.preprocess, fit.encoder, fit.config.encoder)
    settings = _feature_settings(fit, images, section, device_of(encoder))
    fit.say(f"extract: {len(images.names)} images with {section.architecture} on {encoder.info.device}")
    return extract(
        images,
        encoder,
        draft_codebook(settings),
        settings,
        fit.features,
        readers=fit.config.sample.readers,
        progress=fit.progress,
    )


def _extract_there(fit: Fit, images: ImageFolder, address: str) -> Extraction:
    preprocess = fit.config.windows.preprocess
    with connected_to_fit(address) as nodes:  # first: exporting or fetching an encoder may take a while
        section = describe_encoder(fit.config.encoder, preprocess, fit.encoder)
        recipe = EncoderRecipe(section, preprocess, fit.config.encoder, own_code())
        team = make_team(recipe, fit.encoder, nodes)
        workers, device = start_workers(team, nodes, fit.features)
        fit.say(
            f"extract: {len(images.names)} images with {section.architecture} on {len(workers)} encoders of "
            f"{len({worker.node.id for worker in workers})} nodes"
        )
        return extract_on_nodes(
            images,
            team,
            workers,
            _feature_settings(fit, images, section, device),
            fit.features,
            readers=fit.config.sample.readers,
            progress=fit.progress,
        )


def _feature_settings(fit: Fit, images: ImageFolder, section: EncoderSection, device: str) -> FeatureSettings:
    return FeatureSettings(
        encoder=section,
        preprocess=fit.config.windows.preprocess,
        device=device,
        per_image=fit.config.sample.per_image,
        seed=fit.config.seed,
        bidx=images.options.bidx,
        rescale=images.options.rescale,
    )


def cluster_step(fit: Fit) -> Clusters:
    """Cluster the features, and find out what the clusters stand for."""
    cluster = fit.config.cluster
    store = open_features(fit.features, verify=fit.ray is None)  # the nodes of a cluster look at their shares
    inputs = {"features": store.digest, "seed": fit.config.seed, **cluster.model_dump(mode="json")}

    def make() -> tuple[dict[str, Any], dict[str, Any]]:
        fit.say(f"cluster: {cluster.k} of {len(store)} features by {cluster.metric}")
        try:
            found, similarity, means = _clustered(fit, store)
        except NotFiniteError as error:
            image = store.images[error.part]
            raise InputError(
                f"feature {error.row} of {image} is not finite; leave the image out with --exclude"
            ) from error
        arrays = {
            "centroids": found.centroids,
            "labels": found.labels,
            "counts": found.counts,
            "similarity": similarity,
            "likeness": likeness_vectors(store, found.centroids, found.labels, means),
            "rgb": natural_colors(store, found.labels, cluster.k),
        }
        return arrays, {"objective": list(found.curve), "inertia": found.inertia, "reseeded": found.reseeded}

    kept = keep(fit.results, "cluster", inputs, make)
    counts, record = kept.arrays["counts"], kept.record
    fit.say(
        f"cluster: {len(record['objective'])} iterations, objective {record['objective'][0]:.6g} to "
        f"{record['inertia']:.6g}; patches of a cluster: {counts.min()} to {counts.max()}, median "
        f"{np.median(counts):g}; {int((counts == 0).sum())} empty, {record['reseeded']} started again{_kept(kept)}"
    )
    return clusters_of(kept)


def _clustered(fit: Fit, store: FeatureStore) -> Clustered:
    return _cluster_here(fit, store) if fit.ray is None else _cluster_there(fit, store, fit.ray)


def _cluster_here(fit: Fit, store: FeatureStore) -> Clustered:
    metric, parts = fit.config.cluster.metric, store.parts()
    found = _fit_table(fit, store, LocalTable(Rows(parts, find_device(fit.config.cluster.device), metric == "cosine")))
    return found, similarities(parts, found, metric), image_means(parts, metric)


def _cluster_there(fit: Fit, store: FeatureStore, address: str) -> Clustered:
    with connected_to_fit(address) as nodes:
        table = RemoteTable(store, nodes, fit.config.cluster.metric, fit.config.cluster.device)
        fit.say(f"cluster: on {table.nodes} nodes")
        found = _fit_table(fit, store, table)
        return found, table.similarities(found.centroids), table.image_means()


def _fit_table(fit: Fit, store: FeatureStore, table: Table) -> Clustering:
    cluster = fit.config.cluster
    return kmeans_of_table(
        table,
        cluster.k,
        metric=cluster.metric,
        seed=fit.config.seed,
        init=cluster.init,
        max_iterations=cluster.max_iterations,
        tolerance=cluster.tolerance,
        checkpoint=fit.results / "cluster.checkpoint",
        identity=store.digest,
        progress=fit.progress,
    )


def color_step(fit: Fit) -> None:
    """Choose colours."""
    clusters, kept = fit.clusters()
    earlier = _anchor_codebook(fit, clusters)
    inputs = {"cluster": kept.digest, "seed": fit.config.seed, "anchor": earlier.digest if earlier else None}

    def make() -> tuple[dict[str, Any], dict[str, Any]]:
        fit.say("color: t-SNE")
        anchor = None if earlier is None else _anchor(fit, clusters, earlier)
        found = color_centroids(clusters.likeness, natural=clusters.rgb, anchor=anchor, seed=fit.config.seed)
        plain = stretch_axes(found.cloud)
        vectors = _as_served(fit, clusters.centroids).astype(np.float64)
        scores = {
            "likeness": [asdict(found.score), asdict(found.stretch)],
            "centroids": [asdict(score_colors(vectors, found.colors)), asdict(score_colors(vectors, plain))],
        }
        return {"colors": found.colors}, {"scores": scores}

    result = keep(fit.results, "color", inputs, make)
    for what, (ours, stretch) in result.record["scores"].items():
        fit.say(
            f"color: by {what}: rank correlation {ours['rank_correlation']:.3f} (plain stretch "
            f"{stretch['rank_correlation']:.3f}), nearest 15 kept {ours['neighbours']:.3f} "
            f"({stretch['neighbours']:.3f}){_kept(result)}"
        )


def tree_step(fit: Fit) -> None:
    """Make the merge tree."""
    clusters, kept = fit.clusters()
    result = keep(
        fit.results,
        "tree",
        {"cluster": kept.digest},
        lambda: ({"tree": ward_tree(clusters.likeness, clusters.counts.clip(min=1))}, {}),
    )
    fit.say(f"tree: {len(result.arrays['tree'])} merges{_kept(result)}")


def _as_served(fit: Fit, centroids: NDArray[np.float32]) -> NDArray[np.float32]:
    return unit(centroids) if fit.config.cluster.metric == "cosine" else centroids


def _anchor_codebook(fit: Fit, clusters: Clusters) -> Codebook | None:
    if fit.config.color.anchor is None:
        return None
    codebook = find_codebook(fit.config.color.anchor, load_settings().codebooks_dir, allow_path=True)
    if codebook.manifest.encoder.dim != clusters.centroids.shape[1]:
        raise InputError(
            f"codebook {codebook.name!r} has tokens of {codebook.manifest.encoder.dim} values, this fit has "
            f"{clusters.centroids.shape[1]}; colours can only be kept from a codebook of the same encoder"
        )
    return codebook


def _anchor(fit: Fit, clusters: Clusters, earlier: Codebook) -> Anchor:
    served = partial(_as_served, fit)
    return anchor_to(served(clusters.centroids), served(earlier.centroids.astype(np.float32)), earlier.colors)


def _kept(kept: Kept) -> str:
    return " (kept)" if kept.reused else ""

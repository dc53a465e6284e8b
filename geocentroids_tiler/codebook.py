"""The codebook, format 1: centroids, colours, merge tree and all that is needed to compute the same labels again.

A codebook is a directory (also the layout of a hub repository): ``codebook.json``, ``arrays.safetensors``, and
optionally ``names/*.json``, ``encoder.onnx``, ``exemplars/``, ``item.json`` and ``README.md``.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from geocentroids_tiler.colors import oklab_to_srgb, srgb_to_oklab
from geocentroids_tiler.errors import CodebookError, InputError, short
from geocentroids_tiler.exemplars import EXEMPLARS_DIR, Exemplars, load_exemplars

FORMAT: Literal["geocentroids-codebook/1"] = "geocentroids-codebook/1"
MANIFEST_FILE = "codebook.json"
ARRAYS_FILE = "arrays.safetensors"
ENCODER_FILE = "encoder.onnx"
CARD_FILE = "README.md"
ITEM_FILE = "item.json"
NAMES_DIR = "names"
NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,63}$"
NODATA_LABEL = 65535
MAX_CENTROIDS = 65535

Metric = Literal["inner_product", "l2", "cosine"]
Resampling = Literal["nearest", "bilinear", "cubic", "average"]
Triple = tuple[float, float, float]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class EncoderSection(_Section):
    """Which encoder computes the tokens."""

    source: str = Field(min_length=1, description="hub id, local directory, or encoder.onnx")
    revision: str | None = None
    architecture: str = Field(min_length=1)
    dim: int = Field(ge=1, le=65536)
    patch_px: int = Field(default=14, ge=1, le=64)
    register_tokens: int = Field(default=0, ge=0, le=64)
    sha256: str | None = Field(
        default=None, pattern=r"^[0-9a-f]{64}$", description="of encoder.onnx or model.safetensors"
    )


class PreprocessSection(_Section):
    """From pixels on the ground to windows."""

    gsd_m: float = Field(gt=0, le=100, description="metres on the ground per pixel of a window")
    resampling: Resampling = "bilinear"
    mean: Triple = (0.485, 0.456, 0.406)
    std: Triple = (0.229, 0.224, 0.225)
    window_patches: int = Field(ge=1, le=256)
    margin_patches: int = Field(ge=0)
    stride_patches: int = Field(ge=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        core = self.window_patches - 2 * self.margin_patches
        if core < 1:
            raise ValueError(
                f"margin_patches {self.margin_patches} leaves nothing of window_patches {self.window_patches}; "
                "the margin must be less than half of the window"
            )
        if core % self.stride_patches:
            raise ValueError(
                f"stride_patches {self.stride_patches} does not divide the core of {core} patches "
                "(window_patches - 2 * margin_patches); use the core, or half of it for blending"
            )
        if min(self.std) <= 0:
            raise ValueError(f"std {self.std} must be above 0 in each channel")
        return self


class AssignmentSection(_Section):
    """How a token finds its centroid."""

    metric: Metric
    dtype: Literal["float16", "float32"] = "float32"
    similarity_range: tuple[float, float] | None = Field(
        default=None,
        description="similarities drawn as the lowest and the highest colour of layer=similarity",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.similarity_range is not None and not self.similarity_range[0] < self.similarity_range[1]:
            raise ValueError(f"similarity_range {self.similarity_range} must be (low, high) with low < high")
        return self


class Manifest(_Section):
    """Content of ``codebook.json``."""

    format: Literal["geocentroids-codebook/1"] = FORMAT
    name: str = Field(pattern=NAME_PATTERN)
    version: str = Field(min_length=1, max_length=64)
    title: str
    licence: str
    attribution: str
    encoder: EncoderSection
    preprocess: PreprocessSection
    assignment: AssignmentSection
    training: dict[str, JsonValue] = Field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Classes:
    """Labels, or labels merged to fewer classes. A class id indexes ``colors``, ``counts`` and ``names``.

    Attributes:
        lookup: class id of each label, of shape (K,), uint16.
        colors: sRGB colour of each class, of shape (n, 3), uint8.
        counts: training patches of each class, of shape (n,), int64, or None where the codebook has none.
        names: name of each class, or None, length n.
        typical: the centroid of each class that stands for it, of shape (n,), uint16.
    """

    lookup: NDArray[np.uint16]
    colors: NDArray[np.uint8]
    counts: NDArray[np.int64] | None
    names: tuple[str | None, ...]
    typical: NDArray[np.uint16]

    def __len__(self) -> int:
        return len(self.colors)

    def of_labels(self, labels: NDArray[np.uint16]) -> NDArray[np.uint16]:
        """Return the class id of each label, of the same shape; no data (65535) stays no data."""
        table = np.full(NODATA_LABEL + 1, NODATA_LABEL, np.uint16)
        table[: len(self.lookup)] = self.lookup
        return table[labels]


@dataclass(frozen=True)
class Codebook:
    """A codebook in memory, validated.

    Attributes:
        manifest: what ``codebook.json`` says.
        centroids: of shape (K, D), float16 or float32, finite.
        colors: sRGB colours of shape (K, 3), uint8.
        counts: training patches per centroid, of shape (K,), int64, or None.
        tree: merge tree of shape (K - 1, 4), float64, in the form of ``scipy.cluster.hierarchy.linkage``, or None.
        names: for each number of classes (None: the labels themselves) a mapping class id -> name.
        path: the directory it was loaded from, or None.
        exemplars: pictures of typical patches, or None.

    Raises:
        CodebookError: if an array has a wrong shape, dtype or value.
    """

    manifest: Manifest
    centroids: NDArray[np.floating[Any]]
    colors: NDArray[np.uint8]
    counts: NDArray[np.int64] | None = None
    tree: NDArray[np.float64] | None = None
    names: Mapping[int | None, Mapping[int, str]] = field(default_factory=dict)
    path: Path | None = None
    exemplars: Exemplars | None = None

    def __post_init__(self) -> None:
        where = str(self.path / ARRAYS_FILE) if self.path else ARRAYS_FILE
        _check_arrays(self, where)
        for key, array in _arrays_of(self).items():
            view = array.view()  # the caller's own array stays as it was
            view.flags.writeable = False
            object.__setattr__(self, key, view)

    def __len__(self) -> int:
        return len(self.centroids)

    @property
    def name(self) -> str:
        """The name it is known by."""
        return self.manifest.name

    @property
    def patch_m(self) -> float:
        """Side of a patch on the ground, in metres."""
        return self.manifest.preprocess.gsd_m * self.manifest.encoder.patch_px

    @property
    def encoder_path(self) -> Path | None:
        """The embedded ``encoder.onnx``, or None."""
        embedded = self.path / ENCODER_FILE if self.path else None
        return embedded if embedded and embedded.is_file() else None

    @cached_property
    def digest(self) -> str:
        """SHA-256 over manifest, arrays and names, in hex; file dates, the directory and exemplars do not enter it."""
        sha = hashlib.sha256(_canonical_json(self.manifest.model_dump(mode="json")))
        for key, array in _arrays_of(self).items():
            sha.update(f"{key}:{array.dtype.str}:{array.shape}".encode())
            sha.update(np.ascontiguousarray(array).tobytes())
        sha.update(_canonical_json({str(n): dict(names) for n, names in self.names.items()}))
        return sha.hexdigest()

    def classes(self, n: int | None = None) -> Classes:
        """Return the labels as classes, or the merge tree cut into ``n`` classes.

        Class ids of a cut follow the lowest label in each class; the colour of a merged class is the mean of its
        centroids' colours in OKLab, weighted by their training patches.

        Args:
            n: number of classes, 1 to K, or None for the labels themselves.

        Raises:
            InputError: if ``n`` is out of range or the codebook has no merge tree.
        """
        if n is None:
            lookup = np.arange(len(self), dtype=np.uint16)
            return Classes(lookup, self.colors, self.counts, self._names_of(None, len(self)), typical=lookup)
        if self.tree is None:
            raise InputError(f"classes={n}: codebook {self.name!r} has no merge tree; leave out classes")
        if not 1 <= n <= len(self):
            raise InputError(f"classes={n}: codebook {self.name!r} can be cut into 1 to {len(self)} classes")
        lookup = cut_tree(self.tree, n)
        weight = np.ones(len(self)) if self.counts is None else np.maximum(self.counts, 1).astype(np.float64)
        lab = srgb_to_oklab(self.colors)
        total = np.bincount(lookup, weight, minlength=n)
        mean = np.stack([np.bincount(lookup, weight * lab[:, i], minlength=n) / total for i in range(3)], axis=1)
        counts = None
        if self.counts is not None:
            counts = np.zeros(n, np.int64)
            np.add.at(counts, lookup, self.counts)
        return Classes(lookup, oklab_to_srgb(mean), counts, self._names_of(n, n), heaviest(lookup, self.counts))

    def has_exemplar(self, label: int) -> bool:
        """Return whether there is a picture of typical patches of a label."""
        return self.exemplars is not None and label in self.exemplars.sheets

    def neighbours(self, label: int, n: int) -> list[tuple[int, float]]:
        """Return the ``n`` centroids most like centroid ``label`` and their similarity to it, best first."""
        centroids = self.centroids.astype(np.float64)
        own = centroids[label]
        metric = self.manifest.assignment.metric
        if metric == "l2":
            similarity = -np.linalg.norm(centroids - own, axis=1)
        else:
            similarity = centroids @ own
            if metric == "cosine":
                similarity /= np.linalg.norm(centroids, axis=1) * np.linalg.norm(own)
        similarity[label] = -np.inf
        best = np.argsort(-similarity, kind="stable")[: min(n, len(self) - 1)]
        return [(int(i), float(similarity[i])) for i in best]

    def similarity_range(self) -> tuple[float, float]:
        """Return the similarities that ``layer=similarity`` draws as its lowest and its highest colour.

        Those of the manifest; where it has none, 0 to 1 for cosine, and for the other metrics what follows from the
        length of the centroids: nothing in common (0, or a distance of one length) to a perfect fit.
        """
        stated = self.manifest.assignment.similarity_range
        if stated is not None:
            return stated
        length = float(np.median(np.linalg.norm(self.centroids.astype(np.float64), axis=1)))
        return {"cosine": (0.0, 1.0), "inner_product": (0.0, length**2), "l2": (-length, 0.0)}[
            self.manifest.assignment.metric
        ]

    def _names_of(self, n: int | None, length: int) -> tuple[str | None, ...]:
        names = self.names.get(n, {})
        return tuple(names.get(i) for i in range(length))


def cut_tree(tree: NDArray[np.float64], n: int) -> NDArray[np.uint16]:
    """Cut a merge tree into ``n`` classes.

    Args:
        tree: linkage of shape (K - 1, 4), merges in order of height.
        n: number of classes, 1 to K.

    Returns:
        Class of each of the K leaves, of shape (K,); classes are numbered by their lowest leaf.
    """
    k = len(tree) + 1
    parent = np.arange(k + len(tree))
    for i, (left, right) in enumerate(tree[: k - n, :2].astype(np.int64)):
        parent[left] = parent[right] = k + i
    while not np.array_equal(up := parent[parent], parent):  # doubles the step, so a chain of K merges takes log K
        parent = up
    _, first, lookup = np.unique(parent[:k], return_index=True, return_inverse=True)
    rank = np.empty(n, np.uint16)
    rank[np.argsort(first)] = np.arange(n, dtype=np.uint16)
    return rank[lookup]


def heaviest(lookup: NDArray[np.uint16], counts: NDArray[np.int64] | None) -> NDArray[np.uint16]:
    """Return the centroid with the most training patches in each class; the lowest one of equals.

    Args:
        lookup: class of each of K centroids, of shape (K,); each class from 0 to n - 1 has one.
        counts: training patches per centroid, of shape (K,), or None: all are equal.

    Returns:
        Centroids, of shape (n,).
    """
    order = np.lexsort((np.zeros(len(lookup)) if counts is None else -counts, lookup))  # stable
    _, first = np.unique(lookup[order], return_index=True)
    return order[first].astype(np.uint16)


def load_codebook(path: Path | str) -> Codebook:
    """Load and validate a codebook directory.

    Raises:
        CodebookError: if a file is missing or anything in it is wrong; the text names the file, what was found and
            what is allowed.
    """
    path = Path(path)
    manifest_path, arrays_path = path / MANIFEST_FILE, path / ARRAYS_FILE
    for required in (manifest_path, arrays_path):
        if not required.is_file():
            raise CodebookError(f"{required} is missing; a codebook directory holds {MANIFEST_FILE} and {ARRAYS_FILE}")
    manifest = _parse_manifest(manifest_path)
    try:
        arrays = load_file(arrays_path)
    except (
        SafetensorError,
        OSError,
        ValueError,
        KeyError,
        TypeError,
    ) as error:  # the last two: dtypes unknown to numpy
        raise CodebookError(f"{arrays_path} is not a readable safetensors file: {error}") from error
    unknown = set(arrays) - {"centroids", "colors", "counts", "tree"}
    missing = {"centroids", "colors"} - set(arrays)
    if unknown or missing:
        raise CodebookError(
            f"{arrays_path} holds arrays {sorted(arrays)}; centroids and colors are required, "
            "counts and tree are optional, no others are allowed"
        )
    if manifest.encoder.source == ENCODER_FILE:
        manifest = _with_encoder_digest(manifest, path / ENCODER_FILE)
    codebook = Codebook(
        manifest=manifest,
        centroids=arrays["centroids"],
        colors=arrays["colors"],
        counts=arrays.get("counts"),
        tree=arrays.get("tree"),
        path=path,
    )
    k = len(codebook)
    return replace(codebook, names=_load_names(path, k), exemplars=load_exemplars(path, k))


def save_codebook(
    codebook: Codebook,
    path: Path | str,
    *,
    card: str,
    encoder: Path | None = None,
    exemplars: Path | None = None,
    extra: Mapping[str, str] | None = None,
) -> Codebook:
    """Write a codebook to a new directory, whole or not at all.

    Args:
        codebook: what to write.
        path: a directory that does not exist yet, or is empty.
        card: text of the model card.
        encoder: an ONNX file to embed as ``encoder.onnx``.
        exemplars: a folder of sheets and their index, to be copied.
        extra: text of further files, such as ``item.json``, by name.

    Returns:
        The codebook as loaded from ``path``. Where the embedded encoder is its source, its manifest holds the
        encoder's SHA-256.

    Raises:
        CodebookError: if ``path`` holds something already, or what was written does not load.
    """
    path = Path(path)
    check_vacant(path)
    manifest = codebook.manifest
    if encoder is not None and manifest.encoder.source == ENCODER_FILE:
        manifest = _with_encoder_digest(manifest, encoder)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as work:
        draft = Path(work) / "draft"
        draft.mkdir()
        (draft / MANIFEST_FILE).write_text(manifest_text(manifest), encoding="utf-8")
        save_file(
            {key: np.ascontiguousarray(array) for key, array in _arrays_of(codebook).items()},
            draft / ARRAYS_FILE,
        )
        # safetensors makes files that only their owner may read
        (draft / ARRAYS_FILE).chmod((draft / MANIFEST_FILE).stat().st_mode & 0o777)
        (draft / CARD_FILE).write_text(card, encoding="utf-8")
        for n, names in codebook.names.items():
            (draft / NAMES_DIR).mkdir(exist_ok=True)
            pack = {"classes": n, "names": {str(i): name for i, name in sorted(names.items())}}
            file = draft / NAMES_DIR / ("labels.json" if n is None else f"classes-{n}.json")
            file.write_text(json.dumps(pack, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        if encoder is not None:
            shutil.copyfile(encoder, draft / ENCODER_FILE)
        if exemplars is not None:
            shutil.copytree(exemplars, draft / EXEMPLARS_DIR, copy_function=shutil.copyfile)
        for file_name, text in (extra or {}).items():
            if Path(file_name).name != file_name or (draft / file_name).exists():
                raise CodebookError(f"{file_name!r} cannot be added; allowed are plain names that are not in use")
            (draft / file_name).write_text(text, encoding="utf-8")
        load_codebook(draft)
        if path.exists():
            path.rmdir()
        draft.replace(path)
    return load_codebook(path)


def check_vacant(path: Path) -> None:
    """Raise CodebookError unless ``path`` is free for a new codebook: not there yet, or an empty directory."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise CodebookError(f"{path} exists already; name a new directory or remove it first")


def manifest_text(manifest: Manifest) -> str:
    """Return the content of ``codebook.json``."""
    return json.dumps(manifest.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n"


def validation_problems(error: ValidationError) -> str:
    """Return which fields were wrong, their values and what is allowed, in one line."""
    return "; ".join(
        f"{'.'.join(str(part) for part in item['loc']) or 'file'} = {short(item['input'])}: {item['msg']}"
        for item in error.errors()
    )


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _with_encoder_digest(manifest: Manifest, encoder: Path) -> Manifest:
    """Return ``manifest`` with the SHA-256 of its embedded encoder, which so becomes part of the codebook's digest."""
    if not encoder.is_file():
        raise CodebookError(f"{encoder} is missing, and {MANIFEST_FILE} names it as the encoder")
    found, stated = file_sha256(encoder), manifest.encoder.sha256
    if stated not in (None, found):
        raise CodebookError(f"{encoder} has SHA-256 {found}; {MANIFEST_FILE} allows {stated} only")
    return manifest.model_copy(update={"encoder": manifest.encoder.model_copy(update={"sha256": found})})


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not a JSON number")


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)


def _parse_manifest(path: Path) -> Manifest:
    try:
        content = _read_json(path)
    except (OSError, ValueError, RecursionError) as error:
        raise CodebookError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise CodebookError(f"{path} has format {found!r}; only {FORMAT!r} is supported")
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        raise CodebookError(f"{path} is not a valid codebook manifest: {validation_problems(error)}") from error


def _load_names(path: Path, k: int) -> dict[int | None, dict[int, str]]:
    packs: dict[int | None, dict[int, str]] = {}
    for file in sorted((path / NAMES_DIR).glob("*.json")):
        try:
            content = _read_json(file)
            n = content["classes"]
            names = {int(key): value for key, value in content["names"].items()}
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise CodebookError(
                f'{file} is not a legend pack: {error!r}; expected {{"classes": N or null, "names": {{"ID": "name"}}}}'
            ) from error
        if n is not None and not (type(n) is int and 1 <= n <= k):
            raise CodebookError(f"{file} is for classes = {n!r}; allowed are null and 1 to {k}")
        limit = k if n is None else n
        if outside := [i for i in names if not 0 <= i < limit]:
            raise CodebookError(f"{file} names class {outside[0]}; allowed are 0 to {limit - 1}")
        if wrong := [i for i, name in names.items() if not isinstance(name, str)]:
            raise CodebookError(f"{file} gives class {wrong[0]} the name {names[wrong[0]]!r}; names are texts")
        packs.setdefault(n, {}).update(names)
    return packs


def _arrays_of(codebook: Codebook) -> dict[str, NDArray[Any]]:
    arrays: dict[str, NDArray[Any] | None] = {
        "centroids": codebook.centroids,
        "colors": codebook.colors,
        "counts": codebook.counts,
        "tree": codebook.tree,
    }
    return {key: array for key, array in arrays.items() if array is not None}


def _check_arrays(codebook: Codebook, where: str) -> None:
    """Raise CodebookError unless every array has the shape, dtype and values that format 1 allows."""
    k = len(codebook.centroids) if codebook.centroids.ndim else 0
    dim = codebook.manifest.encoder.dim
    expected: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {
        "centroids": ((k, dim), ("float16", "float32")),
        "colors": ((k, 3), ("uint8",)),
        "counts": ((k,), ("int64",)),
        "tree": ((k - 1, 4), ("float64",)),
    }
    if not 1 <= k <= MAX_CENTROIDS:
        raise CodebookError(f"{where}: centroids has {k} rows; allowed are 1 to {MAX_CENTROIDS}")
    for key, array in _arrays_of(codebook).items():
        shape, dtypes = expected[key]
        if array.shape != shape or array.dtype.name not in dtypes:
            raise CodebookError(
                f"{where}: {key} has shape {array.shape} and dtype {array.dtype.name}; "
                f"allowed are shape {shape} and dtype {' or '.join(dtypes)}"
            )
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise CodebookError(f"{where}: {key} has {int((~np.isfinite(array)).sum())} values that are not finite")
    if codebook.manifest.assignment.metric == "cosine" and not codebook.centroids.any(axis=1).all():
        row = int(np.argmin(codebook.centroids.any(axis=1)))
        raise CodebookError(f"{where}: centroids row {row} is all zero, which metric cosine does not allow")
    if codebook.counts is not None and codebook.counts.min() < 0:
        raise CodebookError(f"{where}: counts has the negative value {codebook.counts.min()}")
    if codebook.tree is not None:
        _check_tree(codebook.tree, k, where)


def _check_tree(tree: NDArray[np.float64], k: int, where: str) -> None:
    children = tree[:, :2]
    limit = k + np.arange(len(tree))[:, None]
    used = np.sort(children, axis=None)
    if (
        (children != np.floor(children)).any()
        or (children < 0).any()
        or (children >= limit).any()
        or (used != np.arange(2 * len(tree))).any()
    ):
        raise CodebookError(f"{where}: tree is not a merge tree of {k} centroids in the form of scipy's linkage")
    if (np.diff(tree[:, 2]) < 0).any():
        raise CodebookError(f"{where}: the heights (column 2) of tree must not fall")


def _canonical_json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()

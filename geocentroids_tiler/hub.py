"""Find a codebook by name, fetch one."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from geocentroids_tiler.codebook import (
    ARRAYS_FILE,
    CARD_FILE,
    ENCODER_FILE,
    ITEM_FILE,
    MANIFEST_FILE,
    NAME_PATTERN,
    NAMES_DIR,
    Codebook,
    EncoderSection,
    Manifest,
    file_sha256,
    load_codebook,
    manifest_text,
)
from geocentroids_tiler.download import Retry, cached_snapshot, fetch_file, fetch_snapshot, storing
from geocentroids_tiler.errors import CodebookError, CodebookNotFoundError, DownloadError, InputError
from geocentroids_tiler.exemplars import EXEMPLARS_DIR, INDEX_FILE, SHEETS_FILE
from geocentroids_tiler.importing import (
    CONFIG_FILE,
    EMBEDDED_DIR,
    REPO_ID,
    WEIGHTS_FILE,
    WORK_DIR,
    build_codebook,
    check_name,
    check_onnx_file,
    import_codebook,
    install,
    read_arrays,
)
from geocentroids_tiler.recipes import RECIPES, PinnedFile, Recipe

__all__ = [
    "ListedCodebook",
    "Remotes",
    "codebook_size_bytes",
    "find_codebook",
    "import_codebook",
    "list_codebooks",
    "pull_codebook",
]

GITHUB_RAW_URL = "https://raw.githubusercontent.com"
ORIGIN_FILE = "origin.json"
ENCODER_FILES = (CONFIG_FILE, WEIGHTS_FILE)
CODEBOOK_PATTERNS = (
    MANIFEST_FILE,
    ARRAYS_FILE,
    f"{NAMES_DIR}/*.json",
    f"{EXEMPLARS_DIR}/{SHEETS_FILE}",
    f"{EXEMPLARS_DIR}/{INDEX_FILE}",
    ENCODER_FILE,
    CARD_FILE,
    ITEM_FILE,
)
MAX_CODEBOOK_BYTES = 4 * 2**30
MAX_ENCODER_BYTES = 8 * 2**30

_COMMIT = re.compile(r"[0-9a-f]{40}")

Origin = Literal["built in", "installed", "available"]


@dataclass(frozen=True, slots=True)
class ListedCodebook:
    """One line of a list of codebooks. What could not be read, or is not known before it is fetched, is None.

    Attributes:
        name: the name it is known by.
        origin: ``built in``, ``installed``, or ``available`` (known, and to be fetched with ``pull``).
        version: version of the codebook.
        title: one line for lists and maps.
        classes: number of centroids K.
        dim: length D of a token.
        encoder: source of the encoder.
        metric: how a token finds its centroid.
        gsd_m: metres on the ground per pixel.
        path: its directory, or None if it is not installed.
        size_bytes: size of all its files.
        error: why it cannot be used, or None.
    """

    name: str
    origin: Origin
    version: str | None = None
    title: str | None = None
    classes: int | None = None
    dim: int | None = None
    encoder: str | None = None
    metric: str | None = None
    gsd_m: float | None = None
    path: Path | None = None
    size_bytes: int | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Remotes:
    """Where things are fetched from, and how.

    Attributes:
        github_url: base URL of GitHub's raw files.
        hub_endpoint: base URL of the Hugging Face Hub; None: the usual one.
        hub_cache_dir: folder that encoders are kept in; None: the hub's usual cache, where loaders look for them.
        retry: how to go on after a transfer from GitHub broke off.
        progress: show progress bars on a terminal, and say which commit a revision stands for.
    """

    github_url: str = GITHUB_RAW_URL
    hub_endpoint: str | None = None
    hub_cache_dir: Path | None = None
    retry: Retry = field(default_factory=Retry)
    progress: bool = True


def find_codebook(name: str, codebooks_dir: Path, *, allow_path: bool = False) -> Codebook:
    """Load a codebook by its name: built in, installed, or by the hub repository it was pulled from.

    Args:
        name: a name, or a repository id ``owner/name``. It is compared with what is there and never opened as a path.
        codebooks_dir: folder of installed codebooks.
        allow_path: also accept the path of a codebook directory, if no codebook has that name. For names that come
            from the operator (command line, settings), never for those of a request.

    Raises:
        CodebookNotFoundError: if there is none; the text says what is installed and how to get it.
        CodebookError: if it is broken.
    """
    directory = _locate(name, codebooks_dir)
    if directory is not None:
        return _load_named(directory)
    if allow_path and Path(name).expanduser().is_dir():
        return load_codebook(Path(name).expanduser())
    raise _not_found(name, codebooks_dir)


def list_codebooks(codebooks_dir: Path) -> list[ListedCodebook]:
    """List built-in, installed and known codebooks, by name. A broken one is listed with its error.

    Args:
        codebooks_dir: folder of installed codebooks; it need not exist.
    """
    embedded = {path.name: _describe(path, "built in") for path in _directories(EMBEDDED_DIR)}
    installed = {path.name: _describe(path, "installed") for path in _directories(codebooks_dir)}
    available = {name: _describe_recipe(recipe) for name, recipe in RECIPES.items()}
    hidden = [
        replace(installed[name], error=f"{installed[name].path} is not used: a built-in codebook has the same name")
        for name in sorted(embedded.keys() & installed.keys())
    ]
    return sorted((available | installed | embedded).values(), key=lambda entry: entry.name) + hidden


def codebook_size_bytes(directory: Path) -> int:
    """Return the size of all files of a codebook directory."""
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())


def pull_codebook(
    name: str,
    codebooks_dir: Path,
    *,
    revision: str | None = None,
    force: bool = False,
    remotes: Remotes | None = None,
) -> Codebook:
    """Fetch a codebook and its encoder, and install it whole or not at all.

    One that is installed already stays, and only its encoder is fetched if it is not in the hub's cache.

    Args:
        name: a codebook known by name (``southamerica-6k``), a hub repository ``owner/name`` in format 1, or one that
            is installed.
        codebooks_dir: folder of installed codebooks, made if need be.
        revision: branch, tag or commit of the hub repository; none: the head of its main branch.
        force: fetch and replace one that is installed already.
        remotes: where to fetch from.

    Returns:
        The installed codebook, as loaded from its directory.

    Raises:
        InputError: if ``name`` is neither known, nor installed, nor a repository id, or its name is taken.
        CodebookError: if what was fetched is no codebook.
        DownloadError: if something cannot be fetched or stored, or is not what was expected.
    """
    remotes = remotes or Remotes()
    directory = _locate(name, codebooks_dir)
    with storing(codebooks_dir):
        if directory is not None and not force:
            return _complete(directory, remotes)
        if name in RECIPES:
            return _pull_recipe(RECIPES[name], codebooks_dir, remotes)
        repo_id = name if directory is None else _origin_of(directory)
        if repo_id is not None and REPO_ID.fullmatch(repo_id):
            return _pull_repository(repo_id, codebooks_dir, revision, force, remotes)
    if directory is not None:
        raise InputError(f"codebook {name!r} is built in or was imported, so it cannot be fetched again")
    raise InputError(
        f"{name!r} is neither a codebook known by name ({', '.join(RECIPES)}) nor a hub repository id OWNER/NAME"
    )


def _locate(name: str, codebooks_dir: Path) -> Path | None:
    """Return the directory of a codebook, by name or by the repository it was pulled from, or None."""
    if re.fullmatch(NAME_PATTERN, name):
        return next((path for path in (EMBEDDED_DIR / name, codebooks_dir / name) if path.is_dir()), None)
    if REPO_ID.fullmatch(name):
        return next((path for path in _directories(codebooks_dir) if _origin_of(path) == name), None)
    return None


def _directories(folder: Path) -> list[Path]:
    """Return the directories in ``folder`` that may hold a codebook; those of unfinished work begin with a dot."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and re.fullmatch(NAME_PATTERN, path.name))


def _load_named(directory: Path) -> Codebook:
    codebook = load_codebook(directory)
    if codebook.name != directory.name:
        raise CodebookError(f"{directory} holds a codebook named {codebook.name!r}; allowed is {directory.name!r} only")
    return codebook


def _origin_of(directory: Path) -> str | None:
    """Return the repository a codebook was pulled from, or None."""
    try:
        return str(json.loads((directory / ORIGIN_FILE).read_text(encoding="utf-8"))["repository"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _not_found(name: str, codebooks_dir: Path) -> CodebookNotFoundError:
    installed = {path.name for folder in (EMBEDDED_DIR, codebooks_dir) for path in _directories(folder)}
    what = f"installed: {', '.join(sorted(installed))}" if installed else "none is installed"
    if name in RECIPES or REPO_ID.fullmatch(name):
        return CodebookNotFoundError(
            f"codebook {name!r} is not installed; fetch it with: geocentroids codebook pull {name} ({what})"
        )
    return CodebookNotFoundError(f"there is no codebook {name if len(name) <= 80 else name[:77] + '...'!r} ({what})")


def _describe(path: Path, origin: Origin) -> ListedCodebook:
    try:
        codebook = _load_named(path)
        size_bytes = codebook_size_bytes(path)
    except (CodebookError, OSError) as error:
        return ListedCodebook(path.name, origin, path=path, error=str(error))
    manifest = codebook.manifest
    return ListedCodebook(
        name=manifest.name,
        origin=origin,
        version=manifest.version,
        title=manifest.title,
        classes=len(codebook),
        dim=manifest.encoder.dim,
        encoder=manifest.encoder.source,
        metric=manifest.assignment.metric,
        gsd_m=manifest.preprocess.gsd_m,
        path=path,
        size_bytes=size_bytes,
    )


def _describe_recipe(recipe: Recipe) -> ListedCodebook:
    return ListedCodebook(
        name=recipe.name,
        origin="available",
        version=recipe.version,
        title=recipe.title,
        classes=recipe.classes,
        dim=recipe.encoder.dim,
        encoder=recipe.encoder.source,
        metric=recipe.assignment.metric,
        gsd_m=recipe.preprocess.gsd_m,
    )


def _complete(directory: Path, remotes: Remotes) -> Codebook:
    """Fetch what an installed codebook lacks: its encoder, and the commit of it if the manifest names none."""
    try:
        codebook = _load_named(directory)
    except CodebookError as error:
        raise CodebookError(f"{error} (--force fetches the codebook again)") from error
    encoder = _fetch_encoder(codebook.manifest.encoder, remotes)
    if encoder == codebook.manifest.encoder:
        return codebook
    _write_manifest(codebook.manifest.model_copy(update={"encoder": encoder}), directory)
    return load_codebook(directory)


def _pull_recipe(recipe: Recipe, codebooks_dir: Path, remotes: Remotes) -> Codebook:
    """Fetch the arrays and the encoder of a recipe, and build the codebook as an import does."""
    work = codebooks_dir / WORK_DIR / recipe.name

    def fetch(file: PinnedFile) -> Path:
        return fetch_file(
            f"{remotes.github_url.rstrip('/')}/{recipe.repository}/{recipe.commit}/{file.path}",
            work / file.path,
            digest=file.digest,
            max_bytes=file.max_bytes,
            retry=remotes.retry,
            progress=remotes.progress,
        )

    colors_npy, centroids_npy = fetch(recipe.colors), fetch(recipe.centroids)
    centroids, colors = read_arrays(centroids_npy, colors_npy)
    manifest = Manifest(
        name=recipe.name,
        version=recipe.version,
        title=recipe.title,
        licence=recipe.licence,
        attribution=recipe.attribution,
        encoder=_fetch_encoder(recipe.encoder, remotes),
        preprocess=recipe.preprocess,
        assignment=recipe.assignment,
        training={**dict(recipe.training), "source": f"github.com/{recipe.repository}", "commit": recipe.commit},
    )
    codebook = build_codebook(Codebook(manifest, centroids, colors), codebooks_dir, card=recipe.card)
    shutil.rmtree(work, ignore_errors=True)
    return codebook


def _pull_repository(
    repo_id: str, codebooks_dir: Path, revision: str | None, force: bool, remotes: Remotes
) -> Codebook:
    """Fetch a format-1 repository of the hub, check it, and install it under the name that it gives itself."""
    work = codebooks_dir / WORK_DIR / repo_id.replace("/", "--")
    snapshot = fetch_snapshot(
        repo_id,
        revision=revision,
        patterns=CODEBOOK_PATTERNS,
        required=(MANIFEST_FILE, ARRAYS_FILE),
        max_bytes=MAX_CODEBOOK_BYTES,
        local_dir=work,
        endpoint=remotes.hub_endpoint,
        progress=remotes.progress,
    )
    kept = {work / path for path in snapshot.files}
    hub_files = work / ".cache"
    for file in [path for path in work.rglob("*") if path.is_file() and hub_files not in path.parents]:
        if file not in kept:  # of another commit, fetched before
            file.unlink()
    try:
        draft = load_codebook(work)
        manifest = draft.manifest
        _check_encoder_source(repo_id, manifest.encoder.source)
        if draft.encoder_path is not None:
            check_onnx_file(draft.encoder_path)
    except CodebookError as error:
        shutil.rmtree(work)
        raise CodebookError(f"hub repository {repo_id} is not a codebook that can be installed: {error}") from error
    same = _origin_of(codebooks_dir / manifest.name) == repo_id
    check_name(manifest.name, codebooks_dir, force=force or same)
    if manifest.name in RECIPES and not force:
        raise InputError(f"hub repository {repo_id} calls itself {manifest.name!r}, another codebook; --force takes it")
    encoder = _fetch_encoder(manifest.encoder, remotes)
    fetched = {file: file_sha256(work / file) for file in sorted(snapshot.files)}
    _write_manifest(manifest.model_copy(update={"encoder": encoder}), work)
    origin = {"repository": repo_id, "commit": snapshot.commit, "sha256": fetched}
    (work / ORIGIN_FILE).write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(hub_files, ignore_errors=True)
    return install(work, codebooks_dir)


def _check_encoder_source(repo_id: str, source: str) -> None:
    """Refuse a repository that names an encoder on the disk of whoever installs it."""
    if source != ENCODER_FILE and not REPO_ID.fullmatch(source):
        raise CodebookError(
            f"{MANIFEST_FILE} names the encoder {source!r}; allowed are {ENCODER_FILE} and hub ids OWNER/NAME"
        )


def _fetch_encoder(section: EncoderSection, remotes: Remotes) -> EncoderSection:
    """Fetch an encoder that comes from the hub, and return its section with the commit and digest of what was fetched.

    Config and safetensors weights only. What the hub's cache has of a known commit is not fetched again.
    """
    if section.source == ENCODER_FILE or not REPO_ID.fullmatch(section.source):
        return section
    snapshot = None
    if section.revision is not None and _COMMIT.fullmatch(section.revision):
        snapshot = cached_snapshot(
            section.source, commit=section.revision, required=ENCODER_FILES, cache_dir=remotes.hub_cache_dir
        )
    if snapshot is None:
        snapshot = fetch_snapshot(
            section.source,
            revision=section.revision,
            patterns=ENCODER_FILES,
            required=ENCODER_FILES,
            max_bytes=MAX_ENCODER_BYTES,
            cache_dir=remotes.hub_cache_dir,
            endpoint=remotes.hub_endpoint,
            progress=remotes.progress,
        )
    found = file_sha256(snapshot.path / WEIGHTS_FILE)
    if section.sha256 not in (None, found):
        raise DownloadError(
            f"{WEIGHTS_FILE} of hub repository {section.source} has SHA-256 {found}; the codebook allows "
            f"{section.sha256} only"
        )
    return section.model_copy(update={"revision": snapshot.commit, "sha256": found})


def _write_manifest(manifest: Manifest, directory: Path) -> None:
    draft = directory / f"{MANIFEST_FILE}.new"
    draft.write_text(manifest_text(manifest), encoding="utf-8")
    draft.replace(directory / MANIFEST_FILE)

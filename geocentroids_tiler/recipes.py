"""Codebooks known by name that are put together from files published elsewhere, each pinned by commit and digest."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import JsonValue

from geocentroids_tiler.codebook import AssignmentSection, EncoderSection, PreprocessSection
from geocentroids_tiler.download import Digest

MIB = 2**20


@dataclass(frozen=True, slots=True)
class PinnedFile:
    """A file of a public repository.

    Attributes:
        path: path in the repository.
        digest: what its content must be.
        max_bytes: size beyond which it is refused.
    """

    path: str
    digest: Digest
    max_bytes: int


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a codebook is put together.

    Attributes:
        name: the name it is known by.
        version: version of the codebook.
        title: one line for lists and maps.
        licence: licence of centroids and colours.
        attribution: whom a map that uses it has to name.
        repository: ``owner/name`` on GitHub.
        commit: commit that the files are taken from.
        centroids: .npy of shape (K, D).
        colors: .npy of shape (K, 3), uint8.
        classes: number of centroids K.
        encoder: the encoder, without the commit and digest that are found when it is fetched.
        preprocess: from pixels on the ground to windows.
        assignment: how a token finds its centroid.
        training: facts about the fit.
        card: text of the model card.
    """

    name: str
    version: str
    title: str
    licence: str
    attribution: str
    repository: str
    commit: str
    centroids: PinnedFile
    colors: PinnedFile
    classes: int
    encoder: EncoderSection
    preprocess: PreprocessSection
    assignment: AssignmentSection
    training: tuple[tuple[str, JsonValue], ...]
    card: str


_SOUTHAMERICA_CARD = """\
# southamerica-6k

6,144 classes of ground for overhead imagery of about 0.22 m per pixel, found without labels: K-Means centroids of
DINOv2 tokens, with a colour for each so that similar classes have similar colours.

## Origin
Published as "K-Means GeoCentroids for DinoV2" by Aliaksandr Hancharenka,
https://github.com/aliaksandr960/dinov2_geocentroids_southamerica, MIT licence. `centroids` and `colors` are the values
of its `centroids_6k.npy` and `color_map_rgb_6k.npy`; the rest of this directory was added when it was installed. Its
text speaks of 6,000 clusters; the files hold 6,144.

## Encoder
`facebook/dinov2-with-registers-base` (Apache-2.0), tokens of the last hidden state after the final layer norm, without
the CLS and the four register tokens. A token goes to the centroid with the largest inner product; neither is
normalised.

## Data
About 4,000,000 tokens of 2,000 images of South America from OpenAerialMap, drones and satellites, brought to 0.25 m
per pixel. The published notebook lets the image processor enlarge the middle 196 px of each 224 px sample, so what the
network saw is 0.21875 m per pixel and 3.0625 m per patch. These are the values used here.

## Limits
- Fitted on one continent: elsewhere, and at other seasons or sensors, ground may fall between the classes. Look at the
  similarity layer before trusting the colours.
- Classes have numbers and colours, not names. 6,048 of the 6,144 colours are distinct, and neighbouring ones cannot be
  told apart by eye: the label is the identity, the colour shows likeness.
- A window's surroundings influence its tokens, so plain fields may change class at window borders. Windows are laid
  every 5 patches and blended, which hides the borders; the notebook lays them every 10 and does not. With
  `stride_patches` 10 in `codebook.json` labels are the notebook's, for a quarter of the computing.
- No merge tree and no counts were published, so `classes=N` is not available.
"""

SOUTHAMERICA_6K = Recipe(
    name="southamerica-6k",
    version="1",
    title="South America, 6,144 classes",
    licence="MIT",
    attribution="K-Means GeoCentroids for DinoV2, Aliaksandr Hancharenka (MIT); imagery: OpenAerialMap contributors",
    repository="aliaksandr960/dinov2_geocentroids_southamerica",
    commit="13ca0c158cbd22078bdc2fa72ca0696528f2518c",
    # Only git's object id of the centroids is known from the commit's tree; it fixes size and content.
    centroids=PinnedFile(
        "centroids_6k.npy", Digest(git_blob="2a49de57def4e74440d8dee7895ae94cf02495b0"), max_bytes=64 * MIB
    ),
    colors=PinnedFile(
        "color_map_rgb_6k.npy",
        Digest(
            sha256="cda5b5e30ff51b4361b389307fc657e0e806b84cd62c302764a604b1882028ed",
            git_blob="c03aa0681de310893f34030ea0a121dc51bb8a8e",
        ),
        max_bytes=MIB,
    ),
    classes=6144,
    encoder=EncoderSection(
        source="facebook/dinov2-with-registers-base",
        architecture="dinov2_with_registers",
        dim=768,
        patch_px=14,
        register_tokens=4,
    ),
    preprocess=PreprocessSection(
        gsd_m=0.21875, resampling="cubic", window_patches=16, margin_patches=3, stride_patches=5
    ),
    assignment=AssignmentSection(metric="inner_product"),
    training=(
        ("region", "South America"),
        ("imagery", "OpenAerialMap, drones and satellites, resampled to 0.25 m per pixel"),
        ("images", 2000),
        ("features", 4_000_000),
        ("method", "K-Means; colours by t-SNE from 768 to 3 dimensions"),
        ("token_dtype", "float16"),
    ),
    card=_SOUTHAMERICA_CARD,
)

RECIPES: dict[str, Recipe] = {SOUTHAMERICA_6K.name: SOUTHAMERICA_6K}
"""Codebooks that ``pull`` knows by name."""

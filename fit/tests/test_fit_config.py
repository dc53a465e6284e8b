"""The configuration: documented in full, and the same from a file as from options."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from geocentroids_fit import cli
from geocentroids_fit.config import FitConfig, make_config, read_config
from geocentroids_tiler.errors import InputError
from geocentroids_tiler.hub import find_codebook

DOCS = Path(__file__).parents[2] / "docs" / "fit-config.md"
REQUIRED = {"out": "o", "images": {}, "encoder": {"model": "m"}, "codebook": {"name": "n"}}
NO_FIXED_DEFAULT = {
    "out", "work", "images.folder", "images.bidx", "images.rescale", "encoder.model", "encoder.revision",
    "encoder.embed", "encoder.threads", "color.anchor", "codebook.name", "codebook.card", "sources", "evaluate.sets",
}  # fmt: skip
"""Values of the example that are no defaults: required ones, and those that default to nothing."""


def leaves(model: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    """Return every value of the configuration with its default."""
    found: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found |= leaves(kind, f"{prefix}{name}.")
        else:
            found[prefix + name] = field.default
    return found


def documented() -> dict[str, Any]:
    text = DOCS.read_text(encoding="utf-8")
    return tomllib.loads(text.split("```toml\n")[1].split("```")[0])


def flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in table.items():
        nested = isinstance(value, dict)
        found |= flat(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return found


def test_everything_is_documented_with_its_default() -> None:
    written, real = flat(documented()), leaves(FitConfig)
    assert set(written) == set(real)
    for path in set(real) - NO_FIXED_DEFAULT:
        default = list(real[path]) if isinstance(real[path], tuple) else real[path]
        assert written[path] == default, path


def test_the_documented_tables_hold_every_value() -> None:
    for name, entry in (("sources", documented()["sources"][0]), ("sets", documented()["evaluate"]["sets"][0])):
        model = {"sources": FitConfig.model_fields["sources"], "sets": None}[name]
        kind = model.annotation.__args__[0] if model else _set_model()
        assert set(entry) == set(kind.model_fields)


def _set_model() -> Any:
    evaluate = FitConfig.model_fields["evaluate"].annotation
    assert evaluate is not None
    return evaluate.model_fields["sets"].annotation.__args__[0]


def test_the_example_is_a_configuration() -> None:
    content = documented()
    content["codebook"]["name"] = "my-region"
    assert make_config(content).cluster.k == 1024


def test_every_option_sets_a_value_that_exists() -> None:
    assert {path for _, path, _, _ in cli._OPTIONS} <= set(leaves(FitConfig))


def test_paths_start_at_the_files_folder(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "fit.toml").write_text(
        'out = "o"\nwork = "/elsewhere"\n[images]\nfolder = "i"\n[encoder]\nmodel = "model"\n'
        '[codebook]\nname = "n"\ncard = "c.md"\n[[evaluate.sets]]\nimages = "v"\nmasks = "m"\n'
    )
    config = make_config(read_config(tmp_path / "fit.toml"))
    assert config.out == tmp_path / "o"
    assert config.work == Path("/elsewhere")
    assert config.images.folder == tmp_path / "i"
    assert config.encoder.model == str(tmp_path / "model")
    assert config.codebook.card == tmp_path / "c.md"
    assert (config.evaluate.sets[0].images, config.evaluate.sets[0].masks) == (tmp_path / "v", tmp_path / "m")


def test_a_hub_id_stays_a_hub_id(tmp_path: Path) -> None:
    (tmp_path / "fit.toml").write_text('[encoder]\nmodel = "facebook/dinov2-base"\n[color]\nanchor = "nano"\n')
    assert read_config(tmp_path / "fit.toml")["encoder"]["model"] == "facebook/dinov2-base"
    assert read_config(tmp_path / "fit.toml")["color"]["anchor"] == "nano"
    (tmp_path / "nano").mkdir()  # a directory of that name beside the file goes first
    assert read_config(tmp_path / "fit.toml")["color"]["anchor"] == str(tmp_path / "nano")


def test_options_go_before_the_file(tmp_path: Path) -> None:
    (tmp_path / "fit.toml").write_text(
        'out = "o"\n[images]\nfolder = "i"\nexclude = ["a"]\n[encoder]\nmodel = "m"\n[codebook]\nname = "n"\n'
    )
    options: dict[str, Any] = {cli._parameter(path): None for _, path, _, _ in cli._OPTIONS}
    options |= {"cluster_k": 7, "images_exclude": ("b", "c"), "encoder_embed": False, "seed": 0}
    config = cli.make_fit(tmp_path / "fit.toml", options, False).config
    assert (config.cluster.k, config.images.exclude, config.encoder.embed) == (7, ("b", "c"), False)
    assert config.codebook.name == "n"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": -1}, "seed = -1"),
        ({"windows": {"margin_patches": 20}}, "margin_patches 20 leaves nothing of window_patches 32"),
        ({"cluster": {"metric": "hamming"}}, "cluster.metric = 'hamming'"),
        ({"sample": {"per_image": 0}}, "sample.per_image = 0"),
        ({"encoder": {"model": ""}}, "encoder.model = ''"),
    ],
)
def test_wrong_values_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match="the configuration is not usable") as caught:
        make_config(REQUIRED | change)
    assert message in str(caught.value)


def test_the_embedded_codebook_is_what_its_configuration_describes() -> None:
    config = make_config(read_config(Path(__file__).parents[1] / "nano.toml"))
    codebook = find_codebook("nano", Path())
    manifest = codebook.manifest
    assert config.windows.preprocess == manifest.preprocess
    assert (config.cluster.k, config.cluster.metric) == (len(codebook), manifest.assignment.metric)
    for key in ("name", "version", "title", "licence", "attribution"):
        assert getattr(config.codebook, key) == getattr(manifest, key)
    assert codebook.exemplars is not None
    assert {"water", "dry grass"} <= set(codebook.classes(24).names)

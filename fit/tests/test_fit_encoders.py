"""Encoders of a fit: exported once, copied, named by hub id, or refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hub_standin import COMMIT, serve_stand_in

from geocentroids_fit.config import EncoderConfig
from geocentroids_fit.encoders import describe_encoder, load_described
from geocentroids_tiler.codebook import ENCODER_FILE, PreprocessSection, file_sha256
from geocentroids_tiler.errors import EncoderError, InputError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

PRE = PreprocessSection(gsd_m=0.25, window_patches=8, margin_patches=1, stride_patches=3)


def tokens_of(config: EncoderConfig, folder: Path) -> np.ndarray:
    encoder = load_described(describe_encoder(config, PRE, folder), PRE, folder, config)
    windows = np.random.default_rng(0).integers(0, 255, (2, 112, 112, 3), np.uint8)
    return np.stack([encoder.fetch(handle) for handle in encoder.encode(windows)])


def test_a_local_checkpoint_is_exported_once(encoder_dir: Path, tmp_path: Path) -> None:
    config = EncoderConfig(model=str(encoder_dir))
    first = describe_encoder(config, PRE, tmp_path)
    assert first.source == ENCODER_FILE
    assert (first.dim, first.patch_px, first.register_tokens) == (24, 14, 4)
    assert first.sha256 == file_sha256(tmp_path / ENCODER_FILE)
    written = (tmp_path / ENCODER_FILE).stat().st_mtime_ns
    assert describe_encoder(config, PRE, tmp_path) == first
    assert (tmp_path / ENCODER_FILE).stat().st_mtime_ns == written


@pytest.mark.parametrize("change", ["window", "file", "weights"])
def test_it_is_exported_again_when_something_changed(encoder_dir: Path, tmp_path: Path, change: str) -> None:
    model, preprocess = tmp_path / "model", PRE
    shutil.copytree(encoder_dir, model)
    config = EncoderConfig(model=str(model))
    first = describe_encoder(config, PRE, tmp_path)
    if change == "window":
        preprocess = PRE.model_copy(update={"window_patches": 11})
    elif change == "file":
        (tmp_path / ENCODER_FILE).write_bytes(b"broken")
    else:
        changed = transformers.Dinov2WithRegistersModel.from_pretrained(model)
        changed.layernorm.bias.data += 1
        changed.save_pretrained(model)
    again = describe_encoder(config, preprocess, tmp_path)
    assert again.sha256 == file_sha256(tmp_path / ENCODER_FILE)
    assert (again.sha256 == first.sha256) == (change == "file")


def test_embedded_or_not_tokens_are_the_same(encoder_dir: Path, tmp_path: Path) -> None:
    embedded = tokens_of(EncoderConfig(model=str(encoder_dir)), tmp_path / "1")
    named = EncoderConfig(model=str(encoder_dir), embed=False)
    assert describe_encoder(named, PRE, tmp_path / "2").source == str(encoder_dir)
    # Weights of an export are rounded to fp16.
    assert tokens_of(named, tmp_path / "2") == pytest.approx(embedded, abs=0.02)
    assert not (tmp_path / "2" / ENCODER_FILE).exists()


def test_an_onnx_file_is_copied(encoder_dir: Path, tmp_path: Path) -> None:
    described = describe_encoder(EncoderConfig(model=str(encoder_dir)), PRE, tmp_path / "1")
    config = EncoderConfig(model=str(tmp_path / "1" / ENCODER_FILE))
    assert describe_encoder(config, PRE, tmp_path / "2").model_dump() == described.model_dump()
    assert (tokens_of(config, tmp_path / "2") == tokens_of(EncoderConfig(model=str(encoder_dir)), tmp_path / "1")).all()
    with pytest.raises(InputError, match="takes windows of 8 patches, not 16"):
        describe_encoder(config, PRE.model_copy(update={"window_patches": 16}), tmp_path / "3")


HUB_RUN = """
import sys
from pathlib import Path
import numpy as np
from geocentroids_fit.config import EncoderConfig
from geocentroids_fit.encoders import describe_encoder, load_described
from test_fit_encoders import PRE, tokens_of
config = EncoderConfig(model="owner/small")
print(describe_encoder(config, PRE, Path(sys.argv[1])).model_dump_json())
np.save(sys.argv[2], tokens_of(config, Path(sys.argv[1])))
"""


def test_a_model_of_the_hub_is_named_by_its_commit(encoder_dir: Path, tmp_path: Path) -> None:
    with serve_stand_in() as stand_in:
        stand_in.repos["owner/small"] = {path.name: path.read_bytes() for path in encoder_dir.iterdir()}
        here = Path(__file__).parent
        environment = {
            **os.environ,
            "HF_ENDPOINT": stand_in.url,
            "HF_HOME": str(tmp_path / "cache"),
            "PYTHONPATH": os.pathsep.join(
                map(str, [here, here.parent, here.parent.parent, here.parent.parent / "tests"])
            ),
        }
        command = [sys.executable, "-c", HUB_RUN, str(tmp_path / "encoder"), str(tmp_path / "tokens.npy")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    described = json.loads(done.stdout.splitlines()[0])
    assert (described["source"], described["revision"]) == ("owner/small", COMMIT)
    assert described["sha256"] == file_sha256(encoder_dir / "model.safetensors")
    assert not (tmp_path / "encoder" / ENCODER_FILE).exists()
    local = tokens_of(EncoderConfig(model=str(encoder_dir), embed=False), tmp_path / "local")
    assert (np.load(tmp_path / "tokens.npy") == local).all()


def test_what_cannot_be_had_is_one_sentence(encoder_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.onnx' is missing"):
        describe_encoder(EncoderConfig(model="absent.onnx"), PRE, tmp_path)
    with pytest.raises(EncoderError, match="neither a directory nor a hub id"):
        describe_encoder(EncoderConfig(model="a/b/c"), PRE, tmp_path)
    with pytest.raises(InputError, match="over 4096 px"):
        describe_encoder(
            EncoderConfig(model=str(encoder_dir)), PRE.model_copy(update={"window_patches": 300}), tmp_path
        )

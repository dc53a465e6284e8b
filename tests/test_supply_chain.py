"""Locked dependencies agree with what is declared, and no code reads or writes pickles or runs what it was given."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
SOURCES = ("geocentroids_tiler", "fit/geocentroids_fit", "benchmarks", "hatch_build.py")

# ---- locks ----------------------------------------------------------------------------------------------------------

LOCKS = ("cpu", "gpu", "build")
NOT_IN_THE_IMAGE = {"openvino", "ray", "torch"}
"""``ray``: nodes of a cluster need the same Ray as its head, which is whatever runs there."""
MACHINES = ("x86_64", "aarch64")


def lines_of(text: str) -> list[tuple[Requirement, list[str]]]:
    """Return the requirements of a lock and the hashes of each."""
    joined = re.sub(r"\\\n\s*", " ", text)
    found = []
    for line in joined.splitlines():
        if line.strip() and not line.startswith("#"):
            requirement, *hashes = re.split(r"\s--hash=", line)
            found.append((Requirement(requirement), [item.strip() for item in hashes]))
    return found


def read_lock(name: str) -> str:
    return (ROOT / "locks" / f"{name}.txt").read_text(encoding="utf-8")


def problems_of_lock(text: str) -> list[str]:
    found = []
    for requirement, hashes in lines_of(text):
        if not re.fullmatch(r"==[^*,]+", str(requirement.specifier)) or requirement.url:
            found.append(f"{requirement} is not one version")
        if not hashes or not all(re.fullmatch(r"sha256:[0-9a-f]{64}", item) for item in hashes):
            found.append(f"{requirement} has the hashes {hashes}")
    if re.search(r"://|--(?!hash=)|^-|/\S+/", text, re.MULTILINE):
        found.append("an address, a path or an option beside hashes")
    return found


def in_image(requirement: Requirement, machine: str) -> bool:
    """Return whether a requirement applies to the image's Python on Linux."""
    environment = {key: str(value) for key, value in default_environment().items()} | {
        "python_version": "3.13",
        "python_full_version": "3.13.0",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "os_name": "posix",
        "platform_machine": machine,
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
        "extra": "",
    }
    return requirement.marker is None or requirement.marker.evaluate(environment)


def locked(name: str, machine: str) -> dict[str, str]:
    """Return version by name of what a lock installs on a machine."""
    return {
        canonicalize_name(requirement.name): str(requirement.specifier).removeprefix("==")
        for requirement, _ in lines_of(read_lock(name))
        if in_image(requirement, machine)
    }


def makefile_extras() -> list[str]:
    match = re.search(r"^IMAGE_EXTRAS := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert match is not None
    return match[1].split()


def declared(lock: str) -> list[Requirement]:
    """Return the direct dependencies that a lock has to hold."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    if lock == "build":
        return [Requirement(text) for text in project["build-system"]["requires"]]
    extras = project["project"]["optional-dependencies"]
    groups = [project["project"]["dependencies"], *(extras[name] for name in (lock, *makefile_extras()))]
    return [Requirement(text) for group in groups for text in group]


def test_makefile_and_dockerfile_name_the_same() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert "store" in makefile_extras()
    assert set(re.findall(r"FROM python:(\d+\.\d+)", dockerfile)) == {"3.13"}
    assert "IMAGE_PYTHON := 3.13" in (ROOT / "Makefile").read_text()


def test_every_extra_is_in_the_image_or_left_out_on_purpose() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    undecided = set(extras) - {"cpu", "gpu"} - set(makefile_extras()) - NOT_IN_THE_IMAGE
    assert undecided == set(), "add it to IMAGE_EXTRAS in the Makefile and run make locks, or to NOT_IN_THE_IMAGE"


def test_dockerfile_installs_by_hash_only() -> None:
    commands = re.findall(r"pip (?:install|wheel)[^&\n]*", (ROOT / "Dockerfile").read_text())
    assert len(commands) == 4
    for command in commands:
        assert "--no-deps" in command
        from_lock = {"--require-hashes", "--only-binary"} <= set(command.split())
        assert from_lock != ("--no-index" in command), command


@pytest.mark.parametrize("name", LOCKS)
def test_every_file_has_its_hash(name: str) -> None:
    assert len(lines_of(read_lock(name))) > 3
    assert problems_of_lock(read_lock(name)) == []


@pytest.mark.parametrize(
    "text",
    [
        "a==1",
        "a==1 --hash=md5:00",
        "a==1 \\\n    --hash=sha256:00",
        "a>=1 --hash=sha256:" + "0" * 64,
        "a==1.* --hash=sha256:" + "0" * 64,
        "a @ https://host/a.whl --hash=sha256:" + "0" * 64,
        "# https://host/simple",
        "a==1 --hash=sha256:" + "0" * 64 + "\nb==1",
        "--no-binary a\na==1 --hash=sha256:" + "0" * 64,
    ],
)
def test_a_lock_with_a_gap_is_noticed(text: str) -> None:
    try:
        assert problems_of_lock(text)
    except ValueError:  # an option is no requirement
        assert text.startswith("--")
    assert problems_of_lock("a==1 \\\n    --hash=sha256:" + "0" * 64) == []


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("name", LOCKS)
def test_direct_dependencies_are_locked(name: str, machine: str) -> None:
    versions = locked(name, machine)
    wanted = [requirement for requirement in declared(name) if in_image(requirement, machine)]
    assert wanted
    missing = [r for r in wanted if (v := versions.get(canonicalize_name(r.name))) is None or v not in r.specifier]
    assert missing == [], "make locks writes them anew"


@pytest.mark.parametrize("name", LOCKS)
def test_locks_agree_with_the_constraints(name: str) -> None:
    text = (ROOT / "constraints.txt").read_text()
    constraints = [Requirement(line) for line in text.splitlines() if line and not line.startswith("#")]
    versions = locked(name, "x86_64")
    both = [r for r in constraints if in_image(r, "x86_64") and canonicalize_name(r.name) in versions]
    assert len(both) > 20 or name == "build"
    assert [r for r in both if versions[canonicalize_name(r.name)] not in r.specifier] == []


# ---- no pickle ------------------------------------------------------------------------------------------------------

PICKLES = frozenset(
    {"pickle", "cPickle", "_pickle", "pickletools", "dill", "joblib", "cloudpickle", "shelve", "marshal", "jsonpickle"}
)
RUNS_TEXT = frozenset({"eval", "exec", "compile", "__import__"})
NEVER = {
    "torch.load": "reads pickles",
    "torch.save": "writes pickles",
    "torch.hub": "runs a repository's code",
    "torch.jit.load": "runs a file's code",
    "yaml.load": "makes any object",
    "yaml.load_all": "makes any object",
    "yaml.unsafe_load": "makes any object",
    "yaml.unsafe_load_all": "makes any object",
    "yaml.full_load": "makes any object",
    "yaml.full_load_all": "makes any object",
    "pandas.read_pickle": "reads pickles",
    "onnx.load": "follows external data",
    "onnx.load_model": "follows external data",
    "onnx.load_external_data_for_model": "follows external data",
}
NUMPY_LOAD = frozenset({"numpy.load", "numpy.lib.npyio.load", "numpy.lib.npyio.NpzFile", "numpy.lib.format.read_array"})


def problems_of_code(text: str) -> list[str]:
    """Return what a module does that it must not, each with its line."""
    tree = ast.parse(text)
    names = dict(_imports(tree))
    calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    found = []
    for node in ast.walk(tree):
        for problem in _problems(node, names, calls):
            found.append(f"line {node.lineno}: {problem}")  # type: ignore[attr-defined]
    return found


def _imports(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Yield what a name in the module stands for."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for item in node.names:
                yield (item.asname, item.name) if item.asname else (item.name.split(".")[0],) * 2
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for item in node.names:
                yield item.asname or item.name, f"{node.module}.{item.name}"


def _dotted(node: ast.AST, names: dict[str, str]) -> str:
    """Return the full name of what an expression stands for, or an empty text."""
    if isinstance(node, ast.Name):
        return names.get(node.id, "")
    if isinstance(node, ast.Attribute) and (left := _dotted(node.value, names)):
        return f"{left}.{node.attr}"
    return ""


def _problems(node: ast.AST, names: dict[str, str], calls: dict[int, ast.Call]) -> Iterator[str]:
    if isinstance(node, ast.Import | ast.ImportFrom):
        modules = [item.name for item in node.names]
        if isinstance(node, ast.ImportFrom):
            modules = [node.module or "", *(f"{node.module}.{item.name}" for item in node.names)]
        yield from (f"imports {module}" for module in modules if module.split(".")[0] in PICKLES)
        yield from (f"imports {module}, which {NEVER[module]}" for module in modules if module in NEVER)
    if isinstance(node, ast.Name) and node.id in RUNS_TEXT:
        yield f"uses {node.id}"
    if isinstance(node, ast.Attribute | ast.Name) and (name := _dotted(node, names)):
        call = calls.get(id(node))
        if name in NEVER:
            yield f"uses {name}, which {NEVER[name]}"
        if name in NUMPY_LOAD and (call is None or not _says(call, "allow_pickle", False)):
            yield f"uses {name} without allow_pickle=False"
        if name == "importlib.import_module" and call and call.args and isinstance(call.args[0], ast.Constant):
            module = str(call.args[0].value)
            if module.split(".")[0] in PICKLES:
                yield f"imports {module}"
    if isinstance(node, ast.Attribute) and node.attr == "from_pretrained":
        call = calls.get(id(node))
        if call is None or not _says(call, "use_safetensors", True) or any(k.arg is None for k in call.keywords):
            yield "uses from_pretrained without a plain use_safetensors=True"
    if isinstance(node, ast.Call):
        for keyword in ("trust_remote_code", "allow_pickle"):
            if any(item.arg == keyword for item in node.keywords) and not _says(node, keyword, False):
                yield f"passes {keyword} that is not plainly False"


def _says(call: ast.Call, keyword: str, value: bool) -> bool:
    return any(
        item.arg == keyword and isinstance(item.value, ast.Constant) and item.value.value is value
        for item in call.keywords
    )


def modules() -> list[Path]:
    return sorted(
        file
        for source in SOURCES
        for file in ((ROOT / source).rglob("*.py") if (ROOT / source).is_dir() else [ROOT / source])
    )


def test_no_module_reads_pickles_or_runs_what_it_was_given() -> None:
    files = modules()
    assert len(files) > 100
    found = {str(file.relative_to(ROOT)): problems_of_code(file.read_text(encoding="utf-8")) for file in files}
    assert {name: problems for name, problems in found.items() if problems} == {}


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "import dill as d",
        "import joblib.memory",
        "from cloudpickle import loads",
        "def f():\n    import shelve",
        "from marshal import *",
        "import importlib\nimportlib.import_module('pickle')",
        "from importlib import import_module as load\nload('dill')",
        "__import__(name)",
        "import numpy as np\nnp.load(path)",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "import numpy as np\nnp.load(path, allow_pickle=flag)",
        "import numpy as np\nread = np.load",
        "from numpy import load as read\nread(path)",
        "import numpy.lib.npyio\nnumpy.lib.npyio.load(path)",
        "from numpy.lib import npyio\nnpyio.NpzFile(path)",
        "import numpy as np\nnp.save(path, array, allow_pickle=True)",
        "import torch\ntorch.load(path)",
        "import torch\ntorch.load(path, weights_only=False)",
        "import torch as t\nread = t.load",
        "from torch import load",
        "import torch\ntorch.save(model, path)",
        "import torch\ntorch.hub.load('a/b', 'c')",
        "import yaml\nyaml.load(text, Loader=yaml.Loader)",
        "from yaml import unsafe_load",
        "import pandas\npandas.read_pickle(path)",
        "import onnx\nonnx.load(path)",
        "eval(text)",
        "run = exec",
        "exec(compile(text, 'x', 'exec'))",
        "from transformers import AutoModel\nAutoModel.from_pretrained(path)",
        "from transformers import AutoModel\nAutoModel.from_pretrained(path, use_safetensors=False)",
        "from transformers import AutoModel\nAutoModel.from_pretrained(path, use_safetensors=True, **more)",
        "AutoModel.from_pretrained(path, use_safetensors=True, trust_remote_code=True)",
        "AutoModel.from_pretrained(path, use_safetensors=True, trust_remote_code=x)",
        "from transformers import AutoModel\nmake = AutoModel.from_pretrained",
        "AutoModel.from_config(config, trust_remote_code=True)",
    ],
)
def test_what_must_not_be_is_noticed(text: str) -> None:
    assert problems_of_code(text)


@pytest.mark.parametrize(
    "text",
    [
        "import numpy as np\nnp.load(path, mmap_mode='r', allow_pickle=False)",
        "import numpy as np\nnp.save(path, array)",
        "import json\njson.load(file)",
        "from safetensors.numpy import load\nload(content)",
        "import re\nre.compile('x')\nmodel.eval()",
        "import yaml\nyaml.safe_load(text)",
        "import onnx\nonnx.load_model_from_string(content)",
        "import multiprocessing",
        "AutoModel.from_pretrained(path, use_safetensors=True, trust_remote_code=False)",
    ],
)
def test_what_may_be_is_let_through(text: str) -> None:
    assert problems_of_code(text) == []

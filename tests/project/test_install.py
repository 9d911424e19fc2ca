"""Installing into environments of every kind. The extension is cut down to its bindings, which build in seconds."""

import importlib
import os
import shutil
import subprocess
import sys
import venv
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastkd import _extension

ROOT = Path(__file__).parents[2]
BUILD_TOOLS = ("setuptools", "_distutils_hack", "ninja", "pkg_resources")
# In place of csrc/moments_autograd.cpp, whose headers take longest: finds torch's headers and libraries as it does.
PROBE = """#include <c10/core/DeviceType.h>

std::string fastkd_probe() { return c10::DeviceTypeName(c10::DeviceType::CPU); }
"""
STATE = "from fastkd import _extension as e; print(e.HAS_NATIVE, e.WHY_NOT or e.WHY_NOT_RECORDER, sep='|')"


class Environment:
    """A new environment whose site-packages links to what the running one has."""

    def __init__(self, folder: Path, has_torch: bool = True):
        venv.create(folder, symlinks=True)
        self.python = folder / "bin" / "python"
        self.packages = next(folder.glob("lib/python*/site-packages"))
        for package in Path(torch.__file__).parents[1].iterdir():
            ours = "fastkd" in package.name or package.name.startswith("__") or package.suffix == ".pth"
            if not ours and (has_torch or package.name.startswith(BUILD_TOOLS)):
                (self.packages / package.name).symlink_to(package)

    def install(self, source: Path, *options: str, **environ: str) -> subprocess.CompletedProcess:
        # A terminal would take the build's own line away from the captured output.
        command = [sys.executable, "-m", "pip", "--python", self.python, "install", "-v", "--no-deps", *options]
        unset = ("FASTKD_BUILD_EXT", "FORCE_CUDA", "TORCH_CUDA_ARCH_LIST", "PYTHONPATH", "CXX")
        clean = {name: value for name, value in os.environ.items() if name not in unset}
        return subprocess.run(
            [*command, source],
            env=clean | {"FORCE_ONLY_CPU": "1"} | environ,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def state(self, folder: Path) -> tuple[bool, str]:
        """(HAS_NATIVE, WHY_NOT or WHY_NOT_RECORDER) as an import from elsewhere sees them."""
        run = subprocess.run([self.python, "-c", STATE], cwd=folder, text=True, capture_output=True, check=True)
        has_native, _, why_not = run.stdout.strip().partition("|")
        return has_native == "True", why_not


@pytest.fixture
def source(tmp_path):
    """The tree as a clone has it, with no native operators."""
    folder = tmp_path / "source"
    folder.mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    built = shutil.ignore_patterns("*.so", "_built_for.py", "__pycache__", "cpu", "cuda")
    for name in ("csrc", "fastkd", "kernels"):
        shutil.copytree(ROOT / name, folder / name, ignore=built)
    (folder / "csrc" / "moments_autograd.cpp").write_text(PROBE)
    return folder


def requires_build_tools():
    if int(version("setuptools").split(".")[0]) < 77:
        pytest.skip(f"building without isolation needs setuptools >= 77, got {version('setuptools')}")


@pytest.mark.exhaustive  # `make install` builds so
@pytest.mark.install
@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        pytest.param((), id="isolated"),
        pytest.param(("--no-build-isolation", "--config-settings", "editable_mode=strict", "-e"), id="strict editable"),
    ],
)
def test_builds_against_the_torch_that_is_there(options, source, tmp_path):
    if options:
        requires_build_tools()
    environment = Environment(tmp_path / "env")
    run = environment.install(source, *options, FASTKD_BUILD_EXT="1")
    assert run.returncode == 0, run.stdout
    assert environment.state(tmp_path) == (True, "")


@pytest.mark.install
@pytest.mark.slow
@pytest.mark.parametrize(
    ("has_torch", "environ", "missing"),
    [
        (False, {}, "no torch was found at build time (install torch, then: pip install"),
        (True, {"CXX": "/nonexistent"}, "no working C++ compiler with Python's headers (install g++"),
        # .ci/run installs so.
        pytest.param(True, {"FASTKD_BUILD_EXT": "0"}, "left out by FASTKD_BUILD_EXT=0", marks=pytest.mark.exhaustive),
    ],
    ids=["no torch", "no compiler", "not wanted"],
)
def test_installs_as_pure_python_and_says_why(has_torch, environ, missing, source, tmp_path):
    requires_build_tools()
    environment = Environment(tmp_path / "env", has_torch)
    run = environment.install(source, "--no-build-isolation", **environ)
    assert run.returncode == 0, run.stdout
    installed = environment.packages / "fastkd"
    assert missing in (installed / "_built_for.py").read_text().replace('\\"', '"')
    assert not list(installed.glob("_C.*"))
    said = [line for line in run.stdout.splitlines() if "installed without the compiled extension" in line]
    assert len(said) == (0 if "FASTKD_BUILD_EXT" in environ else 1)
    assert all(missing in line for line in said)
    if has_torch:
        has_native, why_not = environment.state(tmp_path)
        assert not has_native
        assert missing in why_not


@pytest.mark.exhaustive
@pytest.mark.install
@pytest.mark.slow
def test_a_toolkit_that_cannot_build_costs_cuda_alone(source, tmp_path):
    requires_build_tools()
    toolkit = tmp_path / "cuda"
    (toolkit / "bin").mkdir(parents=True)
    (toolkit / "include").mkdir()
    (toolkit / "include" / "cuda_runtime.h").touch()
    nvcc = toolkit / "bin" / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 9.2, V9.2.148'\n")
    nvcc.chmod(0o755)
    environment = Environment(tmp_path / "env")
    environ = {"CUDA_HOME": str(toolkit), "FORCE_CUDA": "1", "FORCE_ONLY_CPU": "0"}
    options = ("--no-build-isolation", "--config-settings", "editable_mode=strict", "-e")
    run = environment.install(source, *options, **environ)
    assert run.returncode == 0, run.stdout
    said = [line for line in run.stdout.splitlines() if "the CUDA operators are left out" in line]
    assert len(said) == 1
    assert "compilation failed" in said[0]
    assert environment.state(tmp_path) == (True, "")


@pytest.mark.exhaustive
@pytest.mark.install
@pytest.mark.slow
def test_a_failed_compilation_is_fatal_only_on_request(source, tmp_path):
    requires_build_tools()
    (source / "csrc" / "bindings.cpp").write_text("#error planted\n")
    environment = Environment(tmp_path / "env")
    run = environment.install(source, "--no-build-isolation")
    assert run.returncode == 0, run.stdout
    has_native, why_not = environment.state(tmp_path)
    assert not has_native
    assert why_not.startswith("compilation failed")
    assert environment.install(source, "--no-build-isolation", FASTKD_BUILD_EXT="1").returncode != 0


@pytest.mark.install
@pytest.mark.slow
def test_a_required_extension_without_compiler_is_fatal(source, tmp_path):
    requires_build_tools()
    environment = Environment(tmp_path / "env")
    run = environment.install(source, "--no-build-isolation", FASTKD_BUILD_EXT="1", CXX="/nonexistent")
    assert run.returncode != 0
    assert "FASTKD_BUILD_EXT=1, and no working C++ compiler" in run.stdout


def test_the_recorder_of_another_torch_is_not_loaded(monkeypatch):
    monkeypatch.setattr(torch.ops, "load_library", lambda path: pytest.fail(f"loaded {path}"))
    monkeypatch.setattr(_extension, "WHY_NOT", "")
    why_not = _extension._load_recorder(SimpleNamespace(TORCH_VERSION="1.0.0+cu92"))
    assert why_not == f"built for torch 1.0.0+cu92, and torch {torch.__version__} is running"


BUILT = SimpleNamespace(HAS_EXT=True, INTERFACE="stable", TORCH_VERSION="2.10.0")


def test_a_library_that_does_not_load_is_done_without(monkeypatch):
    def broken(name):
        raise ImportError("undefined symbol: _Z3foo")

    monkeypatch.setattr(_extension.importlib, "import_module", broken)
    with pytest.warns(UserWarning, match="undefined symbol: _Z3foo"):
        assert _extension._load(BUILT)


def test_a_library_of_an_older_fastkd_is_not_loaded(monkeypatch):
    """Its registration would end the process where a schema has changed."""
    monkeypatch.setattr(_extension.importlib, "import_module", lambda name: pytest.fail(f"loaded {name}"))
    with pytest.warns(UserWarning, match="pip install --force-reinstall") as warned:
        why_not = _extension._load(SimpleNamespace(HAS_EXT=True, TORCH_VERSION=str(torch.__version__)))
    assert len(warned) == 1
    assert "was built by an older version of fastkd" in why_not


@pytest.mark.skipif(not _extension.HAS_NATIVE, reason=f"no compiled extension: {_extension.WHY_NOT}")
@pytest.mark.parametrize("change", ["an argument more", "another type", "a result less", "gone"])
def test_a_library_of_other_schemas_is_not_used(change, monkeypatch):
    types = _extension.signatures()
    arguments, _, results = types["softmax_kl"].partition(" -> ")
    types["softmax_kl"] = {
        "an argument more": f"{arguments} bool -> {results}",
        "another type": f"{arguments.replace('float', 'int', 1)} -> {results}",
        "a result less": f"{arguments} -> {results.split()[0]}",
    }.get(change, "")
    if change == "gone":
        del types["softmax_kl"]
    monkeypatch.setattr(_extension, "signatures", lambda: types)
    with pytest.warns(UserWarning, match="from other sources: softmax_kl takes Tensor Tensor"):
        assert _extension._load(BUILT)


@pytest.mark.skipif(not _extension.HAS_NATIVE, reason=f"no compiled extension: {_extension.WHY_NOT}")
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_the_operators_need_no_symbol_of_one_torch():
    """Of C++, only weak symbols, which may be missing; all others are of the stable C interface."""
    library = importlib.import_module("fastkd._C").__file__
    symbols = subprocess.run(["nm", "-DC", "--undefined-only", library], capture_output=True, text=True, check=True)
    lines = [line.split(maxsplit=1) for line in symbols.stdout.splitlines()]
    needed = {name for kind, name in lines if kind == "U"}
    assert {"torch_parallel_for", "torch_library_impl"} <= {name.split("@")[0] for name in needed}
    assert not {name for name in needed if name.startswith(("at::", "c10::", "torch::"))}
    assert {"c10::profiledCPUMemoryReporter()"} <= {name for kind, name in lines if kind in "vw"}


def test_a_tree_that_was_never_built_says_so():
    assert "pip install -e ." in _extension._load(None)

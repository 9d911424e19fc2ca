"""The CUDA kernels' own sources, compiled for a CPU and held to every native test of their stem: no GPU is needed."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
STEMS = sorted(path.stem for path in (ROOT / "csrc/cuda").glob("*.cu"))
LAUNCH = re.compile(r"(\w+(?:<[\w, <>]+>)?)<<<(.+?)>>>\(", re.DOTALL)

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
    pytest.mark.skipif(sys.platform != "linux", reason="coroutines are those of Linux"),
]


def for_cpu(source: str) -> str:
    """CUDA C++ as C++ for cuda_on_cpu.h, registered as the native implementation of CPUs."""
    source = re.sub(r"#include <c10/cuda/.*>\n", "", source)
    source = LAUNCH.sub(r"emulation::launch(\2, \1)(", source)
    return source.replace("TORCH_LIBRARY_IMPL(fastkd, CUDA, m)", "TORCH_LIBRARY_IMPL(fastkd, CPU, m)")


def compile_extension(tree: Path, stem: str) -> None:
    """A copy of the package whose extension holds the stem's CUDA operators alone."""
    from torch.utils.cpp_extension import include_paths, library_paths

    shutil.copytree(
        ROOT / "fastkd", tree / "fastkd", ignore=shutil.ignore_patterns("_C*", "_built_for*", "__pycache__")
    )
    shutil.copytree(ROOT / "csrc", tree / "csrc")
    cuda = tree / "csrc/cuda"
    (cuda / "common.cuh").write_text(for_cpu((cuda / "common.cuh").read_text()))
    (cuda / f"{stem}.cpp").write_text(for_cpu((cuda / f"{stem}.cu").read_text()))
    sources = [cuda / f"{stem}.cpp", tree / "csrc/bindings.cpp", tree / "csrc/autograd.cpp"]
    includes = [f"-I{tree}/csrc", f"-I{sysconfig.get_path('include')}", *(f"-isystem{x}" for x in include_paths())]
    defines = ["-DTORCH_API_INCLUDE_EXTENSION_H", "-DTORCH_EXTENSION_NAME=_C"]
    defines.append(f"-DFASTKD_TORCH_VERSION={torch.__version__}")
    # A vector that is read where it is not aligned, which a GPU refuses and a CPU does not, ends the process.
    checks = ["-fsanitize=alignment,bounds,shift,signed-integer-overflow", "-fsanitize-undefined-trap-on-error"]
    common = ["g++", "-O1", "-std=c++20", "-fPIC", "-include", str(ROOT / "tests/cuda_on_cpu.h")]

    def run(source: Path) -> Path:
        own = checks if source.parent == cuda else []
        output = source.with_suffix(".o")
        subprocess.run([*common, *own, *defines, *includes, "-c", str(source), "-o", str(output)], check=True)
        return output

    with ThreadPoolExecutor() as pool:
        objects = list(pool.map(run, sources))
    libraries = [*(f"-L{x}" for x in library_paths()), "-lc10", "-ltorch", "-ltorch_cpu", "-ltorch_python"]
    extension = tree / f"fastkd/_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run(["g++", "-shared", *checks, *map(str, objects), *libraries, "-o", str(extension)], check=True)
    record = {"TORCH_VERSION": str(torch.__version__), "HAS_EXT": True, "HAS_CUDA": False, "WHY_NOT_CUDA": "emulated"}
    (tree / "fastkd/_built_for.py").write_text("".join(f"{name} = {value!r}\n" for name, value in record.items()))


@pytest.mark.parametrize("stem", STEMS)
def test_native_tests_hold(stem: str, tmp_path: Path) -> None:
    source = (ROOT / f"csrc/cuda/{stem}.cu").read_text()
    assert len(LAUNCH.findall(source)) == source.count("<<<") > 0
    compile_extension(tmp_path, stem)
    for name in ("pyproject.toml", "tests"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    run = "import sys, fastkd._C, pytest; print(fastkd._C.__file__); sys.exit(pytest.main(sys.argv[1:]))"
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", "native"]
    command = [sys.executable, "-c", run, *options, f"tests/test_{stem}.py"]
    # No GPU: its tensors would go to operators that are not there.
    path = os.pathsep.join(filter(None, (str(tmp_path), os.getenv("PYTHONPATH"))))
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False, timeout=1500)
    assert result.stdout.startswith(str(tmp_path)), result.stderr
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed is not None and int(passed[1]) > 50 and "failed" not in result.stdout

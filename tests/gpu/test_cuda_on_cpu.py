"""The CUDA kernels' own sources, compiled for a CPU and held to the native tests of their stem: no GPU is needed."""

import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from benchmarks.cases.moments import resnet50_shapes

ROOT = Path(__file__).parents[2]
KERNELS = sorted((ROOT / "csrc/cuda").glob("*.cu"))
SOURCES = [*KERNELS, ROOT / "csrc/bindings.cpp"]
EMULATION = ROOT / "tests/_support/cuda_on_cpu.h"
HEADERS = sorted([*(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc/cuda").glob("*.cuh"), EMULATION])
# Objects are named by a digest of what they are made of, so all workers and later runs share them.
BUILT = ROOT / "build/cuda_on_cpu"
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
LAUNCH = re.compile(r"(\w+(?:<[\w, <>]+>)?)\s*<<<(.+?)>>>\(", re.DOTALL)
READ = re.compile(r"(?<=return \*)reinterpret_cast<const (.+)\*>(?=\()")
CONSTANT = re.compile(r"const __grid_constant__ (\w+) ")  # too large to be copied for each thread
SHARED = re.compile(r"(__shared__ [^;\[]+?(\w+)\[[^;]*;)")
# (files of tests, multiprocessors of the card, seed of the orders of blocks and threads, which tests), in runs of about
# the same length, so that workers share them.
RUNS = {
    "moments": (["moments/test_moments.py"], 3, 1, "native"),
    "prior": (["prior/test_prior.py"], 3, 2, "native"),
    "calls": (
        ["operators/test_layouts.py", "operators/test_values.py", "operators/test_contract.py"],
        132,
        3,
        "not past and not compiles and not named_by and "
        "(native or auto and (moments or bn_stat or batch_norm or prior or variation))",
    ),
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
    pytest.mark.skipif(sys.platform != "linux", reason="coroutines are those of Linux"),
]


def for_cpu(source: str) -> str:
    """CUDA C++ as C++ for cuda_on_cpu.h, registered as the native implementation of CPUs."""
    source = re.sub(r"#include <cuda_.*>\n", "", source)
    source = source.replace("torch::stable::accelerator::DeviceGuard", "emulation::DeviceGuard")
    source = source.replace("aoti_torch_get_current_cuda_stream", "emulated_current_stream")
    source = LAUNCH.sub(r"emulation::launch(\2, \1)(", source)
    source = READ.sub(r"emulation::read<\1>", source)
    source = CONSTANT.sub(r"const \1& ", source)
    source = SHARED.sub(r"\1 emulation::share(\2);", source)
    return source.replace("STABLE_TORCH_LIBRARY_IMPL(fastkd, CUDA, m)", "STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m)")


def compiler() -> list[str]:
    from torch.utils.cpp_extension import include_paths

    includes = [f"-I{sysconfig.get_path('include')}", *(f"-isystem{x}" for x in include_paths())]
    defines = [f"-DFASTKD_TORCH_VERSION={torch.__version__}", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    # Jumps from stack to stack are what coroutines are made of, and what fortified ones refuse.
    return ["g++", "-O1", "-std=c++20", "-fPIC", "-U_FORTIFY_SOURCE", *defines, *includes]


# A vector that is read where it is not aligned, which a GPU refuses and a CPU does not, ends the process.
CHECKS = ["-fsanitize=alignment,bounds,shift,signed-integer-overflow", "-fsanitize-undefined-trap-on-error"]


def build_extension() -> Path:
    """The extension that holds the CUDA operators alone. Call it under the lock of BUILT."""
    from torch.utils.cpp_extension import library_paths

    command = compiler()
    common = [*command, *CHECKS, *(for_cpu(header.read_text()) for header in HEADERS)]

    def built(source: Path) -> Path:
        digest = hashlib.sha256("\0".join([*common, for_cpu(source.read_text())]).encode()).hexdigest()[:16]
        return BUILT / f"{source.stem}-{digest}.o"

    objects = [built(source) for source in SOURCES]
    extension = BUILT / f"_C-{hashlib.sha256(repr(objects).encode()).hexdigest()[:16]}{SUFFIX}"
    if extension.exists():
        return extension
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder, "csrc")
        for path in (*SOURCES, *HEADERS):
            copy = Path(folder, path.relative_to(ROOT).with_suffix(".cpp" if path in KERNELS else path.suffix))
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(for_cpu(path.read_text()))

        def compile_object(source: Path, output: Path) -> None:
            if output.exists():
                return
            copy = Path(folder, source.relative_to(ROOT).with_suffix(".cpp"))
            emulation = str(Path(folder, EMULATION.relative_to(ROOT)))
            options = [*(CHECKS if source in KERNELS else []), f"-I{tree}", "-include", emulation]
            part = Path(folder, output.name)
            subprocess.run([*command, *options, "-c", str(copy), "-o", str(part)], check=True)
            shutil.move(part, output)

        with ThreadPoolExecutor() as pool:
            list(pool.map(compile_object, SOURCES, objects))
    for stale in set(BUILT.glob("*-*")) - set(objects):
        stale.unlink()
    libraries = [*(f"-L{x}" for x in library_paths()), "-lc10", "-ltorch", "-ltorch_cpu"]
    part = BUILT / "linked"
    subprocess.run(["g++", "-shared", *CHECKS, *map(str, objects), *libraries, "-o", str(part)], check=True)
    return part.rename(extension)


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package and its tests whose extension holds the CUDA operators alone."""
    tree = tmp_path_factory.mktemp("cuda_on_cpu")
    ignored = shutil.ignore_patterns("_C*", "_built_for*", "_recorder*", "__pycache__")
    for name in ("fastkd", "tests"):
        shutil.copytree(ROOT / name, tree / name, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", tree)
    record = {"TORCH_VERSION": str(torch.__version__), "HAS_EXT": True, "HAS_CUDA": False, "WHY_NOT_CUDA": "emulated"}
    record["INTERFACE"] = "stable"
    (tree / "fastkd/_built_for.py").write_text("".join(f"{name} = {value!r}\n" for name, value in record.items()))
    BUILT.mkdir(parents=True, exist_ok=True)
    with (BUILT / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one worker compiles, the others wait and copy
        shutil.copy(build_extension(), tree / f"fastkd/_C{SUFFIX}")
    for recorder in (ROOT / "fastkd").glob("_recorder.*"):
        shutil.copy(recorder, tree / "fastkd")  # serves any device
    return tree


def test_every_launch_is_emulated_and_every_stem_tested() -> None:
    for path in KERNELS:
        source = "".join(part.read_text() for part in path.parent.glob(f"{path.stem}*"))
        assert len(LAUNCH.findall(source)) == source.count("<<<") > 0
        assert len(SHARED.findall(source)) == source.count("__shared__") > 0
    assert {path.stem for path in KERNELS} < RUNS.keys()


def run(tree: Path, multiprocessors: int, seed: int, *command: str) -> subprocess.CompletedProcess[str]:
    # No GPU: its tensors would go to operators that are not there.
    path = os.pathsep.join(filter(None, (str(tree), os.getenv("PYTHONPATH"))))
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    env |= {"EMULATED_MULTIPROCESSORS": str(multiprocessors), "EMULATED_SEED": str(seed)}
    return subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, check=False, timeout=1500)


def check_native_tests(tree: Path, files: list[str], multiprocessors: int, seed: int, chosen: str) -> None:
    code = "import sys, fastkd._C, pytest; print(fastkd._C.__file__, flush=True); sys.exit(pytest.main(sys.argv[1:]))"
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not exhaustive", "-k", chosen]
    result = run(tree, multiprocessors, seed, sys.executable, "-c", code, *options, *(f"tests/{f}" for f in files))
    assert result.stdout.startswith(str(tree)), result.stderr
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed is not None and int(passed[1]) > 20 and "failed" not in result.stdout


@pytest.mark.parametrize("name", RUNS)
def test_native_tests_hold(name: str, emulated: Path) -> None:
    check_native_tests(emulated, *RUNS[name])


@pytest.mark.exhaustive
@pytest.mark.parametrize("multiprocessors", [1, 132])
@pytest.mark.parametrize("name", RUNS)
def test_native_tests_hold_on_other_cards(name: str, multiprocessors: int, emulated: Path) -> None:
    files, _, seed, chosen = RUNS[name]
    check_native_tests(emulated, files, multiprocessors, 10 + seed, chosen)


def test_no_call_goes_past_its_inputs(emulated: Path) -> None:
    result = run(emulated, 132, 4, sys.executable, "-m", "tests._support.guards", "native")
    assert result.returncode == 0, result.stderr[-2000:]
    assert int(result.stdout.split()[0]) > 100


def test_launches_and_loads_of_moments(emulated: Path) -> None:
    """Vectors but for `edges` elements: those before the first whole vector of a run of odd planes and after its last.

    A ResNet-50's 53 layers at 224 px have a sixteenth of their channels here; 14 x 14 planes have vectors of 8 bytes.
    """
    layers = [(B, C // 16, h, w) for B, C, h, w in resnet50_shapes(1, 224)]
    # (function, dtype, shape, launches, edges forward)
    cases = [
        ("batch", "bfloat16", (3, 64, 7, 7), [2, 1], 0),
        ("batch", "float32", (2, 70, 7, 7), [2, 1], 2 + 4 * 4 + 2),  # of 6 planes; of 16 and 6 between vectors
        (
            "batch",
            "float64",
            (2, 4, 31, 35),
            [2, 1],
            4 * 1 + 4 * 5,
        ),  # planes of three runs, every other between vectors
        ("image", "float16", (3, 64, 7, 7), [2, 1], 0),
        ("batch_norm_moments", "bfloat16", (3, 64, 7, 7), [2, 1], 0),
    ]
    # Without its first channel, x starts at other places of vectors than its gradient: forward alone takes runs.
    between = ("batch", "float16", [(3, 33, 7, 7)])
    calls = [("bn_stat_loss", "bfloat16", layers), between, *((*case[:2], [case[2]]) for case in cases)]
    result = run(emulated, 3, 6, sys.executable, "-m", "tests._support.emulated", json.dumps(calls))
    assert result.returncode == 0, result.stderr[-2000:]
    of_layers, of_between, *others = json.loads(result.stdout)

    # Partial moments, their merge and the distances; gradients.
    assert [each["launches"] for each in of_layers] == [3, 1]
    size = 2 * sum(map(math.prod, layers))
    short = 2 * sum(math.prod(shape) for shape in layers if shape[2] == 14)
    assert [each["loads"] for each in of_layers] == 2 * [{"8": short // 8, "16": (size - short) // 16}]
    assert of_between[0]["loads"] == {"2": 3 * 8, "16": 3 * (32 * 49 // 8 - 1)}
    for (function, dtype, shape, launches, edges), found in zip(cases, others, strict=True):
        size = getattr(torch, dtype).itemsize
        assert [each["launches"] for each in found] == launches
        backward = 2 if function == "batch_norm_moments" else 1  # which reads dy too
        for each, tensors in zip(found, (1, backward), strict=True):
            vectors = (math.prod(shape) - edges) * size // 16
            odd = {str(size): tensors * edges} if edges else {}
            assert each["loads"] == {"16": tensors * vectors} | odd, (function, dtype)


@pytest.fixture(scope="session")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    source = folder / "faults.cpp"
    source.write_text(for_cpu((ROOT / "tests/_support/faults.cu").read_text()))
    command = ["g++", "-O1", "-std=c++20", "-U_FORTIFY_SOURCE", "-include", str(EMULATION), str(source)]
    subprocess.run([*command, "-o", str(folder / "faults")], check=True)
    return folder / "faults"


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("grid x", "an empty grid"),
        ("grid y", "a grid beyond"),
        ("threads", "more than 1024 threads"),
        ("warp", "part of a warp"),
        ("parameters", "bytes of parameters"),
        ("shared bytes", "48 KB"),
        ("barrier of some", "a thread ended while others wait"),
        ("barrier after an end", "ended"),
        ("shuffle of some", "a shuffle without"),
    ],
)
def test_what_cuda_refuses_ends_the_process(fault: str, message: str, faults: Path) -> None:
    result = run(faults.parent, 3, 0, str(faults), fault)
    assert result.returncode < 0
    assert message in result.stderr


def test_results_that_depend_on_an_order_or_on_another_block(faults: Path) -> None:
    def printed(name: str, seed: int) -> str:
        result = run(faults.parent, 3, seed, str(faults), name)
        assert result.returncode == 0, result.stderr
        return result.stdout

    assert "nan" in printed("unwritten", 0)
    for name in ("without barrier", "order of blocks"):
        assert printed(name, 0) == printed(name, 0) != printed(name, 1)
    assert printed("right", 0) == printed("right", 1)
    assert printed("right", 0).split()[:3] == ["62", "61", "60"]

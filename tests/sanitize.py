"""Run the operators' tests on an extension that is compiled with AddressSanitizer and UndefinedBehaviorSanitizer.

python tests/sanitize.py [arguments of pytest]
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from mutants.run import Copy

FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer"
STEMS = ("attention", "logits", "moments", "prior", "relation", "operators")
# What a sanitizer makes too slow or breaks: faults on purpose, memory that is measured, processes, compiled calls.
SELECTED = "native and not past_its_inputs and not memory and not process and not compile and not export and not fault"


def library(name: str) -> str:
    command = [os.environ.get("CXX", "g++"), f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="fastkd-sanitize-") as scratch:
        copy = Copy(Path(scratch))
        for path in (copy.folder / "fastkd").glob("_C.*"):
            path.unlink()
        os.environ |= {"CFLAGS": f"{FLAGS} -O1", "LDFLAGS": FLAGS}
        if not copy.build():
            print("the extension does not build with sanitizers")
            return 1
        env = os.environ | {
            "PYTHONPATH": scratch,
            "OMP_NUM_THREADS": "2",
            "LD_PRELOAD": f"{library('libasan.so')} {library('libubsan.so')}",
            # Python keeps what it allocates until it ends.
            "ASAN_OPTIONS": "detect_leaks=0",
            "UBSAN_OPTIONS": "print_stacktrace=1",
        }
        tests = sys.argv[1:] or [f"tests/{stem}" for stem in STEMS]
        command = [sys.executable, "-m", "pytest", "-q", "-m", "not exhaustive", "-k", SELECTED, *tests]
        return subprocess.run(command, cwd=scratch, env=env, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())

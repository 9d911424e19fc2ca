"""List the packages that fastkd and its extras need, directly or not, with versions and licences: `make audit`.

The exit status is 1 if a package that users install has no licence in its metadata, or one that asks for more than
attribution, unless ACCEPTED matches it.
"""

import re
import sys
from collections.abc import Iterator
from importlib import metadata
from typing import Any

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

COPYLEFT = re.compile(r"\b(A?GPL|LGPL|GNU|EUPL|SSPL|CC-BY-NC|Proprietary|Commercial)", re.IGNORECASE)
# NVIDIA's terms: PyTorch's wheels for CUDA need these packages, those for CPUs do not.
ACCEPTED = re.compile("nvidia-|cuda-toolkit$")
DEVELOPMENT = {"test", "lint", "docs", "bench", "dist"}  # extras that no user of the library installs


def licence(name: str) -> str:
    """Return the licence of an installed package, from its expression, its classifiers or its free text."""
    about: Any = metadata.metadata(name)
    if expression := about.get("License-Expression"):
        return str(expression)
    named = [x.rpartition(" :: ")[2] for x in about.get_all("Classifier") or () if x.startswith("License :: ")]
    named = [x for x in named if x != "OSI Approved"]
    return ", ".join(named) or (about.get("License") or "").strip().partition("\n")[0][:60]


def needed(name: str, extras: frozenset[str], seen: dict[str, set[str]], root: str) -> None:
    """Add the packages that a package needs to `seen`, with the extra of fastkd that they are needed for."""
    for text in metadata.requires(name) or ():
        requirement = Requirement(text)
        marker = requirement.marker
        here: Any = default_environment()
        if marker and not any(marker.evaluate({**here, "extra": extra}) for extra in extras or {""}):
            continue
        own = canonicalize_name(requirement.name)
        known = seen.setdefault(own, set())
        if own == "fastkd" or root in known:
            continue
        known.add(root)
        try:
            needed(own, frozenset(requirement.extras), seen, root)
        except metadata.PackageNotFoundError:
            continue


def rows() -> Iterator[tuple[str, str, str, str, str]]:
    """Yield (package, version, licence, extras, fault) of every package, in order of their names."""
    extras = metadata.metadata("fastkd").get_all("Provides-Extra") or []
    seen: dict[str, set[str]] = {}
    for extra in ("", *extras):
        needed("fastkd", frozenset({extra}), seen, extra or "fastkd")
    for name, used in sorted(seen.items()):
        if name == "fastkd":
            continue
        own = ", ".join(sorted(used))
        try:
            version, found = metadata.version(name), licence(name)
        except metadata.PackageNotFoundError:
            yield name, "not installed", "", own, ""
            continue
        fault = "no licence" if not found else "asks for more" if COPYLEFT.search(found) else ""
        yield name, version, found, own, "" if used <= DEVELOPMENT or ACCEPTED.match(name) else fault


def main() -> int:
    found = [("package", "version", "licence", "needed by", ""), *rows()]
    widths = [min(60, max(len(row[column]) for row in found)) for column in range(5)]
    for row in found:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    faults = [row for row in found[1:] if row[4]]
    print(f"\n{len(found) - 1} packages, {len(faults)} to look at")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())

"""Class folders of images, a manifest, a grid. One rule: a batch counts only if its manifest line is complete.

manifest.jsonl               a line that says how the images are made, then one per batch
train/<class>/BBBBB-III.png  image III of batch BBBBB
student-BBBBB.safetensors    the competing student after as many batches
grid.png                     the first images side by side
config.yaml                  the options, which `fastkd invert --config` reads
"""

import io
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from .. import InputError
from ..checkpoint import replacing

MANIFEST, GRID, IMAGES, CONFIG = "manifest.jsonl", "grid.png", "train", "config.yaml"
COLUMNS, ROWS = 10, 8  # of the grid


class ManifestError(InputError):
    """The manifest cannot be read, or does not match its folder."""


class Store:
    """The images of one output folder, batch by batch.

    batches: manifest entries of the finished batches: number, terms of the loss, images.
    """

    def __init__(self, out: Path, header: dict[str, Any], batches: list[dict[str, Any]]) -> None:
        self.out, self.header, self.batches = out, header, batches
        self._pending: dict[str, Any] = {}

    @classmethod
    def create(cls, out: Path, header: dict[str, Any]) -> "Store":
        """Create a new folder. The header must be unchanged by a round trip through JSON."""
        out.mkdir(parents=True, exist_ok=True)
        store = cls(out, header, [])
        store._clear()
        with replacing(out / MANIFEST) as partial:
            partial.write_text(_line(header))
        return store

    @classmethod
    def open(cls, out: Path) -> "Store":
        """Open an existing folder and delete the files of an interrupted batch.

        Raises:
            ManifestError: the manifest is missing, cannot be read, or does not match its folder.
        """
        header, batches, whole = _read(out)
        _check(out, header, batches)
        store = cls(out, header, batches)
        store._clear()
        os.truncate(out / MANIFEST, whole)
        return store

    @property
    def entries(self) -> list[dict[str, Any]]:
        """Return an entry per finished image: file, label, probability, bytes."""
        return [entry for batch in self.batches for entry in batch["images"]]

    @property
    def pending(self) -> list[dict[str, Any]]:
        """Return the entries of the batch that was added and is not committed yet."""
        return self._pending["images"]

    @property
    def student(self) -> Path:
        """Return the path of the student's weights that belong to the finished batches."""
        return self._student(len(self.batches))

    def add(self, images: Tensor, labels: list[int], probabilities: list[float], terms: dict[str, float]) -> None:
        """Write the images (B, 3, H, W) uint8 of the next batch; `commit` then makes them count.

        Raises:
            OSError: a file cannot be written, for example on a full disk; the batch's files are deleted.
        """
        number, entries = len(self.batches), []
        with self._whole_or_not_at_all():
            for i, (image, label) in enumerate(zip(images, labels, strict=True)):
                path = self.out / IMAGES / self.header["classes"][label] / f"{number:05}-{i:03}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                content = _png(image)
                with replacing(path) as partial:
                    partial.write_bytes(content)
                file = path.relative_to(self.out).as_posix()
                entry = {"file": file, "label": label, "probability": round(probabilities[i], 4), "bytes": len(content)}
                entries.append(entry)
        self._pending = {"batch": number, "terms": {k: float(f"{v:.6g}") for k, v in terms.items()}, "images": entries}

    def commit(self, save_student: Callable[[Path], object] | None = None) -> None:
        """Commit the batch just added, with the student's weights after it if there is one, and draw the grid.

        Raises:
            OSError: a file cannot be written, as in add.
        """
        manifest = self.out / MANIFEST
        size = manifest.stat().st_size
        with self._whole_or_not_at_all():
            if save_student is not None:
                save_student(self._student(len(self.batches) + 1))
            try:
                with manifest.open("a") as file:
                    file.write(_line(self._pending))
                    file.flush()
                    os.fsync(file.fileno())
            except BaseException:
                os.truncate(manifest, size)
                raise
        before = self.student
        self.batches.append(self._pending)
        before.unlink(missing_ok=True)
        if len(self.entries) - len(self._pending["images"]) < COLUMNS * ROWS:
            self._draw_grid()

    def _student(self, batches: int) -> Path:
        return self.out / f"student-{batches:05}.safetensors"

    def _draw_grid(self) -> None:
        paths = [self.out / entry["file"] for entry in self.entries[: COLUMNS * ROWS]]
        images = [Image.open(path) for path in paths]
        width, height = images[0].size
        grid = Image.new("RGB", (COLUMNS * width, -(-len(images) // COLUMNS) * height), "white")
        for i, image in enumerate(images):
            grid.paste(image, (i % COLUMNS * width, i // COLUMNS * height))
        with replacing(self.out / GRID) as partial:
            grid.save(partial, format="png")

    @contextmanager
    def _whole_or_not_at_all(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._clear()
            raise

    def _clear(self) -> None:
        for path in self._unfinished():
            path.unlink(missing_ok=True)

    def _unfinished(self) -> list[Path]:
        """Return the files of a batch without a manifest line."""
        name = f"{len(self.batches):05}-*.png"
        return [
            *(self.out / IMAGES).glob(f"*/{name}"),
            *(self.out / IMAGES).glob(f"*/.{name}.*"),  # replacing's
            *(path for name in (MANIFEST, GRID, CONFIG, "student-*") for path in self.out.glob(f".{name}.*")),
            *(path for path in self.out.glob("student-*.safetensors") if path != self.student),
        ]


def check_folder(out: Path) -> dict[str, Any] | None:
    """Check the manifest of a folder against its files. Return the header, or None if there is no manifest.

    Raises:
        ManifestError: the manifest cannot be read, or does not match its folder.
    """
    if not (out / MANIFEST).is_file():
        return None
    header, batches, _ = _read(out)
    _check(out, header, batches)
    return header


def _read(out: Path) -> tuple[dict[str, Any], list[dict[str, Any]], int]:
    """Return header, batches, and the number of bytes up to the last complete line."""
    path = out / MANIFEST
    if not path.is_file():
        raise ManifestError(f"{out} has no {MANIFEST}: nothing that fastkd invert could go on with")
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1  # the process ended while writing the rest
    try:
        header, *batches = [json.loads(line) for line in content[:whole].splitlines()]
        in_order = [batch["batch"] for batch in batches] == list(range(len(batches)))
        if not isinstance(header["classes"], list) or not in_order:
            raise ValueError("batches are not in order")
        for batch in batches:
            for entry in batch["images"]:
                _ = Path(entry["file"]), int(entry["label"]), int(entry["bytes"])
    except (ValueError, KeyError, TypeError) as error:
        raise ManifestError(f"{path} cannot be read as a manifest: {error}") from error
    return header, batches, whole


def _check(out: Path, header: dict[str, Any], batches: list[dict[str, Any]]) -> None:
    listed = {entry["file"]: entry for batch in batches for entry in batch["images"]}
    there = {path.relative_to(out).as_posix() for path in (out / IMAGES).glob("*/*") if path.is_file()}
    current = re.compile(rf"{IMAGES}/[^/]+/\.?{len(batches):05}-\d+\.png")  # may be incomplete
    if missing := sorted(set(listed) - there):
        raise ManifestError(f"{out / MANIFEST} lists {missing[0]}, which is not there{_others(missing)}")
    if extra := sorted(file for file in there - set(listed) if not current.match(file)):
        raise ManifestError(f"{out / MANIFEST} does not list {extra[0]}, which is there{_others(extra)}")
    for file, entry in listed.items():
        label, size = entry["label"], (out / file).stat().st_size
        if not 0 <= label < len(header["classes"]) or Path(file).parent.name != header["classes"][label]:
            raise ManifestError(f"{out / MANIFEST} gives {file} the label {label}, which is another folder's")
        if size != entry["bytes"]:
            raise ManifestError(f"{out / MANIFEST} gives {file} {entry['bytes']} bytes, it has {size}")


def _others(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _png(image: Tensor) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(buffer, format="png")
    return buffer.getvalue()


def _line(content: dict[str, Any]) -> str:
    return json.dumps(content, separators=(",", ":")) + "\n"

"""Checkpoints on disk. One rule: a checkpoint is a folder that is renamed into place when it is complete."""

import errno
import importlib
import io
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from fastkd._version import __version__

from . import InputError

fcntl: Any = None  # Windows has none
with suppress(ImportError):
    fcntl = importlib.import_module("fcntl")
STATE, LOCK, PARTIAL = "state.pt", ".lock", ".partial"
FORMAT = 1  # of the state; another number for each change that earlier versions cannot read
Tensors = dict[str, Tensor]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary file to write to; if the block succeeds, it is synced to disk and replaces `path`.

    The file is created here under a name that nobody can foresee: in an open folder it could be another's link.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}{PARTIAL}")
    partial.touch(exist_ok=False)
    try:
        yield partial
        _sync(partial)
        partial.replace(path)
        _sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def alone(out: Path, option: str = "--out") -> Iterator[None]:
    """Create the folder and lock it against other processes while the block runs; a killed process holds no lock.

    Raises:
        InputError: another process holds the lock, or the folder cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = _locked(out / LOCK)
    except FileExistsError as error:
        raise InputError(f"{option}: {out} is a file, not a folder") from error
    except OSError as error:
        raise InputError(f"{option}: {out} cannot be written: {error.strerror or error}") from error
    if file is None:
        raise InputError(f"{option}: another process is at work in {out}; wait for its end, or name another folder")
    with closing(file):
        try:
            yield
        finally:
            (out / LOCK).unlink(missing_ok=True)


def clear(out: Path) -> None:
    """Delete what a killed process left half-written in a folder that this process has locked."""
    for path in out.glob(f".*{PARTIAL}"):
        path.unlink(missing_ok=True)


def _locked(path: Path) -> IO[str] | None:
    """Return the file, open and locked, or None if another process holds the lock."""
    while True:
        file = path.open("a")
        if fcntl is None:
            return file
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not inherited: a forked process must not hold the lock
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.close()
                return None
            return file  # a file system without locks
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()  # its holder deleted it between the two calls


def write(root: Path, name: str, weights: Mapping[str, Tensors], state: dict[str, Any]) -> None:
    """Write the checkpoint root/name and delete earlier ones; names sort by time. An existing one is kept."""
    if not (root / name).exists():
        partial = root / f".{name}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            for key, tensors in weights.items():
                (partial / f"{key}.safetensors").write_bytes(save(tensors, {"format": "pt"}))
            buffer = io.BytesIO()
            torch.save(state | {"format": FORMAT}, buffer)
            (partial / STATE).write_bytes(buffer.getbuffer())
            for path in (*partial.iterdir(), partial):
                _sync(path)
            partial.rename(root / name)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        _sync(root)
    for path in root.iterdir():
        if path.name != name:
            shutil.rmtree(path, ignore_errors=True)


def latest(root: Path) -> Path | None:
    """Return the last complete checkpoint."""
    found = sorted(path for path in root.glob("[!.]*") if path.is_dir()) if root.is_dir() else []
    return found[-1] if found else None


def read(path: Path) -> tuple[dict[str, Tensors], dict[str, Any]]:
    """Return (weights, state) of a checkpoint without executing code from it.

    Raises:
        InputError: the checkpoint is damaged, or has another format.
    """
    try:
        weights = {file.stem: load_file(file) for file in path.glob("*.safetensors")}
        state = torch.load(path / STATE, map_location="cpu", weights_only=True)
        written = state.pop("format")
    except Exception as error:  # safetensors, zip and pickle raise errors of their own
        detail = " ".join(str(error).split())[:200]
        raise InputError(f"--resume: the checkpoint {path} cannot be read, and was damaged: {detail}") from error
    if written != FORMAT:
        raise InputError(
            f"--resume: the checkpoint {path} has format {written}, fastkd {__version__} reads {FORMAT}; resume it "
            "with the version that began the run"
        )
    return weights, state


def write_weights(
    path: Path, model: nn.Module, name: str, args: dict[str, Any], classes: Sequence[str] | None = None
) -> None:
    """Write weights for timm.create_model(name, checkpoint_path=path, **args), with name and args in the metadata.

    The metadata also has the names of the classes in the order of the logits. Equal content gives equal bytes.
    """
    write_tensors(path, weights_of(model), name, args, classes)


def write_tensors(
    path: Path, tensors: Tensors, name: str, args: dict[str, Any], classes: Sequence[str] | None = None
) -> None:
    about = {"format": "pt", "architecture": name, "model_args": json.dumps(args)}
    content = _in_order(save(tensors, about | ({} if classes is None else {"classes": json.dumps(classes)})))
    with replacing(path) as partial:
        partial.write_bytes(content)


def _in_order(content: bytes) -> bytes:
    """Return the safetensors file with a sorted header; safetensors writes the metadata in random order."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header = header.ljust(-(-len(header) // 8) * 8)  # data begin at a multiple of 8 bytes
    return len(header).to_bytes(8, "little") + header + content[end:]


def saved_as(checkpoint: str | Path | None) -> tuple[str, dict[str, Any]] | None:
    """Return architecture and arguments from the metadata of weights that `fastkd train` has written."""
    if checkpoint is None or not Path(checkpoint).is_file():
        return None
    try:
        with safe_open(checkpoint, "pt") as file:
            metadata = file.metadata() or {}
        return metadata["architecture"], json.loads(metadata["model_args"])
    except Exception:  # another format; load_weights raises the error
        return None


def weights_of(module: nn.Module) -> Tensors:
    """Return host copies of the module's state. Sharded tensors are gathered, so every rank must call this."""
    return {name: whole(x).clone(memory_format=torch.contiguous_format) for name, x in module.state_dict().items()}


def load_weights(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    own = module.state_dict()
    if own.keys() != tensors.keys():
        raise KeyError(f"the checkpoint's weights are others: {sorted(own.keys() ^ tensors.keys())[:8]}")
    with torch.no_grad():
        for name, x in own.items():
            x.copy_(like(tensors[name], x))


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the optimiser's state_dict, gathered and on the host."""
    return _mapped(optimizer.state_dict())


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    spread = {
        index: {key: like(x, parameters[index]) if _shaped(x, parameters[index]) else x for key, x in values.items()}
        for index, values in state["state"].items()
    }
    optimizer.load_state_dict(state | {"state": spread})


def whole(x: Tensor) -> Tensor:
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().cpu()


def like(x: Tensor, other: Tensor) -> Tensor:
    """Return x, sharded over ranks like the other tensor."""
    return distribute_tensor(x, other.device_mesh, other.placements) if isinstance(other, DTensor) else x


def _shaped(x: Any, parameter: Tensor) -> bool:
    return isinstance(x, Tensor) and x.shape == parameter.shape


def _mapped(value: Any) -> Any:
    if isinstance(value, Tensor):
        return whole(value).clone()
    if isinstance(value, dict):
        return {key: _mapped(x) for key, x in value.items()}
    return [_mapped(x) for x in value] if isinstance(value, list) else value


def _sync(path: Path) -> None:
    """Sync to disk; otherwise a power failure can leave the new name without content."""
    if os.name == "nt" and path.is_dir():  # Windows cannot open folders
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

"""Files that appear under their names only when they are complete, and locks on files that are being written."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # on Windows, where there are no locks
    fcntl = None  # type: ignore[assignment]

# The files of a folder of samples. Results may be written beside them, not over them.
KEPT_SUFFIXES = frozenset(
    (
        *(".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".jp2", ".heic", ".heif"),
        *(".npy", ".npz", ".gz", ".xz", ".bin"),
    )
)


def check_writable(path: str | os.PathLike) -> None:
    """Raise OSError if ``path`` cannot be written, before anything is computed."""
    path = Path(path)
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise OSError(f"{path}: expected a file in a folder that can be written to, but {error.strerror}") from error


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike, mode: str = "wb", **options: Any) -> Iterator[IO[Any]]:
    """A file that appears under its name when it is complete; until then, and after an error, the old one stays."""
    path = Path(path)
    check_writable(path)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with open(descriptor, mode, **options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp's files are private
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(
            f"{path}: could not be written, what was there is unchanged: {error.strerror or error}"
        ) from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def clear_leftovers(path: str | os.PathLike) -> None:
    """Remove the temporary files of writes of ``path`` that were killed."""
    path = Path(path)
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        left.unlink(missing_ok=True)


def refuse_inputs(out: str | os.PathLike, inputs: Mapping[str, str | os.PathLike | None]) -> None:
    """Raise ValueError if ``out`` is one of the ``inputs``, {what it is: path}, or a picture inside one.

    Files are compared, not names: links, ``..`` and relative paths are followed.
    """
    for path in (Path(out), Path(f"{os.fspath(out)}.partial")):
        for what, given in inputs.items():
            if given is None or not path.exists():
                continue
            source = Path(given)
            if source.is_file() and path.samefile(source):
                raise ValueError(
                    f"--out {out}: expected a new file, but {path} is {what}, which would be lost; choose another name"
                )
            within = source.is_dir() and path.is_file() and source.resolve() in path.resolve().parents
            if within and path.suffix.lower() in KEPT_SUFFIXES:
                raise ValueError(
                    f"--out {out}: expected a new file, but it is in {what}, {source}, and would be lost; choose "
                    "another name"
                )


@contextlib.contextmanager
def alone(path: str | os.PathLike) -> Iterator[None]:
    """Lock the output ``path`` for this process, by ``.NAME.lock`` beside it; ValueError if another process holds it.

    The lock ends with the process; the file is removed at the end, or by the next run.
    """
    path = Path(path)
    lock = path.with_name(f".{path.name}.lock")
    if fcntl is None:
        yield
        return
    while True:
        descriptor = os.open(lock, os.O_CREAT | os.O_RDWR, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if lock.exists() and os.fstat(descriptor).st_ino == lock.stat().st_ino:
                break
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.ENOTSUP):  # a file system without locks
                break
            os.close(descriptor)
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            raise ValueError(
                f"--out {path}: another process is writing it; wait for its end, or choose another name"
            ) from None
        os.close(descriptor)  # its last holder has removed it
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(descriptor)

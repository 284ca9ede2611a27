"""The compiled module: `C` where it can be used, else None and the `reason`. Knows nothing of torch.

A binary is used only if it was built from this version and, if the sources lie beside the package, from these sources.
A stale one raises a warning, because it computes what other sources said.
"""

import hashlib
import importlib.machinery
import importlib.metadata
import importlib.util
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from ._version import __version__

__all__ = ["C", "reason"]

_PACKAGE = Path(__file__).resolve().parent
_CURE = "run `pip install .` in gradext's source folder, with g++ or clang installed"


def source_hash(csrc: Path) -> str:
    """The hash of the sources, as setup.py computes it and build_config() reports it."""
    digest = hashlib.sha256()
    for path in sorted(p for p in csrc.rglob("*") if p.is_file()):
        digest.update(path.relative_to(csrc).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _candidates() -> Iterator[Path]:
    """Binaries beside this file, then those of installed distributions: in the root of a clone the source folder, which
    has no binary, shadows the installed package."""
    seen = {_PACKAGE}
    yield from _binaries(_PACKAGE)
    for distribution in importlib.metadata.distributions(name="gradext"):
        folder = Path(str(distribution.locate_file("gradext"))).resolve()
        if folder not in seen:
            seen.add(folder)
            yield from _binaries(folder)


def _binaries(folder: Path) -> list[Path]:
    paths = (folder / f"_C{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES)
    return [path for path in paths if path.is_file()]


def _stale(config: dict, version: str, csrc: Path) -> str | None:
    """Why a binary with this build_config() does not belong to these sources, or None."""
    if config["version"] != version:
        return f"was built for gradext {config['version']}, this is {version}"
    if csrc.is_dir() and config["source_hash"] != source_hash(csrc):
        return f"was built from other sources than {csrc}"
    return None


def _load() -> tuple[ModuleType | None, str | None]:
    reasons = []
    for path in _candidates():
        try:
            spec = importlib.util.spec_from_file_location("gradext._C", path)
            if spec is None or spec.loader is None:
                raise ImportError("not a name of an extension module")
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        except ImportError as error:
            reasons.append(f"{path} could not be loaded ({error})")
            continue
        stale = _stale(module.build_config(), __version__, _PACKAGE.parent / "csrc")
        if stale is None:
            sys.modules["gradext._C"] = module
            return module, None
        reasons.append(f"{path} {stale}")
    found = "; ".join(reasons) or f"there is no compiled module in {_PACKAGE} nor in an installed gradext"
    return None, f"{found}: {_CURE}"


C: Any  # a module, whose content no type checker sees, or None
C, reason = _load()
if C is None and any(_candidates()):
    warnings.warn(f"gradext runs without its compiled kernels: {reason}", RuntimeWarning, stacklevel=2)

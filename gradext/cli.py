"""``gradext`` (or ``python -m gradext``) on the command line."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Sequence
from importlib import metadata

from ._version import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 1 for bad input, 2 for wrong arguments, 130 for Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="gradext", description="Per-sample gradients of linear layers, and novelty detection with them."
    )
    parser.add_argument("--version", action="version", version=f"gradext {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="train, score and draw on real images, one class being normal")
    demo.add_argument("--dataset", default="digits", help="digits (bundled), mnist, fashion-mnist or cifar-10")
    demo.add_argument("--data-dir", metavar="DIR", help="folder with the set's standard files")
    demo.add_argument(
        "--inlier", nargs="+", default=["5"], metavar="K", help="the normal class (default 5), several, or 'all'"
    )
    demo.add_argument("--epochs", type=int, metavar="N", help="training epochs (default 50, more on small sets)")
    demo.add_argument("--fold", type=int, default=0, metavar="F", help="which of the five folds is the test part")
    demo.add_argument("--seed", type=int, default=0, metavar="S")
    demo.add_argument("--out", default="gradext-demo", metavar="DIR", help="where pictures go (default gradext-demo)")
    demo.set_defaults(run=_demo)

    info = commands.add_parser("info", help="versions, build configuration, and which backends work")
    info.set_defaults(run=_info)

    arguments = parser.parse_args(argv)
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        print(f"gradext {arguments.command}: {error}", file=sys.stderr)
        return 1


def _demo(arguments: argparse.Namespace) -> int:
    from .novelty import demo

    inliers = None
    if arguments.inlier != ["all"]:
        try:
            inliers = [int(value) for value in arguments.inlier]
        except ValueError:
            raise ValueError(
                f"--inlier: expected class numbers or 'all', but got {' '.join(arguments.inlier)!r}"
            ) from None
    demo.run(
        arguments.dataset,
        data_dir=arguments.data_dir,
        inliers=inliers,
        out=arguments.out,
        fold=arguments.fold,
        seed=arguments.seed,
        epochs=arguments.epochs,
    )
    return 0


def _info(arguments: argparse.Namespace) -> int:
    import torch

    from . import backends, native

    print(f"gradext {__version__}   Python {platform.python_version()}   {platform.platform()}")
    for package in ("torch", "triton", "numpy", "scikit-learn"):
        try:
            print(f"  {package:<13} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            print(f"  {package:<13} not installed")
    print(f"  {'threads':<13} {torch.get_num_threads()}")
    print("compiled module")
    if native.C is None:
        print(f"  missing: {native.reason}")
    else:
        for key, value in native.C.build_config().items():
            print(f"  {key:<13} {', '.join(map(str, value)) if isinstance(value, (list, tuple)) else value}")
    print("backends")
    for name, backend in backends.BACKENDS.items():
        reason = backend.available()
        print(f"  {name:<13} {'works' if reason is None else f'no: {reason}'}")
    print("choice: the first row that fits, and in it the first backend that works; elsewhere reference")
    for row in backends.TABLE:
        print(f"  {row.device:<5} {', '.join(row.operators):<18} {row.when:<32} {', '.join(row.backends)}: {row.why}")
    if backends.DEFAULT:
        print(f"  but GRADEXT_BACKEND={backends.DEFAULT} is taken for every call that names no backend")
    return 0

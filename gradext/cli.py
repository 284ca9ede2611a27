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
        prog="gradext", description="Per-sample gradients of neural networks, and novelty detection with them."
    )
    parser.add_argument("--version", action="version", version=f"gradext {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo",
        description="Train a detector on one class of a data set, print AUROC and speed, and draw a picture.",
        help="train, score and draw on real images, one class being normal",
    )
    demo.add_argument("--dataset", default="digits", help="digits (bundled), mnist, fashion-mnist or cifar-10")
    demo.add_argument(
        "--data-dir", metavar="DIR", help="folder with the set's standard files (default: the variable GRADEXT_DATA)"
    )
    demo.add_argument(
        "--inlier", nargs="+", default=["5"], metavar="K", help="the normal class (default 5), several, or 'all'"
    )
    demo.add_argument("--epochs", type=int, metavar="N", help="training epochs (default 50, more on small sets)")
    demo.add_argument(
        "--fold", type=int, default=0, metavar="F", help="which fold is the test part, 0 to 4 (default 0)"
    )
    demo.add_argument("--seed", type=int, default=0, metavar="S", help="of split and training (default 0)")
    demo.add_argument("--out", default="gradext-demo", metavar="DIR", help="where pictures go (default gradext-demo)")
    demo.set_defaults(run=_demo)

    data = argparse.ArgumentParser(add_help=False)
    data.add_argument(
        "data",
        metavar="DATA",
        help="a folder of images (nested or not) or one image, an inspection folder (train/good, test/*), a .npy, "
        ".npz, .csv, .tsv or .parquet file, or a set by name: digits, mnist, mnist:train, mnist:test, ...",
    )
    data.add_argument(
        "--data-dir",
        metavar="DIR",
        help="folder with the named sets' standard files (default: the variable GRADEXT_DATA)",
    )
    data.add_argument(
        "--labels",
        metavar="WHERE",
        help="the rows' labels: a table's column, an .npz' array, or a file with one a line; images have folders",
    )
    data.add_argument("--columns", nargs="+", metavar="NAME", help="a table's columns to take (default: all)")
    data.add_argument("--drop", nargs="+", default=[], metavar="NAME", help="a table's columns to leave out")
    data.add_argument("--skip-unreadable", action="store_true", help="go on without images that cannot be used")
    data.add_argument("--device", help="where to compute, such as cuda (default: the CPU)")
    data.add_argument("--json", action="store_true", help="print one JSON object")
    data.add_argument("--quiet", action="store_true", help="no progress bars (there are none but on terminals)")
    labelled = argparse.ArgumentParser(add_help=False, parents=[data])
    labelled.add_argument(
        "--target-fpr", type=float, metavar="P", help="call novel at this rate of false alarms (default: the fit's)"
    )
    labelled.add_argument(
        "--normal", nargs="+", metavar="LABEL", help="the labels of normal samples (default: 0, where all are 0 or 1)"
    )
    model = argparse.ArgumentParser(add_help=False)
    model.add_argument("model", metavar="MODEL", help="a file that `gradext fit` wrote")

    fit = commands.add_parser(
        "fit",
        description="Train a detector on normal samples and write a model file. Run the same command again to resume.",
        parents=[data],
        help="train a detector on normal samples and save it; resumes where it stopped",
    )
    fit.add_argument(
        "--normal", nargs="+", metavar="LABEL", help="train on samples with these labels (default: on all of DATA)"
    )
    fit.add_argument("--out", required=True, metavar="MODEL", help="the model file to write")
    fit.add_argument(
        "--score",
        default="auto",
        help="such as gradient_norm or combined_evidence (default: by the data); another name lists them all",
    )
    fit.add_argument(
        "--layer",
        default="auto",
        help="the decoder layer: first, last, a name such as decoder.2, or several with commas between (default: the "
        "last of an autoencoder, the first of a vae)",
    )
    fit.add_argument(
        "--size", metavar="HxW", help="resize images to this (default: as they are; large or unequal ones to 64 pixels)"
    )
    fit.add_argument("--pad", action="store_true", help="with --size: keep proportions, with black edges")
    fit.add_argument("--mode", choices=("L", "RGB"), help="grey or colour (default: as the first image)")
    fit.add_argument(
        "--model",
        default="auto",
        choices=("auto", "autoencoder", "vae", "conv", "rotation"),
        help="auto (default: by the data), autoencoder, vae (the paper's), conv (a convolutional vae, for images), "
        "rotation (a network that tells turned images apart, for natural ones)",
    )
    fit.add_argument("--epochs", type=int, metavar="N", help="training epochs (default: by the held-out loss)")
    fit.add_argument("--hidden-dim", type=int, metavar="N", help="hidden units of the model (default: by the data)")
    fit.add_argument("--latent-dim", type=int, metavar="N", help="its latent dimensions (default: by the data)")
    fit.add_argument(
        "--target-fpr", type=float, default=0.05, metavar="P", help="wanted rate of false alarms (default 0.05)"
    )
    fit.add_argument("--contamination", type=float, metavar="P", help="share of DATA that is novel (default: none)")
    fit.add_argument("--seed", type=int, default=0, metavar="S", help="of split and training (default 0)")
    fit.set_defaults(run=_novelty)

    score = commands.add_parser(
        "score",
        description="Write a table with the score of every sample. Run the same command again to resume.",
        parents=[model, data],
        help="write a table of scores; resumes where it stopped",
    )
    score.add_argument(
        "--target-fpr", type=float, metavar="P", help="call novel at this rate of false alarms (default: the fit's)"
    )
    score.add_argument("--maps", metavar="FOLDER", help="write a picture of where each image is novel")
    score.add_argument("--out", required=True, metavar="TABLE", help="a .csv or .parquet file to write")
    score.set_defaults(run=_novelty)

    evaluate = commands.add_parser(
        "evaluate",
        description="Score labelled samples and print how well scores separate normal and novel ones.",
        parents=[model, labelled],
        help="how well scores separate labelled samples",
    )
    evaluate.set_defaults(run=_novelty)

    report = commands.add_parser(
        "report",
        description="Score labelled or unlabelled samples and write one HTML file with plots, images and explanations.",
        parents=[model, labelled],
        help="one HTML file with plots and explanations",
    )
    report.add_argument("--out", required=True, metavar="HTML", help="the file to write; it needs no network")
    report.add_argument(
        "--training", metavar="DATA", help="training samples, to show the normal ones nearest to the most novel"
    )
    report.set_defaults(run=_novelty)

    export = commands.add_parser(
        "export",
        description="Write the scoring function of a model as an ONNX graph, for onnxruntime.",
        parents=[model],
        help="write the scoring function as an ONNX graph",
    )
    export.add_argument("--out", required=True, metavar="ONNX", help="the file to write")
    export.add_argument(
        "--dtype", choices=("float32", "float64"), help="of input and scores (default: the detector's own)"
    )
    export.add_argument("--json", action="store_true", help="print one JSON object")
    export.set_defaults(run=_novelty)

    images = commands.add_parser(
        "images",
        description="Write a data set as PNG files, one folder for each label.",
        help="write a named set out as PNG files, DIR/train/LABEL/ and DIR/test/LABEL/",
    )
    images.add_argument("data", metavar="SET", help="digits (bundled), mnist, fashion-mnist or cifar-10")
    images.add_argument(
        "--data-dir", metavar="DIR", help="folder with the set's standard files (default: the variable GRADEXT_DATA)"
    )
    images.add_argument("--out", required=True, metavar="DIR", help="a new or empty folder")
    images.set_defaults(run=_novelty)

    info = commands.add_parser(
        "info",
        description="Print versions, the build configuration, and which backends work. Please add it to bug reports.",
        help="versions, build configuration, and which backends work",
    )
    info.set_defaults(run=_info)

    arguments = parser.parse_args(argv)
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, RuntimeError, ImportError) as error:
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


def _novelty(arguments: argparse.Namespace) -> int:
    from .novelty import commands

    return getattr(commands, arguments.command)(arguments)


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

"""The commands ``fit``, ``score``, ``evaluate``, ``report``, ``export``, ``images``: from arguments to results.

Each returns the exit status. Results go to standard output (``--json``: as one object), all else to standard error.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed
from PIL import Image
from sklearn.metrics import average_precision_score

from .. import datasets
from .._version import __version__
from ..datasets import DatasetError
from ..sources import Source, open_source
from . import evaluation, guards, persistence, reporting, scoring, writing
from .batches import joined
from .detector import NoveltyDetector
from .passes import Processes
from .scaling import is_image
from .training import Checkpoint


def fit(arguments: argparse.Namespace) -> int:
    out = Path(arguments.out)
    writing.check_writable(out)
    with _output(arguments), _processes(arguments) as processes, _printed_warnings(by_me=processes.rank == 0):
        source = _source(
            arguments, size=_size(arguments.size), mode=arguments.mode, pad=arguments.pad, auto_size=True, part="train",
        )  # fmt: skip
        _print_notes(source, processes)
        chosen = arguments.normal or source.normal
        rows = np.flatnonzero(_normal(source, arguments)) if chosen else np.arange(len(source))
        detector = NoveltyDetector(
            arguments.score, model=arguments.model, layer=_layer(arguments.layer), epochs=arguments.epochs,
            hidden_dim=arguments.hidden_dim,
            latent_dim=arguments.latent_dim, target_fpr=arguments.target_fpr, contamination=arguments.contamination,
            random_state=arguments.seed, device=arguments.device,
            verbose=not arguments.quiet and processes.rank == 0,
        )  # fmt: skip
        detector._check_memory(source.shape, arguments.data)
        checkpoint = _checkpoint(arguments, source, rows)
        with _partial_named(checkpoint.path):
            detector.fit(source.samples(rows), process_group=processes.group, checkpoint=checkpoint)
            if processes.rank > 0:
                return 0
            samples = len(rows) - len(source.skipped)
            detector.image_format_ = source.image_format
            persistence.save(detector, out)
        writing.clear_leftovers(out)
        checkpoint.remove()
    result = {
        "model": str(out),
        "samples": samples,
        "skipped": _skipped(source),
        "input_shape": list(detector.input_shape_),
        "score": detector.score_.name,
        "best_epoch": None if detector.history_ is None else detector.history_.best_epoch,
        "threshold": -detector.offset_,
        "calibration_samples": len(detector.calibration_.scores),
    }
    _print(
        arguments,
        result,
        f"{out}: {detector.score_.name} of {_called(detector)} fit on {samples} samples of shape "
        f"{'x'.join(map(str, detector.input_shape_))}; novel above {-detector.offset_:.4g}, from "
        f"{result['calibration_samples']} held-out samples",
    )
    return 0


def _checkpoint(arguments: argparse.Namespace, source: Source, rows: np.ndarray) -> Checkpoint:
    """``MODEL.partial``, from which a stopped training resumes when the same command is run again."""
    out = Path(arguments.out)
    told = {name: value for name, value in vars(arguments).items() if name not in ("run", "json", "quiet", "out")}
    versions = [__version__, torch.__version__, np.__version__, torch.get_num_threads()]
    run = json.dumps([source.fingerprint, hashlib.sha256(rows.tobytes()).hexdigest(), told, versions], sort_keys=True)
    return Checkpoint(out.with_name(f"{out.name}.partial"), hashlib.sha256(run.encode()).hexdigest())


def score(arguments: argparse.Namespace) -> int:
    scoring.check_out(arguments.out)
    with _output(arguments), _processes(arguments) as processes, _printed_warnings():
        rank, world = processes.rank, processes.world
        detector, source = _open(arguments)
        _check_maps(arguments, detector)
        model_id = hashlib.sha256(Path(arguments.model).read_bytes() + repr(detector.offset_).encode()).hexdigest()
        with _partial_named(scoring.partial_path(arguments.out, rank, world)):
            scoring.score_to_file(
                detector, source, arguments.out, model_id=model_id, rank=rank, world=world,
                progress=not arguments.quiet and rank == 0, maps=arguments.maps,
            )  # fmt: skip
            if world > 1:
                torch.distributed.barrier()
            if rank > 0:
                return 0
            reasons = not is_image(detector.input_shape_)
            errors = scoring.finish(arguments.out, len(source), world, reasons=reasons)
    for entry in errors:
        _tell(f"skipped: {entry['error']}")
    _print(
        arguments,
        {"out": arguments.out, "rows": len(source), "skipped": {e["sample"]: e["error"] for e in errors}},
        f"{arguments.out}: {len(source)} rows" + (f", {len(errors)} of them skipped" if errors else ""),
    )
    return 0


def evaluate(arguments: argparse.Namespace) -> int:
    with _processes(arguments) as processes, _printed_warnings():
        detector, source = _open(arguments)
        normal = _normal(source, arguments)
        rows = scoring.shared_rows(detector, len(source), processes.rank, processes.world)
        progress = not arguments.quiet and processes.rank == 0
        found = joined(
            np.rec.fromarrays([index, novelty], dtype=[("index", np.int64), ("novelty", np.float64)])
            for _, index, novelty in scoring.novelties(detector, source, rows, progress=progress)
        )
        shares = processes.gather((found, source.skipped))
    if processes.rank > 0:
        return 0
    parts = [share for share, _ in shares if len(share)]
    if not parts:
        reasons = [reason for _, skipped in shares for reason in skipped.values()]
        raise DatasetError(f"{arguments.data}: none of {len(source)} samples can be read, such as {reasons[0]}")
    found = np.concatenate(parts)
    index, novelty = found["index"], found["novelty"]
    for _, skipped in shares:
        source.skipped |= skipped
    novel = ~normal[index]
    if novel.all() or not novel.any():
        raise ValueError(
            f"labels: expected normal and novel samples, but all are {'novel' if novel.all() else 'normal'}"
        )
    called = novelty > -detector.offset_
    ranked = scoring.in_finite_numbers(novelty, -detector.offset_)
    kinds = (
        [] if source.labels is None else evaluation.by_label(source.labels[index], ~novel, ranked, -detector.offset_)
    )
    pixels = evaluation.pixel_auroc(detector, source) if source.masks else None
    area, low, high = evaluation.auroc_interval(novel, ranked)
    result = {
        "normal": int((~novel).sum()),
        "novel": int(novel.sum()),
        "auroc": area,
        "auroc_interval": [low, high],
        "average_precision": float(average_precision_score(novel, ranked)),
        "false_alarm_rate": float(called[~novel].mean()),
        "detection_rate": float(called[novel].mean()),
        "pixel_auroc": pixels,
        "labels": [kind.as_dict() for kind in kinds],
        "skipped": _skipped(source),
    }
    more = "" if pixels is None else f"\nby pixel           AUROC {pixels:.4f}, against {len(source.masks)} masks"
    if len(kinds) > 2:
        width = max(len(kind.label) for kind in kinds)
        for kind in kinds:
            ranks = "normal" if kind.auroc is None else f"AUROC {kind.auroc:.3f} ({kind.low:.3f} to {kind.high:.3f})"
            more += f"\n{kind.label:<{width}}  {kind.samples:>6}  {kind.called_novel:>6.1%} called novel  {ranks}"
    _print(
        arguments,
        result,
        f"{result['normal']} normal and {result['novel']} novel samples\n"
        f"AUROC              {result['auroc']:.4f}  (95%: {low:.4f} to {high:.4f})\n"
        f"average precision  {result['average_precision']:.4f}\n"
        f"at the threshold   {result['detection_rate']:.1%} of the novel found, "
        f"{result['false_alarm_rate']:.1%} false alarms{more}",
    )
    return 0


def report(arguments: argparse.Namespace) -> int:
    writing.check_writable(arguments.out)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("a report is made by one process: run it without torchrun")
    with _output(arguments), _printed_warnings():
        detector, source = _open(arguments)
        told = arguments.normal is not None or source.normal is not None
        labelled = source.labels is not None and (told or set(source.labels) <= {"0", "1"})
        normal = _normal(source, arguments) if labelled or arguments.normal else None
        training = None if arguments.training is None else _training(arguments, detector)
        page = reporting.page(
            detector,
            source,
            normal,
            training,
            title=f"{Path(arguments.model).name} on {arguments.data}",
            progress=not arguments.quiet,
        )
    with writing.atomic_write(arguments.out, "w", encoding="utf-8") as file:
        file.write(page)
    result = {"out": arguments.out, "rows": len(source), "skipped": _skipped(source)}
    _print(arguments, result, f"{arguments.out}: {len(source)} samples")
    return 0


def export(arguments: argparse.Namespace) -> int:
    from .onnx import default_dtype, export_onnx

    writing.check_writable(arguments.out)
    with _output(arguments):
        detector = persistence.load(arguments.model)
        export_onnx(detector, arguments.out, dtype=arguments.dtype)
    dtype = arguments.dtype or default_dtype(detector)
    result = {
        "out": arguments.out,
        "score": detector.score_.name,
        "input": {"name": "X", "dtype": dtype, "shape": ["N", detector.n_features_in_]},
        "output": {"name": "novelty", "dtype": dtype, "shape": ["N"]},
        "threshold": -detector.offset_,
    }
    _print(
        arguments,
        result,
        f"{arguments.out}: {detector.score_.name}, X [N, {detector.n_features_in_}] of {dtype} -> novelty [N]; novel "
        f"above {-detector.offset_:.4g}",
    )
    return 0


def images(arguments: argparse.Namespace) -> int:
    image_set = datasets.load(arguments.data, arguments.data_dir)
    out = Path(arguments.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out}: expected a new or empty folder")
    for row, label in enumerate(image_set.labels.tolist()):
        # A set without a test part: every fifth image is for testing.
        test = row % 5 == 4 if image_set.train is None else row >= image_set.train
        folder = out / ("test" if test else "train") / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.round(image_set.pixels(row) * 255).astype(np.uint8)
        Image.fromarray(pixels if pixels.ndim == 2 else pixels.transpose(1, 2, 0)).save(folder / f"{row:05d}.png")
    print(f"{out}: {len(image_set)} images")
    return 0


# --- arguments -------------------------------------------------------------------------------------------------------


def _open(arguments: argparse.Namespace) -> tuple[NoveltyDetector, Source]:
    detector = persistence.load(arguments.model, device=arguments.device)
    _warn_of_calibration(detector, arguments.target_fpr)
    if arguments.target_fpr is not None:
        detector.offset_ = -detector.threshold(arguments.target_fpr)
        detector.target_fpr = arguments.target_fpr
    source = _source(
        arguments, image_format=detector.image_format_, part="test",
        fitted_columns=getattr(detector, "feature_names_in_", None),
    )  # fmt: skip
    _print_notes(source, Processes())
    shape = source.shape
    if math.prod(shape) != detector.n_features_in_:
        raise ValueError(
            f"{arguments.data}: expected what {arguments.model} was fit on, {_shaped(detector.input_shape_)}, got "
            f"{_shaped(shape)}"
        )
    return detector, source


def _shaped(shape: Sequence[int]) -> str:
    return f"rows of {shape[0]} columns" if len(shape) == 1 else f"images of {'x'.join(map(str, shape))}"


def _print_notes(source: Source, processes: Processes) -> None:
    if processes.rank == 0 and int(os.environ.get("RANK", "0")) == 0:
        for note in source.notes:
            _tell(f"note: {note}")


def _check_maps(arguments: argparse.Namespace, detector: NoveltyDetector) -> None:
    """Raise ValueError for ``--maps`` if there are no images, or if maps would be written among the data."""
    if arguments.maps is None:
        return
    if not is_image(detector.input_shape_):
        raise ValueError(f"--maps: expected a model of images, but its samples have shape {detector.input_shape_}")
    folder, data = Path(arguments.maps).resolve(), Path(arguments.data).resolve()
    if data.exists() and (folder == data or data in folder.parents or folder in data.parents):
        raise ValueError(f"--maps {arguments.maps}: expected a folder apart from the data, {arguments.data}")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--maps {arguments.maps}: expected a folder, but it is a file")


def _warn_of_calibration(detector: NoveltyDetector, target_fpr: float | None) -> None:
    """Warn of few held-out samples in every command that uses their threshold."""
    if detector.contamination is None or target_fpr is not None:
        rate = detector.fitted_fpr_ if target_fpr is None else target_fpr
        for message in guards.of_calibration(len(detector.calibration_.scores), rate):
            warnings.warn(message, guards.DetectorWarning, stacklevel=2)


def _training(arguments: argparse.Namespace, detector: NoveltyDetector) -> tuple[Source, np.ndarray]:
    """The samples of ``--training``, and the rows of the normal ones; all rows if there are no labels."""
    options = {
        "data_dir": arguments.data_dir,
        "image_format": detector.image_format_,
        "skip_unreadable": arguments.skip_unreadable,
        "part": "train",
        "fitted_columns": getattr(detector, "feature_names_in_", None),
        "columns": arguments.columns,
        "drop": arguments.drop,
    }
    try:
        source = open_source(arguments.training, labels=_label_name(arguments), **options)
    except DatasetError:  # normal samples need no labels; the second try raises any other error
        source = open_source(arguments.training, **options)
    labels = np.full(len(source), "") if source.labels is None else source.labels
    wanted = arguments.normal or source.normal or (["0"] if set(labels) <= {"0", "1"} else [])
    normal = np.isin(labels, wanted)
    return source, np.flatnonzero(normal if normal.any() else ~normal)


def _label_name(arguments: argparse.Namespace) -> str | None:
    """The column or array that ``--labels`` names; None for a file, which has the labels of one set of samples only."""
    return None if arguments.labels is not None and Path(arguments.labels).is_file() else arguments.labels


def _source(arguments: argparse.Namespace, **image_options) -> Source:
    return open_source(
        arguments.data,
        data_dir=arguments.data_dir,
        labels=arguments.labels,
        skip_unreadable=arguments.skip_unreadable,
        columns=arguments.columns,
        drop=arguments.drop,
        **image_options,
    )


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)[x×](\d+)", text)
    if not match:
        raise ValueError(f"--size: expected HxW, such as 28x28, but got {text!r}")
    return int(match[1]), int(match[2])


def _layer(text: str) -> str | tuple[str, ...]:
    names = tuple(text.split(","))
    return names if len(names) > 1 else text


def _normal(source: Source, arguments: argparse.Namespace) -> np.ndarray:
    """Which rows are normal, bool [N]: those with a label of ``--normal``; by default 0 of 0 and 1."""
    if source.labels is None:
        raise DatasetError(f"{arguments.data}: expected labels, but it has none; say where they are with --labels")
    present = sorted(set(source.labels.tolist()))
    if arguments.normal is None and source.normal is not None:
        return np.isin(source.labels, source.normal)
    if arguments.normal is None:
        if not set(present) <= {"0", "1"}:
            shown = ", ".join(present[:12])
            raise ValueError(
                f"--normal: which labels are normal? There are {shown}{', ...' if len(present) > 12 else ''}"
            )
        return source.labels == "0"
    if unknown := sorted(set(arguments.normal) - set(present)):
        raise ValueError(f"--normal: expected some of {', '.join(present[:12])}, but got {', '.join(unknown)}")
    return np.isin(source.labels, arguments.normal)


# --- output ----------------------------------------------------------------------------------------------------------

INPUTS = {"data": "the data", "model": "the model", "labels": "the file of labels", "training": "the training data"}


@contextlib.contextmanager
def _output(arguments: argparse.Namespace) -> Iterator[None]:
    """Lock ``--out`` for this command; raises if it is one of the inputs, or if another process writes it."""
    inputs = {what: getattr(arguments, name, None) for name, what in INPUTS.items()}
    name = str(getattr(arguments, "data", "")).partition(":")[0]
    if name in datasets.NAMES:
        inputs[f"the set {name}"] = arguments.data_dir or os.environ.get("GRADEXT_DATA")
    writing.refuse_inputs(arguments.out, inputs)
    with writing.alone(arguments.out) if os.environ.get("RANK", "0") == "0" else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def _partial_named(partial: Path) -> Iterator[None]:
    """Print where the finished part is kept, if a command is stopped or cannot write."""
    try:
        yield
    except (KeyboardInterrupt, OSError):
        if partial.exists():
            _tell(f"what is done is kept in {partial}; run the same command again to go on")
        raise


def _called(detector: NoveltyDetector) -> str:
    name = type(detector.model_).__name__
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"


def _skipped(source: Source) -> dict[str, str]:
    for reason in source.skipped.values():
        _tell(f"skipped: {reason}")
    return {source.names[row]: reason for row, reason in source.skipped.items()}


def _print(arguments: argparse.Namespace, result: dict, text: str) -> None:
    print(json.dumps(result, indent=2) if arguments.json else text)


def _tell(text: str) -> None:
    print(text, file=sys.stderr)


@contextlib.contextmanager
def _processes(arguments: argparse.Namespace):
    """The processes that `torchrun` started, each with its own GPU; without torchrun this process alone.

    They exchange statistics and scores, a few megabytes, for which gloo suffices on any device.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Processes()
        return
    if arguments.device == "cuda":
        arguments.device = f"cuda:{os.environ['LOCAL_RANK']}"
    # One trains while the others wait, as long as it takes; where one dies torchrun ends them all.
    torch.distributed.init_process_group("gloo", timeout=timedelta(days=30))
    try:
        yield Processes(torch.distributed.group.WORLD)
    finally:
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def _printed_warnings(by_me: bool = True):
    """Print warnings as one line each on standard error, one of each kind, without file and line of the code.

    by_me: False if another process prints the same.
    """
    told = set()

    def tell(message, *_, **__) -> None:
        kind = str(message).partition(":")[0]
        if by_me and kind not in told:
            told.add(kind)
            _tell(f"warning: {message}")

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = tell
        yield

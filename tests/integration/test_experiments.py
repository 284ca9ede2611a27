"""The experiments: the examples of use in other projects against what they claim to compute, written out; the paper's
results and the machinery of their runs on small generated data."""

import gzip
import importlib
import importlib.util
import io
import json
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.func import functional_call, grad, vmap

from gradext import datasets

pytestmark = pytest.mark.medium

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


def load(name: str):
    # By path: the tests run on the installed package, without the source folder on sys.path.
    if "experiments" not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            "experiments", EXPERIMENTS / "__init__.py", submodule_search_locations=[str(EXPERIMENTS)]
        )
        sys.modules["experiments"] = importlib.util.module_from_spec(spec)
    return importlib.import_module(f"experiments.{name}")


@pytest.fixture
def problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    return model, torch.randn(12, 6, dtype=torch.float64), torch.randint(0, 3, (12,))


def gradients(model, x, y):
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, x, y):
        return nn.functional.cross_entropy(functional_call(model, parameters, (x[None],)), y[None])

    return vmap(grad(loss), (None, 0, 0))(parameters, x, y)


def private_step(model, x, y, **options):
    def losses():
        return nn.functional.cross_entropy(model(x), y, reduction="none")

    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    load("private_training").private_step(model, optimizer, losses, **options)


@pytest.mark.parametrize("max_norm", [0.1, 1.0])
@pytest.mark.parametrize("batch_size", [None, 20])
def test_private_step_is_that_of_clipped_gradients(problem, max_norm, batch_size):
    model, x, y = problem
    found = gradients(model, x, y)
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in found.values()]).norm(dim=0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    private_step(model, x, y, max_norm=max_norm, noise_multiplier=0.0, batch_size=batch_size)
    for name, p in model.named_parameters():
        mean = torch.einsum("b,b...->...", (max_norm / norms).clamp(max=1), found[name]) / (batch_size or len(x))
        torch.testing.assert_close(p.detach(), before[name] - mean)
        assert p.grad is None


def test_private_noise_has_the_scale_it_should(problem):
    model, x, y = problem
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    steps = []
    for seed in range(300):
        torch.nn.utils.vector_to_parameters(before.clone(), model.parameters())
        generator = torch.Generator().manual_seed(seed)
        private_step(model, x, y, max_norm=0.5, noise_multiplier=2.0, generator=generator)
        steps.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    deviation = torch.stack(steps).std(0).mean().item()
    assert deviation == pytest.approx(0.5 * 2.0 / len(x), rel=0.03)


def test_influence_is_the_inner_product_with_the_preconditioned_gradient(problem):
    model, x, y = problem
    influence = load("influence").influence(model, (x[:8], y[:8]), (x[8:], y[8:]), damping=1e14)
    # Damping that outweighs the Fisher matrix leaves the plain inner product, layer by layer up to its scale.
    found = gradients(model, x, y)
    dots = 0
    with torch.no_grad():
        inputs = {"0.weight": x[:8], "2.weight": model[:2](x[:8])}
    for name, a in inputs.items():
        delta = found[name.replace("weight", "bias")][:8]
        scale = 1e14 * a.square().mean() * delta.square().mean()
        dots += (found[name][:8].flatten(1) @ found[name][8:].mean(0).flatten()) / scale
    torch.testing.assert_close(influence, dots, rtol=1e-5, atol=0)


def test_nearest_gradients(problem):
    model, x, y = problem
    nearest = load("influence").nearest(model, (x, y), (x[:5], y[:5]), 2)
    assert nearest[:, 0].tolist() == list(range(5))


def test_importance_weights_leave_the_mean_gradient_unchanged(problem):
    model, x, y = problem
    torch.manual_seed(0)
    module = load("importance_sampling")
    rows, weights = module.draw(model, x, y, 200_000)
    found = gradients(model, x, y)
    for name in found:
        mean = found[name].mean(0)
        drawn = torch.zeros(len(x), dtype=torch.float64).index_add(0, rows, weights)
        estimate = torch.einsum("b,b...->...", drawn, found[name])
        assert (estimate - mean).norm() < 0.02 * found[name].flatten(1).norm(dim=1).mean()
    assert module.variance(model, x, y, 4, uniform=False, repeats=400) < module.variance(
        model, x, y, 4, uniform=True, repeats=400
    )


# --- runs ------------------------------------------------------------------------------------------------------------


def test_an_interrupted_run_goes_on_where_it_stopped_and_gives_the_same(tmp_path):
    runs, log = load("runs"), tmp_path / "log.jsonl"
    tasks = [{"k": k, "options": [k, "a"]} for k in range(5)]
    calls = []

    def work(task, fails_at=None):
        if task["k"] == fails_at:
            raise KeyboardInterrupt
        calls.append(task["k"])
        return {"square": task["k"] ** 2}

    with pytest.raises(KeyboardInterrupt):
        runs.run(log, tasks, lambda task: work(task, fails_at=3))
    with log.open("a") as file:
        file.write('{"k": 3, "squ')  # killed while writing
    rows = runs.run(log, tasks, work)
    assert calls == [0, 1, 2, 3, 4], "nothing was run twice"
    assert [(row["k"], row["square"]) for row in rows] == [(k, k * k) for k in range(5)]
    assert [json.loads(line) for line in log.read_text().splitlines()] == rows
    assert all({"command", "commit", "versions", "machine", "seconds"} <= row.keys() for row in rows)
    runs.run(log, [{**tasks[0], "options": [0, "b"]}], work)
    assert calls == [0, 1, 2, 3, 4, 0], "another option is another run"


# --- the paper's results ---------------------------------------------------------------------------------------------


def write_idx(path, array):
    header = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes()
    path.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Ten classes of 8x8 images, each a bright square at a place of its own, in MNIST's files."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "mnist").mkdir()
    rng = np.random.default_rng(0)
    for part, count in (("train", 300), ("t10k", 50)):
        labels = np.arange(count) % 10
        images = rng.integers(0, 60, (count, 8, 8))
        for image, label in zip(images, labels, strict=True):
            image[label % 5 : label % 5 + 2, 3 * (label // 5) : 3 * (label // 5) + 3] += 150
        write_idx(folder / "mnist" / f"{part}-images-idx3-ubyte.gz", images)
        write_idx(folder / "mnist" / f"{part}-labels-idx1-ubyte.gz", labels)
    return folder


@pytest.mark.slow
def test_table1(data_dir, tmp_path, capsys):
    table1 = load("table1")
    small = ["--epochs", "60", "--channels", "0", "--hidden-dim", "32"]
    arguments = ["--quick", *small, "--data-dir", str(data_dir), "--out", str(tmp_path)]
    for seed, *classes in "025", "22", "125":  # one after the other; of seed 2 there are not all classes
        capsys.readouterr()
        table1.main([*arguments, "--seeds", seed, "--classes", *classes])
    rows = [json.loads(line) for line in (tmp_path / "table1-mnist-mlp-quick.jsonl").read_text().splitlines()]
    assert {(row["seed"], row["inlier"]) for row in rows} == {(0, 2), (0, 5), (2, 2), (1, 2), (1, 5)}
    rows = [row for row in rows if row["seed"] != 2]
    means = {name: np.mean([row["auroc"][name] for row in rows]) for name in rows[0]["auroc"]}
    assert means["kronecker_fisher"] > 0.9, "the classes are easy to tell apart"
    text = (tmp_path / "table1-mnist-mlp-quick.md").read_text()
    assert capsys.readouterr().out.strip() == text.strip()
    line = next(line for line in text.splitlines() if line.startswith("| gradient norm "))
    cells = [cell.strip() for cell in line.split("|")[2:-1]]
    assert cells[2] == f"{means['gradient_norm']:.3f}"
    of_seeds = [np.mean([row["auroc"]["gradient_norm"] for row in rows if row["seed"] == s]) for s in (0, 1)]
    assert cells[3] == f"{np.std(of_seeds, ddof=1):.3f}"
    assert "| *0.941* | *0.926* |" in re.sub(" +", " ", text), "the paper's figures stand beside"
    assert str(data_dir) not in text + (tmp_path / "table1-mnist-mlp-quick.jsonl").read_text()


@pytest.mark.slow
def test_ablations(data_dir, tmp_path):
    arguments = ["--quick", "--classes", "2", "--channels", "2", "--data-dir", str(data_dir)]
    load("ablations").main([*arguments, "--out", str(tmp_path)])
    (row,) = load("runs").read(tmp_path / "ablations-mnist-conv-quick.jsonl")
    variants = [row["auroc"][f"gradient{name}, noise 0.1"] for name in ("", ", direction alone", ", magnitude alone")]
    assert len({tuple(values) for values in variants}) == len(variants)
    assert all(0 <= value <= 1 for pair in row["auroc"].values() for value in pair)
    text = (tmp_path / "ablations-mnist-conv-quick.md").read_text()
    assert "convolutional" in text
    assert "blank in half of the inliers" not in text, "these images have no such pixels"


def test_errors_of_ablations_are_means_of_pixels():
    part = SimpleNamespace(reconstruction=torch.tensor([[1.0, 2.0, 3.0], [3.0, 4.0, 7.0]]))
    assert load("ablations").errors(torch.tensor([False, True, True]), part) == [[4.0, 2.0]]


def test_summary(tmp_path):
    table1, summary = load("table1"), load("summary")
    rng = np.random.default_rng(0)

    def rows(folds, shift=0.0):
        auroc = lambda: dict.fromkeys(summary.LABELS, 0.0) | {"gradient_classifier": shift + 0.5 + rng.random() / 4}  # noqa: E731
        return [{"fold": f, "seed": 0, "inlier": c, "auroc": auroc()} for f in folds for c in range(10)]

    plain, beyond = rows([0, 1, 2])[:-1], rows([0], shift=0.2)[3:5]  # of the third run a class is missing
    for name, some in (("mnist", plain), ("mnist-gradcon-10", beyond), ("mnist-quick", rows([7]))):
        (tmp_path / f"table1-{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    summary.main(["--out", str(tmp_path)])
    text = (tmp_path / "summary.md").read_text()
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    first, behind, compared = (line for line in lines if line[:1] == ["gradient classifier"])
    values = np.array([row["auroc"]["gradient_classifier"] for row in plain[:20]]).reshape(2, 10)
    assert first[1] == f"{values.mean():.3f} ± {values.mean(1).std(ddof=1):.3f}"
    assert first[3] == "0.953"
    paper = np.array(table1.PAPER["mnist"]["gradient_classifier"])
    assert behind[1:] == [", ".join(map(str, np.flatnonzero(values.mean(0) < paper))), "", ""]
    means = [np.mean([row["auroc"]["gradient_classifier"] for row in some]) for some in (plain[3:5], beyond)]
    assert compared[1:] == [f"{mean:.3f}" for mean in means]
    assert "Mean of 2 runs, of the classes 3, 4." in text
    plain[0]["epochs"] = 7
    (tmp_path / "table1-mnist.jsonl").write_text("".join(json.dumps(row) + "\n" for row in plain))
    with pytest.raises(ValueError, match="expected runs of the same options"):
        summary.main(["--out", str(tmp_path)])


def test_documents_hold_what_the_summary_prints():
    folder = Path(load("runs").RESULTS)
    printed = (folder / "summary.md").read_text()
    assert load("summary").summary(folder) == printed, "run python -m experiments.summary"
    bare = lambda text: {re.sub(" +", " ", line) for line in text.splitlines() if line.startswith("| ")}  # noqa: E731
    table = printed.split("##")[0]
    assert {line for line in bare(table) if "---" not in line} <= bare((folder.parent / "README.md").read_text())


def test_models_are_added_up_on_the_scale_of_their_held_out_inliers():
    table1 = load("table1")
    rng = np.random.default_rng(0)
    held_out, scores = rng.normal(5, 2, 50), rng.normal(6, 3, 20)

    def result(scale):
        return SimpleNamespace(scores={"s": scale * scores + 1}, held_out={"s": scale * held_out + 1})

    alone, both = (table1.add_up(results)["s"] for results in ([result(1)], [result(1), result(1000)]))
    np.testing.assert_allclose(alone, (scores - held_out.mean()) / held_out.std())
    np.testing.assert_allclose(both, 2 * alone)


@pytest.mark.slow
def test_what_goes_beyond_the_paper_has_a_log_of_its_own_and_says_so(data_dir, tmp_path):
    arguments = ["--quick", "--classes", "4", "--epochs", "2", "--channels", "2", "--data-dir", str(data_dir)]
    for more, name, said in (
        (
            ["--members", "2", "--gradcon", "10", "--direction", "1"],
            "members-2-gradcon-10-direction-1",
            ["sum of that of 2 models", "GradCon's penalty", "directions have length 1"],
        ),
        (["--channels", "0", "--hidden-dim", "16"], "mlp", ["multilayer perceptron, 16 hidden units"]),
    ):
        load("table1").main([*arguments, *more, "--out", str(tmp_path)])
        text = (tmp_path / f"table1-mnist-{name}-quick.md").read_text()
        assert all(part in text for part in said)


@pytest.mark.slow
def test_processes_do_not_change_results(data_dir, tmp_path):
    arguments = ["--quick", "--data-dir", str(data_dir), "--epochs", "2", "--classes", "0", "7", "--channels", "2"]
    load("table1").main([*arguments, "--out", str(tmp_path / "alone")])
    command = [sys.executable, "-m", "experiments.table1", *arguments, "--jobs", "2", "--out", str(tmp_path / "two")]
    subprocess.run(command, cwd=EXPERIMENTS.parent, check=True, capture_output=True)
    alone, two = (
        {row["inlier"]: row["auroc"] for row in load("runs").read(tmp_path / folder / "table1-mnist-quick.jsonl")}
        for folder in ("alone", "two")
    )
    assert alone == two


def test_papers_rows_have_the_averages_that_it_states():
    stated = {
        "mnist": (0.230, 0.718, 0.953),
        "fashion-mnist": (0.818, 0.741, 0.918),
        "cifar-10": (0.542, 0.562, 0.582),
    }
    for dataset, rows in load("table1").PAPER.items():
        for values, average in zip(rows.values(), stated[dataset], strict=True):
            assert np.mean(values) == pytest.approx(average, abs=6e-4), dataset


@pytest.mark.slow
def test_fig2(data_dir, tmp_path):
    fig2 = load("fig2")
    fig2.main(["--quick", "--inlier", "3", "--data-dir", str(data_dir), "--out", str(tmp_path)])
    (row,) = [json.loads(line) for line in (tmp_path / "fig2-quick.jsonl").read_text().splitlines()]
    inside, outside = fig2.parts(row, "gradient_norm")
    assert len(inside) == len(outside) == 7, "a fifth of the 35 images of a digit, and as many outliers"
    share = fig2.overlap(inside, outside)[0]
    assert f"{share:.1%}" in (tmp_path / "fig2-quick.md").read_text()
    with Image.open(tmp_path / "fig2-quick.png") as picture:
        assert picture.width > 3 * picture.height


# --- novel conditions ------------------------------------------------------------------------------------------------


SMALL = ("--quick", "--hidden-dim", "16", "--classifier-dim", "2")


def sign_image(rng, size=32):
    image = np.full((size, size, 3), rng.integers(30, 90), np.uint8)
    image[size // 4 : -size // 4, size // 4 : -size // 4] = (200, 40, 40)
    image[size // 2 - 2 : size // 2 + 2, size // 3 : -size // 3] = 240
    return Image.fromarray(image)


@pytest.fixture
def belgium_dir(tmp_path):
    rng, content, rows = np.random.default_rng(0), {}, ["file,split,class_id,cure_tsr_type"]
    for split, tracks in (("train", 12), ("test", 8)):
        for track in range(tracks):
            for frame in range(3):
                name = f"{split}/00021/{track:05}_{frame:05}.png"
                buffer = io.BytesIO()
                sign_image(rng, 12).save(buffer, "PNG")
                content[name] = buffer.getvalue()
                rows.append(f"{name},{split},21,{'stop' if track else ''}")
    content["images.csv"] = "\n".join(rows).encode()
    folder = tmp_path / "data" / "belgiumtsc"
    folder.mkdir(parents=True)
    with tarfile.open(folder / "belgiumtsc-32.tar.gz", "w:gz") as tar:
        for name, value in content.items():
            info = tarfile.TarInfo(f"belgiumtsc/{name}")
            info.size = len(value)
            tar.addfile(info, io.BytesIO(value))
    return folder.parent


@pytest.mark.slow
def test_stand_in_says_so_everywhere(belgium_dir, tmp_path, capsys):
    fig4 = load("fig4")
    signs = fig4.read_belgiumtsc(belgium_dir)
    assert signs.train.shape == (33, 3, 12, 12), "track 0 has no CURE-TSR type"
    assert len(set(signs.groups)) == 11, "frames of a track are one group"
    out = tmp_path / "out"
    fig4.main([*SMALL, "--data-dir", str(belgium_dir), "--out", str(out)])
    printed = capsys.readouterr().out
    assert printed.startswith(fig4.STAND_IN)
    row = json.loads((out / "fig4-stand-in-quick.jsonl").read_text())
    assert len(row["bands"]["haze"]) == 3
    for newer in ("joint_density", "combined_evidence"):  # scores that older rows lack
        del row["auroc"][newer]
    assert "joint density" not in fig4.render([row], "fig4")
    capsys.readouterr()
    fig4.main([*SMALL, "--data-dir", str(belgium_dir), "--out", str(out)])
    assert f"1 of 1 runs read from {out / 'fig4-stand-in-quick.jsonl'}; --out DIR runs anew" in capsys.readouterr().err
    text = (out / "fig4-stand-in-quick.md").read_text()
    assert fig4.STAND_IN in text
    assert {path.name for path in out.iterdir()} == {
        f"fig4-stand-in-quick{end}" for end in (".jsonl", ".md", ".png", "-conditions.png")
    }
    (row,) = [json.loads(line) for line in (out / "fig4-stand-in-quick.jsonl").read_text().splitlines()]
    assert row["set"] == "stand-in"
    of_haze = row["auroc"]["gradient_norm"]["haze"]
    assert len(of_haze) == 5
    assert abs(of_haze[-1] - 0.5) > 0.4, "dense haze tells every image apart, by more or by less of a gradient"


def test_power_of_a_wave_is_in_the_band_of_its_frequency():
    x = torch.arange(32) / 32
    for cycles in (3, 9):
        wave = torch.cos(2 * torch.pi * cycles * x).expand(1, 3, 32, 32)
        power = load("fig4").band_power(torch.cat([wave, 2 * wave]))
        # The window spreads it by one cycle; two bands away less than a thousandth is left.
        others = [k for k in range(power.shape[1]) if abs(k - cycles) > 1]
        assert power[0, cycles] - power[0, others].max() > np.log(1000)
        torch.testing.assert_close(power[1, cycles] - power[0, cycles], torch.tensor(4.0).double().log())


def test_simulated_conditions_are_seeded_and_grow_with_the_level():
    fig4 = load("fig4")
    images = np.stack([np.asarray(sign_image(np.random.default_rng(k))).transpose(2, 0, 1) for k in range(4)])
    images = (images / 255).astype(np.float32)
    for condition in fig4.CONDITIONS:
        changed = [fig4.simulate(images, condition, level, seed=1) for level in fig4.LEVELS]
        assert np.array_equal(changed[2], fig4.simulate(images, condition, 3, seed=1))
        assert all(c.shape == images.shape and c.dtype == np.float32 and 0 <= c.min() <= c.max() <= 1 for c in changed)
        distance = [float(np.abs(c - images).mean()) for c in changed]
        assert distance == sorted(distance), condition
        assert distance[0] > 0, condition
    with pytest.raises(ValueError, match="level"):
        fig4.simulate(images, "haze", 6)


def write_cure_tsr(folder, seven_fields):
    """A small tree in the format of CURE-TSR: one sign type, every condition of Fig. 4 and one other."""
    rng = np.random.default_rng(0)
    names = {0: "ChallengeFree", 2: "LensBlur", 5: "DirtyLens", 7: "GaussianBlur", 8: "Noise", 9: "Rain", 12: "Haze"}
    for part in ("Real_Train", "Real_Test"):
        for challenge, name in names.items():
            if part == "Real_Train" and challenge:
                continue
            for level in range(1, 6) if challenge else (0,):
                below = folder / part / (f"{name}-{level}" if challenge else name)
                below.mkdir(parents=True)
                for index in range(20 if part == "Real_Train" else 4):
                    file = f"01_05_{challenge:02}_{level:02}_{index:04}.bmp"
                    if seven_fields:
                        file = f"01_01_01_{challenge:02}_{level:02}_05_{index:04}.bmp"
                    image = np.asarray(sign_image(rng, size=20 + index)).astype(float) * (1 - 0.15 * level)
                    Image.fromarray(image.astype(np.uint8)).save(below / file)


@pytest.mark.slow
@pytest.mark.parametrize("seven_fields", [False, True])
def test_fig4_reads_cure_tsr(tmp_path, capsys, seven_fields):
    fig4, out = load("fig4"), tmp_path / "out"
    write_cure_tsr(tmp_path / "CURE-TSR", seven_fields)
    found = datasets.load_cure_tsr(tmp_path / "CURE-TSR")
    assert found.images.shape == (20 + 4 + 6 * 5 * 4, 3, 28, 28)
    assert set(found.sign) == {5}
    assert found.train.sum() == 20
    assert ((found.challenge == 9) & (found.level == 3)).sum() == 4
    fig4.main([*SMALL, "--size", "12", "--data-dir", str(tmp_path), "--out", str(out)])
    assert "STAND-IN" not in capsys.readouterr().out
    (row,) = [json.loads(line) for line in (out / "fig4-cure-tsr-quick.jsonl").read_text().splitlines()]
    assert set(row["auroc"]["gradient_classifier"]) == set(fig4.CONDITIONS)


def test_cure_tsr_refuses_what_it_cannot_read(tmp_path):
    def refused(name, content=b"", match=""):
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        with pytest.raises(datasets.DatasetError, match=match):
            datasets.load_cure_tsr(tmp_path / "tree")
        path.unlink()

    (tmp_path / "tree").mkdir()
    with pytest.raises(datasets.DatasetError, match=re.escape("got none")):
        datasets.load_cure_tsr(tmp_path / "tree")
    refused("Real_Train/ChallengeFree/sign.bmp", match="five or seven numbers")
    refused("Real_Train/ChallengeFree/01_15_00_00_0001.bmp", match="sign type: expected 1 to 14, got 15")
    refused("Real_Train/ChallengeFree/01_05_00_02_0001.bmp", match="challenge level: expected 0 to 0, got 2")
    refused("Real_Train/ChallengeFree/01_05_13_01_0001.bmp", match="challenge type")
    refused("ChallengeFree/01_05_00_00_0001.bmp", match="_Train or _Test")
    refused("Real_Train/ChallengeFree/01_05_00_00_0001.bmp", b"BM cut short", match="damaged or unreadable")
    with pytest.raises(datasets.DatasetError, match="expected a folder"):
        datasets.load_cure_tsr(tmp_path / "nowhere")

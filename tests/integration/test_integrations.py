"""gradext in other people's training loops: each file of experiments/ that is for a library, against that library."""

import copy
import importlib
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradext

pytestmark = [pytest.mark.medium, pytest.mark.filterwarnings("ignore")]  # those of the libraries
EXPERIMENTS = Path(__file__).parents[2] / "experiments"


def load(name: str, *libraries: str):
    """A module of experiments/, by its path: the tests run on the installed package."""
    for library in libraries:
        pytest.importorskip(library, reason=f"{library} is not installed (pip install '.[integrations]')")
    if "experiments" not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            "experiments", EXPERIMENTS / "__init__.py", submodule_search_locations=[str(EXPERIMENTS)]
        )
        sys.modules["experiments"] = importlib.util.module_from_spec(spec)
    return importlib.import_module(f"experiments.{name}")


def flat_jacobian(values: torch.Tensor, model: nn.Module) -> torch.Tensor:
    """∂ values / ∂ parameters by one backward a value -> [values, P]."""
    parameters = list(model.parameters())
    rows = [torch.autograd.grad(v, parameters, retain_graph=True, materialize_grads=True) for v in values.flatten()]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


# --- transformers' Trainer --------------------------------------------------------------------------------------------


@pytest.fixture
def counting():
    counting = load("counting", "transformers")
    torch.manual_seed(0)
    return counting


def trained(trainer_class, model, data, folder, steps=2, **options):
    transformers = importlib.import_module("transformers")
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=4, gradient_accumulation_steps=2, learning_rate=0.1,
        optim="sgd", lr_scheduler_type="constant", max_grad_norm=0, remove_unused_columns=False, report_to=[],
        disable_tqdm=True, use_cpu=True, save_strategy="no",
    )  # fmt: skip
    trainer_class(model, arguments, train_dataset=data, **options).train()
    return model


def test_a_trainer_with_norms_trains_as_the_trainer_does(counting, tmp_path):
    trainer = load("trainer", "transformers", "accelerate")
    transformers = importlib.import_module("transformers")
    model, ids = counting.gpt2(), counting.rows(16)
    labels = ids.where(torch.arange(12) < torch.arange(3, 11).repeat(2)[:, None], -100)  # padded: other lengths
    data = [{"input_ids": x, "labels": y} for x, y in zip(ids, labels, strict=True)]
    want = trained(transformers.Trainer, copy.deepcopy(model), data, tmp_path)
    named = [row | {"sample": k} for k, row in enumerate(data)]
    norms = tmp_path / "norms.jsonl"
    found = trained(trainer.SampleTrainer, copy.deepcopy(model), named, tmp_path, norms_file=norms)
    for p, q in zip(found.parameters(), want.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
    rows = [json.loads(line) for line in norms.read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 0, 1, 1]
    assert sorted(k for row in rows for k in row["samples"]) == list(range(16))
    assert all(all(row["kept"]) for row in rows)
    for row in rows[:2]:  # the weights are still those of the beginning
        for k, norm in zip(row["samples"], row["norms"], strict=True):
            losses, _ = trainer.next_token_losses(model(input_ids=ids[k : k + 1]), labels[k : k + 1])
            assert norm == pytest.approx(flat_jacobian(losses, model).norm().item(), rel=1e-4)


def test_samples_that_are_not_kept_do_not_train(counting, tmp_path):
    trainer = load("trainer", "transformers", "accelerate")
    model, ids = counting.gpt2(), counting.rows(8)
    losses, counts = trainer.next_token_losses(model(input_ids=ids), ids)
    jacobian = flat_jacobian(losses, model)
    limit = jacobian.norm(dim=1).sort().values[3:5].mean()
    want = jacobian[jacobian.norm(dim=1) < limit].sum(0) / counts.sum()
    before = torch.nn.utils.parameters_to_vector(model.parameters())
    labels = ids.where(
        torch.arange(12) > 0, -100
    )  # the first token is nobody's next one, but counts in the Trainer's mean
    data = [{"input_ids": x, "labels": y} for x, y in zip(ids, labels, strict=True)]
    options = {"norms_file": tmp_path / "norms.jsonl", "keep": lambda norms: norms < limit}
    trained(trainer.SampleTrainer, model, data, tmp_path, steps=1, **options)
    moved = (before - torch.nn.utils.parameters_to_vector(model.parameters())) / 0.1
    torch.testing.assert_close(moved, want, rtol=1e-3, atol=1e-5)
    rows = [json.loads(line) for line in options["norms_file"].read_text().splitlines()]
    assert [kept for row in rows for kept in row["kept"]].count(True) == 4


# --- Opacus -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise_multiplier", [0.0, 0.7])
def test_a_private_step_of_gpt2_is_that_of_opacus(counting, noise_multiplier):
    step = load("private_training").private_step
    opacus = pytest.importorskip("opacus", reason="opacus is not installed (pip install '.[integrations]')")
    model, ids = counting.gpt2().double().train(), counting.rows(6)
    other = copy.deepcopy(model)
    assert other.lm_head.weight is other.transformer.wte.weight

    def losses(model, **positions):  # without them Opacus takes the position table's one row for the only sample
        logits = model(input_ids=ids, **positions).logits
        return F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none").sum(1)

    wrapped = opacus.GradSampleModule(other, loss_reduction="sum")
    optimizer = opacus.optimizers.DPOptimizer(
        torch.optim.SGD(other.parameters(), lr=1.0), noise_multiplier=noise_multiplier, max_grad_norm=1.0,
        expected_batch_size=len(ids), generator=torch.Generator().manual_seed(3),
    )  # fmt: skip
    losses(wrapped, position_ids=torch.arange(12).expand(6, 12)).sum().backward()
    optimizer.step()
    optimizer, generator = torch.optim.SGD(model.parameters(), lr=1.0), torch.Generator().manual_seed(3)
    before = torch.nn.utils.parameters_to_vector(model.parameters())
    step(model, optimizer, lambda: losses(model), max_norm=1.0, noise_multiplier=noise_multiplier, generator=generator)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert (mine - theirs).abs().max() < 1e-6  # theirs divides by the norm plus 1e-6
    assert (torch.nn.utils.parameters_to_vector(model.parameters()) - before).norm() > 1e-2


# --- TorchJD ----------------------------------------------------------------------------------------------------------


class Reused(nn.Module):
    """A layer that runs twice, and a head with several outputs."""

    def __init__(self, outputs):
        super().__init__()
        self.a, self.head = nn.Linear(6, 6), nn.Linear(6, outputs)

    def forward(self, x):
        return self.head(torch.tanh(self.a(torch.tanh(self.a(x)))))


@pytest.mark.parametrize("shape", [(), (3,)], ids=["one loss", "three losses"])
def test_the_gramian_is_that_of_torchjd(shape):
    module = load("gramian")
    engine = pytest.importorskip("torchjd.autogram", reason="torchjd is not installed (pip install '.[integrations]')")
    torch.manual_seed(0)
    model, x = Reused(3).double(), torch.randn(5, 6).double()

    def losses(model):
        return model(x).square().sum(1) if not shape else model(x).square()

    with gradext.watch(model) as watch:
        found = losses(model)
    gramian = module.gramian(module.columns_of(watch, found))
    jacobian = flat_jacobian(losses(model), model)
    torch.testing.assert_close(gramian, jacobian @ jacobian.mT)
    other = copy.deepcopy(model)
    engine = engine.Engine(other, batch_dim=0)
    torch.testing.assert_close(gramian, engine.compute_gramian(losses(other)))


@pytest.mark.parametrize("shape", [(), (3,)], ids=["one loss", "three losses"])
def test_a_step_is_that_of_torchjd(shape):
    module = load("gramian")
    engine = pytest.importorskip("torchjd.autogram", reason="torchjd is not installed (pip install '.[integrations]')")
    torch.manual_seed(0)
    model, x = Reused(3).double(), torch.randn(5, 6).double()
    other, weighting = copy.deepcopy(model), lambda gramian: gramian.diagonal() / gramian.sum()

    def losses(model):
        return model(x).square().sum(1) if not shape else model(x).square()

    module.descend(model, torch.optim.SGD(model.parameters(), 0.1), lambda: losses(model), weighting)
    engine = engine.Engine(other, batch_dim=0)
    found = losses(other)
    found.backward(weighting(engine.compute_gramian(found)).view_as(found))
    torch.optim.SGD(other.parameters(), 0.1).step()
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


# --- Laplace ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def laplace():
    module = load("laplace_jacobians", "laplace")
    torch.manual_seed(0)
    layers = (nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3))
    return module, nn.Sequential(*layers).double(), torch.randn(5, 1, 4, 4).double(), torch.tensor([0, 1, 2, 1, 0])


@pytest.mark.parametrize("kind", ["GGN", "EF"])
def test_jacobians_are_those_of_laplace(laplace, kind):
    module, model, x, y = laplace
    curvature = importlib.import_module("laplace.curvature.curvlinops")
    ours, theirs = (cls(model, "classification") for cls in (getattr(module, f"Gradext{kind}"),
                                                               getattr(curvature, f"Curvlinops{kind}")))  # fmt: skip
    outputs = torch.tensor([[0, 2], [1, 1], [2, 0], [0, 1], [2, 1]])
    for mine, other in (
        (ours.jacobians(x), theirs.jacobians(x)),
        (ours.gradients(x, y), theirs.gradients(x, y)),
        (ours.selected_output_jacobians(x, outputs), theirs.selected_output_jacobians(x, outputs)),
        (ours.diag(x, y), theirs.diag(x, y)),
    ):
        torch.testing.assert_close(mine, other)
    assert not ours.jacobians(x)[0].requires_grad


def test_jacobians_are_differentiable(laplace):
    module, model, x, _ = laplace
    x.requires_grad_()
    wanted = [x, *model.parameters()]
    J, f = module.jacobians(model, x, create_graph=True)
    K, g = importlib.import_module("laplace.curvature").CurvatureInterface(model, "regression").jacobians(x, True)
    weights = torch.randn_like(J)
    mine, theirs = (
        torch.autograd.grad((jacobian * weights).sum() + output.square().sum(), wanted)
        for jacobian, output in ((J, f), (K, g))
    )
    torch.testing.assert_close(mine, theirs)


def test_a_laplace_approximation_of_a_subnetwork(laplace):
    module, model, x, y = laplace
    Laplace = importlib.import_module("laplace").Laplace
    curvature = importlib.import_module("laplace.curvature.curvlinops")
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 5)
    found = []
    for backend in (module.GradextGGN, curvature.CurvlinopsGGN):
        torch.manual_seed(0)
        options = {"subnetwork_indices": torch.tensor([0, 3, 9, 20, 30]), "hessian_structure": "full"}
        approximation = Laplace(copy.deepcopy(model), "classification", "subnetwork", backend=backend, **options)
        approximation.fit(data)
        found.append(approximation(x, link_approx="probit"))
    torch.testing.assert_close(*found)


# --- attribution ------------------------------------------------------------------------------------------------------


@pytest.fixture
def attribution():
    torch.manual_seed(0)
    module = load("attribution")
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    return module, model, [(torch.randn(4, 6), torch.randint(3, (4,))) for _ in range(5)]


def test_scores_are_exact_where_the_rank_is_full(attribution, tmp_path):
    module, model, batches = attribution
    rows = module.write(tmp_path / "rows.npy", model, batches, module.losses, count=20, rank=6)
    train = flat_jacobian(torch.cat([module.losses(model, *batch) for batch in batches]), model)
    test = batches[2]
    scores = flat_jacobian(module.losses(model, *test), model) @ train.mT
    projections = module.projected(model, test, module.losses, 6, 0)
    torch.testing.assert_close(projections @ torch.tensor(np.array(rows)).mT, scores, rtol=1e-4, atol=1e-5)
    helpful, harmful = module.query(tmp_path / "rows.npy", projections, 3, block=7)
    assert helpful.tolist() == scores.topk(3).indices.tolist()
    assert harmful.tolist() == scores.topk(3, largest=False).indices.tolist()
    assert len(module.query(tmp_path / "rows.npy", projections, 30, block=7)[0][0]) == 20


def test_a_stopped_run_goes_on_where_it_was(attribution, tmp_path):
    module, model, batches = attribution
    arguments = {"count": 20, "rank": 2, "seed": 3}
    whole = module.write(tmp_path / "whole.npy", model, batches, module.losses, **arguments)
    calls = 0

    def failing(model, x, y):
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return module.losses(model, x, y)

    with pytest.raises(KeyboardInterrupt):
        module.write(tmp_path / "rows.npy", model, batches, failing, **arguments)
    rows = module.write(tmp_path / "rows.npy", model, batches, failing, **arguments)
    assert calls == 3 + 3  # two batches of the first run are not run again
    np.testing.assert_array_equal(rows, whole)


def test_rows_of_another_model_are_refused(attribution, tmp_path):
    module, model, batches = attribution
    module.write(tmp_path / "rows.npy", model, batches, module.losses, count=20, rank=2)
    with torch.no_grad():
        model[0].weight += 1
    with pytest.raises(ValueError, match="another path"):
        module.write(tmp_path / "rows.npy", model, batches, module.losses, count=20, rank=2)
    with pytest.raises(ValueError, match="count: expected the number of samples, which is 20, but got 19"):
        module.write(tmp_path / "other.npy", model, batches, module.losses, count=19, rank=2)


# --- their document ---------------------------------------------------------------------------------------------------

DOCUMENT = EXPERIMENTS.parent / "docs" / "integrations.md"


@pytest.mark.slow
@pytest.mark.parametrize("name", re.findall(r"^python -m experiments\.(\w+)$", DOCUMENT.read_text(), re.M))
def test_the_document_runs(name):
    for library in {"trainer": ["transformers", "accelerate"], "private_gpt2": ["transformers"], "gramian": ["torchjd"],
                    "laplace_jacobians": ["laplace"], "attribution": []}[name]:  # fmt: skip
        pytest.importorskip(library, reason=f"{library} is not installed (pip install '.[integrations]')")
    command = [sys.executable, "-m", f"experiments.{name}"]
    done = subprocess.run(command, cwd=EXPERIMENTS.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()

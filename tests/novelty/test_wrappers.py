"""The wrappers give the values of the libraries that they wrap."""

import numpy as np
import pytest
import torch
from torch import nn

from gradext.novelty import NoveltyDetector

FAST = {"hidden_dim": 16, "latent_dim": 4, "epochs": 20, "random_state": 0}


def test_pyod_has_the_same_scores_under_its_own_verbs(digits):
    pytest.importorskip("pyod")
    from gradext.novelty.pyod import GradientNovelty

    ours = NoveltyDetector("delta_norm", **FAST).fit(digits[0])
    theirs = GradientNovelty(NoveltyDetector("delta_norm", **FAST), contamination=0.05).fit(digits[0])
    np.testing.assert_array_equal(theirs.decision_function(digits[1]), -ours.score_samples(digits[1]))
    np.testing.assert_array_equal(theirs.decision_scores_, -ours.score_samples(digits[0]))
    assert theirs.labels_.mean() == pytest.approx(0.05, abs=0.01)
    assert set(theirs.predict(digits[1])) <= {0, 1}
    assert theirs.predict_proba(digits[1]).shape == (len(digits[1]), 2)
    assert theirs.get_params()["contamination"] == 0.05
    with pytest.raises(ValueError, match="not fitted"):
        GradientNovelty().decision_function(digits[1])


def models():
    torch.manual_seed(0)
    yield "mlp", nn.Sequential(nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 10))
    yield (
        "cnn",
        nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(),
            nn.Linear(216, 10),
        ),
    )  # fmt: skip


@pytest.mark.parametrize(("name", "model"), list(models()))
@pytest.mark.parametrize("selected", [None, "weight", "last"])
@pytest.mark.parametrize("detector", ["GradNorm", "GradUncertainty"])
def test_pytorch_ood_gets_equal_values(name, model, selected, detector, digits, pytorch_ood):
    from gradext.novelty import pytorch_ood as ours

    model = model.double().eval()
    last = [n for n, _ in model.named_parameters() if n.endswith("weight")][-1]
    chosen = {None: None, "weight": lambda n: n.endswith("weight"), "last": lambda n: n == last}[selected]
    x = torch.from_numpy(digits[1][:40]).double()
    options = {"param_filter": chosen} | ({"temperature": 2.0} if detector == "GradNorm" else {})
    expected = getattr(pytorch_ood, detector)(model, **options).predict(x)
    found = getattr(ours, detector)(model, **options).predict(x)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    assert not found.requires_grad


@pytest.mark.parametrize("detector", ["GradNorm", "GradUncertainty"])
def test_pytorch_ood_detectors_write_no_gradient(detector, pytorch_ood, largest_result):
    from gradext.novelty import pytorch_ood as ours

    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 10))
    x = torch.rand(32, 64)
    sizes = {}
    for home in (pytorch_ood, ours):
        with largest_result() as largest:
            getattr(home, detector)(model).predict(x)
        sizes[home] = largest.elements
    assert sizes[ours] <= 64 * 96, "no larger than the weights themselves"
    assert sizes[pytorch_ood] >= 32 * 64 * 96

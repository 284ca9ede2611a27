"""Real models: every parameter that requires grad is in the result, with each sample's own gradient."""

import pytest
import torch

from .judge import judge, unavailable
from .models import MODELS

pytestmark = [pytest.mark.zoo, pytest.mark.filterwarnings("ignore")]  # gradext's own warnings are read in judge.py
QUICK = [name for name, case in MODELS.items() if case.quick]


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the models are tiny
    yield
    torch.set_num_threads(threads)


def check(name: str, B: int) -> None:
    case = MODELS[name]
    reason = unavailable(case)
    if reason:
        pytest.skip(reason)
    verdict = judge(name, B)
    if case.refused:
        assert case.refused in verdict.refused, str(verdict)
    else:
        assert verdict.right, str(verdict)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.zoo_quick if name in QUICK else ()) for name in MODELS]
)
def test_every_parameter_of_each_sample(name):
    check(name, 4)


@pytest.mark.zoo_quick
@pytest.mark.parametrize("name", QUICK)
def test_three_samples(name):
    check(name, 3)

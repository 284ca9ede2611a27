"""The check that stands before every time: it lets right results pass, and no other."""

import math

import pytest
import torch

from .peers import CASES, ROUTES, Problem

B = 5
ROUTE = {route.computes: route for route in reversed(ROUTES.values()) if route.package is None}  # the plain ones


@pytest.mark.parametrize("case", ["small", "sequence", "conv"])
@pytest.mark.parametrize("computes", ROUTE)
def test_wrong_results_are_seen(case, computes):
    problem = Problem(CASES[case], B)
    route = ROUTE[computes]
    result = route.setup(problem)()
    error = problem.expected.error

    def changed(change):
        return [change(part) for part in result] if isinstance(result, (list, tuple)) else change(result)

    assert error(computes, result) <= route.tolerance
    assert error(computes, changed(lambda part: 1.01 * part)) > route.tolerance
    assert error(computes, changed(lambda part: part / B)) > route.tolerance  # the mean in place of the sum
    assert error(computes, changed(lambda part: part * math.nan)) == math.inf
    if computes not in ("sum", "output"):
        assert error(computes, changed(lambda part: part.roll(1, 0))) > route.tolerance
        assert error(computes, changed(lambda part: part[:-1])) == math.inf


@pytest.mark.parametrize("case", CASES)
def test_every_plain_route_is_right(case):
    problem = Problem(CASES[case], 2)
    for key, route in ROUTES.items():
        if route.package is None:
            assert problem.expected.error(route.computes, route.setup(problem)()) <= route.tolerance, key


def test_batches_begin_with_the_same_samples():
    """So that a small batch foretells the time of a large one on the same numbers."""
    small, large = Problem(CASES["conv"], 2), Problem(CASES["conv"], 4)
    torch.testing.assert_close(small.x, large.x[:2], rtol=0, atol=0)
    torch.testing.assert_close(small.model.state_dict(), large.model.state_dict(), rtol=0, atol=0)

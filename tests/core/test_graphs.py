"""make_graphed_layer_grads: its logic without a GPU, by a recorder that calls again instead of replaying.

That a CUDA graph itself does the same is tested in test_gpu.py.
"""

from __future__ import annotations

import contextlib
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import gradext
import gradext.losses
import gradext.rows
from gradext import CaptureError, NonFiniteError, graphs
from gradext.graphs import GraphedLayerGrads

B = 4


class FakeRecorder:
    """What a CUDA graph does, by hand: the same function on the same inputs, into the same results."""

    recording = False  # of any of them

    def capture(self, function):
        self.function = function
        self.results = self.record()
        return self.results

    def replay(self):
        for old, new in zip(tensors_of(self.results), tensors_of(self.record()), strict=True):
            old.copy_(new)

    def record(self):
        FakeRecorder.recording = True
        try:
            return self.function()
        finally:
            FakeRecorder.recording = False


# Their routes differ by device: test_gpu.py holds those of a GPU to the same.
ON_THE_CPU_ALONE = ("gradext.factors", "gradext.ranges", "gradext.backends")


def tensors_of(results) -> list[Tensor]:
    results = dict(results) if isinstance(results, dict) else results
    return [leaf for leaf in pytree.tree_leaves(results) if isinstance(leaf, Tensor)]


def waits(function):
    """``function``, which waits for the GPU, where no graph is being recorded."""

    def checked(*args, **kwargs):
        caller = sys._getframe(1).f_globals["__name__"]
        assert not FakeRecorder.recording or caller.startswith(ON_THE_CPU_ALONE), "waits for the GPU in a recording"
        return function(*args, **kwargs)

    return checked


@pytest.fixture(autouse=True)
def _recording_forbids_to_wait(monkeypatch):
    for name in ("__bool__", "__int__", "__float__", "__index__", "item", "tolist", "nonzero", "isfinite"):
        monkeypatch.setattr(Tensor, name, waits(getattr(Tensor, name)))
    monkeypatch.setattr(gradext.rows, "capturing", lambda tensor: FakeRecorder.recording)
    refuse = gradext.losses._refuse_outside_unit_interval  # which is asked on the CPU alone
    on_gpu = lambda target, asked: None if FakeRecorder.recording else refuse(target, asked)  # noqa: E731
    monkeypatch.setattr(gradext.losses, "_refuse_outside_unit_interval", on_gpu)


def test_each_gpu_is_recorded_on_a_stream_of_its_own(monkeypatch):
    """On the stream of another GPU the recording would stay empty, and a replay leave the results as they were."""
    recorded = []

    @contextlib.contextmanager
    def graph(graph, pool, stream):
        recorded.append(stream)
        yield

    entered = contextlib.nullcontext
    fakes = {"CUDAGraph": object, "Stream": lambda device=None: [device], "graph": graph, "device": entered}
    for name, fake in (fakes | {"stream": entered, "synchronize": lambda: None}).items():
        monkeypatch.setattr(torch.cuda, name, fake)
    graphs._recording_stream.cache_clear()
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    for device in (first, second, first):
        assert graphs.CudaGraphRecorder(device, 1, None).capture(lambda device=device: device) == device
    graphs._recording_stream.cache_clear()
    assert recorded == [[first], [second], [first]]
    assert recorded[0] is recorded[2]


def record(model, x, **options) -> GraphedLayerGrads:
    return GraphedLayerGrads(model, x, FakeRecorder(), **options)


def autoencoder() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 6), nn.Sigmoid())


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.out = nn.Linear(6, 5), nn.Linear(5, 6)

    def forward(self, x, scale, power=1):
        return self.out(torch.tanh(self.linear(x) * scale) ** power), "and something else"


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"loss": "mse"},
        {"loss": "mse", "layers": "2", "dtype": torch.bfloat16},
        {"loss": lambda output, target: (output - target).abs().sum(1), "layers": ["0"], "backend": "reference"},
        {"fallback": "error", "mixing": "allow", "exclude": "*.bias", "check_finite": True, "loss": "mse"},
    ],
)
def test_equals_batch_layer_grads_on_every_new_input(options):
    model = autoencoder()
    graphed = record(model, torch.rand(B, 6), **options)
    addresses = None
    for k in range(3):
        x = torch.rand(B, 6) + k
        found = graphed(x)
        assert_equal(found, gradext.batch_layer_grads(model, x, **options))
        assert addresses in (None, {name: value.data_ptr() for name, value in found.items()})
        addresses = {name: value.data_ptr() for name, value in found.items()}


def test_takes_tuples_dicts_and_targets():
    model = TwoInputs()
    inputs = [(torch.rand(B, 6), torch.rand(B, 5)) for _ in range(3)]
    targets = [torch.rand(B, 6) for _ in range(3)]
    by_tuple = record(model, inputs[0], loss="mse")
    by_dict = record(model, {"scale": inputs[0][1], "x": inputs[0][0], "power": 2}, loss="mse", target=targets[0])
    for (x, scale), target in zip(inputs, targets, strict=True):
        assert_equal(by_tuple((x, scale)), gradext.batch_layer_grads(model, (x, scale), loss="mse"))
        keywords = {"scale": scale, "x": x, "power": 2}
        expected = gradext.batch_layer_grads(model, keywords, loss="mse", target=target)
        assert_equal(by_dict(keywords, target), expected)
    with pytest.raises(ValueError, match=r"x: expected 2 as in the sample that was recorded, but got 3"):
        by_dict({**keywords, "power": 3}, target)


def test_weights_and_buffers_may_change_in_place():
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 6)).eval()
    x = torch.rand(B, 6)
    graphed = record(model, x)
    before = graphed(x)["0.weight"].clone()
    other = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 6))
    with torch.no_grad():
        other[1].running_var.add_(3)
    model.load_state_dict(other.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    F.mse_loss(model(x), x).backward()
    optimizer.step()
    assert_equal(graphed(x), gradext.batch_layer_grads(model, x))
    assert not torch.allclose(graphed(x)["0.weight"], before)


def test_reduce_is_recorded_in_place_of_the_products():
    model = autoencoder()
    x = torch.rand(B, 6)
    graphed = record(model, x, reduce=lambda factors: (factors.norm(), factors["2.weight"].gram()))
    for _ in range(2):
        x = torch.rand(B, 6)
        factors = gradext.batch_layer_factors(model, x)
        norms, gram = graphed(x)
        torch.testing.assert_close(norms, factors.norm())
        torch.testing.assert_close(gram, factors["2.weight"].gram())
    with pytest.raises(TypeError, match="dtype"):
        record(model, x, reduce=lambda factors: factors.norm(), dtype=torch.bfloat16)


def test_auto_loss_is_chosen_by_the_model():
    model = autoencoder()
    inside, outside = torch.rand(B, 6), torch.rand(B, 6) + 3
    found = record(model, inside)(outside)["2.weight"]  # BCE, which a replay takes beyond [0, 1] too: p - t
    hidden = model[:2](outside)
    torch.testing.assert_close(found, torch.einsum("bo,bi->boi", model(outside) - outside, hidden))
    with pytest.raises(ValueError, match=r"target: expected values in \[0, 1\] for loss='auto'"):
        record(model, outside)
    assert_equal(record(model[:3], outside)(inside), gradext.batch_layer_grads(model[:3], inside, loss="mse"))


def test_checks_are_made_on_the_sample():
    model = autoencoder()
    spoilt = torch.full((B, 6), torch.nan)
    with pytest.raises(NonFiniteError):
        record(model, spoilt, loss="mse", check_finite=True)
    graphed = record(model, torch.rand(B, 6), loss="mse", check_finite=True)
    assert graphed(spoilt)["0.weight"].isnan().all()

    class Turned(nn.Module):
        def __init__(self, mixing: bool):
            super().__init__()
            self.linear, self.mixing = nn.Linear(6, 6), mixing

        def forward(self, x):
            y = self.linear(x.transpose(0, 1)).transpose(0, 1)
            return y + y.mean(0) if self.mixing else y

    square = torch.rand(B, B, 6)  # as many positions as samples, in exchanged order
    with pytest.raises(CaptureError, match="samples mix"):
        record(Turned(mixing=True), square, loss="mse")
    model = Turned(mixing=False)
    for loss in "mse", "auto":
        assert_equal(record(model, square, loss=loss)(square + 1), gradext.batch_layer_grads(model, square + 1))
    straight = nn.Sequential(nn.Linear(6, 6))
    assert_equal(record(straight, square)(square), gradext.batch_layer_grads(straight, square))


def test_what_has_to_be_read_from_the_gpu_is_done_without_or_refused():
    class Scaled(nn.Module):
        """Its scale has no rule of its own: its gradient is compared with the call itself, but in a recording."""

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.rand(6, 6))

        def forward(self, x):
            return torch.einsum("bi,bj,ij->bj", x, x, self.weight).cumsum(1)

    model, x = Scaled(), torch.rand(B, 6)
    found = record(model, x, loss="mse")(x + 1)
    expected = gradext.batch_layer_grads(model, x + 1, loss="mse")
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found["weight"], expected["weight"])

    class Picked(nn.Module):
        """Which rows are whose, values alone tell."""

        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x):
            order = torch.tensor([2, 0, 3, 1])
            return self.linear(x[order])[order.argsort()]

    model = Picked()
    with pytest.warns(UserWarning, match="one backward a sample"):
        assert gradext.batch_layer_grads(model, x, loss="mse")["linear.weight"].shape == (B, 6, 6)
    with (
        pytest.warns(UserWarning, match="one backward a sample"),
        pytest.raises(CaptureError, match="which a CUDA graph cannot record"),
    ):
        record(model, x, loss="mse")


def test_other_inputs_are_refused_and_leave_everything_usable():
    model = autoencoder()
    x = torch.rand(B, 6)
    graphed = record(model, x, loss="mse")
    for wrong, message in (
        (torch.rand(B + 1, 6), r"x: expected a tensor of shape \(4, 6\) and type torch.float32 on cpu.*got.*\(5, 6\)"),
        (x.double(), "got a tensor of shape .* and type torch.float64"),
        (x.to("meta"), "on meta"),
        ((x, x), "x: expected the structure of the sample"),
        ({"x": x}, "x: expected the structure of the sample"),
        ("x", "but got 'x'"),
    ):
        with pytest.raises(ValueError, match=message):
            graphed(wrong)
    with pytest.raises(ValueError, match="target: expected None as in the sample"):
        graphed(x, x)
    with pytest.raises(ValueError, match=r"target: expected a tensor of shape \(4, 6\).*but got None"):
        record(model, x, target=x)(x)
    assert_equal(graphed(x), gradext.batch_layer_grads(model, x, loss="mse"))
    with pytest.raises(ValueError, match="create_graph: expected False"):
        record(model, x, create_graph=True)


def test_a_changed_model_is_refused():
    model = autoencoder()
    x = torch.rand(B, 6)
    graphed = record(model, x, loss="mse")

    model.train(False)
    with pytest.raises(RuntimeError, match=r"model: expected train\(\) as at the recording, but the module is in eval"):
        graphed(x)
    model.train()
    model[1].eval()
    with pytest.raises(RuntimeError, match=r"model.1: expected train\(\)"):
        graphed(x)
    model.train()
    assert_equal(graphed(x), gradext.batch_layer_grads(model, x, loss="mse"))

    weight = model[2].weight
    for replace in (
        lambda: setattr(model[2], "weight", nn.Parameter(weight.detach().clone())),
        lambda: model[2].register_parameter("weight", None),
    ):
        replace()
        with pytest.raises(RuntimeError, match=r"model.2.weight: expected the memory that was recorded"):
            graphed(x)
        model[2].weight = weight
        graphed(x)
    kept, weight.data = weight.data, weight.data.clone()
    with pytest.raises(RuntimeError, match=r"model.2.weight: expected the memory that was recorded"):
        graphed(x)
    weight.data = kept
    model[1] = nn.Tanh()
    with pytest.raises(RuntimeError, match=r"model: expected the modules of the recording"):
        graphed(x)


def test_inputs_may_require_grad_overlap_or_come_from_inference_mode():
    model = autoencoder()
    with torch.inference_mode():
        sample = torch.rand(1, 6).expand(B, 6)
        graphed = record(model, sample, loss="mse")
        x = torch.rand(B, 6)
        found = {name: value.clone() for name, value in graphed(x).items()}
    assert_equal(found, gradext.batch_layer_grads(model, x, loss="mse"))
    x = torch.rand(B, 6)
    graphed = record(model, sample, loss="mse")
    for given in (x.clone().requires_grad_(), x.mT.contiguous().mT):
        found = graphed(given)
        assert_equal(found, gradext.batch_layer_grads(model, x, loss="mse"))
        assert not any(value.requires_grad for value in found.values())


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.5), nn.Linear(5, 6))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    graphed = record(model, torch.rand(B, 6))
    graphed(torch.rand(B, 6))
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_model_on_no_gpu_is_told():
    with pytest.raises(ValueError, match=r"on one GPU, whose work a CUDA graph records, but they are on cpu"):
        gradext.make_graphed_layer_grads(autoencoder(), torch.rand(B, 6))
    with pytest.raises(ValueError, match="but they are on cpu, meta"):
        gradext.make_graphed_layer_grads(nn.Sequential(autoencoder(), nn.Linear(6, 6, device="meta")), torch.rand(B, 6))
    with pytest.raises(ValueError, match="num_warmup_iters: expected at least 1, but got 0"):
        gradext.make_graphed_layer_grads(autoencoder(), torch.rand(B, 6), num_warmup_iters=0)
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, but got function"):
        gradext.make_graphed_layer_grads(lambda x: x, torch.rand(B, 6))

"""gradext on a GPU: every kernel against fp64 torch; streams, graphs, devices, waits."""

from __future__ import annotations

import copy
import itertools
import threading

import pytest
import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import gradext
from gradext import native, ops
from gradext.backends import BACKENDS, Call, choose, reference
from gradext.errors import BackendError
from gradext.factors import GradFactors
from gradext.losses import bce
from gradext.oracles import vmap_layer_grads

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU, and torch sees none", allow_module_level=True)

DEVICE = torch.device("cuda", torch.cuda.current_device())
TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
KERNELS = ("cuda", "triton")
NAMES = ("outer", "sq_norm", "dot", "linear", "gram")
CANARY = 7.0
# (B, T or None, O, I): ones, odd sizes, rows shorter than 16 bytes, whole and cut vectors, tiles with edges, many T.
SHAPES = [
    *((1, None, 1, 1), (3, None, 5, 7), (2, None, 33, 129), (4, None, 784, 400), (7, None, 10, 16), (2, None, 3, 2)),
    *((5, None, 1, 1030), (5, None, 1030, 1), (2, 1, 6, 35), (3, 2, 17, 9), (2, 5, 34, 48), (2, 33, 70, 65)),
    *((2, 70, 20, 18), (1, 16, 1, 3), (2, 260, 10, 12)),
]


@pytest.fixture(params=KERNELS)
def backend(request):
    reason = BACKENDS[request.param].available()
    if reason is not None:
        pytest.skip(f"backend {request.param}: {reason}")
    return request.param


@pytest.fixture
def no_waiting():
    """Any call that waits for the GPU raises. Kernels and workspaces must have been made before."""

    class NoWaiting:
        def __enter__(self):
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")

        def __exit__(self, *_):
            torch.cuda.set_sync_debug_mode("default")

    yield NoWaiting()
    torch.cuda.set_sync_debug_mode("default")


def factors(B, T, O, I, dtype=torch.float32, seed=0):
    """delta, activation, a reference [O, I] and functionals [3, O, I], drawn on the host."""
    generator = torch.Generator().manual_seed(seed)
    leading = (B,) if T is None else (B, T)
    sizes = ((*leading, O), (*leading, I), (O, I), (3, O, I))
    return [torch.randn(size, generator=generator, dtype=torch.float64).to(DEVICE, dtype) for size in sizes]


def operands(name, delta, activation, gradient, weight):
    if name == "gram":  # another batch of another size
        return delta, activation, delta[1:].clone(), activation[1:].abs()
    return (delta, activation, *{"dot": (gradient,), "linear": (weight,)}.get(name, ()))


def assert_right(name, inputs, value, **options):
    """An error of at most twice that of plain torch in the same type, and a rounding of the largest sum of terms."""
    plain = getattr(reference, name)
    exact = plain(*(x.double() for x in inputs))
    expected = plain(*inputs, **options)
    assert value.shape == expected.shape
    assert value.dtype == expected.dtype
    if value.numel() == 0:
        return
    terms = plain(*(x.double().abs() for x in inputs)).max()
    summed = torch.finfo(reference.accumulation_type(inputs[0].dtype)).eps
    allowed = 2 * (expected.double() - exact).abs().max() + 4 * summed * terms
    error = (value.double() - exact).abs().max()
    assert error <= allowed, f"error {error:.2e}, allowed {allowed:.2e}"  # NaN fails too


# --- right results ---------------------------------------------------------------------------------------------------


def test_kernels_are_the_default():
    """A GPU machine that silently ran plain torch would be the costliest failure."""
    if native.C is not None and native.C.build_config()["cuda"]:
        call = Call(torch.empty(2, 3, device=DEVICE), torch.empty(2, 3, 4, device=DEVICE))
        assert choose("outer", None, "cuda", call) is BACKENDS["cuda"]
        assert native.C.cuda_status()["device_count"] == torch.cuda.device_count()
    assert BACKENDS["triton"].available() is None


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_a_single_product_is_rounded_once(dtype, backend):
    delta, activation, *_ = factors(5, None, 301, 203, dtype)
    exact = delta.double()[:, :, None] * activation.double()[:, None]
    for result_type in TYPES:
        result = ops.outer(delta, activation, dtype=result_type, backend=backend)
        if result_type is dtype or dtype in (torch.bfloat16, torch.float16):  # whose products are exact in fp32
            assert torch.equal(result, exact.to(result_type))
        else:  # rounded to fp32 in between
            eps = max(torch.finfo(kind).eps for kind in (result_type, torch.float32))
            torch.testing.assert_close(result.double(), exact, rtol=2 * eps, atol=eps**2)


@pytest.mark.parametrize(("O", "I"), [(1, 3), (2, 1), (8, 128)])
def test_more_samples_than_a_grid_has_rows(O, I, backend):
    """70,001 is more than the second and third axes of a grid can count."""
    tensors = factors(70_001, None, O, I)
    for name in (name for name in NAMES if name != "gram"):  # of 70,001² numbers
        inputs = operands(name, *tensors)
        assert_right(name, inputs, getattr(ops, name)(*inputs, backend=backend))


@pytest.mark.parametrize("I", [1023, 1024])
@pytest.mark.parametrize("T", [None, 2])
def test_results_beyond_32_bit_indices(T, I, backend):
    """More than 2³¹ elements, and more than 2³² bytes, in one result, every element of it checked."""
    B, O = 2100, 1021
    assert B * O * I > 1 << 31
    if torch.cuda.mem_get_info()[0] < 8 << 30:
        pytest.skip("needs 8 GB of free GPU memory")
    delta, activation, *_ = factors(B, T, O, I, torch.bfloat16)
    out = torch.full((B, O, I), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    ops.outer(delta, activation, out=out, backend=backend)
    for b in range(0, B, 100):
        part = slice(b, b + 100)
        assert_right("outer", (delta[part], activation[part]), out[part])


# --- groups ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_norms_of_all_layers(dtype):
    """Of one position and of many, aligned and not, more than one argument of 4 KB holds: each as fp64 has it."""
    sizes = [(None, 33, 65), (40, 72, 80), (7, 5, 3), (300, 768, 256), (130, 40, 136), (64, 320, 328)]
    layers = [factors(4, *sizes[k % len(sizes)], dtype, seed=k)[:2] for k in range(45)]
    found = ops.sq_norm_group(layers)
    assert found.shape == (45, 4)
    for row, layer in zip(found, layers, strict=True):
        assert_right("sq_norm", layer, row)
    assert torch.equal(found, ops.sq_norm_group(layers))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("T", [None, 3, 300])
def test_sums_over_the_batch_and_projections(T, dtype):
    """As fp64 has them, but for one rounding of each weighted delta to its own type."""
    delta, activation, diag, _ = factors(6, T, 200, 136, dtype)
    left, right = factors(200, None, 16, 1, dtype)[0], factors(136, None, 24, 1, dtype)[0]
    weights = torch.rand(6, device=DEVICE)
    gradients = reference.outer(delta.double(), activation.double())
    squares = gradients.square()
    rounded = torch.finfo(dtype).eps
    summed = 1e-13 if dtype == torch.float64 else 1e-5
    weighted = (weights.double()[:, None, None] * gradients).sum(0)
    for found, exact, allowed in (
        (ops.weighted_sum(delta, activation), gradients.sum(0), summed),
        (ops.weighted_sum(delta, activation, weights), weighted, summed + rounded),
        (ops.project(delta, activation, left, right), left.double().mT @ gradients @ right.double(), summed),
        (ops.square_sum(delta, activation), squares.sum(0), summed),
        (ops.quadratic(delta, activation, diag), (squares * diag.double()).sum((1, 2)), 20 * summed),
    ):
        assert found.dtype == reference.accumulation_type(dtype)
        error = (found.double() - exact).norm() / exact.norm()
        assert error <= allowed


def products(dtype=torch.float32):
    """More than one launch holds, of mixed shapes and types."""
    made = []
    for k in range(20):
        T = 3 if k == 7 else None
        delta, activation, *_ = factors(1 + k % 4, T, 3 + 11 * k, 5 + 7 * k, dtype if k % 5 else torch.float64)
        out = torch.full((len(delta), delta.shape[-1], activation.shape[-1]), float("nan"), device=DEVICE)
        out = out.to(delta.dtype)
        made.append(ops.Product(delta, activation, out))
    return made


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_group_equals_separate_launches(dtype, backend):
    made = products(dtype)
    results = ops.outer_group(made, backend=backend)
    for product, result in zip(made, results, strict=True):
        assert result is product.out
        assert torch.equal(result, ops.outer(product.delta, product.activation, backend=backend))


def test_graph_capture_of_a_group(backend):
    made = products()
    results, graph = record_graph(lambda: ops.outer_group(made, backend=backend))
    expected = [result.clone() for result in ops.outer_group(made, backend=backend)]
    for product in made:
        product.out.fill_(float("nan"))
    graph.replay()
    for result, wanted in zip(results, expected, strict=True):
        assert torch.equal(result, wanted)


def test_norms_are_the_same_bits_every_time(backend):
    for T in (None, 3, 40, 200):
        delta, activation, *_ = factors(2, T, 300, 130)
        first = ops.sq_norm(delta, activation, backend=backend)
        assert all(torch.equal(ops.sq_norm(delta, activation, backend=backend), first) for _ in range(5))


@pytest.mark.parametrize("reduce", [None, lambda factors: factors.norm()], ids=["gradients", "norms"])
def test_graphed_layer_grads(reduce, vae):
    """Replays on other samples, and after the weights have changed in place."""
    graphed = gradext.make_graphed_layer_grads(vae, torch.rand(16, 60, device=DEVICE), loss="bce", reduce=reduce)
    for seed in (1, 2):
        x = torch.rand(16, 60, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
        found = graphed(x)
        if reduce is None:
            assert_close_to_exact(found, vae, x)
        else:
            square = sum(g.square().sum((1, 2)) for g in exact_grads(vae, x).values())
            torch.testing.assert_close(found.double(), square.sqrt(), rtol=1e-4, atol=1e-6)
        with torch.no_grad():
            for parameter in vae.parameters():
                parameter.mul_(0.9)


# --- streams, graphs, waiting, devices -------------------------------------------------------------------------------


def test_kernels_run_in_order_on_the_current_stream(backend):
    """The factors are written late on a side stream: a kernel on any other one would read the old ones."""
    delta, activation, *_ = factors(64, None, 300, 200)
    expected = ops.outer(delta, activation, backend=backend)  # compiles the kernel
    late_delta, out, result = torch.zeros_like(delta), torch.zeros_like(expected), torch.zeros_like(expected)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(500_000_000)  # some 250 ms, long enough on a host whose cores are all busy
        late_delta.copy_(delta)
        ops.outer(late_delta, activation, out=out, backend=backend)
        result.copy_(out)
        finished = torch.cuda.Event()
        finished.record()
        assert not finished.query(), "the call waited for the GPU"
    stream.synchronize()
    assert torch.equal(result, expected)


@pytest.mark.parametrize("T", [None, 2, 20])
def test_graph_capture_of_operators(T, backend):
    """A replay computes anew, from what the captured tensors hold then."""
    inputs = factors(8, T, 33, 70, torch.bfloat16)
    out = torch.zeros(8, 33, 70, dtype=torch.bfloat16, device=DEVICE)

    def call():
        return [
            ops.outer(*inputs[:2], out=out, backend=backend),
            *(getattr(ops, name)(*operands(name, *inputs), backend=backend) for name in NAMES),
        ]

    results, graph = record_graph(call)
    for tensor, new in zip(inputs, factors(8, T, 33, 70, torch.bfloat16, seed=1), strict=True):
        tensor.copy_(new)
    graph.replay()
    for name, value in zip(("outer", *NAMES), results, strict=True):
        assert_right(name, operands(name, *inputs), value)


def record_graph(call):
    """The results of a captured call, and the graph; warmed up on a side stream, as torch asks."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return results, graph


class VAE(nn.Module):
    """As the paper's, without what draws samples."""

    def __init__(self, features: int, hidden: int, latent: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(features, hidden), nn.ReLU())
        self.mu, self.logvar = nn.Linear(hidden, latent), nn.Linear(hidden, latent)
        self.decoder = nn.Sequential(
            nn.Linear(latent, hidden), nn.ReLU(), nn.Linear(hidden, features), nn.Sigmoid()
        )  # fmt: skip

    def forward(self, x):
        hidden = self.encoder(x)
        mu = self.mu(hidden)
        return self.decoder(mu), mu, self.logvar(hidden)


@pytest.fixture
def vae():
    torch.manual_seed(0)
    return VAE(60, 40, 5).to(DEVICE).eval()


WEIGHTS = ["decoder.0.weight", "decoder.2.weight"]


def bce_of_first(output, target):
    return bce(output[0], target)


def exact_grads(model, x, names=WEIGHTS):
    """fp64 per-sample gradients by torch.func."""
    return vmap_layer_grads(copy.deepcopy(model).double(), x.double(), bce, names)


def assert_close_to_exact(grads, model, x):
    for name, exact in exact_grads(model, x).items():
        torch.testing.assert_close(grads[name].double(), exact, rtol=1e-4, atol=1e-5)


def test_graph_capture_of_a_whole_call(vae):
    """Forward, partial backward and kernels in one graph; replayed on new data."""
    x = torch.rand(16, 60, device=DEVICE)
    out = {name: torch.empty(16, *vae.get_parameter(name).shape, device=DEVICE) for name in WEIGHTS}
    _, graph = record_graph(lambda: gradext.batch_layer_grads(vae, x, loss="bce", layers=WEIGHTS, out=out))
    for seed in (1, 2):
        x.copy_(torch.rand(16, 60, generator=torch.Generator().manual_seed(seed)))
        for tensor in out.values():
            tensor.fill_(float("nan"))
        graph.replay()
        assert_close_to_exact(out, vae, x)


def test_graph_capture_of_factors(vae):
    x = torch.rand(16, 60, device=DEVICE)
    norm, graph = record_graph(lambda: gradext.batch_layer_factors(vae, x, loss="bce").norm())
    x.copy_(torch.rand(16, 60, generator=torch.Generator().manual_seed(1)))
    graph.replay()
    everything = [name for name, _ in vae.named_parameters()]
    square = sum(g.square().flatten(1).sum(1) for g in exact_grads(vae, x, everything).values())
    torch.testing.assert_close(norm.double(), square.sqrt(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("T", [None, 2, 20])
def test_operators_never_wait_for_the_gpu(T, backend, no_waiting):
    inputs = factors(8, T, 33, 70)
    out = torch.empty(8, 33, 70, device=DEVICE)

    def call():
        ops.outer(*inputs[:2], out=out, backend=backend)
        for name in NAMES:
            getattr(ops, name)(*operands(name, *inputs), backend=backend)

    call()
    with no_waiting:
        call()


@pytest.mark.parametrize("loss", ["auto", "bce", "mse", bce_of_first])
def test_whole_calls_never_wait_for_the_gpu(loss, vae, no_waiting):
    """A named loss or a callable: only check_finite=True must read values."""
    x = torch.rand(16, 60, device=DEVICE)
    reference = {name: torch.ones_like(vae.get_parameter(name)) for name in WEIGHTS}

    def call():
        gradext.batch_layer_grads(vae, x, loss=loss)
        found = gradext.batch_layer_factors(vae, x, loss=loss, layers=WEIGHTS)
        found.cosine(reference)
        found.gram()

    call()
    with no_waiting:
        call()


def test_current_device_is_left_alone(backend):
    """Kernels run on their tensors' device, whatever is the current one."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    inputs = [tensor.to("cuda:1") for tensor in factors(3, None, 33, 70)]
    with torch.cuda.device(0):
        for name in NAMES:
            chosen = operands(name, *inputs)
            assert_right(name, chosen, getattr(ops, name)(*chosen, backend=backend))
        assert torch.cuda.current_device() == 0


def test_graphs_of_two_gpus(vae):
    """Whatever is the current GPU, and whichever was recorded on first."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    for device in ("cuda:0", "cuda:1"):
        model, x = copy.deepcopy(vae).to(device), torch.rand(16, 60, device=device)
        graphed = gradext.make_graphed_layer_grads(model, torch.rand(16, 60, device=device), loss="bce")
        assert_close_to_exact(graphed(x), model, x)


def test_calls_from_many_threads(backend):
    """Each thread on a stream of its own, without the interpreter's lock during the launch."""
    delta, activation, *_ = factors(40, None, 100, 101)
    expected = ops.outer(delta, activation, backend=backend)
    wrong = []

    def work():
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(50):
                    result = ops.outer(delta, activation, backend=backend)
                    wrong.extend([] if torch.equal(result, expected) else [1])
        except Exception as error:
            wrong.append(error)

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# --- errors ----------------------------------------------------------------------------------------------------------


def test_tensors_on_different_devices_are_refused():
    delta, activation, gradient, _ = factors(3, None, 5, 4)
    with pytest.raises(ValueError, match=r"one device for both, but got cuda:\d and cpu"):
        ops.outer(delta, activation.cpu())
    with pytest.raises(ValueError, match=r"reference: expected the factors' device cuda:\d, but got cpu"):
        ops.dot(delta, activation, gradient.cpu())
    with pytest.raises(ValueError, match=r"out: expected a tensor on cuda:\d, but got one on cpu"):
        ops.outer(delta, activation, out=torch.empty(3, 5, 4))
    with pytest.raises(BackendError, match="backend='cpu' does not take tensors on cuda"):
        ops.outer(delta, activation, backend="cpu")


def test_failed_cuda_calls_say_what_and_where_and_leave_nothing_behind():
    if BACKENDS["cuda"].available() is not None:
        pytest.skip(BACKENDS["cuda"].available())
    delta, activation, *_ = factors(2, None, 3, 4)
    out = torch.empty(2, 3, 4, device=DEVICE)
    fields = BACKENDS["cpu"].outer_fields(delta, activation, out)
    message = r"{} failed: .*cudaErrorInvalidDevice.*B=2.*I=4.*device 99"
    with pytest.raises(RuntimeError, match="outer_cuda: " + message.format("cudaSetDevice")):
        native.C.outer_cuda([fields], 99, 0)
    norm = (*fields[:2], *fields[3:13])
    with pytest.raises(RuntimeError, match="sq_norm_cuda: " + message.format("cudaSetDevice")):
        native.C.sq_norm_cuda([norm], [(1, 1)], 0, out.data_ptr(), out.data_ptr(), 99, 0)
    wrong = (*fields[:15], 1, 0)  # from fp64 to fp32
    with pytest.raises(ValueError, match="no kernel for this pair"):
        native.C.outer_cuda([wrong], DEVICE.index, 0)
    assert_right("outer", (delta, activation), ops.outer(delta, activation, backend="cuda"))
    torch.cuda.synchronize()


# --- torch.library, compile, autograd --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name, backend):
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    for T, dtype in itertools.product((None, 3), (torch.float32, torch.bfloat16)):
        inputs = operands(name, *factors(4, T, 5, 3, dtype))
        operator = getattr(torch.ops.gradext, "outer_sum" if name == "outer" and T else name)
        torch.library.opcheck(operator.default, inputs, {"backend": backend}, test_utils=tests)
        inputs = tuple(t.requires_grad_() for t in inputs)
        torch.library.opcheck(operator.default, inputs, {"backend": backend}, test_utils=tests)
        if name == "outer":
            out = torch.empty(4, 5, 3, dtype=dtype, device=DEVICE)
            inputs = tuple(t.detach() for t in inputs)
            torch.library.opcheck(operator.out, inputs, {"out": out, "backend": backend}, test_utils=tests)


@pytest.mark.parametrize("name", NAMES)
def test_compiles_to_one_graph(name):
    """With Inductor, forward and backward, for both kinds of factors."""
    for T in None, 3:
        inputs = [t.requires_grad_() for t in operands(name, *factors(4, T, 20, 17))]
        function = getattr(ops, name)
        compiled = torch.compile(lambda *inputs, function=function: function(*inputs) * 2, fullgraph=True)
        value, expected = compiled(*inputs), function(*inputs) * 2
        torch.testing.assert_close(value, expected)
        found = torch.autograd.grad(value.sum(), inputs)
        for gradient, wanted in zip(found, torch.autograd.grad(expected.sum(), inputs), strict=True):
            torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-4)


def test_compiled_outer_writes_into_out():
    delta, activation, *_ = factors(4, None, 20, 17)
    out = torch.empty(4, 20, 17, device=DEVICE)

    @torch.compile(fullgraph=True)
    def write(delta, activation, out):
        ops.outer(delta * 2, activation, out=out)
        return out.sum()

    total = write(delta, activation, out)
    torch.testing.assert_close(out, reference.outer(delta * 2, activation))
    torch.testing.assert_close(total, out.sum())


@pytest.mark.parametrize("name", NAMES)
def test_first_and_second_derivatives(name):
    for T in None, 2:
        inputs = [t.requires_grad_() for t in operands(name, *factors(3, T, 4, 5, torch.float64))]
        assert torch.autograd.gradcheck(getattr(ops, name), inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(getattr(ops, name), inputs, fast_mode=True)


# --- factors and whole calls -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [None, 4])
def test_factor_algebra_equals_that_of_the_cpu(T):
    delta, activation, gradient, weight = factors(9, T, 12, 10, torch.float64)
    on_gpu, on_cpu = GradFactors(activation, delta), GradFactors(activation.cpu(), delta.cpu())
    left, right, diag = weight[0, :, :3], weight[1].mT[:, :2], gradient.square()
    square = gradient @ gradient.mT, gradient.mT @ gradient
    for name, arguments in {
        "materialize": (),
        "norm": (),
        "sq_norm": (),
        "dot": (gradient,),
        "cosine": (gradient,),
        "gram": (),
        "linear": (weight,),
        "project": (left, right),
        "sketch": (64,),
        "sum": (),
        "mean": (),
        "diag_fisher": (),
        "quadratic": (diag,),
        "quadratic_kron": (square[1], square[0]),
    }.items():
        wanted = getattr(on_cpu, name)(*(a.cpu() if isinstance(a, torch.Tensor) else a for a in arguments))
        found = getattr(on_gpu, name)(*arguments)
        assert found.device == DEVICE, name
        torch.testing.assert_close(found.cpu(), wanted, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
    torch.testing.assert_close(on_gpu.norm(1).cpu(), on_cpu.norm(1))
    assert torch.equal(on_gpu[[1, 3]].delta.cpu(), on_cpu[[1, 3]].delta)


@pytest.mark.parametrize("loss", ["auto", "bce", bce_of_first])
def test_whole_call_equals_torch_func(loss, vae):
    x = torch.rand(33, 60, device=DEVICE)
    out = {name: torch.full((33, *vae.get_parameter(name).shape), float("nan"), device=DEVICE) for name in WEIGHTS}
    for grads in (
        gradext.batch_layer_grads(vae, x, loss=loss),
        gradext.batch_layer_grads(vae, x, loss=loss, layers=WEIGHTS, out=out),
        gradext.batch_layer_grads(vae, x, loss=loss, backend="triton"),
    ):
        assert_close_to_exact(grads, vae, x)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in vae.parameters())


def test_whole_call_in_order_on_a_side_stream(vae):
    """Forward, autograd's own thread and the kernels all follow the caller's stream."""
    x, late = torch.rand(16, 60, device=DEVICE), torch.zeros(16, 60, device=DEVICE)
    gradext.batch_layer_grads(vae, x, loss="bce")
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(x)
        grads = gradext.batch_layer_grads(vae, late, loss="bce")
    stream.synchronize()
    assert_close_to_exact(grads, vae, x)


def test_autocast(vae):
    """bf16 inside the model, fp32 parameters and results: as near to fp64 as autograd under autocast is."""
    x = torch.rand(16, 60, device=DEVICE)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        grads = gradext.batch_layer_grads(vae, x, loss="bce")
        output = vae.decoder[:-1](vae._encode(x)[0])
    total = torch.nn.functional.binary_cross_entropy_with_logits(output.float(), x, reduction="sum")
    parameters = [vae.get_parameter(name) for name in WEIGHTS]
    for name, by_autograd in zip(WEIGHTS, torch.autograd.grad(total, parameters), strict=True):
        assert grads[name].dtype == torch.float32
        exact = exact_grads(vae, x)[name].sum(0)
        error = torch.linalg.vector_norm(grads[name].sum(0) - exact)
        assert error <= 2 * torch.linalg.vector_norm(by_autograd - exact) + 1e-2 * torch.linalg.vector_norm(exact)


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 20), nn.Tanh())
        self.last = nn.Linear(20, 20)
        self.recompute = True

    def forward(self, x):
        return self.last(checkpoint(self.inner, x, use_reentrant=False) if self.recompute else self.inner(x))


def test_checkpointed_modules():
    """Autograd recomputes them in its own thread on CUDA, where they have to meet the same aliases."""
    torch.manual_seed(0)
    model = Checkpointed().to(DEVICE)
    x = torch.rand(8, 20, device=DEVICE)
    grads = gradext.batch_layer_grads(model, x, loss="mse")
    model.recompute = False
    for name, expected in gradext.batch_layer_grads(model, x, loss="mse").items():
        torch.testing.assert_close(grads[name], expected)


def test_function_modes_reach_autograds_own_thread():
    """What capture relies on for checkpoints: the mode of the calling thread sees what the backward itself calls."""

    class Seen(TorchFunctionMode):
        threads = ()

        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is torch.nn.functional.linear:
                self.threads += (threading.get_ident(),)
            return func(*args, **(kwargs or {}))

    model = Checkpointed().to(DEVICE)
    x = torch.rand(8, 20, device=DEVICE, requires_grad=True)
    loss = model(x).sum()
    with Seen() as seen:
        torch.autograd.grad((get_gradient_edge(loss),), (get_gradient_edge(x),))  # tensors would call the mode instead
    assert len(seen.threads) == 2
    assert threading.get_ident() not in seen.threads


def test_samples_are_checked_on_the_gpu(vae):
    """Samples that mix and numbers that are not finite are seen on the device, and raise as on the CPU."""
    x = torch.rand(8, 60, device=DEVICE)
    gradext.batch_layer_grads(vae, x, check_finite=True)
    mixed = nn.Sequential(nn.Linear(60, 8), nn.Softmax(dim=0), nn.Linear(8, 60)).to(DEVICE)
    with pytest.raises(gradext.CaptureError):
        gradext.batch_layer_grads(mixed, x, loss="mse")
    x[3, 0] = float("nan")
    with pytest.raises(gradext.NonFiniteError, match="samples 3"):
        gradext.batch_layer_grads(vae, x, loss="mse", check_finite=True)


def test_novelty_detection_on_the_gpu():
    """Training lowers the loss, and samples look the same to the model on either device."""
    novelty = pytest.importorskip("gradext.novelty")
    torch.manual_seed(0)
    x = torch.rand(64, 36)
    model = novelty.VAE(36, 24, 4).to(DEVICE)
    history = novelty.train(model, x, x[:16], epochs=3, batch_size=16, progress=False)
    assert history.train[-1] < history.train[0]
    on_gpu = novelty.characterize(model, x, batch_size=24)
    on_cpu = novelty.characterize(copy.deepcopy(model).cpu(), x, batch_size=24)
    assert on_gpu.gradient.device == DEVICE
    for found, wanted in (
        (on_gpu.reconstruction, on_cpu.reconstruction),
        (on_gpu.latent, on_cpu.latent),
        (on_gpu.gradient.materialize(), on_cpu.gradient.materialize()),
    ):
        torch.testing.assert_close(found.cpu(), wanted, rtol=1e-3, atol=1e-4)

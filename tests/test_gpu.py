"""Penalties on an NVIDIA GPU: every library that is installed, over the tables that the CPU's tests use.

`ci/gpu` runs it. Without a device, or without a library, its tests are skipped and say why; with REGKERN_GPU=required,
they fail.
"""

import os

import numpy as np
import pytest

import regkern as rk
from regkern.dtypes import DTYPES
from tests import reference
from tests.cases import LAYOUTS, NUMPY_DTYPES, READ_ONLY_LAYOUTS, REGULARIZERS, SIZES, make
from tests.gpu_libraries import LIBRARIES, Cupy, Jax, Torch, library, missing

try:
    from regkern.kernels.cuda.driver import driver

    driver().compute_capability(0)
except (ImportError, RuntimeError) as error:
    if os.environ.get("REGKERN_GPU") == "required":
        raise
    pytest.skip(f"no GPU: {error}", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("default")  # libraries on machines with devices have warnings of their own
STEP = 0.7
REGULARIZER = REGULARIZERS["L1L2"]
EPSILONS = {name: dtype.epsilon for name, dtype in DTYPES.items()}
# The rest, which CUDA kernels evaluate as well.
FAMILY = {
    "huber": rk.Huber(0.3, 0.5),
    "mcp": rk.MCP(0.4, 3.0),
    "scad": rk.SCAD(0.4, 3.7),
    "log_sum": rk.LogSum(0.3, 0.5),
    "rows": rk.GroupLasso(0.3),
    "columns": rk.GroupLasso(0.3, "columns", "sqrt_size"),
    "sparse": rk.SparseGroupLasso(0.1, 0.3),
    "soft_orthogonal": rk.SoftOrthogonal(0.1),
}
GPU_SIZES = sorted({*SIZES, 255, 256, 1023, 1025, 4 * 132 * 256 * 16 + 3, 10_000_019})


@pytest.fixture(params=LIBRARIES)
def arrays(request):
    return LIBRARIES[request.param]()


@pytest.fixture
def cupy():
    return library("cupy")


@pytest.fixture
def torch():
    return library("torch")


def random(shape, dtype, seed=0):
    rng = np.random.default_rng(seed)
    return np.asarray(rng.standard_normal(shape) * (rng.random(shape) > 0.1), NUMPY_DTYPES[dtype])


def assert_scalar(arrays, value, expected, dtype):
    assert arrays.is_own(value)
    assert tuple(value.shape) == ()
    epsilon = EPSILONS["float64"] * 8 if dtype == "float64" else EPSILONS["float32"]
    np.testing.assert_allclose(np.float64(arrays.get(value)), expected, rtol=epsilon)


def assert_array(actual, expected, dtype, magnitude=0.0):
    error = np.abs(np.asarray(actual, np.float64) - expected)
    scale = np.maximum(np.abs(expected), magnitude)
    assert np.all(error <= 3 * EPSILONS[dtype] * scale + 1e-7 * (dtype == "float16"))


EVERY_DTYPE = [(name, dtype) for name, library in LIBRARIES.items() for dtype in library.dtypes]


@pytest.mark.parametrize(("arrays", "dtype"), EVERY_DTYPE, indirect=["arrays"])
@pytest.mark.parametrize("regularizer", REGULARIZERS.values(), ids=REGULARIZERS)
def test_value_gradient_and_prox(arrays, regularizer, dtype):
    host = random((257, 31), dtype)
    x = arrays.put(host)
    assert_scalar(arrays, regularizer(x), reference.value(regularizer, host), dtype)
    value, gradient = regularizer.value_and_grad(x)
    assert_scalar(arrays, value, reference.value(regularizer, host), dtype)
    expected = reference.gradient(regularizer, host)
    assert_array(arrays.get(gradient), expected, dtype)
    assert_array(arrays.get(regularizer.prox(x, STEP)), reference.prox(regularizer, host, STEP), dtype)
    np.testing.assert_array_equal(np.asarray(arrays.get(x), np.float64), np.float64(host))
    if not isinstance(arrays, Jax):
        out = arrays.put(np.full_like(host, 0.5))
        assert regularizer.grad(x, out=out, scale=2.0, accumulate=True) is out
        assert_array(arrays.get(out), 0.5 + 2 * expected, dtype, magnitude=0.5)
        regularizer.prox(out, 0.0, out=out)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("arrays", ["cupy", "torch", "jax"], indirect=True)
@pytest.mark.parametrize("name", FAMILY)
def test_the_family_is_that_of_the_host(arrays, name, dtype):
    regularizer, host = FAMILY[name], random((40, 31), dtype)
    expected, slope = regularizer.value_and_grad(host.astype(np.float64))
    x = arrays.put(host)
    value, gradient = regularizer.value_and_grad(x)
    for found in (regularizer(x), value):
        assert arrays.is_own(found)
        rtol = 1e-12 if dtype == "float64" else 1e-5
        np.testing.assert_allclose(np.float64(arrays.get(found)), expected, rtol=rtol)
    magnitude = np.abs(slope).max()
    assert_array(arrays.get(gradient), slope, dtype, magnitude)
    if name != "soft_orthogonal":
        stepped = regularizer.prox(host.astype(np.float64), STEP)
        assert_array(arrays.get(regularizer.prox(x, STEP)), stepped, dtype, magnitude=1.0)


GROUPS = {
    "few long rows": ((3, 1_000_003), "rows"),
    "many short columns": ((7, 100_003), "columns"),
    "long columns": ((100_003, 7), "columns"),
    "of one": ((1000, 1), "rows"),
    "an axis between": ((40, 50, 60), 1),
    "two axes": ((40, 50, 60), (0, 2)),
}


@pytest.mark.parametrize("arrays", ["cupy", "torch"], indirect=True)
@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_groups(arrays, name, dtype):
    shape, mode = GROUPS[name]
    regularizer, host = rk.GroupLasso(0.3, mode, "sqrt_size"), random(shape, dtype)
    host[0] = 0
    expected, slope = regularizer.value_and_grad(host.astype(np.float64))
    x = arrays.put(host)
    value, gradient = regularizer.value_and_grad(x)
    for found in (regularizer(x), value):
        np.testing.assert_allclose(np.float64(arrays.get(found)), expected, rtol=1e-12 if dtype == "float64" else 1e-6)
    assert_array(arrays.get(gradient), slope, dtype, np.abs(slope).max())
    stepped = regularizer.prox(host.astype(np.float64), STEP)
    assert_array(arrays.get(regularizer.prox(x, STEP)), stepped, dtype, magnitude=1.0)


@pytest.mark.parametrize("arrays", ["cupy", "torch", "jax"], indirect=True)
@pytest.mark.parametrize("weighted", [False, True])
def test_distances_are_those_of_the_host(arrays, weighted):
    x, x0 = random((40, 31), "float32"), random((40, 31), "float32", seed=1)
    w = np.abs(random((40, 31), "float32", seed=2)) if weighted else None

    def distance(put):
        tree = {"*": rk.L1L2(0.3, 0.4)}
        anchored = rk.Penalty(tree).anchored(to={"x": put(x0)}, weights=None if w is None else {"x": put(w)})
        return anchored({"x": put(x)})

    np.testing.assert_allclose(np.float64(arrays.get(distance(arrays.put))), distance(np.float64), rtol=1e-5)


@pytest.mark.parametrize("size", GPU_SIZES)
def test_sizes(cupy, size):
    dtype = list(DTYPES)[size % 4]
    if dtype == "bfloat16":
        dtype = "float32"
    host = random(size, dtype)
    value, gradient = REGULARIZER.value_and_grad(cupy.asarray(host))
    assert_scalar(Cupy(), value, reference.value(REGULARIZER, host), dtype)
    assert_array(gradient.get(), reference.gradient(REGULARIZER, host), dtype)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("name", [*LAYOUTS, *READ_ONLY_LAYOUTS])
def test_layouts(cupy, name, dtype):
    layout = (LAYOUTS | READ_ONLY_LAYOUTS)[name]
    host = make(layout, dtype)
    base = host
    while base.base is not None:
        base = base.base
    offset = host.__array_interface__["data"][0] - base.__array_interface__["data"][0]
    memory = cupy.asarray(base.reshape(-1, order="A"))
    x = cupy.ndarray(host.shape, host.dtype, memory.data + offset, strides=host.strides)
    assert_scalar(Cupy(), REGULARIZER(x), reference.value(REGULARIZER, host), dtype)
    out = cupy.full(host.shape, 0.5, host.dtype)
    REGULARIZER.grad(x, out=out, accumulate=True)
    assert_array(out.get(), 0.5 + reference.gradient(REGULARIZER, host), dtype, magnitude=0.5)
    if name in LAYOUTS:
        REGULARIZER.prox(x, STEP, out=x)
        assert_array(x.get(), reference.prox(REGULARIZER, host, STEP), dtype)


@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_nan_and_infinity_pass(cupy, dtype, special):
    host = random(100_000, dtype)
    host[77_777] = special
    np.testing.assert_equal(np.float64(REGULARIZER(cupy.asarray(host)).get()), abs(special))


def test_sums_are_rounded_once_and_are_the_same_bits_from_run_to_run(cupy):
    host = np.random.default_rng(0).random(10**8, np.float32)
    x = cupy.asarray(host)
    runs = [tuple(np.float32(each.get()) for each in rk.reductions.abs_square_sums(x)) for _ in range(3)]
    assert runs[0] == runs[1] == runs[2]
    exact = host.sum(dtype=np.longdouble), np.square(host, dtype=np.float64).sum(dtype=np.longdouble)
    for found, true in zip(runs[0], exact, strict=True):
        assert abs(float(found) - float(true)) <= np.spacing(np.float32(true))


def test_partial_sums(cupy):
    host = random(1_000_003, "float32")
    partial = REGULARIZER.partial(cupy.asarray(host)).get()
    assert partial.dtype == np.float64
    np.testing.assert_allclose(partial, [np.abs(host).sum(dtype="f8"), np.square(host, dtype="f8").sum()], rtol=1e-12)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("mode", ["rows", "columns"])
@pytest.mark.parametrize("shape", [(1, 5), (2, 1), (33, 70), (300, 64), (1500, 40), (2051, 7)])
def test_orthogonal(arrays, shape, mode, dtype):
    regularizer = rk.OrthogonalRegularizer(0.3, mode)
    host = random(shape if mode == "rows" else shape[::-1], dtype)
    host[0] = 0
    x = arrays.put(host)
    value, gradient = regularizer.value_and_grad(x)
    expected = reference.orthogonal(regularizer, host)
    for found in (regularizer(x), value):
        np.testing.assert_allclose(np.float64(arrays.get(found)), expected, rtol=2e-6, atol=1e-9)
    # A cosine so near to 0 that its sign is another moves a component by two of its terms.
    slope = reference.orthogonal_gradient(regularizer, host)
    tolerance = np.abs(slope).max() * (4 * EPSILONS[dtype] + 1e-5) + 1e-7 * (dtype == "float16") if slope.size else 0.0
    close = np.abs(np.asarray(arrays.get(gradient), np.float64) - slope) <= tolerance
    assert close.mean() > 0.99


@pytest.mark.parametrize(("arrays", "dtype"), EVERY_DTYPE, indirect=["arrays"])
@pytest.mark.parametrize("mode", ["rows", "columns"])
@pytest.mark.parametrize("power", [1, 2])
def test_panels(arrays, mode, dtype, power):
    """Batches of squares and what is left beside them; norms whose products overflow and vanish among others."""
    regularizer, host = rk.OrthogonalRegularizer(0.3, mode, power=power), random((3001, 40), dtype)
    if dtype != "float16":
        host[::100] *= host.dtype.type(1e25)
        host[7::100] *= host.dtype.type(1e-25)
    unit = reference.unit_rows(host).astype(np.float64)
    expected = 0.3 * (np.abs(np.triu(unit @ unit.T, 1)) ** power).sum() / (3001 * 1500)
    x = arrays.put(host if mode == "rows" else np.ascontiguousarray(host.T))
    np.testing.assert_allclose(np.float64(arrays.get(regularizer(x))), expected, rtol=1e-6)


@pytest.mark.parametrize("arrays", ["cupy", "torch"], indirect=True)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("shape", [(33, 70), (70, 33), (1500, 1100), (1100, 1500)])
def test_soft_orthogonal(arrays, shape, dtype):
    regularizer, host = rk.SoftOrthogonal(0.3), random(shape, dtype)
    wide, x = host.astype(np.float64), arrays.put(host)
    error = wide @ wide.T - np.eye(shape[0])
    value, gradient = regularizer.value_and_grad(x)
    for found in (regularizer(x), value):
        np.testing.assert_allclose(np.float64(arrays.get(found)), 0.3 * np.square(error).sum(), rtol=1e-5)
    slope = 4 * 0.3 * error @ wide
    tolerance = np.abs(slope).max() * (4 * EPSILONS[dtype] + 1e-6)
    np.testing.assert_allclose(np.asarray(arrays.get(gradient), np.float64), slope, rtol=0, atol=tolerance)


@pytest.mark.parametrize("arrays", ["cupy", "torch"], indirect=True)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_distances_to_a_reference(arrays, dtype, weighted):
    hosts = [{"a": random((300, 257), dtype, seed), "b": random(5, dtype, seed)} for seed in range(3)]
    x, start, weights = [{name: arrays.put(each) for name, each in host.items()} for host in hosts]
    penalty = rk.Penalty({"*": REGULARIZER}).anchored(to=start, weights=weights if weighted else None)
    bound = penalty.bind(x)
    value, gradients = bound.value_and_grad()
    expected = 0.0
    for name, gradient in gradients.items():
        difference, own = np.float64(hosts[0][name]) - np.float64(hosts[1][name]), 1.0
        if weighted:
            own = np.float64(hosts[2][name])
        terms = REGULARIZER.l1 * np.abs(difference) + REGULARIZER.l2 * difference**2
        expected += (own * terms).sum()
        assert_array(arrays.get(gradient), own * reference.gradient(REGULARIZER, difference), dtype)
    for found in (bound.value(), value):
        np.testing.assert_allclose(np.float64(arrays.get(found)), expected, rtol=1e-12 if dtype == "float64" else 1e-6)
    bound.prox_(0.0)
    assert_array(arrays.get(x["b"]), np.float64(hosts[0]["b"]), dtype, magnitude=4.0)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_torchs_autograd(torch, dtype):
    host = random((64, 33), dtype)
    x = Torch().put(host).requires_grad_()
    (3.0 * REGULARIZER(x)).backward()
    assert_array(Torch().get(x.grad), 3 * reference.gradient(REGULARIZER, host), dtype)
    x.grad = None
    orthogonal = rk.OrthogonalRegularizer(0.3)
    (3.0 * orthogonal(x)).backward()
    slope = 3 * reference.orthogonal_gradient(orthogonal, host)
    np.testing.assert_allclose(Torch().get(x.grad), slope, atol=np.abs(slope).max() * 10 * EPSILONS[dtype] + 1e-6)


@pytest.mark.parametrize("layers", [2, 20])
def test_a_model_on_the_device(torch, layers):
    """Called one by one, and from 16 on together."""
    model = torch.nn.Sequential(*(torch.nn.Linear(20, 20) for _ in range(layers))).cuda()
    loss = rk.Penalty({"*bias": None, "*": REGULARIZER})(model)
    (2 * loss).backward()
    weights = [layer.weight.detach().cpu().numpy() for layer in model]
    np.testing.assert_allclose(loss.item(), sum(reference.value(REGULARIZER, x) for x in weights), rtol=1e-6)
    for layer, x in zip(model, weights, strict=True):
        assert_array(layer.weight.grad.cpu().numpy(), 2 * reference.gradient(REGULARIZER, x), "float32")


@pytest.mark.parametrize("name", ["adamw", "foreach", "fused adamw", "groups"])
def test_an_attached_penalty_trains_as_on_the_host(torch, name):
    """The same weights after the same steps, and the exact zeros of the proximal operator."""
    from regkern.torch import attach
    from tests.attached import OPTIMIZERS, PROX, RULES, batches, mean_square, small

    trained = []
    for device in ("cpu", "cuda"):
        model = small().to(device)
        optimizer = OPTIMIZERS[name](model)
        handle = attach(optimizer, model, RULES, PROX)
        for batch in batches(4):
            optimizer.zero_grad()
            mean_square(model, batch.to(device)).backward()
            optimizer.step()
        value = handle.value()
        assert value.device.type == device
        trained.append([value, *model.parameters()])
    assert (trained[1][1] == 0).any()
    for host, device in zip(*trained, strict=True):
        torch.testing.assert_close(device.detach().cpu(), host.detach(), rtol=1e-4, atol=1e-6)


def test_all_kinds_of_a_model_in_one_penalty(torch):
    """Elements by one launch, the rest beside them; gradients and steps in place."""
    rules = {"a*": REGULARIZER, "b*": rk.OrthogonalRegularizer(0.3), "c*": rk.GroupLasso(0.2), "*": rk.Huber(0.3)}
    named = {name + str(i): random((20, 30), "float32", i) for name in "abcd" for i in range(5)}
    on_device = {name: Torch().put(x) for name, x in named.items()}
    host, bound = rk.Penalty(rules).bind(named), rk.Penalty(rules).bind(on_device)
    np.testing.assert_allclose(bound.value().item(), host.value(), rtol=1e-5)
    for found, expected in zip(bound.value_and_grad()[1].values(), host.value_and_grad()[1].values(), strict=True):
        np.testing.assert_allclose(found.cpu().numpy(), expected, rtol=1e-4, atol=1e-5)
    steps = {"b*": None, **{pattern: each for pattern, each in rules.items() if pattern != "b*"}}
    rk.Penalty(steps).bind(on_device).prox_(0.1)
    rk.Penalty(steps).bind(named).prox_(0.1)
    for name, x in named.items():
        np.testing.assert_allclose(on_device[name].cpu().numpy(), x, rtol=1e-5, atol=1e-6)


def test_compiled_programs_of_jax_and_torch(torch):
    jax, host = Jax(), random((64, 33), "float32")
    for regularizer in (REGULARIZER, rk.OrthogonalRegularizer(0.3), rk.GroupLasso(0.3)):
        expected, slope = regularizer.value_and_grad(host.astype(np.float64))
        value, gradient = jax.jax.jit(jax.jax.value_and_grad(regularizer))(jax.put(host))
        np.testing.assert_allclose(float(value), expected, rtol=1e-5)
        np.testing.assert_allclose(jax.get(gradient), slope, rtol=1e-3, atol=1e-5 * np.abs(slope).max())
        x = Torch().put(host).requires_grad_()
        torch._dynamo.reset()
        compiled = torch.compile(regularizer)(x)
        compiled.backward()
        np.testing.assert_allclose(compiled.item(), expected, rtol=1e-5)
        np.testing.assert_allclose(Torch().get(x.grad), slope, rtol=1e-3, atol=1e-5 * np.abs(slope).max())


def test_an_address_between_elements(cupy):
    x = cupy.zeros(9, np.uint8)[1:].view(np.float32)
    with pytest.raises(ValueError, match="x: expected an address"):
        REGULARIZER(x)
    assert rk.L1(1.0)(cupy.ones(3)) == 3


def test_nothing_waits_for_the_device(torch):
    """While a stream is busy, calls on it return, and their results are right once it is done."""
    host = random(1_000_000, "float32")
    x = Torch().put(host).requires_grad_()
    model, many = {str(i): Torch().put(host[:100]).requires_grad_() for i in range(20)}, rk.Penalty({"*": REGULARIZER})
    (REGULARIZER(x) + many(model)).backward()  # compiled and loaded
    x.grad = model["0"].grad = None
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(2 * 10**9)
        value = REGULARIZER(x)
        value.backward()
        many(model).backward()
        assert not stream.query()
    stream.synchronize()
    assert_array(model["0"].grad.cpu().numpy(), reference.gradient(REGULARIZER, host[:100]), "float32")
    np.testing.assert_allclose(value.item(), reference.value(REGULARIZER, host), rtol=1e-6)
    assert_array(x.grad.cpu().numpy(), reference.gradient(REGULARIZER, host), "float32")


def test_cupys_current_stream(cupy):
    host = random(1_000_000, "float32")
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        x = cupy.zeros(host.size, np.float32)
        x.set(host, stream=stream)
        value = REGULARIZER(x)
        stream.synchronize()
    np.testing.assert_allclose(value.get(), reference.value(REGULARIZER, host), rtol=1e-6)


def test_a_graph_of_cuda_captures_the_kernels(torch):
    x = Torch().put(random(100_000, "float32"))
    REGULARIZER(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = REGULARIZER(x)
    x.mul_(2)
    graph.replay()
    np.testing.assert_allclose(value.item(), reference.value(REGULARIZER, x.cpu().numpy()), rtol=1e-6)


def test_errors_leave_the_cpu_as_it_was(cupy):
    with pytest.raises(TypeError, match="dtype"):
        REGULARIZER(cupy.ones(3, np.int64))
    with pytest.raises(ValueError, match="out"):
        REGULARIZER.grad(cupy.ones(3), out=cupy.ones(4))
    assert rk.L1(1.0)(np.ones(3)) == 3


def test_two_devices():
    cupy, torch = library("cupy"), library("torch")
    if cupy.cuda.runtime.getDeviceCount() < 2:
        missing("one device")
    with cupy.cuda.Device(1):
        x = cupy.ones(1000, np.float32)
    value = rk.L1(1.0)(x)
    assert value.device.id == 1
    assert value.get() == 1000
    total = rk.Penalty({"*": rk.L1(1.0)})({"here": cupy.ones(10, np.float32), "there": x})
    assert total.device.id == 0
    assert total.get() == 1010
    tensors = {f"w{i}": torch.ones(10, device=f"cuda:{i % 2}", requires_grad=True) for i in range(40)}
    total = rk.Penalty({"*": rk.L1(1.0)})(tensors)
    assert (total.get_device(), total.item()) == (0, 400)
    total.backward()
    assert all((w.grad == 1).all() and w.grad.device == w.device for w in tensors.values())

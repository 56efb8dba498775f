"""PyTorch: tensors for factors, steps and scales, gradients to them, and compiled functions in which they change."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import regkern as rk
from tests.cases import PENALTIES, WITHOUT_PROX, kinds, penalties

TWO_AXES = penalties("filters", "batch")
RATES = [0.1, 0.05, 0.03, 0.02, 0.01]
MOST = {"floats": 4, "tensors": 2}  # compilations: the first and as many again as may be


def matrix(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def slope(make, x):
    """The derivative by the factor, in which a penalty is linear."""
    return make(1.0)(x.double()) - make(0.0)(x.double())


@kinds(["L1", "L2", "L1L2", "both", "group", "columns", "orthogonal"], often=["both"])
def test_gradients_flow_to_a_factor(name, dtype):
    make, x = PENALTIES[name], matrix(6, 5, dtype=getattr(torch, dtype))
    for factor_dtype in (torch.float32, torch.float64):
        factor = torch.tensor(0.3, dtype=factor_dtype, requires_grad=True)
        y = x.clone().requires_grad_()
        value = make(factor)(y)
        assert value.dtype == make(0.3)(x).dtype
        torch.testing.assert_close(value, make(0.3)(x))
        (2 * value).backward()
        torch.testing.assert_close(factor.grad.double(), 2 * slope(make, x), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(y.grad, make(0.3).grad(x, scale=2.0))
        alone = torch.tensor(0.3, dtype=factor_dtype, requires_grad=True)
        make(alone)(x).backward()
        torch.testing.assert_close(alone.grad, factor.grad / 2)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # by torch's forward mode
@TWO_AXES
def test_factors_under_transformations(name):
    make, x, factors = PENALTIES[name], matrix(6, 5), torch.tensor([0.1, 0.3])

    def penalty(factor, x):
        return make(factor)(x)

    expected = torch.stack([make(0.1)(x), make(0.3)(x)])
    torch.testing.assert_close(torch.func.vmap(penalty, (0, None))(factors, x), expected)
    torch.testing.assert_close(
        torch.func.vmap(penalty)(factors, torch.stack([x, 2 * x])), torch.stack([make(0.1)(x), make(0.3)(2 * x)])
    )
    by_factor, by_x = torch.func.grad(penalty, (0, 1))(factors[1], x)
    torch.testing.assert_close(by_factor.double(), slope(make, x), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(by_x, make(0.3).grad(x))
    assert torch.func.hessian(penalty)(factors[1], x) == 0
    _, tangent = torch.func.jvp(lambda factor: penalty(factor, x), (factors[1],), (torch.tensor(1.0),))
    torch.testing.assert_close(tangent.double(), slope(make, x), rtol=1e-6, atol=1e-6)
    assert torch.autograd.gradcheck(penalty, (factors[1].double().requires_grad_(), x.double().requires_grad_()))


@pytest.mark.parametrize("name", ["L1", "L2", "both", "group"])
def test_steps_under_vmap(name):
    x, steps = matrix(6, 5), torch.tensor([0.1, 0.3])
    regularizer = PENALTIES[name](0.5)
    found = torch.func.vmap(lambda step: regularizer.prox(x, step))(steps)
    torch.testing.assert_close(found, torch.stack([regularizer.prox(x, step.item()) for step in steps]))


def compilations(function, calls):
    """Compile a function as one graph, compare each call with an eager one, and return how often it was compiled."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for arguments in calls:
        torch.testing.assert_close(compiled(*arguments), function(*arguments))
    return counter.frame_count


def rates(kind):
    return RATES if kind == "floats" else [torch.tensor(rate) for rate in RATES]


OTHERS = ["L1", "L2", "L1L2", "columns"]
COMPILED = {
    "call": lambda make, x, rate: make(rate)(x),
    "value and gradient": lambda make, x, rate: make(rate).value_and_grad(x),
    "grad": lambda make, x, rate: make(0.3).grad(x, scale=rate),
    "accumulate": lambda make, x, rate: make(0.3).grad(x, out=torch.ones_like(x), scale=rate, accumulate=True),
    "prox": lambda make, x, rate: make(0.3).prox(x, rate),
}


@pytest.mark.parametrize("kind", MOST)
@pytest.mark.parametrize("names", [["both", "group", "orthogonal"], pytest.param(OTHERS, marks=pytest.mark.slow)])
def test_numbers_that_change_in_compiled_functions(names, kind):
    x = matrix(6, 5)

    def everything(rate):
        return [
            COMPILED[what](PENALTIES[name], x, rate)
            for name in names
            for what in COMPILED
            if what != "prox" or name not in WITHOUT_PROX
        ]

    assert compilations(everything, [(rate,) for rate in rates(kind)]) <= MOST[kind]


def test_gradients_to_a_factor_in_compiled_functions():
    torch._dynamo.reset()
    makes, x = [PENALTIES[name] for name in ("L1L2", "group", "orthogonal")], matrix(6, 5)
    compiled = torch.compile(lambda factor, x: [make(factor)(x) for make in makes], fullgraph=True, backend="aot_eager")
    factor, y = torch.tensor(0.3, requires_grad=True), x.clone().requires_grad_()
    for make, value in zip(makes, compiled(factor, y), strict=True):
        by_factor, by_x = torch.autograd.grad(value, (factor, y), retain_graph=True)
        torch.testing.assert_close(by_factor.double(), slope(make, x), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(by_x, make(0.3).grad(x))


def test_a_factor_that_is_set_reaches_compiled_functions():
    x, ridge, group = matrix(6, 5), rk.L2(0.3), rk.GroupLasso(0.3)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x: (ridge(x), group(x)), fullgraph=True, backend=counter)
    for rate in RATES:
        ridge.l2 = group.factor = rate
        torch.testing.assert_close(compiled(x), (rk.L2(rate)(x), rk.GroupLasso(rate)(x)))
    assert counter.frame_count <= MOST["floats"]
    ridge.l2 = group.factor = factor = torch.tensor(0.3)
    before = counter.frame_count
    for rate in RATES:
        factor.fill_(rate)
        torch.testing.assert_close(compiled(x), (rk.L2(rate)(x), rk.GroupLasso(rate)(x)))
    assert counter.frame_count - before <= MOST["tensors"]


@pytest.mark.slow  # Inductor makes C++ of it
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # by Inductor
def test_a_changing_rate_under_inductor():
    torch._dynamo.reset()
    x = matrix(6, 5)
    compiled = torch.compile(lambda x, rate: rk.L1L2(0.5, 0.1).prox(x, rate), fullgraph=True)
    for rate in RATES[:3]:
        torch.testing.assert_close(compiled(x, rate), rk.L1L2(0.5, 0.1).prox(x, rate))


NETS = {
    "element-wise": {"*bias": None, "0.*": rk.L2(0.1), "*": rk.L1L2(0.1, 0.2)},
    "groups": {"*bias": None, "*": rk.GroupLasso(0.1)},
    "orthogonal": {"*weight": rk.OrthogonalRegularizer(0.1), "*": rk.L1(0.1)},
    "a callable": {"*": lambda x: x.square().sum()},
}


@pytest.mark.parametrize("name", NETS)
def test_a_penalty_of_a_module_is_one_graph(name):
    torch._dynamo.reset()
    torch.manual_seed(0)
    net, penalty = (
        torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2)),
        rk.Penalty(NETS[name]),
    )
    x = matrix(5, 4)

    def loss(net, x):
        return net(x).square().mean() + penalty(net)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for _ in range(3):
        found = []
        for function in (loss, compiled):
            net.zero_grad()
            value = function(net, x)
            value.backward()
            found.append((value.detach(), [parameter.grad for parameter in net.parameters()]))
        torch.testing.assert_close(*found)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.mul_(0.9)
    assert counter.frame_count == 1


def test_penalties_of_each_tensor_of_a_module_are_one_graph():
    net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    both = rk.Penalty(NETS["element-wise"]), rk.Penalty(NETS["orthogonal"])
    compilations(lambda: [penalty.per_tensor(net) for penalty in both], [()])


@pytest.mark.parametrize("count_tied", [False, True])
def test_tied_parameters_count_once_in_a_graph(count_tied):
    penalty = rk.Penalty({"*": rk.L2(0.1)}, count_tied=count_tied)
    compilations(lambda a, b: penalty({"a": a, "b": b, "c": a}), [(matrix(4, 3), matrix(2))])


@pytest.mark.parametrize("count", [3, 40])
@pytest.mark.parametrize("recorded", [False, True])
def test_a_factor_that_is_followed_in_a_penalty(count, recorded):
    named = {f"w{i}": matrix(4, i + 1).requires_grad_(recorded) for i in range(count)}
    factor = torch.tensor(0.3, requires_grad=True)
    regularizer = rk.L1L2(0.1, factor)
    penalty, plain = rk.Penalty({"*": regularizer}), rk.Penalty({"*": rk.L1L2(0.1, 0.3)})
    for _ in range(2):  # as the second time nothing is looked up again
        value = penalty(named)
        torch.testing.assert_close(value, plain(named))
        (by_factor,) = torch.autograd.grad(value, factor)
        torch.testing.assert_close(by_factor, sum(x.detach().square().sum() for x in named.values()))
    torch.testing.assert_close(penalty.per_tensor(named), plain.per_tensor(named))
    bound, bound_plain = penalty.bind(named), plain.bind(named)
    assert not bound.value().requires_grad
    torch.testing.assert_close(bound.value(), bound_plain.value())
    regularizer.l2 = torch.tensor(0.3)
    torch.testing.assert_close(penalty(named), plain(named))
    if not recorded:
        grads, expected = ({name: torch.zeros_like(x) for name, x in named.items()} for _ in range(2))
        bound.add_grad(grads, scale=torch.tensor(0.5))
        bound_plain.add_grad(expected, scale=0.5)
        torch.testing.assert_close(grads, expected)
        copies = {name: x.clone() for name, x in named.items()}
        bound.prox_(torch.tensor(0.5))
        plain.bind(copies).prox_(0.5)
        torch.testing.assert_close(named, copies)

"""What regkern is compared with on a GPU: for each kind of case and peer, a function that makes a call to be timed.

Arrays are made on the device beforehand. A call queues its work and returns; what waits for it is the caller's affair.
A peer that is missing, or that fails, is left out.
"""

import functools

import numpy as np

import regkern as rk
from bench.cases import L1, L2
from bench.formulas import (
    backward,
    jax_orthogonal,
    jax_penalty,
    penalty,
    torch_orthogonal,
    torch_penalty,
    value_and_gradient,
)
from bench.gpu_cases import GpuCase
from bench.peers.registry import Call, Registry
from bench.peers.regkern import ORTHOGONAL, REGULARIZER

peer = Registry()


def prepare(name: str, case: GpuCase) -> Call:
    """Make the call that a peer is timed by."""
    return peer.prepare(case.kind, name, case)


# Arrays


def torch_array(case: GpuCase, shape: tuple[int, ...] | None = None, seed: int = 0):
    import torch

    rows, columns = shape or case.shape
    generator = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn((rows * (1 + case.strided), columns), device="cuda", generator=generator, dtype=torch.float32)
    return (0.05 * x).to(getattr(torch, case.dtype))[:: 1 + case.strided]


def cupy_array(case: GpuCase):
    import cupy

    return cupy.from_dlpack(torch_array(case))


def jax_array(case: GpuCase):
    import jax

    if case.dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    return jax.dlpack.from_dlpack(torch_array(case).contiguous())


def many_sizes(case: GpuCase) -> list[int]:
    """Sizes of a model's tensors: as many small ones as large ones, by their logarithm."""
    count, largest = case.shape
    return np.exp(np.random.default_rng(0).uniform(0, np.log(largest), count)).astype(int).tolist()


def many_tensors(case: GpuCase):
    import torch

    generator = torch.Generator("cuda").manual_seed(0)
    return [0.05 * torch.randn(size, device="cuda", generator=generator) for size in many_sizes(case)]


# Calls


def of_torch(function):
    """Make a peer that calls a function of a tensor."""
    return lambda case: functools.partial(function, torch_array(case))


def of_cupy(function):
    """Make a peer that calls a function of an array of CuPy's."""
    return lambda case: functools.partial(function, cupy_array(case))


def of_jax(function, *, differentiated: bool = False):
    """Make a peer that calls a compiled function of an array of JAX's."""

    def make(case):
        import jax

        return functools.partial(jax.jit(jax.value_and_grad(function) if differentiated else function), jax_array(case))

    return make


def with_backward(function):
    """Make a peer that calls a function of a tensor, and differentiates what it returns."""
    return lambda case: backward(function, [torch_array(case)])


# regkern


@peer("value", "regkern")
def regkern_value(case):
    return (of_torch if case.dtype == "bfloat16" else of_cupy)(REGULARIZER)(case)


peer("launch", "regkern")(of_cupy(REGULARIZER))
peer("value_and_grad", "regkern")(of_cupy(REGULARIZER.value_and_grad))
peer("torch_backward", "regkern")(with_backward(REGULARIZER))
peer("gram", "regkern")(of_torch(ORTHOGONAL))
peer("gram_and_grad", "regkern")(of_torch(ORTHOGONAL.value_and_grad))
peer("group", "regkern")(of_torch(rk.GroupLasso(L1)))
peer("group_columns", "regkern")(of_torch(rk.GroupLasso(L1, "columns")))
peer("group_and_grad", "regkern")(of_torch(rk.GroupLasso(L1).value_and_grad))


@peer("many", "regkern")
def regkern_many(case):
    return _bound(case).value


@peer("many_and_grad", "regkern")
def regkern_many_and_grad(case):
    return _bound(case).value_and_grad


def _bound(case):
    named = {f"kernel{i}": x for i, x in enumerate(many_tensors(case))}
    return rk.Penalty({"*": REGULARIZER}).bind(named)


@peer("step", "regkern")
def regkern_step(case):
    from regkern.torch import attach

    model, optimizer, step = _perceptron(case)
    attach(optimizer, model, {"*bias": None, "*": REGULARIZER})
    return functools.partial(step, lambda: 0.0)


# The machine

_READ = r"""
extern "C" __global__ void read(const uint4* x, unsigned long long n, unsigned* out) {
    unsigned long long i = blockIdx.x * (unsigned long long)blockDim.x + threadIdx.x, step = gridDim.x * blockDim.x;
    unsigned found = 0;
    for (; i + 3 * step < n; i += 4 * step) {
        uint4 a = x[i], b = x[i + step], c = x[i + 2 * step], d = x[i + 3 * step];
        found ^= a.x ^ a.y ^ a.z ^ a.w ^ b.x ^ b.y ^ b.z ^ b.w ^ c.x ^ c.y ^ c.z ^ c.w ^ d.x ^ d.y ^ d.z ^ d.w;
    }
    for (; i < n; i += step) found ^= x[i].x ^ x[i].y ^ x[i].z ^ x[i].w;
    if (found == 0x12345678u) out[0] = found;
}
"""


@peer("value", "bare read")
def bare_read(case):
    import cupy

    x = _bytes(case)
    kernel, out = cupy.RawKernel(_READ, "read"), cupy.zeros(1, "u4")
    blocks = 8 * cupy.cuda.Device().attributes["MultiProcessorCount"]
    return functools.partial(kernel, (blocks,), (256,), (x, np.uint64(x.size // 16), out))


@peer("value_and_grad", "bare copy")
def bare_copy(case):
    import cupy

    x = _bytes(case)
    return functools.partial(cupy.copyto, cupy.empty_like(x), x)


def _bytes(case):
    """Return the bytes of what regkern reads: memory and buses take less power, and clocks are higher, for zeros."""
    import cupy
    import torch

    return cupy.from_dlpack(torch_array(case).ravel().view(torch.uint8))


# CuPy


@peer("value", "cupy")
@peer("launch", "cupy")
def cupy_value(case):
    import cupy

    return of_cupy(functools.partial(penalty, cupy))(case)


@peer("value", "cupy ReductionKernel")
def cupy_reduction_kernels(case):
    import cupy

    x = cupy_array(case)
    result = "T y"
    first = cupy.ReductionKernel("T x", result, "abs(x)", "a + b", "y = a", "0", "abs_sum")
    second = cupy.ReductionKernel("T x", result, "x * x", "a + b", "y = a", "0", "square_sum")
    return lambda: L1 * first(x) + L2 * second(x)


@peer("value", "cuda.compute")
def compute_value(case):
    """A transform and a reduction in one kernel by CCCL; its memory is allocated beforehand."""
    import cupy
    from cuda.compute import OpKind, TransformIterator, make_reduce_into

    x = cupy_array(case)
    l1, l2 = x.dtype.type(L1), x.dtype.type(L2)
    terms, out = TransformIterator(x.ravel(), lambda v: l1 * abs(v) + l2 * v * v), cupy.empty(1, x.dtype)
    arguments = {"d_in": terms, "d_out": out, "op": OpKind.PLUS, "h_init": np.zeros(1, x.dtype)}
    reduce = make_reduce_into(**arguments)
    arguments["num_items"] = x.size
    memory = cupy.empty(reduce(temp_storage=None, **arguments), np.uint8)
    return functools.partial(reduce, temp_storage=memory, **arguments)


@peer("value_and_grad", "cupy")
def cupy_value_and_grad(case):
    import cupy

    return of_cupy(functools.partial(value_and_gradient, cupy))(case)


@peer("many", "cupy")
def cupy_many(case):
    import cupy

    arrays = [cupy.from_dlpack(x) for x in many_tensors(case)]
    return lambda: sum(penalty(cupy, x) for x in arrays)


# torch


def _compiled():
    import torch

    torch._dynamo.reset()  # of a function with several versions, it would come to run the last ones uncompiled
    return torch.compile(torch_penalty, dynamic=False)


def _norms_of(dim, x):
    import torch

    return L1 * torch.linalg.vector_norm(x, dim=dim).sum()


for _kind in ("value", "launch"):
    peer(_kind, "torch")(of_torch(torch_penalty))
for _kind in ("value_and_grad", "torch_backward"):
    peer(_kind, "torch")(with_backward(torch_penalty))
    peer(_kind, "torch.compile")(lambda case: with_backward(_compiled())(case))
peer("value", "torch.compile")(lambda case: of_torch(_compiled())(case))
peer("group", "torch")(of_torch(functools.partial(_norms_of, 1)))
peer("group_columns", "torch")(of_torch(functools.partial(_norms_of, 0)))
peer("group_and_grad", "torch")(with_backward(functools.partial(_norms_of, 1)))
peer("gram", "torch")(of_torch(torch_orthogonal))
peer("gram_and_grad", "torch")(with_backward(torch_orthogonal))


@peer("value", "torch._foreach_norm")
def torch_norms(case):
    return _norms([torch_array(case)])


@peer("many", "torch._foreach_norm")
def torch_many_norms(case):
    return _norms(many_tensors(case))


def _norms(tensors):
    import torch

    def call():
        first, second = torch._foreach_norm(tensors, 1), torch._foreach_norm(tensors, 2)
        return L1 * torch.stack(first).sum() + L2 * torch.stack(second).square().sum()

    return call


@peer("many", "torch")
def torch_many(case):
    tensors = many_tensors(case)
    return lambda: sum(torch_penalty(x) for x in tensors)


@peer("many_and_grad", "torch")
def torch_many_and_grad(case):
    return backward(torch_penalty, many_tensors(case))


@peer("step", "no penalty")
def torch_step_alone(case):
    return functools.partial(_perceptron(case)[2], lambda: 0.0)


@peer("step", "torch")
def torch_step(case):
    model, _, step = _perceptron(case)
    return functools.partial(step, lambda: sum(torch_penalty(layer.weight) for layer in model[::2]))


def _perceptron(case):
    """Return a model, an optimizer, and a function that takes a step with a penalty in the loss."""
    import torch

    layers, width = case.shape
    modules = [each for _ in range(layers) for each in (torch.nn.Linear(width, width), torch.nn.ReLU())]
    model = torch.nn.Sequential(*modules).cuda()
    optimizer, x = torch.optim.AdamW(model.parameters()), torch_array(case, (256, width))

    def step(penalty):
        optimizer.zero_grad()
        (model(x).square().mean() + penalty()).backward()
        optimizer.step()

    return model, optimizer, step


# JAX

for _kind in ("value", "launch"):
    peer(_kind, "jax")(of_jax(jax_penalty))
peer("value_and_grad", "jax")(of_jax(jax_penalty, differentiated=True))
peer("gram", "jax")(of_jax(jax_orthogonal))
peer("gram_and_grad", "jax")(of_jax(jax_orthogonal, differentiated=True))

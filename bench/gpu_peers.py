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


# regkern


@peer("value", "regkern")
def regkern_value(case):
    x = torch_array(case) if case.dtype == "bfloat16" else cupy_array(case)
    return functools.partial(REGULARIZER, x)


@peer("launch", "regkern")
def regkern_launch(case):
    return functools.partial(REGULARIZER, cupy_array(case))


@peer("value_and_grad", "regkern")
def regkern_value_and_grad(case):
    return functools.partial(REGULARIZER.value_and_grad, cupy_array(case))


@peer("torch_backward", "regkern")
def regkern_backward(case):
    return _backward(REGULARIZER, case)


@peer("gram", "regkern")
def regkern_gram(case):
    return functools.partial(ORTHOGONAL, torch_array(case))


@peer("gram_and_grad", "regkern")
def regkern_gram_and_grad(case):
    return functools.partial(ORTHOGONAL.value_and_grad, torch_array(case))


@peer("group", "regkern")
def regkern_group(case):
    return functools.partial(rk.GroupLasso(L1), torch_array(case))


@peer("group_columns", "regkern")
def regkern_group_columns(case):
    return functools.partial(rk.GroupLasso(L1, "columns"), torch_array(case))


@peer("group_and_grad", "regkern")
def regkern_group_and_grad(case):
    return functools.partial(rk.GroupLasso(L1).value_and_grad, torch_array(case))


@peer("many", "regkern")
def regkern_many(case):
    named = {f"kernel{i}": x for i, x in enumerate(many_tensors(case))}
    return rk.Penalty({"*": REGULARIZER}).bind(named).value


@peer("many_and_grad", "regkern")
def regkern_many_and_grad(case):
    named = {f"kernel{i}": x for i, x in enumerate(many_tensors(case))}
    return rk.Penalty({"*": REGULARIZER}).bind(named).value_and_grad


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

    x = cupy_array(case)
    return functools.partial(penalty, cupy, x)


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

    x = cupy_array(case)
    return functools.partial(value_and_gradient, cupy, x)


@peer("many", "cupy")
def cupy_many(case):
    import cupy

    arrays = [cupy.from_dlpack(x) for x in many_tensors(case)]
    return lambda: sum(penalty(cupy, x) for x in arrays)


# torch


@peer("value", "torch")
@peer("launch", "torch")
def torch_value(case):
    return functools.partial(torch_penalty, torch_array(case))


@peer("value", "torch.compile")
def torch_compiled(case):
    return functools.partial(_compiled(), torch_array(case))


def _compiled():
    import torch

    torch._dynamo.reset()  # of a function with several versions, it would come to run the last ones uncompiled
    return torch.compile(torch_penalty, dynamic=False)


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


@peer("value_and_grad", "torch")
def torch_value_and_grad(case):
    return _backward(torch_penalty, case)


@peer("value_and_grad", "torch.compile")
def torch_compiled_value_and_grad(case):
    return _backward(_compiled(), case)


peer("torch_backward", "torch")(torch_value_and_grad)
peer("torch_backward", "torch.compile")(torch_compiled_value_and_grad)


def _backward(penalty, case):
    return backward(penalty, [torch_array(case)])


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


@peer("group", "torch")
def torch_group(case):
    return functools.partial(_norms_of, 1, torch_array(case))


@peer("group_columns", "torch")
def torch_group_columns(case):
    return functools.partial(_norms_of, 0, torch_array(case))


@peer("group_and_grad", "torch")
def torch_group_and_grad(case):
    return _backward(functools.partial(_norms_of, 1), case)


def _norms_of(dim, x):
    import torch

    return L1 * torch.linalg.vector_norm(x, dim=dim).sum()


@peer("gram", "torch")
def torch_gram(case):
    return functools.partial(torch_orthogonal, torch_array(case))


@peer("gram_and_grad", "torch")
def torch_gram_and_grad(case):
    return _backward(torch_orthogonal, case)


# JAX


@peer("value", "jax")
@peer("launch", "jax")
def jax_value(case):
    import jax

    return functools.partial(jax.jit(jax_penalty), jax_array(case))


@peer("value_and_grad", "jax")
def jax_value_and_grad(case):
    import jax

    return functools.partial(jax.jit(jax.value_and_grad(jax_penalty)), jax_array(case))


@peer("gram", "jax")
def jax_gram(case):
    import jax

    return functools.partial(jax.jit(jax_orthogonal), jax_array(case))


@peer("gram_and_grad", "jax")
def jax_gram_and_grad(case):
    import jax

    return functools.partial(jax.jit(jax.value_and_grad(jax_orthogonal)), jax_array(case))

"""JAX arrays and tracers: the CPU kernels inside XLA's programs, JAX's own operations elsewhere.

Arrays on a CUDA device that no transformation of JAX has a part in are read by the CUDA kernels. All else goes through
one primitive, for eager arrays as under any transformation. What it becomes is chosen when a program is lowered: on one
CPU device, and on each device's own piece under `shard_map`, a call of a kernel; on another platform, in a program that
XLA partitions over several devices, and in exports, JAX's own operations.
"""

import functools
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp
from jax.interpreters import ad, batching, mlir

from regkern.arrays.adapter import Adapter, no_partial, require
from regkern.arrays.jax_expressions import OPERATIONS, result_type, widest
from regkern.arrays.layout import group_loops
from regkern.dtypes import DTYPES, complex_advice
from regkern.formulas import ABS, SQUARE
from regkern.kernels.cpu import gram, xla
from regkern.kernels.cpu.xla import VALUE_AND_ONE
from regkern.terms import (
    EACH_SUM,
    ELEMENTS,
    GRADIENT,
    PARTIAL,
    PROX,
    SUMS,
    VALUE,
    VALUE_AND_GRADIENT,
    Norms,
    Operation,
    Parameters,
    Products,
    Term,
)

require("jax", jax.__version__, (0, 5))

from jax import ffi  # noqa: E402
from jax.extend.core import Primitive  # noqa: E402

# The directional derivative, which is what JAX differentiates in reverse; no kernel computes it.
SLOPE = Operation("slope", True)
# A value whose gradient waits for it: where it is a part of a loss that is looked at. Where it is not, XLA leaves the
# value out, and the gradient alone costs nothing beside an optimizer's update.
LOSS = Operation("loss", True)


def _kernel(operation: Operation, term: Term, shape: Sequence[int], dtype: str) -> xla.Call | None:
    """Return the call of a kernel for arrays, of a batch, with one shape; None where there is none."""
    if term.view is ELEMENTS:
        return xla.elementwise_call(operation, term.formula, DTYPES[dtype], math.prod(shape))
    if operation is PARTIAL:
        return None
    if isinstance(term.view, Norms):
        return _groups_call(operation, term.view, tuple(shape), dtype) if term.formula is ABS else None
    view = term.view
    if not isinstance(view, Products) or term.formula not in ((ABS, SQUARE) if view.unit else (SQUARE,)):
        return None
    n, d = reversed(shape) if view.columns else shape
    fold = gram.fold(term)
    if n < 2 and fold != gram.RAW:
        return None
    return xla.gram_call(operation, fold, DTYPES[dtype], n, d, columns=view.columns)


def _groups_call(operation: Operation, view: Norms, shape: tuple[int, ...], dtype: str) -> xla.Call | None:
    """Do so for groups, where one launch is enough for all."""
    itemsize = DTYPES[dtype].itemsize
    strides = tuple(itemsize * math.prod(shape[axis + 1 :]) for axis in range(len(shape)))  # as XLA lays them out
    first, *others = group_loops(shape, strides, strides, view.axes)
    if others:
        return None
    loops = first.groups, first.layout, first.across
    return xla.groups_call(operation, DTYPES[dtype], math.prod(shape), *loops, view.weight(shape))


def _fused(term: Term) -> bool:
    """Whether the forward pass finds the gradient for the price of half of it; else the cotangent goes into it."""
    return isinstance(term.view, Products)


_primitive = Primitive("regkern")
_primitive.multiple_results = True


@functools.partial(jax.jit, static_argnames=("kind", "term", "batch"), inline=True)
def _call(x: Any, words: Any, *rest: Any, kind: Operation, term: Term, batch: int = 0) -> Any:
    """Do one operation, with each piece that the leading `batch` axes count."""
    return _primitive.bind(x, words, *rest, kind=kind, term=term, batch=batch)


def _evaluate(kind: Operation, term: Term, batch: int) -> Callable[..., list[Any]]:
    """Make the function of JAX's own operations that computes what a call does."""

    def function(x: Any, words: Any, *rest: Any) -> list[Any]:
        p = _floats(words, result_type(x))

        def value(x: Any) -> Any:
            return OPERATIONS.value(term, p, x)

        if kind is LOSS:
            return [value(x)]
        if kind is VALUE_AND_ONE:
            return [value(x), jnp.ones((), result_type(x))]
        if kind is SLOPE:
            return [jax.jvp(value, (x,), rest)[1]]
        if kind is GRADIENT:
            return [jax.vjp(value, x)[1](*rest)[0]]
        return [each for each in OPERATIONS.run(kind, term, p, x) if each is not None]

    for _ in range(batch):
        function = _over_leading_axis(function)
    return function


def _over_leading_axis(function: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    return lambda x, words, *rest: jax.vmap(function, in_axes=(0, None, *[0] * len(rest)))(x, words, *rest)


def _words(p: Parameters) -> Any:
    """Write parameters into an array that JAX keeps as it is, though float64 may be switched off.

    They are an operand, not a constant of the program: one that changes from step to step compiles nothing again.
    """
    exact = np.array(p)
    return np.concatenate([exact.view(np.uint32), exact.astype(np.float32).view(np.uint32)])


def _floats(words: Any, dtype: Any) -> Parameters:
    """Read parameters."""
    if dtype == np.float64:
        p = lax.bitcast_convert_type(words[:8].reshape(4, 2), np.float64)
    else:
        p = lax.bitcast_convert_type(words[8:], np.float32)
    return p[0], p[1], p[2], p[3]


def _compute(*operands: Any, **parameters: Any) -> Any:
    with jax.disable_jit(False):  # as JAX's own primitives: under `jax.disable_jit` they are compiled, one by one
        return _call(*operands, **parameters)


def _types(x: Any, words: Any, *rest: Any, kind: Operation, term: Term, batch: int) -> list[Any]:
    gradient = x.update(weak_type=False)
    if kind in (GRADIENT, PROX):
        return [gradient]
    if kind is PARTIAL:
        return [_smaller(x, batch, (2,), widest())]
    value = _smaller(x, batch, (), result_type(x))
    return {VALUE_AND_GRADIENT: [value, gradient], VALUE_AND_ONE: [value, value]}.get(kind, [value])


def _smaller(x: Any, batch: int, shape: tuple[int, ...], dtype: Any) -> Any:
    """Return the type of an array over x's batch axes, distributed as they are."""
    changes = {"shape": (*x.shape[:batch], *shape), "dtype": np.dtype(dtype), "weak_type": False}
    sharding = getattr(x, "sharding", None)  # part of a type since JAX 0.5.1
    if sharding is not None:
        spec = jax.sharding.PartitionSpec(*sharding.spec[:batch], *[None] * len(shape))
        changes["sharding"] = jax.sharding.NamedSharding(sharding.mesh, spec)
    return x.update(**changes)


def _differentiate(
    primals: Sequence[Any], tangents: Sequence[Any], *, kind: Operation, term: Term, batch: int
) -> tuple[Any, Any]:
    x, factors, *rest = primals
    dx, _, *rest_dots = tangents
    parameters = {"term": term, "batch": batch}
    if kind is LOSS:
        # Without an order between the call and the update of a donated x, XLA copies x for the call.
        value, one = _call(x, factors, kind=VALUE_AND_ONE, **parameters)
        (slope,) = _primitive.bind(x, factors, dx, kind=SLOPE, **parameters)
        return [value], [lax.stop_gradient(one) * slope]
    if kind is VALUE:
        if not _fused(term) or x.dtype.itemsize == 2:  # 16 bits would lose a gradient before it is scaled
            value = _call(x, factors, kind=VALUE, **parameters)
            return value, _primitive.bind(x, factors, dx, kind=SLOPE, **parameters)
        value, gradient = _call(x, factors, kind=VALUE_AND_GRADIENT, **parameters)
        return [value], [jnp.sum(gradient * dx, axis=tuple(range(batch, x.ndim)))]
    function = _evaluate(kind, term, batch)
    _, tangents_out = jax.jvp(
        lambda *operands: function(operands[0], factors, *operands[1:]),
        (x, *rest),
        tuple(ad.instantiate_zeros(tangent) for tangent in (dx, *rest_dots)),
    )
    return _call(x, factors, *rest, kind=kind, **parameters), tangents_out


def _transpose(
    cotangents: Sequence[Any], x: Any, factors: Any, dx: Any, *, kind: Operation, **parameters: Any
) -> list[Any]:
    """Return the gradient, scaled by the cotangent of the slope.

    By JAX's operations, for XLA makes them a part of the loop that adds it to the loss's gradient and updates x: a
    kernel's result would be written and read once more (steps of an MLP took 1.1 to 2 times as long).
    """
    (cotangent,) = cotangents
    if isinstance(cotangent, ad.Zero):
        return [None, None, ad.Zero(dx.aval)]
    return [None, None, *_evaluate(GRADIENT, **parameters)(x, factors, cotangent)]


def _batch(
    operands: Sequence[Any], axes: Sequence[Any], *, kind: Operation, term: Term, batch: int
) -> tuple[Any, list[int]]:
    size = next(operand.shape[axis] for operand, axis in zip(operands, axes, strict=True) if axis is not None)

    def in_front(operand: Any, axis: int | None) -> Any:
        if axis is None:
            return jnp.broadcast_to(operand, (size, *operand.shape))
        return jnp.moveaxis(operand, axis, 0)

    x, factors, *rest = operands
    x_axis, _, *rest_axes = axes
    moved = [in_front(operand, axis) for operand, axis in zip(rest, rest_axes, strict=True)]
    results = _call(in_front(x, x_axis), factors, *moved, kind=kind, term=term, batch=batch + 1)
    return results, [0] * len(results)


def _lower_to_operations(ctx: Any, *operands: Any, **parameters: Any) -> Any:
    return mlir.lower_fun(_evaluate(**parameters), multiple_results=True)(ctx, *operands)


def _lower_on_cpu(ctx: Any, *operands: Any, kind: Operation, term: Term, batch: int) -> Any:
    x = ctx.avals_in[0]
    call = None
    if kind is not SLOPE and math.prod(x.shape) > 0 and _has_its_own_memory(ctx.module_context) and _can_call():
        call = _kernel(VALUE if kind is LOSS else kind, term, x.shape[batch:], x.dtype.name)
    if call is None:
        return _lower_to_operations(ctx, *operands, kind=kind, term=term, batch=batch)
    _register(call.target)
    return ffi.ffi_lowering(call.target)(ctx, *operands, **call.attributes)


def _has_its_own_memory(module: Any) -> bool:
    """Whether a program, or the part of it under `shard_map`, runs on one device, of this process."""
    if getattr(module.lowering_parameters, "for_export", False):
        return False
    context = module.axis_context
    if hasattr(context, "num_devices"):
        return bool(context.num_devices == 1)
    if hasattr(context, "manual_axes"):
        return set(context.mesh.axis_names) <= set(context.manual_axes)
    return True


def _can_call() -> bool:
    return xla.available(xla.api_version(ffi.include_dir()))


@functools.cache
def _register(target: str) -> None:
    """Make a handler known to XLA, once."""
    ffi.register_ffi_target(target, xla.capsule(xla.handler(target)), platform="cpu")


_primitive.def_impl(_compute)
_primitive.def_abstract_eval(_types)
ad.primitive_jvps[_primitive] = _differentiate
ad.primitive_transposes[_primitive] = _transpose
batching.primitive_batchers[_primitive] = _batch
mlir.register_lowering(_primitive, _lower_to_operations)
mlir.register_lowering(_primitive, _lower_on_cpu, platform="cpu")


class JaxAdapter(Adapter):
    """Binds the primitive; arrays of JAX are immutable, so results are new ones."""

    compiles = True

    def owns(self, array_type: type) -> bool:
        return issubclass(array_type, jax.Array | jax.core.Tracer)

    def named_arrays(self, model: Any) -> Iterable[tuple[Any, Any]] | None:
        """Name what is in a node of a tree that JAX knows, whosoever class it is of."""
        if jax.tree_util.default_registry.flatten_one_level(model) is None:
            return None
        children = jax.tree_util.tree_flatten_with_path(model, is_leaf=lambda node: node is not model)[0]
        return [(keys(path), child) for path, child in children]

    def run(self, operation: Operation, term: Term, p: Parameters, x: Any, out: Any = None) -> tuple[Any, Any]:
        _refuse(operation, out)
        device, x = _device(), _checked(x)
        if device is not None and device.takes(x, operation, term):
            return device.run(operation, term, p, x)
        return self._evaluate(operation, term, p, x)

    def loss(self, term: Term, p: Parameters, x: Any) -> Any:
        if term.view is not ELEMENTS or not isinstance(x, jax.core.Tracer):
            return self.value(term, p, x)
        return _call(_checked(x), _words(p), kind=LOSS, term=term)[0]

    def _evaluate(self, operation: Operation, term: Term, p: Parameters, x: Any) -> tuple[Any, Any]:
        if operation is SUMS:
            return self._sums(term, p, x), None
        if operation is PARTIAL and isinstance(term.view, Products):
            raise no_partial(x)
        rest = [np.ones((), result_type(x))] if operation is GRADIENT else []
        if isinstance(term.view, Products):
            matrices = OPERATIONS.flatten_leading(x) if term.view.flatten and x.ndim > 2 else x
            batch = matrices.ndim - 2
            if operation is GRADIENT:
                operation, rest = VALUE_AND_GRADIENT, []
            results = _call(matrices, _words(p), *rest, kind=operation, term=term, batch=batch)
            return _paired(operation, [results[0].sum(), *(each.reshape(x.shape) for each in results[1:])])
        return _paired(operation, _call(x, _words(p), *rest, kind=operation, term=term))

    def _sums(self, term: Term, p: Parameters, x: Any) -> tuple[Any, Any]:
        if term.view is ELEMENTS:
            sums = self._evaluate(PARTIAL, term, p, x)[0].astype(result_type(x))
            return sums[0], sums[1]
        each = [self._evaluate(VALUE, term, (*factors, *p[2:]), x)[0] for factors in EACH_SUM]
        return each[0], each[1]

    def captures(self, x: Any) -> bool:
        # Even a constant becomes a part of what `jax.jit` traces; in other transformations it is an array.
        return isinstance(x, jax.core.Tracer) and isinstance(jnp.zeros(()), jax.core.Tracer)

    def held(self, number: Any) -> float | None:
        if isinstance(number, jax.core.Tracer) or not number.is_fully_addressable:
            return None
        return float(number) if all(device.platform == "cpu" for device in number.devices()) else None

    def number(self, number: Any, x: Any) -> Any:
        return lax.convert_element_type(number, result_type(_checked(x))) if self.owns(type(number)) else None

    def expressions(self) -> Adapter:
        return EXPRESSIONS

    def masked(self, x: Any, mask: Any) -> Any:
        return jnp.where(mask, x, jnp.zeros((), x.dtype))

    def is_immutable(self, x: Any) -> bool:
        return True

    def beside(self, value: Any, other: Any) -> Any:
        if isinstance(value, jax.core.Tracer) or isinstance(other, jax.core.Tracer) or not isinstance(other, jax.Array):
            return value
        return jax.device_put(value, other.sharding) if value.devices().isdisjoint(other.devices()) else value


def _paired(operation: Operation, results: Sequence[Any]) -> tuple[Any, Any]:
    """Return what a call has computed as a value and what was written, of which one may be missing."""
    return (results[0] if operation.sums else None), (results[-1] if operation.writes else None)


def keys(path: Iterable[Any]) -> tuple[Any, ...]:
    """Return what the keys of a path hold, by the names that JAX's classes for them have."""
    names = "key", "name", "idx"
    return tuple(next((getattr(each, name) for name in names if hasattr(each, name)), str(each)) for each in path)


@functools.partial(jax.jit, static_argnames=("operation", "term"), inline=True)
def _by_operations(
    operation: Operation, term: Term, p: Parameters, x: Any, operands: tuple[Any, ...] | None = None
) -> tuple[Any, Any]:
    if operands is None:
        return OPERATIONS.run(operation, term, p, x)
    return OPERATIONS.anchored(operation, term, p, x, operands)


class Expressions(JaxAdapter):
    """Takes arrays and tracers for parameters, by JAX's own operations, which differentiate and map them too."""

    def run(self, operation: Operation, term: Term, p: Parameters, x: Any, out: Any = None) -> tuple[Any, Any]:
        _refuse(operation, out)
        return _by_operations(operation, term, p, _checked(x))

    def anchored(
        self, operation: Operation, term: Term, p: Parameters, x: Any, operands: tuple[Any, ...], out: Any = None
    ) -> tuple[Any, Any]:
        _refuse(operation, out)
        return _by_operations(operation, term, p, _checked(x), operands)


EXPRESSIONS = Expressions()


@functools.cache
def _device() -> Any:
    """Return what evaluates arrays on CUDA devices; None where there is no device, or where a package is missing."""
    if jax.default_backend() != "gpu" or "rocm" in jax.devices()[0].client.platform_version.lower():
        return None
    try:
        from regkern.arrays import jax_cuda
    except ImportError as error:
        warnings.warn(
            f"regkern: expected CuPy and numba-cuda for an array of JAX on a CUDA device; got {error}; install them by "
            "pip install 'regkern[cuda13]'. Until then, JAX's own operations are used.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return jax_cuda


def _checked(x: Any) -> Any:
    if x.dtype.name not in DTYPES:
        advice = "convert it, for example by x.astype('float32')."
        if x.dtype.kind == "c":
            advice = complex_advice("jax.numpy.stack([x.real, x.imag], -1)")
        raise TypeError(f"x: expected an array of {', '.join(DTYPES)}; got dtype {x.dtype}; {advice}")
    return x


def _refuse(operation: Operation, out: Any) -> None:
    if operation.adds:
        raise ValueError(
            "accumulate: expected False, because JAX arrays are immutable; got True; add what is returned."
        )
    if out is not None:
        raise ValueError(
            f"out: expected None, because JAX arrays are immutable; got {type(out).__name__}; take what is returned."
        )


ADAPTER = JaxAdapter()

"""JAX arrays and tracers: the CPU kernels inside XLA's programs, JAX's own operations elsewhere.

Arrays on a CUDA device that no transformation of JAX has a part in are read by the CUDA kernels. All else goes through
one primitive, for eager arrays as under any transformation. What it becomes is chosen when a program is lowered: on one
CPU device, and on each device's own piece under `shard_map`, a call of a kernel; on another platform, in a program that
XLA partitions over several devices, and in exports, JAX's own operations.
"""

import functools
import math
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp
from jax.interpreters import ad, batching, mlir

from regkern.arrays.adapter import Adapter, require
from regkern.arrays.operations import OperationsAdapter
from regkern.dtypes import DTYPES, complex_advice
from regkern.kernels.cpu import xla
from regkern.kernels.cpu.xla import GRADIENT, PARTIAL, PROX, VALUE, VALUE_AND_GRADIENT, VALUE_AND_ONE
from regkern.kernels.formulas import Formula
from regkern.kernels.operations import ADD_GRADIENT, Operation

require("jax", jax.__version__, (0, 5))

from jax import ffi  # noqa: E402
from jax.extend.core import Primitive  # noqa: E402

SLOPE = -1  # the directional derivative, which is what JAX differentiates in reverse; no kernel computes it


@jax.custom_jvp
def _magnitude(x: Any) -> Any:
    return jnp.abs(x)


_magnitude.defjvps(lambda dx, _, x: dx * jnp.sign(x))  # JAX's own derivative at 0 is 1


class _Operations(OperationsAdapter):
    def owns(self, array_type: type) -> bool:
        raise NotImplementedError

    def widen(self, x: Any) -> Any:
        return x.astype(_result_type(x))

    def narrow(self, value: Any, x: Any) -> Any:
        return value.astype(x.dtype)

    def prox(self, formula: Formula, a: Any, b: Any, x: Any, out: Any = None) -> Any:
        return super().prox(formula, a, b, x, out)

    def zero(self, x: Any) -> Any:
        return jnp.zeros((), x.dtype)

    def sum(self, x: Any) -> Any:
        return jnp.sum(x)

    def clip(self, x: Any, limit: Any) -> Any:
        return jnp.clip(x, -limit, limit)

    def magnitude(self, x: Any) -> Any:
        return _magnitude(x)

    def flatten_leading(self, x: Any) -> Any:
        return x.reshape(-1, x.shape[-1])

    def transpose(self, x: Any) -> Any:
        return jnp.swapaxes(x, -1, -2)

    def unit(self, x: Any) -> Any:
        squares = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
        return jnp.where(squares == 0, 0, x * lax.rsqrt(jnp.where(squares == 0, 1, squares)))

    def off_diagonal(self, x: Any) -> Any:
        return jnp.where(jnp.eye(x.shape[-1], dtype=bool), 0, x)

    def norms(self, x: Any, axes: tuple[int, ...]) -> Any:
        squares = jnp.sum(jnp.square(x), axis=axes, keepdims=True)
        return jnp.where(squares == 0, 0, jnp.sqrt(jnp.where(squares == 0, 1, squares)))

    def quotient(self, x: Any, y: Any) -> Any:
        return jnp.where(y == 0, 0, x / jnp.where(y == 0, 1, y))

    def differentiate(self, function: Callable[[Any], Any], x: Any) -> tuple[Any, Any]:
        value, gradient = jax.value_and_grad(function)(x)
        return value, gradient

    def write(self, value: Any, out: Any, accumulate: bool) -> Any:
        return value

    def partial(self, formula: Formula, x: Any) -> Any:
        return jnp.stack(self.sums(formula, x)).astype(_widest())


_operations = _Operations()


@functools.partial(jax.jit, static_argnames=("operation", "columns"), inline=True)
def _group_lasso(operation: Operation, factor: Any, x: Any, columns: bool) -> tuple[Any, Any]:
    return _operations.group_lasso(operation, factor, x, None, columns=columns)


@dataclass(frozen=True)
class _Elementwise:
    """An element-wise penalty, without its factors."""

    formula: Formula
    fused = False  # two passes in memory's time: the cotangent goes into the gradient's

    def value(self, x: Any, factors: Any) -> Any:
        return _operations.penalty(self.formula, factors[0], factors[1], x)

    def partial(self, x: Any, factors: Any) -> Any:
        return _operations.partial(self.formula, x)

    def prox(self, x: Any, factors: Any) -> Any:
        return _operations.prox(self.formula, factors[0], factors[1], x)

    def call(self, kind: int, shape: Sequence[int], dtype: str) -> xla.Call | None:
        return xla.elementwise_call(kind, self.formula, DTYPES[dtype], math.prod(shape))


@dataclass(frozen=True)
class _Orthogonal:
    """The orthogonal penalty of a matrix's rows or columns, without its factor."""

    columns: bool
    fused = True  # the forward pass finds the gradient for the price of half of it

    def value(self, x: Any, factors: Any) -> Any:
        return _operations.orthogonal(factors[0], x, columns=self.columns, flatten=False)

    def call(self, kind: int, shape: Sequence[int], dtype: str) -> xla.Call | None:
        n, d = reversed(shape) if self.columns else shape
        return xla.gram_call(kind, DTYPES[dtype], n, d, columns=self.columns) if n > 1 else None


_Penalty = _Elementwise | _Orthogonal

_primitive = Primitive("regkern")
_primitive.multiple_results = True


@functools.partial(jax.jit, static_argnames=("kind", "penalty", "batch"), inline=True)
def _call(x: Any, factors: Any, *rest: Any, kind: int, penalty: _Penalty, batch: int = 0) -> Any:
    """Compute one kind of thing, over each piece that the leading `batch` axes count."""
    return _primitive.bind(x, factors, *rest, kind=kind, penalty=penalty, batch=batch)


def _evaluate(kind: int, penalty: _Penalty, batch: int) -> Callable[..., list[Any]]:
    """Make the function of JAX's own operations that computes what a call does."""

    def function(x: Any, factors: Any, *rest: Any) -> list[Any]:
        factors = _floats(factors, _result_type(x))

        def value(x: Any) -> Any:
            return penalty.value(x, factors)

        if kind == VALUE:
            return [value(x)]
        if kind == VALUE_AND_ONE:
            return [value(x), jnp.ones((), _result_type(x))]
        if kind == SLOPE:
            return [jax.jvp(value, (x,), rest)[1]]
        if kind == GRADIENT:
            return [jax.vjp(value, x)[1](*rest)[0]]
        if kind == VALUE_AND_GRADIENT:
            return list(jax.value_and_grad(value)(x))
        assert isinstance(penalty, _Elementwise)
        return [(penalty.partial if kind == PARTIAL else penalty.prox)(x, factors)]

    for _ in range(batch):
        function = _over_leading_axis(function)
    return function


def _over_leading_axis(function: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    return lambda x, factors, *rest: jax.vmap(function, in_axes=(0, None, *[0] * len(rest)))(x, factors, *rest)


def _words(a: float, b: float) -> Any:
    """Write two factors into an array that JAX keeps as it is, though float64 may be switched off.

    They are an operand, not a constant of the program: a factor that changes from step to step compiles nothing again.
    """
    exact = np.array([a, b])
    return np.concatenate([exact.view(np.uint32), exact.astype(np.float32).view(np.uint32)])


def _floats(words: Any, dtype: Any) -> Any:
    """Read two factors."""
    if dtype == np.float64:
        return lax.bitcast_convert_type(words[:4].reshape(2, 2), np.float64)
    return lax.bitcast_convert_type(words[4:], np.float32)


def _result_type(x: Any) -> Any:
    return np.dtype(DTYPES[x.dtype.name].result)


def _widest() -> Any:
    return jax.dtypes.canonicalize_dtype(np.float64)


def _compute(*operands: Any, **parameters: Any) -> Any:
    with jax.disable_jit(False):  # as JAX's own primitives: under `jax.disable_jit` they are compiled, one by one
        return _call(*operands, **parameters)


def _types(x: Any, factors: Any, *rest: Any, kind: int, penalty: _Penalty, batch: int) -> list[Any]:
    gradient = x.update(weak_type=False)
    if kind in (GRADIENT, PROX):
        return [gradient]
    if kind == PARTIAL:
        return [_smaller(x, batch, (2,), _widest())]
    value = _smaller(x, batch, (), _result_type(x))
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
    primals: Sequence[Any], tangents: Sequence[Any], *, kind: int, penalty: _Penalty, batch: int
) -> tuple[Any, Any]:
    x, factors, *rest = primals
    dx, _, *rest_dots = tangents
    parameters = {"penalty": penalty, "batch": batch}
    if kind == VALUE:
        if not penalty.fused or x.dtype.itemsize == 2:  # 16 bits would lose a gradient before it is scaled
            if penalty.fused:
                value = _call(x, factors, kind=VALUE, **parameters)
                return value, _primitive.bind(x, factors, dx, kind=SLOPE, **parameters)
            # Without an order between the call and the update of a donated x, XLA copies x for the call.
            value, one = _call(x, factors, kind=VALUE_AND_ONE, **parameters)
            (slope,) = _primitive.bind(x, factors, dx, kind=SLOPE, **parameters)
            return [value], [lax.stop_gradient(one) * slope]
        value, gradient = _call(x, factors, kind=VALUE_AND_GRADIENT, **parameters)
        return [value], [jnp.sum(gradient * dx, axis=tuple(range(batch, x.ndim)))]
    function = _evaluate(kind, penalty, batch)
    _, tangents_out = jax.jvp(
        lambda *operands: function(operands[0], factors, *operands[1:]),
        (x, *rest),
        tuple(ad.instantiate_zeros(tangent) for tangent in (dx, *rest_dots)),
    )
    return _call(x, factors, *rest, kind=kind, **parameters), tangents_out


def _transpose(cotangents: Sequence[Any], x: Any, factors: Any, dx: Any, *, kind: int, **parameters: Any) -> list[Any]:
    """Return the gradient, scaled by the cotangent of the slope.

    By JAX's operations, for XLA makes them a part of the loop that adds it to the loss's gradient and updates x: a
    kernel's result would be written and read once more (steps of an MLP took 1.1 to 2 times as long).
    """
    (cotangent,) = cotangents
    if isinstance(cotangent, ad.Zero):
        return [None, None, ad.Zero(dx.aval)]
    return [None, None, *_evaluate(GRADIENT, **parameters)(x, factors, cotangent)]


def _batch(
    operands: Sequence[Any], axes: Sequence[Any], *, kind: int, penalty: _Penalty, batch: int
) -> tuple[Any, list[int]]:
    size = next(operand.shape[axis] for operand, axis in zip(operands, axes, strict=True) if axis is not None)

    def in_front(operand: Any, axis: int | None) -> Any:
        if axis is None:
            return jnp.broadcast_to(operand, (size, *operand.shape))
        return jnp.moveaxis(operand, axis, 0)

    x, factors, *rest = operands
    x_axis, _, *rest_axes = axes
    moved = [in_front(operand, axis) for operand, axis in zip(rest, rest_axes, strict=True)]
    results = _call(in_front(x, x_axis), factors, *moved, kind=kind, penalty=penalty, batch=batch + 1)
    return results, [0] * len(results)


def _lower_to_operations(ctx: Any, *operands: Any, **parameters: Any) -> Any:
    return mlir.lower_fun(_evaluate(**parameters), multiple_results=True)(ctx, *operands)


def _lower_on_cpu(ctx: Any, *operands: Any, kind: int, penalty: _Penalty, batch: int) -> Any:
    x = ctx.avals_in[0]
    call = None
    if kind != SLOPE and math.prod(x.shape) > 0 and _has_its_own_memory(ctx.module_context) and _register():
        call = penalty.call(kind, x.shape[batch:], x.dtype.name)
    if call is None:
        return _lower_to_operations(ctx, *operands, kind=kind, penalty=penalty, batch=batch)
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


@functools.cache
def _api_version() -> tuple[int, int]:
    """Read the version of XLA's foreign function interface from the header that comes with jaxlib."""
    try:
        header = Path(ffi.include_dir(), "xla", "ffi", "api", "c_api.h").read_text()
    except OSError:
        return (-1, -1)
    major, minor = (re.search(rf"define XLA_FFI_API_{part} (\d+)", header) for part in ("MAJOR", "MINOR"))
    return (int(major[1]), int(minor[1])) if major and minor else (-1, -1)


def _register() -> bool:
    """Make the kernels known to XLA, once; whether it can call them."""
    return xla.available(_api_version()) and _register_handlers()


@functools.cache
def _register_handlers() -> bool:
    for name, address in xla.handlers().items():
        ffi.register_ffi_target(name, xla.capsule(address), platform="cpu")
    return True


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

    def penalty(self, formula: Formula, a: float, b: float, x: Any) -> Any:
        if _on_device(x):
            return _device().penalty(formula, a, b, x)
        return _call(_checked(x), _words(a, b), kind=VALUE, penalty=_Elementwise(formula))[0]

    def captures(self, x: Any) -> bool:
        # Even a constant becomes a part of what `jax.jit` traces; in other transformations it is an array.
        return isinstance(x, jax.core.Tracer) and isinstance(jnp.zeros(()), jax.core.Tracer)

    def held(self, number: Any) -> float | None:
        if isinstance(number, jax.core.Tracer) or not number.is_fully_addressable:
            return None
        return float(number) if all(device.platform == "cpu" for device in number.devices()) else None

    def number(self, number: Any, x: Any) -> Any:
        return lax.convert_element_type(number, _result_type(_checked(x))) if self.owns(type(number)) else None

    def expressions(self) -> Adapter:
        return EXPRESSIONS

    def beside(self, value: Any, other: Any) -> Any:
        if isinstance(value, jax.core.Tracer) or isinstance(other, jax.core.Tracer) or not isinstance(other, jax.Array):
            return value
        return jax.device_put(value, other.sharding) if value.devices().isdisjoint(other.devices()) else value

    def sums(self, formula: Formula, x: Any) -> tuple[Any, Any]:
        sums = self.partial(formula, x).astype(_result_type(x))
        return sums[0], sums[1]

    def partial(self, formula: Formula, x: Any) -> Any:
        return _call(_checked(x), _words(0.0, 0.0), kind=PARTIAL, penalty=_Elementwise(formula))[0]

    def value_and_grad(self, formula: Formula, a: float, b: float, x: Any) -> tuple[Any, Any]:
        if _on_device(x):
            return _device().value_and_grad(formula, a, b, x)
        return tuple(_call(_checked(x), _words(a, b), kind=VALUE_AND_GRADIENT, penalty=_Elementwise(formula)))

    def grad(self, formula: Formula, a: float, b: float, x: Any, out: Any, accumulate: bool) -> Any:
        _refuse(out, accumulate)
        if _on_device(x):
            return _device().grad(formula, a, b, x)
        one = np.ones((), _result_type(_checked(x)))
        return _call(x, _words(a, b), one, kind=GRADIENT, penalty=_Elementwise(formula))[0]

    def prox(self, formula: Formula, a: float, b: float, x: Any, out: Any) -> Any:
        _refuse(out, False)
        if _on_device(x):
            return _device().prox(formula, a, b, x)
        return _call(_checked(x), _words(a, b), kind=PROX, penalty=_Elementwise(formula))[0]

    def orthogonal(self, factor: float, x: Any, *, columns: bool, flatten: bool) -> Any:
        if _on_device(x):
            return _device().orthogonal(factor, x, columns=columns, flatten=flatten)
        matrices = _matrices(_checked(x), flatten)
        (values,) = _call(
            matrices, _words(factor, 0.0), kind=VALUE, penalty=_Orthogonal(columns), batch=matrices.ndim - 2
        )
        return values.sum()

    def orthogonal_value_and_grad(self, factor: float, x: Any, *, columns: bool, flatten: bool) -> tuple[Any, Any]:
        if _on_device(x):
            return _device().orthogonal_value_and_grad(factor, x, columns=columns, flatten=flatten)
        matrices = _matrices(_checked(x), flatten)
        values, gradients = _call(
            matrices,
            _words(factor, 0.0),
            kind=VALUE_AND_GRADIENT,
            penalty=_Orthogonal(columns),
            batch=matrices.ndim - 2,
        )
        return values.sum(), gradients.reshape(x.shape)

    def orthogonal_grad(
        self, factor: float, x: Any, out: Any, *, columns: bool, flatten: bool, accumulate: bool
    ) -> Any:
        _refuse(out, accumulate)
        return self.orthogonal_value_and_grad(factor, x, columns=columns, flatten=flatten)[1]

    def group_lasso(self, operation: Operation, factor: float, x: Any, out: Any, *, columns: bool) -> tuple[Any, Any]:
        _refuse(out, operation is ADD_GRADIENT)
        return _group_lasso(operation, factor, _checked(x), columns)


def keys(path: Iterable[Any]) -> tuple[Any, ...]:
    """Return what the keys of a path hold, by the names that JAX's classes for them have."""
    names = "key", "name", "idx"
    return tuple(next((getattr(each, name) for name in names if hasattr(each, name)), str(each)) for each in path)


@functools.partial(jax.jit, static_argnames=("method", "formula"), inline=True)
def _by_operations(method: str, formula: Formula, a: Any, b: Any, x: Any) -> Any:
    return getattr(_operations, method)(formula, a, b, x)


@functools.partial(jax.jit, static_argnames="columns", inline=True)
def _orthogonal_by_operations(factor: Any, x: Any, columns: bool) -> Any:
    return _operations.orthogonal_value_and_grad(factor, x, columns=columns, flatten=False)


class Expressions(JaxAdapter):
    """Takes arrays and tracers for factors, by JAX's own operations: what is differentiated or mapped are they too."""

    def value_and_grad(self, formula: Formula, a: Any, b: Any, x: Any) -> tuple[Any, Any]:
        value, gradient = _by_operations("value_and_grad", formula, a, b, _checked(x))
        return value, gradient

    def grad(self, formula: Formula, a: Any, b: Any, x: Any, out: Any, accumulate: bool) -> Any:
        _refuse(out, accumulate)
        return self.value_and_grad(formula, a, b, x)[1]

    def prox(self, formula: Formula, a: Any, b: Any, x: Any, out: Any) -> Any:
        _refuse(out, False)
        return _by_operations("prox", formula, a, b, _checked(x))

    def orthogonal_value_and_grad(self, factor: Any, x: Any, *, columns: bool, flatten: bool) -> tuple[Any, Any]:
        matrices = _matrices(_checked(x), flatten)
        value, gradient = _orthogonal_by_operations(factor, matrices, columns)
        return value, gradient.reshape(x.shape)


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


def _on_device(x: Any) -> bool:
    """Whether the CUDA kernels can read an array now: not in a transformation of JAX."""
    device = _device()
    return device is not None and device.takes(_checked(x))


def _checked(x: Any) -> Any:
    if x.dtype.name not in DTYPES:
        advice = "convert it, for example by x.astype('float32')."
        if x.dtype.kind == "c":
            advice = complex_advice("jax.numpy.stack([x.real, x.imag], -1)")
        raise TypeError(f"x: expected an array of {', '.join(DTYPES)}; got dtype {x.dtype}; {advice}")
    return x


def _matrices(x: Any, flatten: bool) -> Any:
    return _operations.flatten_leading(x) if flatten and x.ndim > 2 else x


def _refuse(out: Any, accumulate: bool) -> None:
    if accumulate:
        raise ValueError(
            "accumulate: expected False, because JAX arrays are immutable; got True; add what is returned."
        )
    if out is not None:
        raise ValueError(
            f"out: expected None, because JAX arrays are immutable; got {type(out).__name__}; take what is returned."
        )


ADAPTER = JaxAdapter()

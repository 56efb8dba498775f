"""TensorFlow tensors and variables: the CPU kernels, in graphs too, and TensorFlow's own operations.

Eager tensors in the host's memory are read where they lie. Graphs on the CPU call the kernels for large tensors. In all
other graphs, under XLA and on other devices, penalties are TensorFlow's operations, of which nothing leaves the graph.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from regkern.arrays import tensorflow_graph as graph
from regkern.arrays.adapter import Adapter, ChoosingAdapter, no_distance, require
from regkern.arrays.expressions import ExpressionsAdapter
from regkern.arrays.layers import distinct, through_layers
from regkern.arrays.tensorflow_graph import VIEWS
from regkern.dtypes import DTYPES, complex_advice
from regkern.formulas import ABS, ABS_SQUARE, SQUARE, SQUARE_SUM
from regkern.terms import (
    ANEW,
    ELEMENTS,
    GRADIENT,
    SUMS,
    VALUE,
    Operation,
    Parameters,
    Products,
    Term,
    scaled,
)

require("tensorflow", tf.__version__, (2, 18))

# Which of its two terms, the absolute values and the squares, a formula has: for these, faster operations are known.
_TERMS = {ABS: (True, False), SQUARE: (False, True), ABS_SQUARE: (True, True)}
_EXCHANGED = (np.float16, np.float32, np.float64)  # by NumPy through DLPack, which has no bfloat16 there


class _DTypes(dict[Any, Any]):
    """The result types of TensorFlow's dtypes."""

    def __missing__(self, dtype: Any) -> Any:
        advice = "convert it, for example by tf.cast(x, 'float32')."
        if dtype.is_complex:
            advice = complex_advice("tf.stack([tf.math.real(x), tf.math.imag(x)], -1)")
        raise TypeError(f"x: expected an array of {', '.join(DTYPES)}; got dtype {dtype.name}; {advice}")


_results = _DTypes({tf.dtypes.as_dtype(name): tf.dtypes.as_dtype(dtype.result) for name, dtype in DTYPES.items()})


class Operations(ExpressionsAdapter):
    """Penalties as TensorFlow's own operations."""

    sum = staticmethod(tf.reduce_sum)
    roots = staticmethod(tf.sqrt)
    inverse_roots = staticmethod(tf.math.rsqrt)
    logarithms = staticmethod(tf.math.log1p)
    quotient = staticmethod(tf.math.divide_no_nan)
    transpose = staticmethod(tf.linalg.matrix_transpose)
    detach = staticmethod(tf.stop_gradient)

    def select(self, condition: Any, x: Any, y: Any) -> Any:
        dtype = getattr(x, "dtype", getattr(y, "dtype", None))  # that of a number beside a tensor: else it is float32
        return tf.where(condition, tf.convert_to_tensor(x, dtype), tf.convert_to_tensor(y, dtype))

    def widen(self, x: Any) -> Any:
        return tf.cast(x, _results[x.dtype])

    def narrow(self, value: Any, x: Any) -> Any:
        return tf.cast(value, x.dtype)

    def zero(self, x: Any) -> Any:
        return tf.reduce_sum(tf.reshape(x, (-1,))[:0])  # none of x's elements: its gradient is zero, not missing

    def clip(self, x: Any, limit: float) -> Any:
        return tf.clip_by_value(x, -limit, limit)

    def flatten_leading(self, x: Any) -> Any:
        *leading, columns = x.shape
        rows = -1 if None in leading or columns in (None, 0) else math.prod(leading)
        return tf.reshape(x, (rows, tf.shape(x)[-1] if columns is None else columns))

    def centred(self, x: Any) -> tuple[Any, Any]:
        length = tf.cast(tf.shape(x)[-1], x.dtype)  # of a batch, which a graph may not know
        return x - tf.reduce_mean(x, axis=-1, keepdims=True), tf.maximum((length - 1) ** 2, 1)

    def off_diagonal(self, x: Any) -> Any:
        return x * (1 - tf.eye(x.shape[-1], dtype=x.dtype))

    def differentiate(self, function: Callable[[Any], Any], x: Any) -> tuple[Any, Any]:
        with tf.GradientTape() as tape:
            tape.watch(x)
            value = function(x)
        return value, tape.gradient(value, x, unconnected_gradients="zero")

    def write(self, value: Any, out: Any, accumulate: bool) -> Any:
        if out is None:
            return value
        _check_out(value, out)
        if accumulate:
            out.assign_add(value)
        else:
            out.assign(value)
        return out

    def sum_exactly(self, x: Any) -> Any:
        return tf.reduce_sum(tf.cast(x, tf.float64))

    def exact(self, sums: Sequence[Any], x: Any) -> Any:
        return tf.stack([tf.cast(each, tf.float64) for each in sums])

    def sums(self, term: Term, p: Parameters, x: Any) -> tuple[Any, Any]:
        if not _is_elastic_net(term):
            return super().sums(term, p, x)
        v = self.widen(x)
        has_abs, has_square = _TERMS[term.formula]
        return (
            _elastic_net(1.0, 0.0, True, False, v) if has_abs else self.zero(v),
            _elastic_net(0.0, 1.0, False, True, v) if has_square else self.zero(v),
        )

    def value(self, term: Term, p: Parameters, x: Any) -> Any:
        a, b, _, _ = p
        if isinstance(term.view, Products):
            _check_count(term.view, x)
        if not _is_elastic_net(term):
            return super().value(term, p, x)
        if not (type(a) is type(b) is float):  # below, nothing would reach them
            sum0, sum1 = self.sums(term, p, x)
            return a * sum0 + b * sum1
        return _elastic_net(a, b, *_TERMS[term.formula], self.widen(x))

    def over_batch(self, penalty: Any, x: Any) -> Any:
        return tf.math.divide_no_nan(penalty, tf.cast(tf.shape(x)[0], penalty.dtype))


def _is_elastic_net(term: Term) -> bool:
    return term.view is ELEMENTS and term.formula in _TERMS


def _elastic_net(a: float, b: float, has_abs: bool, has_square: bool, v: Any) -> Any:
    """Return ``a * sum(|v|) + b * sum(v**2)``.

    Keras's expressions as autodiff sees them fill arrays with the upstream gradient; a sum of squares by multiplication
    fills one more.
    """

    @tf.custom_gradient
    def elastic_net(v: Any) -> Any:
        def gradient(upstream: Any) -> Any:
            first = (a * upstream) * tf.sign(v) if has_abs else 0.0
            second = (2 * b * upstream) * v if has_square else 0.0
            return first + second if has_abs and has_square else first if has_abs else second

        first = a * tf.reduce_sum(tf.abs(v)) if has_abs else 0.0
        second = (2 * b) * tf.nn.l2_loss(v) if has_square else 0.0
        return first + second, gradient

    return elastic_net(v)


def _check_count(view: Products, x: Any) -> None:
    """Raise ValueError where it is not known how many vectors are compared."""
    counted = x.shape[-1:] if view.columns else x.shape[:-1] if view.flatten else x.shape[-2:-1]
    if None in counted:
        raise ValueError(
            f"x: expected a known number of {'columns' if view.columns else 'rows'}, which are compared with each "
            f"other; got shape {tuple(x.shape)}; set it, for example by tf.ensure_shape."
        )


OPERATIONS = Operations()


class InGraphs(Operations):
    """Penalties in graphs that may have the kernels in them; all else by operations."""

    def value(self, term: Term, p: Parameters, x: Any) -> Any:
        # Of L2, the sum of squares and its gradient are one fast operation each.
        if term == SQUARE_SUM or not VIEWS.serves(term) or not all(type(each) is float for each in p):
            return super().value(term, p, x)
        return graph.evaluate(graph.Call(VALUE, term, p, OPERATIONS), x, _results[x.dtype])


IN_GRAPHS = InGraphs()


class Kernels(Adapter):
    """The kernels, which read an eager tensor through a NumPy view of its memory; penalties join gradient tapes."""

    def run(self, operation: Operation, term: Term, p: Parameters, x: Any, out: Any = None) -> tuple[Any, Any]:
        if not VIEWS.serves(term):
            return OPERATIONS.run(operation, term, p, x, out)
        if operation in (VALUE, SUMS):
            values = _recorded(x, call=graph.Call(operation, term, p, OPERATIONS))
            return (values[0] if operation is VALUE else tuple(values)), None
        _check_out(x, out)
        view = _view(x)
        value, written = VIEWS.run(ANEW.get(operation, operation), term, p, view)
        if value is not None:
            value = _scalar(value) if operation.writes else tf.convert_to_tensor(value)
        if written is not None:
            written = OPERATIONS.write(_tensor(written), out, operation.adds)
        return value, written

    def between(self, term: Term, x: Any, other: Any) -> Any:
        return VIEWS.between(term, _view(x), _view(other))


# Each decoration costs 15 us, so that nothing is decorated anew for each call.
@tf.custom_gradient
def _recorded(x: Any, *, call: graph.Call) -> Any:
    """Return what a call computes of an eager tensor, one value or two, which gradient tapes can differentiate."""

    def gradient(*upstream: Any) -> Any:
        if all(map(_is_plain, upstream)):
            return _recorded_slope(x, *upstream, call=call)
        return call.slope(x, *upstream)  # of a vectorised tape, whose graph this is

    values = VIEWS.run(call.operation, call.term, call.p, _view(x))[0]
    return list(map(_scalar, values if call.operation is SUMS else (values,))), gradient


@tf.custom_gradient
def _recorded_slope(x: Any, *upstream: Any, call: graph.Call) -> Any:
    """Return the sum of the gradients, each times its upstream, which gradient tapes can differentiate again."""

    def gradient(vector: Any) -> Any:
        # In a graph: a `tf.autodiff.ForwardAccumulator` comes here with all tapes stopped, new ones too.
        return tf.function(call.bend, autograph=False)(vector, x, *upstream)

    first, *rest = map(float, upstream)
    p = (first, *rest, *call.p[2:]) if rest else scaled(call.p, first)
    return _tensor(VIEWS.run(GRADIENT, call.term, p, _view(x))[1]), gradient


def _view(x: Any) -> np.ndarray[Any, Any]:
    """Return an eager tensor's memory as a read-only array."""
    _results[x.dtype]
    return np.asarray(x if x.ndim else x.numpy())  # bfloat16 of no dimension comes as a scalar


def _scalar(value: Any) -> Any:
    return tf.constant(value.item(), value.dtype)


def _tensor(array: np.ndarray[Any, Any]) -> Any:
    """Return an array of `Views` as a tensor over the same memory."""
    if array.dtype in _EXCHANGED:
        return tf.experimental.dlpack.from_dlpack(array.__dlpack__())
    return tf.bitcast(tf.experimental.dlpack.from_dlpack(array.view(np.uint16).__dlpack__()), array.dtype)


def _check_out(value: Any, out: Any) -> None:
    if out is None:
        return
    if not isinstance(out, tf.Variable):
        raise TypeError(
            f"out: expected a tf.Variable or None, because tensors are immutable; got {type(out).__name__}; "
            "take what is returned."
        )
    if out.shape != value.shape or out.dtype != value.dtype:
        raise ValueError(
            f"out: expected x's shape and dtype, {tuple(value.shape)} and {value.dtype.name}; "
            f"got {tuple(out.shape)} and {out.dtype.name}; make it by tf.Variable(tf.zeros_like(x))."
        )


def _is_plain(x: Any) -> bool:
    """Whether x is an eager tensor in this process's own memory: that of other hosts is of other jobs."""
    if not tf.executing_eagerly() or tf.is_symbolic_tensor(x):
        return False
    device: str = x.backing_device
    return device.startswith("/job:localhost/") and "CPU" in device


KERNELS = Kernels()


class Expressions(ChoosingAdapter):
    """Takes tensors for factors, by TensorFlow's own operations."""

    def choose(self, x: Any) -> tuple[Adapter, Any]:
        return OPERATIONS, tf.convert_to_tensor(x)


class TensorflowAdapter(ChoosingAdapter):
    """Reads variables, and chooses the evaluator for each tensor."""

    compiles = True

    def owns(self, array_type: type) -> bool:
        return issubclass(array_type, tf.Tensor | tf.Variable | tf.RaggedTensor)

    def named_arrays(self, model: Any) -> Iterable[tuple[str, Any]] | None:
        """Name the variables of a `tf.Module`, as tf_keras's models are."""
        if not isinstance(model, tf.Module):
            return None
        if getattr(model, "built", True) is False and hasattr(model, "_flatten_layers"):
            return []  # a model of tf_keras that has no variables yet, and says so by an error
        named = [(variable.name.removesuffix(":0"), variable) for variable in model.trainable_variables]
        return distinct(named, lambda: _longer_names(model))

    def choose(self, x: Any) -> tuple[Adapter, Any]:
        if isinstance(x, tf.RaggedTensor):
            return RAGGED, x
        tensor = tf.convert_to_tensor(x)
        if _is_plain(tensor):
            return KERNELS, tensor
        return (IN_GRAPHS if graph.takes(tensor) else OPERATIONS), tensor

    def anchored(
        self, operation: Operation, term: Term, p: Parameters, x: Any, operands: tuple[Any, ...], out: Any = None
    ) -> tuple[Any, Any]:
        if isinstance(x, tf.RaggedTensor):
            raise no_distance(x)
        return EXPRESSIONS.anchored(operation, term, p, x, operands, out)

    def captures(self, x: Any) -> bool:
        return not tf.executing_eagerly()

    def held(self, number: Any) -> float | None:
        tensor = tf.convert_to_tensor(number)
        return float(tensor.numpy()) if _is_plain(tensor) else None

    def differentiates(self, number: Any) -> bool:
        return True  # nothing tells whether a tape watches

    def number(self, number: Any, x: Any) -> Any:
        return tf.cast(number, _results[x.dtype]) if isinstance(number, tf.Tensor | tf.Variable) else None

    def masked(self, x: Any, mask: Any) -> Any:
        if isinstance(x, tf.RaggedTensor):
            return super().masked(x, mask)
        tensor = tf.convert_to_tensor(x)
        return tf.where(mask, tensor, tf.zeros((), tensor.dtype))

    def expressions(self) -> Adapter:
        return EXPRESSIONS

    def is_immutable(self, x: Any) -> bool:
        return not isinstance(x, tf.Variable)


class Ragged(Adapter):
    """Evaluates element-wise penalties of the values that a ragged tensor holds, whatever their partition."""

    def run(self, operation: Operation, term: Term, p: Parameters, x: Any, out: Any = None) -> tuple[Any, Any]:
        if term.view is not ELEMENTS:
            raise TypeError(
                f"x: expected rows of one length; got a RaggedTensor with shape {tuple(x.shape)}; "
                "pass x.to_tensor(), or its x.flat_values."
            )
        _check_out(x.flat_values, out)
        value, written = ADAPTER.run(ANEW.get(operation, operation), term, p, x.flat_values)
        return value, None if written is None else x.with_flat_values(written)

    def over_batch(self, penalty: Any, x: Any) -> Any:
        return tf.math.divide_no_nan(penalty, tf.cast(x.nrows(), penalty.dtype))


RAGGED = Ragged()
EXPRESSIONS = Expressions()


def _longer_names(model: Any) -> Iterable[tuple[str, Any]]:
    """Return the variables of a module: in tf_keras by the names of its layers, else by those of its attributes."""
    if hasattr(model, "_flatten_layers"):
        return through_layers(model, lambda variable: variable.name.rpartition("/")[2].removesuffix(":0"))
    found = model._flatten(predicate=lambda each: isinstance(each, tf.Variable), with_path=True)
    return [("/".join(map(str, path)), variable) for path, variable in found]


ADAPTER = TensorflowAdapter()

"""The CPU kernels inside TensorFlow's graphs: calls of Python, beside the operations that do the same elsewhere.

A graph says nothing of where it will run: what was traced for a training step may be saved, converted, compiled by XLA
or loaded in a process that has no kernels. So both stand in it, as branches, and the one that runs is chosen when it
runs: by the device, as TensorFlow's own layers choose, which XLA and converters take for another one; and by a flag
whose name no other process has, and that loaders change. A branch that is not taken is not even made, so that it does
no harm where TensorFlow runs without Python. What is traced to be saved, or for XLA, or where there are other devices
than the host's own, has operations alone.
"""

import atexit
import functools
import os
import sys
import time
import uuid
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from regkern.arrays.expressions import ExpressionsAdapter
from regkern.arrays.numpy import NumpyAdapter
from regkern.terms import GRADIENT, VALUE, Operation, Parameters, Term, scaled

try:  # no public names tell as much
    from tensorflow.python.eager.forwardprop_util import pack_tangents
    from tensorflow.python.ops import control_flow_util
    from tensorflow.python.saved_model.save_context import in_save_context
except ImportError:  # of a version that moved them: operations alone
    in_save_context = None

VARIABLE = "REGKERN_TENSORFLOW_GRAPHS"
LEAST = 1 << 15  # elements: a call of Python takes 20 to 50 us, in which operations do as many
_ALIGNMENT = 64  # bytes: TensorFlow's operations rely on it
_QUIET = 20  # milliseconds without a call, after which none is expected that has seen a flag
_FLAG = f"regkern_{uuid.uuid4().hex}"


class Views(NumpyAdapter):
    """Reads tensors as views, and makes arrays whose memory a tensor can take over."""

    def empty_like(self, x: Any) -> Any:
        memory = np.empty(x.nbytes + _ALIGNMENT, np.uint8)
        start = -memory.ctypes.data % _ALIGNMENT
        return memory[start : start + x.nbytes].view(x.dtype).reshape(x.shape)


VIEWS = Views()


class Call(NamedTuple):
    """A penalty, or the two sums of its formula, and the adapter that writes it in operations.

    In a graph, these are differentiated to any order.
    """

    operation: Operation
    term: Term
    p: Parameters
    operations: ExpressionsAdapter

    def value(self, x: Any) -> Any:
        """Return the penalty, or the sums."""
        return self.operations.run(self.operation, self.term, self.p, x)[0]

    def slope(self, x: Any, *upstream: Any) -> Any:
        """Return the sum of the gradients, each times its upstream."""
        x = tf.identity(x)  # one of this graph
        return tf.gradients(self.value(x), x, upstream, unconnected_gradients="zero")[0]

    def bend(self, vector: Any, *operands: Any) -> Any:
        """Return the gradients of the slope times a vector."""
        operands = tuple(map(tf.identity, operands))
        return tf.gradients(self.slope(*operands), operands, vector, unconnected_gradients="zero")


def takes(x: Any) -> bool:
    """Whether a graph that is traced now may have the kernels in it, and whether they are worth it for this tensor.

    Raises:
        ValueError: the environment variable says neither.
    """
    chosen = os.environ.get(VARIABLE) or "kernels"
    if chosen not in ("kernels", "operations"):
        raise ValueError(
            f"{VARIABLE}: expected 'kernels' or 'operations'; got {chosen!r}; set it to one of these or to none."
        )
    return (
        chosen == "kernels"
        and not tf.executing_eagerly()
        and (x.shape.num_elements() or 0) >= LEAST
        and in_save_context is not None
        and not in_save_context()
        and tf.compat.v1.executing_eagerly_outside_functions()  # else a graph of TensorFlow 1, for a session
        and not control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph())
        and all(map(_is_own_cpu, tf.config.list_logical_devices()))
        # On a mesh of DTensors, of which a graph knows nothing, each operation is split up.
        and getattr(sys.modules.get("tensorflow.dtensor.python.api"), "_dtensor_singleton", None) is None
    )


def _is_own_cpu(device: Any) -> bool:
    return device.device_type == "CPU" and device.name.startswith(("/device:", "/job:localhost/"))


def evaluate(call: Call, x: Any, result_type: Any) -> Any:
    """Return a penalty of a tensor of a graph, which is differentiated by kernels once, and then by operations."""

    @tf.custom_gradient
    def value(x: Any) -> Any:
        # Identity: what is differentiated again must be of the graph where that is done.
        return _switch(call, "value", result_type, (), x), lambda upstream: slope(tf.identity(x), upstream)

    @tf.custom_gradient
    def slope(x: Any, upstream: Any) -> Any:
        return _switch(call, "slope", x.dtype, x.shape, x, upstream), lambda vector: call.bend(vector, x, upstream)

    return value(x)


def _switch(call: Call, name: str, dtype: Any, shape: Sequence[int], *tensors: Any) -> Any:
    """Return what the kernel computes where this process runs the graph on its CPU, elsewhere what operations do."""
    if pack_tangents(tensors).tangents:  # forward mode differentiates the operations that it sees
        return getattr(call, name)(*tensors)
    specs = tuple(tf.TensorSpec(tensor.shape, tensor.dtype) for tensor in tensors)
    with tf.init_scope():
        _raise_flag()
        branches = _branches(call, name, dtype, specs)
    (result,) = tf.raw_ops.StatelessCase(  # `tf.cond` would make the nodes of all branches, run or not
        branch_index=tf.raw_ops.DeviceIndex(device_names=["CPU"]),  # under XLA, and to converters, the last one
        input=tensors,
        Tout=[dtype],
        branches=branches,
        output_shapes=[shape],
    )
    return result


@functools.lru_cache(256)
def _branches(call: Call, name: str, dtype: Any, specs: Sequence[Any]) -> list[Any]:
    """Return two functions of tensors: the kernel if there is one when it runs, and the operations."""

    def kernel(*tensors: Any) -> Any:
        p = tf.constant(call.p, tf.float64)
        token = _token(call.term, name)
        return tf.raw_ops.PyFuncStateless(input=[p, *tensors], token=token, Tout=[dtype])[0]

    def on_cpu(*tensors: Any) -> Any:
        (result,) = tf.raw_ops.StatelessIf(
            cond=_flags() > 0, input=tensors, Tout=[dtype], then_branch=concrete(kernel), else_branch=operations
        )
        return result

    def concrete(function: Any) -> Any:
        return tf.function(function, autograph=False).get_concrete_function(*specs)

    operations = concrete(getattr(call, name))
    return [concrete(on_cpu), operations]


@functools.cache
def _token(term: Term, name: str) -> Any:
    """Make a kernel known to TensorFlow for as long as this process lives, and return what its graphs call it."""

    def kernel(p: Any, view: Any, *upstream: Any) -> Any:
        p = tuple(p.tolist())
        _running.append(None)
        try:
            if name == "value":
                return VIEWS.run(VALUE, term, p, view)[0]
            return VIEWS.run(GRADIENT, term, scaled(p, float(upstream[0])), view)[1]
        finally:
            _running.pop()

    with tf.Graph().as_default() as graph:
        token = tf.numpy_function(kernel, [0.0], tf.float32, stateful=False).op.get_attr("token")
    _kept.append(graph)  # and that keeps the function
    return token


_kept: list[Any] = []
_running: list[None] = []  # as long as there are calls now


def _flags() -> Any:
    """Return how many flags there are on this device in this process: none, unless one was put up here."""
    return tf.raw_ops.StageSize(dtypes=[tf.bool], shared_name=_FLAG)


def _raise_flag() -> None:
    """Let this process's graphs know that they have kernels: each time, for a new context has lost the flag."""
    atexit.unregister(_lower_flags)  # once, however often this is called
    atexit.register(_lower_flags)
    for device in tf.config.list_logical_devices("CPU"):
        with tf.device(device.name):
            if _flags() == 0:
                tf.raw_ops.Stage(values=[tf.constant(True)], shared_name=_FLAG)


def _lower_flags() -> None:
    """Let this process's graphs run operations from here on, and wait for the calls that have begun.

    What runs in TensorFlow's own threads, such as an endless dataset that is prefetched, goes on while Python ends. A
    call that waits for Python then never comes back, and TensorFlow's end waits for the call.
    """
    for device in tf.config.list_logical_devices("CPU"):
        with tf.device(device.name):
            tf.raw_ops.StageClear(dtypes=[tf.bool], shared_name=_FLAG)
    quiet = 0
    while quiet < _QUIET:
        time.sleep(0.001)  # without Python's lock, so that who waits for it comes in
        quiet = 0 if _running else quiet + 1

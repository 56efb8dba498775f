"""The kernels inside TensorFlow's graphs: where they are, that they compute the same, and what becomes of such graphs.

What must hold of models of Keras 3 and tf_keras is in `keras_graph_checks.py`, which runs once for each.
"""

import gc
import importlib.util
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import regkern as rk
from tests import processes
from tests.cases import NUMPY_DTYPES

tf = pytest.importorskip("tensorflow")

SHAPE = (200, 170)
REG = rk.L1L2(1e-3, 2e-3)
ALL = {"L1": rk.L1(1e-3), "L1L2": REG, **{m: rk.OrthogonalRegularizer(0.3, m) for m in ("rows", "columns")}}


def normal(*shape, dtype="float64", seed=0):
    return np.random.default_rng(seed).standard_normal(shape or SHAPE).astype(NUMPY_DTYPES[dtype])


def by_definition(x):
    return 1e-3 * tf.reduce_sum(tf.abs(x)) + 2e-3 * tf.reduce_sum(tf.square(x))


def differentiated(function, x, scale=1.0):
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = scale * function(x)
    return y, tape.gradient(y, x)


def step(regularizer):
    return tf.function(lambda x: differentiated(regularizer, x), autograph=False)


def has_kernels(function, *args):
    definition = function.get_concrete_function(*args).graph.as_graph_def()
    return any(node.op.startswith("PyFunc") for each in definition.library.function for node in each.node_def)


@pytest.mark.parametrize("dtype", NUMPY_DTYPES)
@pytest.mark.parametrize("name", ALL)
def test_results_have_the_bits_of_the_kernels(name, dtype):
    regularizer, array = ALL[name], normal(dtype=dtype)
    x = tf.constant(array)
    function = tf.function(lambda x: differentiated(regularizer, x, 2.0), autograph=False)
    assert has_kernels(function, x)
    value, gradient = function(x)
    assert value.numpy() == 2 * regularizer(array)
    np.testing.assert_array_equal(gradient.numpy(), regularizer.grad(array, scale=2.0))


@pytest.mark.parametrize("method", ["grad", "value_and_grad"])
def test_methods(method):
    array = normal()
    found = tf.function(getattr(REG, method), autograph=False)(tf.constant(array))
    expected = getattr(REG, method)(array)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_variables_that_a_graph_updates():
    array = normal(dtype="float32")
    variable = tf.Variable(array)

    @tf.function
    def train():
        with tf.GradientTape() as tape:
            loss = REG(variable)
        variable.assign_sub(tape.gradient(loss, variable))
        return loss

    assert has_kernels(train)
    for _ in range(3):
        expected = REG(array)
        assert float(train()) == expected
        array = array - REG.grad(array)
        np.testing.assert_array_equal(variable.numpy(), array)


FORWARD = tf.constant(normal(seed=1))


def hessian_product(function, x):
    with tf.GradientTape() as tape:
        tape.watch(x)
        _, gradient = differentiated(lambda x: function(x) ** 2, x)
    return tape.gradient(gradient, x, output_gradients=FORWARD)


def third_derivative(function, x):
    with tf.GradientTape() as tape:
        tape.watch(x)
        product = hessian_product(function, x)
    return tape.gradient(product, x, output_gradients=FORWARD)


def forward(function, x):
    with tf.autodiff.ForwardAccumulator(x, FORWARD) as accumulator:
        value, gradient = differentiated(lambda x: function(x) ** 2, x)
    return accumulator.jvp(value), accumulator.jvp(gradient)


def forward_of_a_factor(function, x):
    """What is differentiated comes to the penalty's gradient from above alone."""
    factor = tf.constant(2.0, x.dtype)
    with tf.autodiff.ForwardAccumulator(factor, tf.constant(1.5, x.dtype)) as accumulator:
        value, gradient = differentiated(lambda x: factor * function(x) ** 2, x)
    return accumulator.jvp(value), accumulator.jvp(gradient)


def jacobian(function, x):
    with tf.GradientTape() as tape:
        tape.watch(x)
        values = tf.stack([function(x), 2 * function(x), function(x) ** 2])
    return tape.jacobian(values, x)


def mapped(function, x):
    pieces = tf.stack([x, 2 * x])
    slopes = tf.vectorized_map(lambda x: differentiated(function, x)[1], pieces)
    return tf.vectorized_map(function, pieces), slopes, tf.map_fn(function, pieces)


def loop(function, x):
    total = tf.constant(0.0, x.dtype)
    with tf.GradientTape() as tape:
        tape.watch(x)
        _, total = tf.while_loop(lambda i, _: i < 3, lambda i, t: (i + 1, t + function(x) * (1.0 + t)), (0, total))
    return total, tape.gradient(total, x)


def conditional(function, x):
    return differentiated(lambda x: tf.cond(x[0, 0] > -9.0, lambda: function(x), lambda: 0 * x[0, 0]), x)


DERIVATIVES = [
    hessian_product, third_derivative, forward, forward_of_a_factor, jacobian, mapped, loop, conditional
]  # fmt: skip


@pytest.mark.parametrize("what", DERIVATIVES, ids=lambda what: what.__name__)
def test_derivatives_of_all_orders_and_modes(what):
    x = tf.constant(normal())
    found, expected = (
        tf.nest.flatten(tf.function(lambda x, f=f: what(f, x), autograph=False)(x)) for f in (REG, by_definition)
    )
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("what", [hessian_product, forward], ids=lambda what: what.__name__)
def test_derivatives_of_functions_from_outside(what):
    x = tf.constant(normal())
    found, expected = (tf.nest.flatten(what(tf.function(f, autograph=False), x)) for f in (REG, by_definition))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-8, atol=1e-12)


def test_where_operations_are_alone(monkeypatch):
    x = tf.constant(normal())
    assert has_kernels(step(REG), x)
    assert not has_kernels(step(rk.L2(0.1)), x)  # whose operations are as fast
    assert not has_kernels(step(REG), x[:10])
    assert not has_kernels(step(REG), tf.TensorSpec([None, 170], tf.float64))
    assert not has_kernels(tf.function(REG, jit_compile=True), x)
    with tf.Graph().as_default() as graph:
        REG(tf.compat.v1.placeholder(tf.float64, SHAPE))
    assert not any(node.op == "StatelessCase" for node in graph.as_graph_def().node)
    monkeypatch.setenv("REGKERN_TENSORFLOW_GRAPHS", "operations")
    assert not has_kernels(step(REG), x)
    np.testing.assert_allclose(step(REG)(x)[1], REG.grad(x.numpy()), rtol=1e-12)
    monkeypatch.setenv("REGKERN_TENSORFLOW_GRAPHS", "no")
    with pytest.raises(ValueError, match="REGKERN_TENSORFLOW_GRAPHS: expected 'kernels' or 'operations'; got 'no'; "):
        step(REG)(x)


def test_other_dtypes_are_named():
    with pytest.raises(TypeError, match=r"x: expected an array of float16.*; got dtype int32; convert it"):
        step(REG)(tf.ones(SHAPE, tf.int32))


@pytest.mark.parametrize("inner", ["function", "concrete"])
def test_a_function_that_was_traced_before_is_compiled_by_xla(inner):
    x = tf.constant(normal())
    traced = tf.function(REG, autograph=False)
    assert has_kernels(traced, x)
    function = traced if inner == "function" else traced.get_concrete_function(x)
    value, gradient = tf.function(lambda x: differentiated(function, x), jit_compile=True, autograph=False)(x)
    np.testing.assert_allclose(value, REG(x.numpy()), rtol=1e-12)
    np.testing.assert_allclose(gradient, REG.grad(x.numpy()), rtol=1e-12)


def test_functions_outlive_what_they_were_made_with():
    from regkern.arrays import tensorflow_graph

    x, function = tf.constant(normal()), step(REG)
    expected = function(x)
    tensorflow_graph._branches.cache_clear()
    tf.compat.v1.reset_default_graph()
    gc.collect()
    for one, other in zip(function(x), expected, strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(step(REG)(x)[1], expected[1])


class Trained(tf.Module):
    """A weight and the step that trains it, which is saved with it."""

    def __init__(self):
        super().__init__()
        self.weight = tf.Variable(normal(dtype="float32"))

    @tf.function(input_signature=[tf.TensorSpec((), tf.float32)])
    def train(self, rate):
        with tf.GradientTape() as tape:
            loss = REG(self.weight) + ALL["rows"](self.weight)
        self.weight.assign_sub(rate * tape.gradient(loss, self.weight))
        return {"loss": loss}


LOAD = """
import sys
if {without}:
    sys.modules["regkern"] = None  # as if it were not installed
else:
    import regkern.arrays.tensorflow
import numpy as np, tensorflow as tf
module = tf.saved_model.load({path!r})
print(float(module.train(0.1)["loss"]), float(module.signatures["serving_default"](rate=tf.constant(0.1))["loss"]))
np.save({path!r} + "/weight.npy", module.weight.numpy())
"""


def after_three_steps():
    module = Trained()
    losses = [float(module.train(0.1)["loss"]) for _ in range(3)]
    return losses, module.weight.numpy()


@pytest.mark.parametrize("without", [True, False])
def test_a_step_that_ran_is_saved_and_goes_on_elsewhere(without, tmp_path):
    losses, weight = after_three_steps()
    module = Trained()
    assert float(module.train(0.1)["loss"]) == losses[0]
    assert has_kernels(module.train)
    tf.saved_model.save(module, str(tmp_path), signatures=module.train)
    found = processes.run(LOAD.format(path=str(tmp_path), without=without), head="")
    np.testing.assert_allclose([float(loss) for loss in found.split()], losses[1:], rtol=1e-6)
    np.testing.assert_allclose(np.load(tmp_path / "weight.npy"), weight, rtol=1e-5, atol=1e-7)


def test_what_is_traced_to_be_saved_has_operations_alone(tmp_path):
    module = Trained()
    tf.saved_model.save(module, str(tmp_path))
    assert b"PyFunc" not in (tmp_path / "saved_model.pb").read_bytes()


def test_a_saved_step_is_loaded_by_a_session_and_here(tmp_path):
    losses, _ = after_three_steps()
    module = Trained()
    module.train(0.1)
    tf.saved_model.save(module, str(tmp_path), signatures=module.train)
    again = tf.saved_model.load(str(tmp_path))
    np.testing.assert_allclose(again.train(0.1)["loss"], losses[1], rtol=1e-6)
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        meta = tf.compat.v1.saved_model.load(session, ["serve"], str(tmp_path))
        signature = meta.signature_def["serving_default"]
        found = session.run(signature.outputs["loss"].name, {signature.inputs["rate"].name: 0.1})
    np.testing.assert_allclose(found, losses[1], rtol=1e-6)


def test_constants_for_variables():
    from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

    variable = tf.Variable(normal())
    frozen = convert_variables_to_constants_v2(tf.function(lambda: REG(variable)).get_concrete_function())
    np.testing.assert_allclose(frozen()[0], REG(variable.numpy()), rtol=1e-12)


@pytest.mark.filterwarnings("ignore")  # of the converter's own
@pytest.mark.parametrize("form", ["function", "saved"])
def test_conversion_to_tflite_of_a_function_that_ran(form, tmp_path):
    class Loss(tf.Module):
        def __init__(self):
            super().__init__()
            self.weight = tf.Variable(normal(dtype="float32"))

        @tf.function(input_signature=[tf.TensorSpec((), tf.float32)])
        def loss(self, scale):
            return scale * REG(self.weight)

    module = Loss()
    expected = float(module.loss(3.0))
    assert has_kernels(module.loss)
    if form == "saved":
        tf.saved_model.save(module, str(tmp_path), signatures=module.loss)
        converter = tf.lite.TFLiteConverter.from_saved_model(str(tmp_path))
    else:
        converter = tf.lite.TFLiteConverter.from_concrete_functions([module.loss.get_concrete_function()], module)
    interpreter = tf.lite.Interpreter(model_content=converter.convert())
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], np.float32(3.0))
    interpreter.invoke()
    found = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
    np.testing.assert_allclose(found, expected, rtol=1e-5)


OTHER_HOST = """
import tensorflow as tf
import regkern as rk

server = tf.distribute.Server.create_local_server()
tf.config.experimental_connect_to_host(server.target)
function = tf.function(rk.L1L2(0.1, 0.2))
x = tf.ones((300, 300))
print("PyFunc" in str(function.get_concrete_function(x).graph.as_graph_def()))
with tf.device("/job:worker/task:0/device:CPU:0"):
    penalty = function(x)
print(float(penalty))
"""


def test_other_hosts_have_operations_alone():
    kernels, penalty = processes.run(OTHER_HOST, head="").split()
    assert kernels == "False"
    assert float(penalty) == pytest.approx(27000.0, rel=1e-6)


MESH = """
import numpy as np
import tensorflow as tf
import regkern as rk

dtensor = tf.experimental.dtensor
cpus = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(cpus[0], [tf.config.LogicalDeviceConfiguration()] * 2)
mesh = dtensor.create_mesh([("x", 2)], devices=["CPU:0", "CPU:1"])
weight = dtensor.call_with_layout(tf.ones, dtensor.Layout(["x", "unsharded"], mesh), shape=(300, 300))
print(float(tf.function(rk.L1L2(0.1, 0.2))(weight)))
"""


def test_meshes_of_dtensors():
    assert float(processes.run(MESH, head="")) == pytest.approx(27000.0, rel=1e-6)


REPLICAS = """
import numpy as np
import tensorflow as tf
import regkern as rk

cpus = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(cpus[0], [tf.config.LogicalDeviceConfiguration()] * 2)
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
reg, array = rk.L1L2(1e-3, 2e-3), np.random.default_rng(0).standard_normal((300, 300)).astype("float32")
with strategy.scope():
    variable = tf.Variable(array)

def replica():
    with tf.GradientTape() as tape:
        loss = reg(variable)
    gradient = tape.gradient(loss, variable)
    everywhere = tf.distribute.get_replica_context().all_reduce("sum", gradient)
    variable.assign_sub(everywhere)
    return loss

@tf.function
def step():
    return strategy.run(replica)

for _ in range(3):
    losses = [float(loss) for loss in step().values]
    assert losses == [float(reg(array))] * 2, losses
    array = array - 2 * reg.grad(array)
    for value in variable.values:
        np.testing.assert_allclose(value.numpy(), array, rtol=1e-6, atol=1e-8)
print("PyFunc" in str(step.get_concrete_function().graph.as_graph_def()))
"""


def test_mirrored_replicas_on_two_cpus():
    assert processes.run(REPLICAS, head="").split()[-1] == "True"


THREADS = """
import os, threading
import numpy as np
import tensorflow as tf
import regkern as rk

tf.config.threading.set_inter_op_parallelism_threads({threads})
tf.config.threading.set_intra_op_parallelism_threads({threads})
reg, array = rk.L1L2(1e-3, 2e-3), np.random.default_rng(0).standard_normal((300, 300)).astype("float32")
expected = [reg(np.float32(i) * array) for i in range(40)]

data = tf.data.Dataset.range(40).map(
    lambda i: reg(tf.cast(i, tf.float32) * array), num_parallel_calls=4
).prefetch(2)
concrete = tf.function(reg).get_concrete_function(tf.constant(array))
assert "PyFunc" in str(concrete.graph.as_graph_def())
np.testing.assert_array_equal([float(value) for value in data], expected)  # beside Python, which holds the GIL

@tf.function
def many(x):
    return tf.stack([reg(tf.cast(i, tf.float32) * x) for i in range(40)])  # side by side

def work():
    for _ in range(5):
        np.testing.assert_array_equal(many(tf.constant(array)), expected)
        np.testing.assert_array_equal([float(value) for value in data], expected)
        assert reg(array) == expected[1]
        done.append(1)

done = []
workers = [threading.Thread(target=work) for _ in range(6)]
for worker in workers:
    worker.start()
for worker in workers:
    worker.join()
assert len(done) == 30
endless = iter(tf.data.Dataset.range(10**9).map(lambda i: reg(tf.cast(i, tf.float32) * array)).prefetch(4))
next(endless)
print("done", flush=True)
"""


@pytest.mark.parametrize("threads", [1, 4])
def test_threads_that_call_back_wait_for_nobody(threads):
    """Many at once, from `tf.data` and from the graph, in pools of one thread too; the end of the program as well."""
    assert processes.run(THREADS.format(threads=threads), head="", patience=240).split() == ["done"]


def test_one_function_in_many_threads():
    x, function, found = tf.constant(normal()), step(REG), []
    expected = REG.grad(x.numpy())

    def work():
        found.extend(np.array_equal(function(x)[1], expected) for _ in range(10))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 80


@pytest.mark.parametrize("library", ["keras", "tf_keras"])
def test_checks(library):
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    environment = os.environ | {"KERAS_LIBRARY": library, "KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3"}
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command = [sys.executable, "-m", "pytest", *options, "tests/keras_graph_checks.py"]
    root = Path(__file__).parent.parent
    result = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]

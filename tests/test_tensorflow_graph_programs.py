"""Programs of many threads, devices and hosts, whose graphs may have the kernels: each is a process of its own."""

import pytest

from tests import processes

pytest.importorskip("tensorflow")


OTHER_HOST = """
import tensorflow as tf
import regkern as rk

server = tf.distribute.Server.create_local_server()
tf.config.experimental_connect_to_host(server.target)
reg = rk.L1L2(0.1, 0.2)
function, x = tf.function(reg), tf.ones((300, 300))
print("PyFunc" in str(function.get_concrete_function(x).graph.as_graph_def()))
with tf.device("/job:worker/task:0/device:CPU:0"):
    print(float(function(x)))
    eager = reg(tf.ones((3, 3)))
print(float(eager), eager.backing_device)
"""


@pytest.mark.slow
def test_other_hosts_have_operations_alone():
    kernels, penalty, eager, device = processes.run(OTHER_HOST, head="").split()
    assert kernels == "False"
    assert float(penalty) == pytest.approx(27000.0, rel=1e-6)
    assert float(eager) == pytest.approx(2.7, rel=1e-6)
    assert device.startswith("/job:worker/")


HEAD = """
import threading
import numpy as np
import tensorflow as tf
import regkern as rk

cpus = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(cpus[0], [tf.config.LogicalDeviceConfiguration()] * 2)
tf.config.threading.set_inter_op_parallelism_threads({threads})
tf.config.threading.set_intra_op_parallelism_threads({threads})
reg, array = rk.L1L2(1e-3, 2e-3), np.random.default_rng(0).standard_normal((300, 300)).astype("float32")

def has_kernels(function, *arguments):
    return "PyFunc" in str(function.get_concrete_function(*arguments).graph.as_graph_def())
"""
REPLICAS = """
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
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

weight = array
for _ in range(3):
    losses = [float(loss) for loss in step().values]
    assert losses == [float(reg(weight))] * 2, losses
    weight = weight - 2 * reg.grad(weight)
    for value in variable.values:
        np.testing.assert_allclose(value.numpy(), weight, rtol=1e-6, atol=1e-8)
assert has_kernels(step)
print("replicas", flush=True)
"""
THREADS = """
expected = [reg(np.float32(i) * array) for i in range(40)]
data = tf.data.Dataset.range(40).map(
    lambda i: reg(tf.cast(i, tf.float32) * array), num_parallel_calls=4
).prefetch(2)
assert has_kernels(tf.function(reg), tf.constant(array))
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
print("threads", flush=True)
"""
MESH = """
dtensor = tf.experimental.dtensor
mesh = dtensor.create_mesh([("x", 2)], devices=["CPU:0", "CPU:1"])
weight = dtensor.call_with_layout(tf.ones, dtensor.Layout(["x", "unsharded"], mesh), shape=(300, 300))
np.testing.assert_allclose(float(tf.function(rk.L1L2(0.1, 0.2))(weight)), 27000.0, rtol=1e-6)
print("mesh", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 4])
def test_mirrored_replicas_threads_that_call_back_and_meshes(threads):
    """On two devices; many calls at once, from `tf.data` and from the graph, in pools of one thread too."""
    code = HEAD.format(threads=threads) + REPLICAS + THREADS + MESH
    assert processes.run(code, head="", patience=240).split()[-3:] == ["replicas", "threads", "mesh"]


ENDLESS = """
import numpy as np
import tensorflow as tf
import regkern as rk

reg, array = rk.L1L2(1e-3, 2e-3), np.ones((300, 300), "float32")
data = tf.data.Dataset.range(10**9).map(lambda i: reg(tf.cast(i, tf.float32) * array), num_parallel_calls=4)
endless = [iter(data.prefetch(10**7)) for _ in range(4)]
for each in endless:
    next(each)
print("done", flush=True)
"""


@pytest.mark.slow
def test_a_program_ends_while_threads_call_back():
    assert processes.run(ENDLESS, head="", patience=120).split() == ["done"]

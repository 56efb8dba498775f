"""What becomes of graphs that have the kernels: saved, frozen, converted, and run where regkern is not."""

import numpy as np
import pytest

from tests import processes
from tests.tensorflow_graphs import ALL, REG, has_kernels, normal

tf = pytest.importorskip("tensorflow")


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
sys.modules["regkern"] = None  # as if it were not installed
import numpy as np, tensorflow as tf

def go_on(name):
    module = tf.saved_model.load("{path}")
    print(float(module.train(0.1)["loss"]), float(module.signatures["serving_default"](rate=tf.constant(0.1))["loss"]))
    np.save(f"{path}/{{name}}.npy", module.weight.numpy())

go_on("without")
del sys.modules["regkern"]
import regkern.arrays.tensorflow
go_on("with")
"""


def after_three_steps():
    module = Trained()
    losses = [float(module.train(0.1)["loss"]) for _ in range(3)]
    return losses, module.weight.numpy()


@pytest.mark.slow
def test_a_step_that_ran_is_saved_and_goes_on_elsewhere(tmp_path):
    losses, weight = after_three_steps()
    module = Trained()
    assert float(module.train(0.1)["loss"]) == losses[0]
    assert has_kernels(module.train)
    tf.saved_model.save(module, str(tmp_path), signatures=module.train)
    found = processes.run(LOAD.format(path=tmp_path), head="")
    np.testing.assert_allclose([float(loss) for loss in found.split()], 2 * losses[1:], rtol=1e-6)
    for name in ("without", "with"):
        np.testing.assert_allclose(np.load(tmp_path / f"{name}.npy"), weight, rtol=1e-5, atol=1e-7)


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

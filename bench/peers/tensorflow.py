"""TensorFlow, under its tape and in its graphs, and regkern there."""

import functools
import warnings

from bench.formulas import tensorflow_orthogonal, tensorflow_penalty
from bench.peers.registry import peer
from bench.peers.regkern import REGULARIZER


@functools.cache
def _tensorflow():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import tensorflow as tf
    return tf


def _taped(penalty, x):
    tf = _tensorflow()
    variable = tf.Variable(x)

    def call():
        with tf.GradientTape() as tape:
            value = penalty(variable)
        return value, tape.gradient(value, variable)

    return call


@peer("tensorflow_tape", "regkern")
def regkern_tensorflow_tape(x):
    return _taped(REGULARIZER, x)


@peer("tensorflow_tape", "tensorflow")
def tensorflow_tape(x):
    return _taped(tensorflow_penalty, x)


@peer("tensorflow_graph", "regkern")
def regkern_tensorflow_graph(x):
    return _tensorflow().function(_taped(REGULARIZER, x))


@peer("tensorflow_graph", "tensorflow")
def tensorflow_graph(x):
    return _tensorflow().function(_taped(tensorflow_penalty, x))


@peer("gram", "tensorflow")
def tensorflow_gram(x):
    tf = _tensorflow()
    orthogonal = tf.function(tensorflow_orthogonal)
    tensor = tf.constant(x)
    return lambda: orthogonal(tensor).numpy()

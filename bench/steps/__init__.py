"""What a training step takes longer because of a penalty: `python -m bench.steps`.

Every program, model and batch size has a process of its own, in which the step without a penalty, with the framework's
own, with its best known way and with regkern take turns.
"""

from typing import NamedTuple

L1, L2 = 1e-5, 1e-4


class Sizes(NamedTuple):
    """How large the models are: units of the perceptron, of the transformer, channels, rows of the embedding."""

    width: int
    model: int
    layers: int
    channels: int
    rows: int


FULL = Sizes(2048, 384, 6, 32, 100_000)
SMALL = Sizes(16, 12, 1, 4, 50)
IMAGE = 32  # pixels each way
SEQUENCE = 16  # of the transformer
LOOKUPS = 16  # of the embedding, for each row of a batch
CLASSES = 10

# Steps that are timed together: about half a second of each model on two cores.
STEPS = {"mlp": 10, "conv": 4, "transformer": 2, "embedding": 40}
MODELS = tuple(STEPS)
BATCHES = (32, 256)
PROGRAMS = {
    "torch": "torch",
    "keras torch": "Keras fit on torch",
    "keras tensorflow": "Keras fit on TensorFlow",
    "tf_keras": "tf_keras fit",
    "tensorflow": "tf.function of one's own",
    "keras jax": "Keras fit on JAX",
    "jax": "a jitted step of one's own, JAX",
}
PENALTIES = {"l1l2": "L1L2", "l2": "L2"}
WAYS = ("own", "best", "regkern", "attached")


def steps(model: str, batch: int, sizes: Sizes) -> int:
    """Return how many steps are timed together."""
    return max(1, STEPS[model] * min(BATCHES) // batch) if sizes is FULL else 1

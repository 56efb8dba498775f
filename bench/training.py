"""What a proximal callback costs: a step of `fit` with it, over that of one without, in one process.

    python -m bench.training [torch | jax | tensorflow | tf_keras]...

Rounds alternate; a step is an epoch's time over its steps, since JAX only queues them. The large model has four layers
of 2048 x 2048, the small one is 64-128-64-10.
"""

import os
import subprocess
import sys
import time
from statistics import median

LIBRARIES = ("torch", "jax", "tensorflow", "tf_keras")
MODELS = {"four of 2048 x 2048": ([2048] * 4, 2048), "64-128-64-10": ([128, 64, 10], 64)}
ROUNDS = 7


def measure(library: str) -> None:
    """Print what each model's step takes, in a process of its own: Keras's backend is chosen once for each."""
    os.environ["KERAS_BACKEND"] = "tensorflow" if library == "tf_keras" else library
    keras = __import__("tf_keras" if library == "tf_keras" else "keras")
    import numpy as np

    import regkern as rk
    import regkern.keras

    class Clock(keras.callbacks.Callback):  # type: ignore[misc]
        def on_train_batch_begin(self, batch, logs=None):
            if batch == 0:
                self.start = time.perf_counter()

        def on_train_batch_end(self, batch, logs=None):
            self.done = batch + 1

        def on_epoch_end(self, epoch, logs=None):
            float(logs["loss"])  # waits
            self.step = (time.perf_counter() - self.start) / self.done

    for name, (widths, inputs) in MODELS.items():
        for batch in (32, 256) if inputs > 1000 else (32,):
            steps = 12 if inputs > 1000 else 100
            first = keras.layers.InputLayer((inputs,)) if library == "tf_keras" else keras.Input((inputs,))
            model = keras.Sequential([first, *(keras.layers.Dense(width, "relu") for width in widths)])
            model.compile(keras.optimizers.SGD(1e-3), "mse")
            rng = np.random.default_rng(0)
            x = rng.standard_normal((steps * batch, inputs), np.float32)
            y = rng.standard_normal((steps * batch, widths[-1]), np.float32)
            times: dict[str, list[float]] = {"without": [], "with": [], "every=10": []}
            for _ in range(ROUNDS):
                for way, found in times.items():
                    every = {"with": 1, "every=10": 10}.get(way)
                    clock = Clock()
                    callbacks = [clock]
                    if every:
                        callbacks.append(rk.keras.ProximalCallback({"*kernel*": rk.L1(1e-3)}, every))
                    model.fit(x, y, batch_size=batch, verbose=0, callbacks=callbacks)
                    found.append(clock.step)
            base = median(times["without"])
            row = f"{library}, {name}, batch {batch}: {1e3 * base:.2f} ms"
            for way in ("with", "every=10"):
                own = median(times[way])
                row += f"; {way} +{1e3 * (own - base):.2f} ms ({own / base:.3f})"
            print(row, flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] == "--one":
        measure(sys.argv[2])
    else:
        for each in sys.argv[1:] or LIBRARIES:
            subprocess.run([sys.executable, "-m", "bench.training", "--one", each], check=True)

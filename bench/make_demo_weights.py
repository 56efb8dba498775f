"""Trains the network whose weights `regkern report --demo` shows, and writes regkern/data/demo.safetensors.

A perceptron of four layers on the UCI digits (scikit-learn carries them), in NumPy: gradient descent with momentum on
the cross-entropy and an L2 penalty, whose gradient regkern adds in place, and after each step the proximal operator of
an L1 penalty, which makes most weights exactly zero. Prints the objective and the accuracy on images it did not see.
"""

from itertools import pairwise
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from sklearn.datasets import load_digits

import regkern as rk

WIDTHS = (64, 128, 64, 32, 10)
SMOOTH, SPARSE = rk.L1L2(l2=1e-4), rk.L1L2(l1=4e-4)
LEARNING_RATE, MOMENTUM, BATCH, EPOCHS = 0.05, 0.9, 64, 120
TARGET = Path(__file__).parent.parent / "regkern" / "data" / "demo.safetensors"


def main() -> None:
    """Train, print what came of it, and write the file."""
    random = np.random.default_rng(2024)
    images, labels = load_digits(return_X_y=True)
    images = (images / 16.0).astype(np.float32)
    order = random.permutation(len(labels))
    test, train = order[:400], order[400:]
    kernels = [
        random.normal(0.0, (2.0 / fan_in) ** 0.5, (fan_in, fan_out)).astype(np.float32)
        for fan_in, fan_out in pairwise(WIDTHS)
    ]
    biases = [np.zeros(width, np.float32) for width in WIDTHS[1:]]
    velocities = [np.zeros_like(parameter) for parameter in (*kernels, *biases)]

    for epoch in range(EPOCHS):
        rate = np.float32(LEARNING_RATE * (1 - epoch / EPOCHS))
        losses = []
        for batch in np.array_split(random.permutation(train), len(train) // BATCH):
            loss, gradients = loss_and_gradients(kernels, biases, images[batch], labels[batch])
            for kernel, gradient in zip(kernels, gradients, strict=False):
                penalty, penalty_gradient = SMOOTH.value_and_grad(kernel)
                gradient += penalty_gradient
                loss += float(penalty) + float(SPARSE(kernel))
            losses.append(loss)
            for parameter, velocity, gradient in zip((*kernels, *biases), velocities, gradients, strict=True):
                velocity *= MOMENTUM
                velocity -= rate * gradient
                parameter += velocity
            for kernel in kernels:  # with momentum, a gradient moves a weight by rate / (1 - MOMENTUM) in all
                SPARSE.prox(kernel, float(rate) / (1 - MOMENTUM), out=kernel)
        if epoch % 20 == 19:
            print(f"epoch {epoch + 1}: objective {np.mean(losses):.4f}")

    accuracy = float((predict(kernels, biases, images[test])[-1].argmax(axis=1) == labels[test]).mean())
    zeros = sum(int((kernel == 0).sum()) for kernel in kernels) / sum(kernel.size for kernel in kernels)
    names = [*(f"dense_{i + 1}" for i in range(len(kernels) - 1)), "logits"]
    tensors = {f"{name}.kernel": kernel for name, kernel in zip(names, kernels, strict=True)}
    tensors |= {f"{name}.bias": bias for name, bias in zip(names, biases, strict=True)}
    # One entry: safetensors writes several in random order.
    about = {
        "about": f"a perceptron on the UCI digits, test accuracy {accuracy:.4f}; made by bench/{Path(__file__).name}"
    }
    TARGET.parent.mkdir(exist_ok=True)
    save_file(tensors, TARGET, metadata=about)
    print(f"test accuracy {accuracy:.1%}, {zeros:.1%} of the kernels zero, {TARGET.stat().st_size} bytes: {TARGET}")


def predict(kernels: list[np.ndarray], biases: list[np.ndarray], x: np.ndarray) -> list[np.ndarray]:
    """Return the input of every layer, and the logits."""
    activations = [x]
    for i, (kernel, bias) in enumerate(zip(kernels, biases, strict=True)):
        x = x @ kernel + bias
        if i < len(kernels) - 1:
            x = np.maximum(x, 0)
        activations.append(x)
    return activations


def loss_and_gradients(
    kernels: list[np.ndarray], biases: list[np.ndarray], x: np.ndarray, labels: np.ndarray
) -> tuple[float, list[np.ndarray]]:
    """Return the mean cross-entropy and its gradients, of all kernels and then of all biases."""
    *inputs, logits = predict(kernels, biases, x)
    logits = logits - logits.max(axis=1, keepdims=True)
    probabilities = np.exp(logits)
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    rows = np.arange(len(labels))
    loss = -float(np.log(probabilities[rows, labels]).mean())
    delta = probabilities
    delta[rows, labels] -= 1
    delta /= len(labels)
    kernel_gradients, bias_gradients = [], []
    for i in reversed(range(len(kernels))):
        kernel_gradients.insert(0, inputs[i].T @ delta)
        bias_gradients.insert(0, delta.sum(axis=0))
        delta = (delta @ kernels[i].T) * (inputs[i] > 0)
    return loss, kernel_gradients + bias_gradients


if __name__ == "__main__":
    main()

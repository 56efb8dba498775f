"""A demonstration in NumPy alone: which features matter, by a penalty's gradient and by its proximal step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from regkern.regularizers import L1, MCP
from regkern.tables import Column, table

SAMPLES, FEATURES, RELEVANT, STEPS = 400, 1000, 20, 300

_Update = Callable[[Any, Any, float], None]


class Result(NamedTuple):
    """What one way of training has found.

    Attributes:
        name: the way.
        zeros: the share of weights that are exactly zero.
        found: how many of the relevant features have a weight.
        wrong: how many others have one.
        error: the norm of the weights' difference to the true ones, over the norm of these.
    """

    name: str
    zeros: float
    found: int
    wrong: int
    error: float


class Problem:
    """A linear model with few features that matter, and noise: ``minimise ||X w - y||**2 / (2 n) + P(w)``."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self._x = rng.standard_normal((SAMPLES, FEATURES))
        self._truth = np.zeros(FEATURES)
        relevant = rng.choice(FEATURES, RELEVANT, replace=False)
        self._truth[relevant] = rng.choice([-1, 1], RELEVANT) * rng.uniform(0.5, 2.0, RELEVANT)
        self._y = self._x @ self._truth + 0.5 * rng.standard_normal(SAMPLES)
        self._rate = float(SAMPLES / np.linalg.norm(self._x, 2) ** 2)  # one over the largest curvature

    def descend(self, update: _Update) -> Iterator[Any]:
        """Yield the weights, the same array, after each step.

        Args:
            update: a function of the weights, the gradient of the loss and the rate, which moves the weights in place.
        """
        weights = np.zeros(FEATURES)
        for _ in range(STEPS):
            gradient = self._x.T @ (self._x @ weights - self._y) / SAMPLES
            update(weights, gradient, self._rate)
            yield weights

    def judge(self, name: str, weights: Any) -> Result:
        """Compare weights with the true ones."""
        found, true = weights != 0, self._truth != 0
        error = float(np.linalg.norm(weights - self._truth) / np.linalg.norm(self._truth))
        return Result(name, float(1 - found.mean()), int((found & true).sum()), int((found & ~true).sum()), error)


def _plain(weights: Any, gradient: Any, rate: float) -> None:
    weights -= rate * gradient


def _in_the_loss(weights: Any, gradient: Any, rate: float) -> None:
    L1(0.1).grad(weights, out=gradient, accumulate=True)
    weights -= rate * gradient


def _soft_threshold(weights: Any, gradient: Any, rate: float) -> None:
    weights -= rate * gradient
    L1(0.1).prox(weights, rate, out=weights)


def _concave(weights: Any, gradient: Any, rate: float) -> None:
    weights -= rate * gradient
    MCP(0.2).prox(weights, rate, out=weights)


WAYS: dict[str, _Update] = {
    "no penalty": _plain,
    "L1(0.1) in the loss": _in_the_loss,
    "L1(0.1).prox": _soft_threshold,
    "MCP(0.2).prox": _concave,
}


def lines(results: Sequence[Result]) -> list[str]:
    """Return the lines of a table."""
    columns = [
        Column("w is trained with", lambda each: each.name, right=False),
        Column("exact zeros", lambda each: f"{each.zeros:.1%}"),
        Column("found", lambda each: f"{each.found}/{RELEVANT}"),
        Column("wrong", lambda each: str(each.wrong)),
        Column("error of w", lambda each: f"{each.error:.1%}"),
    ]
    return table(columns, results, 10_000)

"""What a user's type checker sees: mypy and pyright check this file, and pytest runs it.

An error that they must find is marked as ignored; an ignore without an error is an error in strict mode.
"""

from importlib.resources import files
from typing import Any, assert_type

import numpy as np
import numpy.typing as npt
import pytest

import regkern as rk


class Lazy:
    """Stands for another library's arrays, of which mypy reads none."""


X: npt.NDArray[np.float64] = np.ones((2, 3))


def test_the_package_says_that_it_is_typed() -> None:
    assert files(rk).joinpath("py.typed").is_file()


def test_regularizers() -> None:
    assert_type(rk.L1(0.1), rk.L1)
    assert_type(rk.l2(None), rk.L2)
    assert_type(rk.l1_l2(l1=0.1), rk.L1L2)
    assert_type(rk.L1L2.from_config({"l1": 0.1}), rk.L1L2)
    assert_type(rk.L1L2(0.1, 0.2).l2, float)
    assert_type(rk.OrthogonalRegularizer(mode="columns").factor, float)
    assert_type(rk.L2(0.1).get_config(), dict[str, Any])
    assert_type(rk.L2(np.array(0.1)), rk.L2)
    rk.L2(0.1).prox(X, np.array(0.1))
    assert_type(rk.__version__, str)


def test_results_are_of_the_arrays_library() -> None:
    regularizer = rk.L1L2(0.1, 0.2)
    assert_type(regularizer(X), np.floating[Any])
    assert_type(regularizer.value_and_grad(X), tuple[np.floating[Any], npt.NDArray[Any]])
    assert_type(regularizer.grad(X, scale=2.0), npt.NDArray[np.float64])
    assert_type(regularizer.prox(X, 0.1, out=X.copy()), npt.NDArray[np.float64])
    lazy = Lazy()
    with pytest.raises(TypeError, match="Lazy"):
        assert_type(regularizer(lazy), Lazy)
    with pytest.raises(TypeError, match="Lazy"):
        assert_type(regularizer.value_and_grad(lazy), tuple[Lazy, Lazy])
    assert_type(regularizer.finish(regularizer.combine([regularizer.partial(X)])), Any)
    assert_type(rk.activity_penalty(regularizer, X), Any)
    assert_type(rk.reductions.abs_sum(X), np.floating[Any])
    assert_type(rk.reductions.abs_square_sums(X), tuple[np.floating[Any], np.floating[Any]])
    assert_type(rk.reductions.gram_offdiagonal_mean(X, mode="columns"), np.floating[Any])


def test_whole_models() -> None:
    penalty = rk.Penalty({"*bias": None, "*": "l2"})
    assert_type(penalty({"kernel": X}), np.floating[Any])
    assert_type(penalty.per_tensor({"kernel": X}), dict[str, Any])
    assert_type(penalty.per_tensor({"kernel": X}, floats=True), dict[str, float])
    bound = penalty.bind({"kernel": X.copy()})
    assert_type(bound, rk.BoundPenalty)
    assert_type(bound.value_and_grad(), tuple[Any, dict[str, Any]])
    assert_type(rk.Penalty.from_config(penalty.get_config()), rk.Penalty)
    assert_type(rk.warmup([]), int)


def test_a_subclass_keeps_its_type() -> None:
    @rk.register_keras_serializable(package="Typed")
    class Range(rk.Regularizer):
        def __init__(self, factor: float = 0.1) -> None:
            self.factor = factor

        def __call__(self, x: npt.NDArray[np.float64]) -> float:
            return self.factor * float(x.max() - x.min())

        def get_config(self) -> dict[str, Any]:
            return {"factor": self.factor}

    assert_type(Range.from_config({"factor": 0.5}), Range)
    assert_type(Range()(X), float)


def test_what_a_checker_refuses() -> None:
    with pytest.raises(ValueError, match="expected a non-negative float"):
        rk.L2("0.1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected a finite number"):
        rk.L2(0.1).grad(X, scale="0.1")  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        rk.L1L2(factor=0.1)  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        rk.L2(0.1).prox(X)  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        rk.Penalty([("*", "l2")])  # type: ignore[arg-type]
    with pytest.raises(AttributeError):
        rk.L3  # type: ignore[attr-defined]  # noqa: B018

"""The rates of Keras's optimizers: of the step that was just done, for each variable its own."""

from collections.abc import Iterator
from typing import Any

from regkern.serialization import keras_libraries


def optimizers_of(model: Any) -> list[Any]:
    """Return the optimizers that have a rate: those inside of wrappers, of a MultiOptimizer all.

    Raises:
        ValueError: the model was not compiled, or its optimizer has no rate.
    """
    optimizer = getattr(model, "optimizer", None)
    if optimizer is None:
        raise ValueError(
            f"model: expected one with an optimizer, whose rate is the step; got {type(model).__name__} "
            "without one; call model.compile first."
        )
    found = list(_inside(optimizer))
    for each in found:
        rate = _rate(each)
        if rate is None or not (callable(rate) or _is_number(rate)):
            raise ValueError(
                f"optimizer: expected one with a learning rate, which is the step; got {type(each).__name__}, "
                f"which has {'none' if rate is None else f'the rate {rate!r}'}; use an optimizer of Keras, "
                "or call Penalty.bind(model).prox_(step) in a loop of your own."
            )
    return found


def steps_done(optimizer: Any) -> int:
    """Return how often an optimizer has updated variables: not while it accumulates, nor where it skips a step."""
    return int(optimizer.iterations)


class Skips:
    """Notices steps that tf_keras's LossScaleOptimizer skips, since it counts them as done.

    It starts to count finite steps anew where gradients were not finite, and where it has let its scale grow.

    Args:
        optimizer: a model's.

    Attributes:
        count: how many have been noticed.
    """

    def __init__(self, optimizer: Any) -> None:
        dynamic = getattr(optimizer, "dynamic", False) and hasattr(optimizer, "dynamic_counter")
        self.count = 0
        self._optimizer = optimizer if dynamic else None
        self._scale = float(optimizer.loss_scale) if dynamic else 0.0

    def look(self) -> None:
        """Count the step that was just counted as done, if it was skipped."""
        if self._optimizer is not None:
            before, self._scale = self._scale, float(self._optimizer.loss_scale)
            self.count += int(self._optimizer.dynamic_counter) == 0 and self._scale <= before


def rate_of_last_step(optimizer: Any) -> float:
    """Return the rate of the step that was just done: a schedule's at one iteration less than are counted now."""
    rate: Any = _rate(optimizer)
    schedules = [library.optimizers.schedules.LearningRateSchedule for library in keras_libraries()]
    if any(isinstance(rate, each) for each in schedules):
        iterations = getattr(optimizer, "_iterations", None)
        rate = rate((optimizer.iterations if iterations is None else iterations) - 1)
    elif callable(rate) and not _is_number(rate):
        rate = rate()
    found = float(rate)
    decay = getattr(optimizer, "_initial_decay", 0.0)  # of tf_keras's legacy optimizers
    return found / (1.0 + decay * (int(optimizer.iterations) - 1)) if decay else found


def _inside(optimizer: Any) -> Iterator[Any]:
    """Yield the optimizers inside of those that have no rate of their own."""
    several = getattr(optimizer, "optimizers", None)
    inner = getattr(optimizer, "inner_optimizer", None) or getattr(optimizer, "_optimizer", None)
    if isinstance(several, list | tuple):
        for each in several:
            yield from _inside(each)
    elif inner is not None:
        yield from _inside(inner)
    else:
        yield optimizer


def _rate(optimizer: Any) -> Any:
    """Return what an optimizer's rate is: a number, variable or schedule; None where it has none."""
    for owner, name in ((optimizer, "_learning_rate"), (getattr(optimizer, "_hyper", {}), "learning_rate")):
        rate = owner.get(name) if isinstance(owner, dict) else getattr(owner, name, None)
        if rate is not None:
            return rate
    return getattr(optimizer, "learning_rate", None)


def _is_number(rate: Any) -> bool:
    return not isinstance(rate, str | bool) and (isinstance(rate, int | float) or getattr(rate, "shape", None) == ())

"""What `fit` does beside the optimizer's steps: proximal steps, and factors that move."""

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

from regkern import reductions
from regkern.bound import BoundPenalty
from regkern.keras.rates import Skips, optimizers_of, rate_of_last_step, steps_done
from regkern.keras.registration import library_of
from regkern.numbers import real
from regkern.penalty import Penalty
from regkern.serialization import keras_libraries
from regkern.training import completed, penalised

# Up to how many elements zeros are counted after each proximal step, and after how many steps in larger models: a pass
# over a million takes 0.1 ms.
_COUNTED_ALWAYS = 1_000_000
_COUNTED_EVERY = 16


@functools.cache
def _class_for(cls: Any, bases: tuple[type, ...]) -> type:
    made = type(cls.__name__, (cls, *bases), {"__doc__": cls.__doc__, "__module__": cls.__module__})
    made._of = cls  # type: ignore[attr-defined]
    return made


class _Callback:
    """A callback of Keras 3 and of tf_keras, of those that are loaded when it is made."""

    _of: type
    _arguments: tuple[Any, ...]  # of the constructor
    model: Any

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        _, *parameters = inspect.signature(cls.__init__).parameters.values()
        cls.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # and not that of __new__

    def __new__(cls, *arguments: Any, **keywords: Any) -> Any:
        bases = tuple(library.callbacks.Callback for library in keras_libraries())
        made: Any = cls if hasattr(cls, "_of") else _class_for(cls, bases)  # type: ignore[arg-type]
        return object.__new__(made)

    def __reduce__(self) -> Any:
        return self._of, self._arguments


class ProximalCallback(_Callback):
    """Makes weights exactly zero while `fit` trains: a proximal step after each batch, in place.

    After the optimizer's step on the loss without the penalties, ``w = argmin_z rate * P(z) + ||z - w||**2 / 2``:
    proximal gradient descent, where L1 makes exact zeros and the group lasso whole rows or filters of them. The rate is
    that of the step just done: of a schedule, of the optimizer inside of a wrapper, of each variable its own where an
    optimizer has several. Where no step was done, because gradients are accumulated or were not finite, there is no
    proximal step either. An optimizer that scales its
    steps, such as Adam, has no such scale here: the step is its rate.

    The share of exact zeros among the elements of tensors that have a regularizer is in the logs as "zeros": in the
    progress bar, the history and all callbacks that come after this one. It is that of the epoch's end in an epoch's
    logs; in a batch's, in models of more than a million such elements, that of up to 16 steps ago.

    It is for every backend of Keras 3, and for tf_keras. Put it before callbacks that set the rate when a batch ends.
    With `steps_per_execution`, there is one proximal step for each execution. Penalties that the loss has already
    should not be here as well.

    Args:
        rules: globs over the paths of variables and their regularizers, as for `Penalty`, or a `Penalty`. Names that
            no rule matches are left alone.
        every: after how many batches there is a proximal step, whose size is the rate of the last of them. The penalty
            is then that much weaker: multiply its factor by as much.

    Raises:
        RuleError: a rule is no glob, or its regularizer is none.
        ValueError: `every` is no positive integer.

    `fit` raises, before it trains: RuleError where a rule that has a regularizer matches no trained variable;
    TypeError where a regularizer has no proximal operator; ValueError where the optimizer has no rate.

    Examples:
        >>> import keras, numpy as np
        >>> import regkern as rk
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1, kernel_initializer="ones")])
        >>> model.compile(keras.optimizers.SGD(0.1), "mse")
        >>> callback = ProximalCallback({"*kernel": rk.L1(20.0)})
        >>> history = model.fit(np.zeros((8, 4)), np.zeros((8, 1)), callbacks=[callback], verbose=0)
        >>> history.history["zeros"]
        [1.0]

    Reference: Parikh and Boyd, Proximal Algorithms (2014), section 4.2.
    """

    _batches: int
    _steps: int
    _zeros: float | None

    def __init__(self, rules: Mapping[str, Any] | Penalty, every: int = 1) -> None:
        super().__init__()
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise ValueError(f"every: expected a positive number of batches; got {every!r}; pass 1, for example.")
        self._arguments = rules, every
        self._penalty, self._every = completed(rules), every
        self._groups: list[_Group] = []
        self._forget()

    def on_train_begin(self, logs: Any = None) -> None:
        """Check rules, regularizers and the optimizer, before anything is trained.

        Args:
            logs: not read.
        """
        library_of(self.model)
        optimizers = optimizers_of(self.model)
        named = reductions.named_arrays(self.model)
        regularizers = penalised(self._penalty, self.model)
        for each in {id(each): each for each in regularizers.values()}.values():
            if not hasattr(each, "prox"):
                raise TypeError(f"rules: expected regularizers with a proximal operator; got {each!r}, which has none.")
        self._penalty.bind(self.model).prox_(0.0)  # changes nothing; raises if one has no proximal operator after all
        self._skips = Skips(self.model.optimizer)
        self._groups = [_Group(optimizer, alone=len(optimizers) == 1) for optimizer in optimizers]
        self._forget()
        self._look(named, regularizers)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Look at what is trained from now on: callbacks freeze and thaw layers between epochs.

        Args:
            epoch: not read.
            logs: not read.
        """
        named = reductions.named_arrays(self.model)
        if {id(variable) for variable in named.values()} != self._trained:
            self._look(named, self._penalty._chosen(self.model))

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Take the proximal step, if one is due.

        Args:
            batch: not read.
            logs: get the share of exact zeros, as of the last count.
        """
        self._batches += 1
        self._skips.look()
        if self._batches >= self._every:
            self.model  # noqa: B018  # on JAX, variables have their values once it is asked for
            if sum(group.step(self._variables, self._regularizers, self._skips.count) for group in self._groups):
                self._batches = 0
                if self._size <= _COUNTED_ALWAYS or self._steps % _COUNTED_EVERY == 0:
                    self._count()
                self._steps += 1
        if logs is not None and self._zeros is not None:
            logs["zeros"] = self._zeros

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Log the share of exact zeros.

        Args:
            epoch: not read.
            logs: get the share of exact zeros.
        """
        self.model  # noqa: B018
        self._count()
        if logs is not None:
            logs["zeros"] = self._zeros

    def _forget(self) -> None:
        self._batches = self._steps = 0
        self._zeros = None

    def _look(self, named: Mapping[str, Any], regularizers: dict[str, Any]) -> None:
        self._trained = {id(variable) for variable in named.values()}
        self._regularizers = regularizers
        self._variables = {name: named[name] for name in regularizers}
        self._size = sum(math.prod(variable.shape) for variable in self._variables.values())
        for group in self._groups:
            group.bound = None

    def _count(self) -> None:
        zeros = sum(reductions.zero_and_nonfinite_counts(variable)[0] for variable in self._variables.values())
        self._zeros = zeros / max(1, self._size)


class _Group:
    """What one optimizer trains, bound once.

    Attributes:
        bound: the penalty of its variables; None where that is to be made.
    """

    def __init__(self, optimizer: Any, *, alone: bool) -> None:
        self._optimizer, self._alone, self._done = optimizer, alone, steps_done(optimizer)
        self.bound: BoundPenalty | None = None

    def step(self, variables: Mapping[str, Any], regularizers: Mapping[str, Any], skipped: int) -> bool:
        """Take a proximal step, if the optimizer has done a step since the last time, and say so."""
        done = steps_done(self._optimizer) - skipped
        if done == self._done:
            return False
        self._done = done
        if self.bound is None:
            mine = dict(variables)
            if not self._alone:  # those of a MultiOptimizer know what is theirs
                own = {id(variable) for variable in self._optimizer._trainable_variables}
                mine = {name: variable for name, variable in variables.items() if id(variable) in own}
            self.bound = Penalty({name: regularizers[name] for name in mine}).bind(mine)
        self.bound.prox_(rate_of_last_step(self._optimizer))
        return True


class FactorSchedule(_Callback):
    """Moves a factor by a schedule while `fit` trains, with effect in compiled steps: nothing is compiled again.

    Args:
        factor: the variable that a regularizer has for a factor, such as in ``rk.L2(factor)``: a `keras.Variable` that
            is not trainable, in tf_keras a `tf.Variable`. On Keras's JAX backend the model has to track it, as it does
            where `regularize` gave it the regularizer, or where a layer has the variable for an attribute.
        schedule: a function of the number of epochs, or of batches, that are done, which returns the factor: a
            non-negative number. Keras's learning rate schedules are such functions.
        per: "epoch" or "batch". Epochs are counted as `fit` does, with its `initial_epoch`; batches as long as the
            callback lives.

    Raises:
        TypeError: the factor is no variable, or the schedule no function.
        ValueError: `per` is another word.

    `fit` raises ValueError before it trains where the model does not track the factor on JAX, and at the step where the
    schedule returns what is no factor.

    Examples:
        >>> import keras, numpy as np
        >>> import regkern as rk
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1, kernel_initializer="ones")])
        >>> factor = keras.Variable(0.0, trainable=False, name="factor")
        >>> rk.keras.regularize(model, {"*kernel": rk.L2(factor)})
        1
        >>> model.compile(keras.optimizers.SGD(0.0), "mse")
        >>> warm_up = FactorSchedule(factor, lambda epoch: 0.25 * epoch)
        >>> history = model.fit(np.zeros((8, 4)), np.zeros((8, 1)), epochs=3, callbacks=[warm_up], verbose=0)
        >>> [float(loss) for loss in history.history["loss"]]
        [0.0, 1.0, 2.0]
    """

    def __init__(self, factor: Any, schedule: Callable[[int], Any], per: str = "epoch") -> None:
        super().__init__()
        if not hasattr(factor, "assign"):
            raise TypeError(
                f"factor: expected a variable that a regularizer has for a factor; got {type(factor).__name__}; "
                "make it by keras.Variable(1e-4, trainable=False)."
            )
        if not callable(schedule):
            raise TypeError(f"schedule: expected a function of a number of {per}s; got {schedule!r}.")
        if per not in ("epoch", "batch"):
            raise ValueError(f"per: expected 'epoch' or 'batch'; got {per!r}.")
        self._arguments = self._factor, self._schedule, self._per = factor, schedule, per
        self._batches = 0

    def on_train_begin(self, logs: Any = None) -> None:
        """Check that compiled steps will see the factor, before anything is trained.

        Args:
            logs: not read.
        """
        library = library_of(self.model)
        constant = library.__name__ == "keras" and library.config.backend() == "jax"
        if constant and not any(variable is self._factor for variable in self.model.variables):
            raise ValueError(
                "factor: expected a variable that the model tracks, since others are constants of what JAX compiles; "
                f"got {self._factor.path}; give the model its penalty by regkern.keras.regularize, or let a layer "
                "have the variable for an attribute before the model is built."
            )

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Set the factor for an epoch.

        Args:
            epoch: what the schedule is called with.
            logs: not read.
        """
        if self._per == "epoch":
            self._set(epoch)

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Set the factor for a batch.

        Args:
            batch: not read.
            logs: not read.
        """
        if self._per == "batch":
            self.model  # noqa: B018  # on JAX, variables have their values once it is asked for
            self._set(self._batches)
            self._batches += 1

    def _set(self, count: int) -> None:
        value = self._schedule(count)
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = real(value)
        if not 0.0 <= number < math.inf:
            raise ValueError(
                f"schedule: expected a non-negative float from it; got {value!r} for {self._per} {count}; correct it."
            )
        self._factor.assign(number)

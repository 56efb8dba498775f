"""What regkern asks of an array library: to run an operation, and what its arrays and models are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from regkern.arrays import ADAPTERS
from regkern.arrays.layout import Strides, View
from regkern.dtypes import DType
from regkern.terms import ELEMENTS, VALUE, Operation, Parameters, Products, Term

if TYPE_CHECKING:
    from regkern.arrays.host import HostAdapter
    from regkern.arrays.plan import Member, Plan, Weighted


class Adapter(ABC):
    """Evaluates penalties of one library's arrays.

    Ranks and options have been checked before, arrays have not. A library whose arrays lie in the host's memory derives
    from `HostAdapter`, one that brings its own operations from `ExpressionsAdapter`.

    Attributes:
        records_plans: whether there is `record`; else arrays that the library tracks are called one by one.
        compiles: whether the library compiles functions into programs that keep a float as it was.
    """

    records_plans = False
    compiles = False

    def __init__(self) -> None:
        self.compiles = self.compiles  # of an instance's own, it is read in a tenth of the time

    def owns(self, array_type: type) -> bool:
        """Whether arrays of this type belong to the library; what another adapter hands arrays to owns none."""
        return False

    @abstractmethod
    def run(self, operation: Operation, term: Term, p: Parameters, x: Any, out: Any = None) -> tuple[Any, Any]:
        """Do one operation with a term and an array.

        Args:
            operation: what to do.
            term: the penalty.
            p: its parameters, the factors times a scale or a step.
            x: the array.
            out: where to write, or to add; None makes a new array.

        Returns:
            What is summed: the penalty, a 0-d scalar of the library; or two of them; or, as partial sums, unrounded, an
            array of two in float64 where there is that. None where the operation does not sum. And what was written,
            `out` or a new array; None where the operation does not write.
        """

    def value(self, term: Term, p: Parameters, x: Any) -> Any:
        """Return the penalty, as `run` does."""
        return self.run(VALUE, term, p, x)[0]

    def anchored(
        self, operation: Operation, term: Term, p: Parameters, x: Any, operands: tuple[Any, ...], out: Any = None
    ) -> tuple[Any, Any]:
        """Do an operation with a penalty of elements of ``x - x0``, by the library's own operations.

        Args:
            operation: VALUE, GRADIENT, one that adds a gradient or gives the value with it, or PROX.
            term: the penalty.
            p: its parameters.
            x: the array.
            operands: x0 and, where elements have weights, these, as `check_operand` lets them be.
            out: as for `run`, whose results these are.
        """
        adapter = self.expressions()
        if adapter is None:
            raise no_distance(x)
        return adapter.anchored(operation, term, p, x, operands, out)

    def check_operand(self, argument: str, x: Any, operand: Any) -> None:
        """Raise TypeError or ValueError unless x can be compared with an array element by element."""
        if ADAPTERS[type(operand)] is not self:
            raise TypeError(
                f"{argument}: expected an array of x's library, {type(x).__module__.partition('.')[0]}; "
                f"got {type(operand).__name__}; convert one of them."
            )
        if tuple(operand.shape) != tuple(x.shape):
            raise ValueError(
                f"{argument}: expected x's shape {tuple(x.shape)}; got {tuple(operand.shape)}; pass one that fits."
            )
        if operand.dtype != x.dtype:
            raise TypeError(f"{argument}: expected x's dtype {x.dtype}; got {operand.dtype}; convert one of them.")

    def is_immutable(self, x: Any) -> bool:
        """Whether an array stays what it is, so that it may be compared with itself."""
        return False

    def loss(self, term: Term, p: Parameters, x: Any) -> Any:
        """Return the penalty where it is known to be a part of a loss whose value counts, as well as its gradient."""
        return self.value(term, p, x)

    def between(self, term: Term, x: Any, other: Any) -> Any:
        """Return the sum of products of one row of x and one of other's, single matrices; in float64."""
        held, held_other = self.on_host(x), self.on_host(other)
        if held is None or held_other is None:
            raise no_partial(x)
        return held[0].between(term, held[1], held_other[1])

    def on_host(self, x: Any) -> tuple[HostAdapter, Any] | None:
        """Return the host adapter that can read x's memory now, and x as that adapter takes it; None where none can."""
        return None

    def reader(self, x: Any) -> tuple[KernelAdapter, Any] | None:
        """Return the adapter whose kernels can read x's memory now for a plan, and x as that adapter takes it."""
        return self.on_host(x)

    def tracks(self, x: Any) -> bool:
        """Whether the library would differentiate what is computed from x: kernels must not bypass it then."""
        return False

    def captures(self, x: Any) -> bool:
        """Whether what is computed from x now becomes part of such a program."""
        return False

    def native(self, x: Any) -> Any:
        """Return what an array stands for now, which may be of another library."""
        return x

    def held(self, number: Any) -> float | None:
        """Return what a 0-d array holds; None where that cannot be seen now, or not without a wait for a device."""
        return None

    def differentiates(self, number: Any) -> bool:
        """Whether the library may differentiate what is computed from a 0-d array."""
        return self.tracks(number)

    def number(self, number: Any, x: Any) -> Any:
        """Return a 0-d array in the type of x's penalty, on x's device; None where it is of another library."""
        return None

    def expressions(self) -> Adapter | None:
        """Return an adapter whose methods take 0-d arrays of the library for parameters; None where there is none."""
        return None

    def record(self, plan: Plan, penalties: Sequence[Weighted], arrays: Sequence[Any]) -> Any:
        """Return a plan's value as a scalar that the library can differentiate by the plan's arrays, all tracked."""
        raise NotImplementedError

    def named_arrays(self, model: Any) -> Iterable[tuple[str, Any]] | None:
        """Return what a model of this library trains, with the names; None for what is no such model.

        What is no array is a part of the model that has such in it.
        """
        return None

    def look(self, model: Any) -> Callable[[], Iterable[Any]]:
        """Return a function that gives what a model holds now: other objects when an array of it was replaced."""
        return lambda: [each for _, each in self.named_arrays(model) or ()]

    def beside(self, value: Any, other: Any) -> Any:
        """Return a 0-d scalar of the library on the device of another scalar, so that they can be added."""
        return value

    def joined(self, parts: Sequence[Any]) -> Any:
        """Return partial sums of several terms, arrays of the library in one dimension each, as one."""
        return np.concatenate([np.asarray(part) for part in parts])

    def over_batch(self, penalty: Any, x: Any) -> Any:
        """Return a penalty divided by the length of x's first axis; 0 where a length that is open yet becomes 0."""
        return penalty / x.shape[0]

    def masked(self, x: Any, mask: Any) -> Any:
        """Return a new array: x where a mask of the same rank holds, and zeros elsewhere."""
        raise TypeError(
            f"outputs: expected an array that a mask can be of; got {type(x).__name__}, which has none; "
            "leave the mask out."
        )


class KernelAdapter(Adapter):
    """What adapters share that run kernels over their arrays' memory, wherever it is."""

    @abstractmethod
    def memory(self, x: Any) -> tuple[int, int, DType, bool]:
        """Return x's address, its number of elements, its dtype and whether it is contiguous, in C or Fortran order.

        Raises:
            TypeError: the dtype is not supported.
        """

    @abstractmethod
    def strides(self, x: Any) -> Strides:
        """Return x's strides in bytes."""

    def view(self, x: Any) -> View:
        """Return where x's elements are, as `memory` does and errors, with the shape and strides."""
        address, _, dtype, _ = self.memory(x)
        return View(address, dtype, tuple(x.shape), self.strides(x))

    @abstractmethod
    def home(self, x: Any) -> Hashable:
        """Return what arrays have in common that can be in one plan."""

    @abstractmethod
    def plan(self, members: Sequence[Member]) -> Plan:
        """Look many arrays of x's home up for evaluations in one launch."""

    def reads_beside(self, x: Any, operands: Sequence[Any]) -> bool:
        """Whether a plan's kernels read others of the adapter's arrays, like x, beside x."""
        return True

    def check_address(self, argument: str, x: Any) -> None:
        """Raise ValueError unless kernels can load the elements of an array from where they are."""
        return None

    @abstractmethod
    def serves(self, term: Term) -> bool:
        """Whether there are kernels for a penalty."""

    def elsewhere(self, term: Term) -> Adapter | None:
        """Return the library's own operations for a penalty that has no kernels; None where it has."""
        if self.serves(term):
            return None
        adapter = self.expressions()
        assert adapter is not None, "an adapter without operations is asked for what it serves alone"
        return adapter

    def plans(self, term: Term, x: Any) -> bool:
        """Whether a plan can evaluate a penalty of an array."""
        return term.view is ELEMENTS

    def watch(self, arrays: Sequence[Any], *, written: bool) -> Callable[[Sequence[Any]], int]:
        """Return a function that is given the same arrays again: the index of the first that lies elsewhere, or -1.

        Of arrays that are written to, it also notices those that have become read-only, where the library has such.
        """
        before = list(map(self.view, arrays))

        def first_moved(arrays: Sequence[Any]) -> int:
            pairs = enumerate(zip(before, map(self.view, arrays), strict=True))
            return next((i for i, (old, new) in pairs if old != new), -1)

        return first_moved

    def finder(self, arrays: Sequence[Any]) -> Callable[[Sequence[Any]], list[int] | None] | None:
        """Return a function of other arrays: their addresses, or None where they differ in more than these.

        None where the library has no way to tell that is faster than a look at each.
        """
        return None

    @abstractmethod
    def empty_like(self, x: Any) -> Any:
        """Return a new array with x's shape, dtype and order of axes."""

    @abstractmethod
    def flatten_leading(self, x: Any, *, copy: bool) -> Any:
        """Return x as a matrix with its last axis as columns: a view; where strides allow none, a copy or an error."""

    @abstractmethod
    def check_out(self, x: Any, out: Any) -> None:
        """Raise TypeError or ValueError unless `out` can take an element-wise result of x."""

    def wrote(self, out: Any) -> None:
        """Tell the library that a kernel has written to an array, where it wants to know."""
        return None

    def matrices(self, view: Products, x: Any, *, copy: bool = True) -> Any:
        """Return x with the axes before the last merged where that is asked for; it may be a copy, to be kept alive."""
        return self.flatten_leading(x, copy=copy) if view.flatten and len(x.shape) > 2 else x


class ChoosingAdapter(Adapter):
    """Hands each array on to another adapter, which depends on more than its type."""

    @abstractmethod
    def choose(self, x: Any) -> tuple[Adapter, Any]:
        """Return the adapter for an array, and what to give to it."""

    def run(self, operation: Operation, term: Term, p: Parameters, x: Any, out: Any = None) -> tuple[Any, Any]:
        adapter, x = self.choose(x)
        return adapter.run(operation, term, p, x, out)

    def between(self, term: Term, x: Any, other: Any) -> Any:
        adapter, x = self.choose(x)
        return adapter.between(term, x, self.choose(other)[1])

    def anchored(
        self, operation: Operation, term: Term, p: Parameters, x: Any, operands: tuple[Any, ...], out: Any = None
    ) -> tuple[Any, Any]:
        adapter, x = self.choose(x)
        return adapter.anchored(operation, term, p, x, tuple(self.choose(each)[1] for each in operands), out)

    def tracks(self, x: Any) -> bool:
        adapter, x = self.choose(x)
        return adapter.tracks(x)

    def captures(self, x: Any) -> bool:
        adapter, x = self.choose(x)
        return adapter.captures(x)

    def number(self, number: Any, x: Any) -> Any:
        adapter, x = self.choose(x)
        return adapter.number(number, x)

    def over_batch(self, penalty: Any, x: Any) -> Any:
        adapter, x = self.choose(x)
        return adapter.over_batch(penalty, x)


def no_partial(x: Any) -> NotImplementedError:
    """Return the error that says that there are no partial sums of cosines."""
    return NotImplementedError(
        f"x: expected an array in the host's memory for partial sums of cosines; got {type(x).__name__}; "
        "call the regularizer itself."
    )


def no_distance(x: Any) -> TypeError:
    """Return the error that says that a library has no way to evaluate distances to a reference."""
    return TypeError(
        f"x: expected an array of NumPy, CuPy, PyTorch, JAX, TensorFlow or Keras for a distance to a reference; "
        f"got {type(x).__name__}; call the regularizer on the difference."
    )


def require(library: str, version: str, lowest: tuple[int, int]) -> None:
    """Raise ImportError unless a library has the lowest version that its adapter was written for, or a later one."""
    if tuple(int(part) for part in version.split(".")[:2]) < lowest:
        raise ImportError(f"regkern: expected {library} {lowest[0]}.{lowest[1]} or later; got {version}; upgrade it.")

"""What regkern asks of an array library: one method per thing that a regularizer can do with an array."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from regkern.arrays.layout import View
from regkern.kernels.formulas import Formula
from regkern.kernels.operations import ADD_GRADIENT, GRADIENT, PROX, Operation

if TYPE_CHECKING:
    from regkern.arrays.host import HostAdapter
    from regkern.arrays.plan import Member, Plan, Weighted


class Adapter(ABC):
    """Evaluates penalties of one library's arrays.

    An element-wise penalty is a formula with its two factors; the orthogonal one a factor, whether columns are meant
    instead of rows, and whether the axes before the last are flattened into one, where there are more than two. Ranks
    and options have been checked before, arrays have not. A library whose arrays lie in the host's memory derives from
    `HostAdapter`, one that brings its own operations from `OperationsAdapter`.

    Attributes:
        records_plans: whether there is `record`; else arrays that the library tracks are called one by one.
        compiles: whether the library compiles functions into programs that keep a float as it was.
    """

    records_plans = False
    compiles = False

    def __init__(self) -> None:
        self.compiles = self.compiles  # of an instance's own, it is read in a tenth of the time

    @abstractmethod
    def owns(self, array_type: type) -> bool:
        """Whether arrays of this type belong to the library."""

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
        """Return an adapter whose methods take 0-d arrays of the library for factors; None where there is none."""
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

    @abstractmethod
    def penalty(self, formula: Formula, a: float, b: float, x: Any) -> Any:
        """Return ``a * sum0 + b * sum1``, the formula's two sums over x, as a 0-d scalar of the library."""

    @abstractmethod
    def sums(self, formula: Formula, x: Any) -> tuple[Any, Any]:
        """Return the formula's two sums as 0-d scalars of the library."""

    @abstractmethod
    def partial(self, formula: Formula, x: Any) -> Any:
        """Return the formula's two sums over a piece of an array, unrounded: a float64 array of two where there is one.

        Partial sums are added, and the sum belongs to all pieces together.
        """

    @abstractmethod
    def value_and_grad(self, formula: Formula, a: float, b: float, x: Any) -> tuple[Any, Any]:
        """Return the penalty and its gradient, a new array."""

    @abstractmethod
    def grad(self, formula: Formula, a: float, b: float, x: Any, out: Any, accumulate: bool) -> Any:
        """Write the gradient to out, or add it, and return out; a new array where out is None."""

    @abstractmethod
    def prox(self, formula: Formula, a: float, b: float, x: Any, out: Any) -> Any:
        """Write the proximal operator's result to out and return it; a new array where out is None."""

    @abstractmethod
    def orthogonal(self, factor: float, x: Any, *, columns: bool, flatten: bool) -> Any:
        """Return factor times the mean |cosine| over pairs of rows, or columns, summed over a batch of matrices."""

    @abstractmethod
    def orthogonal_value_and_grad(self, factor: float, x: Any, *, columns: bool, flatten: bool) -> tuple[Any, Any]:
        """Return the orthogonal penalty and its gradient, a new array."""

    @abstractmethod
    def orthogonal_grad(
        self, factor: float, x: Any, out: Any, *, columns: bool, flatten: bool, accumulate: bool
    ) -> Any:
        """Write the orthogonal penalty's gradient to out, or add it, and return out; a new array where out is None."""

    def group_lasso(self, operation: Operation, factor: float, x: Any, out: Any, *, columns: bool) -> tuple[Any, Any]:
        """Run one operation of the group lasso: factor times the sum of the norms of x's rows, or columns.

        A row is what one index of the first axis selects, a column what one of the last does.

        Returns:
            The penalty, or None where the operation does not sum; and `out`, or a new array where that is None, or None
            where the operation does not write.
        """
        raise NotImplementedError(
            "x: expected an array of NumPy, PyTorch, JAX, TensorFlow or Keras for the group lasso; "
            f"got {type(x).__module__}.{type(x).__name__}; convert it first."
        )

    def cosine_sum(self, x: Any, other: Any, *, columns: bool, flatten: bool) -> Any:
        """Return the sum of |cosine| over pairs of rows, or columns, of x, summed over a batch of matrices; in float64.

        Where other is an array, the pairs are of one row of x and one of other's, and both are single matrices.
        """
        held, held_other = self.on_host(x), None if other is None else self.on_host(other)
        if held is not None and (other is None or held_other is not None):
            adapter, array = held
            return adapter.cosine_sum(array, held_other and held_other[1], columns=columns, flatten=flatten)
        raise NotImplementedError(
            f"x: expected an array in the host's memory for partial sums of cosines; got {type(x).__name__}; "
            "call the regularizer itself."
        )

    def beside(self, value: Any, other: Any) -> Any:
        """Return a 0-d scalar of the library on the device of another scalar, so that they can be added."""
        return value

    def over_batch(self, penalty: Any, x: Any) -> Any:
        """Return a penalty divided by the length of x's first axis; 0 where a length that is open yet becomes 0."""
        return penalty / x.shape[0]


class KernelAdapter(Adapter):
    """What adapters share that run kernels over their arrays' memory, wherever it is."""

    @abstractmethod
    def view(self, x: Any) -> View:
        """Return where x's elements are.

        Raises:
            TypeError: the dtype is not supported.
        """

    @abstractmethod
    def home(self, x: Any) -> Hashable:
        """Return what arrays have in common that can be in one plan."""

    @abstractmethod
    def plan(self, members: Sequence[Member]) -> Plan:
        """Look many arrays of x's home up for evaluations in one launch."""

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

    @abstractmethod
    def run(self, operation: Operation, formula: Formula, a: float, b: float, x: Any, out: Any) -> Any:
        """Run one operation from x to out, which is x where nothing is written, and return what it sums."""

    def wrote(self, out: Any) -> None:
        """Tell the library that a kernel has written to an array, where it wants to know."""
        return None

    def grad(self, formula: Formula, a: float, b: float, x: Any, out: Any, accumulate: bool) -> Any:
        return self._map(ADD_GRADIENT if accumulate else GRADIENT, formula, a, b, x, out)

    def prox(self, formula: Formula, a: float, b: float, x: Any, out: Any) -> Any:
        return self._map(PROX, formula, a, b, x, out)

    def _map(self, operation: Operation, formula: Formula, a: float, b: float, x: Any, out: Any) -> Any:
        out = self._target(x, out)
        self.run(operation, formula, a, b, x, out)
        return out

    def _target(self, x: Any, out: Any) -> Any:
        if out is None:
            return self.empty_like(x)
        self.check_out(x, out)
        return out

    def _flat(self, x: Any, flatten: bool, *, copy: bool = True) -> Any:
        return self.flatten_leading(x, copy=copy) if flatten and len(x.shape) > 2 else x


class ChoosingAdapter(Adapter):
    """Hands each array on to another adapter, which depends on more than its type."""

    def tracks(self, x: Any) -> bool:
        adapter, x = self.choose(x)
        return adapter.tracks(x)

    def captures(self, x: Any) -> bool:
        adapter, x = self.choose(x)
        return adapter.captures(x)

    def number(self, number: Any, x: Any) -> Any:
        adapter, x = self.choose(x)
        return adapter.number(number, x)

    @abstractmethod
    def choose(self, x: Any) -> tuple[Adapter, Any]:
        """Return the adapter for an array, and what to give to it."""

    def penalty(self, formula: Formula, a: float, b: float, x: Any) -> Any:
        adapter, x = self.choose(x)
        return adapter.penalty(formula, a, b, x)

    def sums(self, formula: Formula, x: Any) -> tuple[Any, Any]:
        adapter, x = self.choose(x)
        return adapter.sums(formula, x)

    def partial(self, formula: Formula, x: Any) -> Any:
        adapter, x = self.choose(x)
        return adapter.partial(formula, x)

    def value_and_grad(self, formula: Formula, a: float, b: float, x: Any) -> tuple[Any, Any]:
        adapter, x = self.choose(x)
        return adapter.value_and_grad(formula, a, b, x)

    def grad(self, formula: Formula, a: float, b: float, x: Any, out: Any, accumulate: bool) -> Any:
        adapter, x = self.choose(x)
        return adapter.grad(formula, a, b, x, out, accumulate)

    def prox(self, formula: Formula, a: float, b: float, x: Any, out: Any) -> Any:
        adapter, x = self.choose(x)
        return adapter.prox(formula, a, b, x, out)

    def orthogonal(self, factor: float, x: Any, *, columns: bool, flatten: bool) -> Any:
        adapter, x = self.choose(x)
        return adapter.orthogonal(factor, x, columns=columns, flatten=flatten)

    def orthogonal_value_and_grad(self, factor: float, x: Any, *, columns: bool, flatten: bool) -> tuple[Any, Any]:
        adapter, x = self.choose(x)
        return adapter.orthogonal_value_and_grad(factor, x, columns=columns, flatten=flatten)

    def orthogonal_grad(
        self, factor: float, x: Any, out: Any, *, columns: bool, flatten: bool, accumulate: bool
    ) -> Any:
        adapter, x = self.choose(x)
        return adapter.orthogonal_grad(factor, x, out, columns=columns, flatten=flatten, accumulate=accumulate)

    def group_lasso(self, operation: Operation, factor: float, x: Any, out: Any, *, columns: bool) -> tuple[Any, Any]:
        adapter, x = self.choose(x)
        return adapter.group_lasso(operation, factor, x, out, columns=columns)

    def cosine_sum(self, x: Any, other: Any, *, columns: bool, flatten: bool) -> Any:
        adapter, x = self.choose(x)
        if other is not None:
            _, other = self.choose(other)
        return adapter.cosine_sum(x, other, columns=columns, flatten=flatten)

    def over_batch(self, penalty: Any, x: Any) -> Any:
        adapter, x = self.choose(x)
        return adapter.over_batch(penalty, x)


def require(library: str, version: str, lowest: tuple[int, int]) -> None:
    """Raise ImportError unless a library has the lowest version that its adapter was written for, or a later one."""
    if tuple(int(part) for part in version.split(".")[:2]) < lowest:
        raise ImportError(f"regkern: expected {library} {lowest[0]}.{lowest[1]} or later; got {version}; upgrade it.")

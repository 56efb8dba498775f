"""Penalties of JAX's arrays as its own operations, under any of its transformations and on any platform."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from regkern.arrays.expressions import ExpressionsAdapter
from regkern.dtypes import DTYPES


def result_type(x: Any) -> Any:
    """Return the type of an array's penalty."""
    return np.dtype(DTYPES[x.dtype.name].result)


def widest() -> Any:
    """Return float64 where JAX has it, else float32."""
    return jax.dtypes.canonicalize_dtype(np.float64)


@jax.custom_jvp
def _magnitude(x: Any) -> Any:
    return jnp.abs(x)


_magnitude.defjvps(lambda dx, _, x: dx * jnp.sign(x))  # JAX's own derivative at 0 is 1


class Operations(ExpressionsAdapter):
    """JAX's operations."""

    sum = staticmethod(jnp.sum)
    select = staticmethod(jnp.where)
    roots = staticmethod(jnp.sqrt)
    inverse_roots = staticmethod(lax.rsqrt)
    logarithms = staticmethod(jnp.log1p)
    magnitude = staticmethod(_magnitude)

    def widen(self, x: Any) -> Any:
        return x.astype(result_type(x))

    def narrow(self, value: Any, x: Any) -> Any:
        return value.astype(x.dtype)

    def zero(self, x: Any) -> Any:
        return jnp.zeros((), x.dtype)

    def clip(self, x: Any, limit: Any) -> Any:
        return jnp.clip(x, -limit, limit)

    def flatten_leading(self, x: Any) -> Any:
        return x.reshape(-1, x.shape[-1])

    def transpose(self, x: Any) -> Any:
        return jnp.swapaxes(x, -1, -2)

    def gram(self, x: Any) -> Any:
        return jnp.matmul(x, self.transpose(x), precision="highest")  # by default, a GPU rounds float32 to 11 bits

    def off_diagonal(self, x: Any) -> Any:
        return jnp.where(jnp.eye(x.shape[-1], dtype=bool), 0, x)

    def differentiate(self, function: Callable[[Any], Any], x: Any) -> tuple[Any, Any]:
        value, gradient = jax.value_and_grad(function)(x)
        return value, gradient

    def write(self, value: Any, out: Any, accumulate: bool) -> Any:
        return value

    def exact(self, sums: Sequence[Any], x: Any) -> Any:
        return jnp.stack([jnp.asarray(each, result_type(x)) for each in sums]).astype(widest())


OPERATIONS = Operations()

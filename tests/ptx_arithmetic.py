"""What arithmetic PTX's instructions do, of threads together."""

import numpy as np


def _multiply(dtype, modifiers, x, y):
    if "wide" in modifiers:
        wide = f"{dtype.kind}{2 * dtype.itemsize}"
        return np.asarray(x).astype(wide) * np.asarray(y).astype(wide)
    assert "hi" not in modifiers
    return x * y


def _fused(dtype, modifiers, x, y, z):
    """Round once, but where the sum is within half a unit of the wider type from a tie."""
    wide = np.longdouble if dtype.itemsize == 8 else np.float64
    return (np.asarray(x).astype(wide) * np.asarray(y).astype(wide) + np.asarray(z).astype(wide)).astype(dtype)


def _divide(dtype, modifiers, x, y):
    if dtype.kind == "f":
        return x / y
    quotient = np.abs(x) // np.abs(y)  # towards zero
    return np.where((x < 0) != (y < 0), -quotient, quotient).astype(dtype) if dtype.kind == "i" else quotient


def _plain(function, float_function=None):
    def apply(dtype, modifiers, *values):
        chosen = float_function if float_function and dtype.kind == "f" else function
        return chosen(*values)

    return apply


ARITHMETIC = {
    "add": _plain(np.add),
    "sub": _plain(np.subtract),
    "and": _plain(np.bitwise_and),
    "or": _plain(np.bitwise_or),
    "xor": _plain(np.bitwise_xor),
    "not": _plain(np.bitwise_not),
    "neg": _plain(np.negative),
    "abs": _plain(np.abs),
    "min": _plain(np.minimum, np.fmin),
    "max": _plain(np.maximum, np.fmax),
    "copysign": _plain(lambda sign, size: np.copysign(size, sign)),
    "sqrt": _plain(np.sqrt),
    "rcp": _plain(np.reciprocal),
    "rem": _plain(np.fmod),
    "cvta": _plain(np.copy),
    "mul": _multiply,
    "fma": _fused,
    "div": _divide,
}

"""The operations of formulas on scalars, as `terms.Formula` names them: selections, without a branch."""

import math
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import config
from numba.extending import intrinsic

sqrt, log1p = math.sqrt, math.log1p


def _select_python(condition, x, y):
    return x if condition else y


def _minimum_python(v, limit):
    return limit if v > limit else v


def _maximum_python(v, limit):
    return limit if v < limit else v


def _clip_python(v, limit):
    return _minimum_python(_maximum_python(v, -limit), limit)


def _select():
    @intrinsic
    def where(typing_context, condition, x, y):
        def codegen(context, builder, signature, values):
            return builder.select(*values)

        return types.float64(types.boolean, types.float64, types.float64), codegen

    return where


def _limited(*sides):
    """Make ``limited(v, limit)``: of each side a comparison, and the limit's sign."""

    @intrinsic
    def limited(typing_context, v, limit):
        def codegen(context, builder, signature, values):
            v, limit = values
            for comparison, sign in sides:
                bound = builder.fmul(ir.Constant(limit.type, sign), limit) if sign < 0 else limit
                v = builder.select(builder.fcmp_ordered(comparison, v, bound), bound, v)  # NaN stays
            return v

        return types.float64(types.float64, types.float64), codegen

    return limited


where: Any
minimum: Any
maximum: Any
clip: Any
if config.DISABLE_JIT:
    where, minimum, maximum, clip = _select_python, _minimum_python, _maximum_python, _clip_python
else:
    where, minimum, maximum = _select(), _limited((">", 1.0)), _limited(("<", 1.0))
    clip = _limited(("<", -1.0), (">", 1.0))

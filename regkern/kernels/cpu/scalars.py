"""The operations of formulas on scalars, as `terms.Formula` names them: selections, without a branch."""

import math

from llvmlite import ir
from numba import types
from numba.core import config
from numba.extending import intrinsic

sqrt, log1p = math.sqrt, math.log1p

if config.DISABLE_JIT:

    def where(condition, x, y):
        return x if condition else y

    def minimum(v, limit):
        return limit if v > limit else v

    def maximum(v, limit):
        return limit if v < limit else v

    def clip(v, limit):
        return minimum(maximum(v, -limit), limit)

else:
    _FLOAT = types.float64

    @intrinsic
    def where(typing_context, condition, x, y):
        def codegen(context, builder, signature, values):
            return builder.select(values[0], values[1], values[2])

        return _FLOAT(types.boolean, _FLOAT, _FLOAT), codegen

    def _limited(builder, comparison, v, limit):
        return builder.select(builder.fcmp_ordered(comparison, v, limit), limit, v)  # NaN stays

    def _limit(*comparisons):
        @intrinsic
        def limited(typing_context, v, limit):
            def codegen(context, builder, signature, values):
                v, limit = values
                for comparison, negative in comparisons:
                    v = _limited(builder, comparison, v, builder.fsub(ir.Constant(limit.type, -0.0), limit) if negative else limit)
                return v

            return _FLOAT(_FLOAT, _FLOAT), codegen

        return limited

    minimum, maximum, clip = _limit((">", False)), _limit(("<", False)), _limit(("<", True), (">", False))

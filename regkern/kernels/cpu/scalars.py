"""The operations of formulas on scalars, as `terms.Formula` names them: without branches and calls, for vectors."""

import math
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import config
from numba.extending import intrinsic, register_jitable

sqrt = math.sqrt


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


def _split():
    @intrinsic
    def split(typing_context, y):
        """Return m from sqrt(1/2) to sqrt(2) and k with y = m * 2**k, and 2**-k, for y >= 1; else anything."""
        word, double = ir.IntType(64), ir.DoubleType()

        def codegen(context, builder, signature, values):
            one, root, magic = (ir.Constant(word, each) for each in (_BITS_OF_ONE, _BITS_OF_ROOT, _BITS_OF_MAGIC))
            bits = builder.bitcast(values[0], word)
            k = builder.lshr(builder.sub(bits, root), ir.Constant(word, 52))
            shift = builder.shl(k, ir.Constant(word, 52))
            # An integer in the low bits of a large number: conversions of 64 bits are no vectors everywhere.
            wide = builder.fsub(builder.bitcast(builder.add(magic, k), double), ir.Constant(double, _MAGIC))
            parts = builder.bitcast(builder.sub(bits, shift), double), wide
            parts += (builder.bitcast(builder.sub(one, shift), double),)
            return context.make_tuple(builder, signature.return_type, parts)

        return types.UniTuple(types.float64, 3)(types.float64), codegen

    return split


_BITS_OF_ONE, _BITS_OF_ROOT = 0x3FF0000000000000, 0x3FE6A09E667F3BCD  # of 1 and of sqrt(1/2)
_BITS_OF_MAGIC, _MAGIC = 0x4338000000000000, 6755399441055744.0  # 1.5 * 2**52
_LN2_HIGH, _LN2_LOW = 6.93147180369123816490e-01, 1.90821492927058770002e-10


def _make_log1p(split):
    @register_jitable
    def log1p(x):
        """Return log(1 + x) for x >= 0, within 2 ulp: the same bits on every machine, as a library's are not.

        Sun's polynomial of 1993 (e_log.c of FreeBSD's msun), and what 1 + x rounds away.
        """
        y = 1.0 + x
        m, k, scale = split(y)
        f = m - 1.0
        s = f / (2.0 + f)
        z = s * s
        w = z * z
        odd = w * (0.3999999999940941908 + w * (0.2222219843214978396 + w * 0.1531383769920937332))
        even = w * (0.2857142874366239149 + w * (0.1818357216161805012 + w * 0.1479819860511658591))
        half = 0.5 * f * f
        rest = s * (half + odd + z * (0.6666666666666735130 + even)) + (k * _LN2_LOW + (x - (y - 1.0)) * scale)
        return where(x - x == 0.0, k * _LN2_HIGH - ((half - rest) - f), x)  # infinity and NaN stay

    return log1p


where: Any
minimum: Any
maximum: Any
clip: Any
log1p: Any
if config.DISABLE_JIT:
    where, minimum, maximum, clip = _select_python, _minimum_python, _maximum_python, _clip_python
    log1p = math.log1p
else:
    where, minimum, maximum = _select(), _limited((">", 1.0)), _limited(("<", 1.0))
    clip = _limited(("<", -1.0), (">", 1.0))
    log1p = _make_log1p(_split())

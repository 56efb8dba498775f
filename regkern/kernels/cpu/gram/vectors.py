"""Writes LLVM IR for vectors of one width. Numba's own loops cannot promise that a register tile stays in registers."""

from inspect import Parameter, Signature

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from regkern.dtypes import FLOAT64

ABS, SQUARE, RAW, COVARIANCE = "abs", "square", "raw", "covariance"
I32, I64, DOUBLE = ir.IntType(32), ir.IntType(64), ir.DoubleType()


def emitter(name, restype, arity, body, floats=0):
    """An intrinsic whose IR is written by ``body(builder, *args)``.

    It takes `arity` integers (addresses, lengths, flags), then `floats` float64 values. The IR becomes one internal
    function per module: not inlined, so that each tile is compiled once.
    """
    sig = (types.float64 if restype is DOUBLE else types.void)(*[types.intp] * arity, *[types.float64] * floats)

    def codegen(context, builder, signature, args):
        module = builder.module
        fn = module.globals.get(name)
        if fn is None:
            fn = ir.Function(module, ir.FunctionType(restype, [I64] * arity + [DOUBLE] * floats), name)
            fn.linkage = "internal"
            fn.attributes.add("noinline")
            inner = ir.IRBuilder(fn.append_basic_block("entry"))
            result = body(inner, *fn.args)
            inner.ret(result) if result is not None else inner.ret_void()
        result = builder.call(fn, args)
        return result if restype is DOUBLE else context.get_dummy_value()

    def typing(typingctx, *args):
        return sig, codegen

    # Numba reads the arity from the signature; the name tells intrinsics apart, in a cache key for example.
    typing.__name__ = name
    names = ["typingctx", *(f"arg{i}" for i in range(arity + floats))]
    typing.__signature__ = Signature([Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in names])
    return intrinsic(typing)


class Vectors:
    """IR for vectors of a register's width, which hold a dtype's elements in the type of the products.

    What becomes of a product is the fold: of unit rows its magnitude (ABS) or its square (SQUARE), of rows as they are
    the square of its distance from the unit matrix's entry (RAW), of rows less their means its square (COVARIANCE).
    """

    def __init__(self, dtype, tile, native_half, fold=ABS):
        self.fold, self.unit = fold, fold in (ABS, SQUARE)
        self.storage, self.native_half = dtype.name, native_half
        self.scalar = DOUBLE if dtype is FLOAT64 else ir.FloatType()
        self.size = 8 if dtype is FLOAT64 else 4
        self.lanes = lanes = tile.bytes // self.size
        self.stored_size = dtype.itemsize
        self.stored = {"float16": ir.IntType(16), "bfloat16": ir.IntType(16)}.get(dtype.name, self.scalar)
        if dtype.carrier not in ("uint16", "float32", "float64"):
            raise NotImplementedError(f"x: expected a dtype whose vectors are known; got {dtype.name}; convert it.")
        self.type = ir.VectorType(self.scalar, lanes)
        self.wide = ir.VectorType(DOUBLE, lanes)
        self.tag = f"{dtype.name}_{tile.name}_{'native' if native_half else 'bits'}" + (
            "" if fold == ABS else f"_{fold}"
        )

    def folded(self, b, v):
        """What is summed of products off the diagonal."""
        return self.call(b, "fabs", v) if self.fold == ABS else b.fmul(v, v)

    def call(self, b, name, *args, suffix=None, **flags):
        """Call an LLVM intrinsic, whose name ends in the type of its last argument."""
        ty = args[-1].type
        suffix = suffix or (f"v{ty.count}" if isinstance(ty, ir.VectorType) else "") + (
            "f64" if getattr(ty, "element", ty) == DOUBLE else "f32"
        )
        restype = ty.element if name.startswith("vector.reduce") else ty
        fn = cgutils.get_or_insert_function(
            b.module, ir.FunctionType(restype, [a.type for a in args]), f"llvm.{name}.{suffix}"
        )
        return b.call(fn, args, **flags)

    def splat(self, b, value):
        """Fill a vector with a value."""
        ty = ir.VectorType(value.type, self.lanes)
        one = b.insert_element(ir.Constant(ty, ir.Undefined), value, ir.Constant(I32, 0))
        return b.shuffle_vector(one, one, ir.Constant(ir.VectorType(I32, self.lanes), [0] * self.lanes))

    def constant(self, value, ty=None):
        """Fill a vector with a number."""
        return ir.Constant(ty or self.type, [value] * self.lanes)

    def load(self, b, address, offset=0, ty=None):
        """Load a vector, or another type, that may be less aligned than its own size."""
        ty = ty or self.type
        return b.load(b.inttoptr(b.add(address, I64(offset)), ty.as_pointer()), align=self.size)

    def store(self, b, value, address, offset=0):
        """Store a value likewise."""
        b.store(value, b.inttoptr(b.add(address, I64(offset)), value.type.as_pointer()), align=self.size)

    def prefetch(self, b, address):
        """Ask for a cache line that will be written."""
        pointer = ir.IntType(8).as_pointer()
        signature = ir.FunctionType(ir.VoidType(), [pointer, I32, I32, I32])
        fn = cgutils.get_or_insert_function(b.module, signature, "llvm.prefetch.p0i8")
        b.call(fn, [b.inttoptr(address, pointer), I32(1), I32(3), I32(1)])  # to write, into L1, data

    def widen(self, b, v):
        """Stored entries, scalar or vector, as the accumulator type."""
        if self.stored is self.scalar:
            return v

        def like(element):
            return ir.VectorType(element, v.type.count) if isinstance(v.type, ir.VectorType) else element

        def const(value, ty):
            return ir.Constant(ty, [value] * ty.count if isinstance(ty, ir.VectorType) else value)

        bits, floats = like(I32), like(ir.FloatType())
        wide = b.zext(v, bits)
        if self.storage == "bfloat16":
            return b.bitcast(b.shl(wide, const(16, bits)), floats)
        if self.native_half:
            return b.fpext(b.bitcast(v, like(ir.HalfType())), floats)
        # Exponent and mantissa to their float32 places, rebias by an exact product, then infinity, NaN and the sign.
        magnitude = b.and_(wide, const(0x7FFF, bits))
        small = b.bitcast(b.shl(magnitude, const(13, bits)), floats)
        finite = b.bitcast(b.fmul(small, const(2.0**112, floats)), bits)
        special = b.or_(finite, const(0x7F800000, bits))
        finite = b.select(b.icmp_unsigned(">=", magnitude, const(0x7C00, bits)), special, finite)
        sign = b.shl(b.and_(wide, const(0x8000, bits)), const(16, bits))
        return b.bitcast(b.or_(finite, sign), floats)

    def narrow(self, b, v):
        """The inverse of `widen`, rounded to nearest even."""
        if self.stored is self.scalar:
            return v
        like = (lambda e: ir.VectorType(e, v.type.count)) if isinstance(v.type, ir.VectorType) else (lambda e: e)
        bits, short, floats = like(I32), like(self.stored), like(ir.FloatType())

        def const(value, ty=bits):
            return ir.Constant(ty, [value] * ty.count if isinstance(ty, ir.VectorType) else value)

        if self.storage == "float16" and self.native_half:
            return b.bitcast(b.fptrunc(v, like(ir.HalfType())), short)
        u = b.bitcast(v, bits)
        magnitude = b.and_(u, const(0x7FFFFFFF))
        nan = b.icmp_unsigned(">", magnitude, const(0x7F800000))
        if self.storage == "bfloat16":
            odd = b.and_(b.lshr(u, const(16)), const(1))
            rounded = b.add(u, b.add(odd, const(0x7FFF)))
            rounded = b.select(nan, b.or_(u, const(0x400000)), rounded)
            return b.trunc(b.lshr(rounded, const(16)), short)
        odd = b.and_(b.lshr(magnitude, const(13)), const(1))
        normal = b.lshr(b.add(magnitude, b.add(odd, const(0xC8000FFF))), const(13))  # rebias by 15 - 127
        half = b.bitcast(b.fadd(b.bitcast(magnitude, floats), const(0.5, floats)), bits)  # aligns a subnormal's bits
        result = b.select(b.icmp_unsigned("<", magnitude, const(113 << 23)), b.sub(half, const(126 << 23)), normal)
        result = b.select(b.icmp_unsigned(">=", magnitude, const(143 << 23)), const(0x7C00), result)
        result = b.select(nan, const(0x7E00), result)
        return b.trunc(b.or_(result, b.and_(b.lshr(u, const(16)), const(0x8000))), short)

    def add_stored(self, b, v, address, accumulate):
        """Store narrowed entries; with accumulate (an i64 flag), on top of those that are there."""
        ty = ir.VectorType(self.stored, v.type.count) if isinstance(v.type, ir.VectorType) else self.stored
        pointer = b.inttoptr(address, ty.as_pointer())
        cell = cgutils.alloca_once_value(b, v)
        with b.if_then(accumulate):
            b.store(b.fadd(v, self.widen(b, b.load(pointer, align=1))), cell)
        b.store(self.narrow(b, b.load(cell)), pointer, align=1)

    def load_stored(self, b, address, vector):
        """Load a vector, or one entry, of the dtype at any alignment, and widen it."""
        ty = ir.VectorType(self.stored, self.lanes) if vector else self.stored
        return self.widen(b, b.load(b.inttoptr(address, ty.as_pointer()), align=1))

    def transpose(self, b, rows):
        """Lanes x lanes in registers: log2(lanes) rounds that interleave row i with row i + lanes / 2."""
        half = self.lanes // 2
        pick = ir.VectorType(I32, self.lanes)
        low = ir.Constant(pick, [i // 2 + i % 2 * self.lanes for i in range(self.lanes)])
        high = ir.Constant(pick, [half + i // 2 + i % 2 * self.lanes for i in range(self.lanes)])
        for _ in range(self.lanes.bit_length() - 1):
            pairs = [(rows[i], rows[i + half]) for i in range(half)]
            rows = [b.shuffle_vector(x, y, mask) for x, y in pairs for mask in (low, high)]
        return rows

    def zeros(self, b, count, ty=None):
        """`count` vector variables; LLVM keeps them in registers."""
        ty = ty or self.type
        cells = [b.alloca(ty) for _ in range(count)]
        for cell in cells:
            b.store(ir.Constant(ty, [0.0] * self.lanes), cell)
        return cells

    def widest(self, b, v):
        """Convert a vector to float64."""
        return v if v.type == self.wide else b.fpext(v, self.wide)

    def total(self, b, vectors):
        """The sum of all lanes as float64, by a tree: the order is part of the result's bits."""
        while len(vectors) > 1:
            pairs = zip(vectors[::2], vectors[1::2], strict=False)
            vectors = [b.fadd(x, y) for x, y in pairs] + vectors[len(vectors) // 2 * 2 :]
        v = self.widest(b, vectors[0])
        return self.call(b, "vector.reduce.fadd", DOUBLE(0.0), v, fastmath=("reassoc",))

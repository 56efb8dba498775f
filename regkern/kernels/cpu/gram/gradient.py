"""Value and gradient in one pass over the pairs, without the signs of all n x n cosines.

dP/dx_i = factor / pairs / |x_i| * (v_i - (v_i . u_i) u_i) with v_i the sum over j != i of sign(G_ij) u_j.

V has the layout of the panels: V_i += U_j S is the micro kernel's product again, with depth running over the rows of
panel j, U_j (entries at stride NR) on the left and a tile of signs on the right. Each sign tile serves both V_i and,
transposed, V_j: 3 n^2 d operations in all, where forward and backward by full products take 6.
"""

from typing import Any

from regkern.kernels.cpu.compile import part
from regkern.kernels.cpu.gram import workspace as ws
from regkern.kernels.cpu.gram.panels import make_unpack_panel, project_ir
from regkern.kernels.cpu.gram.product import micro_kernel_ir, signs_ir
from regkern.kernels.cpu.gram.tiles import KC, group_size
from regkern.kernels.cpu.gram.value import MULTIPLIED, PACKED
from regkern.kernels.cpu.gram.vectors import RAW
from regkern.kernels.cpu.gram.workspace import aligned, buffer_of, zero
from regkern.kernels.cpu.team import launch, rest
from regkern.kernels.cpu.words import (
    allocate,
    free,
    load_double,
    load_shared,
    load_word,
    load_words,
    store_double,
    store_shared,
    store_words,
)


@part
def mean_and_gradient(
    record, x, n, d, row_stride, depth_stride, out, out_row_stride, out_depth_stride, factor, add, width
):
    """Return whether there was memory, and the mean over the pairs of n rows; of raw rows the sum over all entries.

    Factor times its gradient is written to out, or added.
    """
    nr, size = load_word(record + ws.ENTRIES), load_word(record + ws.ENTRY_BYTES)
    count = (n + nr - 1) // nr
    group = group_size(count)
    blocks = (count + group - 1) // group
    panel, scales, buffer = nr * d * size, 2 * nr * size, aligned(2 * group * group * nr * nr * size)
    job = allocate(ws.JOB + count * (2 * panel + scales) + width * buffer + 16 * blocks + 3 * ws.CACHE_LINE)
    if job == 0:
        return False, 0.0
    panels = aligned(job + ws.JOB)
    products = aligned(panels + count * panel)
    buffers = aligned(products + count * panel)
    sums = buffers + width * buffer
    zero(sums, 16 * blocks)
    pairs = max(1.0, n * (n - 1) / 2)
    store_words(job + ws.MATRIX, (x, n, d, row_stride, depth_stride, panels, sums + 16 * blocks, products))
    store_words(job + ws.PAIRS, (group, sums, sums + 8 * blocks, out, out_row_stride, out_depth_stride, add))
    raw = load_word(record + ws.RAW) != 0
    store_double(job + ws.FACTOR, 4.0 * factor if raw else factor * load_double(record + ws.SLOPE) / pairs)
    store_words(job + ws.BUFFERS, (buffers, buffer))
    launch(load_word(record + ws.PACK), job, count, 4, 2 * n * d // PACKED, width)
    work = 3 * n * n * d // 2 // MULTIPLIED
    launch(load_word(record + ws.SUM_PAIRS), job, blocks * (blocks + 1) // 2, 1, work, width)
    launch(load_word(record + ws.UNPACK), job, count, 4, 2 * n * d // PACKED, width)
    total = 0.0
    for i in range(blocks):
        total += load_double(sums + 8 * i)
    free(job)
    if raw:  # rows that fill the last panel are zero, and each is 1 beyond on the diagonal
        return True, 2.0 * total - (count * nr - n)
    return True, total / pairs


def make_sum_pairs(vec: Any, tile: Any) -> Any:
    """Make the task that goes over pairs of blocks of panels.

    Two blocks' products are written by each. In round r the task of block i is the pair (i, r - i mod blocks), so every
    block has exactly one task per round, and the tasks of a round are disjoint. Threads draw tasks in order and wait
    until both blocks have finished the round before: no barrier, and a fixed order of all sums.
    """
    nr, size = tile.vectors * vec.lanes, vec.size
    block_pair = _make_block_pair(vec, tile)

    def sum_pairs(job, worker, first, last):
        _, n, d, _, _, panels, _, products = load_words(job + ws.MATRIX, 8)
        group, sums, done = load_words(job + ws.PAIRS, 3)
        left = buffer_of(job, worker)
        right = left + group * group * nr * nr * size
        count = (n + nr - 1) // nr
        blocks = (count + group - 1) // group
        r, passed, t = 0, 0, first
        while t < last:
            # Round r has the pairs with i + j = r, then those with i + j = r + blocks.
            low = r // 2 + 1
            tasks = low + (r + blocks) // 2 - r
            if t - passed >= tasks:
                passed += tasks
                r += 1
                continue
            i = t - passed if t - passed < low else t - passed - low + r + 1
            j = (r - i) % blocks
            waited = 0
            while load_shared(done + 8 * i) < r or load_shared(done + 8 * j) < r:
                rest(waited)
                waited += 1
            i0, j0 = i * group, j * group
            i1, j1 = min(i0 + group, count), min(j0 + group, count)
            total = load_double(sums + 8 * i) + block_pair(panels, products, d, i0, i1, j0, j1, left, right)
            store_double(sums + 8 * i, total)
            store_shared(done + 8 * i, r + 1)
            store_shared(done + 8 * j, r + 1)
            t += 1
        return 0

    return sum_pairs


def make_unpack(vec: Any, tile: Any) -> Any:
    """Make the task that turns panels of products into the gradient."""
    nr, size = tile.vectors * vec.lanes, vec.size
    unpack_panel, project, raw = make_unpack_panel(vec, nr), project_ir(vec, tile.vectors), vec.fold == RAW

    def unpack(job, worker, first, last):
        _, n, d, _, _, panels, scales, products = load_words(job + ws.MATRIX, 8)
        _, _, _, out, row_stride, depth_stride, add = load_words(job + ws.PAIRS, 7)
        factor = load_double(job + ws.FACTOR)
        for p in range(first, last):
            offset = p * nr * d * size
            if n > 1 or raw:  # one row has no pair, and its products are the zeros that they started from
                project(products + offset, panels + offset, d, scales + p * 2 * nr * size, factor)
            rows, target = min(nr, n - p * nr), out + p * nr * row_stride
            unpack_panel(products + offset, rows, d, target, row_stride, depth_stride, add)
        return 0

    return unpack


def _make_block_pair(vec, tile):
    mr, nr, size = tile.mr, tile.vectors * vec.lanes, vec.size
    gram_kernel = micro_kernel_ir(vec, mr, tile.vectors, nr, 1, nr)
    sign_kernel, sign_kernel_row = (micro_kernel_ir(vec, rows, tile.vectors, nr, nr, 1) for rows in (mr, 1))
    signs = signs_ir(vec, nr)

    @part
    def pair_signs(a, b, d, diagonal, c, t):
        """The signs of one panel pair's dot products to c and, transposed, to t; the sum of their absolute values."""
        for k in range(0, d, KC):
            kc = min(KC, d - k)
            for r in range(0, nr, mr):
                gram_kernel(1, 0, a + (k * nr + r) * size, b + k * nr * size, kc, c + r * nr * size, k > 0, True)
        s = signs(c, t, diagonal)
        return 0.5 * s if diagonal else s

    @part
    def add_products(v, u, panels, d, right):
        """V += U S for one panel of V and all `panels` panels of u, whose sign tiles follow each other at right."""
        whole = d // mr * mr
        for f in range(0, whole, mr):
            at = f * nr * size
            sign_kernel(panels, d * nr * size, u + at, right, nr, v + at, True, True)
        for f in range(whole, d):
            at = f * nr * size
            sign_kernel_row(panels, d * nr * size, u + at, right, nr, v + at, True, True)

    @part
    def block_pair(u, v, d, i0, i1, j0, j1, left, right):
        """All pairs of panels i0 to i1 with panels j0 to j1; left and right hold a sign tile for each pair."""
        panel, tile_bytes = d * nr * size, nr * nr * size
        rows, columns = i1 - i0, j1 - j0
        total = 0.0
        for j in range(columns):
            for i in range(j + 1 if i0 == j0 else rows):
                # Left tiles have i in their lanes and are contiguous over j, right tiles the reverse.
                t = left + (i * columns + j) * tile_bytes
                c = right + tile_bytes * (j * rows + i)
                if i0 == j0 and i != j:  # a block with itself: both orders of a pair are left tiles
                    c = left + (j * columns + i) * tile_bytes
                total += pair_signs(u + (i0 + i) * panel, u + (j0 + j) * panel, d, i0 == j0 and i == j, c, t)
        for i in range(rows):
            add_products(v + (i0 + i) * panel, u + j0 * panel, columns, d, left + i * columns * tile_bytes)
        if i0 != j0:
            for j in range(columns):
                add_products(v + (j0 + j) * panel, u + i0 * panel, rows, d, right + j * rows * tile_bytes)
        return total

    return block_pair

"""Value and gradient in one pass over the pairs, without the signs of all n x n cosines.

dP/dx_i = factor / pairs / |x_i| * (v_i - (v_i . u_i) u_i) with v_i the sum over j != i of sign(G_ij) u_j.

V has the layout of the panels: V_i += U_j S is the micro kernel's product again, with depth running over the rows of
panel j, U_j (entries at stride NR) on the left and a tile of signs on the right. Each sign tile serves both V_i and,
transposed, V_j: 3 n^2 d operations in all, where forward and backward by full products take 6.
"""

import numpy as np
from numba import prange

from regkern.kernels.cpu.compile import inner
from regkern.kernels.cpu.gram.atomics import load_acquire, store_release, take_ticket
from regkern.kernels.cpu.gram.panels import make_pack_panel, make_unpack_panel, project_ir
from regkern.kernels.cpu.gram.product import micro_kernel_ir, signs_ir
from regkern.kernels.cpu.gram.tiles import KC, MAX_WORKERS, group_size
from regkern.kernels.cpu.gram.workspace import aligned, keep_alive


def make_value_and_gradient(vec, tile):
    """Make ``value_and_gradient(x, n, d, *strides, out, *out_strides, factor, add)``, where rows have the first stride.

    It returns the mean of |cosine| over the pairs of n rows, and writes factor times its gradient to out, or adds it.
    """
    nr, size, spare, accumulator = tile.vectors * vec.lanes, vec.size, vec.spare, vec.accumulator
    pack_panel, unpack_panel, project = (
        make_pack_panel(vec, nr, tile.mr),
        make_unpack_panel(vec, nr),
        project_ir(vec, tile.vectors),
    )
    draw_pairs = _make_draw_pairs(vec, tile)

    def value_and_gradient(x, n, d, row_stride, depth_stride, out, out_row_stride, out_depth_stride, factor, add):
        count = (n + nr - 1) // nr
        panel_bytes = nr * d * size
        unit = np.zeros(count * nr * d + spare, accumulator)  # sign tiles cover whole panels, padding included
        products = np.zeros(count * nr * d + spare, accumulator)
        norms = np.empty(count * 2 * nr, accumulator)
        u, v, scales = aligned(unit), aligned(products), norms.ctypes.data
        for p in prange(count):
            rows, start = min(nr, n - p * nr), x + p * nr * row_stride
            pack_panel(start, rows, d, row_stride, depth_stride, u + p * panel_bytes, scales + p * 2 * nr * size)
        group = group_size(count)
        blocks = (count + group - 1) // group
        sums, rounds, counter = np.zeros(blocks), np.zeros(blocks, np.int64), np.zeros(1, np.int64)
        done, tickets = rounds.ctypes.data, counter.ctypes.data
        workers = min(blocks, MAX_WORKERS)
        for _ in prange(workers):
            draw_pairs(u, v, d, count, group, sums, done, tickets)
        pairs = max(1.0, n * (n - 1) / 2)
        for p in prange(count):
            panel, rows, target = v + p * panel_bytes, min(nr, n - p * nr), out + p * nr * out_row_stride
            if n > 1:  # one row has no pair, and its products are the zeros that they started from
                project(panel, u + p * panel_bytes, d, scales + p * 2 * nr * size, factor / pairs)
            unpack_panel(panel, rows, d, target, out_row_stride, out_depth_stride, add)
        total = 0.0
        for i in range(blocks):
            total += sums[i]
        keep_alive(unit, products, norms, rounds, counter)
        return total / pairs

    return value_and_gradient


def _make_draw_pairs(vec, tile):
    """Make ``draw_pairs(u, v, d, count, group, sums, done, tickets)``: one thread's share of the pairs of blocks.

    Two blocks' accumulators are written by each task. In round r the task of block i is the pair (i, r - i mod blocks),
    so every block has exactly one task per round, and the tasks of a round are disjoint. Threads draw tasks in order
    and wait until both blocks have finished the round before: no barrier, and a fixed order of all sums.
    """
    nr, size, spare, accumulator = tile.vectors * vec.lanes, vec.size, vec.spare, vec.accumulator
    block_pair = _make_block_pair(vec, tile)

    @inner(vec.tag)
    def draw_pairs(u, v, d, count, group, sums, done, tickets):
        blocks = (count + group - 1) // group
        buffer = np.empty(2 * group * group * nr * nr + spare, accumulator)
        left = aligned(buffer)
        right = left + group * group * nr * nr * size
        r, passed, t = 0, 0, take_ticket(tickets)
        while r < blocks:
            # Round r has the pairs with i + j = r, then those with i + j = r + blocks.
            low = r // 2 + 1
            tasks = low + (r + blocks) // 2 - r
            if t - passed >= tasks:
                passed += tasks
                r += 1
                continue
            i = t - passed if t - passed < low else t - passed - low + r + 1
            j = (r - i) % blocks
            while load_acquire(done + 8 * i) < r or load_acquire(done + 8 * j) < r:
                pass
            i0, j0 = i * group, j * group
            i1, j1 = min(i0 + group, count), min(j0 + group, count)
            sums[i] += block_pair(u, v, d, i0, i1, j0, j1, left, right)
            store_release(done + 8 * i, r + 1)
            store_release(done + 8 * j, r + 1)
            t = take_ticket(tickets)
        keep_alive(buffer)

    return draw_pairs


def _make_block_pair(vec, tile):
    mr, nr, size = tile.mr, tile.vectors * vec.lanes, vec.size
    gram_kernel = micro_kernel_ir(vec, mr, tile.vectors, nr, 1, nr)
    sign_kernel, sign_kernel_row = (micro_kernel_ir(vec, rows, tile.vectors, nr, nr, 1) for rows in (mr, 1))
    signs = signs_ir(vec, nr)

    @inner(vec.tag)
    def pair_signs(a, b, d, diagonal, c, t):
        """The signs of one panel pair's dot products to c and, transposed, to t; the sum of their absolute values."""
        for k in range(0, d, KC):
            kc = min(KC, d - k)
            for r in range(0, nr, mr):
                gram_kernel(1, 0, a + (k * nr + r) * size, b + k * nr * size, kc, c + r * nr * size, k > 0, True)
        s = signs(c, t, diagonal)
        return 0.5 * s if diagonal else s

    @inner(vec.tag)
    def add_products(v, u, panels, d, right):
        """V += U S for one panel of V and all `panels` panels of u, whose sign tiles follow each other at right."""
        whole = d // mr * mr
        for f in range(0, whole, mr):
            at = f * nr * size
            sign_kernel(panels, d * nr * size, u + at, right, nr, v + at, True, True)
        for f in range(whole, d):
            at = f * nr * size
            sign_kernel_row(panels, d * nr * size, u + at, right, nr, v + at, True, True)

    @inner(vec.tag)
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

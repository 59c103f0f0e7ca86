"""The flash-decoding kernels: few queries and many keys, which programs share out and a second kernel puts together.

The rows of a tile are all queries that meet the same keys: the positions on the batch axes over which keys and values
are shared (the query heads of a group), times the queries themselves. So each key and value is read once.
Flash-Decoding: Dao et al., https://pytorch.org/blog/flash-decoding.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from flashfuse.kernels.elementary import scaled_exp2
from flashfuse.kernels.forward import finish, key_tiles, visit, visit_skipped
from flashfuse.kernels.tiles import all_in_units, batch_pointer, load_columns, tile_pointers

# The lengths of a growing cache: nothing is gained from knowing that they are 1 or a multiple of 16.
_LENGTHS = ["kv_len", "num_splits", "sizes"]
# Of these it is worth knowing that they are 1: no position has to be divided by them before anything can be loaded.
_COUNTS = [
    "outer_0", "outer_1", "outer_2", "outer_3", "packed_0", "packed_1", "packed_2", "packed_3", "q_len", "row_tiles",
]  # fmt: skip


# The fewest rows of a matrix product.
MIN_ROWS = tl.constexpr(16)


@triton.jit(do_not_specialize=_LENGTHS, do_not_specialize_on_alignment=_COUNTS)
def attention_split_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, ranges_ptr, seed_ptr, parts_ptr,
    q_strides, k_strides, v_strides, out_strides, ranges_strides,
    outer_0, outer_1, outer_2, outer_3, packed_0, packed_1, packed_2, packed_3,
    q_len, kv_len, row_tiles, num_splits, sizes, captured, captured_strides,
    SCORE_MASKED: tl.constexpr, SCORE_FULL: tl.constexpr, KV_BOUNDS: tl.constexpr,
    LOG2_SCALE: tl.constexpr, FILL_THRESHOLD: tl.constexpr, LARGE_SCORES: tl.constexpr, FILLS: tl.constexpr,
    ZERO_EMPTY_ROWS: tl.constexpr, NORMALISED: tl.constexpr, SINK: tl.constexpr, FACTOR_MASKED: tl.constexpr,
    FACTOR_FULL: tl.constexpr, ROW_FACTOR: tl.constexpr, ROW_KEPT: tl.constexpr, PACKED: tl.constexpr,
    DROP_LEAST: tl.constexpr, KEEP_SCALE: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr,
    PRODUCT_DTYPE: tl.constexpr, PROBS_DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, UNITS: tl.constexpr, OVERLAPPED: tl.constexpr,
):  # fmt: skip
    """One of num_splits shares of the keys of a tile of rows, for each split s:

        max_is = max_{j in s} s_ij,  sum_is = sum_{j in s} exp(s_ij - max_is),  acc_is = sum_{j in s} exp(..) v_j

    in `parts_ptr`, see `_part_pointers`; (-inf, 0, 0) where a share holds no key. Without `parts_ptr` there is one
    split, and its rows are finished. See `attention_forward_kernel` for the arguments that are the same.

    outer, packed: the batch sizes of which a program has one position, and those that lie along its rows; one of the
    two is 1 on each axis, and PACKED says which. Keys, values, `KV_BOUNDS` and ranges are the same along packed axes.
    row_tiles: how many tiles of BLOCK_Q rows there are for each outer position.
    OVERLAPPED: the next kernel is launched while this one runs, and waits for it by itself (programmatic dependent
    launch: PTX ISA, griddepcontrol).
    """
    if OVERLAPPED:
        gdc_launch_dependents()
    COMPUTE: tl.constexpr = lse_ptr.dtype.element_ty
    q_strides, k_strides, v_strides, out_strides = all_in_units(
        (q_strides, k_strides, v_strides, out_strides), UNITS
    )  # fmt: skip
    outer = (outer_0, outer_1, outer_2, outer_3)
    packed = (packed_0, packed_1, packed_2, packed_3)
    rows = packed_0 * packed_1 * packed_2 * packed_3 * q_len

    # Programs next to each other share keys.
    tile = tl.program_id(0) % row_tiles
    share = tl.program_id(0) // row_tiles
    split = share % num_splits
    position = share // num_splits
    offs_row = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    o0, o1, o2, o3 = _unravelled(position, outer)
    n0, n1, n2, n3, q_idx = _places(offs_row, rows, o0, o1, o2, o3, packed, q_len, PACKED)

    q, k_ptrs, v_ptrs = _operands(
        q_ptr, k_ptr, v_ptr, q_strides, k_strides, v_strides, o0, o1, o2, o3, n0, n1, n2, n3, q_idx, PACKED,
        PRODUCT_DTYPE, HEAD_DIM, BLOCK_D, BLOCK_DV, BLOCK_KV,
    )  # fmt: skip
    c0, c1, c2, c3 = _columns(n0, n1, n2, n3, PACKED)
    draw = (0 if seed_ptr is None else tl.load(seed_ptr), _number(c0, c1, c2, c3, outer, packed))

    # The share of the keys at hand, of those that any query visits.
    q_start = tl.full((), 0, tl.int32)
    first, full_start, full_end, last = key_tiles(
        q_start, q_len, o0, o1, o2, o3, q_len, kv_len, sizes, ranges_ptr, ranges_strides, KV_BOUNDS, 1, BLOCK_KV
    )
    tiles = (last - first) // BLOCK_KV
    # The first shares are longer by a tile where not all can be of one length.
    shortest, longer = tiles // num_splits, tiles % num_splits
    start = first + (split * shortest + tl.minimum(split, longer)) * BLOCK_KV
    end = start + (shortest + (split < longer).to(tl.int32)) * BLOCK_KV
    full_start = tl.minimum(tl.maximum(full_start, start), end)
    full_end = tl.maximum(tl.minimum(full_end, end), full_start)

    row_max = tl.full([BLOCK_Q], float("-inf"), COMPUTE)
    row_shift = tl.full([BLOCK_Q], float("-inf"), COMPUTE)
    row_sum = tl.zeros([BLOCK_Q], COMPUTE)
    acc = tl.zeros([BLOCK_Q, BLOCK_DV], COMPUTE)
    acc, row_sum, row_max, row_shift = visit(
        acc, row_sum, row_max, row_shift, q, k_ptrs, v_ptrs, k_strides, v_strides, start, full_start, full_end, end,
        draw, c0, c1, c2, c3, q_idx, q_len, kv_len, sizes, captured, captured_strides, SCORE_MASKED, SCORE_FULL,
        FACTOR_MASKED, FACTOR_FULL, LOG2_SCALE, LARGE_SCORES, NORMALISED, DROP_LEAST, KEEP_SCALE, KEY, VALUE,
        PRODUCT_DTYPE, PROBS_DTYPE, PRECISION, HEAD_DIM, VALUE_DIM,
    )  # fmt: skip

    if parts_ptr is not None:
        at = (position.to(tl.int64) * num_splits + split) * rows + offs_row
        count = _positions(outer) * num_splits * rows
        acc_ptrs, max_ptrs, sum_ptrs = _part_pointers(parts_ptr, at, count, BLOCK_DV)
        tl.store(acc_ptrs, acc, mask=offs_row[:, None] < rows)
        tl.store(max_ptrs, row_max, mask=offs_row < rows)
        tl.store(sum_ptrs, row_sum, mask=offs_row < rows)
    else:
        if FILL_THRESHOLD is not None:
            acc, row_sum, row_max, row_shift = visit_skipped(
                acc, row_sum, row_max, row_shift, q, k_ptrs, v_ptrs, k_strides, v_strides, first, last,
                draw, c0, c1, c2, c3, q_idx, q_len, kv_len, sizes, captured, captured_strides, SCORE_MASKED,
                FACTOR_MASKED, FILL_THRESHOLD, LOG2_SCALE, LARGE_SCORES, NORMALISED, DROP_LEAST, KEEP_SCALE, KEY, VALUE,
                PRODUCT_DTYPE, PROBS_DTYPE, PRECISION, HEAD_DIM, VALUE_DIM,
            )  # fmt: skip
        _finish(
            acc, row_sum, row_max, row_shift, out_ptr, lse_ptr, out_strides, offs_row, rows, n0, n1, n2, n3, q_idx,
            outer, packed, q_len, kv_len, sizes, captured, captured_strides, LOG2_SCALE, LARGE_SCORES, FILLS,
            ZERO_EMPTY_ROWS, NORMALISED, SINK, ROW_FACTOR, ROW_KEPT, PACKED, VALUE_DIM,
        )  # fmt: skip


@triton.jit(do_not_specialize=_LENGTHS, do_not_specialize_on_alignment=_COUNTS)
def attention_combine_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, ranges_ptr, seed_ptr, parts_ptr,
    q_strides, k_strides, v_strides, out_strides, ranges_strides,
    outer_0, outer_1, outer_2, outer_3, packed_0, packed_1, packed_2, packed_3,
    q_len, kv_len, row_tiles, num_splits, sizes, captured, captured_strides,
    SCORE_MASKED: tl.constexpr, KV_BOUNDS: tl.constexpr,
    LOG2_SCALE: tl.constexpr, FILL_THRESHOLD: tl.constexpr, LARGE_SCORES: tl.constexpr, FILLS: tl.constexpr,
    ZERO_EMPTY_ROWS: tl.constexpr, NORMALISED: tl.constexpr, SINK: tl.constexpr, FACTOR_MASKED: tl.constexpr,
    ROW_FACTOR: tl.constexpr, ROW_KEPT: tl.constexpr, PACKED: tl.constexpr,
    DROP_LEAST: tl.constexpr, KEEP_SCALE: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr,
    PRODUCT_DTYPE: tl.constexpr, PROBS_DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_KV: tl.constexpr, UNITS: tl.constexpr, OVERLAPPED: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """A row of `attention_split_kernel` from its shares of the keys, SPLITS at a time and always in this order:

        max_i = max_s max_is,  sum_i = sum_s exp(max_is - max_i) sum_is,  acc_i = sum_s exp(max_is - max_i) acc_is

    What only whole rows tell is done here: the visit of skipped keys, sinks, factors of rows.
    """
    COMPUTE: tl.constexpr = lse_ptr.dtype.element_ty
    q_strides, k_strides, v_strides, out_strides = all_in_units(
        (q_strides, k_strides, v_strides, out_strides), UNITS
    )  # fmt: skip
    outer = (outer_0, outer_1, outer_2, outer_3)
    packed = (packed_0, packed_1, packed_2, packed_3)
    rows = packed_0 * packed_1 * packed_2 * packed_3 * q_len
    position = tl.program_id(0) // rows
    # [1]
    row = tl.program_id(0) % rows + tl.arange(0, 1)
    o0, o1, o2, o3 = _unravelled(position, outer)
    n0, n1, n2, n3, q_idx = _places(row, rows, o0, o1, o2, o3, packed, q_len, PACKED)
    if OVERLAPPED:
        # Nothing that a kernel has written is read before.
        gdc_wait()

    count = _positions(outer) * num_splits * rows
    row_max = tl.full([1], float("-inf"), COMPUTE)
    row_sum = tl.zeros([1], COMPUTE)
    acc = tl.zeros([1, BLOCK_DV], COMPUTE)
    for i in tl.range(0, num_splits, SPLITS):
        split = i + tl.arange(0, SPLITS)
        there = split[:, None] < num_splits
        # [splits, 1]
        at = (position.to(tl.int64) * num_splits + split)[:, None] * rows + row[None, :]
        acc_ptrs, max_ptrs, sum_ptrs = _part_pointers(parts_ptr, at, count, BLOCK_DV)
        split_max = tl.load(max_ptrs, mask=there, other=float("-inf"))
        split_sum = tl.load(sum_ptrs, mask=there, other=0.0)
        # [splits, 1, block_dv]
        split_acc = tl.load(acc_ptrs, mask=there[:, :, None], other=0.0)
        if NORMALISED:
            new_max = tl.maximum(row_max, tl.max(split_max, 0))
            weight = _decay(split_max, new_max[None, :], LOG2_SCALE, LARGE_SCORES)
            correction = _decay(row_max, new_max, LOG2_SCALE, LARGE_SCORES)
            row_sum = row_sum * correction + tl.sum(split_sum * weight, 0)
            acc = acc * correction[:, None] + tl.sum(split_acc * weight[:, :, None], 0)
            row_max = new_max
        else:
            acc += tl.sum(split_acc, 0)
    row_shift = _shift(row_max, LOG2_SCALE)

    if FILL_THRESHOLD is not None:  # noqa: SIM102  (decided when compiling)
        if tl.max(row_max, 0) <= FILL_THRESHOLD:
            # A matrix product takes no fewer rows: they are all this one.
            same = tl.broadcast_to(row, [MIN_ROWS])
            m0, m1, m2, m3, same_idx = _places(same, rows, o0, o1, o2, o3, packed, q_len, PACKED)
            q, k_ptrs, v_ptrs = _operands(
                q_ptr, k_ptr, v_ptr, q_strides, k_strides, v_strides, o0, o1, o2, o3, m0, m1, m2, m3, same_idx, PACKED,
                PRODUCT_DTYPE, HEAD_DIM, BLOCK_D, BLOCK_DV, BLOCK_KV,
            )  # fmt: skip
            c0, c1, c2, c3 = _columns(m0, m1, m2, m3, PACKED)
            draw = (0 if seed_ptr is None else tl.load(seed_ptr), _number(c0, c1, c2, c3, outer, packed))
            q_start = tl.full((), 0, tl.int32)
            first, _, _, last = key_tiles(
                q_start, q_len, o0, o1, o2, o3, q_len, kv_len, sizes, ranges_ptr, ranges_strides, KV_BOUNDS, 1, BLOCK_KV
            )
            accs, sums, maxima, shifts = visit_skipped(
                tl.broadcast_to(acc, [MIN_ROWS, BLOCK_DV]), tl.broadcast_to(row_sum, [MIN_ROWS]),
                tl.broadcast_to(row_max, [MIN_ROWS]), tl.broadcast_to(row_shift, [MIN_ROWS]), q, k_ptrs, v_ptrs,
                k_strides, v_strides, first, last, draw, c0, c1, c2, c3, same_idx, q_len, kv_len, sizes, captured,
                captured_strides, SCORE_MASKED, FACTOR_MASKED, FILL_THRESHOLD, LOG2_SCALE, LARGE_SCORES, NORMALISED,
                DROP_LEAST, KEEP_SCALE, KEY, VALUE, PRODUCT_DTYPE, PROBS_DTYPE, PRECISION, HEAD_DIM, VALUE_DIM,
            )  # fmt: skip
            acc, row_sum = tl.max(accs, 0, keep_dims=True), tl.max(sums, 0, keep_dims=True)
            row_max, row_shift = tl.max(maxima, 0, keep_dims=True), tl.max(shifts, 0, keep_dims=True)
    _finish(
        acc, row_sum, row_max, row_shift, out_ptr, lse_ptr, out_strides, row, rows, n0, n1, n2, n3, q_idx,
        outer, packed, q_len, kv_len, sizes, captured, captured_strides, LOG2_SCALE, LARGE_SCORES, FILLS,
        ZERO_EMPTY_ROWS, NORMALISED, SINK, ROW_FACTOR, ROW_KEPT, PACKED, VALUE_DIM,
    )  # fmt: skip


@triton.jit
def _finish(
    acc, row_sum, row_max, row_shift, out_ptr, lse_ptr, out_strides, offs_row, rows, n0, n1, n2, n3, q_idx, outer,
    packed, q_len, kv_len, sizes, captured, captured_strides, LOG2_SCALE: tl.constexpr, LARGE_SCORES: tl.constexpr,
    FILLS: tl.constexpr, ZERO_EMPTY_ROWS: tl.constexpr, NORMALISED: tl.constexpr, SINK: tl.constexpr,
    ROW_FACTOR: tl.constexpr, ROW_KEPT: tl.constexpr, PACKED: tl.constexpr, VALUE_DIM: tl.constexpr,
):  # fmt: skip
    """`finish` for rows at places of their own."""
    lse_ptrs = lse_ptr + 2 * (_number(n0, n1, n2, n3, outer, packed).to(tl.int64) * q_len + q_idx)
    c0, c1, c2, c3 = _columns(n0, n1, n2, n3, PACKED)
    # [block_q, block_dv]
    out_matrix = batch_pointer(out_ptr, out_strides, c0, c1, c2, c3)
    out_ptrs = tile_pointers(out_matrix, q_idx, tl.arange(0, acc.shape[1]), out_strides)
    finish(
        acc, row_sum, row_max, row_shift, out_ptrs, lse_ptrs, offs_row < rows, n0, n1, n2, n3, q_idx, q_len, kv_len,
        sizes, captured, captured_strides, LOG2_SCALE, LARGE_SCORES, FILLS, ZERO_EMPTY_ROWS, NORMALISED, SINK,
        ROW_FACTOR, ROW_KEPT, VALUE_DIM,
    )  # fmt: skip


@triton.jit
def _operands(
    q_ptr, k_ptr, v_ptr, q_strides, k_strides, v_strides, o0, o1, o2, o3, n0, n1, n2, n3, q_idx,
    PACKED: tl.constexpr, PRODUCT_DTYPE: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_KV: tl.constexpr,
):  # fmt: skip
    """The rows' queries [block_q, block_d], and pointers to the first key and value tile."""
    offs_d = tl.arange(0, BLOCK_D)
    offs_kv = tl.arange(0, BLOCK_KV)
    c0, c1, c2, c3 = _columns(n0, n1, n2, n3, PACKED)
    q_ptrs = tile_pointers(batch_pointer(q_ptr, q_strides, c0, c1, c2, c3), q_idx, offs_d, q_strides)
    q = load_columns(q_ptrs, offs_d[None, :], HEAD_DIM, BLOCK_D).to(PRODUCT_DTYPE)
    k_ptrs = tile_pointers(batch_pointer(k_ptr, k_strides, o0, o1, o2, o3), offs_kv, offs_d, k_strides)
    v_matrix = batch_pointer(v_ptr, v_strides, o0, o1, o2, o3)
    return q, k_ptrs, tile_pointers(v_matrix, offs_kv, tl.arange(0, BLOCK_DV), v_strides)


@triton.jit
def _part_pointers(parts_ptr, at, count, BLOCK_DV: tl.constexpr):
    """Pointers to the accumulators [.., block_dv], largest scores and sums [..] of the parts number `at` [..].

    A part is a row's share of the keys in one split: [outer position, split, row]. There are `count`; the accumulators
    of all stand first, BLOCK_DV wide, then their largest inner scores, then their sums.
    """
    max_ptrs = parts_ptr + count * BLOCK_DV + at
    return parts_ptr + at.expand_dims(-1) * BLOCK_DV + tl.arange(0, BLOCK_DV), max_ptrs, max_ptrs + count


@triton.jit
def _unravelled(number, sizes):
    """The position over four axes that has this number."""
    n3, number = number % sizes[3], number // sizes[3]
    n2, number = number % sizes[2], number // sizes[2]
    return number // sizes[1], number % sizes[1], n2, n3


@triton.jit
def _number(n0, n1, n2, n3, outer, packed):
    """The number of a batch position."""
    return ((n0 * (outer[1] * packed[1]) + n1) * (outer[2] * packed[2]) + n2) * (outer[3] * packed[3]) + n3


@triton.jit
def _positions(sizes):
    return tl.full((), 1, tl.int64) * sizes[0] * sizes[1] * sizes[2] * sizes[3]


@triton.jit
def _places(offs_row, rows, o0, o1, o2, o3, packed, q_len, PACKED: tl.constexpr):
    """Batch position and query of each row: [rows] on packed axes, the program's own scalar on others.

    Rows behind the last repeat it, so that no load has to be masked for them; they are not stored.
    """
    row = tl.minimum(offs_row, rows - 1)
    p0, p1, p2, p3 = _unravelled(row // q_len, packed)
    n0 = p0 if PACKED[0] else o0
    n1 = p1 if PACKED[1] else o1
    n2 = p2 if PACKED[2] else o2
    n3 = p3 if PACKED[3] else o3
    return n0, n1, n2, n3, row % q_len


@triton.jit
def _columns(n0, n1, n2, n3, PACKED: tl.constexpr):
    """The places of rows beside the columns of a tile: [rows, 1] where they are [rows]."""
    c0 = n0[:, None] if PACKED[0] else n0
    c1 = n1[:, None] if PACKED[1] else n1
    c2 = n2[:, None] if PACKED[2] else n2
    c3 = n3[:, None] if PACKED[3] else n3
    return c0, c1, c2, c3


@triton.jit
def _shift(score, LOG2_SCALE: tl.constexpr):
    """A largest score as a base-2 logarithm: rounded, as what was subtracted of it in the exponents."""
    return tl.fma(score, tl.full(score.shape, LOG2_SCALE, score.dtype), 0.0)


@triton.jit
def _decay(row_max, new_max, LOG2_SCALE: tl.constexpr, LARGE_SCORES: tl.constexpr):
    """What sums relative to `row_max` are multiplied by to be relative to `new_max`, as from tile to tile."""
    if LARGE_SCORES:
        return scaled_exp2(row_max - tl.where(new_max == float("-inf"), 0.0, new_max), LOG2_SCALE)
    else:
        subtracted = tl.where(new_max == float("-inf"), 0.0, _shift(new_max, LOG2_SCALE))
        return tl.exp2(_shift(row_max, LOG2_SCALE) - subtracted)

"""The bytes of fusions in a program's text: whole arrays, slices of them, and updates in place."""

from dmm_jax.bench import traffic

PROGRAM = """HloModule step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%whole (p: bf16[4,8], q: f32[8]) -> (f32[8], bf16[4,8]) {
  %p = bf16[4,8]{1,0} parameter(0)
  %q = f32[8]{0} parameter(1)
  %zero = f32[] constant(0)
  %wide = f32[4,8]{1,0} convert(%p)
  %summed = f32[8]{0} reduce(%wide, %zero), dimensions={0}, to_apply=%add
  %most = f32[8]{0} maximum(%summed, %q)
  ROOT %both = (f32[8]{0}, bf16[4,8]{1,0}) tuple(%most, %p)
}

%sums (v: bf16[4,8], w: bf16[4,8]) -> f32[8] {
  %v = bf16[4,8]{1,0} parameter(0)
  %w = bf16[4,8]{1,0} parameter(1)
  %zero.2 = f32[] constant(0)
  %product = f32[4,8]{1,0} multiply(%v, %w)
  ROOT %over = f32[8]{0} reduce(%product, %zero.2), dimensions={0}, to_apply=%add
}

%piece (stack: bf16[100,8], row: s32[]) -> f32[8] {
  %stack = bf16[100,8]{1,0} parameter(0)
  %flat = bf16[800]{0} bitcast(%stack)
  %row = s32[] parameter(1)
  %taken = bf16[8]{0} dynamic-slice(%flat, %row), dynamic_slice_sizes={8}
  ROOT %cast = f32[8]{0} convert(%taken)
}

%kept (stack: f32[100,8], new: f32[1,8], row: s32[]) -> f32[100,8] {
  %stack.1 = f32[100,8]{1,0} parameter(0)
  %new = f32[1,8]{1,0} parameter(1)
  %row.1 = s32[] parameter(2)
  %zero.1 = s32[] constant(0)
  ROOT %put = f32[100,8]{1,0} dynamic-update-slice(%stack.1, %new, %row.1, %zero.1)
}

ENTRY %main (x: bf16[4,8], y: f32[8], s: bf16[100,8], r: s32[], t: f32[100,8], n: f32[1,8]) -> f32[100,8] {
  %x = bf16[4,8]{1,0} parameter(0)
  %y = f32[8]{0} parameter(1)
  %s = bf16[100,8]{1,0} parameter(2)
  %r = s32[] parameter(3)
  %t = f32[100,8]{1,0} parameter(4)
  %n = f32[1,8]{1,0} parameter(5)
  %behind = (bf16[4,8]{1,0}, f32[8]{0}) tuple(%x, %y)
  %again = bf16[4,8]{1,0} get-tuple-element(%behind), index=0
  %sums.4 = f32[8]{0} fusion(%again, %x), kind=kInput, calls=%sums
  %whole.1 = (f32[8]{0}, bf16[4,8]{1,0}) fusion(%x, /*index=1*/%y), kind=kInput, calls=%whole, metadata={op_name="f(x)"}
  %piece.2 = f32[8]{0} fusion(%s, %r), kind=kLoop, calls=%piece
  ROOT %kept.3 = f32[100,8]{1,0} fusion(%t, %n, %r), kind=kLoop, calls=%kept
}
"""


def test_fusion_traffic_counts_slices_updates_and_arrays_once():
    reads_of_whole = 4 * 8 * 2 + 8 * 4  # Its reads; its writes are as many.
    piece = 8 * 2 + 4 + 8 * 4
    update = 8 * 4 + 4 + 8 * 4
    sums = 4 * 8 * 2 + 8 * 4  # Its two operands are the same array.
    moved = {"sums.4": sums, "whole.1": 2 * reads_of_whole, "piece.2": piece, "kept.3": update}
    assert traffic.fusion_bytes(PROGRAM) == moved


def test_the_table_has_bytes_and_speed_of_the_longest_fusions():
    kernels = {"gemm": (9.0, 1), "whole_1": (2e-6, 2), "piece_2": (1e-6, 1)}
    total, first, second = traffic.table(kernels, PROGRAM).splitlines()
    assert "whole_1" in first and "piece_2" in second and "gemm" not in total + first + second
    assert "0.19 TB/s" in first  # 2 x 192 bytes in 2 ns.
    assert total.split()[4] == "0.15" and "TB/s" in total  # 436 bytes in 3 ns.


def test_a_program_without_fusions_moves_nothing():
    assert traffic.fusion_bytes("HloModule empty") == {}
    assert "0.00 GB" in traffic.table({"gemm": (1.0, 1)}, "")

"""Program text is read into instructions with their shapes, operands and called computations."""

import pytest

from dmm_jax.planning import hlo


@pytest.mark.parametrize(
    "shape, sizes",
    [
        ("f32[]", [4]), ("bf16[2,3]{1,0:T(8,128)}", [12]), ("(f32[2]{0}, /*index=1*/s8[3]{0})", [8, 3]),
        ("(pred[5], s4[3], token[])", [5, 1.5, 0]), ("f8e4m3fn[7]", [7]),
    ],
)  # fmt: skip
def test_shapes_have_the_bytes_of_their_arrays(shape, sizes):
    assert hlo.array_bytes(shape) == sizes


def test_operands_end_at_the_closing_parenthesis():
    text = "  ROOT %a.1 = (f32[2]{0:T(8)}, s32[]) fusion(f32[2]{0:T(8)} %x, /*index=1*/%y.3), calls=%f, next={%z}"
    (instruction,) = hlo.computations(f"ENTRY %main (x: f32[2]) -> f32[2] {{\n{text}\n}}")["main"]
    assert (instruction.name, instruction.opcode, instruction.is_root) == ("a.1", "fusion", True)
    assert (instruction.operands, instruction.called, instruction.num_bytes) == (("x", "y.3"), ["f"], 12)


def test_branches_are_called_computations():
    text = "  %b = f32[4]{0} conditional(%p), branch_computations={%first, %second}"
    (instruction,) = hlo.computations(f"ENTRY %main (p: f32[4]) -> f32[4] {{\n{text}\n}}")["main"]
    assert instruction.called == ["first", "second"]

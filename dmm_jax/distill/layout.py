"""How the compiled step holds its arrays: equal blocks stacked, small arrays joined, kernels as the device reads them.

A group of equal transformer blocks that runs as a loop is one block of stacked arrays (`models.block_loops`); a
checkpoint has its blocks apart. Biases and norms are half of the arrays of a state, and the host pays for each array at
every step: a step that takes and returns the state packed dispatches in less time. The numbers are the same.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dmm_jax.models.block_loops import is_stacked, stack_blocks, unstack_blocks
from dmm_jax.runtime import sharding

# cuDNN reads a kernel (h, w, I, O), and writes its gradient, with the output channel first. In any other layout every
# step would transpose and copy kernels, gradients and moments.
OUTPUT_FIRST, PLATFORMS = Layout((3, 0, 1, 2)), ("gpu",)
# cuBLAS adds a layer's bias as it writes the product; the kernels that XLA would generate instead need another kernel
# for it. XLA would also join small products, which copies their weights at every step. A third of the compiler's time
# went into tilings of softmax and norms for Triton, whose kernels are no faster here.
COMPILER_OPTIONS = {
    "gpu": {
        "xla_gpu_enable_triton_gemm": False,
        "xla_gpu_dot_merger_threshold_mb": 0,
        "xla_disable_hlo_passes": "triton-softmax-rewriter",
    }
}


def state_specs(state, mesh: Mesh | AbstractMesh):
    """Returns the spec of every leaf of a state of arrays or shapes; stacked blocks are divided as single ones are."""

    def spec(path, leaf):
        if is_stacked(path):
            return _stacked_spec(leaf.shape, mesh)
        return sharding.parameter_spec(leaf.shape, mesh)

    return jax.tree.map_with_path(spec, state)


def _stacked_spec(shape, mesh):
    return P(None, *sharding.parameter_spec(shape[1:], mesh))


def looped_shapes(shapes, fewest: int):
    """Returns the shapes of a tree with its looped groups of blocks stacked; arguments as in `stack_blocks`."""
    return stack_blocks(
        shapes, fewest, lambda leaves: jax.ShapeDtypeStruct((len(leaves), *leaves[0].shape), leaves[0].dtype)
    )


def looped(tree, fewest: int, mesh: Mesh):
    """Stacks the looped groups of blocks of a state on the mesh; arrays of other blocks are shared with `tree`."""

    def stack(leaves):
        return _stack(leaves, NamedSharding(mesh, _stacked_spec((len(leaves), *leaves[0].shape), mesh)))

    return stack_blocks(tree, fewest, stack)


def unlooped(tree, mesh: Mesh):
    """Returns the state from which `looped` made this one."""

    def unstack(leaf):
        return _unstack(leaf, NamedSharding(mesh, sharding.parameter_spec(leaf.shape[1:], mesh)))

    return unstack_blocks(tree, unstack)


@partial(jax.jit, static_argnums=1)
def _stack(leaves, place):
    return jax.lax.with_sharding_constraint(jnp.stack(leaves), place)


@partial(jax.jit, static_argnums=1)
def _unstack(leaf, place):
    return [jax.lax.with_sharding_constraint(part, place) for part in leaf]


def as_read(tree):
    """Returns a tree of frozen arrays on the mesh with convolutions' kernels as the device reads them."""

    def transposed(leaf):
        reads_so = leaf.ndim == 4 and leaf.sharding.mesh.devices.flat[0].platform in PLATFORMS
        return jax.device_put(leaf, Format(OUTPUT_FIRST, leaf.sharding), donate=True) if reads_so else leaf

    return jax.tree.map(transposed, tree)


class Packing:
    """Turns a tree of arrays on a mesh into {"small": one vector, "large": the other arrays} and back."""

    def __init__(self, tree, mesh: Mesh | AbstractMesh):
        """Plans to join the float32 vectors that every device holds whole.

        Args:
          tree: arrays, or shapes with shardings.
        """
        leaves, self._structure = jax.tree.flatten(tree)
        self._is_small = [_is_small(leaf) for leaf in leaves]
        small, large = self._split(leaves)
        self._ends = np.cumsum([leaf.size for leaf in small]).tolist()
        transposes = isinstance(mesh, Mesh) and mesh.devices.flat[0].platform in PLATFORMS
        self._is_kernel = [transposes and leaf.ndim == 4 for leaf in large]
        shardings = [leaf.sharding for leaf in large]
        kernels = [place for place, is_kernel in zip(shardings, self._is_kernel, strict=True) if is_kernel]
        large = [
            Format(OUTPUT_FIRST, place) if is_kernel else place
            for place, is_kernel in zip(shardings, self._is_kernel, strict=True)
        ]
        self.places = {"small": NamedSharding(mesh, sharding.COPY), "large": large}
        self._join = jax.jit(_join, out_shardings=self.places["small"])
        self._cut = jax.jit(self._pieces, out_shardings=self.places["small"])
        self._transpose = jax.jit(list, out_shardings=[Format(OUTPUT_FIRST, place) for place in kernels])
        self._restore = jax.jit(list, out_shardings=[Format(Layout((0, 1, 2, 3)), place) for place in kernels])

    def pack(self, tree) -> dict:
        """Returns the packed tree; large arrays are the same ones, except transposed kernels."""
        small, large = self._split(jax.tree.leaves(tree))
        return {"small": self._join(small), "large": self._with_kernels(self._transpose, large)}

    def unpack(self, packed: dict):
        """Returns the tree in the usual layout; it shares the large arrays, except kernels, with `packed`."""
        return self._merge(self._cut(packed["small"]), self._with_kernels(self._restore, packed["large"]))

    def read(self, packed: dict):
        """Returns the tree inside a compiled program that takes it packed."""
        return self._merge(self._pieces(packed["small"]), packed["large"])

    def around(self, step: Callable) -> Callable:
        """Returns the step with its first argument and first result packed; to be compiled."""

        def packed_step(packed, *arguments):
            tree, results = step(self.read(packed), *arguments)
            small, large = self._split(jax.tree.leaves(tree))
            return {"small": _join(small), "large": large}, results

        return packed_step

    def _split(self, leaves):
        small = [leaf for leaf, is_small in zip(leaves, self._is_small, strict=True) if is_small]
        return small, [leaf for leaf, is_small in zip(leaves, self._is_small, strict=True) if not is_small]

    def _merge(self, small, large):
        small, large = iter(small), iter(large)
        leaves = [next(small if is_small else large) for is_small in self._is_small]
        return jax.tree.unflatten(self._structure, leaves)

    def _pieces(self, vector):
        return [vector[start:end] for start, end in zip([0, *self._ends], self._ends, strict=False)]

    def _with_kernels(self, transpose, large):
        kernels = iter(transpose([leaf for leaf, is_kernel in zip(large, self._is_kernel, strict=True) if is_kernel]))
        return [next(kernels) if is_kernel else leaf for leaf, is_kernel in zip(large, self._is_kernel, strict=True)]


def _is_small(leaf) -> bool:
    return leaf.ndim == 1 and leaf.dtype == jnp.float32 and leaf.sharding.is_fully_replicated


def _join(vectors):
    return jnp.concatenate([*vectors, jnp.zeros(0, jnp.float32)])


def compile_step(step, state, teachers, frozen, batch) -> tuple[jax.stages.Compiled, tuple]:
    """Compiles a jitted step, and moves the teachers to the layout that the program reads.

    Convolutions on GPUs read their kernels with the output channel first: in another layout every step would transpose
    the kernels of all teachers.

    Args:
      step: jitted with `teacher_formats`, which leave the teachers' layout to the compiler, or with the formats that
        the teachers have.
      batch: arrays, or shapes with shardings.

    Returns:
      The program, and the teachers to call it with; the arrays of `teachers` are donated.
    """
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), teachers)
    compiled = step.lower(state, shapes, frozen, batch).compile(compiler_options())
    formats = compiled.input_formats[0][1]
    return compiled, jax.tree.map(lambda leaf, place: jax.device_put(leaf, place, donate=True), teachers, formats)


def compiler_options() -> dict | None:
    """Returns the options of this platform's compiler."""
    return COMPILER_OPTIONS.get(jax.default_backend())


def teacher_formats(teachers):
    """Returns shardings of a tree of arrays or shapes that leave the layout to the compiler."""
    return jax.tree.map(lambda leaf: Format(Layout.AUTO, leaf.sharding), teachers)

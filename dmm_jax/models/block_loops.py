"""Equal transformer blocks as one block with stacked parameters: a compiler meets it once, as the body of a loop.

Stable Diffusion XL has six groups of ten equal blocks. A program of all its blocks takes minutes to compile.
"""

from collections.abc import Callable

import jax

BLOCKS = "transformer_blocks"


def _has_blocks(node) -> bool:
    return isinstance(node, dict) and BLOCKS in node


def is_looped(num_blocks: int, fewest: int) -> bool:
    """Returns whether a group of equal blocks runs as a loop; `fewest`: the smallest group that does, 0 for none."""
    return 0 < fewest <= num_blocks


def is_stacked(path) -> bool:
    """Returns whether the first axis of a parameter at a tree's path numbers the blocks of a loop."""
    keys = [getattr(part, "key", None) for part in path]
    return BLOCKS in keys and not isinstance(keys[keys.index(BLOCKS) + 1], int)


def stack_blocks(tree, fewest: int, stack: Callable):
    """Returns a tree of UNet parameters, or of their moments, in which each looped group of blocks is one block.

    Args:
      fewest: as in `is_looped`.
      stack: makes one array (number of blocks, ...) of a list of equal ones.
    """

    def stacked(node):
        if not _has_blocks(node) or not is_looped(len(node[BLOCKS]), fewest):
            return node
        blocks = [node[BLOCKS][number] for number in range(len(node[BLOCKS]))]
        return {**node, BLOCKS: jax.tree.map(lambda *leaves: stack(leaves), *blocks)}

    return jax.tree.map(stacked, tree, is_leaf=_has_blocks)


def unstack_blocks(tree, unstack: Callable):
    """Returns the tree from which `stack_blocks` made this one.

    Args:
      unstack: makes a list of equal arrays of one (number of blocks, ...).
    """

    def unstacked(node):
        if not _has_blocks(node) or 0 in node[BLOCKS]:
            return node
        leaves, structure = jax.tree.flatten(node[BLOCKS])
        blocks = zip(*map(unstack, leaves), strict=True)
        return {**node, BLOCKS: {number: jax.tree.unflatten(structure, block) for number, block in enumerate(blocks)}}

    return jax.tree.map(unstacked, tree, is_leaf=_has_blocks)

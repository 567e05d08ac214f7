"""The study's schedule: shared stages run once per seed, the longest chains first."""

from dmm_jax.studies.shapes import nodes_of
from dmm_jax.studies.shapes_rows import ROWS, Node


def test_missing_rows_share_their_first_stages_within_a_seed():
    nodes = nodes_of({0: ["score", "4 + 4", "4 + 2 + 2"], 1: ["4 + 4"]})
    first = [Node(ROWS["4 + 4"][:1], seed) for seed in (0, 1)]
    assert nodes[0] == first[0] and nodes.count(first[0]) == nodes.count(first[1]) == 1
    assert len(nodes) == 1 + 4 + 2

"""A packed state is the same state in fewer arrays."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from dmm_jax.distill import layout
from dmm_jax.distill.layout import Packing
from dmm_jax.distillation import Distillation
from dmm_jax.runtime import sharding
from dmm_jax.world.tokenizer import write_tokenizer
from tests import mesh_program

MESH = sharding.make_mesh(data=1, devices=jax.devices()[:1])


def tree(mesh=MESH):
    shapes = {"a": (3,), "b": (2, 3), "c": {"d": (4096,), "e": (), "f": (5,)}}
    values = jax.tree.map(
        lambda shape: np.arange(np.prod(shape), dtype=np.float32).reshape(shape), shapes, is_leaf=_is_shape
    )
    specs = layout.state_specs(values, mesh)
    return jax.tree.map(
        jax.device_put, values | {"step": np.int32(7)}, sharding.shardings(mesh, specs | {"step": sharding.COPY})
    )


def _is_shape(leaf):
    return isinstance(leaf, tuple)


def same(first, second):
    return jax.tree.structure(first) == jax.tree.structure(second) and all(
        np.array_equal(a, b) for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    )


def test_packing_round_trips_exactly_without_copying_large_arrays():
    state_tree = tree()
    packing = Packing(state_tree, MESH)
    packed = packing.pack(state_tree)
    assert packed["small"].shape == (3 + 4096 + 5,) and len(packed["large"]) == 3
    assert packing.unpack(packed)["b"] is state_tree["b"]
    assert same(packing.unpack(packed), state_tree)


def test_a_packed_step_computes_what_the_step_computes():
    state_tree = tree()
    packing = Packing(state_tree, MESH)

    def step(state, factor):
        return jax.tree.map(lambda leaf: (leaf * factor).astype(leaf.dtype), state), {"sum": state["a"].sum()}

    packed, results = jax.jit(packing.around(step), out_shardings=(packing.places, None))(packing.pack(state_tree), 3)
    assert same(packing.unpack(packed), step(state_tree, 3)[0]) and results["sum"] == 3.0


def test_what_is_divided_among_devices_is_not_packed():
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree())
    mesh = sharding.abstract_mesh(fsdp=2, num_devices=2)
    described = sharding.abstract_arrays(shapes, layout.state_specs(shapes, mesh), mesh)
    described["c"]["d"] = sharding.abstract_arrays(shapes["c"]["d"], P("fsdp"), mesh)
    assert [place.spec for place in Packing(described, mesh).places["large"]].count(P("fsdp")) == 1


def test_a_tree_without_small_arrays_packs_too():
    state_tree = {"x": jnp.ones((2, 2))}
    packing = Packing(state_tree, MESH)
    assert same(packing.unpack(packing.pack(state_tree)), state_tree)


def test_packed_kernels_have_the_output_channel_first(monkeypatch):
    monkeypatch.setattr(layout, "PLATFORMS", ("cpu",))
    kernel = np.random.default_rng(0).standard_normal((3, 3, 5, 7)).astype(np.float32)
    state_tree = tree() | {"kernel": jax.device_put(kernel, sharding.shardings(MESH, sharding.COPY))}
    packing = Packing(state_tree, MESH)

    def step(state, _):
        return jax.tree.map(lambda leaf: leaf + leaf, state), {}

    compiled = jax.jit(
        packing.around(step),
        donate_argnums=0,
        in_shardings=(packing.places, None),
        out_shardings=(packing.places, None),
    )
    packed, expected = packing.pack(state_tree), step(state_tree, None)[0]
    assert [leaf.format.layout.major_to_minor for leaf in packed["large"] if leaf.ndim == 4] == [(3, 0, 1, 2)]
    after = packing.unpack(compiled(packed, None)[0])
    assert after["kernel"].format.layout.major_to_minor == (0, 1, 2, 3)
    assert same(after, expected)


def test_a_checkpoint_does_not_depend_on_which_blocks_are_loops(tmp_path):
    tokenizer = tmp_path / "tokenizer"
    write_tokenizer(tokenizer)
    networks = mesh_program.random_checkpoint(0, tokenizer, "unet", "vae", "text_encoder")
    runs = {}
    for fewest in (0, 2):
        config = mesh_program.make_config({"loop_blocks": fewest, "ema_decay": 0.0})
        config.teachers, config.batch_size = config.teachers[:1], 1
        runs[fewest] = Distillation(config, base=networks, teachers={"style_0": networks}, mesh=MESH)
    state = runs[2].init()
    runs[2].save(tmp_path / "run", state)
    state_tree, restored = runs[2].unpack(state), runs[0].unpack(runs[0].restore(tmp_path / "run"))
    assert same(restored, state_tree)
    assert len(jax.tree.leaves(runs[2].abstract_state())) < len(jax.tree.leaves(state_tree))
    reopened = runs[2].restore(tmp_path / "run")
    assert same(reopened.arrays, state.arrays)

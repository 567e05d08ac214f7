"""Teachers in the host's memory: the run of resident teachers to rounding, with one of them on the device at a time."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding

from dmm_jax.config import checks
from dmm_jax.distill import streaming
from dmm_jax.distill.layout import Packing
from dmm_jax.distill.state import init_state
from dmm_jax.distill.teachers import Teachers
from dmm_jax.distillation import Distillation
from dmm_jax.runtime import sharding
from dmm_jax.runtime.errors import UserError
from tests import worlds

ONE_DEVICE = sharding.make_mesh(devices=jax.devices()[:1])
ROUNDING = 1e-5  # Of the largest value; rows are summed in another order.
OPTIONS = {"gradient_accumulation": 2, "lora.rank": 2, "student_prediction": "epsilon", "student_init": "base"}


def run_of(config, in_host_memory, **changes):
    config = config.copy_and_resolve_references()
    config.adam_eps = 1e-3  # A small one amplifies rounding.
    config.update_from_flattened_dict(changes)
    config.teachers_in_host_memory = in_host_memory
    return Distillation(config, mesh=ONE_DEVICE)


def stepped(run, state, stop):
    logged = []
    for batch in run.batches(state.step, stop):
        state, metrics = run.step(state, batch)
        logged.append(jax.tree.map(np.asarray, metrics))
    return state, logged


@pytest.fixture(scope="module")
def streamed(tiny):
    return run_of(tiny[1], True)


@pytest.fixture(scope="module")
def mixed(tiny, tmp_path_factory):
    """A config whose teacher `right` predicts velocity."""
    right = shutil.copytree(tiny[0]["right"], tmp_path_factory.mktemp("mixed") / "right")
    file = right / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"prediction_type": "v_prediction"}))
    config = tiny[1].copy_and_resolve_references()
    config.teachers = (("left", str(tiny[0]["left"])), ("right", str(right)))
    return config


def check_equal(run, other, stop):
    """Checks steps of two runs; returns their states."""
    start = run.unpack(run.init()).trained
    (state, logged), (other_state, other_logged) = (stepped(it, it.init(), stop) for it in (run, other))
    trained, other_trained = run.unpack(state).trained, other.unpack(other_state).trained
    assert worlds.differing(trained, start) > 50 * worlds.differing(trained, other_trained)
    for line, other_line in zip(logged, other_logged, strict=True):
        assert line.keys() == other_line.keys()
        assert all(worlds.differing(line[name], other_line[name]) < ROUNDING for name in ("score", "feature"))
        assert float(line["grad_norm"]) == pytest.approx(float(other_line["grad_norm"]), rel=1e-4)
    return state, other_state


def test_five_steps_equal_those_of_resident_teachers(tiny, streamed):
    """`right` has a text encoder of its own, `left` uses the base's."""
    run = run_of(tiny[1], False)
    state, other_state = check_equal(run, streamed, 5)
    rows, other_rows = run.validate(state), streamed.validate(other_state)
    assert all(rows[name] == pytest.approx(other_rows[name], rel=1e-4) for name in worlds.NAMES)


def test_equality_with_micro_batches_factors_and_two_prediction_types(mixed):
    run, other = run_of(mixed, False, **OPTIONS), run_of(mixed, True, **OPTIONS)
    assert [row.is_converted.tolist() for row in other.teachers.rows] == [[False], [True]]
    check_equal(run, other, 2)


def teacher_of(row):
    """Returns a teacher of one weight per network, in the host's memory."""
    host = NamedSharding(ONE_DEVICE, sharding.TEACHERS, memory_kind=streaming.HOST_MEMORY)
    weight = jax.device_put(np.full((1, 2), 10.0**row, np.float32), host)
    numbers = np.array([-1], np.int32), np.array([[row, 1]], np.int32), np.array([row], np.int32)
    return Teachers({"weight": weight}, None, *sharding.put_global(numbers, ONE_DEVICE, sharding.TEACHERS))


def test_gradients_of_every_network_are_means_over_rows():
    """Toy networks: gradients and errors are closed forms of teacher, row of the batch and step."""
    names = {"student": {"w": jnp.zeros((3, 2))}, "discriminator": {"v": jnp.zeros(2)}}
    state = init_state(names, {name: optax.sgd(1.0) for name in names}, ONE_DEVICE, keeps_average=False)
    state = state._replace(step=jnp.int32(7))
    packing, batch = Packing(state, ONE_DEVICE), jnp.arange(1.0, 7.0).reshape(3, 2)  # (rows, samples)
    shapes = sharding.abstract_arrays(names, jax.tree.map(lambda _: sharding.COPY, names), ONE_DEVICE)
    teachers = streaming.StreamedTeachers(list(map(teacher_of, range(3))), ONE_DEVICE)

    def gradients(trained, row, frozen, batch, step, asked):
        assert row.unet is None
        grads = {"student": {"w": trained["student"]["w"] + asked.sum()}, "discriminator": {"v": batch[0]}}
        return grads, {"score": asked.sum(1) + step}

    step = streaming.jitted_step(
        lambda teacher, frozen, batch, step: batch * teacher.unet["weight"],
        gradients,
        lambda state, grads, errors: (state, {"grads": grads, **errors}),
        packing,
        shapes,
        ONE_DEVICE,
        num_rows=3,
    )
    compiled = step.lower(packing.pack(state), teachers.on_device(0), None, batch, 3).compile()
    _, metrics = compiled(packing.pack(state), teachers, None, batch)
    asked = np.array([3.0, 70.0, 1100.0])
    assert metrics["score"].tolist() == (asked + 7).tolist()
    assert np.allclose(metrics["grads"]["student"]["w"], asked.mean())
    assert metrics["grads"]["discriminator"]["v"].tolist() == [3.0, 4.0]


def test_a_run_resumes_exactly(streamed, tmp_path):
    state, _ = stepped(streamed, streamed.init(), 2)
    streamed.save(tmp_path / "run", state)
    expected, metrics = stepped(streamed, state, 4)
    resumed, others = stepped(streamed, streamed.restore(tmp_path / "run"), 4)
    both = [jax.tree.leaves(jax.tree.map(np.asarray, it)) for it in (resumed.arrays, expected.arrays)]
    assert all(map(np.array_equal, *both))
    assert np.array_equal(metrics[-1]["score"], others[-1]["score"])


def test_the_device_holds_one_teacher_and_the_host_all(streamed, monkeypatch):
    teachers, seen = streamed.teachers, []
    sizes = [sum(leaf.nbytes for leaf in jax.tree.leaves(networks)) for networks in teachers._networks]
    kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(teachers._networks)}
    assert len(sizes) == 2 and kinds == {"pinned_host"}
    put = jax.device_put

    def device_put(tree, place):
        """Records what is on the device when a teacher is sent there, without it."""
        on_device = [] if teachers._on_device is None else jax.tree.leaves(teachers._on_device)
        seen.append(sum(not leaf.is_deleted() for leaf in on_device))
        return put(tree, place)

    state, batch = streamed.init(), next(streamed.batches())
    teachers.send(0)
    monkeypatch.setattr(jax, "device_put", device_put)
    streamed.step(state, batch)
    assert seen == [0, 0]  # The second teacher, and the first one again for the next step.
    assert teachers.on_device(0).unet["conv_in"]["bias"].sharding.memory_kind == "device"


def test_a_mesh_that_divides_the_teachers_is_refused(tiny):
    config = tiny[1].copy_and_resolve_references()
    config.teachers_in_host_memory, config.mesh.teacher = True, 2
    with pytest.raises(UserError, match="set mesh.teacher=1, or teachers_in_host_memory=False"):
        checks.check(config)

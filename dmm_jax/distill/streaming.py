"""Teachers in the host's memory: each one is on the device only while it is asked about its row of the batch.

A step is one compiled program after another. `predict` asks a teacher. Then the next teacher travels to the device,
into the memory of the one that has answered, while `accumulate` adds the gradients of the answered row. After the last
row `update` moves the student; the first teacher is on its way for the next step. The device never holds two teachers.

Rows are micro-batches: losses and gradients are those of a step with all teachers on the device, to rounding.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from dmm_jax.checkpoints.checkpoint import Checkpoint
from dmm_jax.distill.layout import Packing
from dmm_jax.distill.teachers import BatchRow, Teachers, put_teachers
from dmm_jax.runtime import sharding

# Page-locked, so that a device copies from it by itself, at the full rate of its bus, while it computes.
HOST_MEMORY = "pinned_host"


class StreamedTeachers:
    """One teacher per row of the batch, in the host's memory, and the one that is on the device or on its way there."""

    def __init__(self, teachers: Sequence[Teachers], mesh: Mesh):
        """Takes teachers of one row each, in the order of the rows, whose networks are in the host's memory."""
        self._networks = [(teacher.unet, teacher.text) for teacher in teachers]
        self.rows = [teacher._replace(unet=None, text=None) for teacher in teachers]  # On the device.
        self._place = NamedSharding(mesh, sharding.TEACHERS)
        self._number, self._on_device = -1, None

    def __len__(self) -> int:
        return len(self.rows)

    def on_device(self, number: int) -> Teachers:
        """Returns a teacher on the device, until another one is sent there; its weights may still be on their way."""
        if self._number != number:
            self.send(number)
        unet, text = self._on_device
        return self.rows[number]._replace(unet=unet, text=text)

    def send(self, number: int, after=()) -> None:
        """Starts to copy a teacher to the device, into the memory of the one that is there.

        Args:
          after: results of the programs that read the teacher that is there; they are waited for.
        """
        jax.block_until_ready(after)
        if self._number == number:
            return
        for leaf in jax.tree.leaves(self._on_device):
            leaf.delete()
        self._number, self._on_device = number, jax.device_put(self._networks[number], self._place)


def load_teachers(
    base: Checkpoint, rows: Sequence[BatchRow], unet_config, mesh: Mesh, dtype, prediction_type: str
) -> StreamedTeachers:
    """Loads the teachers of all rows into the host's memory; arguments as of `put_teachers`."""
    where = {"prediction_type": prediction_type, "memory_kind": HOST_MEMORY}
    teachers = [
        put_teachers(base, [row], unet_config, mesh, dtype, first_row=number, **where)
        for number, row in enumerate(rows)
    ]
    # One program asks all teachers. If one of them has text encoders of its own, each teacher gets some; those that use
    # the base's do not read them.
    text = next((teacher.text for teacher in teachers if teacher.text is not None), None)
    return StreamedTeachers([teacher._replace(text=teacher.text or text) for teacher in teachers], mesh)


class StreamedStep(NamedTuple):
    """The programs of a step, jitted or compiled; called as the compiled step of resident teachers is."""

    zeros: Any  # () -> packed gradients
    predict: Any  # (packed state, teacher, frozen, batch) -> predictions (1, b, ...)
    accumulate: Any  # (packed gradients, packed state, row, frozen, batch, predictions) -> (packed gradients, errors)
    update: Any  # (packed state, packed gradients, errors of all rows) -> (packed state, metrics)

    def __call__(self, state: dict, teachers: StreamedTeachers, frozen, batch) -> tuple[dict, dict]:
        """Takes a step; `state` is consumed. Returns the new state, and metrics that may not be computed yet."""
        grads, errors = self.zeros(), []
        for number, row in enumerate(teachers.rows):
            predictions = self.predict(state, teachers.on_device(number), frozen, batch)
            # Sent before `accumulate` starts: an allocator that reuses memory in the order of the programs would let
            # the copy wait for it.
            teachers.send((number + 1) % len(teachers), after=predictions)
            grads, row_errors = self.accumulate(grads, state, row, frozen, batch, predictions)
            errors.append(row_errors)
        return self.update(state, grads, errors)

    def lower(self, state, teacher: Teachers, frozen, batch, num_rows: int) -> "StreamedStep":
        """Lowers the programs for arrays or shapes; `teacher` is any teacher."""
        row = teacher._replace(unet=None, text=None)
        zeros, predict = self.zeros.lower(), self.predict.lower(state, teacher, frozen, batch)
        grads, predictions = zeros.out_info, predict.out_info
        accumulate = self.accumulate.lower(grads, state, row, frozen, batch, predictions)
        update = self.update.lower(state, grads, [accumulate.out_info[1]] * num_rows)
        return StreamedStep(zeros, predict, accumulate, update)

    def compile(self, compiler_options=None) -> "StreamedStep":
        """Compiles lowered programs."""
        return StreamedStep(*(lowered.compile(compiler_options) for lowered in self))


def jitted_step(
    predictions: Callable, gradients: Callable, update: Callable, packing: Packing, trained, mesh, num_rows: int
) -> StreamedStep:
    """Returns the jitted programs of a step; functions as in `distill.step`.

    Args:
      packing: of the state.
      trained: shapes and shardings of the trained parameters, and so of their gradients.
    """
    rows, copy = NamedSharding(mesh, sharding.BATCH), NamedSharding(mesh, sharding.COPY)
    grads = Packing(trained, mesh)
    shapes = jax.eval_shape(grads.pack, trained)

    def predict(packed, teacher, frozen, batch):
        return predictions(teacher, frozen, _row_of(batch, teacher), packing.read(packed).step)

    def accumulate(total, packed, row, frozen, batch, asked):
        state = packing.read(packed)
        own, errors = gradients(state.trained, row, frozen, _row_of(batch, row), state.step, asked)
        return jax.tree.map(lambda sum_, grad: sum_ + grad / num_rows, total, own), errors

    def step(state, packed_grads, errors):
        return update(state, grads.read(packed_grads), jax.tree.map(lambda *parts: jnp.concatenate(parts), *errors))

    return StreamedStep(
        zeros=jax.jit(
            lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes), out_shardings=grads.places
        ),
        predict=jax.jit(predict, in_shardings=(packing.places, None, None, None), out_shardings=rows),
        accumulate=jax.jit(
            grads.around(accumulate),
            donate_argnums=0,
            in_shardings=(grads.places, packing.places, None, None, None, rows),
            out_shardings=(grads.places, copy),
        ),
        update=jax.jit(
            packing.around(step),
            donate_argnums=0,
            in_shardings=(packing.places, grads.places, copy),
            out_shardings=(packing.places, copy),
        ),
    )


def row_shapes(batch):
    """Returns the shapes of one row of a batch of arrays or shapes, placed as the batch is."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape[1:]), leaf.dtype, sharding=leaf.sharding), batch
    )


def _row_of(batch, teacher: Teachers):
    """Returns the row of the batch, (1, b, ...), that a teacher is asked about."""
    return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, teacher.batch_row[0], 1), batch)

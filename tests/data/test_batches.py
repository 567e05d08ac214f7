"""Laws of the batches: pure in (seed, step), every example once per epoch, shares are parts of one batch."""

import numpy as np
import pytest

from dmm_jax.data import batches as pipeline
from dmm_jax.data.cache import CacheHeader, LatentCache
from dmm_jax.data.cache_writer import CacheWriter


class Numbers:
    """Example i holds i."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def gather(self, indices):
        shapes = {"latents": (2, 2, 4), "input_ids": (7,), "time_ids": (6,)}
        return {name: np.stack([np.full(shape, index) for index in indices]) for name, shape in shapes.items()}


def _numbers(batch):
    np.testing.assert_array_equal(batch.latents[..., 0, 0, 0], batch.input_ids[..., 0])
    np.testing.assert_array_equal(batch.time_ids[..., 0], batch.input_ids[..., 0])
    return batch.input_ids[..., 0]


def test_leaves_have_the_shapes_and_types_of_the_step():
    batch = pipeline.batches(Numbers(20), 0, 3, 12)[5]
    assert batch.latents.shape == (3, 4, 2, 2, 4) and batch.latents.dtype == np.float32
    assert batch.input_ids.shape == (3, 4, 7) and batch.input_ids.dtype == np.int32


def test_an_epoch_reads_every_example_once_and_epochs_differ():
    data = pipeline.batches(Numbers(24), 0, 2, 6)
    epochs = [np.concatenate([_numbers(data[4 * epoch + k]).ravel() for k in range(4)]) for epoch in range(3)]
    assert all(sorted(epoch) == list(range(24)) for epoch in epochs)
    assert not np.array_equal(epochs[0], epochs[1]) and not np.array_equal(epochs[1], epochs[2])
    assert not np.array_equal(epochs[0], np.arange(24))


def test_epochs_lose_nothing_if_batches_do_not_divide_them():
    data = pipeline.batches(Numbers(7), 0, 2, 4)
    seen = np.concatenate([_numbers(data[k]).ravel() for k in range(7)])
    assert (np.bincount(seen) == 4).all()


def test_the_seed_fixes_the_batches():
    first, same, other = (pipeline.batches(Numbers(50), seed, 2, 10)[3] for seed in (1, 1, 2))
    np.testing.assert_array_equal(_numbers(first), _numbers(same))
    assert not np.array_equal(_numbers(first), _numbers(other))


@pytest.mark.parametrize("start", [0, 1, 17])
def test_iterating_from_a_step_equals_looking_up(start):
    data = pipeline.batches(Numbers(30), 4, 2, 8)
    iterator = pipeline.iterate(data, start)
    for k in range(start, start + 5):
        np.testing.assert_array_equal(_numbers(next(iterator)), _numbers(data[k]))


@pytest.mark.parametrize("before, after", [(12, 4), (4, 12)])
def test_a_changed_batch_size_skips_and_repeats_no_example(before, after):
    seen = [_numbers(pipeline.batches(Numbers(60), 0, 2, before)[k]) for k in range(3)]
    changed = pipeline.batches(Numbers(60), 0, 2, after, offset=3 * (before - after))
    iterator = pipeline.iterate(changed, 3)
    while sum(batch.size for batch in seen) < 60:
        seen.append(_numbers(next(iterator)))
    assert sorted(np.concatenate([batch.ravel() for batch in seen])) == list(range(60))


def test_a_share_is_its_rows_and_columns_of_the_batch():
    share = (np.array([1, 3]), np.array([0, 4, 5]))
    complete, part = (pipeline.batches(Numbers(100), 5, 4, 48, selection) for selection in (None, share))
    for k in (0, 3):
        np.testing.assert_array_equal(_numbers(part[k]), _numbers(complete[k])[np.ix_(*share)])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"batch_size": 10}, "multiple of the 4.*Use 8"),
        ({"num_teachers": 0}, "positive"),
        ({"source": Numbers(0)}, "empty"),
    ],
)
def test_uneven_numbers_are_refused(arguments, message):
    good = {"source": Numbers(10), "seed": 0, "num_teachers": 4, "batch_size": 8}
    pipeline.batches(**good)
    with pytest.raises(ValueError, match=message):
        pipeline.batches(**good | arguments)


def test_batches_of_a_cache_are_its_examples(tmp_path):
    writer = CacheWriter(tmp_path / "cache", CacheHeader("v", "t", 16, 1.0, (2, 2, 4), 7))
    latents = np.random.default_rng(0).standard_normal((8, 2, 2, 4)).astype(np.float32)
    numbers = np.arange(8)[:, None]
    with writer.shard(0) as shard:
        shard.add(latents, numbers + np.zeros((1, 7), int), numbers + np.zeros((1, 4), int), range(8))
    writer.finish(1)
    train, _ = LatentCache(tmp_path / "cache").split(2)
    batch = next(pipeline.iterate(pipeline.batches(train, 0, 2, 6)))
    order = batch.input_ids[..., 0]
    assert sorted(order.ravel()) == list(range(6))
    np.testing.assert_array_equal(batch.time_ids[..., :4], order[..., None] + np.zeros((1, 1, 4), int))
    np.testing.assert_array_equal(batch.latents, latents.astype(np.float16).astype(np.float32)[order])


class Buckets(Numbers):
    """Example i is in the bucket of the first bound above it."""

    def __init__(self, *counts):
        super().__init__(sum(counts))
        self.bucket_of = np.repeat(np.arange(len(counts), dtype=np.uint8), counts)


@pytest.mark.parametrize("counts", [(40, 7, 13), (3, 1, 2), (100, 0, 5)])
def test_a_batch_is_of_one_bucket_and_examples_are_seen_equally_often(counts):
    source = Buckets(*counts)
    data = pipeline.batches(source, 3, 2, 4)
    numbers = [_numbers(data[k]).ravel() for k in range(10 * sum(counts))]  # 40 epochs.
    assert all(len(np.unique(source.bucket_of[batch])) == 1 for batch in numbers)
    seen = np.bincount(np.concatenate(numbers), minlength=sum(counts))
    assert seen.min() >= 34 and seen.max() <= 46
    assert len({tuple(source.bucket_of[batch[:1]]) for batch in numbers[: sum(counts)]}) == np.count_nonzero(counts)


def test_turns_are_functions_of_the_step_alone():
    turns = pipeline.Turns([40, 7, 13], 4, 0)
    order = [turns(k) for k in range(200)]
    again = pipeline.Turns([40, 7, 13], 4, 0)
    assert [again(k) for k in reversed(range(200))] == order[::-1]
    for bucket in range(3):  # Each batch follows the one before in its bucket's sequence.
        assert [start for number, start in order if number == bucket] == list(range(0, 4 * 200, 4))[
            : sum(number == bucket for number, _ in order)
        ]
    assert pipeline.Turns([40, 7, 13], 4, 1)(5) != order[5] or pipeline.Turns([40, 7, 13], 4, 1)(6) != order[6]


def test_several_buckets_keep_their_batch_size():
    with pytest.raises(ValueError, match="batch_size has changed"):
        pipeline.batches(Buckets(9, 9), 0, 2, 4, offset=4)

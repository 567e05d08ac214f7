"""The peer of `bench serve`: a server that draws whole batches of one style, as servers of many checkpoints do."""

import concurrent.futures
import threading
from collections.abc import Callable, Sequence

from dmm_jax.serve.requests import ImageRequest


class BatchServer:
    """Draws waiting requests that have the style and the number of steps of the oldest one, as one batch, to its end.

    Loading a style costs nothing here, so it is faster than a server that loads a checkpoint for every batch.
    """

    def __init__(self, pipeline: Callable, batch_sizes: Sequence[int]):
        """Takes a `Pipeline`, and the sizes of batches that have a program: a batch takes the smallest with room."""
        self._pipeline, self._sizes = pipeline, sorted(set(batch_sizes))
        self._waiting: list[tuple[ImageRequest, concurrent.futures.Future]] = []
        self._changed, self._stopping = threading.Condition(), False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def submit(self, request: ImageRequest) -> concurrent.futures.Future:
        """Returns the future image of a request."""
        future = concurrent.futures.Future()
        with self._changed:
            self._waiting.append((request, future))
            self._changed.notify()
        return future

    def stop(self) -> None:
        """Ends after the batch that runs."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def warm_up(self, requests: Sequence[ImageRequest]) -> None:
        """Compiles the programs for every number of steps in the requests."""
        for request in {request.num_inference_steps: request for request in requests}.values():
            for size in self._sizes:
                self.draw([request] * size)

    def draw(self, requests: Sequence[ImageRequest]):
        """Returns the images of requests with the same number of steps, by the smallest program that has room."""
        size = next(size for size in self._sizes if size >= len(requests))
        padded = [*requests, *[requests[-1]] * (size - len(requests))]
        columns = {
            name: [getattr(request, name) for request in padded]
            for name in ("prompt", "style", "seed", "guidance_scale")
        }
        images = self._pipeline(
            columns["prompt"],
            styles=columns["style"],
            seeds=columns["seed"],
            guidance_scale=columns["guidance_scale"],
            num_inference_steps=requests[0].num_inference_steps,
            solver=requests[0].solver,
        )
        return images[: len(requests)]

    def _run(self):
        while batch := self._take():
            images = self.draw([request for request, _ in batch])
            for image, (_, future) in zip(images, batch, strict=True):
                future.set_result(image)

    def _take(self):
        """Removes and returns the next batch; an empty one if the server stops."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._stopping)
            if self._stopping:
                return []

            def group(request):
                return request.style, request.num_inference_steps

            oldest = group(self._waiting[0][0])
            batch = [entry for entry in self._waiting if group(entry[0]) == oldest][: self._sizes[-1]]
            self._waiting = [entry for entry in self._waiting if entry not in batch]
            return batch

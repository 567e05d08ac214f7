"""`dmm-jax serve`: one resident model draws for many clients, each image in its own style."""

import argparse
import importlib.util
import pathlib

from dmm_jax.runtime.errors import UsageError, UserError
from dmm_jax.verbs import options

EXAMPLES = (
    "dmm-jax serve emoji",
    "dmm-jax serve runs/sd15 --sizes 512x512,768x512 --slots 16",
    "dmm-jax serve runs/sd15 --host 0.0.0.0 --api-key-file keys.txt",
)
PACKAGES = ("fastapi", "uvicorn", "prometheus_client")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the verb."""
    options.add_model(parser)
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; only this machine reaches the default"
    )
    parser.add_argument("--port", type=int, default=8000, help="to listen on; 0 takes a free one")
    parser.add_argument(
        "--sizes",
        default="",
        metavar="WxH,...",
        help="pixels of the sizes that can be asked for, each with a program of its own; default: the model's",
    )
    parser.add_argument("--slots", type=int, default=8, help="images of one size that are computed at once")
    parser.add_argument("--queue", type=int, default=64, help="images that may wait; then clients get 429")
    parser.add_argument("--max-steps", type=int, default=100, help="steps of one image")
    parser.add_argument("--max-images", type=int, default=16, help="images of one request")
    parser.add_argument(
        "--api-key-file",
        type=pathlib.Path,
        default=None,
        metavar="FILE",
        help="one key per line; a request must send one of them; default: none, everybody may draw",
    )
    parser.add_argument("--no-auth", action="store_true", help="let everybody draw who reaches another --host")
    parser.add_argument(
        "--cors",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="a web page elsewhere that may ask, such as https://example.org; repeat; default: none",
    )
    parser.add_argument("--log-prompts", action="store_true", help="print the prompts of finished images")
    parser.add_argument(
        "--drain-timeout", type=float, default=60.0, metavar="S", help="seconds for accepted images after SIGTERM"
    )


def main(args: argparse.Namespace) -> int:
    """Opens the model, serves it until a signal, and returns the exit code."""
    check_installed()
    from dmm_jax.serve import server
    from dmm_jax.serve.engine import Engine
    from dmm_jax.serve.service import Service, Settings, read_keys

    sizes = parse_sizes(args.sizes)
    keys = read_keys(args.api_key_file) if args.api_key_file else ()
    server.check_access(args.host, keys, args.no_auth)
    bound = server.listen(args.host, args.port)
    settings = Settings(
        host=args.host,
        port=bound.getsockname()[1],
        keys=keys,
        cors=tuple(args.cors),
        log_prompts=args.log_prompts,
        max_images=args.max_images,
        example_prompt=example_prompt_of(args.model),
    )
    pipeline = options.open_pipeline(args)
    engine = Engine(pipeline, sizes, args.slots, queue_size=args.queue, max_steps=args.max_steps)
    return server.run(Service(engine, settings), bound, args.drain_timeout)


def check_installed() -> None:
    """Raises UserError if a package of the extra is missing."""
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise UserError(f"serve needs {', '.join(missing)}: install them with pip install 'dmm-jax[serve]'.")


def example_prompt_of(model: str) -> str:
    """Returns what the page's form begins with: for a shipped student, a prompt whose words it knows."""
    from dmm_jax.checkpoints.shipped import STUDENTS, is_shipped

    return STUDENTS[model] if is_shipped(model) else ""


def parse_sizes(text: str) -> list[tuple[int, int]]:
    """Returns (height, width) of each size in a list such as "512x512,768x512", which has the width first.

    Raises:
      UsageError: an entry is not WIDTHxHEIGHT.
    """
    sizes = []
    for part in filter(None, text.split(",")):
        width, _, height = part.strip().lower().partition("x")
        if not (width.isdecimal() and height.isdecimal()):
            raise UsageError(f"--sizes: {part!r} is not WIDTHxHEIGHT. Write for example 512x512,768x512.")
        sizes.append((int(height), int(width)))
    return sizes

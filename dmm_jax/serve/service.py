"""What the HTTP interfaces share: the engine, the settings of the server, and the names of its clients."""

import dataclasses
import hashlib
import hmac
import pathlib
import secrets
from collections.abc import Sequence

from starlette.requests import Request

from dmm_jax.config.arguments import MAX_SEED
from dmm_jax.config.styles import NULL_STYLE
from dmm_jax.runtime.errors import UserError
from dmm_jax.serve.engine import Engine

MIN_KEY_CHARS = 16
CLIENT = "dmm_jax.client"  # The scope's entry for the client's name, which the guards write.


@dataclasses.dataclass(frozen=True)
class Settings:
    """How the server is reached, and what one request may ask for."""

    host: str = "127.0.0.1"
    port: int = 8000
    keys: tuple[str, ...] = ()  # Without keys, everybody who reaches the address may draw.
    cors: tuple[str, ...] = ()  # Origins of other web pages that may use this server.
    log_prompts: bool = False
    max_images: int = 16  # Per request.
    max_body_bytes: int = 256 * 1024
    body_timeout_s: float = 20.0  # For a whole body to arrive.
    example_prompt: str = ""  # What the page's form begins with.


@dataclasses.dataclass
class Service:
    """A server's state."""

    engine: Engine
    settings: Settings = dataclasses.field(default_factory=Settings)
    draining: bool = False

    def __post_init__(self):
        self.model_hash = self.engine.pipeline.source.digest("unet")[:10]

    @property
    def ready(self) -> bool:
        """Whether a request would be accepted now."""
        return self.engine.ready and not self.draining

    @property
    def model_names(self) -> list[str]:
        """What clients choose from: the styles, or a stock checkpoint's own name."""
        return list(self.engine.pipeline.styles) or [self.engine.pipeline.name]

    @property
    def default_model(self) -> str:
        """What a request that names no style gets: the null style, else the first style; or the stock checkpoint."""
        return NULL_STYLE if NULL_STYLE in self.model_names else self.model_names[0]

    def style_of(self, text: str | None) -> str | None:
        """Returns a style as text, the default if there is none; None for a stock checkpoint, chosen by its name."""
        text = text or self.default_model
        return None if not self.engine.pipeline.styles and text == self.engine.pipeline.name else text


def read_keys(path: pathlib.Path) -> tuple[str, ...]:
    """Reads API keys, one per line; blank lines and lines that begin with # are skipped.

    Raises:
      UserError: there is no key, a key is short, or it holds characters that no HTTP header can hold.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="ascii").splitlines()]
    except UnicodeDecodeError:
        raise UserError(f"{path}: a key must consist of ASCII characters, since it travels in a header.") from None
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    advice = "Make one with: python -c 'import secrets; print(secrets.token_urlsafe(32))'"
    if not keys:
        raise UserError(f"{path} holds no key: write one per line. {advice}")
    if short := [number for number, key in enumerate(keys, start=1) if len(key) < MIN_KEY_CHARS]:
        raise UserError(f"{path}: key {short[0]} has fewer than {MIN_KEY_CHARS} characters. {advice}")
    return keys


def matching_key(text: str, keys: Sequence[str]) -> int | None:
    """Returns the number of the key that equals `text`, or None; takes the same time for every text."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()
    matches = [hmac.compare_digest(digest, hashlib.sha256(key.encode()).digest()) for key in keys]
    return matches.index(True) if any(matches) else None


def client_of(request: Request) -> str:
    """Returns the client's name, by which the engine takes turns: its key's number, or its address."""
    return request.scope.get(CLIENT, "")


def seeds_from(first: int | None, count: int) -> list[int]:
    """Returns consecutive seeds; None and negative numbers start at a random one."""
    first = secrets.randbelow(MAX_SEED + 1) if first is None or first < 0 else first
    return [(first + offset) % (MAX_SEED + 1) for offset in range(count)]

"""The user's home folder in paths that no shell has expanded: in configs, and in quoted arguments."""

import os
import re

_TILDE = re.compile(r"(?:^|(?<=[=:])|(?<= \+ ))~(?=/|$)")


def expand_home(text: str) -> str:
    """Returns a path with `~` replaced by the home folder; also in `NAME=~/PATH`, `KIND:~/PATH` and `~/A + ~/B*0.8`."""
    return _TILDE.sub(lambda _: os.path.expanduser("~"), text)

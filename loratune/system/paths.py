"""Check that file names from elsewhere stay inside of their folder."""

from __future__ import annotations

import re
from typing import Any


def is_inside(name: Any) -> bool:
    """Return whether a relative name, from a recipe or other data, stays inside of its folder."""
    if not isinstance(name, str) or not name or "\0" in name or "\\" in name or re.match(r"[A-Za-z]:/|~[^/]*/|/", name):
        return False
    return ".." not in name.split("/")

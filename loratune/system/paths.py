"""Names that others give: whether they stay in their folder."""

from __future__ import annotations

import re
from typing import Any


def is_inside(name: Any) -> bool:
    """Return whether a relative name, as a recipe or other data give it, stays in its folder."""
    if not isinstance(name, str) or not name or "\0" in name or "\\" in name or re.match(r"[A-Za-z]:/|~[^/]*/|/", name):
        return False
    return ".." not in name.split("/")

"""Which modules of the package import which, read off their text; `python -m tests.imports` counts them."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "loratune"


def imports(body: list[ast.stmt], inside: bool) -> Iterator[str]:
    """Yield imported modules; those inside functions only if `inside`, those for type checking never."""
    for node in body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            yield from imports(node.orelse, inside)
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{name.name}" for name in node.names)
        elif inside or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            for field in ("body", "orelse", "finalbody", "handlers"):
                yield from imports(
                    [child for child in ast.iter_child_nodes(node) if child in vars(node).get(field, [])], inside
                )


def module_of(name: str, package: Path) -> str | None:
    """Return the module of this package, dotted below it, that an imported name is or lies in; None for others."""
    parts = name.split(".")
    if parts[0] != package.name:
        return None
    for length in range(len(parts), 1, -1):
        place = package.joinpath(*parts[1:length])
        if place.with_suffix(".py").is_file() or (place / "__init__.py").is_file():
            return ".".join(parts[1:length])
    return "__init__"


def own(path: Path, package: Path = PACKAGE) -> set[str]:
    """Return the modules of this package a file imports, anywhere in it."""
    found = imports(ast.parse(path.read_text(encoding="utf-8")).body, inside=True)
    return {module for name in found if (module := module_of(name, package)) is not None}


def name_of(path: Path, package: Path = PACKAGE) -> str:
    """Return a file as a module, dotted below the package."""
    name = path.relative_to(package).with_suffix("").as_posix().replace("/", ".")
    return name if name == "__init__" else name.removesuffix(".__init__")


def main() -> None:
    """Count modules and imports between them, and between packages, of the package in a folder (default: ours)."""
    package = Path(sys.argv[1]) if len(sys.argv) > 1 else PACKAGE
    files = [path for path in sorted(package.rglob("*.py")) if path.name not in ("__init__.py", "__main__.py")]
    arrows = {(name_of(path, package), other) for path in files for other in own(path, package)}
    arrows = {(me, other) for me, other in arrows if me != other}
    rooms = {(me.split(".")[0], other.split(".")[0]) for me, other in arrows}
    between = {(me, other) for me, other in rooms if me != other}
    names = {name for pair in rooms for name in pair}
    print(f"{len(files)} modules, {len(arrows)} imports between them")
    print(f"{len(names)} packages and modules at the top, {len(between)} imports between them")
    both = sum((other, me) in between for me, other in between) // 2
    print(f"{both} pairs that import each other")


if __name__ == "__main__":
    main()

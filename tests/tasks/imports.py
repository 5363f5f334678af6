"""What a module of this project imports, found by reading its source: also inside functions, which is where workers' imports stand."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("moe_core", "tasks")


def closure(module: Path) -> set[str]:
    """Every file of this project that `module` needs, itself included; paths relative to the root."""
    found: set[str] = set()
    todo = [module]
    while todo:
        path = todo.pop()
        name = path.relative_to(ROOT).as_posix()
        if name not in found:
            found.add(name)
            todo += direct(path)
    return found


@cache
def direct(module: Path) -> tuple[Path, ...]:
    """Files that a file imports itself, or names as `package.module:function` for a worker."""
    files: list[Path] = []
    for node in ast.walk(ast.parse(module.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and ":" in node.value:
            names = [node.value.partition(":")[0]]
        for name in names:
            path = ROOT / name.replace(".", "/")
            for file in (path.with_suffix(".py"), path / "__init__.py"):
                if "." in name and name.split(".")[0] in PACKAGES and file.is_file() and file.read_bytes():
                    files.append(file)
    return tuple(files)

"""List what can be run here, a line each.

python -m benchmarks
"""

from __future__ import annotations

import ast
from pathlib import Path

HERE = Path(__file__).parent


def programs() -> dict[str, str]:
    """Module -> the first line of its docstring; nothing is imported."""
    found: dict[str, str] = {}
    for path in sorted(HERE.rglob("*.py"), key=lambda path: (len(path.parts), path)):
        tree = ast.parse(path.read_text())
        if path.parent.name == "peers" or path == Path(__file__):
            continue
        if any(isinstance(node, ast.If) and "__main__" in ast.unparse(node.test) for node in tree.body):
            module = ".".join((HERE.name, *path.relative_to(HERE).with_suffix("").parts))
            found[module] = (ast.get_docstring(tree) or "").partition("\n")[0]
    return found


def main() -> None:
    listed = programs()
    width = max(map(len, listed))
    for module, line in listed.items():
        print(f"{module.ljust(width)}  {line}")
    print('\nOne of them: python -m MODULE --help, or make bench NAME=ctr_throughput ARGS="--tables tables"')


if __name__ == "__main__":
    main()

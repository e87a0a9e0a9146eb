"""The packages and their modules as docs/structure.md lists them: each with the first sentence of its docstring.

python -m tests.structure
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1] / "nr_serve"


def modules_tables() -> str:
    """A table for each package, its modules by name."""
    packages = sorted({path.parent for path in ROOT.rglob("*.py")}, key=lambda package: package.parts)
    return "\n".join(_table(package) for package in packages)


def _table(package: Path) -> str:
    name = package.relative_to(ROOT.parent).as_posix()
    rows = [f"| `{path.name}` | {_summary(path)} |" for path in sorted(package.glob("[!_]*.py"))]
    about = _summary(package / "__init__.py")
    return "\n".join([f"### {name}", "", about, "", "| file | what it is |", "| --- | --- |", *rows, ""])


def _summary(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    sentence = re.match(r"(.+?)\.(\s|$)", docstring.split("\n\n")[0].replace("\n", " "))
    assert sentence, f"{path} says nothing of itself"
    return sentence[1].replace("|", "\\|")


if __name__ == "__main__":
    print(modules_tables())

"""What must start without torch does, and fast."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import nr_serve
from tests.waiting import PATIENCE

PACKAGE = Path(nr_serve.__file__).parent
BLOCK = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked:
            raise ImportError(f"{name} must not be imported here")
sys.meta_path.insert(0, Blocked())
"""


def torch_free() -> list[str]:
    """The modules whose docstring says that they are."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        said = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        if "Torch-free" in said:
            found.append(".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts))
    return found


@pytest.mark.parametrize(
    "program",
    [
        "import nr_serve.api.app, nr_serve.metrics, nr_serve.client, nr_serve.serve",
        "from nr_serve.cli import main; sys.exit(main(['--help']))",
        "from nr_serve.cli import main; sys.exit(main(['load-adapter', '/no/such/file']) - 1)",
    ],
)
def test_no_torch_is_needed(program):
    runs(program)


def test_a_module_that_says_it_is_torch_free_is():
    modules = torch_free()
    assert {"nr_serve.engine.core", "nr_serve.engine.scheduler", "nr_serve.engine.adapters.registry"} <= set(
        modules
    )
    runs(f"for name in {modules}: __import__(name)", "numpy", "fastapi")


def runs(program: str, *blocked: str) -> None:
    program = f"blocked = {('torch', 'transformers', *blocked)}" + BLOCK + program
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr

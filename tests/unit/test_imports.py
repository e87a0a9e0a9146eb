"""What must start without torch does, and fast."""

import subprocess
import sys

import pytest

BLOCK = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "transformers"}:
            raise ImportError(f"{name} must not be imported here")
sys.meta_path.insert(0, Blocked())
"""


@pytest.mark.parametrize(
    "program",
    [
        "import nr_serve.api.app, nr_serve.metrics, nr_serve.client, nr_serve.serve",
        "from nr_serve.cli import main; sys.exit(main(['--help']))",
        "from nr_serve.cli import main; sys.exit(main(['load-adapter', '/no/such/file']) - 1)",
    ],
)
def test_no_torch_is_needed(program):
    done = subprocess.run([sys.executable, "-c", BLOCK + program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr

"""What the guide docs/add-a-language.md shows: its command lines and the files it has the reader write."""

import re
from pathlib import Path

GUIDE = (Path(__file__).parents[1] / "docs" / "add-a-language.md").read_text(encoding="utf-8")
COMMAND_LINES = re.findall(r"^ {4,}(nr-serve [a-z].*)$", GUIDE, re.M)


def blocks() -> dict[str, str]:
    """The guide's TOML blocks by the name of the file, which the sentence before each one says."""
    return dict(re.findall(r"^Write `([\w.-]+)`[^\n]*\n\n```toml\n(.*?)```", GUIDE, re.S | re.M))

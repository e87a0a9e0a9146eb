"""make-key: a new key for the server's key file."""

from __future__ import annotations

import sys

from pydantic import Field
from pydantic_settings import CliPositionalArg

from nr_serve import keys
from nr_serve.commands.command import Command


class MakeKey(Command):
    """Make a key: shown once on stderr, its entry for the key file on stdout."""

    name: CliPositionalArg[str] = Field(description="whose key it is; shown in the server's log")
    role: keys.Role = Field("inference", description="admin may change adapters too")


def make_key(command: MakeKey) -> int:
    """Print the key, and its entry for the key file: `nr-serve make-key NAME >> keys.toml`."""
    secret, key = keys.make_key(command.name, command.role)
    print(f"the key, shown only here: {secret}", file=sys.stderr)
    print(f'\n[[key]]\nname = "{key.name}"\nrole = "{key.role}"\nsha256 = "{key.sha256}"')
    return 0

"""The command line. Each command is a settings class: its fields are the flags, its docstring the help.

Commands import what they need when they run, so that help and the client's commands start at once.
"""

from __future__ import annotations

import difflib
import errno
import json
import os
import re
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from copy import copy
from functools import partial
from inspect import cleandoc
from io import TextIOWrapper
from typing import Any, NoReturn

from pydantic import ValidationError
from pydantic_settings import BaseSettings, CliApp, CliSettingsSource, SettingsError

from nr_serve import __version__
from nr_serve.commands import COMMANDS
from nr_serve.config import ALIKE, GROUPS, ServeConfig, check_environment, spelled
from nr_serve.errors import NrError, Unauthorized, fault_text

_MOST_IN_USAGE = 15
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
"""Errors, without a file name, of writing to an output with no room."""
_LIST_DEFAULT = re.compile(r"(?<=\(default: )\[(.+)\](?=\))")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return the exit code."""
    _open_standard_streams()
    _escape_what_cannot_be_printed()
    try:
        code = _main(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
        _drop_output()
        return 1
    except OSError as error:
        if error.filename is not None or error.errno not in _NO_ROOM:
            raise
        _drop_output()
        return _fail(f"cannot write the output: {error.strerror}", 1)


def _open_standard_streams() -> None:
    """Open /dev/null for each closed standard stream: else the next file opened would receive its output."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115


def _escape_what_cannot_be_printed() -> None:
    """Print characters that the output's encoding lacks as escapes: an error would come after all the work."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _drop_output() -> None:
    """Send the rest of the output to /dev/null: Python would raise the error again when it flushes at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _main(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help", "help"):
        print(_help())
        return 0 if args else 2
    if args[0] in ("-V", "--version"):
        print(f"nr-serve {__version__}")
        return 0
    if args[0] not in COMMANDS:
        return _fail(f"there is no command {args[0]!r}; `nr-serve --help` lists them", 2)
    return _run(args[0], args[1:])


def _run(name: str, args: list[str]) -> int:
    settings, action = COMMANDS[name]
    try:
        command = parse(settings, name, args)
    except (ValidationError, SettingsError) as error:
        return _fail(_wrong_setting(error), 2)
    try:
        return action(command)
    except Unauthorized as error:
        return _fail(f"{error.message}; here: --key KEY, $NR_ADMIN_KEY or $NR_API_KEY", 1)
    except NrError as error:
        return _fail(error.message, 1)
    except ModuleNotFoundError as error:
        if str(error.name).startswith("nr_serve"):
            raise
        need = "the extra `train` has what training and measuring need: pip install '.[train]'"
        return _fail(f"{error.name} is not installed; {need}", 1)
    except KeyboardInterrupt:
        return 130


def parse(settings: type[BaseSettings], name: str, args: list[str]) -> BaseSettings:
    """A command's settings from its arguments and the environment.

    Exits on `--help` and unknown flags; raises ValidationError or SettingsError.
    """
    if settings.model_config.get("env_prefix"):
        check_environment(os.environ)
    source = _Flags(
        settings,
        cli_prog_name=f"nr-serve {name}",
        formatter_class=_Formatter,
        add_argument_method=_add_grouped if settings is ServeConfig else ArgumentParser.add_argument,
    )
    source.root_parser.error = partial(_wrong_usage, source.root_parser)
    return CliApp.run(settings, cli_args=args, cli_settings_source=source)


class _Flags(CliSettingsSource[Any]):
    """Flags whose values are taken literally; only a server's settings split lists at commas.

    pydantic-settings would split every repeatable flag, and read `[ab]*`, `12` or `true` as JSON.
    """

    def _merge_parsed_list(self, parsed_list: list[str], field_name: str) -> str:
        return json.dumps(parsed_list)


VLLM_FLAGS = {
    "--max-num-seqs": "--max-running",
    "--max-num-batched-tokens": "--max-batch-tokens",
    "--enable-prefix-caching": "--prefix-cache",
    "--max-loras": "--slots",
    "--max-lora-rank": "--slot-width",
    "--lora-modules": "--adapter",
    "--gpu-memory-utilization": "--kv-cache-gib",
}
"""Some of vLLM's flags, with this server's names for them."""


def _wrong_usage(parser: ArgumentParser, message: str) -> NoReturn:
    """Print the usage and the error, with a suggestion for a misspelled flag, and exit."""
    known = parser._option_string_actions
    for word in message.split() if message.startswith("unrecognized arguments: ") else ():
        flag = word.partition("=")[0]
        meant = VLLM_FLAGS.get(flag) or next(iter(difflib.get_close_matches(flag, known, 1, ALIKE)), None)
        if flag.startswith("--") and meant in known:
            message += f"; vLLM's `{flag}` is `{meant}` here" if flag in VLLM_FLAGS else f"; is `{meant}` meant?"
    ArgumentParser.error(parser, message)


_GROUP_OF = {spelled(name): group.__doc__ for group in GROUPS for name in group.model_fields}


def _add_grouped(parser: ArgumentParser, *flags: str, **options: Any) -> Any:
    """Add a flag of `serve` to its group in the help."""
    title = _GROUP_OF.get(flags[0])
    if title is None:  # --help
        return parser.add_argument(*flags, **options)
    groups = {group.title: group for group in parser._action_groups}
    return (groups.get(title) or parser.add_argument_group(title)).add_argument(*flags, **options)


class _Formatter(RawDescriptionHelpFormatter):
    """Compact help: short usage for many flags, no useless --no-x, no types, no empty defaults."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34)

    def add_usage(self, usage: Any, actions: Any, groups: Any, prefix: Any = None) -> None:
        if len(actions) > _MOST_IN_USAGE:
            names = [str(each.metavar or each.dest).upper() for each in actions if not each.option_strings]
            usage = " ".join(["%(prog)s [FLAG ...]", *names])
        super().add_usage(usage, actions, groups, prefix)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return cleandoc(text)

    def _format_action_invocation(self, action: Any) -> str:
        shown = copy(action)
        if "(default: False)" in (action.help or ""):  # then --no-x changes nothing
            shown.option_strings = [each for each in action.option_strings if not each.startswith("--no-")]
        return super()._format_action_invocation(shown)

    def _get_help_string(self, action: Any) -> str:
        text = action.help or ""
        for noise in (" (default: None)", " (default: [])", " (default: False)"):
            text = text.replace(noise, "")
        text = text.replace("(default: True)", "(default: yes)")
        return _LIST_DEFAULT.sub(lambda found: found[1].replace("'", ""), text).rstrip()

    def _metavar_formatter(self, action: Any, default_metavar: str) -> Any:
        if isinstance(action.metavar, str) and not action.metavar.startswith("{"):
            name = action.metavar.removeprefix("list[").removesuffix("]").upper()
            action.metavar = name.replace("SECRETSTR", "KEY")
        return super()._metavar_formatter(action, default_metavar)


def _help() -> str:
    lines = [
        "usage: nr-serve COMMAND [...]",
        "",
        "One frozen base model, many neutral-residue adapters, one server.",
        "",
    ]
    width = max(map(len, COMMANDS)) + 2
    for name, (settings, _) in COMMANDS.items():
        lines.append(f"  {name:<{width}}{(settings.__doc__ or '').splitlines()[0]}")
    lines += ["", "`nr-serve COMMAND --help` shows a command's flags."]
    return "\n".join(lines)


def _wrong_setting(error: ValidationError | SettingsError) -> str:
    if isinstance(error, SettingsError):
        return str(error)
    wrong = []
    for each in error.errors(include_url=False, include_input=False):
        flag = spelled(str(each["loc"][0])) if each["loc"] else "settings"
        wrong.append(f"{flag}: {fault_text(each)}")
    return "; ".join(wrong)


def _fail(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())

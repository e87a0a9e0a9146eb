"""The running text of manual pages: enough of roff to read them, none of its layout."""

from __future__ import annotations

import re

BREAKS = frozenset(
    ("PP", "P", "LP", "TP", "IP", "HP", "SH", "SS", "Sh", "Ss", "Pp", "br", "sp", "RS", "RE", "TQ", "It")
)
FONTS = frozenset(("B", "I", "R", "BR", "RB", "BI", "IB", "IR", "RI", "SM", "SB"))  # their arguments are text
CODE = {"nf": "fi", "EX": "EE", "TS": "TE"}  # tables and examples, with the request that ends each
CHARACTERS = {"e": "\\", "~": " "} | dict.fromkeys("&|^,/:%", "")  # other escaped characters stand for themselves
NAMED = {"lq": "“", "rq": "”", "aq": "'", "dq": '"', "cq": "\u2019", "oq": "\u2018", "em": "—", "en": "\u2013"}
ESCAPE = re.compile(
    r"\\(?:f(?:\[\w*\]|\(..|.)|s[+-]?\d+|\((..)|\[([^\]]*)\]|[*n](?:\(..|\[[^\]]*\]|.)|[hvwloLD]'[^']*'|c|(.))"
)


def paragraphs(page: str) -> list[str]:
    """The paragraphs of a manual page in the man macros, without examples and tables."""
    found: list[list[str]] = [[]]
    until = ""
    for line in page.splitlines():
        request, _, argument = line[1:].partition(" ") if line[:1] in ".'" else ("", "", "")
        if until:
            until = "" if request == until else until
        elif request in CODE:
            until = CODE[request]
            found.append([])
        elif request in BREAKS or not line.strip():
            found.append([])
        elif request in FONTS:
            found[-1].append(plain(argument.replace('"', "")))
        elif line[:1] not in (".", "'"):
            found[-1].append(plain(line))
    return [" ".join(lines) for lines in found if lines]


def plain(line: str) -> str:
    """A line of roff without its escape sequences."""
    return ESCAPE.sub(_character, line.partition('\\"')[0])


def _character(escape: re.Match[str]) -> str:
    named = escape[1] or escape[2]
    if named:
        return NAMED.get(named, "")
    return CHARACTERS.get(escape[3], escape[3]) if escape[3] else ""

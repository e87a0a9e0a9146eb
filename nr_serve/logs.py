"""Output on stderr: the log, each line with the id of the request it belongs to; and commands' progress."""

from __future__ import annotations

import json
import logging
import sys
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

REQUEST_ID: ContextVar[str | None] = ContextVar("request_id", default=None)
"""Id of the HTTP request handled in this context."""


def configure_logging(level: str, form: str) -> None:
    """Log from `level` up, as text or JSON."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler])
    # uvicorn's info messages are of no use to an operator who sees `ready`.
    logging.getLogger("uvicorn").setLevel("WARNING" if level == "info" else level.upper())
    logging.getLogger("asyncio").addFilter(_is_news)
    if form == "json":
        _take_over_others()
    quiet_hub()


def _is_news(record: logging.LogRecord) -> bool:
    """False for what asyncio says at every write to a client that is gone: the request's own line tells of it."""
    return record.msg != "socket.send() raised exception."


def quiet_hub() -> None:
    """Hide the hub client's messages about each attempt: the final error says that the hub cannot be reached."""
    logging.getLogger("huggingface_hub.utils._http").setLevel("ERROR")


def quiet_progress_bars(level: str, form: str) -> None:
    """Show transformers' progress bars only on a terminal, and only if info is logged as text."""
    if level in ("debug", "info") and form == "text" and sys.stderr.isatty():
        return
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def _take_over_others() -> None:
    """Redirect libraries that write their own lines to stderr into this log."""
    import huggingface_hub  # noqa: F401 (each library sets up its logger when it is imported)
    import transformers  # noqa: F401

    for name in ("huggingface_hub", "transformers"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    logging.captureWarnings(True)


def say(command: str, message: str) -> None:
    """Print a command's progress."""
    print(f"{command}: {message}", file=sys.stderr, flush=True)


def bar_interval() -> float:
    """Seconds between updates of a progress bar: few, unless on a terminal, so that they do not fill a log."""
    return 0.1 if sys.stderr.isatty() else 10.0


class TextFormatter(logging.Formatter):
    """`date time LEVEL logger: message key=value ...`, in local time."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s", "%Y-%m-%d %H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line of text; a stack trace would follow."""
        fields = [f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in fields_of(record).items()]
        return " ".join([super().formatMessage(record), *fields])


class JsonFormatter(logging.Formatter):
    """One JSON object per line."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as a line of JSON."""
        entry = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **fields_of(record),
        }
        if record.exc_info:
            entry["trace"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    """The record's `extra={"fields": ...}`, and the id of its request."""
    fields: dict[str, Any] = dict(getattr(record, "fields", {}))
    request_id = REQUEST_ID.get()
    return fields if request_id is None else {"request_id": request_id, **fields}

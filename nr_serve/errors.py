"""Every error this project raises on purpose, with the HTTP answer it becomes.

    NrError                        500
    ├── BadRequest                 400  the request itself is wrong
    │   ├── BadAdapterFile         400  a file that must not be attached
    │   └── BadRecipe              400  (train.recipe) a recipe that cannot be followed
    ├── Unauthorized               401
    ├── Forbidden                  403  a path outside the allowed folders
    ├── NotFound                   404  no such model, adapter or route
    ├── SentTooSlowly              408  the client stopped sending its request
    ├── Conflict                   409  the name is taken, or the thing is in use
    ├── TooLarge                   413
    ├── TooManyRequests            429  carries Retry-After
    │   ├── QueueFull              429  too many requests wait already
    │   └── RateLimited            429  more than this key may ask
    ├── Unavailable                503  not ready, draining, or the engine stopped
    ├── TimedOut                   504  the request's time ran out before its answer was ready
    ├── UnsupportedBase            500  a base model that cannot be served or trained
    ├── DownloadFailed             500  a model or corpus that could not be fetched
    ├── CannotWrite                500  (disk) a file that could not be written
    ├── BadCheckpoint              500  (train.checkpoint) a checkpoint that cannot be resumed from
    ├── TrainingDiverged           500  (train.trainer) the loss is no longer a finite number
    └── TrainingStopped            500  (train.trainer) it could not go on; the last good checkpoint is kept

The command line prints the message alone; a stack trace means a bug in nr-serve.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import ValidationError


class NrError(Exception):
    """An error with a message for people; `param` names the offending field, if one is to blame."""

    status = 500
    type = "InternalServerError"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class BadRequest(NrError):
    """The request cannot be carried out as it stands."""

    status = 400
    type = "BadRequestError"


class BadAdapterFile(BadRequest):
    """An adapter file that is damaged, made for another base, or of a newer format."""


class Unauthorized(NrError):
    """The key is missing or wrong."""

    status = 401
    type = "AuthenticationError"


class Forbidden(NrError):
    """The key is right, but this is not allowed."""

    status = 403
    type = "PermissionDeniedError"


class NotFound(NrError):
    """No such model, adapter, request or route."""

    status = 404
    type = "NotFoundError"


class SentTooSlowly(NrError):
    """The client stopped sending its request."""

    status = 408
    type = "TimeoutError"


class Conflict(NrError):
    """The name is taken, or what is to change is in use."""

    status = 409
    type = "ConflictError"


class TooLarge(NrError):
    """The body is larger than the server takes."""

    status = 413
    type = "RequestTooLargeError"


class TooManyRequests(NrError):
    """Try again later: after `retry_after_s` seconds, a whole number."""

    status = 429
    type = "RateLimitError"
    retry_after_s = 1


class QueueFull(TooManyRequests):
    """Too many requests wait already."""


class RateLimited(TooManyRequests):
    """More requests than this key may ask, in a minute or at once."""

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: int = 1) -> None:
        super().__init__(message, param=param)
        self.retry_after_s = retry_after_s


class Unavailable(NrError):
    """The server is starting, draining, or its engine stopped."""

    status = 503
    type = "ServiceUnavailableError"


class TimedOut(NrError):
    """The request's time was over before its answer was."""

    status = 504
    type = "TimeoutError"


class UnsupportedBase(NrError):
    """A base model that this engine cannot run; the message says why."""


class DownloadFailed(NrError):
    """A model or a corpus could not be fetched or did not match its checksum."""


@contextmanager
def raised_as(kind: type[NrError], failure: str) -> Iterator[None]:
    """Raise any exception of another library as `kind`, with `failure` first; a damaged file can raise anything."""
    try:
        yield
    except NrError:
        raise
    except Exception as error:
        raise kind(f"{failure}: {_in_a_line(error)}") from error


def loading(what: str) -> AbstractContextManager[None]:
    """Raise whatever goes wrong while a library loads `what` of a base as UnsupportedBase."""
    return raised_as(UnsupportedBase, f"cannot load {what}")


def _in_a_line(error: Exception) -> str:
    """Another library's error in one line; with its type, where the text alone does not say that reading failed."""
    said = " ".join(str(error).split())
    return said if said and isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {said}"


_KINDS: tuple[type[NrError], ...] = (
    BadRequest,
    Unauthorized,
    Forbidden,
    NotFound,
    SentTooSlowly,
    Conflict,
    TooLarge,
    TooManyRequests,
    NrError,
    Unavailable,
    TimedOut,
)
BY_STATUS = {kind.status: kind for kind in _KINDS}
"""The kind of error that each HTTP status stands for."""

MOST_FAULTS = 8
"""Most faults that one message names."""


def fault_text(fault: Mapping[str, Any]) -> str:
    """What is wrong, of one of pydantic's errors."""
    return str(fault["msg"]).removeprefix("Value error, ")


def faults(error: ValidationError, *, besides: str = "") -> str:
    """A validation's faults in one line: the location and the problem of each. Shows no input values.

    Those of pydantic's type `besides` are left out; "" if there are no others.
    """
    found = []
    for each in error.errors(include_url=False, include_input=False, include_context=False):
        if each["type"] == besides:
            continue
        # Parts with brackets name a type in a union, not a key.
        place = ".".join(part for part in map(str, each["loc"]) if "[" not in part)
        unknown = each["type"] == "extra_forbidden"
        message = "not a known key" if unknown else fault_text(each)
        found.append(f"{place}: {message}" if place else message)
    more = [f"and {len(found) - MOST_FAULTS} more"] if len(found) > MOST_FAULTS else []
    return "; ".join(found[:MOST_FAULTS] + more)

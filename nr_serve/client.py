"""A client of a running server, for the command line and for scripts."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import quote

import httpx
from pydantic import TypeAdapter, ValidationError

from nr_serve.addresses import is_loopback
from nr_serve.api.responses import Adapter, AdapterList, Completion, Model, ModelList
from nr_serve.disk import check_ends
from nr_serve.errors import BY_STATUS, BadRequest, NrError, TooLarge, Unavailable, faults
from nr_serve.names import check_adapter_name

DEFAULT_URL = "http://127.0.0.1:8000"
T = TypeVar("T")
_ADAPTER, _ADAPTERS, _MODELS = TypeAdapter(Adapter), TypeAdapter(AdapterList), TypeAdapter(ModelList)
_COMPLETION, _ANY = TypeAdapter(Completion), TypeAdapter(dict[str, Any])
_SECONDS = 600.0  # a large adapter on a slow disk, or a long answer


class Client:
    """Talks to one server. Error responses are raised as the NrError that they stand for."""

    def __init__(self, url: str = DEFAULT_URL, key: str | None = None, *, timeout_s: float = _SECONDS) -> None:
        """`url` may lack its scheme (then http is used), and may end with the `/v1` of OpenAI's clients."""
        self.url = (url if "://" in url else f"http://{url}").rstrip("/").removesuffix("/v1")
        if key and not key.isprintable():
            raise BadRequest("the key holds characters that cannot be sent", param="key")
        try:
            self._http = httpx.Client(
                base_url=self.url,
                headers={b"Authorization": f"Bearer {key}".encode()} if key else {},
                timeout=httpx.Timeout(timeout_s, connect=10.0),
                trust_env=not is_loopback(httpx.URL(self.url).host),  # a proxy cannot reach this machine's loopback
            )
        except httpx.InvalidURL as error:
            raise BadRequest(f"{url} is not a URL: {error}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def load(
        self,
        path: Path,
        name: str | None = None,
        *,
        replace: bool = False,
        pinned: bool | None = None,
        threshold: float | None = None,
        routed: bool | None = None,
    ) -> Adapter:
        """Upload an adapter's file and load it; `name` defaults to the file's. Return the adapter.

        With `pinned` or `routed` None, the adapter is what the one that it replaces is.
        """
        flags = {"replace": str(replace).lower()}
        flags |= {name: str(on).lower() for name, on in (("pinned", pinned), ("routed", routed)) if on is not None}
        if threshold is not None:
            flags["threshold"] = repr(threshold)
        name = name or path.stem
        check_adapter_name(name)
        place = adapter_path(name)
        try:
            check_ends(path)
            with path.open("rb") as file:
                size = str(path.stat().st_size)
                headers = {"Content-Length": size}
                return self._json(_ADAPTER, "PUT", place, content=file, params=flags, headers=headers)
        except OSError as error:
            raise BadRequest(f"{path}: cannot be read: {error.strerror}") from error
        except (BadRequest, TooLarge) as error:
            if error.param is not None:  # the name or a flag is to blame, not the file
                raise
            raise type(error)(f"{path}: {error.message}") from error

    def unload(self, name: str) -> Adapter:
        """Unload an adapter; return its last state."""
        return self._json(_ADAPTER, "DELETE", adapter_path(name))

    def adapters(self) -> list[Adapter]:
        """Every registered adapter."""
        return self._json(_ADAPTERS, "GET", "/v1/adapters")["data"]

    def models(self) -> list[Model]:
        """Everything that `model` may be in a request; the base comes first."""
        return self._json(_MODELS, "GET", "/v1/models")["data"]

    def complete(self, **body: Any) -> Completion:
        """POST /v1/completions, not streamed."""
        return self._json(_COMPLETION, "POST", "/v1/completions", json=body)

    def wait_ready(
        self, timeout_s: float = 300.0, *, poll_s: float = 0.2, alive: Callable[[], bool] = lambda: True
    ) -> None:
        """Return once the server accepts requests. Raises Unavailable after `timeout_s`, or if not `alive`."""
        end = time.monotonic() + timeout_s
        while True:
            try:
                # A server that is still loading accepts connections, and answers once it can.
                self._json(_ANY, "GET", "/ready", timeout=max(poll_s, end - time.monotonic()))
                return
            except Unavailable as error:
                if not alive():
                    raise Unavailable("the server ended before it was ready") from error
                if time.monotonic() > end:
                    raise Unavailable(f"not ready after {timeout_s:g} s: {error.message}") from error
                time.sleep(poll_s)

    def _json(self, form: TypeAdapter[T], method: str, place: str, **request: Any) -> T:
        try:
            response = self._http.request(method, place, **request)
        except httpx.ConnectError as error:
            raise Unavailable(
                f"no server answers at {self.url}; start one with `nr-serve serve`, or name another with --url"
            ) from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise Unavailable(f"{method} {self.url}{place} failed: {error or type(error).__name__}") from error
        if response.is_error:
            raise refusal(response)
        return self._body(response, form, place)

    def _body(self, response: httpx.Response, form: TypeAdapter[T], place: str) -> T:
        """The body of an answer. Raises NrError if it is not of this form; a newer server may say more."""
        no_server = f"{self.url}{place} answers as no nr-serve does"
        try:
            body: T = response.json()
        except ValueError as error:
            raise NrError(f"{no_server}: not in JSON") from error
        try:
            form.validate_python(body)
        except ValidationError as error:
            wrong = faults(error, besides="extra_forbidden")
            if wrong:
                raise NrError(f"{no_server}: {wrong}") from error
        return body


def adapter_path(name: str) -> str:
    """The server's path for an adapter."""
    try:
        return f"/v1/adapters/{quote(name, safe='')}"
    except UnicodeEncodeError as error:
        raise BadRequest(f"{name!r} cannot be an adapter's name", param="name") from error


def refusal(response: httpx.Response) -> NrError:
    """The error that an error response stands for."""
    try:
        return error_from(response.json()["error"], response.status_code)
    except (ValueError, KeyError, TypeError, AttributeError):  # not an nr-serve, or a proxy in between
        kind = BY_STATUS.get(response.status_code, NrError)
        return kind(f"{response.url} answered {response.status_code} {response.reason_phrase}")


def error_from(error: Mapping[str, Any], status: int) -> NrError:
    """The error that an `error` object in the API's format stands for."""
    return BY_STATUS.get(status, NrError)(str(error["message"]), param=error.get("param"))

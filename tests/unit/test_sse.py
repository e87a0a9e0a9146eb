"""Streams of events: a client that is gone is nobody's fault, an error of ours is."""

import asyncio

import pytest

from nr_serve.api.sse import DONE, EventStream, event


class Bodies:
    """One body, then the error; notes that it was closed."""

    def __init__(self, error: Exception | None = None) -> None:
        self.closed = False
        self.error = error

    async def events(self):
        try:
            yield {"n": 1}
            if self.error is not None:
                raise self.error
        finally:
            self.closed = True


async def silent():
    await asyncio.Event().wait()


def stream(bodies: Bodies, send) -> None:
    """Send the bodies as events; they are closed when it ends, before asyncio closes whatever is left open."""

    async def main() -> None:
        try:
            events = bodies.events()
            await EventStream(await anext(events), events)({}, silent, send)
        finally:
            assert bodies.closed

    asyncio.run(main())


def test_a_whole_stream_ends_with_done():
    sent = []

    async def send(message):
        sent.append(message)

    stream(Bodies(), send)
    assert [message["body"] for message in sent[1:]] == [event({"n": 1}), DONE]


def test_a_connection_that_breaks_ends_the_stream_quietly():
    async def send(message):
        if message["type"] == "http.response.body":
            raise BrokenPipeError

    stream(Bodies(), send)


def test_a_client_that_goes_before_the_first_event_ends_what_the_events_come_from():
    async def send(message):
        raise BrokenPipeError

    stream(Bodies(), send)


def test_an_os_error_while_an_event_is_written_is_not_taken_for_the_client():
    async def send(message):
        pass

    with pytest.raises(OSError, match="disk"):
        stream(Bodies(OSError("the disk")), send)

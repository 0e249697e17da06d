"""Client processes that read many completion streams at once over HTTP (httpx, server-sent events).

They are processes of their own, so that neither the server nor one another's parsing slows them.
Times are `time.perf_counter`, which is the same clock in all processes of a machine.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import httpx

from benchmarks.driver import Request

EVENT_END = b"\n\n"
TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Stream:
    """One request, as its client saw it.

    Attributes:
        start: when the request was sent.
        arrivals: when each event with text arrived.
        num_tokens: output tokens by the server's own count.
    """

    start: float
    arrivals: list[float]
    num_tokens: int

    @property
    def first_token_s(self) -> float:
        """Time to the first token."""
        return self.arrivals[0] - self.start


class Clients:
    """A pool of client processes; a context manager."""

    def __init__(self, num_processes: int) -> None:
        self._num_processes = num_processes
        # Fresh interpreters: a fork would share the parent's connections and threads.
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(num_processes, mp_context=context)

    def __enter__(self) -> Clients:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def run(self, url: str, model: str, streams: list[list[Request]]) -> list[Stream]:
        """Start all streams at once, spread over the processes; returns when all have ended.

        Args:
            streams: of each, the requests that it sends one after the other.

        Returns:
            Each request's, those of a stream one after the other.
        """
        shares = [streams[i :: self._num_processes] for i in range(self._num_processes)]
        futures = [self._pool.submit(read_streams, url, model, share) for share in shares if share]
        return [stream for future in futures for stream in future.result()]


def read_streams(url: str, model: str, streams: list[list[Request]]) -> list[Stream]:
    """Read all streams at once."""
    return asyncio.run(_read_streams(url, model, streams))


async def _read_streams(url: str, model: str, streams: list[list[Request]]) -> list[Stream]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=TIMEOUT_S) as client:

        async def read(requests: list[Request]) -> list[Stream]:
            return [await _read_stream(client, model, *request) for request in requests]

        read_all = await asyncio.gather(*(read(requests) for requests in streams))
        return [stream for some in read_all for stream in some]


async def _read_stream(
    client: httpx.AsyncClient, model: str, prompt: list[int], num_tokens: int
) -> Stream:
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": num_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    arrivals: list[float] = []
    pending = b""
    last = b""
    start = time.perf_counter()
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise RuntimeError(f"{response.status_code}: {(await response.aread())!r:.500}")
        async for piece in response.aiter_raw():
            now = time.perf_counter()
            *events, pending = (pending + piece).split(EVENT_END)
            for event in events:
                if b'"choices":[{' in event:
                    arrivals.append(now)
                elif b'"usage":{' in event or b'"error"' in event:
                    last = event
    report = json.loads(last.removeprefix(b"data: "))
    if "usage" not in report:
        raise RuntimeError(f"the stream ended with {report}")
    return Stream(start, arrivals, report["usage"]["completion_tokens"])

"""Two hundred clients at once on four ranks, many of whom leave early."""

import asyncio
import json
import random
import time

import httpx
import psutil

from tests.e2e.server_process import running_server

NUM_REQUESTS = 200
OPTIONS = (
    "--attention-tp", "2", "--attention-dp", "2", "--num-blocks", "48",
    "--max-num-seqs", "32", "--max-model-len", "1024",
)  # fmt: skip


async def one_request(client, number):
    """A random kind of request; checks what comes back, and says what it was."""
    choose = random.Random(number)
    kind = choose.choice(("whole", "stream", "stream", "leave stream", "leave whole", "stop"))
    prompt = [choose.randrange(2000) for _ in range(choose.choice((1, 5, 40, 200)))]
    num_tokens = choose.randrange(1, 40)
    body = {
        "model": "moe-engine-demo",
        "prompt": prompt,
        "max_tokens": num_tokens,
        "ignore_eos": True,
        "seed": number,
        "stream": "stream" in kind,
    }
    if kind == "stop":
        body["stop"] = ["e"]
    if kind == "leave whole":
        body["max_tokens"] = 500
        try:
            await client.post("/v1/completions", json=body, timeout=choose.uniform(0.2, 2))
        except httpx.TimeoutException:
            return kind
        raise AssertionError("500 tokens came faster than expected")
    if body["stream"]:
        return await stream_request(client, body, kind, choose)
    answer = (await client.post("/v1/completions", json=body)).json()
    [choice] = answer["choices"]
    if kind == "stop":
        assert choice["finish_reason"] in ("stop", "length")
        assert "e" not in choice["text"]
        assert (choice["finish_reason"] == "stop") == (choice.get("stop_reason") == "e")
    else:
        assert choice["finish_reason"] == "length"
        assert answer["usage"]["completion_tokens"] == num_tokens
    return kind


async def stream_request(client, body, kind, choose):
    """Read a stream to its end, or leave it after a few chunks."""
    leave_after = choose.randrange(1, 5) if kind == "leave stream" else None
    if leave_after:
        body["max_tokens"] = 500
    reasons = []
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.status_code == 200
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                choices = json.loads(line[6:])["choices"]
                reasons += [choice["finish_reason"] for choice in choices]
                if leave_after and len(reasons) >= leave_after:
                    return kind
    assert reasons[-1] == "length"
    assert reasons[:-1] == [None] * (len(reasons) - 1)
    return kind


async def all_requests(url, seed):
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=240, limits=limits) as client:
        numbers = range(seed, seed + NUM_REQUESTS)
        return await asyncio.gather(*(one_request(client, number) for number in numbers))


def wait_until_idle(server):
    deadline = time.monotonic() + 30
    while server.metric("moe_engine:num_requests_running") + server.metric(
        "moe_engine:num_requests_waiting"
    ):
        assert time.monotonic() < deadline, "requests of clients that left are still running"
        time.sleep(0.1)


def memory_of(server):
    """Resident bytes of the rank processes together, and of the front end."""
    ranks = sum(process.memory_info().rss for process in server.ranks().values())
    return ranks, psutil.Process(server.process.pid).memory_info().rss


def test_200_clients_that_come_and_go_leave_nothing_behind():
    with running_server(*OPTIONS) as server:
        memory = []
        for round_number in range(3):
            kinds = asyncio.run(all_requests(server.url, round_number * NUM_REQUESTS))
            assert len(set(kinds)) == 5
            wait_until_idle(server)
            assert server.metric("moe_engine:kv_cache_usage_perc") == 0.0
            memory.append(memory_of(server))
        (_, ranks_before, ranks_after), (_, front_before, front_after) = zip(*memory, strict=True)
        assert ranks_after < ranks_before * 1.05, memory
        assert front_after < front_before * 1.05, memory

"""Streaming over HTTP against the same work offline.

    python -m benchmarks.bench_serving --config configs/qwen3-30b-a3b-1gpu.yaml \
        --load-format dummy --streams 64 --input 512 --output 256 --json FILE

First the prompts run through `MoEEngine` in this process, all at once. Then a server process is
started, and client processes send the same prompts all at once and read the streams to the end; one
round to warm up, then the repetitions. Output tokens per second of both count from the first prompt
sent to the last token received, so their ratio is what HTTP costs. A model without a tokenizer gets
a synthetic one of its vocabulary's size, so that every token brings text.

``--requests 8 --spread 0.5``: every stream sends 8 requests, one after the other, whose outputs
have 0.5 to 1.5 times as many tokens as ``--output`` says. Then prompts are computed beside the
others' decodes all the time, as those of users are who come and go; offline as over HTTP.

``--fake-step-ms 15.2`` measures the front end and the server alone: a stand-in makes a token for
every stream each 15.2 ms (`fake_core`). The server's own processor time is read from the system.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx

from benchmarks import fake_core
from benchmarks.driver import Request, percentile, random_prompts, run_streams
from benchmarks.gpu_state import gpu_state, require_gpu
from benchmarks.options import find_model, plain_options
from benchmarks.report import save_result
from benchmarks.stream_client import Clients, Stream
from benchmarks.synthetic_tokenizer import write_tokenizer
from moe_engine import MoEEngine
from moe_engine.config import ModelConfig

READY_TIMEOUT_S = 600.0
SHARES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


def main() -> None:
    """Measure, print and save."""
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory(prefix="bench_serving-") as name:
        options = engine_options(arguments, Path(name))
        if options.get("device") == "cuda" and arguments.fake_step_ms is None:
            require_gpu()
        result = measure(options, arguments)
    print(json.dumps(result["summary"], indent=2))
    if arguments.json:
        save_result(arguments.json, result, leave_out=f"{name}/")  # not where the copy was


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--config", type=Path, help="YAML file of the engine's options")
    parser.add_argument("--model", help="checkpoint directory, or a name in benchmarks/models")
    parser.add_argument("--load-format", choices=("auto", "dummy"), default="dummy")
    parser.add_argument("--set", action="append", default=[], metavar="OPTION=VALUE")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--input", type=int, default=512, help="tokens of a prompt")
    parser.add_argument("--output", type=int, default=256, help="tokens of an output")
    parser.add_argument("--requests", type=int, default=1, help="of a stream, in turn")
    parser.add_argument("--spread", type=float, default=0.0, help="of the outputs' lengths, share")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--clients", type=int, default=max(1, (os.cpu_count() or 1) // 2))
    parser.add_argument("--fake-step-ms", type=float, help="no model: a token a stream so often")
    parser.add_argument("--json", type=Path)
    return parser.parse_args(argv)


def engine_options(arguments: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Flat options of the engine; a model without a tokenizer is copied into ``directory``."""
    values = plain_options(arguments.config, [])
    values |= {
        "load_format": arguments.load_format,
        "prefix_cache": False,
        "max_model_len": arguments.input + longest_output(arguments),
        "max_num_seqs": arguments.streams,
    }
    values["max_num_batched_tokens"] = max(
        values.get("max_num_batched_tokens", 8192), arguments.streams
    )
    values |= plain_options(None, arguments.set)
    model = find_model(arguments.model or values.get("model"))
    if model is not None and not (Path(model) / "tokenizer.json").exists():
        copy = directory / Path(model).resolve().name
        shutil.copytree(model, copy)
        write_tokenizer(copy, ModelConfig.from_directory(copy).vocab_size)
        model = str(copy)
    values["model"] = model
    return values


def longest_output(arguments: argparse.Namespace) -> int:
    """Tokens of the longest output that there can be."""
    return round(arguments.output * (1 + arguments.spread))


def make_work(arguments: argparse.Namespace, vocab_size: int) -> list[list[Request]]:
    """The requests of every stream, the same every time."""
    choose = random.Random(0)
    shortest, longest = round(arguments.output * (1 - arguments.spread)), longest_output(arguments)
    number = arguments.streams * arguments.requests
    prompts = random_prompts(number, arguments.input, vocab_size, seed=0)
    requests = [(prompt, choose.randint(max(1, shortest), longest)) for prompt in prompts]
    return [requests[i :: arguments.streams] for i in range(arguments.streams)]


def measure(options: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """The content of the JSON file."""
    if arguments.fake_step_ms is not None:
        os.environ[fake_core.STEP_MS_VARIABLE] = str(arguments.fake_step_ms)
        fake_core.install()
    offline_s, work = run_offline(options, arguments)
    asked = sorted(num for requests in work for _, num in requests)
    num_tokens = sum(asked)
    is_fake = arguments.fake_step_ms is not None
    with running_server(options, is_fake=is_fake) as server, Clients(arguments.clients) as clients:
        url, ready_s, process = server
        model = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
        clients.run(url, model, [warm_up(requests) for requests in work])
        rounds, busy = [], []
        for _ in range(arguments.repetitions):
            before = processor_seconds(process.pid)
            rounds.append(clients.run(url, model, work))
            busy.append(processor_seconds(process.pid) - before)
    for streams in rounds:
        assert sorted(stream.num_tokens for stream in streams) == asked
    online_s = [round_seconds(streams) for streams in rounds]
    offline_rate = num_tokens / statistics.median(offline_s)
    online_rate = num_tokens / statistics.median(online_s)
    return {
        "options": options,
        "gpu": gpu_state() if shutil.which("nvidia-smi") else None,
        "streams": arguments.streams,
        "input": arguments.input,
        "output": arguments.output,
        "requests": arguments.requests,
        "spread": arguments.spread,
        "client_processes": arguments.clients,
        "fake_step_ms": arguments.fake_step_ms,
        "summary": {
            "offline_tok_per_s": offline_rate,
            "online_tok_per_s": online_rate,
            "online_share": online_rate / offline_rate,
            "server_ready_s": ready_s,
            "server_cpu_us_per_token": statistics.median(busy) / num_tokens * 1e6,
            **latencies(rounds),
        },
        "offline_s": offline_s,
        "online_s": online_s,
    }


def warm_up(requests: list[Request]) -> list[Request]:
    """The first request of a stream, cut short."""
    (prompt, num_tokens), *_ = requests
    return [(prompt, min(8, num_tokens))]


def run_offline(
    options: dict[str, Any], arguments: argparse.Namespace
) -> tuple[list[float], list[list[Request]]]:
    """Seconds of each repetition without HTTP, and the requests of every stream."""
    with MoEEngine(**options) as engine:
        print(engine.info.summary, flush=True)
        work = make_work(arguments, engine.info.vocab_size)
        run_streams(engine, [warm_up(requests) for requests in work])
        return [run_streams(engine, work).seconds for _ in range(arguments.repetitions)], work


@contextmanager
def running_server(
    options: dict[str, Any], *, is_fake: bool
) -> Iterator[tuple[str, float, subprocess.Popen[bytes]]]:
    """Start a server process; yields its address, the seconds until it was ready, the process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    module = "benchmarks.fake_core" if is_fake else "moe_engine.serve"
    command = [sys.executable, "-m", module, "--port", str(port)]
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            command.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            command += [f"--{flag}", str(value)]
    start = time.perf_counter()
    process = subprocess.Popen(command)
    url = f"http://127.0.0.1:{port}"
    try:
        while not _is_ready(url):
            if process.poll() is not None:
                raise RuntimeError(f"the server ended with status {process.returncode}")
            if time.perf_counter() - start > READY_TIMEOUT_S:
                raise RuntimeError("the server was not ready in time")
            time.sleep(0.02)
        yield url, time.perf_counter() - start, process
    finally:
        process.terminate()
        process.wait()


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def processor_seconds(pid: int) -> float:
    """Processor time that a process has used so far, its children left out (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def round_seconds(streams: list[Stream]) -> float:
    """From the first request sent to the last token received."""
    return max(s.arrivals[-1] for s in streams) - min(s.start for s in streams)


def latencies(rounds: list[list[Stream]]) -> dict[str, dict[str, float]]:
    """Percentiles over all streams: time to first token, and between events with text."""
    streams = [stream for streams in rounds for stream in streams]
    first = [stream.first_token_s for stream in streams]
    between = [after - before for stream in streams for before, after in pairwise(stream.arrivals)]
    return {
        "time_to_first_token_ms": {
            k: percentile(first, share) * 1e3 for k, share in SHARES.items()
        },
        "inter_token_ms": {k: percentile(between, share) * 1e3 for k, share in SHARES.items()},
    }


if __name__ == "__main__":
    main()

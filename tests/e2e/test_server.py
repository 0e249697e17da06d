"""The server as users meet it: the official client, bad starts, a graceful end."""

import json
import signal
import socket
import subprocess
import sys
import time

import httpx
import openai
import psutil
import pytest

from tests.e2e.server_process import Server, free_port, running_server


@pytest.fixture(scope="module")
def server():
    with running_server("--attention-tp", "2", "--num-blocks", "128") as server:
        yield server


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")


def test_chat_streams_through_the_openai_client(client):
    model = client.models.list().data[0].id
    messages = [{"role": "user", "content": "Tell me a story."}]
    whole = client.chat.completions.create(
        model=model, messages=messages, max_tokens=24, seed=3, temperature=0.8
    )
    chunks = list(
        client.chat.completions.create(
            model=model,
            messages=messages,
            max_tokens=24,
            seed=3,
            temperature=0.8,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert reasons[-1] == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage
    assert whole.usage.completion_tokens <= 24


def test_curl_gets_a_completion(server):
    command = [
        "curl", "-sS", f"{server.url}/v1/completions", "-H", "Content-Type: application/json",
        "-d", '{"model": "moe-engine-demo", "prompt": "Once upon a time", "max_tokens": 5}',
    ]  # fmt: skip
    answer = httpx.Response(200, content=subprocess.check_output(command)).json()
    assert answer["object"] == "text_completion"
    assert answer["usage"]["completion_tokens"] <= 5


def test_echo_with_logprobs_scores_the_prompt(client):
    answer = client.completions.create(
        model="moe-engine-demo", prompt="The quick brown fox", max_tokens=1, echo=True, logprobs=2
    )
    logprobs = answer.choices[0].logprobs
    assert answer.choices[0].text.startswith("The quick brown fox")
    assert logprobs.token_logprobs[0] is None
    assert all(value <= 0 for value in logprobs.token_logprobs[1:])
    assert "".join(logprobs.tokens).startswith("The quick brown fox")


BASE = {"model": "moe-engine-demo", "prompt": "Once", "max_tokens": 4}
BAD_BODIES = {
    "malformed JSON": (b'{"model": ', ["JSON"]),
    "unknown model": ({**BASE, "model": "gpt-5"}, ["gpt-5", "moe-engine-demo"]),
    "empty prompt": ({**BASE, "prompt": ""}, ["prompt"]),
    "prompt beyond the context": ({**BASE, "prompt": [5] * 5000}, ["5000", "4096"]),
    "max_tokens beyond the context": ({**BASE, "max_tokens": 5000}, ["5000", "4096"]),
    "token id out of range": ({**BASE, "prompt": [5, 99999]}, ["99999", "2047"]),
    "temperature": ({**BASE, "temperature": 2.5}, ["temperature", "2"]),
    "top_p": ({**BASE, "top_p": 1.5}, ["top_p", "1"]),
    "penalty": ({**BASE, "frequency_penalty": -3}, ["frequency_penalty", "-2"]),
    "n": ({**BASE, "n": 1000}, ["n", "128"]),
    "invalid UTF-8": (b'{"model": "moe-engine-demo", "prompt": "\xff\xfe"}', ["UTF-8"]),
    "10 MB body": ({**BASE, "prompt": "x" * 10_000_000}, ["4194304"]),
    "stop list": ({**BASE, "stop": ["a"] * 100}, ["stop", "16"]),
    "logit_bias": ({**BASE, "logit_bias": {"5000": 1}}, ["logit_bias", "5000", "2047"]),
    "unknown field": ({**BASE, "temprature": 1}, ["temprature"]),
    "beyond the KV cache": ({**BASE, "max_tokens": 3000}, ["3000", "blocks"]),
}


def test_bad_requests_are_named_while_others_go_on(server):
    body = {**BASE, "max_tokens": 400, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        for name, (bad, words) in BAD_BODIES.items():
            content = bad if isinstance(bad, bytes) else json.dumps(bad).encode()
            refused = httpx.post(
                f"{server.url}/v1/completions",
                content=content,
                headers={"Content-Type": "application/json"},
                timeout=30,
            )
            assert 400 <= refused.status_code < 500, (name, refused.text)
            error = refused.json()["error"]
            assert set(error) == {"message", "type", "param", "code"}
            for word in words:
                assert word in error["message"], (name, error)
        rest = [line for line in lines if line.startswith("data: {")]
    assert json.loads(rest[-1][6:])["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "/nonexistent"], ["/nonexistent", "not a directory"]),
        (["--attention-tp", "3"], ["attention_tp 3", "8 attention heads"]),
        (["--attention-tp", "4", "--attention-dp", "8"], ["32 ranks", "16 experts"]),
        (["--kv-cache-memory", "1KiB"], ["too little memory", "1.00 KiB", "blocks of 16"]),
        (["--max-model-len", "5000"], ["max_model_len is 5000", "4096"]),
        (["--attention-tp", "2", "--exchange", "local"], ["'local'", "one rank"]),
        (["--max-num-seqs", "many"], ["max_num_seqs", "many"]),
    ],
)
def test_impossible_start_is_refused_in_words(arguments, words):
    command = [sys.executable, "-m", "moe_engine.serve", "--port", "0", "--device", "cpu"]
    ended = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=60)
    assert ended.returncode not in (0, 1)
    for word in words:
        assert word in ended.stderr
    assert "Traceback" not in ended.stderr


def test_sigterm_ends_the_server_and_its_ranks():
    with running_server() as server:
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(15) == 0


def test_port_in_use_is_refused_before_anything_is_loaded():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "moe_engine.serve", "--port", port, "--device", "cpu"]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert ended.returncode == 1
    assert port in ended.stderr
    assert "loading" not in ended.stderr


def test_other_architectures_are_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    command = [sys.executable, "-m", "moe_engine.serve", "--port", "0", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert "llama" in ended.stderr
    assert "qwen3_moe" in ended.stderr


def test_torchrun_starts_the_ranks_and_lets_open_requests_end():
    port = str(free_port())
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", "moe_engine.serve", "--attention-tp", "2", "--device", "cpu", "--port", port,
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    server = Server(process, port)
    try:
        deadline = time.monotonic() + 90
        while server.health() != 200:
            assert process.poll() is None, process.stdout.read()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        answer = httpx.post(f"{server.url}/v1/completions", json=BASE, timeout=30)
        assert answer.json()["usage"]["completion_tokens"] <= 4
        ranks = psutil.Process(process.pid).children(recursive=True)
        body = {**BASE, "max_tokens": 300, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body) as stream:
            lines = stream.iter_lines()
            next(lines)
            process.terminate()
            assert "data: [DONE]" in list(lines)
        process.wait(40)
        _, alive = psutil.wait_procs(ranks, timeout=10)
        assert not alive
    finally:
        process.kill()

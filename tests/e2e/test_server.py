"""The server as users meet it: the official client, bad starts, a graceful end."""

import signal
import subprocess
import sys

import httpx
import openai
import pytest

from tests.e2e.server_process import running_server


@pytest.fixture(scope="module")
def server():
    with running_server("--attention-tp", "2") as server:
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


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "/nonexistent"], ["/nonexistent", "not a directory"]),
        (["--attention-tp", "3"], ["attention_tp 3", "8 attention heads"]),
        (["--attention-tp", "4", "--attention-dp", "8"], ["32 ranks", "16 experts"]),
        (["--kv-cache-memory", "1KiB"], ["too little memory", "1.00 KiB", "blocks of 16"]),
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

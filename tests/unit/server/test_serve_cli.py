"""The command line: its options, its precedence, and how the process ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from moe_engine import serve
from moe_engine.config.flat import flat_options
from moe_engine.errors import ConfigError

HERE = Path(__file__).parent
OPTIONS_FILE = HERE / "cli_options.txt"


def listed_options() -> str:
    lines = []
    for option in flat_options().values():
        kind = "|".join(option.choices) if option.choices else option.type.__name__
        flag = option.name.replace("_", "-")
        lines.append(f"{option.section or 'engine'}: --{flag} {kind} = {option.default}")
    return "\n".join(lines) + "\n"


def test_options_change_only_on_purpose():
    """A new, renamed or changed option needs a line in cli_options.txt in the same commit."""
    assert listed_options() == OPTIONS_FILE.read_text()


def test_every_option_is_a_flag_with_help():
    text = serve.make_parser().format_help()
    for option in flat_options().values():
        assert "--" + option.name.replace("_", "-") in text
        if option.type is bool:
            assert "--no-" + option.name.replace("_", "-") in text


def test_flags_override_yaml_and_yaml_overrides_defaults(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("scheduler:\n  max_num_seqs: 7\n  max_waiting: 9\nserver:\n  port: 1234\n")
    engine, server = serve.parse_arguments(
        ["--config", str(file), "--max-num-seqs", "8", "--no-prefix-cache"]
    )
    assert engine.scheduler.max_num_seqs == 8
    assert engine.scheduler.max_waiting == 9
    assert server.port == 1234
    assert server.host == "127.0.0.1"
    assert engine.cache.prefix_cache is False


def test_null_flag_overrides_yaml(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("cache:\n  kv_cache_memory: 4GiB\n")
    engine, _ = serve.parse_arguments(["--config", str(file)])
    assert engine.cache.kv_cache_memory == 4 << 30
    engine, _ = serve.parse_arguments(["--config", str(file), "--kv-cache-memory", "null"])
    assert engine.cache.kv_cache_memory is None


def test_model_is_positional_or_flag_but_not_two(tmp_path):
    for arguments in ([str(tmp_path)], ["--model", str(tmp_path)]):
        engine, server = serve.parse_arguments(arguments)
        assert engine.model == str(tmp_path)
        assert server.served_model_name == tmp_path.name
    with pytest.raises(ConfigError, match="given twice"):
        serve.parse_arguments(["a", "--model", "b"])


def test_served_name_can_be_chosen_and_has_a_default_without_a_model():
    assert serve.parse_arguments([])[1].served_model_name == "moe-engine-demo"
    chosen = serve.parse_arguments(["m", "--served-model-name", "x"])[1]
    assert chosen.served_model_name == "x"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--port", "many"], ["port", "'many'", "integer"]),
        (["--max-num-seqs", "9999"], ["max_num_batched_tokens", "9999"]),
        (["--config", "/nowhere.yaml"], ["/nowhere.yaml"]),
        (["--device", "tpu"], ["device", "'tpu'", "cuda"]),
    ],
)
def test_bad_configuration_is_one_line_and_status_2(capsys, arguments, words):
    assert serve.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("moe_engine: error: ")
    for word in words:
        assert word in captured.err


def test_unknown_and_abbreviated_flags_are_refused(capsys):
    for flag in ("--attention-pt=2", "--attention-t=2"):
        assert serve.main([flag]) == 2
        assert "did you mean --attention-tp" in capsys.readouterr().err


class Server:
    """A running command line."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.url = ""

    def wait_ready(self) -> str:
        assert self.process.stdout.readline() == "fake\n"  # the engine's summary
        line = self.process.stdout.readline()
        assert line.startswith("Ready: moe-engine-demo at http://127.0.0.1:"), line
        self.url = line.split()[-1].removesuffix("/v1")
        return self.url

    def finish(self) -> tuple[int, str]:
        """Exit status and standard error."""
        _, err = self.process.communicate(timeout=15)
        return self.process.returncode, err


@contextmanager
def serving(*flags: str, **knobs: object):
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.unit.server.fake_serve", json.dumps(knobs), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    try:
        yield Server(process)
    finally:
        process.kill()
        process.communicate()


def test_interrupt_ends_a_ready_server_with_status_0():
    with serving("--port", "0") as server:
        url = server.wait_ready()
        assert httpx.get(f"{url}/health").status_code == 200
        server.process.send_signal(signal.SIGINT)
        status, err = server.finish()
        assert status == 0, err
        assert "Traceback" not in err


def test_termination_while_loading_is_status_0():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with serving("--port", str(port), start_s=60) as server:
        deadline = time.monotonic() + 10
        while True:
            try:
                assert httpx.get(f"http://127.0.0.1:{port}/health").status_code == 503
                break
            except httpx.ConnectError:
                assert time.monotonic() < deadline
        server.process.send_signal(signal.SIGTERM)
        status, err = server.finish()
    assert status == 0, err
    assert "Traceback" not in err


def test_second_signal_does_not_wait_for_open_requests():
    with serving("--port", "0", delay_s=60) as server:
        url = server.wait_ready()
        body = {"model": "moe-engine-demo", "prompt": "x"}
        started = time.monotonic()
        for delay_s in (0.3, 0.4, 2.0):  # the first two are one wish
            threading.Timer(delay_s, server.process.send_signal, [signal.SIGTERM]).start()
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=15)
        assert answer.status_code == 503
        assert "shut down" in answer.json()["error"]["message"]
        assert time.monotonic() - started > 1.5
        status, err = server.finish()
        assert status == 0
        assert "Traceback" not in err
        assert time.monotonic() - started < 10


def test_unknown_flag_is_refused_with_the_nearest_known_ones():
    for flag, nearest in (("--prot", "--port"), ("--attention_tp", "--attention-tp")):
        with serving(flag, "1") as server:
            status, err = server.finish()
        assert status == 2
        assert f"unknown flag {flag}; did you mean" in err
        assert nearest in err


def test_termination_lets_an_open_request_finish():
    with serving("--port", "0", delay_s=0.05) as server:
        url = server.wait_ready()
        body = {"model": "moe-engine-demo", "prompt": "x", "max_tokens": 20, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body) as reply:
            lines = reply.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            assert list(lines)[-2] == "data: [DONE]"
        assert server.finish()[0] == 0


def test_taken_port_is_one_line_and_status_1():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with serving("--port", str(port), start_error=["ConfigError", "loaded first"]) as server:
            status, err = server.finish()
    assert status == 1
    assert err.count("\n") == 1
    assert f"127.0.0.1:{port}: Address already in use" in err


def test_failed_start_for_the_users_fault_is_status_2_without_traceback():
    error = ["CheckpointError", "needs 12 GiB, has 8"]
    with serving("--port", "0", start_error=error) as server:
        status, err = server.finish()
    assert status == 2
    assert "moe_engine: error: needs 12 GiB, has 8" in err
    assert "Traceback" not in err


def test_failed_start_for_a_dead_rank_is_status_1():
    with serving("--port", "0", start_error=["EngineDeadError", "rank 1 was killed"]) as server:
        status, err = server.finish()
    assert status == 1
    assert "rank 1 was killed" in err


def test_dead_engine_answers_503_for_a_moment_then_ends_with_status_1():
    with serving("--port", "0", die_after_start_s=0.3) as server:
        url = server.wait_ready()
        deadline = time.monotonic() + 5
        while httpx.get(f"{url}/health").status_code == 200:
            assert time.monotonic() < deadline
        assert httpx.get(f"{url}/health").json()["status"] == "dead"
        status, err = server.finish()
    assert status == 1
    assert "rank 3 was killed" in err

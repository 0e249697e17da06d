"""The engine in scripts and asyncio programs."""

import asyncio
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moe_engine import (
    AsyncMoEEngine,
    ConfigError,
    EngineDeadError,
    InvalidRequestError,
    MoEEngine,
    SamplingParams,
)
from moe_engine.config import EngineConfig
from moe_engine.demo.build import ensure_demo_checkpoint

ROOT = Path(__file__).parents[2]
SCRIPT = """
import atexit, time

atexit.register(time.sleep, 1.0)  # behind all that was registered later: time to report a death
from moe_engine import MoEEngine, SamplingParams

print("script runs")
with MoEEngine(attention_tp=2, device="cpu") as engine:
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    results = engine.generate(["Once upon", "a time"], params)
    print([len(result.outputs[0].token_ids) for result in results])
engine = MoEEngine(device="cpu")
print("left without shutdown")
"""


def test_script_needs_no_main_guard_and_leaves_nothing_behind(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    ended = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "script runs\n[3, 3]\nleft without shutdown\n"
    assert "dead" not in ended.stderr


def test_all_kinds_of_prompts_together():
    messages = [{"role": "user", "content": "Hi"}]
    with MoEEngine(device="cpu") as engine:
        text, tokens, chat = engine.generate(
            ["Once upon a time", [1, 2, 3], messages], SamplingParams(max_tokens=2, n=2)
        )
        assert text.prompt_token_ids == tuple(engine.tokenizer.encode("Once upon a time"))
        assert tokens.prompt_token_ids == (1, 2, 3)
        assert chat.prompt_token_ids == tuple(engine.tokenizer.apply_chat_template(messages))
        assert [len(result.outputs) for result in (text, tokens, chat)] == [2, 2, 2]
        with pytest.raises(InvalidRequestError, match="9999"):
            engine.generate([[1, 9999], "fine"])
        with pytest.raises(InvalidRequestError, match="text, token ids or chat messages"):
            engine.generate([[1, "two"]])
        with pytest.raises(InvalidRequestError, match=r"a prompt is a text.* but this one is 5"):
            engine.generate(5)
        with pytest.raises(InvalidRequestError, match="empty"):
            engine.generate([[]])
        assert engine.generate([]) == []
        [scored] = engine.generate(
            [[1, 2, 3]], SamplingParams(max_tokens=1, prompt_logprobs=2, logprobs=2)
        )
        assert scored.prompt_logprobs[0] is None
        assert [entry.chosen.token_id for entry in scored.prompt_logprobs[1:]] == [2, 3]
        assert all(len(entry.top) == 2 for entry in scored.prompt_logprobs[1:])


def test_dummy_weights_need_only_a_config_and_are_one_model_in_every_layout(tmp_path):
    shutil.copy(ensure_demo_checkpoint() / "config.json", tmp_path)
    tokens = []
    for layout in ({}, {"attention_tp": 2}, {"attention_dp": 2}):
        with MoEEngine(str(tmp_path), device="cpu", load_format="dummy", **layout) as engine:
            [result] = engine.generate([[5, 6, 7]], SamplingParams(temperature=0, max_tokens=8))
            tokens.append(result.outputs[0].token_ids)
    assert tokens[0] == tokens[1] == tokens[2]


def test_async_requests_run_together_and_leaving_one_aborts_it():
    async def run():
        engine = AsyncMoEEngine(device="cpu")
        await engine.start()
        assert engine.state == "ready"

        async def whole(number):
            params = SamplingParams(max_tokens=10, ignore_eos=True, seed=number)
            return [out async for out in engine.generate([number + 1], params, f"r{number}")]

        endless = engine.generate([1], SamplingParams(max_tokens=4000, ignore_eos=True), "endless")
        await anext(endless)
        streams = await asyncio.gather(*(whole(number) for number in range(8)))
        assert all(outputs[-1].usage.completion_tokens == 10 for outputs in streams)
        assert engine.stats.num_running >= 1
        await endless.aclose()
        for _ in range(100):
            if engine.stats.num_running == 0:
                break
            await asyncio.sleep(0.05)
        assert engine.stats.num_free_blocks == engine.stats.num_blocks
        await engine.shutdown()

    asyncio.run(run())


def test_async_twin_takes_the_same_arguments_and_prompts():
    async def run():
        params = SamplingParams(max_tokens=3, ignore_eos=True)
        async with AsyncMoEEngine(attention_tp=2, device="cpu", max_model_len=64) as engine:
            assert engine.info.max_model_len == 64
            for prompt in ("Once", [1, 2], [{"role": "user", "content": "Hi"}]):
                outputs = [piece async for piece in engine.generate(prompt, params)]
                assert outputs[-1].usage.completion_tokens == 3
        assert engine.state == "dead"

    asyncio.run(run())


def test_options_of_the_server_are_refused():
    with pytest.raises(ConfigError, match="port is an option of the HTTP server"):
        MoEEngine(port=9000)
    with pytest.raises(ConfigError, match="did you mean attention_tp"):
        AsyncMoEEngine(attention_pt=2)
    assert AsyncMoEEngine.from_config(EngineConfig(device="cpu")).state == "starting"


def test_request_after_shutdown_is_an_error():
    with MoEEngine(device="cpu") as engine:
        pass
    with pytest.raises(EngineDeadError, match="shut down"):
        engine.generate([[1, 2]])
    engine.shutdown()


def test_duplicate_request_id_is_refused_and_the_first_request_goes_on():
    async def run():
        engine = AsyncMoEEngine(device="cpu")
        await engine.start()
        first = engine.generate([1], SamplingParams(max_tokens=30, ignore_eos=True), "same")
        await anext(first)
        with pytest.raises(InvalidRequestError, match="same-0"):
            await anext(engine.generate([1], SamplingParams(max_tokens=3), "same"))
        with pytest.raises(InvalidRequestError, match="this one is 5"):
            await anext(engine.generate(5))
        outputs = [output async for output in first]
        assert outputs[-1].usage.completion_tokens == 30
        await engine.shutdown()

    asyncio.run(run())


def test_shutdown_while_loading_ends_the_start_at_once():
    async def run():
        engine = AsyncMoEEngine(device="cpu")
        starting = asyncio.create_task(engine.start())
        await asyncio.sleep(1)
        started = time.monotonic()
        await engine.shutdown()
        with pytest.raises(EngineDeadError, match="shut down"):
            await starting
        assert time.monotonic() - started < 4

    asyncio.run(run())


def test_without_a_tokenizer_prompts_and_outputs_are_token_ids(tmp_path):
    shutil.copy(ensure_demo_checkpoint() / "config.json", tmp_path)
    options = {"load_format": "dummy", "skip_tokenizer_init": True, "dummy_expert_skew": 1.0}
    with MoEEngine(str(tmp_path), device="cpu", **options) as engine:
        params = SamplingParams(max_tokens=3, ignore_eos=True, logprobs=1)
        [result] = engine.generate([[5, 6, 7]], params)
        assert len(result.outputs[0].token_ids) == len(result.outputs[0].logprobs) == 3
        assert result.outputs[0].text == ""
        for prompt in ("a text", [{"role": "user", "content": "Hi"}]):
            with pytest.raises(InvalidRequestError, match="send token ids"):
                engine.generate(prompt)
        with pytest.raises(InvalidRequestError, match="stop_token_ids"):
            engine.generate([5], SamplingParams(stop=("x",)))
        phases = engine.info.startup_s
        assert next(iter(phases)) == "process and imports"
        assert {"model", "weights", "KV cache"} <= set(phases)
        assert all(seconds >= 0 for seconds in phases.values())

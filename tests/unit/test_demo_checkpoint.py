"""The embedded demo model is a real checkpoint that any tool can open, built once per machine."""

import hashlib
import json
import multiprocessing
import shutil
from importlib.resources import files

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, Qwen3MoeForCausalLM

from moe_engine.checkpoint import Checkpoint, load_weights
from moe_engine.config import ModelConfig
from moe_engine.config.hf import default_sampling
from moe_engine.demo.build import demo_weights, ensure_demo_checkpoint
from moe_engine.demo.train_tokenizer import train
from moe_engine.errors import CheckpointError
from tests.unit.checkpoint_factory import whole_specs


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return ensure_demo_checkpoint(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def tokenizer(demo):
    return AutoTokenizer.from_pretrained(demo)


@pytest.fixture(scope="module")
def model(demo):
    return Qwen3MoeForCausalLM.from_pretrained(demo, dtype=torch.float32)


@pytest.fixture
def cache(demo, tmp_path):
    """A private copy of the cache with the demo in it."""
    shutil.copytree(demo.parents[1], tmp_path / "cache")
    return tmp_path / "cache"


def test_our_reader_finds_what_was_written(demo):
    config = ModelConfig.from_directory(demo)
    assert len(list(demo.glob("*.safetensors"))) == 2
    specs = whole_specs(config, torch.bfloat16)
    load_weights(specs, Checkpoint(demo, config))
    weights = demo_weights(config)
    assert all(torch.equal(spec.target, weights[spec.name]) for spec in specs)


def test_transformers_loads_every_weight(demo):
    _, info = Qwen3MoeForCausalLM.from_pretrained(demo, output_loading_info=True)
    assert not any(info.values()), info


def test_the_model_divides_over_the_layouts_that_tests_use(demo):
    config = ModelConfig.from_directory(demo)
    assert config.num_key_value_heads % 4 == 0
    assert config.num_experts % 8 == 0
    assert config.eos_token_ids == (2047, 2045)
    assert default_sampling(demo) == {"temperature": 0.7, "top_k": 20, "top_p": 0.8}


def test_it_is_small(demo):
    assert sum(file.stat().st_size for file in demo.iterdir()) < 10_000_000
    assert (demo / "tokenizer.json").stat().st_size < 200_000


def test_weights_are_the_same_bytes_on_every_machine(demo):
    digest = hashlib.sha256()
    for name, tensor in sorted(demo_weights(ModelConfig.from_directory(demo)).items()):
        digest.update(name.encode())
        digest.update(tensor.view(torch.uint8).numpy().tobytes())
    assert digest.hexdigest() == "ccd19eb4123b106f2b3197a370f7ac9a4ca673a8fce51e686d3ee4b2acc36750"


def test_activations_and_logits_are_well_scaled(model, tokenizer):
    ids = tokenizer("The harbour wakes before the town", return_tensors="pt").input_ids
    with torch.no_grad():
        output = model(ids, output_hidden_states=True, output_router_logits=True)
    assert all(0.3 < hidden.std() < 10 for hidden in output.hidden_states)
    assert 1.0 < output.logits.std() < 10.0
    assert all(logits.std() > 0.5 for logits in output.router_logits)


def test_greedy_text_is_not_degenerate(model, tokenizer):
    ids = tokenizer("def f(x):\n", return_tensors="pt").input_ids
    output = model.generate(ids, max_new_tokens=32, do_sample=False)[0, ids.shape[1] :]
    assert len(set(output.tolist())) > 16


@settings(deadline=None, max_examples=50)
@given(st.text())
def test_any_text_round_trips(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    assert tokenizer.decode(ids) == text
    assert all(0 <= token_id < 2048 for token_id in ids)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "🙂👨‍👩‍👧🏽",
        "e\u0301 é",
        "a  b \t\n\n  c",
        "\x00\x7f",
        "don't",
        "I 'm . ok ?",
        "港口 Порт",
        "\r\n",
    ],
)
def test_awkward_text_round_trips(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_committed_tokenizer_is_what_training_gives(tokenizer):
    corpus = files("moe_engine.demo").joinpath("data/corpus.txt").read_text(encoding="utf-8")
    assert train(corpus).get_vocab() == tokenizer.get_vocab()


def test_special_tokens_are_qwens(tokenizer):
    text = "<|im_start|>user\nhi<|im_end|><|endoftext|>"
    ids = tokenizer.encode(text)
    assert (ids[0], *ids[-2:]) == (2046, 2047, 2045)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "user\nhi"
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (2047, 2045)
    assert len(tokenizer) == 2048


@pytest.mark.parametrize("options", [{}, {"enable_thinking": False}])
def test_chat_template_is_chatml(tokenizer, options):
    parts = [{"type": "text", "text": text} for text in ("Hi ", "you")]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": " ok\n"},
    ]
    text = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, **options
    )
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi you<|im_end|>\n"
        "<|im_start|>assistant\n ok\n<|im_end|>\n<|im_start|>assistant\n"
    )
    without = tokenizer.apply_chat_template(messages, tokenize=False)
    assert without == text.removesuffix("<|im_start|>assistant\n")


def test_chat_template_refuses_other_roles(tokenizer):
    with pytest.raises(Exception, match="not tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_an_intact_checkpoint_is_not_built_again(cache, demo):
    again = ensure_demo_checkpoint(cache)
    assert again.name == demo.name
    before = (again / "manifest.json").stat().st_mtime_ns
    assert ensure_demo_checkpoint(cache) == again
    assert (again / "manifest.json").stat().st_mtime_ns == before


def truncate(file):
    file.write_bytes(file.read_bytes()[:-100])


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    "name", ["model-00002-of-00002.safetensors", "config.json", "manifest.json"]
)
@pytest.mark.parametrize("damage", [truncate, flip_a_bit, lambda file: file.unlink()])
def test_a_damaged_checkpoint_is_built_again(cache, demo, name, damage):
    target = ensure_demo_checkpoint(cache)
    damage(target / name)
    assert ensure_demo_checkpoint(cache) == target
    for file in demo.iterdir():
        assert (target / file.name).read_bytes() == file.read_bytes()


def test_nothing_but_the_checkpoint_is_left_behind(demo):
    assert {path.name for path in demo.parent.iterdir()} == {demo.name, "lock"}
    assert set(json.loads((demo / "manifest.json").read_text())) | {"manifest.json"} == {
        path.name for path in demo.iterdir()
    }


def test_several_processes_may_build_at_once(tmp_path, demo):
    context = multiprocessing.get_context("fork")
    torch.set_num_threads(1)
    processes = [context.Process(target=ensure_demo_checkpoint, args=(tmp_path,)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    target = ensure_demo_checkpoint(tmp_path)
    assert (target / "manifest.json").read_bytes() == (demo / "manifest.json").read_bytes()


def test_a_cache_that_cannot_be_written_is_refused_with_a_way_out(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="name a writable cache directory"):
        ensure_demo_checkpoint(tmp_path / "file")

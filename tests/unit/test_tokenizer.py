from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_engine.errors import ConfigError, InvalidRequestError
from moe_engine.text.tokenizer import Tokenizer
from tests.unit.tiny_tokenizer import byte_ids, save_tiny_tokenizer, tiny_tokenizer, token_id_of

VOCAB_SIZE = 400  # a little more than the tokenizer has: ids without a token are drawn as well


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tiny_tokenizer()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    save_tiny_tokenizer(tmp_path)
    return tmp_path


# --- loading ---------------------------------------------------------------------------------


def test_importing_the_text_layer_does_not_import_transformers() -> None:
    code = (
        "import sys, moe_engine.text.output, moe_engine.text.tokenizer; "
        "sys.exit('transformers' in sys.modules or 'tokenizers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_missing_directory_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no_such_model"):
        Tokenizer.from_directory(tmp_path / "no_such_model")


def test_missing_tokenizer_file_is_refused_by_name(directory: Path) -> None:
    (directory / "tokenizer.json").unlink()
    (directory / "vocab.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"tokenizer\.json is missing, and without merges\.txt"):
        Tokenizer.from_directory(directory)


def test_broken_tokenizer_file_is_refused(directory: Path) -> None:
    (directory / "tokenizer.json").write_text('{"version": "1.0", "model": 3}')
    with pytest.raises(ConfigError, match="cannot be loaded"):
        Tokenizer.from_directory(directory)


def test_tokenizer_that_brings_its_own_code_is_refused_without_asking(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda prompt: "y")
    path = directory / "tokenizer_config.json"
    content = json.loads(path.read_text())
    content["tokenizer_class"] = "MyTokenizer"
    content["auto_map"] = {"AutoTokenizer": [None, "my_tokenizer.MyTokenizer"]}
    path.write_text(json.dumps(content))
    (directory / "my_tokenizer.py").write_text("raise SystemExit('remote code was run')")
    with pytest.raises(ConfigError, match="custom code"):
        Tokenizer.from_directory(directory)


def test_tokenizer_that_is_not_byte_level_is_refused(directory: Path) -> None:
    path = directory / "tokenizer.json"
    content = json.loads(path.read_text())
    content["decoder"] = {"type": "Fuse"}
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="decodes with Fuse; only byte-level BPE"):
        Tokenizer.from_directory(directory)


def test_vocab_and_merges_can_stand_in_for_tokenizer_json(directory: Path) -> None:
    model = json.loads((directory / "tokenizer.json").read_text())["model"]
    (directory / "tokenizer.json").unlink()
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    (directory / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = "\n".join(" ".join(merge) for merge in model["merges"])
    (directory / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    tokenizer = Tokenizer.from_directory(directory)
    assert tokenizer.decode(tokenizer.encode("hello 世界")) == "hello 世界"


def test_truncation_and_padding_saved_with_the_tokenizer_are_switched_off(directory: Path) -> None:
    path = directory / "tokenizer.json"
    content = json.loads(path.read_text())
    content["truncation"] = {
        "direction": "Right",
        "max_length": 3,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    content["padding"] = {
        "strategy": {"Fixed": 64},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<|endoftext|>",
    }
    path.write_text(json.dumps(content))
    text = "the quick brown fox jumps over it"
    assert Tokenizer.from_directory(directory).encode(text) == tiny_tokenizer().encode(text)


# --- encode, decode --------------------------------------------------------------------------


@settings(deadline=None)
@given(text=st.text())
def test_text_survives_encode_and_decode(text: str) -> None:
    tokenizer = tiny_tokenizer()
    if "é" not in text:  # the added token é means a lone byte
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


@settings(deadline=None)
@given(
    ids=st.lists(st.integers(0, VOCAB_SIZE - 1)),
    skip_special_tokens=st.booleans(),
)
def test_decode_is_the_concatenation_of_the_tokens_bytes(
    ids: list[int], skip_special_tokens: bool
) -> None:
    tokenizer = tiny_tokenizer()
    data = b"".join(
        tokenizer.token_bytes(token_id) or b""
        for token_id in ids
        if not (skip_special_tokens and tokenizer.is_special(token_id))
    )
    assert tokenizer.decode(ids, skip_special_tokens) == data.decode(errors="replace")


@pytest.mark.parametrize("surrogate", [0xD800, 0xDFFF])
def test_lone_surrogate_is_refused(tokenizer: Tokenizer, surrogate: int) -> None:
    with pytest.raises(InvalidRequestError, match=f"character 2 .* U\\+{surrogate:04X}") as error:
        tokenizer.encode("ab" + chr(surrogate), param="input")
    assert error.value.param == "input"


def test_special_tokens_are_parsed_and_skipped_on_demand(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("hello<|im_end|>")
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids) == "hello"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "hello<|im_end|>"


def test_added_tokens_that_are_not_special_stay_in_the_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([token_id_of("<think>")], skip_special_tokens=True) == "<think>"
    assert not tokenizer.is_special(token_id_of("<think>"))
    assert tokenizer.is_special(token_id_of("<|endoftext|>"))


def test_vocab_size_counts_added_tokens(tokenizer: Tokenizer) -> None:
    ids = [
        token_id for token_id in range(VOCAB_SIZE) if tokenizer.token_bytes(token_id) is not None
    ]
    assert tokenizer.vocab_size == len(ids) > token_id_of("猫")


def test_threads_can_share_a_tokenizer(tokenizer: Tokenizer) -> None:
    texts = [f"the quick fox {i} 你好 <|im_end|> 🙂" * 50 for i in range(32)]

    def round_trip(i: int) -> str:
        return tokenizer.decode(tokenizer.encode(texts[i % 32]), skip_special_tokens=False)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(round_trip, range(256))) == texts * 8


# --- single tokens ---------------------------------------------------------------------------


def test_token_bytes_are_exact_where_the_text_is_not(tokenizer: Tokenizer) -> None:
    for byte in range(256):
        (token_id,) = byte_ids(bytes([byte]))
        assert tokenizer.token_bytes(token_id) == bytes([byte])
        assert tokenizer.token_text(token_id) == (chr(byte) if byte < 0x80 else "\ufffd")


def test_token_bytes_of_added_tokens_are_their_text(tokenizer: Tokenizer) -> None:
    for text in ("<|im_end|>", "<think>", "two words", "猫"):
        assert tokenizer.token_bytes(token_id_of(text)) == text.encode()
        assert tokenizer.token_text(token_id_of(text)) == text


def test_id_without_a_token_has_no_bytes_and_no_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.token_bytes(151_935) is None
    assert tokenizer.token_text(151_935) == ""
    assert tokenizer.decode([151_935]) == ""


# --- chat template ---------------------------------------------------------------------------

MESSAGES = [{"role": "user", "content": "hello"}]


def test_chat_template_gives_the_prompts_ids(tokenizer: Tokenizer) -> None:
    ids = tokenizer.apply_chat_template(MESSAGES)
    assert ids == tokenizer.encode("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n")
    assert ids[0] == token_id_of("<|im_start|>")


def test_generation_prompt_can_be_left_out(tokenizer: Tokenizer) -> None:
    ids = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=False)
    assert ids == tokenizer.encode("<|im_start|>user\nhello<|im_end|>\n")


def test_tools_and_variables_reach_the_template(tokenizer: Tokenizer) -> None:
    tools = [{"type": "function", "function": {"name": "get_weather", "parameters": {}}}]
    ids = tokenizer.apply_chat_template(MESSAGES, tools=tools, enable_thinking=False)
    text = tokenizer.decode(ids, skip_special_tokens=False)
    assert text.startswith("<|im_start|>tools\nget_weather<|im_end|>")
    assert text.endswith("<|im_start|>assistant\n<think></think>")


def test_final_message_can_be_continued(tokenizer: Tokenizer) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": "the quick"}]
    ids = tokenizer.apply_chat_template(
        messages, add_generation_prompt=False, continue_final_message=True
    )
    assert tokenizer.decode(ids, skip_special_tokens=False).endswith("assistant\nthe quick")


def test_keys_that_are_none_count_as_absent(tokenizer: Tokenizer) -> None:
    with_none = [{"role": "assistant", "content": None, "name": None}]
    assert tokenizer.apply_chat_template(with_none) == tokenizer.apply_chat_template(
        [{"role": "assistant"}]
    )


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([{"role": "banned", "content": "x"}], "the role banned is not allowed"),
        ([{"role": "user", "content": 3}], "refused the messages"),
        ([{"content": "x"}], "role"),
        ([], "refused the messages"),
        (["hello"], "refused the messages"),
        ([{"role": "user", "content": "\ud83d"}], "lone surrogate U\\+D83D"),
    ],
)
def test_messages_that_the_template_cannot_render_are_refused(
    tokenizer: Tokenizer, messages: list, words: str
) -> None:
    with pytest.raises(InvalidRequestError, match=words) as error:
        tokenizer.apply_chat_template(messages)
    assert error.value.param == "messages"


@pytest.mark.parametrize("option", ["chat_template", "tokenize", "truncation", "return_dict"])
def test_requests_cannot_set_the_servers_template_options(
    tokenizer: Tokenizer, option: str
) -> None:
    with pytest.raises(InvalidRequestError, match=option) as error:
        tokenizer.apply_chat_template(MESSAGES, **{option: "{{ 1 }}"})
    assert error.value.param == "chat_template_kwargs"


def test_tokenizer_without_a_template_refuses_messages(tmp_path: Path) -> None:
    save_tiny_tokenizer(tmp_path, chat_template=None)
    with pytest.raises(InvalidRequestError, match="no chat template") as error:
        Tokenizer.from_directory(tmp_path).apply_chat_template(MESSAGES)
    assert error.value.param == "messages"

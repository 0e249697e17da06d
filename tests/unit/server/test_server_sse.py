"""Ready-made events say what rendering each chunk would say."""

import json

from hypothesis import given
from hypothesis import strategies as st

from moe_engine.server.protocol.chat import ChatChunkChoice, ChatCompletionChunk, ChatDelta
from moe_engine.server.protocol.completions import CompletionChoice, CompletionChunk
from moe_engine.server.sse import TextEvents

FIELDS = {"id": 'cmpl-"\\', "created": 7, "model": 'a "model"'}
# A decoder that replaces errors never makes half a surrogate pair.
texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


def completion(index, text):
    return CompletionChunk(**FIELDS, choices=[CompletionChoice(index=index, text=text)])


def chat(index, text):
    choice = ChatChunkChoice(index=index, delta=ChatDelta(content=text))
    return ChatCompletionChunk(**FIELDS, choices=[choice])


@given(st.sampled_from([completion, chat]), st.lists(st.tuples(st.integers(0, 3), texts)))
def test_an_event_holds_the_chunk_of_its_text(make_chunk, choices):
    events = TextEvents(make_chunk)
    for index, text in [*choices, (0, '\0"\\\n\r\u2028é🙂'), (1, "\0")]:
        event = events.render(index, text)
        assert event.startswith(b"data: ")
        assert event.endswith(b"\n\n")
        data = event[len(b"data: ") : -2]
        assert b"\n" not in data
        assert json.loads(data) == json.loads(make_chunk(index, text).model_dump_json())

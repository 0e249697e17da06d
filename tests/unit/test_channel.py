"""Control channels carry every message whole, show a dead peer, and admit no stranger."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import AuthenticationError
from multiprocessing.connection import wait
from typing import Any, get_args

import msgspec
import pytest

from moe_engine.dist.channel import Channel, ChannelClosed, ChannelListener, Endpoint
from moe_engine.types.messages import (
    AbortRequest,
    AddRequest,
    EngineReady,
    EngineStats,
    LoadProgress,
    Message,
    RankFailed,
    RankHello,
    RankReady,
    RankStarted,
    RequestRefused,
    RequestUpdate,
    RunStep,
    Shutdown,
    StartStepping,
    StepDone,
    ToCore,
    ToFrontEnd,
    ToRank,
    ToRankZero,
    Updates,
)
from moe_engine.types.results import FinishReason
from moe_engine.types.sampling import SamplingParams
from moe_engine.types.step import (
    GroupPlan,
    Logprobs,
    NewSequence,
    PromptLogprobs,
    SampledToken,
    SequenceStep,
    StepPlan,
    StepResult,
)

PARAMS = SamplingParams(
    n=2,
    temperature=1 / 3,
    seed=-(2**63),
    stop=["end", "é\n"],
    stop_token_ids=[7],
    max_tokens=9,
    logprobs=0,
    logit_bias={5: -1.5},
)
LOGPROBS = Logprobs(3, -0.1, 2, [4, 3], [-0.05, -0.1])
MESSAGES = [
    AddRequest("request-0", [1, 2, 3], PARAMS),
    AbortRequest("request-0"),
    Shutdown(),
    Updates(
        [
            RequestUpdate("a", [1], [LOGPROBS], [LOGPROBS], FinishReason.STOP, 7, 16),
            RequestUpdate("b"),
        ],
        EngineStats(1, 2, 3, 4, 5, 6, 7, 8, 9, 10),
    ),
    RequestRefused("a", "too long", "prompt", "context_length_exceeded", 413),
    LoadProgress("weights", 3, 8),
    EngineReady(4096, 151936, 100, 16, [1, 2], "two lines\nof summary"),
    RankFailed(3, "boom", "Traceback ...", "ConfigError", True),
    RankHello(5),
    RankReady(5, 1000),
    RankStarted(5),
    StartStepping(1000),
    RunStep(
        StepPlan(
            8,
            [
                GroupPlan(
                    [SequenceStep(1, 0, 3, [4, 5], 1 / 3), SequenceStep(2, 9, 1)],
                    [NewSequence(1, [1, 2, 3], 3, PARAMS, [7])],
                    [0],
                ),
                GroupPlan(),
            ],
        )
    ),
    StepDone(
        StepResult(
            8, 1, [SampledToken(1, 3, LOGPROBS), SampledToken(2, 4)], [PromptLogprobs(1, 2, [])]
        )
    ),
]
UNIONS = [ToCore, ToFrontEnd, ToRank, ToRankZero]
Connect = Callable[[Any, Any], tuple[Channel[Any], Channel[Any]]]


@pytest.fixture(params=["unix", "tcp"])
def listener(request, tmp_path) -> Iterator[ChannelListener]:
    address = str(tmp_path / "socket") if request.param == "unix" else ("127.0.0.1", 0)
    listener = ChannelListener(address)
    yield listener
    listener.close()


@pytest.fixture
def connect(listener) -> Iterator[Connect]:
    """Open a channel; gives its ends, the first with the first union to receive."""
    opened: list[Channel[Any]] = []

    def open_channel(received_here: Any, received_there: Any) -> tuple[Channel[Any], Channel[Any]]:
        with ThreadPoolExecutor(1) as pool:
            accepted = pool.submit(listener.accept, received_here)
            there = listener.endpoint.connect(received_there)
            opened.extend((accepted.result(timeout=10), there))
        return opened[-2], opened[-1]

    yield open_channel
    for channel in opened:
        channel.close()


def test_every_message_type_has_a_sample():
    types = {kind for union in UNIONS for kind in get_args(union)}
    assert types == {type(message) for message in MESSAGES}
    assert types <= set(Message.__subclasses__())


@pytest.mark.parametrize("union", UNIONS, ids=["ToCore", "ToFrontEnd", "ToRank", "ToRankZero"])
def test_every_message_arrives_as_it_was_sent_in_both_directions(connect, union):
    here, there = connect(union, union)
    messages = [message for message in MESSAGES if isinstance(message, get_args(union))]
    for sender, receiver in ((there, here), (here, there)):
        for message in messages:
            sender.send(message)
        for message in messages:
            received = receiver.receive()
            assert received == message
            assert type(received) is type(message)


def test_an_endpoint_can_be_handed_on_as_text(listener):
    text = msgspec.json.encode(listener.endpoint)
    endpoint = msgspec.json.decode(text, type=Endpoint)
    assert endpoint == listener.endpoint
    assert len(bytes.fromhex(endpoint.key)) == 32


def test_listeners_have_keys_of_their_own(listener, tmp_path):
    other = ChannelListener(str(tmp_path / "other"))
    assert other.endpoint.key != listener.endpoint.key
    other.close()


def test_messages_sent_by_many_threads_stay_whole(connect):
    here, there = connect(ToCore, ToCore)
    messages = [AddRequest(str(i), [i] * 20_000, SamplingParams()) for i in range(12)]
    threads = [threading.Thread(target=there.send, args=(message,)) for message in messages]
    for thread in threads:
        thread.start()
    received = [here.receive() for _ in messages]
    for thread in threads:
        thread.join()
    assert sorted(received, key=lambda message: int(message.request_id)) == messages


def test_poll_tells_whether_a_message_waits(connect):
    here, there = connect(ToCore, ToCore)
    assert not here.poll(0)
    there.send(Shutdown())
    assert here.poll(10)
    assert here.receive() == Shutdown()
    assert not here.poll(0)


def test_channels_can_be_waited_for_together(connect):
    silent, speaking, leaving = (connect(ToCore, ToCore) for _ in range(3))
    speaking[1].send(Shutdown())
    assert wait([silent[0], speaking[0], leaving[0]], timeout=10) == [speaking[0]]
    leaving[1].close()
    assert wait([silent[0], leaving[0]], timeout=10) == [leaving[0]]


def test_a_peer_that_hung_up_is_seen_once_its_messages_are_read(connect):
    here, there = connect(ToCore, ToCore)
    there.send(Shutdown())
    there.close()
    assert here.receive() == Shutdown()
    assert here.poll(10)
    with pytest.raises(ChannelClosed):
        here.receive()


def test_sending_to_a_peer_that_hung_up_is_refused(connect):
    here, there = connect(ToCore, ToCore)
    there.close()
    assert here.poll(10)

    def send_many() -> None:  # over TCP the first message may seem to arrive
        for _ in range(100):
            here.send(AddRequest("a", [1] * 10_000, SamplingParams()))

    with pytest.raises(ChannelClosed):
        send_many()


def test_a_channel_that_was_hung_up_here_is_closed(connect):
    here, _ = connect(ToCore, ToCore)
    here.close()
    assert here.poll(0)
    with pytest.raises(ChannelClosed):
        here.receive()
    with pytest.raises(ChannelClosed):
        here.send(Shutdown())


def test_a_message_of_another_union_is_refused(connect):
    here, there = connect(ToCore, ToFrontEnd)
    there.send(RankHello(1))
    with pytest.raises(msgspec.ValidationError, match="RankHello"):
        here.receive()


def test_a_peer_without_the_key_is_refused_on_both_sides(listener):
    stranger = Endpoint(listener.endpoint.address, "00" * 32)
    with ThreadPoolExecutor(1) as pool:
        accepted = pool.submit(listener.accept, ToCore)
        with pytest.raises(AuthenticationError):
            stranger.connect(ToCore)
        with pytest.raises(AuthenticationError):
            accepted.result(timeout=10)

"""Items of another thread reach their queues in order, and wake the event loop once together."""

import asyncio
import threading

import pytest

from moe_engine.engine.postbox import Postbox


def test_items_arrive_in_order_whatever_the_threads_timing():
    async def run():
        postbox = Postbox(asyncio.get_running_loop())
        queues = [asyncio.Queue() for _ in range(3)]

        def feed():
            for number in range(3000):
                postbox.put(queues[number % 3], number)

        thread = threading.Thread(target=feed)
        thread.start()
        received = [[await queue.get() for _ in range(1000)] for queue in queues]
        thread.join()
        assert received == [list(range(first, 3000, 3)) for first in range(3)]

    asyncio.run(run())


def test_items_put_while_the_loop_is_busy_take_one_call():
    class Loop:
        def __init__(self):
            self.calls = []

        def call_soon_threadsafe(self, callback):
            self.calls.append(callback)

    loop, queue = Loop(), asyncio.Queue()
    postbox = Postbox(loop)
    for number in range(5):
        postbox.put(queue, number)
    assert len(loop.calls) == 1
    loop.calls[0]()
    assert [queue.get_nowait() for _ in range(5)] == list(range(5))
    postbox.put(queue, 5)
    assert len(loop.calls) == 2


def test_a_closed_loop_is_told_every_time():
    loop = asyncio.new_event_loop()
    loop.close()
    postbox = Postbox(loop)
    for _ in range(2):
        with pytest.raises(RuntimeError):
            postbox.put(asyncio.Queue(), 1)

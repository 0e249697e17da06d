"""What the parent of the rank processes leaves behind."""

import threading
import time

from moe_engine.config import EngineConfig
from moe_engine.engine import launcher


def test_kill_waits_for_another_thread_that_is_cleaning_up(monkeypatch):
    """Or the program might end, and with it that thread, before the directory is gone."""
    begun, done = threading.Event(), threading.Event()

    def clean_up_slowly(processes, directory):
        begun.set()
        time.sleep(0.2)
        directory.rmdir()
        done.set()

    monkeypatch.setattr(launcher, "_clean_up", clean_up_slowly)
    monkeypatch.setattr(launcher.RankProcesses, "_start", lambda *_: None)
    ranks = launcher.RankProcesses(EngineConfig())
    thread = threading.Thread(target=ranks.kill)
    thread.start()
    assert begun.wait(10)
    ranks.kill()
    assert done.is_set()
    thread.join()
    ranks.channel.close()

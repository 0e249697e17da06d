"""The cycle collector is kept from walking what is there to stay."""

import subprocess
import sys

CODE = """
import gc
from moe_engine import garbage

class Node:
    pass

before = len(gc.get_objects())
garbage.settle()
assert gc.isenabled() and gc.get_freeze_count() > 0.9 * before
assert len(gc.get_objects()) < 100

events = []
gc.callbacks.append(lambda phase, _: events.append(phase))
steps = [[{}] for _ in range(2000)]  # what a step makes
assert events == []
import weakref
node = Node()
node.self = node
alive = weakref.ref(node)
del node
cycles = [[] for _ in range(garbage.YOUNG_OBJECTS + 1)]
assert events and alive() is None  # cycles are found all the same
"""


def test_steps_do_not_collect_but_cycles_are_still_found():
    subprocess.run([sys.executable, "-c", CODE], check=True)

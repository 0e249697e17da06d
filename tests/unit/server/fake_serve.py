"""``python fake_serve.py KNOBS FLAGS...``: the real command line around the fake engine.

KNOBS is JSON: ``start_error`` (class name and message), ``start_s``, ``die_after_start_s``,
``delay_s``.
"""

from __future__ import annotations

import asyncio
import json
import sys
import types

from moe_engine import errors, serve
from tests.unit.server.fake_engine import FakeEngine

knobs = json.loads(sys.argv[1])


class KnobbedEngine(FakeEngine):
    async def start(self) -> None:
        self.delay_s = knobs.get("delay_s", 0.0)
        await asyncio.sleep(knobs.get("start_s", 0.0))
        if "start_error" in knobs:
            name, message = knobs["start_error"]
            self.start_error = getattr(errors, name)(message)
        await super().start()
        if "die_after_start_s" in knobs:
            asyncio.get_running_loop().call_later(knobs["die_after_start_s"], self.die)


package = types.ModuleType("moe_engine.engine")
package.__path__ = []
module = types.ModuleType("moe_engine.engine.async_llm")
KnobbedEngine.from_config = KnobbedEngine
module.AsyncMoEEngine = KnobbedEngine
sys.modules.update({package.__name__: package, module.__name__: module})
sys.exit(serve.main(sys.argv[2:]))

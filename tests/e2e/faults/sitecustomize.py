"""Found through PYTHONPATH by the rank processes of one test: makes one rank raise in a step."""

import os

if os.environ.get("RANK") == os.environ.get("RANK_THAT_RAISES", "none"):
    from moe_engine.engine.runner import ModelRunner

    launch = ModelRunner.launch

    def launch_or_raise(self, plan):
        if plan.step_id == 5:
            raise ValueError("planted")
        return launch(self, plan)

    ModelRunner.launch = launch_or_raise

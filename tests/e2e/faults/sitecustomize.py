"""Found through PYTHONPATH by the rank processes of a test: one raises in a step, or finds that
another one, which is well but late, has sent it nothing."""

import os

if os.environ.get("RANK") == os.environ.get("RANK_THAT_RAISES", "none"):
    from moe_engine.engine.runner import ModelRunner

    launch = ModelRunner.launch

    def launch_or_raise(self, plan):
        if plan.step_id == 5:
            raise ValueError("planted")
        return launch(self, plan)

    ModelRunner.launch = launch_or_raise

if os.environ.get("RANK") == os.environ.get("RANK_THAT_WAITS_IN_VAIN", "none"):
    from moe_engine.dist.exchange import ExchangeSelector
    from moe_engine.errors import ExchangeTimeout

    checked = []

    def check_or_give_up(self):
        checked.append(self)
        if len(checked) == 5:
            raise ExchangeTimeout(missing=1, waiter=0, phase="combine", number=376)

    ExchangeSelector.check = check_or_give_up

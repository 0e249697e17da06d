"""Plain data shared by every layer: sampling parameters, results, step plans, messages."""

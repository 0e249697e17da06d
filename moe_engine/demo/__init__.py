"""The embedded demo model: what the engine serves when no checkpoint is named."""

"""Models: files that only compose layers."""

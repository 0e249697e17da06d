"""Layers that know their own sharding: each names the checkpoint slices it needs."""

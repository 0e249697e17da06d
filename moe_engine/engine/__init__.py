"""The engine: scheduling, execution and sampling."""

"""Pydantic models of what goes over the wire, one module per endpoint family.

Requests are strict: no type is coerced, an unknown field is an error, and null means "left out".
"""

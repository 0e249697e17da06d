"""Every exception that moe_engine raises on purpose.

Users' mistakes are `ValueError`s that name the offending value and the limit;
`assert` is kept for our own invariants.
"""

from __future__ import annotations


class MoEEngineError(Exception):
    """Base of all errors raised by moe_engine."""


class ConfigError(MoEEngineError, ValueError):
    """A configuration that cannot work: unknown key, indivisible layout, too little memory."""


class CheckpointError(MoEEngineError, ValueError):
    """A checkpoint that cannot be loaded; the message lists every tensor at fault."""


class InvalidRequestError(MoEEngineError, ValueError):
    """A request that cannot be served as asked; becomes an HTTP 4xx.

    Args:
        message: what was wrong, with the value and the limit.
        param: name of the offending request field, or None when it is the whole request.
        status: the HTTP status that an HTTP front end should answer with.
        code: OpenAI's machine-readable error code, e.g. ``context_length_exceeded``.
    """

    def __init__(
        self, message: str, *, param: str | None = None, status: int = 400, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.status = status
        self.code = code


class IllegalTransitionError(MoEEngineError, RuntimeError):
    """A request was asked to do what its state does not allow (a bug of ours, never a user's)."""

    def __init__(self, request_id: str, state: str, event: str) -> None:
        super().__init__(f"request {request_id!r} in state {state} cannot take event {event}")
        self.request_id = request_id
        self.state = state
        self.event = event


class ExchangeTimeout(MoEEngineError, RuntimeError):
    """A rank did not send what another one waited for.

    Args:
        missing: the rank that is to blame.
        waiter: the first rank that gave it up.
        phase: ``dispatch``, ``combine``, ``all-reduce`` or ``all-gather``.
        number: of the exchange, or of the collective, counted from 1 since the start or the last
            reset.
    """

    def __init__(self, missing: int, waiter: int, phase: str, number: int) -> None:
        super().__init__(
            f"rank {missing} has sent nothing to rank {waiter} in the {phase} of exchange {number}"
        )
        self.missing = missing
        self.waiter = waiter
        self.phase = phase
        self.number = number


class EngineDeadError(MoEEngineError, RuntimeError):
    """The engine cannot serve any more; names the rank that failed and carries its traceback.

    Args:
        message: what happened.
        rank: the global rank that failed, or None if it is not known.
        details: the failed rank's traceback, empty when the process was killed.
    """

    def __init__(self, message: str, *, rank: int | None = None, details: str = "") -> None:
        super().__init__(message if not details else f"{message}\n{details}")
        self.rank = rank
        self.details = details

"""Typed messages over local or TCP connections; a dead peer shows at once as end of file.

`multiprocessing.connection` gives authenticated, ordered byte messages over Unix sockets and TCP;
`msgspec` gives the types. Nothing is pickled.
"""

from __future__ import annotations

import secrets
import threading
from multiprocessing import connection
from typing import Any, Generic, TypeVar

import msgspec

Received = TypeVar("Received")


class ChannelClosed(Exception):
    """The peer has gone away."""


class Channel(Generic[Received]):
    """One bidirectional stream of messages; `send` may be called from several threads.

    Args:
        conn: the connection, owned by the channel from here on.
        received: the union of message types that may arrive.
    """

    def __init__(self, conn: connection.Connection, received: Any) -> None:
        self._conn = conn
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(received)
        self._send_lock = threading.Lock()

    def send(self, message: Any) -> None:
        """Send one message; raises `ChannelClosed` if the peer has gone."""
        data = self._encoder.encode(message)
        try:
            with self._send_lock:
                self._conn.send_bytes(data)
        except (OSError, ValueError) as error:
            raise ChannelClosed(str(error)) from error

    def receive(self) -> Received:
        """Wait for one message; raises `ChannelClosed` if the peer has gone."""
        try:
            data = self._conn.recv_bytes()
        except (EOFError, OSError) as error:
            raise ChannelClosed(str(error)) from error
        message: Received = self._decoder.decode(data)
        return message

    def poll(self, timeout: float) -> bool:
        """Whether a message (or the peer's end) has arrived within ``timeout`` seconds."""
        try:
            return self._conn.poll(timeout)
        except OSError:
            return True

    def fileno(self) -> int:
        """So that `multiprocessing.connection.wait` takes channels."""
        return self._conn.fileno()

    def close(self) -> None:
        """Hang up."""
        self._conn.close()


class Endpoint(msgspec.Struct, frozen=True):
    """Where a `ChannelListener` waits: a Unix socket path or (host, port), and the secret."""

    address: str | tuple[str, int]
    key: str

    def connect(self, received: Any) -> Channel[Any]:
        """Open a channel to the listener."""
        return Channel(connection.Client(self.address, authkey=bytes.fromhex(self.key)), received)


class ChannelListener:
    """Accepts channels at ``address``; (host, 0) lets the system choose the port."""

    def __init__(self, address: str | tuple[str, int], backlog: int = 128) -> None:
        self._key = secrets.token_bytes(32)
        self._listener = connection.Listener(address, backlog=backlog, authkey=self._key)

    @property
    def endpoint(self) -> Endpoint:
        """What a peer needs to connect; the key is a secret."""
        return Endpoint(self._listener.address, self._key.hex())

    def accept(self, received: Any) -> Channel[Any]:
        """Wait for one peer."""
        return Channel(self._listener.accept(), received)

    def close(self) -> None:
        """Stop listening."""
        self._listener.close()

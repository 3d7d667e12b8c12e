"""Whoever asks for a token while many others do waits for its turn."""

import socket
import threading
import time
from pathlib import Path

import pytest

from kvproto.control_token import TOKEN_SOCKET, TokenRefusedError, ask_token


def test_a_full_queue_is_waited_for(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as door:
        door.bind(str(tmp_path / TOKEN_SOCKET))
        door.listen(0)
        first = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        first.connect(str(tmp_path / TOKEN_SOCKET))
        with pytest.raises(TimeoutError, match="too many"):
            ask_token(tmp_path, 0.05)

        def serve() -> None:
            door.accept()[0].close()
            peer, _ = door.accept()
            peer.sendall(b"no")
            peer.close()

        thread = threading.Thread(target=serve)
        began = time.monotonic()
        timer = threading.Timer(0.05, thread.start)
        timer.start()
        with pytest.raises(TokenRefusedError):  # the answer came: it is no token
            ask_token(tmp_path, 10.0)
        assert time.monotonic() - began < 10.0
        timer.join()
        thread.join()
        first.close()

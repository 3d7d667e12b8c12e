"""Figures are served to this host or to nobody."""

from pathlib import Path

import pytest

from kvstored.config import ConfigError, load
from kvstored.http_address import TcpAddress, address_of


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("off", None),
        ("127.0.0.1:9755", TcpAddress("127.0.0.1", 9755)),
        ("localhost:1", TcpAddress("127.0.0.1", 1)),
        ("127.8.9.10:65535", TcpAddress("127.8.9.10", 65535)),
        ("[::1]:9755", TcpAddress("::1", 9755)),
        ("/run/kvstored/metrics.sock", Path("/run/kvstored/metrics.sock")),
    ],
)
def test_an_address_of_this_host_is_taken(text: str, address: object) -> None:
    assert address_of(text) == address
    loaded = load(None, {"HOME": "/tmp"}, {"--metrics-listen": text})
    assert address_of(loaded.config.metrics_listen) == address, "and what is shown of it means the same"


@pytest.mark.parametrize(
    "text",
    ["0.0.0.0:9755", "[::]:9755", "10.0.0.1:80", "[2001:db8::1]:80", "[::ffff:10.0.0.1]:80", "169.254.1.1:9755"],
)
def test_an_address_that_others_reach_is_refused_with_a_way_out(text: str) -> None:
    with pytest.raises(ConfigError, match=r"other hosts.*proxy"):
        load(None, {"HOME": "/tmp"}, {"--metrics-listen": text})


@pytest.mark.parametrize(
    "text",
    ["", "on", "9755", "127.0.0.1", "127.0.0.1:", "127.0.0.1:65536", "127.0.0.1:-1", "127.0.0.1:٣", "host.example:1",
     "relative/metrics.sock", "/" + "x" * 100, "/run/a\nb", "127.1:80", "[127.0.0.1", "::1:9755x"],
)  # fmt: skip
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="metrics-listen"):
        load(None, {"HOME": "/tmp"}, {"--metrics-listen": text})

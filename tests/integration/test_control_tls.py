"""Operators of other hosts: by mutual TLS or not at all. A real daemon, real certificates, and kvctl."""

import json
import re
import ssl
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.x509.oid import NameOID
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvproto import control_pb2, control_pb2_grpc
from kvstored.cli import main
from tests.certificates import MINUTE, Authority, Pair
from tests.node import Node, opened_by

WAIT_S = 20.0


@dataclass
class Remote:
    """A daemon that listens on an address, and who may come."""

    node: Node
    address: str
    servers: Authority
    operators: Authority
    server: Pair
    operator: Pair

    def kvctl(self, *words: str, ca: Path | None = None, pair: Pair | None = None) -> subprocess.CompletedProcess[str]:
        pair = pair or self.operator
        tls = {"ca": ca or self.servers.certificate, "cert": pair.certificate, "key": pair.key}
        options = [f"--tls-{name}={path}" for name, path in tls.items()]
        command = [sys.executable, "-m", "kvctl", "--address", self.address, *options, "-o", "json", *words]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)

    def local(self, *words: str) -> dict[str, Any]:
        command = [sys.executable, "-m", "kvctl", "--runtime-dir", str(self.node.run), "-o", "json", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        said: dict[str, Any] = json.loads(done.stdout)
        return said

    def ping(self, credentials: grpc.ChannelCredentials | None) -> grpc.StatusCode:
        """What becomes of one call."""
        channel = grpc.secure_channel(self.address, credentials) if credentials else grpc.insecure_channel(self.address)
        with channel:
            try:
                control_pb2_grpc.ControlStub(channel).GetStatus(control_pb2.GetStatusRequest(), timeout=WAIT_S)
            except grpc.RpcError as error:
                code: grpc.StatusCode = error.code()
                return code
        return grpc.StatusCode.OK

    def credentials(self, pair: Pair | None) -> grpc.ChannelCredentials:
        """Of a client with this certificate, or none."""
        root = self.servers.certificate.read_bytes()
        if pair is None:
            return grpc.ssl_channel_credentials(root)
        return grpc.ssl_channel_credentials(root, pair.key.read_bytes(), pair.certificate.read_bytes())

    def served_certificate(self) -> str:
        """That of the daemon, PEM."""
        host, port = self.address.split(":")
        return ssl.get_server_certificate((host, int(port)), timeout=WAIT_S)


@pytest.fixture(scope="module")
def remote() -> Iterator[Remote]:
    with Node(disks=0, dram="16MiB") as node:
        servers, operators = Authority(node.home / "tls", "servers"), Authority(node.home / "tls", "operators")
        server = servers.issue("host-7", server=True)
        node.start("--control-listen", "127.0.0.1:0", *files(server, operators))
        found = re.search(r"mutual TLS on 127\.0\.0\.1:0, port ([0-9]+)", node.log())
        assert found is not None, node.log()
        yield Remote(node, f"127.0.0.1:{found[1]}", servers, operators, server, operators.issue("erika"))
        node.assert_alive()


def files(server: Pair, operators: Authority) -> tuple[str, ...]:
    return (
        "--control-certificate", str(server.certificate), "--control-key", str(server.key),
        "--control-client-ca", str(operators.certificate),
    )  # fmt: skip


def inet_sockets(pid: int) -> int:
    """TCP sockets of a process, on whatever address."""
    mine = {*opened_by(pid)}
    tables = [Path("/proc/net/tcp").read_text(), Path("/proc/net/tcp6").read_text()]
    inodes = [line.split()[9] for table in tables for line in table.splitlines()[1:]]
    return sum(f"socket:[{inode}]" in mine for inode in inodes)


def test_who_has_a_certificate_sees_and_acts_and_is_written_down_by_name(remote: Remote) -> None:
    done = remote.kvctl("status")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["status"]["pid"] == remote.node.daemon.process.pid  # type: ignore[union-attr]
    done = remote.kvctl("drain", "--yes")
    assert done.returncode == 0, done.stderr
    with grpc.insecure_channel(f"unix:{remote.node.run}/control.sock") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        assert stub.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.NOT_SERVING
    assert remote.kvctl("undrain").returncode == 0
    acts = json.dumps(remote.local("audit"))
    assert acts.count("erika") == 2
    assert "drain" in acts


NAMELESS = {
    "nothing": x509.Name([]),
    "an organization": x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "an organization")]),
    "blanks": x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "  ")]),
}


@pytest.mark.parametrize("subject", NAMELESS.values(), ids=NAMELESS)
def test_a_certificate_without_a_common_name_acts_under_another_one_that_it_has(
    remote: Remote, subject: x509.Name
) -> None:
    name = "spiffe://example.org/operators/frida"
    frida = remote.operators.issue("frida", subject=subject, also=(name, "spiffe://example.org/other"))
    done = remote.kvctl("drain", "--yes", pair=frida)
    assert done.returncode == 0, done.stderr
    assert remote.kvctl("undrain", pair=frida).returncode == 0
    acts = remote.local("audit")["audit"]["acts"]
    assert [(act["verb"], act["who"], act["outcome"]) for act in acts[-2:]] == [
        ("drain", name, "done"), ("undrain", name, "done"),
    ]  # fmt: skip


@pytest.mark.parametrize("subject", NAMELESS.values(), ids=NAMELESS)
def test_a_certificate_that_names_nobody_is_refused(remote: Remote, subject: x509.Name) -> None:
    nobody = remote.operators.issue("nobody", subject=subject)
    assert remote.ping(remote.credentials(nobody)) is grpc.StatusCode.UNAUTHENTICATED
    done = remote.kvctl("drain", "--yes", pair=nobody)
    assert done.returncode == 1
    assert "names nobody" in done.stderr
    assert remote.local("status")["status"]["serving"]


def test_archives_are_of_the_host_that_kvctl_runs_on(remote: Remote, tmp_path: Path) -> None:
    remote.local("export", str(tmp_path / "empty.kva"))
    for words in (("export", str(tmp_path / "a.kva")), ("import", "--yes", str(tmp_path / "empty.kva"))):
        done = remote.kvctl(*words)
        assert done.returncode == 2
        assert "leave --address out" in done.stderr
    assert not (tmp_path / "a.kva").exists()


@pytest.mark.parametrize("who", ["nobody", "a stranger", "one whose time is over", "a server", "the daemon itself"])
def test_others_are_not_let_in(remote: Remote, who: str) -> None:
    strangers = Authority(remote.node.home / "others", "strangers")
    pairs = {
        "nobody": None,
        "a stranger": strangers.issue("erika"),
        "one whose time is over": remote.operators.issue("late", age=90 * MINUTE),
        "a server": remote.operators.issue("server", server=True),
        "the daemon itself": remote.server,
    }
    assert remote.ping(remote.credentials(pairs[who])) is grpc.StatusCode.UNAVAILABLE
    assert remote.ping(remote.credentials(remote.operator)) is grpc.StatusCode.OK, "the control"


def test_nothing_is_said_in_the_clear(remote: Remote) -> None:
    assert remote.ping(None) is grpc.StatusCode.UNAVAILABLE
    assert remote.kvctl("ping", "--count", "1").returncode == 0


def test_kvctl_tells_its_daemon_from_one_that_only_says_so(remote: Remote) -> None:
    strangers = Authority(remote.node.home / "false", "strangers")
    done = remote.kvctl("status", ca=strangers.certificate)
    assert done.returncode == 3
    assert "certificate" in done.stderr
    done = remote.kvctl("doctor")
    assert (done.returncode, "leave --address out" in done.stderr) == (2, True)


def test_a_certificate_is_renewed_by_putting_another_one_in_its_place(remote: Remote) -> None:
    before = remote.served_certificate()
    assert before == remote.server.certificate.read_text()
    remote.servers.issue("host-7", server=True)
    assert remote.served_certificate() == remote.server.certificate.read_text() != before
    good = remote.server.certificate.read_text()
    remote.server.certificate.write_text("no certificate at all")
    assert remote.served_certificate() == good, "what is no good changes nothing"
    assert remote.ping(remote.credentials(remote.operator)) is grpc.StatusCode.OK
    assert "the certificate of before serves on" in remote.node.log()
    remote.server.certificate.write_text(good)


def test_without_an_address_no_port_is_open(remote: Remote) -> None:
    assert remote.node.daemon is not None
    assert inet_sockets(remote.node.daemon.process.pid) >= 1, "the control"
    with Node(disks=0, dram="16MiB") as plain:
        assert inet_sockets(plain.start().process.pid) == 0


@pytest.fixture(scope="module")
def pems(tmp_path_factory: pytest.TempPathFactory) -> tuple[Authority, Pair]:
    authority = Authority(tmp_path_factory.mktemp("tls"), "authority")
    return authority, authority.issue("host", server=True)


def checked(tmp_path: Path, text: str) -> int:
    file = tmp_path / "kvstored.toml"
    file.write_text(f'[daemon]\nruntime_dir = "{tmp_path}"\n{text}\n')
    return main(["config", "check", str(file)])


@pytest.mark.parametrize("address", ["0.0.0.0:9756", "[::]:9756", "192.0.2.7:9756", "127.0.0.1:9756"])
def test_an_address_without_all_three_files_is_refused(
    tmp_path: Path, pems: tuple[Authority, Pair], capsys: pytest.CaptureFixture[str], address: str
) -> None:
    authority, pair = pems
    lines = {
        "certificate": str(pair.certificate), "key": str(pair.key), "client_ca": str(authority.certificate)
    }  # fmt: skip
    for missing in lines:
        some = "\n".join(f'{name} = "{path}"' for name, path in lines.items() if name != missing)
        assert checked(tmp_path, f'[control]\nlisten = "{address}"\n{some}') == 78
        assert f"nobody known without control.{missing}" in capsys.readouterr().err
    every = "\n".join(f'{name} = "{path}"' for name, path in lines.items())
    assert checked(tmp_path, f'[control]\nlisten = "{address}"\n{every}') == 0, "the control"
    assert checked(tmp_path, f"[control]\n{every}") == 78
    assert "is of no use without control.listen" in capsys.readouterr().err
    assert checked(tmp_path, f'[metrics]\nlisten = "{address}"') == (0 if address.startswith("127.") else 78)


def test_files_that_do_not_go_together_or_are_open_to_others_are_refused(
    tmp_path: Path, pems: tuple[Authority, Pair], capsys: pytest.CaptureFixture[str]
) -> None:
    authority, pair = pems
    other = authority.issue("other", server=True)
    exposed = authority.issue("exposed", server=True)
    exposed.key.chmod(0o644)
    said = {
        (pair.certificate, other.key, authority.certificate): "no certificate and its key",
        (pair.certificate, exposed.key, authority.certificate): "open to others",
        (pair.certificate, pair.key, pair.key): "no authority's certificate",
        (pair.certificate, tmp_path / "gone", authority.certificate): "cannot be read",
    }
    for (certificate, key, client_ca), why in said.items():
        lines = f'listen = "127.0.0.1:9756"\ncertificate = "{certificate}"\nkey = "{key}"\nclient_ca = "{client_ca}"'
        assert checked(tmp_path, f"[control]\n{lines}") == 78
        assert why in capsys.readouterr().err


@pytest.mark.parametrize(
    "text", ["9756", "host:9756", "127.0.0.1", "127.0.0.1:99999", "::1:9756", "/run/x", "1.1.1.1:-1"]
)
def test_what_is_no_address_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    assert checked(tmp_path, f'[control]\nlisten = "{text}"') == 78
    assert "control.listen" in capsys.readouterr().err

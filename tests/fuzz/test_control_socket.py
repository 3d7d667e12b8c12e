"""Random and damaged requests on the control socket: a status code for each, and a daemon that serves on."""

import random
from collections import Counter
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from bench.process import DaemonProcess
from kvproto import control_pb2 as pb
from kvproto import control_pb2_grpc
from kvproto.control_token import TOKEN_KEY, ask_token
from tests.raw import raw_client, real_daemon

SEED = 15
ROUNDS = 600
ROUNDS_LONG = 60_000
SERVICE = pb.DESCRIPTOR.services_by_name["Control"]
# What an operator can be told. INTERNAL only by gRPC itself, of bytes that are no message.
KNOWN = {
    grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
}  # fmt: skip
NO_MESSAGE = "Exception deserializing request"


def test_a_daemon_outlives_random_and_damaged_requests() -> None:
    bombard(ROUNDS)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_a_daemon_outlives_many_more_of_them() -> None:
    bombard(ROUNDS_LONG)


def bombard(rounds: int) -> None:
    print(f"seed {SEED}")
    chance, codes = random.Random(SEED), Counter[grpc.StatusCode]()
    with real_daemon("--ring", "1MiB") as daemon, raw_client(daemon.runtime_dir) as bystander:
        namespace = bystander.open()
        before = descriptors(daemon)
        with grpc.insecure_channel(f"unix:{daemon.runtime_dir}/control.sock") as channel:
            for number in range(rounds):
                if number % 500 == 0:
                    fresh = ask_token(daemon.runtime_dir, 10.0)
                    token = fresh.token if fresh else ""
                method = chance.choice(SERVICE.methods)
                content = request_of(chance, GetMessageClass(method.input_type)())
                metadata = chance.choice([((TOKEN_KEY, token),), ((TOKEN_KEY, "no token"),), ()])
                code, text = asked(channel, method, content, metadata)
                assert code in KNOWN or (code is grpc.StatusCode.INTERNAL and NO_MESSAGE in text), (
                    f"{method.name} of {content.hex()}: {code}, {text}"
                )
                codes[code] += 1
                if number % 100 == 0:
                    bystander.ping()
                    assert daemon.process.poll() is None
            assert {grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND} <= codes.keys()
            stub = control_pb2_grpc.ControlStub(channel)
            assert stub.GetStatus(pb.GetStatusRequest()).pid == daemon.process.pid
        assert bystander.lease(namespace, [bytes(32)]).lease == 0
        while descriptors(daemon) > before + 8:
            bystander.ping()


def asked(
    channel: Any, method: Any, content: bytes, metadata: tuple[tuple[str, str], ...]
) -> tuple[grpc.StatusCode, str]:
    """What becomes of one call, its answer read as bytes."""
    path = f"/{SERVICE.full_name}/{method.name}"
    try:
        if method.server_streaming:
            stream = channel.unary_stream(path)(content, timeout=0.2, metadata=metadata)
            for _ in range(20):
                next(stream, None)
            stream.cancel()
        else:
            channel.unary_unary(path)(content, timeout=20.0, metadata=metadata)
    except grpc.RpcError as error:
        return error.code(), error.details() or ""
    return grpc.StatusCode.OK, ""


def request_of(chance: random.Random, message: Message) -> bytes:
    """Mostly a message of the right kind with fields that anything may be in, sometimes cut, flipped, or noise."""
    fill(chance, message, 0)
    content = bytearray(message.SerializeToString())
    how = chance.random()
    if how < 0.1:
        return chance.randbytes(chance.randrange(200))
    if how < 0.2 and content:
        del content[chance.randrange(len(content)) :]
    elif how < 0.3 and content:
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    return bytes(content)


def fill(chance: random.Random, message: Message, depth: int) -> None:
    field: Any
    for field in message.DESCRIPTOR.fields:
        if chance.random() < 0.4:
            continue
        repeated = bool(field.is_repeated)
        if field.message_type is not None:
            if depth < 3 and not repeated:
                getattr(message, field.name).SetInParent()
                fill(chance, getattr(message, field.name), depth + 1)
        elif repeated:
            getattr(message, field.name).extend(value(chance, field) for _ in range(chance.choice([0, 1, 3, 1025])))
        else:
            setattr(message, field.name, value(chance, field))


def value(chance: random.Random, field: Any) -> object:
    kind = field.cpp_type
    if kind in (field.CPPTYPE_DOUBLE, field.CPPTYPE_FLOAT):
        return chance.choice([0.0, -1.0, 1.0, 0.5, 1e300, float("nan"), float("inf")])
    if kind == field.CPPTYPE_BOOL:
        return chance.random() < 0.5
    if kind == field.CPPTYPE_STRING:
        if field.type == field.TYPE_BYTES:
            return chance.choice([b"", bytes(32), chance.randbytes(32), chance.randbytes(31)])
        words = ["", "uid-0", "dram", "disk", "lru", "density", "nobody", "00" * 32, "zz" * 32, "\x1b[2J", "x" * 2000]
        return chance.choice(words)
    top = (1 << 63) - 1 if kind in (field.CPPTYPE_INT64, field.CPPTYPE_UINT64) else (1 << 31) - 1
    return chance.choice([0, 1, 2, 1024, 1 << 20, top])


def descriptors(daemon: DaemonProcess) -> int:
    return sum(1 for _ in Path(f"/proc/{daemon.process.pid}/fd").iterdir())

"""Which engine an address of the remote tier stands for."""

import sys

from kvstored.remote_address import MOONCAKE, RemoteAddress
from kvstored.remote_port import Backend


def open_backend(address: RemoteAddress, deadline_s: float) -> Backend:
    """Raises RemoteError for an address that its library does not take; whether it answers is found out later."""
    if address.scheme == MOONCAKE:
        from kvstored.remote_mooncake import MooncakeAddress, MooncakeBackend  # noqa: PLC0415

        mooncake = MooncakeBackend(MooncakeAddress(address.bucket, python=address.python or sys.executable), deadline_s)
        mooncake.begin()
        return mooncake
    from kvstored.remote_s3 import S3Backend  # noqa: PLC0415  only where it is wanted

    return S3Backend(address, deadline_s)

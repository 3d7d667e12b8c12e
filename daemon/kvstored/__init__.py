"""The daemon: process, sockets, event loop, leaf threads. All state of the store belongs to the owner thread."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("kvstored")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"

"""`kvctl completion`: what a shell is to read so that Tab knows kvctl's commands and options."""

import os
from enum import StrEnum
from typing import Annotated, Final

import typer
from typer._completion_classes import completion_init
from typer.completion import shell_complete
from typer.main import get_command

from kvctl.program import app, command

__all__ = ["Shell", "completion", "prepare"]

VARIABLE: Final = "_KVCTL_COMPLETE"  # set by the script when it asks what could follow


class Shell(StrEnum):
    """Those that can."""

    BASH = "bash"
    ZSH = "zsh"
    FISH = "fish"


def prepare() -> None:
    """Before a command line is read: a shell may be asking what could follow."""
    if VARIABLE in os.environ:
        completion_init()


@command("completion")
def completion(shell: Annotated[Shell, typer.Argument(metavar="SHELL", help="bash, zsh or fish.")]) -> None:
    """A script for Tab: bash and zsh, eval "$(kvctl completion bash)"; fish, kvctl completion fish | source."""
    completion_init()
    shell_complete(get_command(app), {}, "kvctl", VARIABLE, f"source_{shell.value}")

"""`kvctl completion`: what a shell is to read so that Tab knows kvctl's commands and options."""

import os
import shlex
from enum import StrEnum
from typing import Annotated, Final

import typer
from typer._completion_classes import completion_init
from typer.completion import shell_complete
from typer.main import get_command

from kvctl.program import app, command, globals_first

__all__ = ["Shell", "completion", "prepare"]

VARIABLE: Final = "_KVCTL_COMPLETE"  # set by the script when it asks what could follow
BASH_WORDS: Final = "COMP_WORDS"
LINE: Final = "_TYPER_COMPLETE_ARGS"  # of zsh and fish


class Shell(StrEnum):
    """Those that can."""

    BASH = "bash"
    ZSH = "zsh"
    FISH = "fish"


def prepare() -> None:
    """Before a command line is read: a shell may be asking what could follow."""
    if VARIABLE not in os.environ:
        return
    if BASH_WORDS in os.environ:
        words, at = _split(os.environ[BASH_WORDS]), int(os.environ.get("COMP_CWORD", "0"))
        os.environ[BASH_WORDS] = shlex.join([*_globals_first(words[:at]), *words[at : at + 1]])
    if LINE in os.environ:
        line = os.environ[LINE]
        words = _split(line)
        at = len(words) - (not line.endswith(" "))
        os.environ[LINE] = shlex.join([*_globals_first(words[:at]), *words[at:]]) + ("" if words[at:] else " ")
    completion_init()


def _split(line: str) -> list[str]:
    """As the shell would; a quote that nobody has closed yet goes on to the end."""
    try:
        return shlex.split(line)
    except ValueError:
        return line.split()


def _globals_first(words: list[str]) -> list[str]:
    """What stands before the word that is being written, as `program.globals_first` has it: what is asked after
    `kvctl ls --runtime-dir DIR --tenant` is to be asked of the daemon there.
    """
    if len(words) < 2 or words[-1].startswith("-"):  # a value is wanted, perhaps of one of these options
        moved = globals_first(words[1:-1])
        return [*words[:1], *moved, *words[1:][-1:]]
    return [words[0], *globals_first(words[1:])]


@command("completion", short="A script for Tab in bash, zsh and fish.")
def completion(shell: Annotated[Shell, typer.Argument(metavar="SHELL", help="bash, zsh or fish.")]) -> None:
    """A script for Tab: bash and zsh, eval "$(kvctl completion bash)"; fish, kvctl completion fish | source."""
    completion_init()
    shell_complete(get_command(app), {}, "kvctl", VARIABLE, f"source_{shell.value}")

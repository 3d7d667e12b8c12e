"""What every command of kvctl has in common: where it is registered, the options before it, how it prints and fails.

A room of commands says

    @command("name")
    def name(context: typer.Context, ...) -> None:
        chosen = globals_of(context)
        with chosen.connect() as client:
            report = client.name(...)
        chosen.show("name", render.plain(report), table)

and is imported by `cli`, in the order in which `kvctl --help` lists them.
"""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, ParamSpec, TypeAlias

import typer
from rich.console import RenderableType
from typer.core import TyperCommand

from kvctl import render, values
from kvctl.client import ControlClient, Exit, KvctlError, find_socket, home_folder
from kvctl.host import package_version
from kvctl.remote import Remote, RemoteClient, remote_of
from kvctl.scope import PREFIX_DIGITS

__all__ = [
    "NUMBER_MAX", "Digest", "Extra", "Globals", "Keys", "OnlyOf", "Output", "Owner", "Tokens",
    "app", "command", "globals_first", "globals_of", "policy_app", "reporting", "service_app",
]  # fmt: skip

P = ParamSpec("P")
NUMBER_MAX: Final = (1 << 64) - 1  # that a message holds

app = typer.Typer(
    name="kvctl",
    help="Watch and steer a kvstored daemon.",
    epilog="Exit codes: 0 done, 1 refused or (doctor) a check failed or (scrub --wait) damage was found, 2 usage, "
    "3 no daemon reachable, 4 no such tenant, namespace, block or pin, 5 timed out, 78 configuration.",
    no_args_is_help=True,
    add_completion=False,  # `kvctl completion` is a command like others
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


policy_app = typer.Typer(
    rich_markup_mode=None, short_help="Who is evicted first.", subcommand_metavar="[COMMAND [ARGS]...]"
)
app.add_typer(policy_app, name="policy")
service_app = typer.Typer(rich_markup_mode=None, no_args_is_help=True, help="The daemon as a service of systemd.")
app.add_typer(service_app, name="service")


class Output(StrEnum):
    """How answers are printed."""

    TABLE = "table"
    JSON = "json"


@dataclass(frozen=True, slots=True)
class Globals:
    """The options before the command."""

    runtime_dir: Path | None
    output: Output
    timeout_s: float
    remote: Remote | None = None  # a daemon of another host, instead of one in `runtime_dir`

    def socket(self) -> Path:
        """Where the daemon should be. Raises KvctlError."""
        if self.remote is not None:
            text = "this is about the host it runs on; leave --address out, and KVCTL_ADDRESS, or give --runtime-dir"
            raise KvctlError(Exit.USAGE, text)
        return find_socket(self.runtime_dir, os.environ, home_folder())

    def connect(self) -> ControlClient:
        """A client to use in a `with`. Raises KvctlError."""
        if self.remote is not None:
            return RemoteClient(self.remote, self.timeout_s)
        return ControlClient(self.socket(), self.timeout_s)

    def show(self, name: str, body: render.Json, table: RenderableType) -> None:
        """Print an answer to stdout."""
        if self.output is Output.JSON:
            typer.echo(render.as_json(name, body))
        else:
            render.console().print(table)


# What several commands take: a scope of blocks.
OfTenant: TypeAlias = Annotated[
    str | None, typer.Option(metavar="NAME", autocompletion=values.tenants, help="Only what this tenant holds.")
]
OfNamespace: TypeAlias = Annotated[
    str | None,
    typer.Option(
        metavar="DIGEST",
        autocompletion=values.namespaces,
        help=f"Only this namespace: its digest, or {PREFIX_DIGITS} or more of its first digits.",
    ),
]
Continuing: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        metavar="HEX", help="Only blocks that continue this key (or first digits), itself included. Repeatable."
    ),
]
# What several commands take: a chain, in a namespace of a tenant; or a tenant alone.
Keys: TypeAlias = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY", help="Keys of a chain, or first digits, in hex, the first block first."),
]
Tokens: TypeAlias = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Instead of keys: a JSON list of token ids; - for stdin.")
]
Extra: TypeAlias = Annotated[
    str, typer.Option(metavar="HEX", help="What else the keys depend on, as given to block_keys.")
]
Digest: TypeAlias = Annotated[
    str | None,
    typer.Option(
        metavar="DIGEST",
        autocompletion=values.namespaces,
        help=f"Its digest, or {PREFIX_DIGITS} or more of its first digits.",
    ),
]
Owner: TypeAlias = Annotated[
    str | None, typer.Option(metavar="NAME", autocompletion=values.tenants, help="Whose namespace it is.")
]
OnlyOf: TypeAlias = Annotated[
    str | None, typer.Option(metavar="NAME", autocompletion=values.tenants, help="Only this tenant's.")
]
OnlyTier: TypeAlias = Annotated[
    str | None,
    typer.Option(
        metavar="TIER", autocompletion=values.one_of(values.TIERS), help="Only dram, or only disk. Else every tier."
    ),
]

# Written before the command or after it: name, and whether a value follows.
_GLOBAL_OPTIONS: Final = {
    "--runtime-dir": True, "-o": True, "--output": True, "--timeout": True, "--version": False,
    "--address": True, "--tls-ca": True, "--tls-cert": True, "--tls-key": True,
}  # fmt: skip


def globals_first(arguments: Sequence[str]) -> list[str]:
    """The command line with the global options moved to its front, where the parser wants them."""
    front: list[str] = []
    rest: list[str] = []
    words = iter(arguments)
    for word in words:
        if word == "--":
            rest += [word, *words]
        elif _GLOBAL_OPTIONS.get(word):
            front += [word, *(value for value in [next(words, None)] if value is not None)]
        elif word.partition("=")[0] in _GLOBAL_OPTIONS or re.match("-o.", word):
            front.append(word)
        else:
            rest.append(word)
    return front + rest


def reporting(function: Callable[P, None]) -> Callable[P, None]:
    """The same, but a KvctlError becomes a sentence on stderr and an exit code."""

    @wraps(function)
    def reported(*arguments: P.args, **options: P.kwargs) -> None:
        try:
            function(*arguments, **options)
        except KvctlError as error:
            typer.echo(f"kvctl: {error}", err=True)
            raise typer.Exit(error.code) from None

    return reported


class Command(TyperCommand):
    """One whose usage names arguments as manuals do: `WORD`, `[WORD]`, `[WORD]...`."""

    words: ClassVar[Sequence[str]] = ()  # instead of what its arguments say

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """See click. What a value may be is said without the words of who looked at it."""
        try:
            return super().parse_args(ctx, args)
        except typer.BadParameter as error:
            error.message = error.message.removeprefix("Value error, ")
            raise

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """See click. `ctx` is of the click that typer brings."""
        arguments = [one for one in self.get_params(ctx) if one.param_type_name == "argument"]
        return ["[OPTIONS]", *(self.words or map(_word, arguments))]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """See click."""
        for title, kind in (("Arguments", "argument"), ("Options", "option")):
            found = records(self, ctx, kind)
            if found:
                with formatter.section(title):
                    formatter.write_dl(found)


def records(command: Any, context: Any, kind: str) -> list[tuple[str, str]]:
    """Options or arguments of a command, each with what it means, as `--help` and manuals have them."""
    found = []
    for one in command.get_params(context):
        record = one.get_help_record(context) if one.param_type_name == kind else None
        if record is not None:
            found.append((_word(one), record[1]) if kind == "argument" else record)
    return found


def _word(argument: Any) -> str:
    name = str(argument.metavar or argument.name.upper()).removesuffix("...").strip("[]")
    return (name if argument.required else f"[{name}]") + ("..." if argument.nargs == -1 else "")


def command(
    name: str, on: typer.Typer = app, usage: Sequence[str] = (), short: str | None = None
) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Registers a command that is `reporting`.

    `usage`: its arguments, where their names do not say enough; `short`: a line in the list of commands, where the
    first sentence of its help is too long for that.
    """
    kind = type("Command", (Command,), {"words": tuple(usage)})

    def register(function: Callable[P, None]) -> Callable[P, None]:
        return on.command(name, cls=kind, short_help=short)(reporting(function))

    return register


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kvctl {package_version('kvstored')}")
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    *,
    runtime_dir: Annotated[
        Path | None,
        typer.Option(
            envvar="KVSTORED_RUNTIME_DIR",
            metavar="DIR",
            help="The daemon's directory. Else /run/kvstored, $XDG_RUNTIME_DIR/kvstored or "
            "~/.local/state/kvstored/run, whichever has a control.sock.",
        ),
    ] = None,
    output: Annotated[Output, typer.Option("-o", "--output", help="For people, or one JSON object.")] = Output.TABLE,
    timeout_s: Annotated[
        float, typer.Option("--timeout", min=0.01, max=3600.0, metavar="SECONDS", help="The longest wait.")
    ] = 10.0,
    address: Annotated[
        str | None,
        typer.Option(
            envvar="KVCTL_ADDRESS",
            metavar="HOST:PORT",
            help="A daemon of another host, by mutual TLS. As a variable it gives way to --runtime-dir.",
        ),
    ] = None,
    tls_ca: Annotated[
        Path | None, typer.Option(envvar="KVCTL_TLS_CA", metavar="FILE", help="Whose word we take for its certificate.")
    ] = None,
    tls_cert: Annotated[
        Path | None, typer.Option(envvar="KVCTL_TLS_CERT", metavar="FILE", help="Our certificate.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(envvar="KVCTL_TLS_KEY", metavar="FILE", help="Its key.")] = None,
    version: Annotated[  # noqa: ARG001  its callback does the work
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Watch and steer a kvstored daemon."""
    files = {"tls_ca": tls_ca, "tls_cert": tls_cert, "tls_key": tls_key}
    try:
        remote = _elsewhere(context, address, files)
    except KvctlError as error:
        typer.echo(f"kvctl: {error}", err=True)
        raise typer.Exit(error.code) from None
    context.obj = Globals(runtime_dir, output, timeout_s, remote)


def _elsewhere(context: typer.Context, address: str | None, files: dict[str, Path | None]) -> Remote | None:
    """Which other host is meant; None: this one. What is said beats what is exported. Raises KvctlError."""
    said = {name for name in ("runtime_dir", "address", *files) if _is_said(context, name)}
    if "runtime_dir" in said:
        if len(said) > 1:
            text = "--runtime-dir names a daemon of this host, --address and --tls-* are for one of another"
            raise KvctlError(Exit.USAGE, f"{text}; leave one of them out")
        return None
    if address is None:  # files that are exported wait for an address
        files = {name: file if name in said else None for name, file in files.items()}
    return remote_of(address, files["tls_ca"], files["tls_cert"], files["tls_key"])


def _is_said(context: typer.Context, name: str) -> bool:
    """Is this option on the command line?"""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def globals_of(context: typer.Context, *, json: bool = False) -> Globals:
    """The options before the command; `json`: whatever they say, as JSON."""
    assert isinstance(context.obj, Globals)
    return replace(context.obj, output=Output.JSON) if json else context.obj

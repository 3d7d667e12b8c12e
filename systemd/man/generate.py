"""Writes the manual pages beside this file: `make man`.

kvctl(1) and a page for each of its commands from what `kvctl COMMAND --help` says, kvstored(8) and kvstored.toml(5)
from the table of settings. They are part of the wheel (share/man) and of the Debian package.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import typer
from typer.main import get_command

from kvctl import cli
from kvctl.host import package_version
from kvctl.program import records
from kvstored.defaults import default_words
from kvstored.layers import TENANTS
from kvstored.quota_keys import QUOTA_KEYS
from kvstored.settings import SETTINGS, Setting

HERE: Final = Path(__file__).parent
EXIT_CODES: Final = (
    ("0", "done"),
    ("1", "refused by the daemon, or by you at the prompt; doctor: a check failed; scrub --wait: damage was found"),
    ("2", "usage: the command line is wrong, or what would be destroyed was neither confirmed nor told --yes"),
    ("3", "no daemon is reachable"),
    ("4", "no such tenant, namespace, block or pin"),
    ("5", "timed out"),
    ("78", "configuration: the runtime directory can never hold a socket"),
    ("75, 78", "of kvctl check, as of kvstored check: see kvstored(8)"),
)
DAEMON_CODES: Final = (
    ("0", "stopped as asked"),
    ("1", "could not start"),
    ("2", "usage: an unknown flag"),
    ("75", "another daemon serves this directory"),
    ("78", "configuration error, or a directory that cannot be used; systemd does not start it again"),
    ("130", "interrupted before it served"),
)
CHECK_CODES: Final = (
    ("0", "nothing is wrong"),
    ("1", "problems were found; with --repair they are repaired now"),
    ("75", "a daemon has one of the directories"),
    ("78", "a directory cannot be read, is not a disk tier's, or is of another version"),
)
GLOBAL: Final = "The options of kvctl(1) may be written before the command or after it."


# -- roff -------------------------------------------------------------------------------------------------------


def said(text: str) -> str:
    """Text as roff wants it."""
    plain = text.replace("\\", "\\e").replace("-", "\\-").replace("'", "\\(aq").replace("`", "")
    return "\n".join(f"\\&{line}" if line.startswith(".") else line for line in plain.splitlines())


def heading(name: str, section: int, about: str) -> Iterator[str]:
    """Title and NAME."""
    yield f'.TH "{name.upper()}" "{section}" "" "kvstored {package_version("kvstored")}" "kvstored"'
    yield ".SH NAME"
    yield f"{said(name)} \\- {said(about)}"


def paragraphs(text: str) -> Iterator[str]:
    """Running text; an empty line begins a paragraph."""
    for part in text.strip().split("\n\n"):
        yield ".PP"
        yield said(" ".join(part.split()))


def entries(rows: "list[tuple[str, str]] | tuple[tuple[str, str], ...]") -> Iterator[str]:
    """Words in bold, each with what it means."""
    for word, meaning in rows:
        yield ".TP"
        yield f".B {said(word)}"
        yield said(" ".join(meaning.split())) or "\\&"


def see_also(*pages: tuple[str, int]) -> Iterator[str]:
    """Other pages."""
    yield ".SH SEE ALSO"
    yield ",\n".join(f".BR {said(name)} ({section})" for name, section in pages).replace("),\n", ") ,\n")


# -- kvctl ------------------------------------------------------------------------------------------------------


def kvctl_pages() -> Iterator[tuple[str, list[str]]]:
    """File names and lines: the command, and each of its own."""
    root: Any = get_command(cli.app)
    context = typer.Context(root, info_name="kvctl", **root.context_settings)
    leaves = list(_leaves(root, context))
    lines = [*heading("kvctl", 1, "watch and steer a kvstored daemon"), ".SH SYNOPSIS", ".B kvctl"]
    lines += [said("[OPTIONS] COMMAND [ARGUMENTS]"), ".SH DESCRIPTION"]
    lines += paragraphs(
        "kvctl asks the daemon of this host how it stands, and tells it what to do, over the control socket in its "
        "runtime directory. Answers go to the standard output, as tables of 80 columns, or with -o json as objects "
        'that have "version": 1 and whose fields are only ever added to; questions and errors go to the standard error.'
    )
    lines += [".SH OPTIONS", *entries(records(root, context, "option")), ".SH COMMANDS"]
    lines += entries([(f"kvctl-{'-'.join(words)}(1)", _about(command)) for words, command, _ in leaves])
    lines += [".SH EXIT STATUS", *entries(EXIT_CODES), ".SH FILES"]
    places = "/run/kvstored, $XDG_RUNTIME_DIR/kvstored, ~/.local/state/kvstored/run"
    lines += entries([("control.sock", f"in the directory of --runtime-dir, else in the first of {places}")])
    lines += see_also(("kvstored", 8), ("kvstored.toml", 5))
    yield "kvctl.1", lines
    for words, command, own in leaves:
        name = "-".join(("kvctl", *words))
        page = [*heading(name, 1, _about(command)), ".SH SYNOPSIS", f".B kvctl {said(' '.join(words))}"]
        page += [said(" ".join(command.collect_usage_pieces(own))), ".SH DESCRIPTION"]
        page += paragraphs(command.help or "")
        arguments = records(command, own, "argument")
        page += [".SH ARGUMENTS", *entries(arguments)] if arguments else []
        page += [".SH OPTIONS", *entries(records(command, own, "option")), *paragraphs(GLOBAL)]
        below = [(f"{name}-{inner}", 1) for inner in getattr(command, "commands", ())]
        page += see_also(*below, ("kvctl", 1), ("kvstored", 8))
        yield f"{name}.1", page


def _leaves(
    group: Any, context: typer.Context, above: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    """Commands, groups of them, and those of groups."""
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        own = typer.Context(command, info_name=name, parent=context)
        words = (*above, name)
        inner = getattr(command, "commands", None)
        yield words, command, own
        if inner is not None:
            yield from _leaves(command, own, words)


def _about(command: Any) -> str:
    """The first sentence of its help."""
    first: str = " ".join((command.help or "").strip().split("\n\n")[0].split())
    return first.partition(". ")[0].rstrip(".")


# -- kvstored ---------------------------------------------------------------------------------------------------


def kvstored_pages() -> Iterator[tuple[str, list[str]]]:
    """kvstored(8) and kvstored.toml(5)."""
    lines = [*heading("kvstored", 8, "node-local KV-cache storage daemon for LLM inference hosts"), ".SH SYNOPSIS"]
    lines += [".B kvstored", "[\\-\\-config FILE] [OPTIONS]", ".br"]
    lines += [".B kvstored config check", "[\\-\\-environment FILE] FILE", ".br"]
    lines += [".B kvstored check", "[\\-\\-repair] [\\-\\-state\\-dir DIR] DIRECTORY...", ".SH DESCRIPTION"]
    lines += paragraphs(
        "kvstored keeps the KV blocks of inference engines in shared memory and on local disks, so that they outlive "
        "requests and engines. Engines reach it by hot.sock in its runtime directory, operators by control.sock and "
        "kvctl(1). What a setting is comes from its default, then from the file, then from the environment, then from "
        "the command line; kvctl config shows each with its origin.\n\n"
        "kvstored config check says whether a file would start a daemon on this host, under the variables of "
        "/etc/kvstored/environment if that is there, or of the file that --environment names (/dev/null: none), which "
        "win over it. Folders are tried with the rights of whoever asks. kvstored check examines the "
        "directories of a disk tier while no daemon has them."
    )
    lines += [".SH OPTIONS", *entries([("--config FILE", "the file, kvstored.toml(5); also KVSTORED_CONFIG")])]
    lines += entries([(f"{one.flag} VALUE", f"{one.reason}. See {one.toml} in kvstored.toml(5).") for one in SETTINGS])
    lines += [".SH ENVIRONMENT", *entries([(one.env, f"{one.toml}, {one.flag}") for one in SETTINGS])]
    lines += [".SH SIGNALS"]
    lines += entries(
        [
            ("SIGTERM, SIGINT", "end, once what has begun is finished or daemon.stop_within is over; again: at once"),
        ]
    )
    lines += [".SH EXIT STATUS", *entries(DAEMON_CODES), *paragraphs("Of kvstored check:"), *entries(CHECK_CODES)]
    lines += [*paragraphs("Of kvstored config check: 0 if the file would start a daemon here, else 78."), ".SH FILES"]
    lines += entries(
        [
            ("/etc/kvstored/kvstored.toml", "what the service is configured by"),
            ("/run/kvstored/hot.sock", "for engines"),
            ("/run/kvstored/control.sock", "for operators: gRPC, see kvctl(1)"),
        ]
    )
    lines += see_also(("kvctl", 1), ("kvstored-check", 8), ("kvstored.toml", 5), ("systemd.service", 5))
    yield "kvstored.8", lines
    yield "kvstored-check.8", _check_page()
    yield "kvstored.toml.5", _toml_page()


def _check_page() -> list[str]:
    lines = [*heading("kvstored-check", 8, "verify a disk tier while no daemon uses it"), ".SH SYNOPSIS"]
    lines += [".B kvstored check", "[\\-\\-repair] [\\-\\-state\\-dir DIR] DIRECTORY...", ".SH DESCRIPTION"]
    lines += paragraphs(
        "Reads the directories of a disk tier, all of them as in disk.directories, block by block, and says what is "
        "good and what is damaged. Without --repair nothing is changed. A daemon that has one of them must be stopped "
        "first. kvctl check does the same, and asks before a repair."
    )
    lines += [".SH OPTIONS"]
    lines += entries(
        [
            ("--repair", "erase damaged blocks and make the index anew; the daemon's audit file has it"),
            ("--state-dir DIR", "where the audit file is; else as configured for the daemon"),
        ]
    )
    lines += [".SH EXIT STATUS", *entries(CHECK_CODES)]
    return [*lines, *see_also(("kvstored", 8), ("kvctl-check", 1))]


def _toml_page() -> list[str]:
    lines = [*heading("kvstored.toml", 5, "configuration of kvstored"), ".SH DESCRIPTION"]
    lines += paragraphs(
        "A TOML file of tables, each setting in the table that its name begins with. An unknown key, or a value out of "
        "range, stops the start with exit code 78 and names the line. kvstored config check FILE looks at it before."
    )
    sections: dict[str, list[Setting[Any]]] = {}
    for one in SETTINGS:
        sections.setdefault(one.toml.split(".")[0], []).append(one)
    for section, settings in sections.items():
        lines += [f".SH [{said(section)}]"]
        lines += entries([(one.toml.split(".")[1], _meaning(one)) for one in settings])
    lines += [f".SH [{TENANTS}.NAME]"]
    lines += paragraphs(
        "One table a tenant. A uid that no tenant lists gets a tenant of its own, uid-N. The first tenant that lists a "
        "uid is its default."
    )
    lines += entries(
        [
            ("uids", "processes of these uids may belong to this tenant"),
            ("trusting", "its engines may write into its memory themselves. Range: true or false. Default: false."),
        ]
    )
    lines += entries(
        [(name, f"{key.reason}. Range: {key.kind.range}; {key.unit}.") for name, key in QUOTA_KEYS.items()]
    )
    lines += [".SH EXAMPLE", ".nf", '[dram]\nsize = "64GiB"', ".PP", '[disk]\ndirectories = ["/mnt/nvme0/kv"]']
    lines += ['size = "2TiB"', ".PP", '[tenants.chat]\nuids = [1001, 1002]\ndram_guaranteed = "16GiB"', ".fi"]
    return [*lines, *see_also(("kvstored", 8), ("kvctl", 1))]


def _meaning(setting: Setting[Any]) -> str:
    return f"{setting.reason}. Range: {setting.range}; {setting.unit}. {default_words(setting)}"


def write(folder: Path) -> list[Path]:
    """All pages; those of commands that are gone are removed."""
    pages = dict((*kvctl_pages(), *kvstored_pages()))
    for old in folder.glob("*.[158]"):
        if old.name not in pages:
            old.unlink()
    for name, lines in pages.items():
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return [folder / name for name in pages]


if __name__ == "__main__":
    print(f"{len(write(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE))} pages")

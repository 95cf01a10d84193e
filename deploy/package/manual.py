#!/usr/bin/env python3
"""Writes the manual pages of section 1 from what the program says of its commands.

    manual.py PROGRAM SECTIONS OUTPUT

Each command has a page, crossdock-COMMAND.1, that goes on with SECTIONS/COMMAND: EXAMPLES, and FILES where there are some, written by hand
as roff. A command without them is an error, and so are sections of a command that is not there.
"""
import json
import os
import subprocess
import sys

PAGE_OF = {"uncordon": "cordon"}
COMMON = ("version", "help")
STATE_DIRECTORY = "/var/lib/crossdock for root, $XDG_STATE_HOME/crossdock for others"


def quoted(text):
    """Text as roff shows it unchanged."""
    return text.replace("\\", "\\e").replace("-", "\\-").replace("'", "\\(aq").replace("`", "\\(ga")


def paragraphs(text):
    """Paragraphs; those that are indented are shown as they are, as the help does."""
    lines = []
    for part in text.split("\n\n"):
        if part.startswith("  "):
            lines += [".PP", ".nf", ".RS 4"]
            lines += [quoted(line.strip()) for line in part.splitlines()]
            lines += [".RE", ".fi"]
        else:
            lines += [".PP"] + [guarded(quoted(line.strip())) for line in part.splitlines()]
    return lines


def guarded(line):
    """A line that roff does not take for a request."""
    return "\\&" + line if line.startswith((".", "\\(aq")) else line


def names(argument):
    return [("-" if name["kind"] == "short" else "--") + name["name"] for name in argument.get("names", [])]


def shown(command):
    return [a for a in command.get("arguments", []) if a["shouldDisplay"] and not (set(a.get("names") and [
        n["name"] for n in a["names"]] or []) & set(COMMON))]


def word(argument):
    """An argument in the synopsis."""
    if argument["kind"] == "positional":
        text = f"\\fI{quoted(argument['valueName'])}\\fR"
    else:
        text = f"\\fB{quoted(names(argument)[-1])}\\fR"
        if argument["kind"] == "option":
            text += f"\\ \\fI{quoted(argument['valueName'])}\\fR"
    if argument["isRepeating"]:
        text += "..."
    return f"[{text}]" if argument["isOptional"] else text


def synopsis(words, command):
    arguments = shown(command)
    positional = [a for a in arguments if a["kind"] == "positional"]
    needed = [a for a in arguments if a["kind"] != "positional" and not a["isOptional"]]
    optional = len(arguments) > len(positional) + len(needed)
    parts = [f"\\fB{quoted(' '.join(words))}\\fR"] + (["[\\fIoptions\\fR]"] if optional else [])
    return guarded(" ".join(parts + [word(a) for a in needed + positional]))


def options(command):
    lines = []
    for argument in shown(command):
        if argument["kind"] == "positional":
            head = f"\\fI{quoted(argument['valueName'])}\\fR"
        else:
            head = ", ".join(f"\\fB{quoted(name)}\\fR" for name in names(argument))
            if argument["kind"] == "option":
                head += f" \\fI{quoted(argument['valueName'])}\\fR"
        text = argument.get("abstract", "")
        default = argument.get("defaultValue")
        if argument.get("valueName") == "state-dir":
            default = STATE_DIRECTORY
        if argument.get("valueName") == "log-level":
            default = "info"
        if default:
            text += f" Default: {default}."
        lines += [".TP", head, guarded(quoted(text)) if text else "\\&"]
    return lines


def page(command, sections, version, date):
    name = command["commandName"]
    title = f"crossdock-{name}"
    abstract = command["abstract"].rstrip(".")
    lines = [
        f'.TH {title.upper()} 1 "{date}" "crossdock {version}" "Crossdock"', ".SH NAME",
        f"{quoted(title)} \\- {quoted(abstract[0].lower() + abstract[1:])}", ".SH SYNOPSIS",
    ]
    inner = [c for c in command.get("subcommands", []) if c.get("shouldDisplay", True) and c["commandName"] != "help"]
    for each in inner:
        lines += [synopsis(["crossdock", name, each["commandName"]], each), ".br"]
    if not inner:
        lines += [synopsis(["crossdock", name], command)]
    if command.get("discussion"):
        lines += [".SH DESCRIPTION"] + paragraphs(command["discussion"])[1:]
    if inner:
        lines += [".SH COMMANDS"]
        for each in inner:
            lines += [f".SS {quoted(each['commandName'])}", quoted(each["abstract"])]
            lines += paragraphs(each["discussion"]) if each.get("discussion") else []
            lines += options(each)
    elif shown(command):
        lines += [".SH OPTIONS"] + options(command)
    lines += [sections.rstrip("\n"), ".SH SEE ALSO", ".BR crossdock (7)"]
    return "\n".join(lines) + "\n"


def main(program, sections, output):
    answer = subprocess.run([program, "--experimental-dump-help"], check=True, capture_output=True, text=True).stdout
    root = json.loads(answer)["command"]
    version = subprocess.run([program, "--version"], check=True, capture_output=True, text=True).stdout.split()[-1]
    seconds = int(os.environ.get("SOURCE_DATE_EPOCH", "0")) or int(os.path.getmtime(program))
    date = subprocess.run(["date", "-u", "-d", f"@{seconds}", "+%Y-%m-%d"], check=True, capture_output=True,
                          text=True).stdout.strip()
    commands = [c for c in root["subcommands"] if c.get("shouldDisplay", True) and c["commandName"] != "help"]
    pages = {c["commandName"] for c in commands} - set(PAGE_OF)
    written = {name for name in os.listdir(sections) if not name.endswith(".7")}
    if pages != written:
        sys.exit(f"manual.py: {sections} has sections for {sorted(written - pages)} too many and none for {sorted(pages - written)}")
    for command in commands:
        name = command["commandName"]
        path = os.path.join(output, f"crossdock-{name}.1")
        with open(path, "w", encoding="utf-8") as file:
            if name in PAGE_OF:
                file.write(f".so man1/crossdock-{PAGE_OF[name]}.1\n")
                continue
            with open(os.path.join(sections, name), encoding="utf-8") as text:
                file.write(page(command, text.read(), version, date))
    with open(os.path.join(output, "crossdock.1"), "w", encoding="utf-8") as file:
        lines = [f'.TH CROSSDOCK 1 "{date}" "crossdock {version}" "Crossdock"', ".SH NAME",
                 "crossdock \\- moves running virtual machines between hosts without shared storage", ".SH SYNOPSIS",
                 "\\fBcrossdock\\fR \\fIcommand\\fR [\\fIoptions\\fR]", ".SH DESCRIPTION",
                 guarded(quoted(root["abstract"]))]
        lines += paragraphs(root["discussion"]) + [".SH COMMANDS"]
        for command in commands:
            lines += [".TP", f"\\fBcrossdock\\-{quoted(command['commandName'])}\\fR(1)", quoted(command["abstract"])]
        lines += [".SH SEE ALSO", ".BR crossdock (7)"]
        file.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:4])

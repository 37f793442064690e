"""What stands between the scripts and the world: flags, files, signals, messages. No machine
learning here.

Promised, and tested in tests/test_robustness.py and tests/test_interruption.py: a user's mistake,
an unreadable file or a full disk (status 2) and a signal (status 130 or 143) end in one line on
stderr; files change all together or not at all, also under kill -9."""

import argparse
import json
import math
import os
import re
import shutil
import signal
import sys
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

from safetensors import SafetensorError

# gently: a first signal is noted here and waits for the end of a training step
signals = SimpleNamespace(gently=False, came=None)
# Terminal escapes and other controls, overrides of the writing direction, halves of UTF-16 pairs
# (which no file can hold)
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class InputError(ValueError):
    """Something the user gave us is wrong; the message names the file, the line and the remedy."""


class Interrupted(BaseException):
    """The number of a signal, and what to do next. No KeyboardInterrupt, which a conversation
    catches (assets/extras/chat.py)."""


def printable(text):
    """One line without control characters: no title can move the cursor, colour the terminal or
    forge a second line."""
    return " ".join(CONTROL.sub(" ", str(text)).split())


# ---- Scripts and their flags ---------------------------------------------------------------------


def run_script(main):
    """Run a script's main(): a user's mistake or a signal becomes one line on stderr, never a
    traceback."""

    def stop(number, _):
        if signals.gently and not signals.came:
            signals.came = number
            return
        raise (KeyboardInterrupt if number == signal.SIGINT else Interrupted)(
            number,
            "what stood there before is kept; run the same "
            "command again, a training run with --resume",
        )

    def leave(message, status):
        print(printable(message), file=sys.stderr)
        raise SystemExit(status) from None

    signals.gently, signals.came = False, None
    for stream in (sys.stdout, sys.stderr):
        # Letters that a terminal's encoding lacks come out as escapes
        with suppress(AttributeError):
            stream.reconfigure(errors="backslashreplace")
    for number in (signal.SIGINT, signal.SIGTERM):
        # nohup and background jobs ignore Ctrl-C: so do we
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, stop)
    try:
        main()
    except (InputError, OSError) as error:
        leave(f"error: {error}", 2)
    except (KeyboardInterrupt, Interrupted) as stopped:
        leave(f"interrupted: {stopped.args[1]}", 128 + stopped.args[0])


class Parser(argparse.ArgumentParser):
    """argparse would print the usage, many lines of it, before what is wrong."""

    def error(self, message):
        raise InputError(f"{message}; --help explains every flag")


def within(kind, low, high=math.inf):
    """A type for argparse: an int or a float from low to high. Neither end nor anything between is
    nan."""

    def convert(text):
        value = kind(text)
        if not low <= value <= high or math.isinf(value):
            raise argparse.ArgumentTypeError(
                f"{text} must be at least {low:g}" + f" and at most {high:g}" * (high < math.inf)
            )
        return value

    convert.__name__ = kind.__name__
    return convert


a_seed = within(int, 0, 2**32 - 1)


# ---- Files ---------------------------------------------------------------------------------------


@contextmanager
def reading(path, remedy):
    """Whatever goes wrong while a stranger's file is parsed is the file's fault: one line that
    names it."""
    try:
        yield
    except (InputError, BrokenPipeError):  # the latter: `| head`
        raise
    except Exception as error:
        reason = (str(error).strip() or "unreadable").splitlines()[0][:200]
        if "weights_only" in reason:  # torch goes on to advise that its guard be switched off
            reason = "not plain weights; it may hold a stranger's code, which is not run"
        raise InputError(f"{path}: {type(error).__name__}: {reason}; {remedy}") from None


class WriteError(OSError):
    """A full disk, a folder that cannot be written."""


@contextmanager
def writing(path, *kinds):
    try:
        yield
    except WriteError:
        raise
    except (OSError, *kinds) as error:
        raise WriteError(
            f"{path} cannot be written, what stood there is kept ({error}); free some space or "
            "name another place"
        ) from None


def write_file(path, write):
    """Write under a temporary name, then rename: a reader sees the old file or the new one."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    # torch and safetensors have their own words for a full disk
    with writing(path, RuntimeError, SafetensorError):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(temporary)
            os.replace(temporary, path)
        finally:
            with suppress(OSError):
                temporary.unlink()


def write_atomically(folder, write, keep=False):
    """Let write(a new folder) make some files, then move them all into `folder`. Killed before the
    new folder is called tmp-ready, nothing has changed; killed after it, the next reader or writer
    ends the move. What else stands in `folder` stays there. keep: the files that get replaced go to
    `previous`, if there is none yet."""
    fresh = (folder := Path(folder)) / "tmp-new"
    with writing(folder):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            end_move(folder)
            shutil.rmtree(fresh, ignore_errors=True)
            fresh.mkdir()
            write(fresh)
            if keep and not (folder / "previous").exists():
                (fresh / "previous").mkdir()
            os.rename(fresh, folder / "tmp-ready")
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
            with suppress(OSError):
                folder.rmdir()  # succeeds if it is empty, and so was made in vain
        end_move(folder)


def check_place(folder, ours, names, inputs=()):
    """May a new folder of ours be written here? Not over what it reads from, nor over a stranger's
    files: ours(folder) is whether it is one of ours, names are those that would be replaced."""
    folder = Path(folder)
    for flag, path in inputs:
        if path and folder.resolve() == Path(path).resolve():
            raise InputError(
                f"--out {folder}: would take the place of {flag}; name another by --out"
            )
    held = sorted(name for name in names if (folder / name).exists())
    if held and not (folder / "tmp-ready").exists() and not ours(folder):
        raise InputError(
            f"--out {folder}: has {', '.join(held)} in it, not of ours; they would be replaced: "
            "name another by --out"
        )


def has_key(file, key):
    """Is it a JSON object with that key?"""
    with suppress(OSError, ValueError):
        found = json.loads(file.read_text())
        return isinstance(found, dict) and key in found
    return False


def drop_previous(folder):
    """What write_atomically kept is kept no more; the name goes first, so that no half of it is
    ever there."""
    with suppress(FileNotFoundError):
        os.rename(Path(folder) / "previous", Path(folder) / "tmp-new")
        shutil.rmtree(Path(folder) / "tmp-new")


def end_move(folder, tidy=False):
    """The second half of write_atomically; where it was killed, the rest of it. metrics.json tells
    of files that are no more. tidy: remove what a killed write_file has left; for those who write
    alone in the folder."""
    for left in Path(folder).glob("*.tmp-*") if tidy else ():
        left.unlink(missing_ok=True)
    ready, keep = Path(folder) / "tmp-ready", Path(folder) / "tmp-ready" / "previous"
    # Nothing to move, or another process does the same
    with suppress(FileNotFoundError, NotADirectoryError):
        for name in [*sorted({f.name for f in ready.iterdir()} - {"previous"}), "metrics.json"]:
            new, old = ready / name, Path(folder) / name
            if keep.exists() and old.exists():
                os.rename(old, keep / name)
            if old.is_dir():
                shutil.rmtree(old)
            elif name == "metrics.json":
                old.unlink(missing_ok=True)
            if new.exists():
                os.replace(new, old)
        if keep.exists():
            os.rename(keep, keep.parent.parent / "previous") if any(
                keep.iterdir()
            ) else keep.rmdir()
        ready.rmdir()

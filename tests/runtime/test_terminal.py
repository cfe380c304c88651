"""Progress is a bar for people and plain lines for log files; messages fit a terminal and stay whole in a file."""

import contextlib
import pty
import sys
import termios

import pytest

from runtime import terminal
from runtime.terminal import PlainProgress, UserError, one_sentence, print_message, progress_bar

MESSAGE = "fields that differ from their defaults: " + ", ".join(f"model.field_{n} {n!r} ('no')" for n in range(20))


def test_without_a_terminal_there_are_plain_lines(capsys, monkeypatch):
    monkeypatch.setattr(terminal, "LINE_EVERY", 0)
    with progress_bar(total=200, desc="pairs", unit="samples", initial=100) as bar:
        assert isinstance(bar, PlainProgress)
        bar.set_postfix(refresh=False, loss=0.123456, nfe=20)
        bar.update(50)
    written = capsys.readouterr()
    assert written.out == ""
    assert written.err.startswith("pairs: 150/200 samples (75.0 %), ")
    assert written.err.endswith("left, loss=0.123, nfe=20\n")


def test_speed_and_time_left_count_from_where_a_resumed_task_starts(capsys, monkeypatch):
    now = 100.0
    monkeypatch.setattr("tqdm.std.time", lambda: now)
    bar = progress_bar(total=1000, initial=900, unit="pairs")
    now += 40
    bar.update(20)
    assert capsys.readouterr().err == "920/1000 pairs (92.0 %), 0.5 pairs/s, 02:40 left\n"


@pytest.mark.parametrize(("enabled", "drawn"), [("auto", False), ("true", True), ("false", False)])
def test_plain_lines_come_seldom_and_a_bar_can_be_forced_and_forbidden(capsys, enabled, drawn):
    assert list(progress_bar(range(1000), desc="training", enabled=enabled)) == list(range(1000))
    assert ("training" in capsys.readouterr().err) == drawn


@pytest.fixture
def on_terminal(monkeypatch):
    """A function that returns what a call writes to a terminal of some width as stdout and stderr."""
    def call(width, work):
        reader, writer = pty.openpty()
        termios.tcsetwinsize(writer, (24, width))
        monkeypatch.setenv("COLUMNS", str(width))
        with open(writer, "w") as opened, monkeypatch.context() as patched:
            patched.setattr(sys, "stdout", opened)
            patched.setattr(sys, "stderr", opened)
            work()
        written = b""
        with open(reader, "rb", buffering=0) as end, contextlib.suppress(OSError):  # as reading ends on Linux
            while part := end.read(1 << 16):
                written += part
        return written.decode().replace("\r\n", "\n")

    return call


@pytest.mark.parametrize("width", [40, 80, 120])
def test_a_message_is_wrapped_between_words_in_a_terminal(on_terminal, width):
    first, *others = on_terminal(width, lambda: print_message(MESSAGE)).splitlines()
    assert max(map(len, (first, *others))) <= width and all(line.startswith("    ") for line in others)
    assert " ".join(line.strip() for line in (first, *others)) == MESSAGE


def test_a_message_stays_one_line_in_a_file(capsys):
    print_message(MESSAGE)
    print_message(MESSAGE, stderr=True)
    assert capsys.readouterr() == (MESSAGE + "\n", MESSAGE + "\n")


def test_each_line_of_a_table_keeps_its_columns_and_a_long_word_stays_whole(on_terminal):
    table = "   a  bb\n  10   2\n/long/" + 20 * "path"
    assert on_terminal(40, lambda: print_message(table)) == table + "\n"


def test_an_error_is_wrapped_in_a_terminal_and_one_line_in_a_file(on_terminal, capsys):
    def fail():
        with pytest.raises(SystemExit), one_sentence("train.py"):
            raise UserError(MESSAGE)

    assert len(on_terminal(80, fail).splitlines()) > 3
    fail()
    assert capsys.readouterr().err == f"train.py: {MESSAGE}\n"


def test_messages_do_not_repeat_the_plain_line_and_start_where_grep_finds_them(capsys, monkeypatch):
    monkeypatch.setattr(terminal, "LINE_EVERY", 0)
    with progress_bar(total=200, desc="pairs", unit="samples") as bar:
        print_message("before", stderr=True)
        bar.update(50)
        print_message("after", stderr=True)
    before, line, after = capsys.readouterr().err.split("\n")[:-1]
    assert (before, after) == ("before", "after") and line.startswith("pairs: 50/200")


def test_a_message_is_written_above_the_bar(on_terminal):
    def work():
        with progress_bar(total=200, desc="pairs") as bar:
            bar.update(50)
            print_message("a message")

    written = on_terminal(80, work)
    assert "\ra message\n" in written and written.count("\n") == 2


@pytest.mark.parametrize("width", [80, 0])
def test_a_bar_of_80_columns_shows_how_much_how_long_and_the_loss_also_where_no_size_is_known(
        on_terminal, monkeypatch, width):
    now = 1e6
    monkeypatch.setattr("tqdm.std.time", lambda: now)

    def work():
        nonlocal now
        bar = progress_bar(total=800000, desc="training", unit="updates", initial=7200)
        bar.set_postfix(refresh=False, loss="0.1234")
        now += 14400
        bar.update(7200)
        bar.update(0)
        bar.close()

    bar = on_terminal(width, work).strip("\n").split("\r")[-1]
    assert len(bar) == 79
    assert bar.startswith("training:   2%|")
    assert bar.endswith("| 14400/800000 [4:00:00<436:26:40, loss=0.1234,  2.00s/updates]")

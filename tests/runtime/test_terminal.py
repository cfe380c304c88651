"""Progress is a bar for people and plain lines for log files."""

import pytest

from runtime import terminal
from runtime.terminal import PlainProgress, progress_bar


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


def test_plain_lines_come_seldom(capsys):
    assert list(progress_bar(range(1000))) == list(range(1000))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("enabled", "drawn"), [("true", True), ("false", False)])
def test_a_bar_can_be_forced_and_forbidden(capsys, enabled, drawn):
    assert sum(progress_bar([1, 2, 3], desc="training", enabled=enabled)) == 6
    assert ("training" in capsys.readouterr().err) == drawn

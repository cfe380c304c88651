"""Files are written whole or not at all, tell whether they changed without being read, and are fetched once."""

import errno
import hashlib
import io
import os
import pathlib
import threading
import time

import pytest

from models.checkpoint import local_file
from runtime import files
from runtime.files import atomic_path, cached_file, file_lock, read_json, read_json_lines, state_digest
from runtime.terminal import UserError


def write(path, text, time):
    """Write a file with the modification time `time`, in nanoseconds."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    os.utime(path, ns=(time, time))


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "images" / "a.png", "one", 10)
    write(tmp_path / "images" / "inner" / "b.png", "two", 10)
    return tmp_path / "images"


@pytest.mark.parametrize("change", [
    lambda folder: write(folder / "inner" / "b.png", "six", 11),
    lambda folder: write(folder / "inner" / "b.png", "longer", 10),
    lambda folder: write(folder / "c.png", "", 10),
    lambda folder: (folder / "a.png").unlink(),
    lambda folder: (folder / "a.png").rename(folder / "z.png"),
], ids=["rewritten", "longer", "added", "removed", "renamed"])
def test_the_state_of_a_folder_changes_with_any_file_in_it(folder, change, request):
    before, file = state_digest(folder), state_digest(folder / "inner" / "b.png")
    assert state_digest(folder) == before
    change(folder)
    assert state_digest(folder) != before
    # of a file alone, too: its size and time
    assert (state_digest(folder / "inner" / "b.png") != file) == (request.node.callspec.id in ("rewritten", "longer"))


def test_the_state_of_a_folder_includes_what_links_lead_to_and_ends_where_they_lead_back(folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (folder / "inner" / "back").symlink_to(folder)
    before = state_digest(folder)
    write(tmp_path / "elsewhere" / "d.png", "four", 10)
    assert state_digest(folder) != before


def test_what_a_killed_writer_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path):
    """Also the leftovers of earlier versions, which were named after the process."""
    for name in (".state.1234.tmp.pth", ".state.0a1b2c3d.tmp.pth", ".other.1234.tmp.pth"):
        write(tmp_path / name, "half", 10)
    with atomic_path(tmp_path / "state.pth") as living:
        living.write_text("mine")
        with atomic_path(tmp_path / "state.pth") as second:
            second.write_text("theirs")
        assert living.exists() and living != second
        assert list(tmp_path.glob(".state.*")) == [living]
    assert (tmp_path / "state.pth").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"state.pth", ".other.1234.tmp.pth"}


@pytest.mark.parametrize("hidden", [False, True])
def test_a_full_disk_names_the_file_that_was_to_be_written(tmp_path, hidden):
    """torch.save says RuntimeError, with the system's word behind it; matplotlib and Pillow name no file."""
    with pytest.raises(OSError, match="No space left") as error, atomic_path(tmp_path / "a.png"):
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            if hidden:
                raise RuntimeError("unexpected pos 64 vs 0")  # noqa: B904 - as torch does
            raise
    assert error.value.filename == str(tmp_path / "a.png") and not list(tmp_path.iterdir())


def test_json_lines_leave_out_what_a_crash_cut_off(tmp_path):
    (tmp_path / "log.jsonl").write_bytes(b'{"step": 1}\n7\n{"step": 2}\n{"st\xff')
    assert read_json_lines(tmp_path / "log.jsonl") == [{"step": 1}, {"step": 2}]
    assert read_json_lines(tmp_path / "absent.jsonl") == []


def test_only_one_is_inside_a_lock_and_the_others_wait_and_say_so(tmp_path, capfd):
    inside = []

    def enter():
        with file_lock(tmp_path / "new" / "lock", "testing"):
            inside.append("second")

    with file_lock(tmp_path / "new" / "lock", "testing"):
        thread = threading.Thread(target=enter)
        thread.start()
        said = ""
        while not said and thread.is_alive():
            said = capfd.readouterr().err
            time.sleep(0.001)
        assert "waiting for another process that is testing" in said and not inside
        with pytest.raises(UserError, match="nobody waits"), file_lock(tmp_path / "new" / "lock", "", "nobody waits"):
            inside.append("third")
    thread.join()
    assert inside == ["second"]


def test_an_error_inside_frees_the_lock(tmp_path):
    for _ in range(2):
        with pytest.raises(KeyError), file_lock(tmp_path / "lock", "testing", refusal="held"):
            raise KeyError


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100000])
def test_a_damaged_json_file_is_one_sentence_that_names_it(tmp_path, content):
    (tmp_path / "data.json").write_bytes(content)
    with pytest.raises(UserError, match="data.json is damaged"):
        read_json(tmp_path / "data.json")


# Downloads


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "hub" / "checkpoints"


def test_a_file_is_fetched_once(cache, tmp_path):
    original = tmp_path / "weights.pt"
    original.write_bytes(b"weights")
    assert cached_file(original.as_uri(), "--x").read_bytes() == b"weights"
    original.unlink()
    assert cached_file(original.as_uri(), "--x") == cache / "weights.pt"


def test_a_failed_download_says_which_file_to_put_where_and_leaves_nothing(cache):
    with pytest.raises(UserError) as caught:
        cached_file("http://127.0.0.1:9/inception.pt", "config.eval.inception_path")
    for part in (str(cache / "inception.pt"), "http://127.0.0.1:9/inception.pt", "config.eval.inception_path"):
        assert part in str(caught.value)
    assert not list(cache.glob("*"))


def test_a_checkpoint_at_an_address_is_fetched_once_and_its_digest_told(cache, monkeypatch, capsys):
    """Two files of one name keep apart, and what came can be compared with what others had."""
    asked = []

    def answer(url, timeout):
        asked.append(url)
        content = io.BytesIO(url.encode())
        content.headers = {"Content-Length": str(len(url))}
        return content

    monkeypatch.setattr(files.urllib.request, "urlopen", answer)
    urls = ["https://a.example/pretrained/edm.pkl", "https://b.example/edm.pkl?download=true"]
    for url in urls * 2:
        path = pathlib.Path(local_file(url))
        assert path.read_bytes() == url.encode() and path.name.endswith("-edm.pkl") and path.parent == cache
    assert asked == urls
    assert hashlib.sha256(urls[0].encode()).hexdigest()[:16] in capsys.readouterr().out
    with pytest.raises(UserError, match="must be https://host/…/file"):
        local_file("https://a.example/")

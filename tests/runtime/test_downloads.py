"""Fetching files once into the user's own cache."""

import hashlib
import io
import pathlib

import pytest

from models.checkpoint import local_file
from runtime import files
from runtime.files import cached_file
from runtime.terminal import UserError


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
    message = str(caught.value)
    assert str(cache / "inception.pt") in message
    assert "http://127.0.0.1:9/inception.pt" in message
    assert "config.eval.inception_path" in message
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

"""Folders and zip archives of pictures."""

import os
import zipfile

import pytest

from datasets import file_trees
from datasets.file_trees import FolderTree, ZipTree, find_tree, labels_from_folders, labels_from_json, picture_names
from runtime.errors import UserError
from tests.datasets.image_files import label_file, write_folder, write_zip

FILES = {"b/2.PNG": b"two", "a/1.jpg": b"one", "notes.txt": b"-", "__MACOSX/a/1.jpg": b"-", "a/._1.jpg": b"-"}


def make_trees(tmp_path, files):
    write_folder(tmp_path / "folder", files)
    write_zip(tmp_path / "images.zip", files)
    return FolderTree(tmp_path / "folder"), ZipTree(tmp_path / "images.zip")


def test_folder_and_zip_give_the_same_pictures_sorted_and_nothing_else(tmp_path):
    for tree in make_trees(tmp_path, FILES):
        assert picture_names(tree) == ["a/1.jpg", "b/2.PNG"]
        assert tree.read("b/2.PNG") == b"two"


def test_no_picture_is_one_sentence(tmp_path):
    for tree in make_trees(tmp_path, {"readme.txt": b"-"}):
        with pytest.raises(UserError, match="holds no picture .*data_root"):
            picture_names(tree)


@pytest.mark.parametrize("name", ["../a.png", "a/../../b.png", "/etc/a.png", "..\\a.png", "C:/a.png"])
def test_an_archive_that_climbs_out_of_itself_is_refused(tmp_path, name):
    write_zip(tmp_path / "bad.zip", {"good.png": b"-", name: b"-"})
    with pytest.raises(UserError, match="climbs out"):
        ZipTree(tmp_path / "bad.zip")


def test_what_is_no_zip_is_named(tmp_path):
    (tmp_path / "x.zip").write_bytes(b"PK but no more")
    with pytest.raises(UserError, match="x.zip is no readable zip archive"):
        ZipTree(tmp_path / "x.zip")


def test_a_damaged_member_is_named(tmp_path):
    write_zip(tmp_path / "x.zip", {"a.png": b"some content"})
    data = (tmp_path / "x.zip").read_bytes()
    (tmp_path / "x.zip").write_bytes(data.replace(b"some", b"SOME"))  # the checksum no longer fits
    with pytest.raises(UserError, match="x.zip: a.png cannot be unpacked"):
        ZipTree(tmp_path / "x.zip").read("a.png")


def test_a_member_that_would_fill_the_memory_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(file_trees, "LARGEST_MEMBER", 1000)
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", bytes(5000))
    with pytest.raises(UserError, match="would unpack to 5000 bytes"):
        ZipTree(tmp_path / "x.zip").read("a.png")


def test_links_are_followed_and_a_circle_of_links_ends(tmp_path):
    write_folder(tmp_path, {"store/1.png": b"-", "set/a/2.png": b"-"})
    os.symlink(tmp_path / "store", tmp_path / "set/b")
    os.symlink(tmp_path / "set", tmp_path / "set/a/circle")
    assert picture_names(FolderTree(tmp_path / "set")) == ["a/2.png", "b/1.png"]


def test_a_dead_link_is_named_when_it_is_read(tmp_path):
    os.symlink(tmp_path / "gone.png", tmp_path / "a.png")
    assert file_trees.tree_identity(tmp_path)
    with pytest.raises(UserError, match="a.png cannot be read"):
        FolderTree(tmp_path).read("a.png")


def test_a_folder_with_one_zip_stands_for_the_zip(tmp_path):
    write_zip(tmp_path / "ffhq-64x64.zip", {"a.png": b"-"})
    assert find_tree(tmp_path) == tmp_path / "ffhq-64x64.zip"
    write_folder(tmp_path, {"b.png": b"-"})
    assert find_tree(tmp_path) == tmp_path


def test_identity_changes_with_every_picture_and_label_and_with_nothing_else(tmp_path):
    write_folder(tmp_path, {"a.png": b"-", "b.png": b"-"})
    seen = [file_trees.tree_identity(tmp_path)]
    write_folder(tmp_path, {"notes.txt": b"-"})
    assert file_trees.tree_identity(tmp_path) == seen[0]
    for change in ({"b.png": b"--"}, {"c.png": b"-"}, {"dataset.json": b"{}"}):
        write_folder(tmp_path, change)
        seen.append(file_trees.tree_identity(tmp_path))
    os.utime(tmp_path / "a.png", ns=(0, 10**9))
    seen.append(file_trees.tree_identity(tmp_path))
    os.rename(tmp_path / "a.png", tmp_path / "d.png")
    seen.append(file_trees.tree_identity(tmp_path))
    assert len(set(seen)) == len(seen)


def test_labels_follow_the_names_of_sub_folders():
    names = ["cat/1.png", "cat/x/2.png", "ant/3.png"]
    assert labels_from_folders(names) == ([1, 1, 0], ("ant", "cat"))
    assert labels_from_folders(["1.png", *names]) == (None, None)


def test_labels_of_dataset_json_belong_to_the_names(tmp_path):
    for tree in make_trees(tmp_path, {"dataset.json": label_file({"b.png": 3, "a.png": 0})}):
        assert labels_from_json(tree, ["a.png", "b.png"]) == [0, 3]


def test_dataset_json_without_labels_gives_none(tmp_path):
    for tree in make_trees(tmp_path, {"dataset.json": label_file(None)}):
        assert labels_from_json(tree, ["a.png"]) is None


@pytest.mark.parametrize(("content", "message"), [
    (b"not json", "not of the form"), (b"[]", "not of the form"), (b"{}", "not of the form"),
    (b'{"labels": 3}', "not of the form"), (label_file({"b.png": 1}), "no label for a.png"),
    (label_file({"a.png": -1}), "the label -1"), (label_file({"a.png": 1.5}), "the label 1.5"),
    (label_file({"a.png": True}), "the label True"),
])
def test_a_wrong_dataset_json_is_one_sentence(tmp_path, content, message):
    write_folder(tmp_path, {"dataset.json": content})
    with pytest.raises(UserError, match=message):
        labels_from_json(FolderTree(tmp_path), ["a.png"])

import hashlib
import json
import os
import shutil

import pytest

from treetune.core import manifest


@pytest.fixture
def folder(tmp_path):
    """A folder with weights, a config and a file in a folder below, and its manifest."""
    root = tmp_path / "saved"
    (root / "additional_chat_templates").mkdir(parents=True)
    (root / "model.safetensors").write_bytes(bytes(range(256)) * 20)
    (root / "config.json").write_text('{"a": 1}')
    (root / "additional_chat_templates" / "tool.jinja").write_text("x")
    manifest.write(root)
    return root


def refused(folder, *words, **options):
    with pytest.raises(ValueError) as error:
        manifest.check(folder, **options)
    text = str(error.value)
    assert all(word in text for word in words) and "\n" not in text, text


def test_a_manifest_holds_sizes_and_the_digests_of_sha256sum(folder):
    found = json.loads((folder / manifest.NAME).read_text())
    assert found["format"] == manifest.FORMAT
    assert sorted(found["files"]) == ["additional_chat_templates/tool.jinja", "config.json", "model.safetensors"]
    data = (folder / "model.safetensors").read_bytes()
    assert found["files"]["model.safetensors"] == {"bytes": 5120, "sha256": hashlib.sha256(data).hexdigest()}
    assert manifest.check(folder) is True


def test_several_threads_find_the_same(folder, monkeypatch):
    monkeypatch.setattr(manifest, "SMALL", 0)
    told = (folder / manifest.NAME).read_bytes()
    manifest.write(folder)
    assert (folder / manifest.NAME).read_bytes() == told and manifest.check(folder)
    (folder / "config.json").write_text('{"a": 2}')
    refused(folder, "config.json is not as it was written")


def test_a_folder_without_a_manifest_is_not_checked(tmp_path):
    assert manifest.check(tmp_path) is False and manifest.check(tmp_path / "nowhere") is False


def flipped(file, bit=21):
    data = bytearray(file.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


def swapped(root):
    one, other = root / "config.json", root / "additional_chat_templates" / "tool.jinja"
    other.write_text('{"b": 1}')
    manifest.write(root)
    one.rename(root / "x")
    other.rename(one)
    (root / "x").rename(other)


DAMAGES = {
    "bit": (lambda root: flipped(root / "model.safetensors"), "model.safetensors is not as it was written", "sha256"),
    "config": (lambda root: (root / "config.json").write_text('{"a": 2}'), "config.json is not as it was written"),
    "below": (lambda root: (root / "additional_chat_templates/tool.jinja").write_text("y"), "tool.jinja is not as it was written"),
    "truncated": (lambda root: os.truncate(root / "model.safetensors", 5119), "model.safetensors has 5119 bytes", "with 5120"),
    "empty": (lambda root: os.truncate(root / "model.safetensors", 0), "model.safetensors has 0 bytes"),
    "longer": (lambda root: (root / "config.json").write_text('{"a": 1} '), "config.json has 9 bytes"),
    "missing": (lambda root: (root / "model.safetensors").unlink(), "model.safetensors is missing"),
    "folder in its place": (
        lambda root: ((root / "config.json").unlink(), (root / "config.json").mkdir()),
        "config.json is no regular file",
    ),
    "swapped": (swapped, "is not as it was written", "and 1 more"),
    "added template": (lambda root: (root / "chat_template.jinja").write_text("x"), "chat_template.jinja was added"),
    "added weights": (lambda root: (root / "model-2.safetensors").write_bytes(b"x"), "model-2.safetensors was added"),
    "added below": (lambda root: (root / "additional_chat_templates/y.jinja").write_text("x"), "y.jinja was added"),
    "two": (lambda root: (os.truncate(root / "model.safetensors", 1), (root / "config.json").unlink()), "and 1 more of its files"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named_with_the_way_out(damage, folder):
    spoil, *words = DAMAGES[damage]
    spoil(folder)
    refused(folder, *words, f"delete {folder / manifest.NAME}")
    (folder / manifest.NAME).unlink()
    assert manifest.check(folder) is False, "deleting the manifest accepts the change"


def test_the_way_out_is_the_callers(folder):
    (folder / "config.json").unlink()
    refused(folder, "config.json is missing: resume from another", fix="resume from another")


def test_files_that_no_loader_takes_may_come_and_go(folder):
    for name in ("README.md", "results.json", ".gitattributes", "model.gguf"):
        (folder / name).write_text("x")
    (folder / "logs").mkdir()
    (folder / "logs" / "config.json").write_text("x")
    assert manifest.check(folder)


def test_weights_are_left_out_on_request_but_must_be_there(folder):
    flipped(folder / "model.safetensors")
    assert manifest.check(folder, weights=False)
    flipped(folder / "config.json")
    refused(folder, "config.json is not as it was written", weights=False)
    os.truncate(folder / "model.safetensors", 3)
    refused(folder, "model.safetensors has 3 bytes", weights=False)


BROKEN = {
    "empty": "",
    "cut": '{"format": 1, "files": {"config.json',
    "no mapping": "[1]",
    "no files": '{"format": 1}',
    "no format": '{"files": {}}',
    "newer": '{"format": 2, "files": {}}',
    "entry": '{"format": 1, "files": {"config.json": 3}}',
    "size": '{"format": 1, "files": {"config.json": {"bytes": "8", "sha256": ""}}}',
    "digest": '{"format": 1, "files": {"config.json": {"bytes": 8, "sha256": null}}}',
    "parent": '{"format": 1, "files": {"../config.json": {"bytes": 8, "sha256": ""}}}',
    "absolute": '{"format": 1, "files": {"/dev/zero": {"bytes": 8, "sha256": ""}}}',
    "zero": '{"format": 1, "files": {"a\\u0000b": {"bytes": 8, "sha256": ""}}}',
    "deep": "[" * 100_000,
    "no text": b"\xff\xfe",
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_damaged_manifest_is_told(broken, folder):
    text = BROKEN[broken]
    (folder / manifest.NAME).write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(folder, f"{folder / manifest.NAME} is damaged", "delete")


def test_files_taken_out_of_a_manifest_are_told(folder):
    found = json.loads((folder / manifest.NAME).read_text())
    del found["files"]["model.safetensors"]
    (folder / manifest.NAME).write_text(json.dumps(found))
    refused(folder, "model.safetensors was added")


def test_every_bit_of_a_manifest_counts_or_changes_nothing(folder):
    """No flip lets a changed file through, and none is a traceback: it is refused, or the entries are those that were written."""
    file = folder / manifest.NAME
    whole, entries = file.read_bytes(), manifest.read(folder)
    for bit in range(0, len(whole) * 8, 3):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        file.write_bytes(data)
        try:
            manifest.check(folder)
        except ValueError:
            continue
        assert manifest.read(folder) == entries


def test_a_file_is_read_once_while_it_does_not_change(folder, monkeypatch):
    read, digest = [], manifest._digest
    monkeypatch.setattr(manifest, "_digest", lambda path: read.append(path.name) or digest(path))
    for path in folder.rglob("*"):
        os.utime(path, ns=(10**18, 10**18))
    manifest.check(folder)
    manifest.check(folder)
    assert sorted(read) == ["config.json", "model.safetensors", "tool.jinja"]
    flipped(folder / "config.json")
    refused(folder, "config.json is not as it was written")
    refused(folder, "config.json is not as it was written")


def test_files_changed_a_moment_ago_are_read_again(folder, monkeypatch):
    """Two changes may fall on one tick of the file system's clock."""
    read, digest = [], manifest._digest
    monkeypatch.setattr(manifest, "_digest", lambda path: read.append(path.name) or digest(path))
    manifest.check(folder)
    manifest.check(folder)
    assert len(read) == 6


def test_a_file_that_the_disk_does_not_give_back_is_told(folder, monkeypatch):
    digest = manifest.hashlib.file_digest

    def failing(file, kind):
        if file.name.endswith("model.safetensors"):
            raise OSError(5, "Input/output error")
        return digest(file, kind)

    monkeypatch.setattr(manifest.hashlib, "file_digest", failing)
    refused(folder, "model.safetensors cannot be read (Input/output error): resume", fix="resume")
    with pytest.raises(OSError, match="Input/output error"):
        manifest.write(folder)


def test_a_copy_is_as_good_and_links_are_followed(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert manifest.check(copy)
    (copy / "model.safetensors").unlink()
    (copy / "model.safetensors").symlink_to(folder / "model.safetensors")
    assert manifest.check(copy)
    (folder / "model.safetensors").unlink()
    refused(copy, "model.safetensors is missing")


def test_writing_again_describes_what_is_there_now(folder):
    (folder / "config.json").write_text("new")
    manifest.write(folder)
    assert manifest.check(folder) and manifest.NAME not in manifest.read(folder)

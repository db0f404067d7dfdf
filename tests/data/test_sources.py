"""Which clips a folder or a list means, and what their captions are."""

import json
import os
import re

import pytest

from moedistill.data.sources import find_sources


def clips(path, **options):
    return {source.name: (source.caption, source.fault) for source in find_sources(path, **options)}


def write(path, text=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_a_folders_clips_are_found_at_any_depth_in_order_with_the_texts_beside_them(tmp_path):
    for name in ("b.mp4", "a b/ü ñ.webm", "a b/deep/er/c.png", "no_caption.mp4", ".hidden.mp4", ".git/d.mp4"):
        write(tmp_path / name)
    write(tmp_path / "b.txt", "a dog\n  runs ")
    write(tmp_path / "a b/ü ñ.txt", "\ufeffein Hund\r\n")
    write(tmp_path / "a b/deep/er/c.png.txt", "")
    write(tmp_path / "left_over.txt", "whose?")
    write(tmp_path / "UPPER.MOV")
    write(tmp_path / "UPPER.TXT", "from a camera")
    found = clips(tmp_path)
    assert list(found.items()) == [
        ("UPPER.MOV", ("from a camera", "")),
        ("b.mp4", ("a dog runs", "")),
        ("left_over.txt", (None, "is a text without a clip of its name beside it")),
        ("no_caption.mp4", (None, "")),
        ("a b/ü ñ.webm", ("ein Hund", "")),
        ("a b/deep/er/c.png", ("", "")),
    ]


def test_links_are_followed_and_a_circle_of_them_ends(tmp_path):
    write(tmp_path / "elsewhere/clip.mp4")
    write(tmp_path / "clips/own.mp4")
    os.symlink(tmp_path / "elsewhere", tmp_path / "clips/more")
    os.symlink(tmp_path / "elsewhere/clip.mp4", tmp_path / "clips/one.mp4")
    os.symlink(tmp_path / "clips", tmp_path / "clips/again")
    assert list(clips(tmp_path / "clips")) == ["one.mp4", "own.mp4", "more/clip.mp4"]


def test_a_folder_in_the_folder_can_be_left_out(tmp_path):
    write(tmp_path / "a.mp4")
    write(tmp_path / "set/samples.safetensors")
    assert list(clips(tmp_path, without=[tmp_path / "set"])) == ["a.mp4"]


def test_a_set_among_the_clips_is_none_of_them(tmp_path):
    for name in ("a.mp4", "sets/one/index.json", "sets/one/show/0.mp4", "sets/two/videos2caption.json"):
        write(tmp_path / name)
    fault = "is a training set, and not clips"
    assert clips(tmp_path) == {"a.mp4": (None, ""), "sets/one": (None, fault), "sets/two": (None, fault)}


def test_a_caption_that_is_no_text_is_the_clips_fault(tmp_path):
    write(tmp_path / "a.mp4")
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    [(caption, fault)] = clips(tmp_path).values()
    assert caption is None
    assert fault.startswith("has the caption file a.txt, which cannot be read as text (")


ROWS = [{"path": "sub/a.mp4", "caption": " a dog\nruns"}, {"path": "b, c.mp4", "caption": ""}]
AS_LISTS = {
    "list.jsonl": "\n".join(json.dumps(row) for row in ROWS) + "\n\n",
    "list.json": json.dumps(ROWS),
    "semicolons.csv": 'path;caption\nsub/a.mp4;" a dog\nruns"\n"b, c.mp4";\n',
    "list.csv": 'path,caption\nsub/a.mp4," a dog\nruns"\n"b, c.mp4",\n',
}


@pytest.mark.parametrize("name", AS_LISTS)
def test_lists_name_files_relative_to_themselves(tmp_path, name):
    found = find_sources(write(tmp_path / "lists" / name, AS_LISTS[name]))
    assert [(source.path, source.caption, source.listed) for source in found] == [
        (tmp_path / "lists/sub/a.mp4", "a dog runs", True),
        (tmp_path / "lists/b, c.mp4", "", True),
    ]


def test_a_line_that_is_none_is_named_by_its_number_and_only_line_feeds_end_one(tmp_path):
    entry = json.dumps({"path": "a.mp4", "caption": "two\u2028lines"}, ensure_ascii=False)
    assert list(clips(write(tmp_path / "list.jsonl", f"{entry}\r\n\n")).values()) == [("two lines", "")]
    with pytest.raises(ValueError, match="line 3: Expecting property name enclosed in double quotes at character 2"):
        find_sources(write(tmp_path / "list.jsonl", f"{entry}\n\n{{oops\n"))


def test_columns_of_other_names_are_named(tmp_path):
    file = write(tmp_path / "list.jsonl", '{"where": "a.mp4", "what": "a dog", "video": "b.mp4"}')
    found = find_sources(file, path_column="where", caption_column="what")
    assert [(source.name, source.caption) for source in found] == [("a.mp4", "a dog")]
    for options, message in (
        (
            {},
            "has none of the columns caption, text, prompt, cap; name the one with the captions by --caption-column",
        ),
        ({"path_column": "wher"}, "has no column 'wher' for --path-column; did you mean 'where'? allowed: video, "),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            find_sources(file, **options)


def test_entries_that_name_no_file_or_no_text_are_faults_of_their_own(tmp_path):
    file = write(tmp_path / "list.json", '[{"path": 3, "caption": "x"}, 7, {"path": "a.mp4", "caption": ["x"]}]')
    assert [(source.name, source.fault) for source in find_sources(file)] == [
        ("list.json, entry 0", "has 3 for path, where a file's name must be"),
        ("list.json, entry 1", "has None for path, where a file's name must be"),
        ("a.mp4", "has the caption ['x'], which must be text"),
    ]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("gone.jsonl", None, "there is no file or folder"),
        ("list.jsonl", "{", "cannot be read as a list of clips: "),
        ("list.json", '{"a": 1}', "it holds a dict, where a list of clips must be"),
        ("list.csv", "", "lists nothing; give a list with an entry for each clip"),
        ("folder/", None, "holds no files; give a folder of clips with captions (.txt) beside them"),
    ],
)
def test_what_means_no_clips_is_refused(tmp_path, name, text, message):
    if name.endswith("/"):
        (tmp_path / name).mkdir()
    elif text is not None:
        write(tmp_path / name, text)
    with pytest.raises(ValueError, match=re.escape(message)):
        find_sources(tmp_path / name)


def test_a_clip_alone_is_one(tmp_path):
    write(tmp_path / "a.mp4")
    write(tmp_path / "a.txt", "a dog")
    assert clips(tmp_path / "a.mp4") == {"a.mp4": ("a dog", "")}

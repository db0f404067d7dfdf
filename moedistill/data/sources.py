"""What a training set is made of: clips and pictures with their captions, in a folder or listed in a file."""

import csv
import json
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from moedistill.data.latents import INDEX, PUBLISHED_INDEX
from moedistill.errors import shorten, suggest
from moedistill.runtime.reading import LARGEST_INDEX, read_text, reason

PATH_COLUMNS = ("path", "file", "video", "video_path", "file_name", "filename", "media_path", "image")
"""What the column with the files is called where nobody says it; the first that is there."""
CAPTION_COLUMNS = ("caption", "text", "prompt", "cap")
"""Likewise of the captions."""
LISTS = (".jsonl", ".csv", ".json")


@dataclass(frozen=True)
class Source:
    """A clip that a set may be made of.

    Args:
        path: its file.
        name: for people: as it is listed, or its path in the folder.
        caption: None where there is none.
        fault: why it cannot be used, where that is known already.
        listed: whether it is an entry of a list, where one file may stand under several captions.
    """

    path: Path
    name: str
    caption: str | None
    fault: str = ""
    listed: bool = False


def find_sources(
    path: str | Path,
    *,
    path_column: str | None = None,
    caption_column: str | None = None,
    without: Collection[Path] = (),
) -> list[Source]:
    """All clips that `path` means, in a fixed order: those of a folder at any depth, those that a list names, or one.

    A clip's caption is the text in `NAME.txt` beside `NAME.mp4`. Lists are `.jsonl`, `.csv` with a header, or `.json`
    (a list of objects); their files are relative to the list. Hidden files and folders are passed over.

    Args:
        path_column, caption_column: of a list; by default the first of `PATH_COLUMNS` and of `CAPTION_COLUMNS`.
        without: folders in it that are not looked into.

    Raises:
        ValueError: there is no such file or folder, nothing is in it, or a list cannot be read.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise ValueError(f"there is no file or folder {path}; give a folder of clips, or a list of them (.jsonl, .csv)")
    if path.is_dir():
        found = list(_of_folder(path, {folder.resolve() for folder in without}))
        if not found:
            raise ValueError(f"{path} holds no files; give a folder of clips with captions (.txt) beside them")
        return found
    if path.suffix.lower() not in LISTS:
        return [_with_caption(path, path.name)]
    rows = _rows(path)
    if not rows:
        raise ValueError(f"{path} lists nothing; give a list with an entry for each clip")
    return _of_rows(path, rows, path_column, caption_column)


def is_prompts(path: str | Path) -> bool:
    """Whether this is a file of prompts, not of clips."""
    path = Path(path).expanduser()
    return path.suffix.lower() == ".txt" and path.is_file()


# -- a folder ---------------------------------------------------------------------------------------------------------


def _of_folder(root: Path, without: Collection[Path]) -> Iterator[Source]:
    seen: set[Path] = set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        here = Path(folder)
        real = here.resolve()
        if real in seen or (real in without and here != root):  # links may go round in a circle
            subfolders.clear()
            continue
        seen.add(real)
        if any(name in names for name in (INDEX, PUBLISHED_INDEX)):
            subfolders.clear()
            yield Source(here, here.relative_to(root).as_posix(), None, "is a training set, and not clips")
            continue
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        files = sorted(name for name in names if not name.startswith("."))
        clips = [name for name in files if not name.lower().endswith(".txt")]
        texts = {text for name in clips for text in _texts_of(name)}
        for name in files:
            shown = (here / name).relative_to(root).as_posix()
            if name in clips:
                yield _with_caption(here / name, shown)
            elif name not in texts:
                yield Source(here / name, shown, None, "is a text without a clip of its name beside it")


def _texts_of(name: str) -> list[str]:
    """What a clip's caption may be called."""
    return [f"{of}{ending}" for ending in (".txt", ".TXT") for of in (Path(name).stem, name)]


def _with_caption(path: Path, name: str) -> Source:
    file = next((path.with_name(text) for text in _texts_of(path.name) if path.with_name(text).is_file()), None)
    if file is None:
        return Source(path, name, None)
    try:
        return Source(path, name, _one_line(read_text(file)))
    except (OSError, UnicodeDecodeError) as error:
        fault = f"has the caption file {file.name}, which cannot be read as text ({shorten(reason(error), 120)})"
        return Source(path, name, None, fault)


def _one_line(text: str) -> str:
    return " ".join(text.split())


# -- a list -----------------------------------------------------------------------------------------------------------


def _rows(path: Path) -> list[Any]:
    """A list's entries."""
    try:
        text = read_text(path, LARGEST_INDEX)
        if path.suffix.lower() == ".csv":
            return list(csv.DictReader(StringIO(text, newline=""), delimiter=_delimiter(text)))
        if path.suffix.lower() == ".json":
            rows = json.loads(text)
            if not isinstance(rows, list):
                raise ValueError(f"it holds a {type(rows).__name__}, where a list of clips must be")
            return rows
        return [_entry(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read as a list of clips: {shorten(reason(error), 120)}") from error


def _delimiter(text: str) -> str:
    """What parts the columns: where the header has no comma, what some spreadsheets write in its place."""
    header = text.partition("\n")[0]
    return "," if "," in header else next((mark for mark in ";\t" if mark in header), ",")


def _entry(number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {number}: {error.msg} at character {error.pos + 1}") from error


def _of_rows(path: Path, rows: list[Any], path_column: str | None, caption_column: str | None) -> list[Source]:
    columns = dict.fromkeys(key for row in rows if isinstance(row, Mapping) for key in row if isinstance(key, str))
    file_key = _column(path, columns, path_column, PATH_COLUMNS, "path")
    caption_key = _column(path, columns, caption_column, CAPTION_COLUMNS, "caption")
    found = []
    for number, row in enumerate(rows):
        file = row.get(file_key) if isinstance(row, Mapping) else None
        if not isinstance(file, str) or not file.strip() or "\0" in file:
            fault = f"has {shorten(repr(file), 60)} for {file_key}, where a file's name must be"
            found.append(Source(path, f"{path.name}, entry {number}", None, fault))
            continue
        clip, caption = path.parent / file, row.get(caption_key)
        if caption is not None and not isinstance(caption, str):
            fault = f"has the caption {shorten(repr(caption), 60)}, which must be text"
            found.append(Source(clip, file, None, fault, listed=True))
        else:
            found.append(Source(clip, file, None if caption is None else _one_line(caption), listed=True))
    return found


def _column(path: Path, columns: Collection[str], named: str | None, usual: Collection[str], what: str) -> str:
    if named is not None:
        if named not in columns:
            raise ValueError(f"{path} has no column {named!r} for --{what}-column; {suggest(named, columns)}")
        return named
    found = next((name for name in usual if name in columns), None)
    if found is None:
        raise ValueError(
            f"{path} has none of the columns {', '.join(usual)}; name the one with the {what}s by --{what}-column: "
            f"{shorten(', '.join(columns) or 'it has none', 200)}"
        )
    return found

"""Files that a user names are read as far as they are files: never a pipe, a device or a folder, never without end."""

import os
import resource
import signal
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from moedistill import cli
from moedistill.components.plugins import load_plugins
from moedistill.data.latents import open_store
from moedistill.data.prompts import read_prompts
from moedistill.errors import RecipeError, UserError
from moedistill.integrations.diffusers.loading import read_json
from moedistill.recipe.loading import load_recipe
from moedistill.runtime import reading
from moedistill.stages.evaluate import EvaluateConfig, stored_samples
from moedistill.stages.export import read_export


class Hangs(BaseException):
    """Nothing that is tested may catch it."""


@pytest.fixture(autouse=True)
def _bounded():
    """A read that waits for ever, or never ends, fails."""

    def hangs(*_):
        raise Hangs

    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, limits[1]))
    previous = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)
    resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.fixture
def pipe(tmp_path):
    """Nobody writes to it; who waits for that all the same, where no signal reaches, gets its end after a while."""

    done = threading.Event()

    def end():
        pause = 5.0
        while not done.wait(pause):
            pause = 0.2
            with suppress(OSError):  # nobody waits
                os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))

    path = tmp_path / "it"
    os.mkfifo(path)
    threading.Thread(target=end, daemon=True).start()
    yield path
    done.set()


@pytest.fixture(params=["pipe", "device", "folder"])
def no_file(request, tmp_path):
    """What cannot be read as a file, and the word for it."""
    path = tmp_path / "it"
    if request.param == "pipe":
        request.getfixturevalue("pipe")
    elif request.param == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    return path, f"it is a {request.param}, not a file"


def test_a_recipe_and_what_it_extends(no_file, tmp_path):
    path, message = no_file
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert caught.value.problems[0].message == f"cannot read {path} as a recipe: {message}"
    (tmp_path / "recipe.yaml").write_text(f"extends: {path}")
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path / "recipe.yaml")
    assert caught.value.problems[0].message == f"cannot read {path} as a recipe: {message}"


def test_prompts_and_sets(no_file, capsys):
    path, message = no_file
    with pytest.raises(ValueError, match=f"{path}" if path.is_dir() else f"{path} .*{message}"):
        read_prompts(path)
    if not path.is_dir():
        with pytest.raises(ValueError, match=f"{path} cannot be read as JSON .{message}"):
            open_store(path)
        with pytest.raises(SystemExit) as stop:
            cli.main(["sample", str(path.parent), "--prompts", str(path)])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


def test_plugins_exports_and_models(no_file, tmp_path):
    path, message = no_file
    path = path.rename(tmp_path / "it.py")
    assert message in load_plugins([path]).broken[str(path)]
    with pytest.raises(ValueError, match=f"cannot read {path}: {message}"):
        read_json(path)
    path.rename(tmp_path / "export.json")
    kind = "a folder, not a file" if "folder" in message else "no file"
    with pytest.raises(UserError, match=rf"export\.json is {kind}; copy or export it again"):
        read_export(tmp_path)


def test_stored_samples(no_file):
    path, message = no_file
    config = EvaluateConfig(name="e", candidates=[], reference="a", reference_samples=str(path), metrics=[])
    with pytest.raises(ValueError, match=f"cannot be read .{message}"):
        stored_samples(config, None)


def test_an_index_names_a_pipe_as_a_samples_file(pipe, tmp_path):
    (tmp_path / "latent").mkdir()
    (tmp_path / "latent/a.pt").symlink_to(pipe)
    (tmp_path / "videos2caption.json").write_text('[{"latent_path": "a.pt", "caption": "a"}]')
    with pytest.raises(ValueError, match=r"sample 0: .*a\.pt cannot be read .*it is a pipe"):
        open_store(tmp_path).shape(0)


def test_what_is_too_large_is_not_read(tmp_path):
    large = tmp_path / "prompts.txt"
    with large.open("wb") as file:
        file.truncate(reading.LARGEST_TEXT + 1)  # no block of it is on the disk
    with pytest.raises(ValueError, match=r"cannot be read as text .it is larger than 64 MiB"):
        read_prompts(large)
    large.rename(tmp_path / "index.json")
    os.truncate(tmp_path / "index.json", reading.LARGEST_INDEX + 1)
    with pytest.raises(ValueError, match="it is larger than 1024 MiB"):
        open_store(tmp_path)
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path / "index.json")
    assert "it is larger than 256 KiB" in caught.value.problems[0].message


def test_a_file_is_read_to_its_end(tmp_path):
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbfcaf\xc3\xa9")
    assert reading.read_text(tmp_path / "a", 8) == "café"
    with pytest.raises(OSError, match="it is larger than 0 KiB"):
        reading.read_text(tmp_path / "a", 7)
    assert b"processor" in reading.read_bytes(Path("/proc/cpuinfo"))  # its size is given as 0
    with pytest.raises(OSError, match="larger"):
        reading.read_bytes(Path("/proc/cpuinfo"), 9)

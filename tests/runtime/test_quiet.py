"""Commands print no bars or warnings of the libraries below; those of other code stay, and imports change nothing."""

import json
import os
import subprocess
import sys
import warnings

import pytest
from saved_pipelines import PROMPT, save_pipeline

from moedistill import cli
from moedistill.runtime.quiet import SWITCHES, quiet_libraries

LOUD = "import warnings\nwarnings.warn('of a plugin')\nwarnings.warn('of a plugin, too', FutureWarning)\n"


def said(*sources):
    """What of warnings with these categories, modules and texts is let through."""
    with warnings.catch_warnings(record=True) as heard, quiet_libraries():
        for category, module, text in sources:
            warnings.warn_explicit(text, category, "file.py", 1, module=module)
    return [str(warning.message) for warning in heard]


def test_what_is_hidden_is_the_libraries(monkeypatch):
    monkeypatch.setattr(sys, "warnoptions", [])
    loud = [
        (UserWarning, "torch.nn.modules.loss", "sizes differ"), (UserWarning, "mine", "a"),
        (FutureWarning, "my_peft.torch", "b"), (UserWarning, "moedistill_dcm.losses", "c"),
    ]  # fmt: skip
    silent = [
        (FutureWarning, "torch.cuda", "old"), (UserWarning, "diffusers.models.x", "d"), (FutureWarning, "peft", "e"),
        (UserWarning, "torch.nn.functional", "Mismatch dtype between input and weight: input dtype = c10::BFloat16"),
    ]  # fmt: skip
    assert said(*loud, *silent) == [text for _, _, text in loud]
    monkeypatch.setattr(sys, "warnoptions", ["default"])
    assert len(said(*loud, *silent)) == len(loud) + len(silent)


def test_what_is_for_the_user_is_one_line(monkeypatch):
    monkeypatch.setattr(sys, "warnoptions", [])
    before = warnings.formatwarning
    with quiet_libraries():
        assert warnings.formatwarning("cut", UserWarning, "x/moedistill_wan/a.py", 1) == "warning: cut\n"
        assert "file.py:1: UserWarning: x" in warnings.formatwarning("x", UserWarning, "file.py", 1)
        assert "file.py:1: RuntimeWarning: x" in warnings.formatwarning("x", RuntimeWarning, "file.py", 1)
    assert warnings.formatwarning is before


def test_only_while_a_command_runs(monkeypatch):
    for name in SWITCHES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "info")
    inside = {}
    monkeypatch.setattr(cli.cli, "main", lambda **_: inside.update(os.environ))
    before = list(warnings.filters)
    with pytest.raises(SystemExit):
        cli.main([])
    assert {name: inside[name] for name in SWITCHES} == {**SWITCHES, "TRANSFORMERS_VERBOSITY": "info"}
    assert not (SWITCHES.keys() - {"TRANSFORMERS_VERBOSITY"}) & os.environ.keys()
    assert warnings.filters == before


def test_a_command_on_a_saved_model_says_nothing_but_its_own(tmp_path):
    """Text encoder, transformer and VAE are loaded, a pipeline samples; a plugin's warnings are all there is."""
    recipe = {
        "name": "quiet",
        "backbone": {
            "kind": "wan", "pretrained": str(save_pipeline(tmp_path / "model", "wan")), "dtype": "bfloat16",
            "video": {"num_frames": 5, "height": 32, "width": 32},
        },
        "stages": [{"name": "samples", "kind": "sample", "prompts": [PROMPT]}],
        "sample": {"steps": 1},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    (tmp_path / "loud.py").write_text(LOUD, encoding="utf-8")
    command = [sys.executable, "-m", "moedistill", "run", "recipe.yaml", "--output", "run", "-p", "loud.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "done: run"
    assert [line for line in done.stderr.splitlines() if not line.startswith("  ")] == [
        f"{tmp_path}/loud.py:2: UserWarning: of a plugin",
        f"{tmp_path}/loud.py:3: FutureWarning: of a plugin, too",
    ]

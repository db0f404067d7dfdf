"""Damaged and edited checkpoints and exports: one line that names the file, and the whole command to go on."""

import copy
import json
import random
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from helpers import dcm_recipe, equal, evaluate, set_up, trees
from safetensors.torch import load_file, save_file

from moedistill.cli import main
from moedistill.errors import RecipeError, UserError
from moedistill.recipe.loading import load_recipe
from moedistill.runs.loop import run
from moedistill.runs.resume import plan
from moedistill.runs.sample import load_mixture, read_trained
from moedistill.runs.saved import read_state, read_weights
from moedistill.runtime.checkpoint import SUMS, load_tree, save_tree, verify, write_sums

STEPS = 2
NAMES = [f"{number:02d}_{stage}_{step:08d}" for number, stage in enumerate(("semantic", "detail")) for step in (1, 2)]


def recipe():
    made = dcm_recipe(STEPS)
    made["stages"] += [evaluate(), {"name": "export", "kind": "export"}]
    return made


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run with all its checkpoints, and an export."""
    return run(recipe(), output=tmp_path_factory.mktemp("damaged") / "a run", device="cpu").output


@pytest.fixture
def folder(whole, tmp_path):
    """A copy of the run, stopped amid the second stage."""
    folder = shutil.copytree(whole, tmp_path / "a run", ignore=shutil.ignore_patterns("evaluate", "result.json"))
    shutil.rmtree(folder / "checkpoints" / NAMES[3])
    return folder


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def one_line(error):
    assert not isinstance(error, RecipeError)
    assert "\n" not in str(error)
    return str(error)


def go_on(message):
    """Runs the command that a message ends with, as it is printed."""
    command = shlex.split(message.split("go on with: ")[1])
    assert command[:2] == ["moedistill", "run"]
    with pytest.raises(SystemExit) as end:
        main(command[1:])
    assert end.value.code == 0


# -- a damaged newest checkpoint --------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", [flip, Path.unlink, lambda file: file.write_bytes(file.read_bytes()[:-20])])
@pytest.mark.parametrize("file", ["state.json", "experts.safetensors", "ema.json", "training.safetensors", SUMS])
def test_the_newest_whole_one_is_named_and_the_command(folder, file, damage):
    newest, earlier, first = (folder / "checkpoints" / NAMES[k] for k in (2, 1, 0))
    damage(newest / file)  # where it is the sums that are missing, the state says that there must be some
    named = newest / file if (file, damage) != (SUMS, flip) else newest  # a wrong sum speaks against its file
    flip(earlier / "training.json")  # sizes do not show it
    command = f"moedistill run {shlex.quote(str(folder / 'recipe.yaml'))} --resume-from {shlex.quote(str(first))}"
    for asked in ({"resume": True, "output": folder}, {"resume_from": newest}, {"resume_from": folder}):
        with pytest.raises(UserError) as caught:
            plan(load_recipe(recipe()), **asked)
        said = one_line(caught.value)
        assert said.startswith(str(named))
        assert said.endswith(f"; the newest whole one is {first}; go on with: {command}")


def test_what_the_message_says_mends_the_run(whole, folder, capsys):
    """Afterwards `--resume` works, every checkpoint is whole, and the damaged one is still there."""
    newest = folder / "checkpoints" / NAMES[2]
    flip(newest / "experts.safetensors")
    damaged = (newest / "experts.safetensors").read_bytes()
    with pytest.raises(SystemExit, match="2"):
        main(["run", str(folder / "recipe.yaml"), "--resume-from", str(folder), "--device", "cpu"])
    said = capsys.readouterr().err
    assert said.startswith(f"error: {newest / 'experts.safetensors'} is damaged: it is not what was written")
    assert said.count("\n") == 1
    go_on(said.rstrip("\n"))
    aside = newest.with_name(f"{newest.name}.set-aside-1")
    assert f"{newest} was there already: it is {aside.name} now" in capsys.readouterr().out
    assert (aside / "experts.safetensors").read_bytes() == damaged
    for name in NAMES:
        verify(folder / "checkpoints" / name)
        assert equal(trees(folder / "checkpoints" / name), trees(whole / "checkpoints" / name))
    assert run(recipe(), output=folder, resume=True, device="cpu").checkpoint.name == NAMES[3]


def test_a_run_without_another_whole_checkpoint_says_so(folder):
    for name in NAMES[:3]:
        flip(folder / "checkpoints" / name / "training.json")
    with pytest.raises(UserError, match="; beside it there is no whole checkpoint to go on from"):
        plan(load_recipe(recipe()), resume_from=folder)


def test_sample_says_it_in_its_own_words(folder):
    newest = folder / "checkpoints" / NAMES[2]
    flip(newest / "ema.safetensors")
    load_mixture(folder)  # reads the trained weights alone
    with pytest.raises(UserError) as caught:
        load_mixture(folder, weights="ema")
    said = one_line(caught.value)
    assert said.startswith(f"{newest / 'ema.safetensors'} is damaged: ")
    assert said.endswith(f"; the newest whole one is {folder / 'checkpoints' / NAMES[1]}: take that")
    (folder / "empty" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError) as caught:
        load_mixture(folder / "empty")
    assert "resume" not in str(caught.value)


# -- edited checkpoints, with sums that are right ---------------------------------------------------------------------


def edited(checkpoint, tree, change):
    """A tree of a checkpoint with a change, and with sums to it."""
    content = load_tree(checkpoint, tree)
    changed = change(content)
    (checkpoint / f"{tree}.safetensors").unlink(missing_ok=True)
    (checkpoint / SUMS).unlink()
    save_tree(checkpoint, tree, content if changed is None else changed)
    write_sums(checkpoint)


def put(*path):
    """A change: the last of `path` is the value at the place that the others lead to."""
    *steps, last, value = path

    def change(tree):
        for step in steps:
            tree = tree[step]
        tree[last] = value

    return change


def drop(*path):
    *steps, last = path

    def change(tree):
        for step in steps:
            tree = tree[step]
        del tree[last]

    return change


STATES = {
    "a list": (lambda tree: [], "valid dictionary"),
    "a number": (lambda tree: 3, "valid dictionary"),
    "no recipe": (drop("recipe"), "recipe: Field required"),
    "no step": (drop("step"), "step: Field required"),
    "step renamed": (
        lambda tree: {("stp" if key == "step" else key): tree[key] for key in tree},
        "step: Field required",
    ),
    "NaN step": (put("step", float("nan")), "step: Input should be a valid integer"),
    "text step": (put("step", "1"), "step: Input should be a valid integer"),
    "true step": (put("step", True), "step: Input should be a valid integer"),
    "negative step": (put("step", -1), "step: Input should be greater than or equal to 0"),
    "later step": (put("step", 99), "step 99 of a stage of 2 steps"),
    "another step": (put("step", 2), "is that of 01_detail_00000002: give the folder its name back"),
    "huge stage": (put("stage", 10**30), "has no stage 10"),
    "another stage": (put("stage", 0), "has no stage 0 'detail'"),
    "another stage's name": (put("stage_name", "semantic"), "has no stage 1 'semantic'"),
    "cost of text": (put("cost", {"detail": {"steps": "many"}}), "cost.detail.steps: Input should be a valid number"),
    "cost without steps": (drop("cost", "detail", "steps"), "cost.detail.steps: Field required"),
    "metrics a list": (put("metrics", []), "metrics: Input should be a valid dictionary"),
    "stages a mapping": (put("recipe", "stages", {}), "recipe.stages: Input should be a valid list"),
    "an expert from nothing": (put("recipe", "experts", "detail", {}), "recipe.experts.detail.from: Field required"),
    "a newer format": (put("format", 3), "has format 3; this moedistill reads up to 2: update it"),
}


@pytest.mark.parametrize("case", STATES)
def test_edited_states(folder, case):
    change, message = STATES[case]
    checkpoint = folder / "checkpoints" / NAMES[2]
    edited(checkpoint, "state", change)
    for ask in (lambda: plan(load_recipe(recipe()), resume_from=folder), lambda: read_trained(folder)):
        with pytest.raises(UserError) as caught:
            ask()
        assert message in one_line(caught.value)
        assert str(checkpoint / "state.json") in str(caught.value)


def tensors_of(tree):
    """Some tensor of an expert."""
    name = next(iter(tree["semantic"]))
    return tree["semantic"], name


def swap(make):
    def change(tree):
        weights, name = tensors_of(tree)
        weights[name] = make(weights[name])

    return change


def rename(tree):
    weights, name = tensors_of(tree)
    weights["other"] = weights.pop(name)


def take_out(tree):
    weights, name = tensors_of(tree)
    del weights[name]


WEIGHTS = {
    "a list": (lambda tree: [], "it is not tensors by expert and name"),
    "a number for a tensor": (swap(lambda tensor: 1.0), "it is not tensors by expert and name"),
    "half": (swap(lambda tensor: tensor.half()), "is float16"),
    "double": (swap(lambda tensor: tensor.double()), "is float64"),
    "another shape": (swap(lambda tensor: tensor[:1]), "must be float32"),
    "flat": (swap(lambda tensor: tensor.flatten()), "must be float32"),
    "renamed": (rename, "is missing and 'other' is not known"),
    "missing": (take_out, "is missing"),
    "one more": (put("semantic", "other", torch.zeros(1)), "'other' is not known"),
    "a foreign expert": (put("other", {"w": torch.zeros(1)}), "other"),
}


@pytest.mark.parametrize("tree", ["experts", "ema"])
@pytest.mark.parametrize("case", WEIGHTS)
def test_edited_weights(folder, mixture, tree, case):
    change, message = WEIGHTS[case]
    checkpoint = folder / "checkpoints" / NAMES[2]
    edited(checkpoint, tree, change)
    with pytest.raises(UserError) as caught:
        mixture.load(*read_weights(checkpoint, read_state(checkpoint)), str(checkpoint))
    assert message in one_line(caught.value)
    assert str(checkpoint) in str(caught.value)


@pytest.fixture(scope="module")
def mixture(whole):
    """The run's mixture, as it is sampled from."""
    return load_mixture(whole)[1]


@pytest.fixture(scope="module")
def training():
    """The second stage, set up."""
    made = recipe()
    made["stages"] = made["stages"][:2]
    return set_up(made, number=1)[0]


STUDENT = ("trained", "student", "optimizer")


def moments(make):
    def change(tree):
        state = tree["trained"]["student"]["optimizer"]["state"]
        state[0]["exp_avg"] = make(state[0]["exp_avg"])

    return change


TRAININGS = {
    "a list": (lambda tree: [], "must be a mapping"),
    "empty": (lambda tree: {}, "are missing"),
    "nothing trained": (put("trained", {}), "in 'trained' 'gan', 'student' are missing"),
    "no critic": (put("critics", {}), "in 'critics' 'gan' is missing"),
    "another critic": (put("critics", "gan", {"w": torch.zeros(1)}), "in 'critics.gan' "),
    "no scheduler": (drop("trained", "student", "scheduler"), "in 'trained.student' 'scheduler' is missing"),
    "no epoch": (drop("trained", "student", "scheduler", "last_epoch"), "'last_epoch' is missing"),
    "an epoch of text": (put("trained", "student", "scheduler", "last_epoch", "1"), "last_epoch' is '1', and must be"),
    "no groups": (put(*STUDENT, "param_groups", []), "param_groups' is a list of 0, and must be a list of 1"),
    "groups of text": (put(*STUDENT, "param_groups", "abc"), "param_groups' is 'abc', and must be a list of 1"),
    "a group without parameters": (put(*STUDENT, "param_groups", 0, "params", [0]), "params' is a list of 1"),
    "no rate": (drop(*STUDENT, "param_groups", 0, "lr"), "'lr' is missing"),
    "a rate of text": (put(*STUDENT, "param_groups", 0, "lr", "fast"), "lr' is 'fast', and must be"),
    "amsgrad of text": (put(*STUDENT, "param_groups", 0, "amsgrad", "x"), "amsgrad' is 'x', and must be False"),
    "moments a list": (put(*STUDENT, "state", []), "state' is a list of 0, and must be a mapping"),
    "no second moment": (drop(*STUDENT, "state", 0, "exp_avg_sq"), "state.0' 'exp_avg_sq' is missing"),
    "moments of a stranger": (put(*STUDENT, "state", 999, {}), "999 is not known"),
    "half moments": (moments(lambda tensor: tensor.half()), "exp_avg' is float16"),
    "moments of another shape": (moments(lambda tensor: tensor[:1]), "exp_avg' is float32 [1,"),
    "a number for moments": (moments(lambda tensor: 0.0), "exp_avg' is 0.0, and must be a tensor"),
}


@pytest.mark.parametrize("case", TRAININGS)
def test_edited_training_states(folder, training, case):
    change, message = TRAININGS[case]
    checkpoint = folder / "checkpoints" / NAMES[2]
    edited(checkpoint, "training", change)
    with pytest.raises(ValueError, match="does not fit what is trained: ") as caught:
        training.load_state(load_tree(checkpoint, "training"))
    one_line(caught.value)
    assert message in str(caught.value)


def test_edits_are_refused_by_the_run_itself(folder, capsys):
    """Once through everything, for the three trees that are read after the run has begun."""
    checkpoint = folder / "checkpoints" / NAMES[2]
    kept = shutil.copytree(checkpoint, folder / "kept")
    for tree, change, message in (
        ("experts", WEIGHTS["half"][0], f"weights of expert 'semantic' in {checkpoint} do not fit the recipe"),
        ("ema", WEIGHTS["half"][0], f"average of expert 'semantic' in {checkpoint} do not fit the recipe"),
        ("ema", drop("detail"), "the checkpoint's ema.json is damaged: it has no average of expert 'detail'"),
        ("training", TRAININGS["half moments"][0], f"{checkpoint / 'training.json'} does not fit what is trained"),
    ):
        edited(checkpoint, tree, change)
        with pytest.raises(SystemExit, match="2"):
            main(["run", str(folder / "recipe.yaml"), "--resume-from", str(folder), "--device", "cpu"])
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1
        shutil.rmtree(checkpoint)
        shutil.copytree(kept, checkpoint)


JUNK = (None, -1, 10**30, float("nan"), "x", "", [], {}, True, [[]], {"a": 1}, 0.5)


def places(tree, path=()):
    """All paths into nested mappings and lists."""
    yield path
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


def mutants(tree, number):
    """So many copies with one value replaced by junk or taken out."""
    draw = random.Random(0)
    found = [path for path in places(tree) if path]
    for _ in range(number):
        mutant, path = copy.deepcopy(tree), draw.choice(found)
        place = mutant
        for step in path[:-1]:
            place = place[step]
        if draw.random() < 0.2:
            del place[path[-1]]
        else:
            place[path[-1]] = draw.choice(JUNK)
        yield mutant


def survives(ask):
    """Whether what was asked for was given; refused it must be in words."""
    try:
        ask()
    except RecipeError:
        return False
    except UserError as error:
        one_line(error)
        return False
    return True


@pytest.mark.parametrize("steps", [None, "2", [2]])
def test_steps_that_are_no_number_are_another_recipe(folder, steps):
    checkpoint = folder / "checkpoints" / NAMES[2]
    (checkpoint / SUMS).unlink()
    state = json.loads((checkpoint / "state.json").read_text())
    del state["format"]
    state["recipe"]["stages"][0]["steps"] = steps
    (checkpoint / "state.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match=r"the recipe is not the one .* stages\.0\.steps\b.* differ"):
        plan(load_recipe(recipe()), resume_from=checkpoint)


def test_random_edits_of_a_state_are_no_tracebacks(folder):
    checkpoint, read = folder / "checkpoints" / NAMES[2], load_recipe(recipe())
    (checkpoint / SUMS).unlink()
    state = json.loads((checkpoint / "state.json").read_text())
    del state["format"]
    refused = 0
    for mutant in mutants(state, 60):
        (checkpoint / "state.json").write_text(json.dumps(mutant))
        refused += not survives(lambda: plan(read, resume_from=checkpoint))
        refused += not survives(lambda: read_trained(checkpoint))
    assert 0 < refused < 120


# -- exports ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def export(whole, tmp_path):
    """A copy of the export."""
    return shutil.copytree(whole / "export", tmp_path / "export")


@pytest.mark.parametrize("file", ["export.json", "semantic.safetensors", "detail.safetensors"])
def test_any_flipped_bit_of_an_export_is_refused(export, file):
    content = (export / file).read_bytes()
    for bit in range(0, 8 * len(content), max(1, 8 * len(content) // 100 | 1)):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        (export / file).write_bytes(damaged)
        with pytest.raises(UserError) as caught:
            read_trained(export)
        assert one_line(caught.value).startswith(f"{export / file} ")


INDEXES = {
    "no experts": (drop("experts"), "experts: Field required"),
    "experts a list": (put("experts", []), "experts: Input should be a valid dictionary"),
    "no file": (drop("experts", "detail", "file"), "experts.detail.file: Field required"),
    "a file above": (put("experts", "detail", "file", "../semantic.safetensors"), "must be a name, in the folder"),
    "an absolute file": (put("experts", "detail", "file", "/dev/zero"), "must be a name, in the folder"),
    "the folder above": (put("experts", "detail", "file", ".."), "must be a name, in the folder"),
    "no name": (put("experts", "detail", "file", ""), "must be a name, in the folder"),
    "a zero byte": (put("experts", "detail", "file", "a\0b"), "must be a name, in the folder"),
    "a number": (put("experts", "detail", "file", 3), "experts.detail.file: Input should be a valid string"),
    "eta of text": (put("eta", "x"), "eta: Input should be a valid number"),
    "eta 2": (put("eta", 2.0), "eta: Input should be less than or equal to 1"),
    "eta NaN": (put("eta", float("nan")), "eta: "),
    "sigmas a number": (put("sigmas", 3), "sigmas: Input should be a valid list"),
    "sigmas of text": (put("sigmas", ["x"]), "sigmas.0: Input should be a valid number"),
    "no trajectory": (put("trajectory", None), "trajectory: Input should be a valid list"),
    "router a list": (put("router", []), "router: Input should be a valid dictionary"),
    "router without experts": (put("router", "experts", []), "router: "),
    "router of text": (put("router", "boundaries", ["x"]), "router: "),
    "router too wide": (put("router", "boundaries", [1.5]), "router: "),
    "router with a key more": (put("router", "more", 1), "router: not a timestep router"),
    "recipe a list": (put("recipe", []), "recipe: Input should be a valid dictionary"),
    "plugins a list": (put("provenance", "plugins", []), "provenance.plugins: Input should be a valid dictionary"),
    "format 0": (put("format", 0), "format: Input should be greater than or equal to 1"),
    "format of text": (put("format", "1"), "format: Input should be a valid integer"),
    "format true": (put("format", True), "format: Input should be a valid integer"),
    "a newer format": (put("format", 4), "has format 4; this moedistill reads up to 3: update it"),
    "format 2, not its sum": (put("format", 2), "its own sha256 is another"),
}


@pytest.mark.parametrize("case", INDEXES)
def test_edited_exports(export, case):
    change, message = INDEXES[case]
    index = json.loads((export / "export.json").read_text())
    index["format"] = 1
    change(index)
    (export / "export.json").write_text(json.dumps(index))
    with pytest.raises(UserError) as caught:
        read_trained(export)
    assert message in one_line(caught.value)
    assert str(export / "export.json") in str(caught.value)


def test_random_edits_of_an_export_are_no_tracebacks(export):
    index = {**json.loads((export / "export.json").read_text()), "format": 1}
    refused = 0
    for mutant in mutants(index, 100):
        (export / "export.json").write_text(json.dumps(mutant))
        refused += not survives(lambda: read_trained(export))
    assert 0 < refused < 100


def test_an_export_of_before_is_read_without_sums(whole, export):
    index = json.loads((export / "export.json").read_text())
    del index["sha256"]
    for expert in index["experts"].values():
        del expert["sha256"]
    (export / "export.json").write_text(json.dumps({**index, "format": 1}, indent=1))
    assert equal(read_trained(export)[1], read_trained(whole / "export")[1])


def test_tensors_of_an_export_have_the_run_s_own_form(export):
    index = json.loads((export / "export.json").read_text())
    (export / "export.json").write_text(json.dumps({**index, "format": 1}))
    weights = load_file(export / "detail.safetensors")
    name = next(iter(weights))
    save_file({**weights, name: weights[name].bfloat16()}, export / "detail.safetensors")
    own = name.removeprefix("moedistill.")
    with pytest.raises(UserError, match=rf"expert 'detail' in {export} do not fit the recipe: '{own}' is bfloat16"):
        load_mixture(export)


# -- what else a run reads again --------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b'{"evaluate": {"stu', b"[]", b'{"evaluate": 3}', b"\xff"])
def test_a_damaged_result_is_named(whole, tmp_path, content, capsys):
    folder = shutil.copytree(whole, tmp_path / "run")
    (folder / "result.json").write_bytes(content)
    with pytest.raises(SystemExit, match="2"):
        main(["run", str(folder / "recipe.yaml"), "--resume-from", str(folder), "--device", "cpu"])
    said = capsys.readouterr().err
    assert said.startswith(f"error: {folder / 'result.json'} is damaged: ")
    assert said.endswith("; remove it, and what it reported is done again\n")
    assert said.count("\n") == 1
    (folder / "result.json").unlink()
    run(recipe(), output=folder, resume=True, device="cpu")
    assert json.loads((folder / "result.json").read_text()).keys() == {"evaluate", "export"}


def test_strange_lines_of_metrics_do_not_stop_a_run(whole, folder):
    """What cannot be a line of the run's own stays; what a crash cut off goes."""
    strange = b'[]\n{"stage": "mine", "step": 3}\n{"step": null}\n\x0c\n'
    file = folder / "metrics.jsonl"
    file.write_bytes(strange + b"\xff\n" + file.read_bytes() + b'{"stage": "det')
    run(recipe(), output=folder, resume=True, device="cpu")
    assert file.read_bytes() == strange + "\ufffd\n".encode() + (whole / "metrics.jsonl").read_bytes()


DAMAGED_REPORTS = {
    "cost.json": [b"", b"[]", b'{"semantic": 3}', b'{"semantic": {"steps": "x"}}', b'{"semantic": {}}', b"\xff"],
    "evaluate/rows.safetensors": [b"", b"\xff" * 40],
}


@pytest.mark.parametrize("file", DAMAGED_REPORTS)
def test_report_names_what_is_damaged(whole, tmp_path, file, capsys):
    folder = shutil.copytree(whole, tmp_path / "run")
    for content in DAMAGED_REPORTS[file]:
        (folder / file).write_bytes(content)
        with pytest.raises(SystemExit, match="2"):
            main(["report", "--table", str(folder)])
        said = capsys.readouterr().err
        assert said.startswith(f"error: {folder / file} is damaged: ")
        assert said.count("\n") == 1

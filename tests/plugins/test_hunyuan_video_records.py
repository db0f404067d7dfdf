"""Whole steps of DCM through diffusers' HunyuanVideo class, against numbers recorded from the published training.

The networks are tiny, with recorded random weights. Backbone, student, stage, losses, critics and optimisers are ours;
only the draws are injected. A selection of the record lies in `data/hunyuan`; all of it is compared where it lies
beside the repository.
"""

import json
import math
import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from moedistill.data.loading import Batch
from moedistill.importing.write import import_weights
from moedistill.recipe.loading import load_recipe
from moedistill.runs.build import build_mixture, make_accelerator
from moedistill.runs.sample import load_mixture
from moedistill.stages.run import Run
from moedistill.stages.training import Training

SELECTION = Path(__file__).parents[1] / "records" / "hunyuan"
RECORD = Path(__file__).parents[3] / "shared" / "goldens"
NETWORK = {
    "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 1,
    "num_single_layers": 4, "num_refiner_layers": 1, "mlp_ratio": 2.0, "patch_size": 2, "patch_size_t": 1,
    "text_embed_dim": 16, "pooled_projection_dim": 8, "rope_theta": 256.0, "rope_axes_dim": (4, 4, 4),
}  # fmt: skip
EMBEDDED = 6.016
"""The scale that every network of the record is told: 6000 in bfloat16, over 1000."""
BOUNDARY = 38
BUGS = {
    "b2_first_at_boundary": "looks at sample 0 only: tested below",
    "b1_zero_uncond_mask": "an all-false mask, which is refused: tested below",
    "b1_student_guidance1000": "another scale for the target network than for the student: tested below",
    "b1_gas2": "temporal coherence is not divided by the number of micro-batches",
    "b1_pred_decay_l1": "a term that we do not have",
    "b1_pred_decay_l2": "a term that we do not have",
}

needs_record = pytest.mark.skipif(not RECORD.is_dir(), reason="the whole record is not here")


def files(stage):
    """Of the selection and of the record, if it is here; `id`s tell them apart."""
    found = [
        pytest.param(path, id=f"{path.stem}-{root.name}")
        for root in (SELECTION, RECORD)
        for path in sorted((root / stage).glob("b[12]_*.npz"))
        if path.stem not in BUGS
    ]
    assert found
    return found


class Golden:
    """The arrays of one file as tensors."""

    def __init__(self, path):
        self.path, self._arrays = Path(path), np.load(path)

    def __getitem__(self, key):
        return torch.from_numpy(np.asarray(self._arrays[key]))

    def __contains__(self, key):
        return key in self._arrays

    def weights(self, name):
        """A recorded state dict beside the file."""
        if SELECTION in self.path.parents:
            return selected_weights()[name]
        return load_file(self.path.with_name(f"{name}.safetensors"))

    def named(self, start):
        """Tensors by parameter name; the record marks experts' copies, adapters and critics in its own way."""
        found = {key: self[key] for key in self._arrays if key.startswith(f"{start}::")}
        return {parameter_name(key.removeprefix(f"{start}::")): value for key, value in found.items()}

    def times(self):
        """Of the record's student, as its keys write them."""
        return [key.removeprefix("active_t") for key in self._arrays if key.startswith("active_t")]

    def norms(self, start=""):
        names, values = self._arrays[f"{start}param_names"], self._arrays[f"{start}param_grad_norms"]
        return {parameter_name(str(name)): float(value) for name, value in zip(names, values, strict=True)}


@cache
def selected_weights():
    """The selection's state dicts by name.

    Bytes of the networks are stored plane by plane, the student's as differences, which compress better. Of the fresh
    detail expert only the random half is stored: the rest is zero, or equal to the semantic expert.
    """
    arrays = np.load(SELECTION / "weights.npz")
    shapes, bits = json.loads(str(arrays["shapes"])), 0
    found = {"student_init": {}, "discriminator": {}}
    for name in ("teacher", "student"):
        bits = np.ascontiguousarray(arrays[name].T).view(np.uint32)[:, 0] ^ bits
        pieces = torch.from_numpy(bits.view(np.float32)).split([math.prod(shape) for shape in shapes.values()])
        found[name] = {key: piece.view(shapes[key]) for key, piece in zip(shapes, pieces, strict=True)}
    for key in arrays:
        name, _, parameter = key.partition("/")
        if parameter:
            found[name][parameter] = torch.from_numpy(arrays[key])
    fresh, student = found["student_init"], found["student"]
    for key in list(fresh):
        linear = student[key.replace("lora_A.lora1.", "")]
        fresh[key.replace("lora_A", "lora_B")] = torch.zeros(len(linear), len(fresh[key]))
    for module in ("time_text_embed", "norm_out", "proj_out"):
        for key in [key for key in student if key.startswith(f"{module}.")]:
            fresh[key.replace(module, f"{module}_lora", 1)] = student[key]
    found["student_init"] = fresh | student
    return found


def parameter_name(name):
    """The record's names of adapters, copies and critics (`X.lora_A.lora1.weight`, `proj_out_lora.X`,
    `heads.0.0.conv1.1.X`) as we call them; those of the network itself are equal.
    """
    if name.startswith("heads."):
        head = re.sub(r"(heads\.\d+)\.0\.", r"\1.", name)
        return re.sub(r"conv(\d)\.1\.", r"norm\1.", re.sub(r"conv(\d)\.0\.", r"conv\1.", head))
    return name.replace(".lora1.", ".").replace("_lora.", ".")


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """Folders with the recorded teachers, as diffusers saves them, and a VAE's scaling."""
    from diffusers import HunyuanVideoTransformer3DModel

    folders = {}

    def folder(golden):
        teacher = golden.weights("teacher")
        key = golden.path.parent
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("pretrained")
            network = HunyuanVideoTransformer3DModel(**NETWORK)
            network.load_state_dict(teacher)  # no key missing, none unexpected
            network.save_pretrained(folders[key] / "transformer")
            (folders[key] / "vae").mkdir()
            (folders[key] / "vae" / "config.json").write_text('{"scaling_factor": 0.476986}')
        return str(folders[key])

    return folder


ADAMW = {"lr": 1e-3, "betas": [0.9, 0.999], "weight_decay": 1e-3, "eps": 1e-8, "max_grad_norm": 1.0}
SEMANTIC = {"losses": [{"kind": "huber", "c": 1e-3}, {"kind": "temporal_coherence", "lag": 3}]}
DETAIL = {
    "losses": [
        {"kind": "huber", "c": 1e-3},
        {"kind": "gan", "weight": 0.5, "width": 64, "optimizer": ADAMW},
        {"kind": "feature_matching", "weight": 0.1},
    ],
    "probe": {"block_stride": 2},
}


def recipe_data(folder, expert, guidance, num_steps=50, **stage):
    basis = {"name": "stage", "kind": "consistency", "expert": expert, "steps": 1, "optimizer": ADAMW}
    return {
        "name": "golden",
        "backbone": {"kind": "hunyuan_video", "pretrained": folder, "guidance": guidance},
        "trajectory": {"kind": "flow_matching", "num_steps": num_steps, "shift": 17.0, "end": "grid_min"},
        "router": {"kind": "timestep", "experts": ["semantic", "detail"], "boundaries": [{"point": BOUNDARY}]},
        "experts": {
            "semantic": {"kind": "full"},
            "detail": {"kind": "lora", "from": "semantic", "rank": 4, "alpha": 8},
        },
        "data": {"kind": "latents", "path": None},
        "training": {"batch_size": 1},
        "stages": [{**basis, **(SEMANTIC if expert == "semantic" else DETAIL), **stage}],
    }


def guidance_of(golden):
    w = float(golden["cfg_w"])
    if math.isnan(w):
        return {"mode": "embedded", "scale": EMBEDDED}
    return {"mode": "classifier_free", "scale": w + 1}


class RecordedDraws:
    """The record's draws in place of ours; its index i is point i + 1, its `adv_index` a point."""

    def __init__(self, golden):
        self._golden = golden

    def integers(self, name, low, high):
        value = self._golden["adv_index"] if name == "probe_point" else self._golden["index"] + 1
        assert bool((value >= low).all())
        assert bool((value < high).all())
        return value

    def normal(self, name, shape):
        value = self._golden[{"noise": "noise", "probe_noise": "adv_noise"}[name]]
        assert value.shape[1:] == tuple(shape)
        return value


class Step:
    """One step of the stage on a file's inputs: what went through it, and what it left.

    Attributes:
        v_student, v_teacher, v_target: velocities; v_target None where no jump goes on from the teacher's step.
        tensors: what the losses saw, with gradients.
        gradients: by trained thing and parameter name, before clipping.
        metrics: as a run reports them.
    """

    def __init__(self, golden, folder, expert, *, v_target=None, guidance=None, student="student", **stage):
        num_steps = int(golden["num_euler"]) if "num_euler" in golden else 50
        recipe = load_recipe(recipe_data(folder, expert, guidance or guidance_of(golden), num_steps, **stage))
        mixture = build_mixture(recipe)
        backbone = mixture.backbone
        mixture.load(experts_of(golden, expert, student), {}, "the record")
        # What dropped text is told, where the record has it; its shape is a sample's without the batch.
        null = {"prompt_embeds": golden["uncond_text"], "prompt_attention_mask": golden["uncond_mask"]}
        backbone.set_null(null)
        run = Run(recipe, Path("unused"), make_accelerator(recipe, "cpu"), mixture, None)
        self.run = Training(run, recipe.stages[0])
        stage = recipe.stages[0].build()
        stage.setup(self.run)
        if self.run.trained["student"].average is not None:
            self.run.trained["student"].average.load(golden.weights("ema"))
        for term in self.run.terms:
            if term.config.kind == "gan":
                weights = golden.weights("discriminator")
                term.loss.critic.load_state_dict({parameter_name(name): value for name, value in weights.items()})
        self._spy(v_target)
        cond = {"prompt_embeds": golden["text"], "prompt_attention_mask": golden["text_mask"]}
        if self.run.guidance.mode != "embedded":  # the record tells the scale beside guiding by two forwards
            cond["guidance"] = torch.full((len(golden["text"]),), EMBEDDED)
        batch = self.run.begin(Batch(golden["latents_raw"], cond, list(range(len(golden["text"]))), boundary=True))
        self.batch = batch
        self.run.draw = RecordedDraws(golden)
        with self.run.micro_batch(), self.run.mixture.using(expert):
            stage.step(self.run, batch)
        self.metrics = self.run.take_metrics()

    def _spy(self, v_target):
        training, clip = self.run, self.run.accelerator.clip_grad_norm_
        self.gradients, self.v_target = {}, None

        def velocity(x, sigma, cond, inner=training.velocity):
            self.x, self.sigma = x, sigma
            self.v_student = inner(x, sigma, cond)
            self.v_student.retain_grad()
            return self.v_student

        def teacher(x, sigma, cond, inner=training.teacher):
            self.v_teacher = inner(x, sigma, cond)
            return self.v_teacher

        def target(x, sigma, cond, inner=training.target, **options):
            self.x_previous, self.previous = x, sigma
            self.v_target = inner(x, sigma, cond, **options) if v_target is None else v_target
            return self.v_target

        def objective(tensors, inner=training.objective):
            self.tensors, probe = tensors, tensors.probe
            if probe is not None:
                for tensor in [probe.prediction, *probe.latent_prediction]:
                    tensor.retain_grad()
                # The record has the gradient that reaches the tapped states through the critic's heads alone.
                states = [state.detach().requires_grad_() for state in probe.hidden_prediction]
                [gan] = [term for term in training.terms if term.name == "gan"]
                value = gan.config.weight * gan.loss(replace(tensors, probe=replace(probe, hidden_prediction=states)))
                self.state_gradients = torch.autograd.grad(value, states)
            return inner(tensors)

        def clip_grad_norm(parameters, limit):
            [name] = [
                name for name, each in training.trained.items() if next(iter(each.parameters.values())) is parameters[0]
            ]
            self.gradients[name] = {key: p.grad.clone() for key, p in self.parameters(name).items()}
            return clip(parameters, limit)

        training.velocity, training.teacher, training.target, training.objective = velocity, teacher, target, objective
        training.accelerator.clip_grad_norm_ = clip_grad_norm

    def parameters(self, name):
        """Of the expert in training, or of a critic."""
        if name == "student":
            return dict(self.run.mixture.experts[self.run.expert].parameters)
        [term] = [term for term in self.run.terms if term.name == name]
        return dict(term.loss.critic.named_parameters())


def experts_of(golden, expert, student):
    """The recorded weights by expert, under our names."""
    weights = golden.weights(student)
    if expert == "semantic":
        return {"semantic": weights}
    return {
        "semantic": {key.replace(".base_layer", ""): value for key, value in weights.items() if "lora" not in key},
        "detail": {parameter_name(key): value for key, value in weights.items() if "lora" in key},
    }


def assert_close(actual, golden, tolerance):
    """The difference against the largest value."""
    assert actual.shape == golden.shape
    difference = (actual.double() - golden.double()).abs().max() / golden.double().abs().max()
    assert difference <= tolerance


def assert_scalar(actual, golden, tolerance):
    assert math.isclose(actual, float(golden), rel_tol=tolerance), f"{actual} is not {float(golden)}"


def assert_same_gradients(step, name, golden, start=""):
    """Norms of all parameters, and the full tensors where they were recorded."""
    gradients, norms = step.gradients[name], golden.norms(start)
    assert gradients.keys() == norms.keys()
    largest = max(norms.values())
    for key, norm in norms.items():
        assert abs(gradients[key].double().norm().item() - norm) <= 1e-3 * norm + 1e-6 * largest, key
    for key, gradient in golden.named({"": "grad", "g_": "ggrad", "d_": "dgrad"}[start]).items():
        difference = (gradients[key].double() - gradient.double()).norm().item()
        assert difference <= 1e-3 * norms[key] + 1e-6 * largest, key


def assert_gradient(actual, golden):
    difference = (actual.double() - golden.double()).norm() / golden.double().norm()
    assert difference <= 1e-3


def assert_same_after(step, golden):
    """Clipping and the first step of AdamW: what was recorded of it."""
    for key, value in golden.named("after").items():
        # AdamW's first step is lr·g/(|g| + eps): near eps the rounding of a gradient decides.
        clear = step.gradients["student"][key].abs() > 100 * ADAMW["eps"]
        assert clear.float().mean() > 0.9
        assert_close(step.parameters("student")[key].detach()[clear], value[clear], 1e-6)


def v_teacher_of(golden):
    v, w = golden["v_teacher_cond"], float(golden["cfg_w"])
    return v if math.isnan(w) else v + w * (v - golden["v_teacher_uncond"])


def assert_same_velocities(step, golden):
    assert torch.allclose(step.batch.latents, golden["model_input"], rtol=1e-6, atol=0)
    assert_close(step.x.detach(), golden["x_t"], 1e-6)
    assert torch.equal(step.sigma, golden["sigma"])
    assert_close(step.v_student.detach(), golden["v_student"], 1e-5)
    assert_close(step.v_teacher, v_teacher_of(golden), 1e-5)
    if step.v_target is not None:
        assert_close(step.x_previous, golden["x_prev"], 1e-6)
        assert_close(step.v_target, golden["v_target"], 1e-5)
    assert_close(step.tensors.prediction.detach(), golden["model_pred"], 1e-6)
    assert_close(step.tensors.target, golden["target"], 1e-6)


# --- The semantic expert


@pytest.mark.filterwarnings("ignore:temporal_coherence cannot be formed")
@pytest.mark.parametrize("path", files("semantic_hy"))
def test_semantic_step(path, pretrained):
    golden = Golden(path)
    stage = {"target": "ema", "ema_decay": 0.95} if path.stem.endswith("_ema") else {}
    step = Step(golden, pretrained(golden), "semantic", **stage)
    assert_same_velocities(step, golden)
    assert_same_losses(step, golden)
    assert_same_gradients(step, "student", golden)
    assert_scalar(step.metrics["grad_norm/student"], golden["grad_norm_total"], 1e-3)
    assert_gradient(step.v_student.grad, golden["grad_v_student"])
    assert_same_after(step, golden)


def assert_same_losses(step, golden):
    assert_scalar(step.metrics["loss/huber"], golden["loss_huber"], 1e-5)
    assert_scalar(step.metrics["loss/temporal_coherence"], golden["loss_tc"], 5e-5)
    assert_scalar(step.metrics["loss"], golden["loss_total"], 1e-5)


@needs_record
def test_batches_with_the_boundary_in_front(pretrained):
    """The record looks at sample 0, and trains sample 1 on the teacher's step alone: its loss is another one."""
    golden = Golden(RECORD / "semantic_hy" / "b2_first_at_boundary.npz")
    step = Step(golden, pretrained(golden), "semantic")
    assert_close(step.v_student.detach(), golden["v_student"], 1e-5)
    assert_close(step.v_teacher, v_teacher_of(golden), 1e-5)
    assert step.metrics["loss"] > 1.05 * float(golden["loss_total"])


@needs_record
def test_an_all_false_mask_is_refused(pretrained):
    golden = Golden(RECORD / "semantic_hy" / "b1_zero_uncond_mask.npz")
    with pytest.raises(ValueError, match="prompt_attention_mask of the stored negative prompt is all false"):
        Step(golden, pretrained(golden), "semantic")


@needs_record
def test_another_embedded_scale_for_the_student(pretrained):
    """The record's target network is told the teacher's scale, ours the student's, whose target it makes."""
    golden = Golden(RECORD / "semantic_hy" / "b1_student_guidance1000.npz")
    guidance = {"mode": "embedded", "scale": EMBEDDED, "student_scale": 1.0}
    ours = Step(golden, pretrained(golden), "semantic", guidance=guidance)
    step = Step(golden, pretrained(golden), "semantic", guidance=guidance, v_target=golden["v_target"])
    assert_same_velocities(step, golden)
    assert_same_losses(step, golden)
    assert_same_gradients(step, "student", golden)
    difference = (ours.v_target - golden["v_target"]).abs().max()
    assert difference > 1e-3


# --- The detail expert and its critic


@pytest.mark.parametrize("path", files("detail_hy"))
def test_detail_step(path, pretrained):
    golden = Golden(path)
    student = "student_init" if "init" in path.stem else "student"
    step = Step(golden, pretrained(golden), "detail", student=student)
    assert_same_velocities(step, golden)

    probe, heads = step.tensors.probe, int(golden["num_heads"])
    for kind, sample, hidden, latent in (
        ("fake", probe.prediction, probe.hidden_prediction, probe.latent_prediction),
        ("real", probe.target, probe.hidden_target, probe.latent_target),
    ):
        assert len(hidden) == len(latent) == heads
        assert_close(sample.detach(), golden[f"{kind}_adv"], 1e-6)
        assert_close(torch.stack(hidden).detach(), golden[f"feat_hidden_{kind}"], 1e-5)
        assert_close(torch.stack(latent).detach(), golden[f"feat_latent_{kind}"], 1e-5)

    assert_scalar(step.metrics["loss/huber"], golden["loss_huber"], 1e-5)
    assert_scalar(step.metrics["loss/gan"], golden["loss_g_hinge_mean"], 1e-5)
    # A mean square of differences that are small against the features, like temporal coherence.
    assert_scalar(step.metrics["loss/feature_matching"], golden["fm_mse"], 5e-5)
    assert_scalar(step.metrics["loss"], golden["loss_g_total"], 1e-5)
    assert_scalar(step.metrics["loss/gan_critic"], golden["loss_d"], 1e-5)

    assert_gradient(probe.prediction.grad, golden["grad_fake_adv"])
    assert_gradient(torch.stack(step.state_gradients), golden["grad_feat_hidden_fake"])
    assert_gradient(torch.stack([state.grad for state in probe.latent_prediction]), golden["grad_feat_latent_fake"])
    assert_gradient(step.v_student.grad, golden["grad_v_student"])
    assert_same_gradients(step, "student", golden, "g_")
    assert_same_gradients(step, "gan", golden, "d_")
    assert_scalar(step.metrics["grad_norm/student"], golden["g_grad_norm"], 1e-3)
    assert_scalar(step.metrics["grad_norm/gan"], golden["d_grad_norm"], 1e-3)
    assert_same_after(step, golden)


@needs_record
def test_experts_by_time(pretrained):
    """Both experts and the teacher at the record's times; our router sends every point where the record sends it."""
    golden = Golden(RECORD / "detail_hy" / "routing.npz")
    guidance = {"mode": "embedded", "scale": EMBEDDED}
    mixture = build_mixture(load_recipe(recipe_data(pretrained(golden), "detail", guidance)))
    mixture.load(experts_of(golden, "detail", "student"), {}, "the record")
    student, points = mixture, mixture.trajectory.points
    text = {"prompt_embeds": golden["text"], "prompt_attention_mask": golden["text_mask"]}
    x, cond = golden["x"], student.backbone.config.unpack(text)
    times = golden.times()
    assert len(times) == 12
    with torch.no_grad():
        for time in times:
            expert = "detail" if golden[f"active_t{time}"] else "semantic"
            with student.using(expert):
                v = mixture(x, torch.full((len(x),), float(time) / 1000), cond)
            assert_close(v, golden[f"student_t{time}"], 1e-5)
        sigma = torch.full((len(x),), 0.9)
        states = student.hidden_states(x, sigma, cond, student.backbone.blocks[::2])
        latents = [student.unembed(state, x, sigma, cond) for state in states]
        assert_close(mixture(x, sigma, cond), golden["teacher_t900"], 1e-5)
        assert_close(torch.stack(states), golden["teacher_feat_hidden_t900"], 1e-5)
        assert_close(torch.stack(latents), golden["teacher_feat_latent_t900"], 1e-5)
    assert [mixture.router.expert_at(sigma) == "detail" for sigma in points.tolist()] == [
        int(1000 * sigma) <= 981 for sigma in points.tolist()
    ]


@needs_record
def test_the_record_s_own_file_converts_to_experts_that_give_its_velocities(pretrained, tmp_path):
    """`student.safetensors` is in the layout that the published training saves, with experts that were trained."""
    golden = Golden(RECORD / "detail_hy" / "routing.npz")
    data = recipe_data(pretrained(golden), "detail", {"mode": "embedded", "scale": EMBEDDED})
    import_weights("dcm", golden.path.with_name("student.safetensors"), tmp_path / "export", load_recipe(data))
    _, mixture = load_mixture(tmp_path / "export")
    x, text = golden["x"], {"prompt_embeds": golden["text"], "prompt_attention_mask": golden["text_mask"]}
    with torch.no_grad():
        for time in golden.times():
            with mixture.using("detail" if golden[f"active_t{time}"] else "semantic"):
                v = mixture(x, torch.full((len(x),), float(time) / 1000), mixture.backbone.config.unpack(text))
            assert_close(v, golden[f"student_t{time}"], 1e-5)

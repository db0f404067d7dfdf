"""LoRA files for high and low noise become experts: what they compute is the base with W + alpha / rank · B·A."""

import json

import pytest
import torch
from importing_helpers import convert, error_of, recipe_of, refused
from safetensors.torch import save_file

from moedistill.importing.files import listed
from moedistill.recipe.loading import load_recipe
from moedistill.runs.loop import run
from moedistill.runs.sample import load_mixture

LORA = {"kind": "lora", "rank": 4, "alpha": 2, "targets": ["attention", "feed_forward"], "copies": "none"}
LINEARS = {
    "self_attn.q": "attn1.to_q", "self_attn.k": "attn1.to_k", "self_attn.v": "attn1.to_v",
    "self_attn.o": "attn1.to_out.0", "cross_attn.q": "attn2.to_q", "cross_attn.k": "attn2.to_k",
    "cross_attn.v": "attn2.to_v", "cross_attn.o": "attn2.to_out.0", "ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2",
}  # fmt: skip
"""Of a block, by the makers' names, which published files have."""
OUTSIDE = {
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
}


def two_networks(**experts):
    """A recipe on the miniature of Wan 2.2's two networks, an expert on each."""
    found = {
        name: {**LORA, "base": base, **experts.get(name, {})}
        for name, base in (("high", "transformer"), ("low", "transformer_2"))
    }
    for each in found.values():
        if each["kind"] == "full":
            for key in ("rank", "alpha", "targets", "copies"):
                each.pop(key, None)
    recipe = recipe_of("wan", found)
    recipe["backbone"]["boundary_ratio"] = 0.875
    recipe["router"] |= {"boundaries": [{"ratio": 0.875}], "closed": "high"}
    return recipe


class Files:
    """A folder with a LoRA file for each network, and networks that hold what they say, made by hand."""

    def __init__(self, recipe, folder):
        self.folder = folder
        folder.mkdir()
        backbone = load_recipe(recipe).backbone
        self.networks = dict(zip(("high", "low"), backbone.build(0).networks.values(), strict=True))
        self.tensors = {"high": {}, "low": {}}
        self._generator = torch.Generator().manual_seed(0)

    def random(self, *shape):
        return torch.randn(shape, generator=self._generator) / 5

    def _module(self, expert, here):
        return self.networks[expert].get_submodule(here)

    @torch.no_grad()
    def pair(self, expert, native, here, *, rank=4, alpha=None, names=("lora_down.weight", "lora_up.weight")):
        weight = self._module(expert, here).weight
        down, up = self.random(rank, weight.shape[1]), self.random(weight.shape[0], rank)
        self.tensors[expert] |= {f"{native}.{names[0]}": down, f"{native}.{names[1]}": up}
        if alpha is not None:
            self.tensors[expert][f"{native}.alpha"] = torch.tensor(float(alpha))
        weight += (1.0 if alpha is None else alpha / rank) * up @ down

    @torch.no_grad()
    def change(self, expert, key, parameter, *, zero=False):
        found = self.networks[expert].get_parameter(parameter)
        change = torch.zeros(found.shape) if zero else self.random(*found.shape)
        self.tensors[expert][key] = change
        found += change

    def blocks(self, prefix="diffusion_model.", **options):
        """A pair on every linear of every block."""
        for expert in self.networks:
            for number in range(2):
                for native, here in LINEARS.items():
                    self.pair(expert, f"{prefix}blocks.{number}.{native}", f"blocks.{number}.{here}", **options)
        return self

    def save(self, names=("Wan2.2_high_noise_4steps.safetensors", "Wan2.2_low_noise_4steps.safetensors"), **metadata):
        for name, tensors in zip(names, self.tensors.values(), strict=True):
            save_file(tensors, self.folder / name, metadata=metadata or None)
        return self.folder


def check(files, recipe, tmp_path, capsys, **metadata):
    """The export's experts compute what the networks made by hand do."""
    code, _, err = convert("loras", files.save(**metadata), tmp_path / "export", recipe, capsys)
    assert (code, err) == (0, "")
    _, mixture = load_mixture(tmp_path / "export")
    for expert, network in files.networks.items():
        assert error_of(mixture, expert, network) <= 1e-5
        assert error_of(mixture, {"high": "low", "low": "high"}[expert], network) > 0.01
    return mixture


@pytest.mark.parametrize(
    "options",
    [
        {"alpha": 8},
        {},
        {"prefix": ""},
        {"prefix": "model.diffusion_model.", "alpha": 1},
        {"names": ("lora_A.weight", "lora_B.weight")},
        {"names": ("lora_A.default.weight", "lora_B.default.weight"), "alpha": 3},
        {"rank": 2, "alpha": 8},
    ],
    ids=["alpha", "no alpha", "no prefix", "another prefix", "peft's names", "with an adapter's name", "a lower rank"],
)
def test_pairs_under_the_makers_names(options, tmp_path, capsys):
    recipe = two_networks()
    mixture = check(Files(recipe, tmp_path / "loras").blocks(**options), recipe, tmp_path, capsys)
    weight = mixture.experts["high"].parameters["blocks.0.ffn.net.2.lora_A.weight"]
    assert (weight.abs().amax(1) > 0).all()  # so that all of the rank can be trained


def test_names_of_kohya_s_scripts(tmp_path, capsys):
    recipe, files = two_networks(), None
    files = Files(recipe, tmp_path / "loras").blocks(alpha=2)
    for tensors in files.tensors.values():
        for key in list(tensors):
            path, _, end = key.removeprefix("diffusion_model.").partition(".lora_")
            path, end = (path, f".lora_{end}") if end else (path.removesuffix(".alpha"), ".alpha")
            tensors["lora_unet_" + path.replace(".", "_") + end] = tensors.pop(key)
    check(files, recipe, tmp_path, capsys)


def test_names_of_diffusers_with_ranks_and_alphas_in_the_header(tmp_path, capsys):
    recipe = two_networks()
    files = Files(recipe, tmp_path / "loras")
    for expert in files.networks:
        for here in LINEARS.values():
            rank, alpha = (2, 6) if "ffn" in here else (4, 8)
            path = f"blocks.0.{here}"
            files.pair(expert, f"transformer.{path}", path, rank=rank, names=("lora_A.weight", "lora_B.weight"))
            weight = files.networks[expert].get_submodule(path).weight
            up, down = (files.tensors[expert][f"transformer.{path}.lora_{side}.weight"] for side in "BA")
            with torch.no_grad():
                weight += (alpha / rank - 1) * up @ down
    said = {
        "r": 4,
        "lora_alpha": 8,
        "rank_pattern": {"net.0.proj": 2},
        "alpha_pattern": {r"net.0.proj": 6, r"net\.2": 6},
    }
    header = {f"transformer.{key}": value for key, value in said.items()}
    check(files, recipe, tmp_path, capsys, lora_adapter_metadata=json.dumps(header))


def test_copied_modules_take_whole_changes_and_pairs_and_zeros_are_no_change(tmp_path, capsys):
    """As our own export writes them: identity pairs, biases, and zeros on all other layers."""
    copies = {"copies": ["condition_embedder", "proj_out"]}
    recipe = two_networks(high=copies, low=copies)
    files = Files(recipe, tmp_path / "loras").blocks(alpha=4)
    for expert in files.networks:
        for native, here in OUTSIDE.items():
            files.pair(expert, f"diffusion_model.{native}", here, rank=7)
            files.change(expert, f"diffusion_model.{native}.diff_b", f"{here}.bias")
        for native, here in LINEARS.items():
            key = f"diffusion_model.blocks.0.{native}.diff_b"
            files.change(expert, key, f"blocks.0.{here}.bias", zero=True)
    mixture = check(files, recipe, tmp_path, capsys)
    assert "proj_out.bias" in mixture.experts["low"].parameters


def test_a_full_expert_takes_all_of_it(tmp_path, capsys):
    recipe = two_networks(high={"kind": "full"}, low={"kind": "full"})
    files = Files(recipe, tmp_path / "loras").blocks(alpha=4)
    for expert in files.networks:
        files.change(expert, "diffusion_model.blocks.0.modulation.diff", "blocks.0.scale_shift_table")
        files.change(expert, "diffusion_model.blocks.1.diff_m", "blocks.1.scale_shift_table")
        files.change(expert, "diffusion_model.head.modulation.diff", "scale_shift_table")
        files.change(expert, "diffusion_model.blocks.0.norm3.diff", "blocks.0.norm2.weight")  # the makers' third
        files.change(expert, "diffusion_model.blocks.1.norm3.diff_b", "blocks.1.norm2.bias")
        files.change(expert, "diffusion_model.blocks.1.self_attn.norm_q.diff", "blocks.1.attn1.norm_q.weight")
        files.change(expert, "diffusion_model.patch_embedding.diff", "patch_embedding.weight")
    check(files, recipe, tmp_path, capsys)


def test_one_file_for_one_expert_whose_makers_fuse_linears(tmp_path, capsys):
    """HunyuanVideo: the factor A is shared by q, k and v, and B has a block of rows for each."""
    targets = {"kind": "lora", "rank": 3, "alpha": 3, "targets": "attention", "copies": ["norm_out"]}
    recipe = recipe_of("hunyuan_video", {"only": targets})
    recipe["router"] = {"kind": "timestep", "experts": ["only"], "boundaries": []}
    network = load_recipe(recipe).backbone.build(0).network
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(3, 24, generator=generator), torch.randn(72, 3, generator=generator)
    change = torch.randn(48, 24, generator=generator)
    tensors = {
        "diffusion_model.double_blocks.0.img_attn_qkv.lora_down.weight": a,
        "diffusion_model.double_blocks.0.img_attn_qkv.lora_up.weight": b,
        "diffusion_model.final_layer.adaLN_modulation.1.diff": change,
    }
    save_file(tensors, tmp_path / "only.safetensors")
    with torch.no_grad():
        for number, linear in enumerate(("to_q", "to_k", "to_v")):
            weight = network.get_submodule(f"transformer_blocks.0.attn.{linear}").weight
            weight += b[24 * number : 24 * (number + 1)] @ a
        network.norm_out.linear.weight += torch.cat([change[24:], change[:24]])  # shift and scale change places
    assert convert("loras", tmp_path / "only.safetensors", tmp_path / "export", recipe, capsys)[0] == 0
    _, mixture = load_mixture(tmp_path / "export")
    assert error_of(mixture, "only", network) <= 1e-5


def test_training_goes_on_from_them(tmp_path, capsys):
    recipe = two_networks()
    files = Files(recipe, tmp_path / "loras").blocks(rank=2)
    convert("loras", files.save(), tmp_path / "export", recipe, capsys)
    on = two_networks(**{name: {"init": str(tmp_path / "export")} for name in ("high", "low")})
    went_on = run(on, output=tmp_path / "run", device="cpu")
    _, mixture = load_mixture(went_on.output)
    for expert, network in files.networks.items():
        assert error_of(mixture, expert, network) <= 1e-4  # a step of 1e-9


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path):
    return Files(two_networks(), tmp_path / "loras").blocks(alpha=4)


def message_of(files, recipe, tmp_path, capsys, **metadata):
    return refused("loras", files.save(**metadata), tmp_path / "export", recipe, capsys)


def test_what_has_no_place_in_an_adapter_is_named_all_of_it(files, tmp_path, capsys):
    for number in range(2):
        files.change("low", f"diffusion_model.blocks.{number}.modulation.diff", f"blocks.{number}.scale_shift_table")
        files.change("low", f"diffusion_model.blocks.{number}.self_attn.q.diff_b", f"blocks.{number}.attn1.to_q.bias")
    files.change("low", "diffusion_model.blocks.1.norm3.diff", "blocks.1.norm2.weight")
    message = message_of(files, two_networks(), tmp_path, capsys)
    assert "Wan2.2_low_noise_4steps.safetensors: " in message
    for key in ("blocks.{0-1}.modulation.diff", "blocks.{0-1}.self_attn.q.diff_b", "blocks.1.norm3.diff"):
        assert f"diffusion_model.{key}" in message
    assert "has no place in experts.low" in message
    assert "or make it kind: full, into which all is merged" in message
    message = message_of(files, two_networks(high={"targets": "attention"}), tmp_path, capsys)
    assert "diffusion_model.blocks.{0-1}.ffn.0.lora_down.weight" in message
    assert "has no place in experts.high, which adapts attention and copies none" in message


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"diffusion_model.blocks.0.self_attn.q.dora_scale": [32, 1], "another.lora_up.weight": [3, 3]},
            "diffusion_model.blocks.0.self_attn.q.dora_scale, another.lora_up.weight changes nothing that the recipe's",
        ),
        (
            {"diffusion_model.blocks.0.self_attn.q.lora_up.weight": None},
            "self_attn.q.lora_down.weight lacks its counterpart",
        ),
        (
            {"diffusion_model.blocks.0.ffn.0.lora_up.weight": [32, 4]},
            "lora_down.weight [4, 32] and diffusion_model.blocks.0.ffn.0.lora_up.weight [32, 4] change no [64, 32]",
        ),
        ({"diffusion_model.blocks.1.norm3.diff": [3]}, "norm3.diff is [3] and must be [32]"),
        ({"diffusion_model.blocks.0.ffn.0.alpha": [0]}, "ffn.0.alpha is [0] and must be one number"),
        (
            {
                "diffusion_model.blocks.0.ffn.0.lora_up.weight": [64, 0],
                "diffusion_model.blocks.0.ffn.0.lora_down.weight": [0, 32],
            },
            "diffusion_model.blocks.0.ffn.0.lora_down.weight has rank 0",
        ),
        (
            {"blocks.0.ffn.0.alpha": []},
            "diffusion_model.blocks.0.ffn.0.alpha are the same under two names; keep one of them",
        ),
        (
            {
                "lora_unet_blocks_0_ffn_0.lora_up.weight": [64, 4],
                "lora_unet_blocks_0_ffn_0.lora_down.weight": [4, 32],
            },
            "changes what ",
        ),
    ],
    ids=["foreign", "missing", "pair", "change", "alpha", "rank", "one key twice", "one module twice"],
)
def test_a_file_that_does_not_fit(changes, says, files, tmp_path, capsys):
    for key, shape in changes.items():
        if shape is None:
            del files.tensors["high"][key]
        else:
            files.tensors["high"][key] = torch.ones(shape)
    assert says in message_of(files, two_networks(), tmp_path, capsys)


def test_a_higher_rank_a_dora_and_a_parent(files, tmp_path, capsys):
    message = message_of(files, two_networks(low={"rank": 3}), tmp_path, capsys)
    assert "low_noise_4steps.safetensors has rank 4, and experts.low 3; set rank to 4" in message
    said = json.dumps({"transformer.use_dora": True})
    for header in ("[", "[]", '{"lora_alpha": "much"}', '{"alpha_pattern": {"(": 1}}', '{"alpha_pattern": 3}'):
        message = message_of(files, two_networks(), tmp_path, capsys, lora_adapter_metadata=header)
        assert "lora_adapter_metadata of its header cannot be understood" in message
    assert "it is a DoRA" in message_of(files, two_networks(), tmp_path, capsys, lora_adapter_metadata=said)
    recipe = recipe_of("wan", {"high": {"kind": "full"}, "low": {**LORA, "from": "high"}})
    assert "experts.low starts from 'high', and the weights are a change of the" in (
        message_of(files, recipe, tmp_path, capsys)
    )


def test_which_file_is_whose_is_told_by_its_name(files, tmp_path, capsys):
    recipe = two_networks()
    folder = files.save()
    (folder / "another_HIGH_fp32.safetensors").touch()
    message = refused("loras", folder, tmp_path / "export", recipe, capsys)
    assert "must hold one file for expert 'high', with 'high' in its name; it has Wan2.2_high_noise" in message
    assert "another_HIGH_fp32.safetensors" in message
    message = refused("loras", folder / "another_HIGH_fp32.safetensors", tmp_path / "export", recipe, capsys)
    assert "is no folder; the recipe has experts high, low: give a folder with a file for each" in message


def test_names_that_differ_in_a_number_are_said_in_one():
    names = [*(f"blocks.{k}.norm" for k in (0, 1, 2, 7)), "lora_unet_blocks_3_ffn", "head", "blocks.4.x"]
    assert listed(names) == "blocks.{0-2,7}.norm, lora_unet_blocks_3_ffn, head, blocks.4.x"

"""Makes the fixed assets that ship with the plugin: `python -m moedistill_digits.build_assets` (a few minutes).

The teacher belongs to its codec: where a rebuilt codec differs from the shipped one (another linear algebra library may
flip signs), the teacher has to be trained again.
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from moedistill_digits.classifier import CLASSIFIER_FILE, train_classifier
from moedistill_digits.codec import CODEC_FILE, PATCH, Codec, patches
from moedistill_digits.data import DIRECTIONS, STARTS, load_styles, render


def build_codec() -> Codec:
    """The codec of all patches of all training videos."""
    styles, _ = load_styles("train")
    samples = [
        patches(render(styles, direction, start)).reshape(-1, PATCH * PATCH)
        for direction in range(len(DIRECTIONS))
        for start in range(STARTS)
    ]
    return Codec.fit(torch.cat(samples))


def build_assets(folder: Path, **classifier_steps: int) -> None:
    """Writes codec and classifier into `folder`; `classifier_steps` as for `train_classifier`."""
    codec = build_codec()
    _write(folder / CODEC_FILE.name, vars(codec))
    _write(folder / CLASSIFIER_FILE.name, train_classifier(codec, **classifier_steps).state_dict())


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    # Not save_file, which makes files that only their owner can read.
    path.write_bytes(save(tensors))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m moedistill_digits.build_assets", description=__doc__)
    parser.add_argument("--output", type=Path, default=CODEC_FILE.parent, help="folder; default: inside the package")
    torch.set_num_threads(1)
    build_assets(parser.parse_args().output)


if __name__ == "__main__":
    main()

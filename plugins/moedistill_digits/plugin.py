"""What the digits plugin adds to moedistill."""

from typing import Any

from moedistill import hookimpl


@hookimpl
def register_components(components: Any) -> None:
    """Registers the backbone, the dataset and the metrics of the digits task."""
    package = "moedistill_digits"
    components.register(
        "backbone", "digits", f"{package}.backbone:DigitsBackboneConfig", "tiny video transformer for moving digits"
    )
    components.register("dataset", "digits", f"{package}.data:DigitsConfig", "videos of moving handwritten digits")
    for name, config, description in (
        ("frechet", "FrechetConfig", "Fréchet distance to real, held-out digit videos"),
        ("frechet_appearance", "FrechetAppearanceConfig", "the part of frechet that sees what is in the frames"),
        ("frechet_motion", "FrechetMotionConfig", "the part of frechet that sees how it moves"),
        ("coverage", "CoverageConfig", "share of the real, held-out videos with a sample near by"),
        ("density", "DensityConfig", "how densely the samples lie around real, held-out videos"),
        ("digit_accuracy", "DigitAccuracyConfig", "share of videos that show the digit asked for"),
        ("direction_accuracy", "DirectionAccuracyConfig", "share of videos that move in the direction asked for"),
        ("sharpness", "SharpnessConfig", "strength of spatial edges, relative to real videos"),
        ("flicker", "FlickerConfig", "frame-to-frame unrest, relative to real videos"),
        ("speckle", "SpeckleConfig", "isolated pixels, relative to real videos"),
    ):
        components.register("metric", name, f"{package}.metrics:{config}", description)

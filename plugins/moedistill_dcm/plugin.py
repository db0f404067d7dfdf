"""Registers DCM's losses."""

from moedistill import hookimpl


@hookimpl
def register_components(components):  # type: ignore[no-untyped-def]
    components.register(
        "loss",
        "temporal_coherence",
        "moedistill_dcm.losses:TemporalCoherenceConfig",
        "motion of the prediction follows the target's over a lag of frames",
    )
    components.register(
        "loss",
        "feature_matching",
        "moedistill_dcm.losses:FeatureMatchingConfig",
        "teacher features of the re-noised prediction match the target's",
    )
    components.register("loss", "gan", "moedistill_dcm.gan:GANConfig", "hinge GAN with heads on teacher features")

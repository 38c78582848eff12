"""Settings as the default configuration has them, but for what a test changes."""

from configs import transunet
from covseg_jax.data.augment import Augmentation
from covseg_jax.data.opacities import OpacityModel
from covseg_jax.gan.steps import GANLosses
from covseg_jax.gan.synthesize import PseudoMaskSettings
from covseg_jax.prepare.prepare_studies import PrepareSettings
from covseg_jax.segmentation.steps import SegmentationLosses

DEFAULT = transunet.get_config()


def prepare_settings(**changes) -> PrepareSettings:
    # The chests that tests draw are ellipses: the lung network has not seen such.
    return PrepareSettings(**{**DEFAULT.prepare, 'lungs_source': 'threshold', **changes})


def opacity_model(**changes) -> OpacityModel:
    return OpacityModel(window_hu=DEFAULT.prepare.window_hu, **{**DEFAULT.opacities, **changes})


def augmentation(**changes) -> Augmentation:
    return Augmentation(**{**DEFAULT.train.augment, **changes})


def pseudo_mask_settings(**changes) -> PseudoMaskSettings:
    return PseudoMaskSettings(**{**DEFAULT.synthesize, **changes})


def gan_losses(**changes) -> GANLosses:
    return GANLosses(**{**DEFAULT.gan.losses, **changes})


def segmentation_losses(**changes) -> SegmentationLosses:
    return SegmentationLosses(**{**DEFAULT.train.losses, **changes})

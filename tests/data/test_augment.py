"""Augmentation and synthetic opacities: what they may and may not change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from covseg_jax.data.augment import add_dependent_density, augment_slices
from covseg_jax.data.feeds import HEALTHY, IMAGE, LABEL, LUNGS, TARGET
from covseg_jax.data.opacities import add_opacities, paint_slices
from tests.settings import augmentation, opacity_model


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    lungs = np.zeros((6, 32, 32, 1), np.float32)
    lungs[:, 6:26, 6:26] = 1
    return {
        IMAGE: rng.uniform(0.1, 0.3, lungs.shape).astype(np.float32) * lungs,
        TARGET: (rng.uniform(0, 1, lungs.shape) > 0.5).astype(np.float32) * lungs,
        LUNGS: lungs,
        LABEL: np.arange(6, dtype=np.int32),
    }


def test_augment_slices_with_nothing_allowed_only_flips(batch):
    still = augmentation(zoom=0, shift=0, gain=0, bias=0, noise=0)
    out = augment_slices(jax.random.key(0), batch, still)
    flipped = 0
    for row in range(6):
        same = np.allclose(out[IMAGE][row], batch[IMAGE][row], atol=1e-6)
        mirrored = np.allclose(out[IMAGE][row], batch[IMAGE][row][:, ::-1], atol=1e-6)
        assert same or mirrored
        flipped += mirrored
        side = slice(None, None, -1 if mirrored else 1)
        np.testing.assert_allclose(out[TARGET][row], batch[TARGET][row][:, side], atol=1e-6)
    assert 0 < flipped < 6


def test_augment_slices_stays_in_range_and_inside_the_lungs(batch):
    strong = augmentation(zoom=0.3, shift=0.2, gain=0.9, bias=0.5, noise=0.3, smoothing_pixels=2.0)
    # One slice without lungs.
    batch |= {
        name: batch[name] * (np.arange(6) > 0)[:, None, None, None]
        for name in (IMAGE, TARGET, LUNGS)
    }
    out = augment_slices(jax.random.key(1), batch, strong)
    assert out[IMAGE].min() >= 0
    assert out[IMAGE].max() <= 1
    outside = np.asarray(out[LUNGS]) == 0
    assert np.all(np.asarray(out[IMAGE])[outside] == 0)
    assert np.all(np.asarray(out[TARGET])[outside] == 0)
    np.testing.assert_array_equal(out[LABEL], batch[LABEL])


def test_augment_slices_smooths_the_lungs_and_keeps_their_level(batch):
    soft = augmentation(zoom=0, shift=0, gain=0, bias=0, noise=0, smoothing_pixels=3.0)
    noisy, smooth = (np.asarray(batch[IMAGE]), augment_slices(jax.random.key(3), batch, soft))
    inside = batch[LUNGS][0] == 1  # as it is mirrored
    for before, after in zip(noisy, np.asarray(smooth[IMAGE]), strict=True):
        assert after[inside].std() < before[inside].std()
        assert after[inside].mean() == pytest.approx(before[inside].mean(), abs=0.01)
    # A level stays what it is, at the lungs' border too.
    level = augment_slices(jax.random.key(3), batch | {IMAGE: 0.2 * batch[LUNGS]}, soft)
    np.testing.assert_allclose(level[IMAGE], 0.2 * batch[LUNGS], atol=1e-6)
    assert set(np.unique(smooth[TARGET])) == {0, 1}


def test_augment_slices_keeps_signed_targets(batch):
    signed = batch | {TARGET: batch[TARGET] - 0.4 * batch[LUNGS]}
    out = augment_slices(jax.random.key(1), signed, augmentation(zoom=0, shift=0))
    assert float(out[TARGET].min()) == pytest.approx(-0.4)


def test_augment_slices_moves_image_and_target_together(batch):
    # The target is the image itself, so that it must be so afterwards, wherever it went.
    batch = batch | {TARGET: batch[IMAGE]}
    moved = augment_slices(
        jax.random.key(2), batch, augmentation(zoom=0.2, shift=0.1, gain=0, bias=0, noise=0)
    )
    np.testing.assert_allclose(moved[TARGET], moved[IMAGE], atol=1e-6)
    assert np.abs(np.asarray(moved[IMAGE]) - batch[IMAGE]).max() > 0.05


def test_add_dependent_density_is_at_the_back_of_the_lungs_and_never_darkens():
    image = jnp.full((32, 1, 32, 32, 1), 0.12)
    lungs = jnp.ones_like(image).at[:, :, :, :4].set(0.0)
    varied = add_dependent_density(jax.random.key(0), image, lungs, 0.5)
    added = np.asarray(varied - image)[:, 0, ..., 0]
    assert added.min() >= 0
    assert added.max() < 0.5 * (0.45 - 0.12) + 1e-6
    np.testing.assert_array_equal(added[:, :, :4], 0)
    assert added[:, :6].max() < 1e-3  # the front
    assert np.all(np.diff(added, axis=1) >= -1e-6)  # rises towards the back
    halves = added[:, -1, 8], added[:, -1, -8]
    assert np.abs(np.corrcoef(*halves)[0, 1]) < 0.6  # each side by itself
    # Any strength as often: quartiles of 64 uniform numbers, whose own deviation is 0.06.
    strengths = np.ravel(halves) / (0.5 * (0.45 - 0.12))
    np.testing.assert_allclose(
        np.quantile(strengths, [0.25, 0.5, 0.75]), [0.25, 0.5, 0.75], atol=0.18
    )


@pytest.fixture(scope='module', params=[0.0, 1.0])
def opacities(request):
    image = jnp.full((16, 16, 32, 32, 1), 0.12)
    lungs = jnp.zeros_like(image).at[:, 2:-2, 4:-4, 4:-4].set(1.0)
    image = image * lungs
    corrupted, mask = jax.jit(
        lambda key: add_opacities(
            key, image, lungs, opacity_model(clean_fraction=0.25, added_share=request.param)
        )
    )(jax.random.key(0))
    return np.asarray(image), np.asarray(lungs), np.asarray(corrupted), np.asarray(mask)


def test_add_opacities_never_darkens_and_stays_in_the_lungs(opacities):
    image, lungs, corrupted, mask = opacities
    assert np.all(corrupted >= image)
    assert corrupted.max() <= 1
    np.testing.assert_array_equal(corrupted[lungs == 0], image[lungs == 0])
    np.testing.assert_array_equal(corrupted[mask == 0], image[mask == 0])


def test_add_opacities_leaves_some_samples_clean_and_covers_a_part_of_others(opacities):
    _, lungs, _, mask = opacities
    coverage = (mask > 0.5).sum((1, 2, 3, 4)) / lungs.sum((1, 2, 3, 4))
    assert 1 <= (coverage == 0).sum() <= 9  # 4 of 16 expected
    assert coverage.max() < 0.5
    assert coverage.max() > 0.02


def test_added_density_keeps_noise_and_vessels():
    # Tissue of 0.1 with noise of 0.02, and a vessel of 0.75, +50 HU: blended, noise is lost where
    # the opacity is; added, it stays, and a vessel holds no air to be replaced.
    shape = (4, 4, 64, 64, 1)
    noise = 0.02 * np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    image = (0.1 + noise).clip(0.0, 1.0)
    image[:, :, 30:32] = 0.75
    lungs = np.ones(shape, np.float32)
    fields = {'coverage_threshold': (-9.0, -9.0), 'opacity': (1.0, 1.0), 'core_share': 0.0,
              'texture': 0.0, 'clean_fraction': 0.0}  # fmt: skip
    tissue = np.r_[4:26, 36:60]  # rows off the vessel

    def painted(share: float) -> np.ndarray:
        model = opacity_model(added_share=share, **fields)
        return np.asarray(add_opacities(jax.random.key(1), image, lungs, model)[0])

    def noise_left(image: np.ndarray) -> np.ndarray:
        # From column to column, in which the target's own field is nearly the same.
        columns = np.diff(image[:, :, tissue], axis=3)
        return columns.std((1, 2, 3, 4)) / np.sqrt(2)

    blended, added = painted(0.0), painted(1.0)
    assert noise_left(blended).max() < 0.002  # that of the target's own field
    # Each sample adds a share of its own, up to all of it.
    assert np.all(noise_left(added) > noise_left(blended))
    assert 0.01 < noise_left(added).max() < 0.02
    np.testing.assert_allclose(added[:, :, 30:32], 0.75, atol=1e-6)
    means = [each[:, :, tissue].mean((1, 2, 3, 4)) for each in (blended, added)]
    np.testing.assert_allclose(*means, atol=0.02)
    assert added.min() >= 0
    assert np.all(added >= image)


def test_paint_slices_adds_to_image_and_target(batch):
    healthy = np.array([0, 1, 0, 1, 1, 1], np.float32)
    aerated = 0.08 * batch[LUNGS]
    batch |= {IMAGE: aerated, HEALTHY: healthy, LABEL: np.array([0, 1, 1, 0, 1, 0], np.int32)}
    batch[TARGET] = batch[TARGET] * (healthy == 0)[:, None, None, None]
    model = opacity_model(
        grain_voxels=(3.0, 8.0), coverage_threshold=(0.2, 0.5), clean_fraction=0.0
    )
    out = paint_slices(jax.random.key(0), batch, model, 1.0)
    assert np.all(out[LABEL] == 1)
    assert np.all(out[TARGET] >= batch[TARGET])  # what was marked in a COVID slice stays marked
    for row in range(6):
        inside = (out[TARGET][row] == 1) & (batch[TARGET][row] < 1)
        assert inside.any()
        # The mask is where density was added, and nothing is added outside the lungs.
        added = out[IMAGE][row] - batch[IMAGE][row]
        outside = (out[TARGET][row] < 1) & (batch[LUNGS][row] > 0)
        assert added[inside].mean() > 3 * added[outside].mean()
        assert np.all(added[batch[LUNGS][row] == 0] == 0)
    untouched = paint_slices(jax.random.key(0), batch, model, 0.0)
    np.testing.assert_array_equal(untouched[IMAGE], batch[IMAGE])
    np.testing.assert_array_equal(untouched[TARGET], batch[TARGET])
    assert untouched[LABEL].tolist() == [0, 0, 1, 0, 0, 0]  # healthy and unpainted: low

"""Study grid and model grid belong together exactly where they can, closely where they cannot."""

import itertools
import json

import numpy as np
import pytest

from covseg_jax.imaging import geometry

GRID = (32, 128, 128)


def _affines():
    for order in itertools.permutations(range(3)):
        for signs in itertools.product((-1, 1), repeat=3):
            affine = np.eye(4)
            affine[:3, :3] = np.eye(3)[:, order] * signs
            yield affine


def test_canonical_order_is_exact_and_undone_for_all_48_orientations():
    data = np.arange(2 * 3 * 4).reshape(2, 3, 4)
    axes = np.indices(data.shape)
    affines = list(_affines())
    assert len(affines) == 48
    for affine in affines:
        canonical = geometry.to_canonical(data, affine)
        np.testing.assert_array_equal(geometry.from_canonical(canonical, affine), data)
        # World coordinates (RAS) of each voxel, carried along: z up, y back, x left.
        world = np.einsum('ij,jxyz->ixyz', affine[:3, :3], axes)
        right, front, up = (geometry.to_canonical(values, affine) for values in world)
        assert (np.diff(up, axis=0) == 1).all()
        assert (np.diff(front, axis=1) == -1).all()
        assert (np.diff(right, axis=2) == -1).all()


def test_canonical_spacing_follows_the_axes():
    affine = np.zeros((4, 4))
    # File axes: 0 to Superior at 8 mm, 1 to Right at 0.5 mm, 2 to Posterior at 0.7 mm.
    affine[2, 0], affine[0, 1], affine[1, 2], affine[3, 3] = 8.0, 0.5, -0.7, 1.0
    assert geometry.canonical_spacing(affine) == pytest.approx((8.0, 0.7, 0.5))


def test_oblique_grid_takes_the_closest_axes_and_is_undone():
    angle = np.deg2rad(20)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0]])
    affine = np.eye(4)
    affine[:2, :3] = turn
    affine[:3, :3] *= (-0.7, 0.8, 5.0)
    data = np.arange(2 * 3 * 4).reshape(2, 3, 4)
    canonical = geometry.to_canonical(data, affine)
    # x grows to the left already, y to the front: flipped.
    np.testing.assert_array_equal(canonical, data[:, ::-1].T)
    np.testing.assert_array_equal(geometry.from_canonical(canonical, affine), data)
    assert geometry.canonical_spacing(affine) == pytest.approx((5.0, 0.8, 0.7))


@pytest.fixture(scope='module')
def mosmed_geometry():
    """A MosMed-like grid: 512 × 512 × 41 at 0.7 and 8 mm, lungs in a part of it."""
    lungs = np.zeros((41, 512, 512), bool)
    lungs[3:38, 100:400, 60:450] = True
    return geometry.fit_geometry(lungs, (512, 512, 41), np.diag([-0.7, 0.7, 8.0, 1.0]), GRID)


def test_box_margin_and_spacing_are_those_worked_out_by_hand(mosmed_geometry):
    # 4 mm are 5 voxels of 0.7 mm, and no slice of 8 mm.
    assert mosmed_geometry.box == ((3, 38), (95, 405), (55, 455))
    # Depth: 35 slices · 8 mm / 32; in plane the longer side: 400 · 0.7 mm / 128.
    assert mosmed_geometry.model_spacing_mm == pytest.approx((8.75, 2.1875, 2.1875))
    assert mosmed_geometry.voxel_ml == pytest.approx(8.75 * 2.1875**2 / 1000)
    assert mosmed_geometry.study_voxel_ml == pytest.approx(8 * 0.7**2 / 1000)
    assert mosmed_geometry.canonical_shape == (41, 512, 512)


def test_geometry_survives_json(mosmed_geometry):
    text = json.dumps(mosmed_geometry.to_json())
    assert geometry.Geometry.from_json(json.loads(text)) == mosmed_geometry


@pytest.mark.parametrize('radius_mm', [16.0, 40.0])
def test_lesion_comes_back_from_the_model_grid(mosmed_geometry, radius_mm):
    z, y, x = (
        (spacing * (np.arange(length, dtype=np.float32) - middle)) ** 2
        for length, spacing, middle in ((41, 8.0, 19.3), (512, 0.7, 250.2), (512, 0.7, 180.7))
    )
    lesion = z[:, None, None] + y[:, None] + x < radius_mm**2  # 17 and 268 ml
    model = geometry.to_model_grid(lesion, mosmed_geometry)
    back = geometry.to_study_grid(model, mosmed_geometry) >= 0.5
    assert 2 * (back & lesion).sum() / (back.sum() + lesion.sum()) >= 0.95
    binary = geometry.to_study_grid(model >= 0.5, mosmed_geometry) >= 0.5
    assert 2 * (binary & lesion).sum() / (binary.sum() + lesion.sum()) >= 0.90
    # Nothing is lost in between: the volume on the model's grid is that of the study.
    assert model.sum() * mosmed_geometry.voxel_ml == pytest.approx(
        lesion.sum() * mosmed_geometry.study_voxel_ml, rel=0.02
    )


def _oblique_affines():
    # Turned about each axis by some degrees, as patients lie; and a gantry's tilt.
    for axis, degrees in itertools.product(range(3), (-25, 10, 40)):
        turn, angle = np.eye(4), np.deg2rad(degrees)
        first, second = (other for other in range(3) if other != axis)
        turn[first, first] = turn[second, second] = np.cos(angle)
        turn[first, second], turn[second, first] = -np.sin(angle), np.sin(angle)
        yield turn
    tilt = np.eye(4)
    tilt[1, 2] = np.tan(np.deg2rad(20))
    yield tilt


@pytest.mark.parametrize('turns', [_affines, _oblique_affines], ids=['48 orders', 'oblique'])
def test_lesion_of_5_ml_goes_there_and_back_in_any_file(turns):
    # MosMed's slices; a coarser field of view in plane, so that all of these take seconds.
    spacing, shape = (2.0, 2.0, 8.0), (150, 120, 41)
    x, y, z = (
        ((np.arange(n) - middle) * s) ** 2
        for n, s, middle in zip(shape, spacing, (91.3, 63.4, 20.2), strict=True)
    )
    # Half axes 16, 11 and 11 mm by 8 mm slices: 5 to 6 ml after sampling.
    lesion = x[:, None, None] / 14**2 + y[:, None] / 11**2 + z / 10**2 < 1
    lungs = np.zeros(shape, bool)
    lungs[6:143, 10:112, 3:38] = True
    for turn in turns():
        order = np.abs(turn[:3, :3]).argmax(axis=0)  # file axis i runs along world axis order[i]
        affine = turn.copy()
        affine[:3, :3] *= np.asarray(spacing)[order]
        file_lesion, file_lungs = (np.transpose(a, order) for a in (lesion, lungs))
        canonical = geometry.to_canonical(file_lesion, affine)
        plan = geometry.fit_geometry(
            geometry.to_canonical(file_lungs, affine), file_lesion.shape, affine, GRID
        )
        model = geometry.to_model_grid(canonical, plan)
        back = geometry.to_study_grid(model, plan, deblur=True) >= 0.5
        written = geometry.from_canonical(back, affine)
        assert (written.shape, written.dtype) == (file_lesion.shape, file_lesion.dtype)
        dice = 2 * (written & file_lesion).sum() / (written.sum() + file_lesion.sum())
        volume_ml = file_lesion.sum() * plan.study_voxel_ml
        assert 4.5 < volume_ml < 7
        assert dice >= 0.95, (turn, volume_ml, dice)


def test_shape_is_kept_and_the_shorter_side_padded_on_both_sides(mosmed_geometry):
    model = geometry.to_model_grid(np.ones((41, 512, 512), np.float32), mosmed_geometry)
    rows = np.flatnonzero(model[16].any(axis=1))
    # The box is 310 voxels of 0.7 mm high: 99.2 rows of 2.1875 mm, 14.4 free on either side.
    assert (rows[0], rows[-1]) == (14, 113)
    np.testing.assert_allclose(model[:, 14:114], 1.0, rtol=1e-6)


def test_slabs_are_no_more_than_a_way_through_memory(monkeypatch):
    image, lungs = np.zeros((9, 20, 24), np.int16), np.zeros((9, 20, 24), bool)
    image[:] = np.random.default_rng(0).integers(-2000, 3000, image.shape)
    lungs[1:8, 3:18, 2:22] = True
    plan = geometry.fit_geometry(lungs, (24, 20, 9), np.diag([-2.0, 2.0, 5.0, 1.0]), (6, 12, 12))

    def results():
        model = geometry.to_model_grid(image, plan, weights=lungs, clip=(-1000, 400))
        cut = float(np.median(model))
        return (
            model,
            geometry.to_study_grid(model, plan, deblur=True),
            geometry.to_study_grid(model, plan, deblur=True, threshold=cut),
            cut,
        )

    model, study, mask, cut = results()
    clipped = np.clip(image.astype(np.float32), -1000, 400)
    expected = geometry.to_model_grid(clipped, plan, weights=lungs)
    np.testing.assert_allclose(model, expected, rtol=1e-6)
    np.testing.assert_array_equal(mask[plan_box(plan)], (study >= cut)[plan_box(plan)])
    monkeypatch.setattr(geometry, '_SLAB_VOXELS', 1)  # a slice at a time
    for one, other in zip(results(), (model, study, mask, cut), strict=True):
        np.testing.assert_array_equal(one, other)


def plan_box(plan):
    return tuple(slice(*side) for side in plan.box)


def test_values_stay_in_the_range_of_the_input():
    rng = np.random.default_rng(1)
    image = rng.uniform(-1000, 400, (9, 40, 50)).astype(np.float32)
    lungs = np.zeros(image.shape, bool)
    lungs[1:8, 5:35, 5:45] = True
    plan = geometry.fit_geometry(lungs, (50, 40, 9), np.diag([-2.0, 2.0, 5.0, 1.0]), (16, 24, 24))
    for array in (
        geometry.to_model_grid(image, plan, weights=lungs),
        geometry.to_study_grid(geometry.to_model_grid(image, plan), plan),
        geometry.to_study_grid(geometry.to_model_grid(image, plan), plan, deblur=True),
    ):
        assert image.min() - 1e-2 <= array.min()
        assert array.max() <= image.max() + 1e-2


def test_weighted_resampling_keeps_the_chest_wall_out():
    image = np.full((8, 64, 64), 40.0, np.float32)
    lungs = np.zeros(image.shape, bool)
    lungs[1:7, 13:50, 9:57] = True
    image[lungs] = -850.0
    plan = geometry.fit_geometry(lungs, (64, 64, 8), np.diag([-3.0, 3.0, 8.0, 1.0]), (8, 32, 32))
    model = geometry.to_model_grid(image, plan, weights=lungs)
    inside = geometry.to_model_grid(lungs, plan) >= 0.5
    assert inside.any()
    np.testing.assert_allclose(model[inside], -850.0, rtol=1e-5)
    assert (model[~inside] == 0).all()


def test_arrays_of_another_shape_are_refused(mosmed_geometry):
    with pytest.raises(ValueError, match='canonical grid'):
        geometry.to_model_grid(np.zeros((512, 512, 41)), mosmed_geometry)
    with pytest.raises(ValueError, match='model grid'):
        geometry.to_study_grid(np.zeros((32, 64, 64)), mosmed_geometry)
    with pytest.raises(ValueError, match='no lung voxel'):
        geometry.fit_geometry(np.zeros((4, 4, 4), bool), (4, 4, 4), np.eye(4), GRID)


def test_what_one_slice_shows_is_sharpened_once():
    """Worked out by hand: 8 slices are seen as 4, of which the second alone shows something."""
    lungs = np.ones((8, 4, 4), bool)
    plan = geometry.fit_geometry(lungs, (4, 4, 8), np.diag([-2.0, 2.0, 5.0, 1.0]), (4, 4, 4), 0.0)
    model = np.zeros((4, 4, 4), np.float32)
    model[1] = 1
    # Linear between the slices' centres.
    linear = np.array([0, 1 / 4, 3 / 4, 3 / 4, 1 / 4, 0, 0, 0])
    np.testing.assert_allclose(geometry.to_study_grid(model, plan)[:, 2, 2], linear, atol=1e-6)
    # Of that the model's grid sees 3/14, 5/8, 3/16 and 0: slices whose centres are half a slice
    # from its own weigh 3, those one and a half away 1, and the first one has no 1 before it. What
    # is missing comes back in the same way; what is then below 0 is cut off.
    first, second, third = -3 / 14, 1 - 5 / 8, -3 / 16
    deblurred = linear.copy()
    deblurred[1:5] += np.array(
        [
            3 / 4 * first + 1 / 4 * second,
            1 / 4 * first + 3 / 4 * second,
            3 / 4 * second + 1 / 4 * third,
            1 / 4 * second + 3 / 4 * third,
        ]
    )
    found = geometry.to_study_grid(model, plan, deblur=True)[:, 2, 2]
    np.testing.assert_allclose(found, deblurred, atol=1e-6)

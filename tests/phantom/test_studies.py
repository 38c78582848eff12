"""Phantom studies: their files are MosMed's, their masks true, and a threshold cannot find them."""

import collections
import functools
import json

import cc3d
import nibabel
import numpy as np
import openpyxl
import pytest
import scipy.ndimage

from covseg_jax import errors
from covseg_jax.imaging import nifti
from covseg_jax.phantom import anatomy, lesions, vessels
from covseg_jax.phantom import studies as phantom

SHAPE, SPACING_MM = (96, 96, 20), (3.5, 3.5, 16.0)
VOXEL_ML = 3.5 * 3.5 * 16 / 1000
SEEDS = range(100, 108)


@functools.cache
def small_phantom(seed, category='CT-1'):
    return phantom.make_phantom(seed, category, SHAPE, SPACING_MM)


def write_small_set(folder, **changes):
    settings = {'num_healthy': 2, 'num_covid': 3, 'num_masked': 2, 'seed': 5, 'shape': (32, 32, 8)}
    settings |= {'spacing_mm': (10.0, 10.0, 40.0)} | changes
    return phantom.write_phantom_data_set(folder, **settings)


def test_phantom_is_las_int16_and_centred():
    made = small_phantom(100)
    assert (made.image.dtype, made.lesion.dtype, made.lungs.dtype) == (np.int16, np.uint8, np.uint8)
    assert made.image.shape == made.lesion.shape == made.lungs.shape == SHAPE[::-1]
    assert nibabel.aff2axcodes(made.affine) == ('L', 'A', 'S')
    middle = made.affine @ [47.5, 47.5, 9.5, 1]
    np.testing.assert_allclose(middle, [0, 0, 0, 1], atol=1e-9)


def test_anatomy_lies_on_the_sides_that_the_axes_say():
    made = small_phantom(100)
    lungs, image = made.lungs > 0, made.image
    middle = SHAPE[0] // 2
    # The heart takes from the left lung, which has the higher indices of axis 2.
    assert lungs[..., :middle].sum() > lungs[..., middle:].sum()
    # Cortical bone along the midline is mostly spine, behind the middle of the lungs.
    bone_y = np.nonzero(image[..., middle - 3 : middle + 3] > 150)[1]
    assert np.median(bone_y) > np.nonzero(lungs)[1].mean() + 10
    # The trachea is air above the lungs' middle, and no trachea reaches the lowest slice.
    height = (image[:, 36:66, middle - 2 : middle + 3] < -700).any(axis=(1, 2))
    assert height[-1]
    assert not height[0]


def test_same_seed_gives_same_arrays_and_another_seed_does_not():
    again = phantom.make_phantom(101, 'CT-1', SHAPE, SPACING_MM)
    np.testing.assert_array_equal(again.image, small_phantom(101).image)
    np.testing.assert_array_equal(again.lesion, small_phantom(101).lesion)
    assert np.mean(again.image != small_phantom(102).image) > 0.5


def test_lung_attenuation_is_that_of_a_real_scan():
    # A real scan (shared chest_ct_512, lungs by threshold and closing) has 25, 50 and 75 % at
    # -863, -829 and -760 HU, and 5 and 95 % at -902 and -380.
    parts = [p.image[p.lungs > 0] for p in (small_phantom(s, 'CT-0') for s in SEEDS[:4])]
    percentiles = np.percentile(np.concatenate(parts), [5, 25, 50, 75, 95])
    np.testing.assert_allclose(percentiles[1:4], [-863, -829, -760], atol=40)
    assert -960 < percentiles[0] < -870
    assert -560 < percentiles[4] < -330


def test_lungs_fill_a_realistic_volume_on_any_grid():
    for shape, spacing in ((SHAPE, SPACING_MM), ((64, 48, 33), (5.5, 7.0, 10.0))):
        made = phantom.make_phantom(7, 'CT-0', shape, spacing)
        assert 2500 < made.lungs.sum() * np.prod(spacing) / 1000 < 6500
    # A field of 112 × 112 × 100 mm: the chest shrinks, and its lungs still end inside the slices.
    tiny = phantom.make_phantom(7, 'CT-0', (64, 64, 10), (1.75, 1.75, 10.0)).lungs
    assert 0.05 < tiny.mean() < 0.3
    assert not tiny[..., [0, -1]].any()
    assert not tiny[:, [0, -1]].any()


def test_healthy_phantom_has_no_lesion():
    assert not small_phantom(100, 'CT-0').lesion.any()


@pytest.mark.parametrize('seed', [100, 103, 105])
def test_lesions_never_darken_the_healthy_chest_of_the_same_seed(seed):
    healthy, ill = small_phantom(seed, 'CT-0'), small_phantom(seed)
    rise = ill.image.astype(int) - healthy.image
    # Two roundings of one sum: at most 1 HU of difference where nothing was added.
    assert rise.min() >= -1
    np.testing.assert_array_equal(ill.lungs, healthy.lungs)
    assert np.median(rise[ill.lesion > 0]) > 60
    far = scipy.ndimage.binary_dilation(ill.lungs | ill.lesion, iterations=3) == 0
    assert np.abs(rise[far]).max() == 0


def test_true_mask_is_where_opacity_is_at_least_half():
    grid = anatomy.make_grid(SHAPE, SPACING_MM)
    subject = anatomy.draw_subject(np.random.default_rng(0), grid)
    outlines = anatomy.draw_outlines(np.random.default_rng(1), grid, subject)
    lungs = outlines.lungs >= 0.5
    made = lesions.draw_lesions(np.random.default_rng(2), grid, outlines, lungs, 120.0)
    np.testing.assert_array_equal(made.mask, lungs & (made.opacity >= 0.5))
    assert made.mask.sum() == round(120 / VOXEL_ML)
    assert made.opacity.max() == 1
    assert made.target_hu.min() >= -700
    assert made.target_hu.max() <= 60


def test_masked_lesions_follow_mosmed_statistics():
    # MosMed's 50 masks: 0.4 to 535 ml, 1 to 36 slices, 3 to 275 components (the coarse grid here
    # melts small ones together, so only more than one is asked for).
    volumes, components = [], []
    for made in map(small_phantom, SEEDS):
        assert not np.any(made.lesion & ~made.lungs & 1)
        volumes.append(made.lesion.sum() * VOXEL_ML)
        components.append(cc3d.connected_components(made.lesion, return_N=True)[1])
    assert min(volumes) >= 0.2
    assert max(volumes) <= 535
    assert max(volumes) > 4 * min(volumes)
    assert np.median(components) >= 8


def test_drawn_volumes_have_mosmed_median_and_stay_in_its_range():
    rng = np.random.default_rng(0)
    drawn = [lesions.draw_volume_ml(rng, 'CT-1', 4000) for _ in range(4000)]
    assert 60 < np.median(drawn) < 72
    assert min(drawn) >= 0.4
    assert max(drawn) <= 500


def test_lesions_prefer_the_back():
    made = [small_phantom(seed) for seed in SEEDS]
    back = [np.nonzero(p.lesion)[1].mean() - np.nonzero(p.lungs)[1].mean() for p in made]
    assert np.mean(back) > 2  # voxels of 3.5 mm; axis 1 grows to the back


@pytest.mark.parametrize(
    ('category', 'low', 'high'), [('CT-2', 0.25, 0.5), ('CT-3', 0.5, 0.75), ('CT-4', 0.75, 1)]
)
def test_infected_share_rises_with_the_class(category, low, high):
    made = small_phantom(100, category)
    assert low <= made.lesion.sum() / made.lungs.sum() <= high


def test_best_threshold_inside_the_true_lungs_does_not_find_lesions():
    dice = []
    for made in map(small_phantom, SEEDS):
        lungs, lesion = made.lungs > 0, made.lesion > 0
        scores = []
        for inside in (lungs, scipy.ndimage.binary_erosion(lungs, np.ones((1, 3, 3)))):
            for threshold in range(-800, -300, 25):
                bright = inside & (made.image > threshold)
                for mask in (bright, scipy.ndimage.binary_opening(bright)):
                    scores.append(2 * (mask & lesion).sum() / (mask.sum() + lesion.sum()))
        dice.append(max(scores))
    assert np.mean(dice) <= 0.45


def test_tube_is_drawn_with_its_volume():
    # A tube of radius 6 mm and length 100 mm across the slices; the ramp at its border is
    # symmetric about the radius, so the sum of shares is the volume (0.7 mm pixels: within 2 %).
    grid = anatomy.make_grid((60, 60, 60), (0.7, 0.7, 2.0))
    tube = np.array([[1, 2, -50, 1, 2, 50, 6]], np.float32)
    slices = vessels.draw_tubes(tube, grid)[10:50].sum(axis=(1, 2)) * 0.7**2
    np.testing.assert_allclose(slices, np.pi * 36, rtol=0.02)


def test_tree_reaches_its_targets_with_murrays_radii():
    targets = np.random.default_rng(0).uniform(-50, 50, (64, 3))
    tree = vessels.grow_tree(np.random.default_rng(1), np.zeros(3), targets, 0.5)
    ends = tree[:, 3:6]
    gap = np.linalg.norm(targets[:, None] - ends[None], axis=2).min(axis=1)
    assert gap.max() < 1e-3
    assert tree[0, 6] == pytest.approx(0.5 * 64 ** (1 / 2.7), rel=1e-5)


def test_smooth_field_has_unit_deviation():
    grid = anatomy.make_grid((80, 80, 40), (2.0, 2.0, 4.0))
    field = anatomy.smooth_field(np.random.default_rng(0), grid, 8)
    assert abs(field.mean()) < 0.05
    assert 0.9 < field.std() < 1.1
    constant = anatomy.interpolate(np.ones(anatomy.lattice_shape(grid, 8)), grid, 8)
    np.testing.assert_allclose(constant, 1, atol=1e-5)


def test_data_set_has_mosmed_layout(tmp_path):
    made = write_small_set(tmp_path)
    assert made == [f'study_{n:04d}' for n in range(1, 6)]
    files = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob('*') if p.is_file())
    assert files == [
        '.phantom.json',
        'dataset_registry.xlsx',
        'masks/study_0003_mask.nii.gz',
        'masks/study_0004_mask.nii.gz',
        'studies/CT-0/study_0001.nii.gz',
        'studies/CT-0/study_0002.nii.gz',
        'studies/CT-1/study_0003.nii.gz',
        'studies/CT-1/study_0004.nii.gz',
        'studies/CT-1/study_0005.nii.gz',
    ]
    rows = list(openpyxl.load_workbook(tmp_path / files[1]).active.values)
    assert rows[0] == ('study_id', 'category', 'study_file', 'mask_file')
    assert rows[1] == ('study_0001', 'CT-0', '/studies/CT-0/study_0001.nii.gz', None)
    assert rows[3][2:] == ('/studies/CT-1/study_0003.nii.gz', '/masks/study_0003_mask.nii.gz')
    assert len(rows) == 6


def test_files_have_mosmed_headers_and_the_phantom_in_them(tmp_path):
    write_small_set(tmp_path, num_healthy=0, num_covid=1, num_masked=1)
    expected = phantom.make_phantom((5, 0), 'CT-1', (32, 32, 8), (10.0, 10.0, 40.0))
    path = tmp_path / 'studies/CT-1/study_0001.nii.gz'
    header = nibabel.load(path).header
    # nibabel blanks the slope it has read; the file's own bytes 112 to 120 hold it.
    stored = np.frombuffer(nibabel.openers.Opener(str(path)).read(120)[112:], '<f4')
    assert np.isnan(stored).all()
    assert (int(header['sform_code']), int(header['qform_code'])) == (1, 1)
    assert header.get_data_dtype() == np.int16
    np.testing.assert_array_equal(nifti.read_volume(path).array, expected.image)
    mask = nifti.read_volume(tmp_path / 'masks/study_0001_mask.nii.gz')
    np.testing.assert_array_equal(mask.array, expected.lesion)
    np.testing.assert_array_equal(mask.affine, expected.affine)


def test_classes_follow_mosmed_proportions():
    orders = phantom._list_orders(254, 856, 50, phantom._SEVERE_SHARES, seed=0)
    counts = collections.Counter(order.category for order in orders)
    assert counts == {'CT-0': 254, 'CT-1': 684, 'CT-2': 125, 'CT-3': 45, 'CT-4': 2}
    masked = [order.study_id for order in orders if order.mask]
    assert (masked[0], masked[-1], len(masked)) == ('study_0255', 'study_0304', 50)


def test_all_covid_studies_can_have_masks_and_healthy_ones_of_the_seed_are_their_chests(tmp_path):
    covid = {'num_healthy': 0, 'num_covid': 2, 'num_masked': 2, 'severe_shares': (0.5, 0, 0)}
    write_small_set(tmp_path / 'covid', **covid)
    write_small_set(tmp_path / 'healthy', num_healthy=2, num_covid=0, num_masked=0)
    for category, name in (('CT-1', 'study_0001'), ('CT-2', 'study_0002')):
        image, mask, healthy = (
            nifti.read_volume(tmp_path / file).array
            for file in (
                f'covid/studies/{category}/{name}.nii.gz',
                f'covid/masks/{name}_mask.nii.gz',
                f'healthy/studies/CT-0/{name}.nii.gz',
            )
        )
        assert mask.any()
        assert (image != healthy)[mask > 0].any()
        far = scipy.ndimage.distance_transform_edt(mask == 0, (40, 10, 10)) > 100
        np.testing.assert_array_equal(image[far], healthy[far])


def test_interrupted_data_set_is_finished_by_the_next_call(tmp_path, monkeypatch):
    made, write = [], phantom._write_study

    def write_two_then_stop(folder, order, **grid):
        if len(made) == 2:
            raise KeyboardInterrupt
        write(folder, order, **grid)
        made.append(order.study_id)

    monkeypatch.setattr(phantom, '_write_study', write_two_then_stop)
    with pytest.raises(KeyboardInterrupt):
        write_small_set(tmp_path)
    assert not (tmp_path / 'dataset_registry.xlsx').exists()
    monkeypatch.undo()
    first = (tmp_path / 'studies/CT-0/study_0001.nii.gz').stat().st_mtime_ns
    assert write_small_set(tmp_path) == ['study_0003', 'study_0004', 'study_0005']
    assert (tmp_path / 'studies/CT-0/study_0001.nii.gz').stat().st_mtime_ns == first
    assert (tmp_path / 'dataset_registry.xlsx').is_file()
    assert write_small_set(tmp_path) == []


def test_two_processes_write_the_same_bytes_as_one(tmp_path):
    counts = {'num_healthy': 1, 'num_covid': 1, 'num_masked': 1}
    write_small_set(tmp_path / 'one', **counts)
    write_small_set(tmp_path / 'two', **counts, num_workers=2)
    files = [p.relative_to(tmp_path / 'one') for p in (tmp_path / 'one').rglob('*.nii.gz')]
    assert len(files) == 3
    for file in files:
        assert (tmp_path / 'one' / file).read_bytes() == (tmp_path / 'two' / file).read_bytes()


def test_folder_of_something_else_is_refused_and_left_alone(tmp_path):
    (tmp_path / 'notes.txt').write_text('mine')
    with pytest.raises(errors.InputError, match='holds files that are no phantoms'):
        write_small_set(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ['notes.txt']


def test_folder_of_other_settings_is_refused(tmp_path):
    write_small_set(tmp_path, num_healthy=1, num_covid=0, num_masked=0)
    assert json.loads((tmp_path / '.phantom.json').read_text())['seed'] == 5
    with pytest.raises(errors.InputError, match='phantoms of other settings'):
        write_small_set(tmp_path, num_healthy=1, num_covid=0, num_masked=0, seed=6)


def test_impossible_orders_are_refused(tmp_path):
    with pytest.raises(ValueError, match='cannot give 4 of them masks'):
        write_small_set(tmp_path / 'new', num_masked=4)
    assert not (tmp_path / 'new').exists()
    with pytest.raises(ValueError, match="'CT-5' is not one of"):
        phantom.make_phantom(0, 'CT-5')
    with pytest.raises(ValueError, match='cannot hold a chest'):
        phantom.make_phantom(0, 'CT-1', (8, 8, 2))

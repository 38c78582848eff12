"""What is said of lungs and scans that are doubtful, and that nothing is said of good ones."""

import re

import numpy as np
import pytest

from covseg_jax.imaging import formats
from covseg_jax.imaging.geometry import to_canonical
from covseg_jax.prepare.lung_report import describe_lungs
from covseg_jax.prepare.lungs import find_lungs
from tests.imaging.chest import AFFINE, draw_chest

SPACING_MM = (8.0, 4.0, 4.0)


@pytest.fixture(scope='module')
def chest():
    """(image with noise, lungs): (28, 64, 80), each lung 1,492 ml: 4/3 π · 50 · 75 · 95 mm³."""
    image = to_canonical(draw_chest('a', opacity_hu=-850)[0], AFFINE)
    lungs = image == -850
    return image + np.random.default_rng(0).normal(0, 10, image.shape), lungs


def test_a_good_scan_has_no_note_and_both_volumes(chest):
    image, lungs = chest
    report = describe_lungs(lungs, image, SPACING_MM)
    assert report.notes == ()
    assert report.right_ml == pytest.approx(1492, rel=0.03)
    assert report.left_ml == pytest.approx(1492, rel=0.03)
    # Exact together: each voxel has 0.128 ml.
    assert report.right_ml + report.left_ml == pytest.approx(lungs.sum() * 0.128)


def _cut(lungs, region, remaining=()):
    lungs = lungs.copy()
    lungs[region] = False
    if remaining:
        lungs[remaining] = True
    return lungs


LEFT = np.s_[:, :, 40:]  # x grows to the patient's left
PART = np.s_[10:20, 26:40, 50:64]  # 10 · 14 · 14 voxels, 251 ml
# name: (image, lungs, spacing) of a chest -> what the only note says
DOUBTS = {
    'one lung': (lambda i, m: (i, _cut(m, LEFT), SPACING_MM), 'no left lung was found; look'),
    'a small lung': (
        lambda i, m: (i, _cut(m, LEFT, PART), SPACING_MM),
        r'the left lung has 251 ml, the right one 1\d{3} ml',
    ),
    'few slices below': (
        lambda i, m: (i[8:], m[8:], SPACING_MM),
        'the lungs reach the lowest slice; ',
    ),
    'few slices': (
        lambda i, m: (i[8:20], m[8:20], SPACING_MM),
        'the lungs reach the lowest and the highest slice; ',
    ),
    'padded slices': (
        lambda i, m: (_padded(i, np.s_[:8]), _cut(m, np.s_[:8]), SPACING_MM),
        'the lungs reach the lowest slice; ',
    ),
    'a child': (
        lambda i, m: (i, m, (2.8, 1.4, 1.4)),
        r'the lungs have 12\d ml, fewer than 300 ml; good for a child',
    ),
    'a giant': (
        lambda i, m: (i, m, (9.0, 8.0, 8.0)),
        r'the lungs have 13\d{3} ml, more than any; check the voxel size',
    ),
    'cropped': (
        lambda i, m: (i[:, :, 18:62], m[:, :, 18:62], SPACING_MM),
        r'the field of view cuts off \d+ % of the outline',
    ),
    'thick slices': (lambda i, m: (i, m, (10.5, 4.0, 4.0)), 'slices of 10.5 mm, thicker than 10'),
    'half scale': (lambda i, m: (i / 2, m, SPACING_MM), r'air has -50\d HU, where about -1000'),
    'shifted up': (lambda i, m: (i + 500, m, SPACING_MM), r'air has -50\d HU'),
    'shifted down': (lambda i, m: (i - 500, m, SPACING_MM), r'air has -150\d HU'),
    'clipped': (lambda i, m: (np.maximum(i, -600), m, SPACING_MM), 'air has -600 HU'),
}


def _padded(image, region):
    image = image.copy()
    image[region] = -2000
    return image


@pytest.mark.parametrize('name', DOUBTS)
def test_each_doubt_has_its_note(chest, name):
    change, note = DOUBTS[name]
    image, lungs, spacing_mm = change(*chest)
    report = describe_lungs(lungs, image, spacing_mm)
    assert len(report.notes) == 1
    assert '\n' not in report.notes[0]
    assert re.match(note, report.notes[0]), report.notes[0]


UPSIDE_DOWN = 'the trachea lies at the lower end of the lungs'


def test_a_scan_that_is_upside_down_is_told_by_its_trachea(chest):
    image, lungs = chest
    image = image.copy()
    image[18:, 30:34, 38:42] = -990  # 16 mm wide, 8 of the lungs' 24 slices and above
    assert describe_lungs(lungs, image, SPACING_MM).notes == ()
    notes = describe_lungs(lungs[::-1], image[::-1], SPACING_MM).notes
    assert len(notes) == 1
    assert notes[0].startswith(UPSIDE_DOWN)


@pytest.mark.parametrize(
    ('study', 'is_upside_down'),
    [
        ('CT-0/study_0002', False),
        ('CT-0/study_0006', False),  # few of its slices show the trachea
        ('CT-1/study_0113', True),
        ('CT-1/study_0117', True),
    ],
)
def test_real_scans_that_are_upside_down_are_told(shared_data, study, is_upside_down):
    volume = formats.read_volume(shared_data / f'mini_real/studies/{study}.nii.gz')
    lungs = find_lungs(volume.array, volume.spacing_mm)
    notes = describe_lungs(lungs, volume.array, volume.spacing_mm).notes
    assert any(note.startswith(UPSIDE_DOWN) for note in notes) == is_upside_down


@pytest.mark.parametrize(
    ('case', 'notes'),
    [
        ('10_circle_cuts_lung/ct.nii.gz', ['the field of view cuts off']),
        ('11_pad_63536/s', []),
        ('27_pad_0/ct.nii.gz', []),
        ('27_rot0/ct.nii.gz', []),
        ('70_half_scale/ct.nii.gz', ['the lungs reach the highest', 'air has -500 HU']),
    ],
)
def test_cases_have_both_lungs_and_their_notes(shared_data, case, notes):
    volume = formats.read_volume(shared_data / 'cases' / case, None)
    lungs = find_lungs(volume.array, volume.spacing_mm)
    report = describe_lungs(lungs, volume.array, volume.spacing_mm)
    # The scan that they were made from has 2,545 and 2,232 ml.
    assert report.right_ml == pytest.approx(2545, rel=0.05)
    assert report.left_ml == pytest.approx(2232, rel=0.05)
    assert len(report.notes) == len(notes)
    for found, expected in zip(report.notes, notes, strict=True):
        assert found.startswith(expected)


def test_few_voxels_or_slices_of_lung_are_described(chest):
    image, lungs = chest
    few = np.zeros_like(lungs)
    few[14, 30, 60] = True  # between the points of the coarse grid, or on one
    shifted = few.copy()
    shifted[14, 31, 61] = True
    for each in (few, shifted & ~few):
        assert describe_lungs(each, image, (0.8, 0.7, 0.7)).notes
    two = lungs[[10, 20]]
    notes = describe_lungs(two, image[[10, 20]], (40.0, *SPACING_MM[1:])).notes
    assert not any(note.startswith(UPSIDE_DOWN) for note in notes)


def test_lungs_of_a_tilted_scan_have_the_volume_of_their_voxels(chest):
    image, lungs = chest
    straight = describe_lungs(lungs, image, SPACING_MM)
    tilted = describe_lungs(lungs, image, SPACING_MM, 0.9 * np.prod(SPACING_MM) / 1000)
    assert tilted.right_ml == pytest.approx(0.9 * straight.right_ml)

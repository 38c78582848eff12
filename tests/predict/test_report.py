"""What is said of predictions: a record a study, a page of all of them, a paragraph of methods."""

import copy
import csv
import dataclasses
import hashlib
import json
import re

import pytest

import covseg_jax
from covseg_jax import written
from covseg_jax.imaging.masks import MaskSettings
from covseg_jax.imaging.studies import find_inputs
from covseg_jax.predict import report, viewer
from covseg_jax.predict.methods import describe_methods
from covseg_jax.predict.model import RANGE, Origin, average_models
from covseg_jax.predict.studies import Extras, predict_studies
from covseg_jax.segmentation.volumes import VolumeSettings
from tests.imaging.chest import AFFINE, SHAPE, draw_chest, write_stored, write_study
from tests.imaging.test_dicom import write_series
from tests.predict.test_studies import MODEL

ORIGIN = Origin(
    'default',
    'transunet',
    VolumeSettings(8, 0.5, flip=True, smoothing_slices=0.7, border_factor=0.8, output='sigmoid'),
    'transunet:phantom',
    8000,
    {'data_sets': ['phantoms'], 'human_masks': False},
    {'weights.safetensors': 'a1b2'},
)
NAMED = dataclasses.replace(MODEL, origins=(ORIGIN,))


def predict(scans, output, **changes):
    wanted = Extras(report=True)
    return predict_studies(
        find_inputs(scans), NAMED, output, num_workers=0, wanted=wanted, **changes
    )


def write_scans(folder):
    """`a` with an opacity, `b` without one, `c` cut off above, and a damaged one."""
    write_study(folder, 'a', lesion=False)
    write_study(folder, 'b', lesion=False, opacity_hu=-850)
    image, _ = draw_chest('c')
    write_stored(folder / 'c.nii.gz', image[:, :, 10:], AFFINE)
    (folder / 'd.nii.gz').write_bytes(b'broken')


@pytest.fixture(scope='module')
def predicted(tmp_path_factory):
    """The folders of the scans and of what was written of them."""
    folder = tmp_path_factory.mktemp('predicted')
    write_scans(folder / 'scans')
    predict(folder / 'scans', folder / 'masks')
    return folder / 'scans', folder / 'masks'


def read_record(output, study_id):
    return json.loads((output / f'{study_id}_results.json').read_text())


def listed(page):
    """The studies of the page's table, and of its viewer."""
    table = re.findall(r'<tr data-study="(.*?)"', page)
    views = json.loads(re.search(r'type="application/json">(.*?)</script>', page, re.S).group(1))
    return table, [view['study_id'] for view in views]


def test_record_of_a_study_has_its_row_and_what_it_was_made_from(predicted):
    scans, output = predicted
    with (output / 'results.csv').open() as file:
        rows = {row['study_id']: row for row in csv.DictReader(file)}
    assert not (output / 'd_results.json').exists()
    for study_id in 'abc':
        record, row = read_record(output, study_id), rows[study_id]
        assert '; '.join(record['warnings']) == row.pop('notes')
        assert [row.pop(name) for name in RANGE] == ['', '']  # it is one network
        assert {'study_id': study_id} | {k: str(v) for k, v in record['results'].items()} == row
    record = read_record(output, 'a')
    checksum = hashlib.sha256((scans / 'a.nii.gz').read_bytes()).hexdigest()
    assert (record['scan']['sha256'], record['scan']['files']) == (checksum, 1)
    assert (record['scan']['shape'], record['scan']['spacing_mm']) == (list(SHAPE), [4, 4, 8])
    mask = output / record['results']['mask']
    assert record['mask_sha256'] == hashlib.sha256(mask.read_bytes()).hexdigest()
    assert record['model']['networks'][0]['sha256'] == {'weights.safetensors': 'a1b2'}
    assert record['settings']['masks']['seed_threshold'] == 0.6
    assert record['software']['covseg_jax'] == covseg_jax.__version__
    assert written.is_ours(output / 'a_results.json')


def test_record_of_a_series_has_the_checksum_that_the_documentation_says(tmp_path):
    image, _ = draw_chest('a')
    write_series(tmp_path / 'chest', image, AFFINE)
    files = sorted((tmp_path / 'chest').iterdir())
    lines = [f'{hashlib.sha256(f.read_bytes()).hexdigest()}  {f.name}\n' for f in files]
    predict_studies(find_inputs(tmp_path / 'chest'), MODEL, tmp_path, num_workers=0)
    scan = read_record(tmp_path, 'chest')['scan']
    assert scan['files'] == len(files) == SHAPE[2]
    assert scan['sha256'] == hashlib.sha256(''.join(lines).encode()).hexdigest()


def test_page_lists_most_infection_first_and_says_what_is_doubtful_or_not_there(predicted):
    _, output = predicted
    page = (output / 'report.html').read_text()
    infections = {s: read_record(output, s)['results']['infection_percent'] for s in 'abc'}
    by_infection = sorted(infections, key=infections.get, reverse=True)
    assert by_infection[-1] == 'b'
    assert listed(page) == (by_infection, by_infection)
    assert '<li>the lungs reach the lowest slice; ' in page
    assert re.search(r'<li>d: d\.nii\.gz: ', page)
    assert '://' not in page  # nothing is fetched
    assert 'Not a medical device' in page
    views = json.loads(re.search(r'type="application/json">(.*?)</script>', page, re.S).group(1))
    (view,) = [view for view in views if view['study_id'] == 'a']
    # The opacity of 40 mm is in the middle of 28 slices of 8 mm.
    assert view['slices'][view['start']] in (13, 14)


def test_page_of_a_resumed_run_has_the_studies_that_were_done_before(tmp_path):
    scans, output = tmp_path / 'scans', tmp_path / 'masks'
    write_study(scans, 'a', lesion=False)
    predict(scans, output)
    before = read_record(output, 'a')
    (output / 'report.html').unlink()
    write_study(scans, 'b', lesion=False, opacity_hu=-400)
    predict(scans, output, resume=True)
    assert read_record(output, 'a') == before
    table, views = listed((output / 'report.html').read_text())
    assert sorted(table) == sorted(views) == ['a', 'b']
    assert 'in 2 chest CT scans' in (output / 'methods.txt').read_text()
    # Its pictures are gone: it is done again.
    (output / '.a_view.json').unlink()
    predict(scans, output, resume=True)
    assert (output / '.a_view.json').exists()
    assert len((output / 'results.0.jsonl').read_text().split('"study_id": "a", "identity"')) == 3
    # Of a run without a page none is left that says other things.
    predict_studies(find_inputs(scans), NAMED, output, num_workers=0)
    assert not [name for name in ('report.html', 'methods.txt', '.a_view.json')
                if (output / name).exists()]  # fmt: skip


@pytest.mark.parametrize('num_studies', [1, 40, 41, 200, 5000])
def test_pictures_of_a_page_keep_to_its_bytes(num_studies):
    limits = viewer.limits_of(num_studies)
    assert min(num_studies, viewer.MAX_VIEWS) * limits.max_bytes <= viewer.PAGE_BYTES
    assert limits.max_bytes >= 100_000
    assert limits.max_slices == (64 if num_studies <= 40 else 24)


def test_page_of_many_studies_shows_those_of_most_infection(predicted):
    _, output = predicted
    records = [copy.deepcopy(read_record(output, 'c')) for _ in range(250)]
    for number, record in enumerate(records):
        record['study_id'] = f's{number:03}'
        record['results']['infection_percent'] = number / 10

    def render(size):
        view = {'slices': [0], 'start': 0, 'width': 1, 'height': 1, 'columns': 1, 'masks': {}}
        return report.render_report(
            records, {}, ('Text.', ''), lambda name: view | {'study_id': name, 'scan': 'x' * size}
        )

    page = render(size=10)
    table, views = listed(page)
    assert (len(table), table[0], table[-1]) == (250, 's249', 's000')
    assert (len(views), views[-1]) == (200, 's050')
    assert '200 of 250 studies' in page
    assert '<li>s000: ' in page  # its warnings, which no view shows
    assert '<li>s249: ' not in page
    assert len(listed(render(size=1_000_000))[1]) == 20


def test_methods_say_what_was_done(predicted):
    _, output = predicted
    text = (output / 'methods.txt').read_text()
    paragraph = text.split('\n\n')[0]
    for part in (
        'in 3 chest CT scans', '1 more scan could not', f'version {covseg_jax.__version__}',
        'Lungs were found by their density and by morphology.', '28 × 64 × 64 voxels',
        'the TransUNet that comes with covseg_jax', 'SHA-256 of its weights a1b2',
        'trained on synthetic scans (phantoms) without human lesion masks, as the model card',
        'mirror image', '0.5 pixels', '0.7 slices', 'multiplied by 0.8',
        'at least 0.5 were marked where one of them reaches 0.6', 'less than 0.1 ml',
    ):  # fmt: skip
        assert part in paragraph
    assert '\n' not in paragraph
    assert 'Computers in Biology and Medicine 149:106033' in text


def test_methods_of_other_settings_say_those(predicted):
    _, output = predicted
    record = copy.deepcopy(read_record(output, 'a'))
    plain = dataclasses.replace(
        ORIGIN, name='runs/mine', volumes=VolumeSettings(8, 0.0, False, 0.0, 1.0, 'sigmoid'),
        training_data=None, sha256={},
    )  # fmt: skip
    coarse = dataclasses.replace(plain, pixels=(32, 32))
    both = average_models([dataclasses.replace(MODEL, origins=(each,)) for each in (plain, coarse)])
    record['model']['networks'] = [dataclasses.asdict(origin) for origin in both.origins]
    record['settings']['masks'] = dataclasses.asdict(
        MaskSettings(min_component_ml=0, share_of_max=0.2)
    )
    record['settings']['preparation']['lungs_source'] = 'file'
    paragraph, _ = describe_methods([record], 0)
    assert 'The outputs of 2 networks of axial slices were averaged: a TransUNet' in paragraph
    assert 'slices of 32 × 32 pixels' in paragraph
    assert 'resampled to the pixels of the other networks' in paragraph
    assert "exceeds 20 % of the study's highest" in paragraph
    assert 'Lung masks were given with the scans.' in paragraph
    assert not re.search('mirror|Gaussian|multiplied|dropped|more scan|trained|SHA-256', paragraph)


def test_methods_name_painted_opacities_where_no_covid_scan_was_learned_from(predicted):
    record = copy.deepcopy(read_record(predicted[1], 'a'))
    (network,) = record['model']['networks']
    network['training_data'] |= {'covid_studies': 0}
    paragraph, _ = describe_methods([record], 0)
    assert (
        'trained on synthetic opacities, painted into scans without lesions of synthetic scans '
        '(phantoms), without human lesion masks'
    ) in paragraph

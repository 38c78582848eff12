import base64
import html
import math
import re

import numpy as np
import pytest
from matplotlib import colors, image
from matplotlib.figure import Figure

from covseg_jax.evaluation import evaluate, report

DICE = {'study_0255': 0.5, 'study_0256': 0.125, 'study_0257': 0.875, 'study_0258': math.nan}


@pytest.fixture
def case_rows():
    numbers = [column for column in evaluate.CASE_COLUMNS if column not in ('study_id', 'category')]
    base = dict.fromkeys(numbers, 0.25) | {'category': 'CT-1'}
    return [base | {'study_id': name, 'dice': value} for name, value in DICE.items()]


def slice_rows(num, **values):
    base = dict.fromkeys(evaluate.SLICE_COLUMNS, 0.5) | {'study_id': 'a', 'protocol': 'slice_all'}
    return [base | {'slice': z, 'infection_percent': 1.0 + z} | values for z in range(num)]


def overlay_case(**changes):
    """A body of soft tissue with air inside; truth in the slices 2 and 4, prediction in 2."""
    image_hu = np.full((6, 40, 50), -1000.0, np.float32)
    image_hu[:, 5:35, 5:45] = 40
    image_hu[:, 10:30, 10:40] = -850
    truth, prediction = np.zeros((2, *image_hu.shape), bool)
    truth[2, 12:20, 12:20] = truth[4, 15:18, 15:18] = True
    prediction[2, 14:24, 14:24] = True
    arrays = {'image_hu': image_hu, 'truth': truth, 'prediction': prediction}
    settings = {'study_id': 's', 'dice': 0.5, 'pseudo_mask': None, 'spacing_mm': (8, 0.7, 0.7)}
    return report.OverlayCase(**(arrays | settings | changes))


def has_colour(path, colour):
    pixels = image.imread(path)[..., :3]
    return bool((np.abs(pixels - colors.to_rgb(colour)).max(axis=-1) < 0.02).any())


@pytest.fixture
def saved_titles(monkeypatch):
    """The titles of the panels of each figure that is saved."""
    titles, savefig = [], Figure.savefig

    def record(figure, *args, **settings):
        titles.append([axes.get_title() for axes in figure.axes])
        savefig(figure, *args, **settings)

    monkeypatch.setattr(Figure, 'savefig', record)
    return titles


def test_running_median_equals_hand_computed_one():
    # Six points in windows of five, by rising x: y = 3 1 9 2 8 | 1 9 2 8 7.
    x, y = np.array([6, 1, 2, 3, 4, 5.0]), np.array([7, 3, 1, 9, 2, 8.0])
    centres, medians = report.running_median(x, y)
    assert (centres.tolist(), medians.tolist()) == ([3, 4], [3, 7])


def test_plots_name_protocol_and_number_of_points(case_rows, tmp_path, saved_titles):
    # A case of infection 0 and an undefined Dice have no place on a logarithmic axis.
    case_rows[0]['infection_percent'] = 0.0
    paths = report.plot_against_infection(case_rows, slice_rows(12), tmp_path)
    names = ('dice', 'sensitivity', 'specificity')
    assert paths == [tmp_path / 'figures' / f'{name}_vs_infection.png' for name in names]
    assert all(image.imread(path).shape[1] > 1000 for path in paths)
    endings = [[title.splitlines()[1] for title in figure] for figure in saved_titles]
    slices = [
        'protocol slice_infection_over_1pct, n = 0 of 0 slices',
        'protocol slice_all, n = 12 of 12 slices',
    ]
    assert endings == [
        ['protocol volume, n = 2 of 4 studies', *slices],
        *[['protocol volume, n = 3 of 4 studies', *slices]] * 2,
    ]


def test_trend_is_drawn_only_through_enough_points(tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr(
        report,
        '_save',
        lambda figure, path: lines.append([len(axes.lines) for axes in figure.axes]),
    )
    ten = slice_rows(10, protocol='slice_infection_over_1pct')
    report.plot_against_infection([], ten + slice_rows(9), tmp_path)
    assert lines == [[0, 1, 0]] * 3  # panels: volume, infection over 1 %, all slices


def test_chosen_cases_are_best_median_and_worst(case_rows):
    assert report.choose_cases(case_rows) == {
        'best': 'study_0257',
        'median': 'study_0255',
        'worst': 'study_0256',
    }
    assert report.choose_cases(case_rows[:2]) == {'best': 'study_0255', 'worst': 'study_0256'}
    assert report.choose_cases(case_rows[3:]) == {}


@pytest.mark.parametrize('with_pseudo_mask', [True, False])
def test_overlay_draws_the_contours_that_are_given(tmp_path, saved_titles, with_pseudo_mask):
    case = overlay_case()
    if with_pseudo_mask:
        case = overlay_case(pseudo_mask=case.truth)
    (path,) = report.plot_overlays({'worst': case}, tmp_path)
    assert path == tmp_path / 'figures' / 'case_worst.png'
    assert has_colour(path, report.TRUTH_COLOUR)
    assert has_colour(path, report.PREDICTION_COLOUR)
    assert has_colour(path, report.PSEUDO_COLOUR) == with_pseudo_mask
    columns = ['scan', 'truth', *(['pseudo-mask'] if with_pseudo_mask else []), 'prediction']
    # Two rows: only the slices with lesion, though three were to be had.
    assert saved_titles == [columns + [''] * len(columns)]


def test_overlay_of_a_healthy_case_left_empty_still_shows_the_scan(tmp_path, saved_titles):
    empty = np.zeros((6, 40, 50), bool)
    report.plot_overlays({'median': overlay_case(truth=empty, prediction=empty)}, tmp_path)
    assert saved_titles == [['scan', 'truth', 'prediction']]


@pytest.fixture
def page(case_rows, tmp_path):
    figures = report.plot_overlays({'best': overlay_case()}, tmp_path)
    summary = {
        'protocols': evaluate.summarise(case_rows, slice_rows(12, dice=0.375)),
        'pseudo_masks': evaluate.summarise(case_rows[:1], []),
    }
    run = {'config': 'transunet.py:phantom', 'devices': ['cpu:0'], 'note': '<b>&'}
    path = report.write_report(tmp_path, summary, case_rows, figures, run)
    assert path == tmp_path / 'report.html'
    return path.read_text()


def test_report_lists_every_case_worst_first_and_the_undefined_last(page):
    table = page[page.index('<table id="cases">') :]
    found = re.findall(r'<td data-key="(study_\d+)">\s*(\S+?)</td>', table)
    assert [key for key, _ in found] == ['study_0256', 'study_0255', 'study_0257', 'study_0258']
    assert all(key == text for key, text in found)
    assert 'none predicted): study_0258.' in page


def test_report_shows_the_figures_of_the_summary(page):
    # Dice 0.125, 0.5, 0.875: mean and median 0.5, standard deviation 0.375.
    row = re.search(r'<tr><td>Dice</td>(.*?)</tr>', page).group(1)
    cells = re.findall(r'<td class="number">(.*?)</td>', row)
    assert (cells[:3], cells[-2:]) == (['0.500', '0.375', '0.500'], ['3', '1'])
    assert '<td class="number">0.375</td>' in page[page.index('<code>slice_all') :]
    assert 'Pseudo-masks against the true masks' in page


def test_report_needs_nothing_outside_itself(page, tmp_path):
    assert '://' not in page
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', page)
    assert sources
    assert all(source.startswith('data:') for source in sources)
    embedded = re.search(r'data:image/png;base64,([\w+/=]+)', page).group(1)
    assert base64.b64decode(embedded) == (tmp_path / 'figures' / 'case_best.png').read_bytes()


def test_report_escapes_names(case_rows, tmp_path):
    case_rows[0]['study_id'] = name = '<script>alert("x")</script>'
    summary = {'protocols': evaluate.summarise(case_rows, [])}
    page = report.write_report(tmp_path, summary, case_rows, [], {'input': name}).read_text()
    assert name not in page
    assert html.unescape(page).count(name) == 3  # the run, and key and text of the case

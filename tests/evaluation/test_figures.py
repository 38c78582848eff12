import dataclasses

import numpy as np
import pytest
from matplotlib import colors, image
from matplotlib.figure import Figure

from covseg_jax.evaluation import figures
from tests.evaluation.conftest import case_images, slice_rows


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


def test_running_quartiles_equal_hand_computed_ones():
    # Six points in windows of five, by rising x: y = 3 1 9 2 8 | 1 9 2 8 7.
    x, y = np.array([6, 1, 2, 3, 4, 5.0]), np.array([7, 3, 1, 9, 2, 8.0])
    centres, (low, medians, high) = figures.running_quartiles(x, y)
    assert (centres.tolist(), medians.tolist()) == ([3, 4], [3, 7])
    assert (low.tolist(), high.tolist()) == ([2, 2], [8, 8])


def test_plots_name_protocol_and_number_of_points(case_rows, tmp_path, saved_titles):
    # A case of infection 0 and an undefined Dice have no place on a logarithmic axis.
    case_rows[0]['infection_percent'] = 0.0
    paths = figures.plot_against_infection(case_rows, slice_rows(12), tmp_path)
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
        figures,
        '_save',
        lambda figure, *_: lines.append([len(axes.lines) for axes in figure.axes]),
    )
    ten = slice_rows(10, protocol='slice_infection_over_1pct')
    figures.plot_against_infection([], ten + slice_rows(9), tmp_path)
    assert lines == [[0, 1, 0]] * 3  # panels: volume, infection over 1 %, all slices


def test_chosen_cases_are_best_median_and_worst(case_rows):
    assert figures.choose_cases(case_rows) == {
        'best': 'study_0257',
        'median': 'study_0255',
        'worst': 'study_0256',
    }
    assert figures.choose_cases(case_rows[:2]) == {'best': 'study_0255', 'worst': 'study_0256'}
    assert figures.choose_cases(case_rows[3:]) == {}


@pytest.mark.parametrize('with_pseudo_mask', [True, False])
def test_overlay_draws_the_contours_that_are_given(tmp_path, saved_titles, with_pseudo_mask):
    case = case_images()
    if with_pseudo_mask:
        case = case_images(pseudo_mask=case.truth)
    path = figures.plot_overlay('worst', case, tmp_path)
    assert path == tmp_path / 'figures' / 'case_worst.png'
    assert has_colour(path, figures.MASK_COLOURS['truth'])
    assert has_colour(path, figures.MASK_COLOURS['prediction'])
    assert has_colour(path, figures.MASK_COLOURS['pseudo-mask']) == with_pseudo_mask
    columns = ['scan', 'truth', *(['pseudo-mask'] if with_pseudo_mask else []), 'prediction']
    # Two rows: only the slices with lesion, though three were to be had.
    assert saved_titles == [columns + [''] * len(columns)]


def test_overlay_of_a_healthy_case_left_empty_still_shows_the_scan(tmp_path, saved_titles):
    empty = np.zeros((6, 40, 50), bool)
    figures.plot_overlay('median', case_images(truth=empty, prediction=empty), tmp_path)
    assert saved_titles == [['scan', 'truth', 'prediction']]


def test_agreement_lines_stand_at_mean_and_196_deviations(case_rows, tmp_path, monkeypatch):
    # Predicted minus true: 2, 4 and 6 ml; mean 4, sample deviation 2.
    rows = [
        row | {'volume_ml_true': 10.0, 'volume_ml_predicted': 10.0 + change}
        for row, change in zip(case_rows[:3], (2, 4, 6), strict=True)
    ]
    drawn = []
    monkeypatch.setattr(figures, '_save', lambda figure, *_: drawn.append(figure))
    figures.plot_agreement(rows, [], tmp_path)
    (axes,) = drawn[0].axes
    heights = sorted({float(line.get_ydata()[0]) for line in axes.lines})
    assert heights == pytest.approx([0, 0.08, 4, 7.92])
    assert axes.collections[0].get_offsets().tolist() == [[11, 2], [12, 4], [13, 6]]


def test_calibration_is_drawn_from_the_filled_bins(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, '_save', lambda figure, *_: drawn.append(figure))
    figures.plot_calibration(np.array([[10, 0, 4], [1.0, 0, 3.0], [2, 0, 4]]), tmp_path)
    upper, lower = drawn[0].axes
    assert upper.lines[1].get_xydata().tolist() == pytest.approx(np.array([[0.1, 0.2], [0.75, 1]]))
    assert [bar.get_height() for bar in lower.patches] == [10, 0, 4]


def test_a_study_may_be_named_like_a_formula(tmp_path):
    case = dataclasses.replace(case_images(), study_id='a$_$b')
    assert figures.plot_overlay('best', case, tmp_path).exists()

"""The picture of a run's progress, from the lines that training left."""

import contextlib
import json
import math
import os
import signal

import numpy as np
import pytest
from PIL import Image

from covseg_jax.errors import Stopped
from covseg_jax.training import progress
from covseg_jax.training.logging import find_pictures, image_strip, open_log
from tests.training import test_loop


def log(workdir, model, rows, rest=''):
    folder = workdir / model
    folder.mkdir(parents=True)
    lines = ''.join(json.dumps(row) + '\n' for row in rows)
    (folder / 'metrics.jsonl').write_text(lines + rest)


@pytest.fixture
def workdir(tmp_path):
    steps = {
        'loss/total': (0.5, None, 0.25),
        'loss/adversarial': (2.0, 1.0, 0.5),
        'discriminator/accuracy': (0.5, 0.75, 1.0),
        'optimizer/learning_rate': (0.001, 0.002, 0.001),
        'optimizer/gradient_norm': (1.0, 1.0, 1.0),
    }
    rows = [
        {'step': 10 * (i + 1)} | {name: values[i] for name, values in steps.items()}
        for i in range(3)
    ]
    rows.insert(2, {'step': 20, 'validation/removed': 0.125, 'validation/mse': 0.002})
    log(tmp_path, 'gan', rows, rest='{"step": 40, "loss/tot')
    log(tmp_path, 'transunet', [{'step': 1200, 'loss/total': 0.0}])
    return tmp_path


def drawn(axes):
    """First words of the legend -> the line."""
    handles, labels = axes.get_legend_handles_labels()
    return {label.rsplit(' ', 1)[0]: line for line, label in zip(handles, labels, strict=True)}


def test_each_model_has_a_row_that_says_how_far_it_is(workdir):
    figure = progress.learning_curves(workdir)
    titles = [part.get_suptitle() for part in figure.subfigs]
    assert titles == ['GAN, step 30', 'Segmentation network, step 1,200']
    panels = [axes.get_title(loc='left') for axes in figure.subfigs[0].axes]
    assert panels == ['losses', 'validation', 'validation, errors', 'optimizer', 'discriminator']
    panels = [axes.get_title(loc='left') for axes in figure.subfigs[1].axes]
    assert panels == ['losses', 'validation', 'optimizer']


def test_series_are_those_of_the_lines_with_gaps_for_what_is_undefined(workdir):
    gan, network = progress.learning_curves(workdir).subfigs
    losses, scores, errors, optimizer, discriminator = gan.axes
    lines = drawn(losses)
    assert set(lines) == {'adversarial', 'total'}
    assert lines['total'].get_xdata().tolist() == [10, 20, 30]
    np.testing.assert_array_equal(lines['total'].get_ydata(), [0.5, math.nan, 0.25])
    assert lines['total'].get_linewidth() > lines['adversarial'].get_linewidth()
    assert losses.get_yscale() == 'log'
    assert network.axes[0].get_yscale() == 'linear'  # 0 has no logarithm
    assert drawn(scores)['removed'].get_xydata().tolist() == [[20, 0.125]]
    assert drawn(errors)['mse'].get_xydata().tolist() == [[20, 0.002]]
    assert drawn(optimizer)['learning rate'].get_ydata().tolist() == [0.001, 0.002, 0.001]
    assert drawn(discriminator)['accuracy'].get_ydata().tolist() == [0.5, 0.75, 1.0]


def test_long_series_are_drawn_as_their_running_median(tmp_path):
    values = [1.0] * 100
    values[50], values[70] = 9.0, None  # one outlier, which no median over five points shows
    log(tmp_path, 'gan', [{'step': i + 1, 'loss/total': v} for i, v in enumerate(values)])
    (part,) = progress.learning_curves(tmp_path).subfigs
    thin, median = part.axes[0].get_lines()
    assert thin.get_ydata()[50] == 9
    assert median.get_linewidth() > thin.get_linewidth()
    expected = np.ones(100)
    expected[70] = math.nan
    np.testing.assert_array_equal(median.get_ydata(), expected)


def test_picture_replaces_the_last_one_and_leaves_nothing_else(workdir):
    for _ in range(2):
        assert progress.draw_progress(workdir) == workdir / 'progress.png'
    assert {path.name for path in workdir.iterdir()} == {'gan', 'transunet', 'progress.png'}
    with Image.open(workdir / 'progress.png') as picture:
        picture.load()
        assert picture.width > picture.height  # 19 by 2 · 4.6 inches


@pytest.mark.parametrize('text', [None, '', '{"step": 10, "loss/tot'])
def test_nothing_logged_is_nothing_drawn(tmp_path, text):
    if text is not None:
        log(tmp_path, 'gan', [], rest=text)
    assert progress.learning_curves(tmp_path) is None
    assert progress.draw_progress(tmp_path) is None
    assert not (tmp_path / 'progress.png').exists()


def test_loop_draws_seldom_but_always_where_it_stops_and_at_its_end(tmp_path, monkeypatch):
    rows = []
    monkeypatch.setattr(
        'covseg_jax.training.loop.draw_progress',
        lambda workdir: rows.append(len(test_loop.log_of(workdir / 'gan'))),
    )

    def stop_at_eight(number):
        if number == 8:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Stopped):
        test_loop.run(tmp_path / 'gan', num_steps=20, on_step=stop_at_eight)
    # After 9: lines of steps 2, 4, 6 and 8, and evaluations of 4 and 8.
    assert rows == [6]
    monkeypatch.setattr('covseg_jax.training.loop._SHOW_EVERY', 0)
    test_loop.run(tmp_path / 'gan', num_steps=20)
    # After the evaluations of 12, 16 and 20, which is the end.
    assert rows == [6, 9, 12, 15]


def test_pictures_of_the_first_and_newest_steps_stand_beside_the_curves(workdir):
    folder = workdir / 'gan'
    with contextlib.closing(open_log(folder, start_step=30)) as log_of_run:
        for step, level in ((10, 0.2), (20, 0.4), (30, 0.6)):
            columns = [np.full((16, 16), value) for value in (0.1, level, 1 - level)]
            strip = image_strip([columns, columns])
            log_of_run.write_image(step, 'pictures/covid_scan_healthy_difference', strip)
    gan, network = progress.learning_curves(workdir).subfigs
    axes = gan.axes[-1]
    titles = [text.get_text().replace('\n', ' ') for text in axes.texts]
    assert titles == [
        'scan', 'healthy, step 10', 'difference, step 10', 'healthy, step 30',
        'difference, step 30',
    ]  # fmt: skip
    shown = np.asarray(axes.images[0].get_array())
    middles = [round(text.get_position()[0]) for text in axes.texts]
    # 255 times 0.1, and of the two steps 0.2 and 0.8, 0.6 and 0.4.
    np.testing.assert_allclose(shown[8, middles], [25.5, 51, 204, 153, 102], atol=0.5)
    assert len(network.axes) == 3  # it left none


def test_log_that_goes_on_drops_pictures_of_steps_that_come_again(tmp_path):
    with contextlib.closing(open_log(tmp_path, start_step=0)) as first:
        for step in (4, 8, 12):
            first.write_image(step, 'pictures/seen', np.zeros((4, 4)))
    open_log(tmp_path, start_step=8).close()
    assert list(find_pictures(tmp_path, 'seen')) == [4, 8]

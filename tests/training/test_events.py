"""Event files, read back by TensorBoard's own reader."""

import io

import jax
import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata as hparams
from tensorboard.plugins.pr_curve import metadata as pr_curves
from tensorboard.util import tensor_util

from configs import transunet
from covseg_jax.gan.train import build_gan, choose_gan_step, gan_batch_shapes
from covseg_jax.segmentation.train import (
    build_segmentation,
    choose_segmentation_step,
    segmentation_batch_shapes,
)
from covseg_jax.training.events import Events
from tests.training import test_loop


def read(folder):
    return EventAccumulator(str(folder)).Reload()


def points(events, name):
    found = [(e.step, tensor_util.make_ndarray(e.tensor_proto)) for e in events.Tensors(name)]
    return [(step, float(value)) for step, value in found]


def test_scalars_beyond_the_start_step_are_replaced(tmp_path):
    for start, steps in ((0, (2, 4, 6)), (4, (6, 8))):
        events = Events(tmp_path, start_step=start)
        for step in steps:
            events.scalars(step, {'loss/total': step + start / 100, 'loss/mse': 0.5})
        events.close()
    found = read(tmp_path)
    expected = [(2, 2), (4, 4), (6, 6.04), (8, 8.04)]
    assert points(found, 'loss/total') == [(step, pytest.approx(v)) for step, v in expected]
    assert [step for step, _ in points(found, 'loss/mse')] == [2, 4, 6, 8]


def test_scalars_are_on_disk_once_flushed(tmp_path):
    events = Events(tmp_path, start_step=0)
    events.scalars(1, {'loss/total': 0.5})
    events.flush()
    assert points(read(tmp_path), 'loss/total') == [(1, 0.5)]
    events.close()


def test_images_come_back_clipped_and_in_their_colours(tmp_path):
    grey = np.array([[0.0, 0.2, 1.0], [-1.0, 0.8, 2.0]])
    events = Events(tmp_path, start_step=0)
    events.image(3, 'grey', grey)
    events.image(3, 'colour', np.array([[[1.0, 0.0, 0.2]]]))
    events.close()
    found = read(tmp_path)

    def pixels(name):
        (event,) = found.Tensors(name)
        assert event.step == 3
        # TensorBoard keeps the width, the height and then the PNG.
        picture = Image.open(io.BytesIO(event.tensor_proto.string_val[2]))
        return np.asarray(picture.convert('RGB')).tolist()

    expected = [[0, 51, 255], [0, 204, 255]]  # 0.2 · 255 and 0.8 · 255
    assert pixels('grey') == [[[v] * 3 for v in row] for row in expected]
    assert pixels('colour') == [[[255, 0, 51]]]


def test_pr_curve_has_a_threshold_at_each_bin_edge(tmp_path):
    events = Events(tmp_path, start_step=0)
    events.pr_curve(9, 'lesion', np.array([1, 0, 2, 5]), np.array([10, 4, 2, 0]))
    events.close()
    found = read(tmp_path)
    assert list(found.PluginTagToContent(pr_curves.PLUGIN_NAME)) == ['lesion']
    (event,) = found.Tensors('lesion')
    assert event.step == 9
    # Thresholds 0, 1/4, 1/2, 3/4, where TensorBoard draws four of five columns; nothing is above 1.
    assert tensor_util.make_ndarray(event.tensor_proto) == pytest.approx(
        np.array(
            [
                [8, 7, 7, 5, 0],  # true positives: 1 + 0 + 2 + 5, 0 + 2 + 5, 2 + 5, 5
                [16, 6, 2, 0, 0],  # false positives: 10 + 4 + 2 + 0, 4 + 2 + 0, 2 + 0, 0
                [0, 10, 14, 16, 16],  # true negatives
                [0, 1, 1, 3, 8],  # false negatives
                [8 / 24, 7 / 13, 7 / 9, 1, 0],  # precision
                [1, 7 / 8, 7 / 8, 5 / 8, 0],  # recall
            ]
        )
    )


def test_hparams_are_listed_with_the_metrics_they_led_to(tmp_path):
    values = {
        'seed': 3,
        'train.learning_rate': 0.002,
        'train.augment.enabled': True,
        'gan.recipe': 'none',
    }
    events = Events(tmp_path, start_step=100)
    events.hparams(values, ['validation/dice'])
    events.scalars(200, {'validation/dice': 0.75})
    events.close()
    found = read(tmp_path)
    content = found.PluginTagToContent(hparams.PLUGIN_NAME)
    start = hparams.parse_session_start_info_plugin_data(content[hparams.SESSION_START_INFO_TAG])
    kinds = {name: value.WhichOneof('kind') for name, value in start.hparams.items()}
    listed = {name: getattr(start.hparams[name], kind) for name, kind in kinds.items()}
    assert listed == values
    assert kinds['train.augment.enabled'] == 'bool_value'
    experiment = hparams.parse_experiment_plugin_data(content[hparams.EXPERIMENT_TAG])
    assert [metric.name.tag for metric in experiment.metric_infos] == ['validation/dice']
    assert points(found, 'validation/dice') == [(200, 0.75)]
    hparams.parse_session_end_info_plugin_data(content[hparams.SESSION_END_INFO_TAG])


def groups(names):
    return {name.split('/')[0] for name in names if '/' in name}


def test_loop_adds_its_values_in_groups(tmp_path):
    test_loop.run(tmp_path, num_steps=4)
    names = read(tmp_path / 'tensorboard').Tags()['tensors']
    assert groups(names) == {'loss', 'optimizer', 'speed', 'validation', 'pictures'}
    assert all('/' in name for name in names)


def test_steps_name_their_values_in_groups():
    config = transunet.get_config('tiny')
    for build, choose_step, batch_shapes, expected in (
        (build_gan, choose_gan_step, gan_batch_shapes, {'loss', 'optimizer', 'discriminator'}),
        (
            build_segmentation, choose_segmentation_step, segmentation_batch_shapes,
            {'loss', 'optimizer'},
        ),
    ):  # fmt: skip
        parts = build(config)
        step = choose_step(config, parts)(0)
        _, metrics = jax.eval_shape(step, parts.abstract_state, batch_shapes(config, 8))
        assert groups(metrics) == expected
        assert all('/' in name for name in metrics)

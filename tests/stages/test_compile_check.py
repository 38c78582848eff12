"""What is read out of a compiled program's text; and the compiler itself, where libtpu is there."""

import pytest

from configs import transunet
from covseg_jax.errors import InputError
from covseg_jax.stages import compile_check, cost

PROGRAM = """\
HloModule jit_step, is_scheduled=true

%fused (p.1: f32[8]) -> f32[8] {
  %p.1 = f32[8]{0} parameter(0)
  ROOT %inner.1 = f32[8]{0} add(%p.1, %p.1), backend_config={"estimated_cycles":"999"}
}

%body (p.2: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p.2 = (s32[], f32[8]{0}) parameter(0)
  %work.1 = f32[8]{0} fusion(%p.2), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"10"}
  %more.1 = f32[8]{0} copy(%work.1), backend_config={"estimated_cycles":"5"}
  ROOT %out.1 = (s32[], f32[8]{0}) tuple(%p.2, %more.1)
}

%cheap (p.3: f32[8]) -> f32[8] {
  ROOT %c.1 = f32[8]{0} copy(%p.3), backend_config={"estimated_cycles":"1"}
}

%dear (p.4: f32[8]) -> f32[8] {
  ROOT %c.2 = f32[8]{0} copy(%p.4), backend_config={"estimated_cycles":"400"}
}

ENTRY %main.1 (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %first.1 = f32[8]{0} fusion(%a), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"7"}
  %loop.1 = (s32[], f32[8]{0}) while(%t), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %either.1 = f32[8]{0} conditional(%i, %a, %a), branch_computations={%cheap, %dear}
  %sum.1 = (f32[2,8]{1,0}, bf16[4]{0}) all-reduce-start(%x, %y), replica_groups={{0,1}}
  %done.1 = (f32[2,8]{1,0}, bf16[4]{0}) all-reduce-done(%sum.1)
  %sum.2 = f32[8]{0} all-reduce(%a), to_apply=%add
  %whole.1 = f32[16]{0} all-gather(%a), dimensions={0}
  ROOT %last.1 = f32[8]{0} add(%a, %a), backend_config={"estimated_cycles":"2"}
}
"""  # noqa: E501


def test_cycles_count_loops_as_often_as_they_turn_and_the_dearest_branch():
    assert compile_check.sum_estimated_cycles(PROGRAM) == 7 + 3 * (10 + 5) + 400 + 2


def test_collectives_are_counted_once_with_their_bytes():
    assert compile_check.count_collectives(PROGRAM) == {
        # 16 float32 and 4 bfloat16, then 8 float32
        'all-reduce': {'count': 2, 'bytes': 16 * 4 + 4 * 2 + 8 * 4},
        'all-gather': {'count': 1, 'bytes': 16 * 4},
    }


def test_links_carry_twice_an_all_reduce_but_for_the_devices_own_share():
    collectives = {
        'all-reduce': {'count': 2, 'bytes': 800},
        'all-gather': {'count': 1, 'bytes': 80},
    }
    assert compile_check.sum_link_bytes(collectives, 8) == 2 * 800 * 7 / 8 + 80 * 7 / 8
    assert compile_check.sum_link_bytes(collectives, 1) == 0


def program(topology, devices, *, steps, ms, batch_size, fits=True):
    found = {'topology': topology, 'devices': devices, 'steps': steps, 'batch_size': batch_size}
    return found | ({'fits': True, 'ms': ms} if fits else {'fits': False, 'largest_batch_size': 8})


def test_training_costs_its_steps_and_more_chips_are_compared_with_the_first():
    def train(*where, ms):
        return {
            'train': {
                'contrastive': program(*where, steps=1000, ms=ms, batch_size=32),
                'mse': program(*where, steps=9000, ms=3 * ms, batch_size=32),
                'predict': program(*where, steps=0, ms=1e9, batch_size=32),
            }
        }

    found = {
        'v5e:1x1': train('v5e:1x1', 1, ms=10.0),
        'v5e:2x4': train('v5e:2x4', 8, ms=2.0),
        'v4:2x2x1': train('v4:2x2x1', 4, ms=2.0),
    }
    one, eight, four = cost.estimate_costs(found, price_per_chip_hour=1.2)
    # 1000 steps of 10 ms and 9000 of 30 are 280 s, in which 320,000 slices pass.
    assert one['hours'] == pytest.approx(280 / 3600, abs=1e-4)
    assert one['samples_per_s_per_chip'] == pytest.approx(320_000 / 280, abs=0.01)
    assert one['price'] == pytest.approx(1.2 * 280 / 3600, abs=0.01)
    # A fifth of the time on eight chips.
    assert (one['efficiency'], eight['efficiency']) == (1, 5 / 8)
    assert eight['price'] == pytest.approx(8 / 5 * 1.2 * 280 / 3600, abs=0.01)
    assert (four['chips'], four['efficiency']) == (4, 1)


def test_training_that_does_not_fit_has_no_costs():
    found = {
        'v5e:1x1': {'gan': {'a': program('v5e:1x1', 1, steps=9, ms=0, batch_size=8, fits=False)}}
    }
    (row,) = cost.estimate_costs(found, price_per_chip_hour=1.0)
    assert row == {'topology': 'v5e:1x1', 'stage': 'gan', 'efficiency': None, 'price': None}


def test_largest_batch_is_found_by_bisection():
    asked = []

    def fits(size):
        asked.append(size)
        return size <= 44

    assert compile_check._largest_that(fits, 100, 8) == 40
    assert len(asked) <= 4
    assert compile_check._largest_that(lambda size: False, 100, 8) == 0


def test_unknown_chip_is_named_with_those_there_are():
    with pytest.raises(InputError, match=r"'v9:2x2'.*v4, v5e, v5p"):
        compile_check.run_check(transunet.get_config('tiny'), 'v9:2x2')


def test_config_that_trains_nothing_is_named():
    config = transunet.get_config('tiny')
    with config.unlocked():
        config.stages = 'prepare,evaluate'
    with pytest.raises(InputError, match='trains nothing'):
        compile_check.run_check(config, 'v5e:2x4')


@pytest.mark.slow
def test_tiny_step_compiles_for_eight_chips():
    pytest.importorskip('libtpu')
    config = transunet.get_config('tiny')
    with config.unlocked():
        config.stages = 'prepare,train'
    found = compile_check.run_check(config, 'v5e:2x4')
    assert set(found) == {'train'}
    assert set(found['train']) == {'contrastive + mse + sensitivity', 'predict'}
    step = found['train']['contrastive + mse + sensitivity']
    assert step['fits']
    assert step['devices'] == 8
    assert 0 < step['peak_gib'] < 1
    assert step['estimated_ms'] > 0
    assert step['collectives']['all-reduce']['count'] >= 1
    assert step['steps'] == config.train.num_steps
    assert step['ms'] == pytest.approx(step['estimated_ms'] + step['links_ms'], abs=0.02)


@pytest.mark.slow
def test_topology_that_does_not_exist_is_named():
    pytest.importorskip('libtpu')
    with pytest.raises(InputError, match='v5e:9x9'):
        compile_check.run_check(transunet.get_config('tiny'), 'v5e:9x9')

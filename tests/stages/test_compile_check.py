"""What is read out of a compiled program's text; and the compiler itself, where libtpu is there."""

import pytest

from configs import transunet
from covseg_jax.errors import InputError
from covseg_jax.stages import compile_check

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


@pytest.mark.slow
def test_topology_that_does_not_exist_is_named():
    pytest.importorskip('libtpu')
    with pytest.raises(InputError, match='v5e:9x9'):
        compile_check.run_check(transunet.get_config('tiny'), 'v5e:9x9')

"""The scripts for TPU VMs, with a gcloud that only writes down how it was called."""

import os
import pathlib
import shlex
import subprocess
import sys

import pytest

from configs import transunet
from covseg_jax.stages import initial_model
from launch import make_reference

LAUNCH = pathlib.Path(__file__).parents[1] / 'launch'
# Every call is a line of `calls`. A zone's request for a VM is the file ZONE.request, whose lines
# are the states that it goes through, one a look; what `fate.ZONE` holds is what a new one goes
# through. Its VM is ZONE.node. Running the program takes the next line of `plan`. Another person's
# VM is in every zone.
GCLOUD = r"""#!/usr/bin/env bash
cd "$FAKE" || exit 1
printf '%q ' "$@" >> calls
echo >> calls
if [ -e silent ]; then rm silent; exit 1; fi
words="$*" kind="$3" verb="$4" name="$5"
zone="${words#*--zone=}" zone="${zone%% *}"
case "$kind $verb" in
  'queued-resources create')
    [ ! -e "$zone.request" ] || exit 1
    cat "fate.$zone" > "$zone.request" 2> /dev/null ||
      printf '%s\n' CREATING WAITING_FOR_RESOURCES PROVISIONING ACTIVE > "$zone.request"
    label="${words#*--labels=}" label="${label%% *}"
    echo "    ${label/=/: }" > "$zone.label"
    echo READY > "$zone.node" ;;
  'queued-resources list')
    echo 'others-vm ACTIVE'
    if [ -e "$zone.request" ]; then
      echo "covseg $(head -n 1 "$zone.request")"
      [ "$(wc -l < "$zone.request")" = 1 ] || sed -i 1d "$zone.request"
    fi ;;
  'tpu-vm list')
    echo 'others-vm READY'
    if [ -e "$zone.node" ]; then echo "covseg $(cat "$zone.node")"; fi ;;
  'queued-resources describe') cat "$zone.label" ;;
  'queued-resources delete')
    [ "$name" = covseg ] && rm "$zone.request" "$zone.label" && rm -f "$zone.node" ;;
  'tpu-vm ssh')
    case "$*" in
      *covseg_jax.main*)
        fate=$(head -n 1 plan)
        sed -i 1d plan
        case "$fate" in
          preempted) echo SUSPENDED > "$zone.request"; rm "$zone.node"; exit 255 ;;
          preempting) echo PREEMPTED > "$zone.node"; exit 255 ;;
          fails) exit 1 ;;
        esac ;;
      *) [ ! -e broken ] ;;
    esac ;;
esac
"""


@pytest.fixture
def cloud(tmp_path):
    """A folder with the fake's files."""
    program = tmp_path / 'bin' / 'gcloud'
    program.parent.mkdir()
    program.write_text(GCLOUD)
    program.chmod(0o755)
    (tmp_path / 'calls').touch()
    return tmp_path


def launch(cloud, script, *flags, zone='a'):
    return subprocess.run(
        [LAUNCH / script, f'--zone={zone}', *flags],
        env=os.environ | {'PATH': f'{cloud / "bin"}:{os.environ["PATH"]}', 'FAKE': str(cloud)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def retry(cloud, *flags, zone='a'):
    quick = '--wait=0', '--poll=0', '--share=10.0.0.2:/share'
    return launch(cloud, 'retry_tpu_vm.sh', *quick, *flags, zone=zone)


def calls_of(cloud):
    return [shlex.split(line) for line in (cloud / 'calls').read_text().splitlines()]


def deeds(cloud):
    """What gcloud was called to do, in order, each with its zone; 'run' is an ssh call that runs
    the program, and 'setup' stands for all that set a VM up."""
    done = []
    for call in calls_of(cloud):
        zone = next(word for word in call if word.startswith('--zone='))[-1]
        if call[3] in ('list', 'describe'):
            continue
        verb = 'run' if 'covseg_jax.main' in ' '.join(call) else call[3]
        verb = 'setup' if verb in ('scp', 'ssh') else verb
        if (verb, zone) != ('setup', done[-1][-1] if done else '') or done[-1][:-2] != 'setup':
            done.append(f'{verb} {zone}')
    return done


MADE = ['create a', 'setup a']


def test_retry_goes_on_after_preemptions_and_deletes_what_it_made(cloud):
    (cloud / 'plan').write_text('preempted\npreempting\ndone\n')
    done = retry(cloud, '--', '--config=configs/gan3d.py')
    assert done.returncode == 0, done.stderr
    assert 'covseg in a: WAITING_FOR_RESOURCES after' in done.stderr
    again = ['run a', 'delete a', *MADE]
    assert deeds(cloud) == [*MADE, *again, *again, 'run a', 'delete a']
    runs = [line for line in (cloud / 'calls').read_text().splitlines() if 'main' in line]
    assert len(set(runs)) == 1  # the same command each time: the program itself knows where it was
    assert 'configs/gan3d.py' in runs[0]
    assert '--worker=all' in runs[0]
    assert not list(cloud.glob('*.request')) + list(cloud.glob('*.node'))


@pytest.mark.parametrize('fate', ['WAITING_FOR_RESOURCES\n', 'CREATING\nFAILED\n'])
def test_retry_takes_a_request_back_and_asks_in_the_next_zone(cloud, fate):
    (cloud / 'plan').write_text('done\n')
    (cloud / 'fate.a').write_text(fate)
    (cloud / 'fate.b').write_text('ACTIVE\n')
    done = retry(cloud, '--patience=0', zone='a,b')
    assert done.returncode == 0, done.stderr
    assert deeds(cloud) == ['create a', 'delete a', 'create b', 'setup b', 'run b', 'delete b']


def test_retry_goes_round_the_zones_until_one_has_a_vm(cloud):
    (cloud / 'plan').write_text('done\n')
    for zone in 'ab':
        (cloud / f'fate.{zone}').write_text('FAILED\n')
    program = cloud / 'bin' / 'sleep'  # between two rounds
    program.write_text(f'#!/bin/bash\n[ "$1" != 7 ] || rm -f {cloud}/fate.b\n')
    program.chmod(0o755)
    assert retry(cloud, '--wait=7', zone='a,b').returncode == 0
    none = ['create a', 'delete a', 'create b', 'delete b']
    assert deeds(cloud)[: len(none)] == none
    assert deeds(cloud)[len(none) :] == [*none[:3], 'setup b', 'run b', 'delete b']


def test_retry_gives_up_on_a_run_that_fails_on_a_vm_that_is_there(cloud):
    (cloud / 'plan').write_text('fails\nfails\nfails\ndone\n')
    done = retry(cloud, '--failures=3')
    assert done.returncode == 1
    assert 'failed 3 times' in done.stderr
    assert deeds(cloud) == [*MADE, 'run a', 'run a', 'run a', 'delete a']


def test_retry_gives_up_on_a_vm_that_cannot_be_set_up(cloud):
    (cloud / 'broken').touch()
    assert retry(cloud, '--failures=2').returncode == 1
    assert deeds(cloud) == [*MADE, 'delete a']


def test_retry_takes_the_vm_of_an_earlier_launch_in_any_zone(cloud):
    (cloud / 'plan').write_text('done\n')
    (cloud / 'b.request').write_text('ACTIVE\n')
    (cloud / 'b.node').write_text('READY\n')
    assert retry(cloud, '--keep', zone='a,b').returncode == 0
    assert deeds(cloud) == ['setup b', 'run b']


def test_retry_makes_no_second_vm_where_gcloud_does_not_answer(cloud):
    (cloud / 'plan').write_text('done\n')
    (cloud / 'silent').touch()
    assert retry(cloud, zone='a,b').returncode == 0
    assert calls_of(cloud)[0] == calls_of(cloud)[1]  # asked again, before anything is made


def test_retry_leaves_the_vm_where_the_results_are_on_it(cloud):
    (cloud / 'plan').write_text('done\n')
    done = retry(cloud, '--workdir=run')
    assert done.returncode == 0
    assert 'delete_tpu_vm.sh --name=covseg --zone=a' in done.stdout
    assert deeds(cloud) == [*MADE, 'run a']


def test_retry_deletes_the_vm_where_the_results_are_in_a_bucket(cloud):
    (cloud / 'plan').write_text('done\n')
    assert retry(cloud, '--workdir=gs://mine/run').returncode == 0
    assert deeds(cloud) == [*MADE, 'run a', 'delete a']


def test_a_vm_of_somebody_else_is_never_deleted(cloud):
    (cloud / 'a.request').write_text('SUSPENDED\n')
    (cloud / 'a.label').write_text('team: other\n')
    done = launch(cloud, 'delete_tpu_vm.sh')
    assert done.returncode == 2
    assert done.stderr.startswith('error: covseg in a was not made by create_tpu_vm.sh')
    done = launch(cloud, 'create_tpu_vm.sh', '--poll=0')
    assert done.returncode == 1  # the name is taken
    assert deeds(cloud) == ['create a']
    assert (cloud / 'a.request').exists()


def test_a_request_that_is_interrupted_is_taken_back(cloud):
    (cloud / 'fate.a').write_text('WAITING_FOR_RESOURCES\n')
    program = cloud / 'bin' / 'sleep'
    program.write_text('#!/bin/bash\nkill -TERM $PPID\n')
    program.chmod(0o755)
    assert launch(cloud, 'create_tpu_vm.sh').returncode == 130
    assert deeds(cloud) == ['create a', 'delete a']


@pytest.mark.parametrize(
    ('accelerator', 'version'),
    [
        ('v5litepod-8', 'v2-alpha-tpuv5-lite'),
        ('v5p-8', 'v2-alpha-tpuv5'),
        ('v6e-8', 'v2-alpha-tpuv6e'),
        ('v4-8', 'tpu-ubuntu2204-base'),
    ],
)
def test_each_type_has_its_runtime(cloud, accelerator, version):
    done = launch(cloud, 'create_tpu_vm.sh', '--dry_run', f'--accelerator={accelerator}')
    words = shlex.split(done.stdout.splitlines()[0])
    assert f'--runtime-version={version}' in words
    assert '--spot' in words


def test_other_ways_to_pay_and_types_that_are_not_known(cloud):
    def create(*flags):
        return launch(cloud, 'create_tpu_vm.sh', '--dry_run', *flags)

    assert '--spot' not in create('--on_demand').stdout
    reserved = create('--reserved').stdout
    assert '--reserved' in reserved
    assert '--spot' not in reserved
    assert create('--reserved', '--on_demand').returncode == 2
    unknown = create('--accelerator=v9-8')
    assert unknown.returncode == 2
    assert 'name it with --version' in unknown.stderr


def run_with_fakes(folder, script, *arguments):
    """The words of each call that a script makes of local.sh, measure.sh and Python."""
    launch_folder = folder / 'launch'
    launch_folder.mkdir()
    (launch_folder / script).write_bytes((LAUNCH / script).read_bytes())
    programs = launch_folder / 'local.sh', launch_folder / 'measure.sh', folder / 'bin' / 'python'
    for program in programs:
        program.parent.mkdir(exist_ok=True)
        program.write_text(
            f'#!/usr/bin/env bash\nprintf "%q " "$@" >> {folder}/calls\necho >> {folder}/calls\n'
        )
        program.chmod(0o755)
    done = subprocess.run(
        ['bash', launch_folder / script, *arguments], cwd=folder,
        env=os.environ | {'VENV': str(folder)}, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in (folder / 'calls').read_text().splitlines()]


def test_rows_of_the_ablation_share_phantoms_and_are_measured_beside_the_default(tmp_path):
    runs = tmp_path / 'runs'
    for run in ('a_0', 'default_0', 'default_1', 'gan_0'):
        (runs / run / 'transunet').mkdir(parents=True)
    (runs / 'hu_0').mkdir()
    (runs / 'table.md').touch()
    calls = run_with_fakes(tmp_path, 'ablation.sh', runs)
    rows = [call for call in calls if call[0] == 'run']
    assert len(rows) > 10
    for row in rows:
        assert [flag for flag in row if 'phantom.seed' in flag] == ['--config.phantom.seed=2026']
    # Rows with a network, each with all its seeds, the default first.
    models = [f'{runs}/default_0,{runs}/default_1', f'{runs}/a_0', f'{runs}/gan_0']
    assert calls[-1] == [f'{runs}/measured', *models]


def test_a_row_of_the_ablation_that_is_named_is_made_alone(tmp_path):
    (tmp_path / 'runs' / 'default_0' / 'transunet').mkdir(parents=True)
    (tmp_path / 'runs' / 'table.md').touch()
    calls = run_with_fakes(tmp_path, 'ablation.sh', tmp_path / 'runs', 'gan_1')
    assert [call[0] for call in calls] == ['run', f'{tmp_path}/launch/ablation_table.py']


def test_a_row_that_does_not_exist_is_named_before_any_is_made(tmp_path):
    done = subprocess.run(
        ['bash', LAUNCH / 'ablation.sh', tmp_path, 'default_0', 'defualt_1'],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, '')
    assert done.stderr.startswith('error: there is no row defualt_1; rows are default_0 gan_0 ')


def test_model_that_comes_with_the_code_is_trained_exported_and_packed(tmp_path):
    # With another value in its variants another model would be made.
    for name in ('phantom_fine', 'phantom'):
        recipe = transunet.get_config(name)
        assert (recipe.train.rounds, recipe.train.losses.contrastive) == (('synthetic',), 0)
        assert recipe.opacities.coverage_threshold == (-0.2, 2.9)
        assert recipe.prepare.lungs_source == 'network'
    fine = transunet.get_config('phantom_fine')
    assert (fine.train.num_steps, fine.train.ema_decay, fine.phantom.num_healthy) == (
        8000,
        0.99,
        160,
    )
    flags = '--config.train.num_steps=9', '--config=configs/transunet.py:tiny'
    *runs, pack = run_with_fakes(tmp_path, 'make_model.sh', 'made', *flags)
    assert len(runs) == 4
    folders = [f'{tmp_path}/made/{name}' for name in ('fine', 'coarse')]
    for number, folder in enumerate(folders):
        (*given, stages), export = runs[2 * number : 2 * number + 2]
        assert stages == '--stages=prepare,train,evaluate'
        # Each once, --config before its fields.
        assert given[:2] == ['run', flags[1]]
        assert {flags[0], '--config.seed=0', '--config.phantom.seed=0'} < set(given)
        assert ('--config.train.ema_decay=0.99' in given) == (number == 1)
        assert given[-1] == f'--workdir={folder}'
        names = [flag.split('=')[0] for flag in given]
        assert len(set(names)) == len(names)
        assert export == [*given, '--stages=export', f'--output={folder}/export']
    exports = [f'{folder}/export' for folder in folders]
    assert pack == ['-m', 'launch.pack_model', *exports, 'covseg_jax/default_model']


def test_the_model_is_trained_on_in_two_rounds_and_the_first_teaches_the_second(tmp_path):
    (tmp_path / 'my data').mkdir()
    calls = run_with_fakes(tmp_path, 'own_scans.sh', 'my data', 'runs', '--config.seed=1')
    taken = []
    for call in calls:
        given = dict(flag.removeprefix('--').split('=', 1) for flag in call[1:])
        assert given['config.data.folder'] == f'{tmp_path}/my data'
        assert given['config.seed'] == '1'
        assert given['output'] == given['workdir'] + '/export'
        assert len(given) == len(call) - 1
        taken.append((
            given['workdir'].removeprefix(f'{tmp_path}/runs/'), given['config'].split(':')[1],
            given['config.train.init'].replace(f'{tmp_path}/runs/', ''),
        ))  # fmt: skip
    assert taken == [
        ('fine_1', 'phantom_fine', 'default'),
        ('coarse_1', 'phantom', 'covseg_jax/default_model/network_1'),
        ('fine_2', 'phantom_fine', 'fine_1/export,coarse_1/export'),
        ('coarse_2', 'phantom', 'coarse_1/export'),
    ]
    for _, variant, init in taken[:2]:  # what these name is there, and fits
        config = transunet.get_config(variant).unlock()
        config.train.init, config.synthesize.source = init, 'model'
        initial_model.refuse_misfit(config)
        named = {flag.split('=')[0] for flag in calls[0] if flag.startswith('--config.')}
        assert named <= {f'--config.{name}' for name, _ in make_reference.flatten(config)}


def test_data_that_is_not_there_is_named_before_anything_is_installed(tmp_path):
    done = subprocess.run(
        ['bash', LAUNCH / 'own_scans.sh', tmp_path / 'none'], capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, '')
    assert done.stderr.startswith(f'error: {tmp_path}/none: is not a folder; name one')


SCRIPTS = (
    'create_tpu_vm.sh',
    'delete_tpu_vm.sh',
    'setup_tpu_vm.sh',
    'run_tpu_vm.sh',
    'retry_tpu_vm.sh',
    'fetch_results.sh',
    'tensorboard_tpu_vm.sh',
)


@pytest.mark.parametrize('script', SCRIPTS)
def test_dry_run_prints_the_commands_and_calls_nothing(cloud, script):
    done = launch(cloud, script, '--dry_run', '--name=mine', '--project=lab')
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith('gcloud')]
    assert lines
    for line in lines:
        words = shlex.split(line)
        assert {'--zone=a', '--project=lab'} <= set(words)
        assert 'list' in words or any(word.startswith('mine') for word in words)
    assert not (cloud / 'calls').read_text()


@pytest.mark.parametrize('script', SCRIPTS)
def test_a_flag_that_does_not_exist_is_named(cloud, script):
    done = launch(cloud, script, '--zones=a')
    assert done.returncode == 2
    assert done.stderr.startswith('error: --zones=a is not a flag')


@pytest.mark.parametrize(
    ('workdir', 'place', 'flags'),
    [
        ('{tmp}', '{tmp}', ''),
        ('gs://b/one', '{tmp}/.cache/covseg_jax/buckets/b%2Fone/one', ''),
        ('gs://b/one', '{tmp}/cache/b%2Fone/one', ' --bucket_cache={tmp}/cache'),
    ],
)
def test_the_program_runs_again_where_it_fails_and_a_stop_is_no_end(
    cloud, tmp_path, workdir, place, flags
):
    """The remote command itself, with a program that fails once, is stopped once, then is done."""
    workdir, place, flags = (each.format(tmp=tmp_path) for each in (workdir, place, flags))
    flags = f'--config=configs/transunet.py{flags}'
    arguments = '--dry_run', f'--workdir={workdir}', '--', *flags.split()
    printed = launch(cloud, 'run_tpu_vm.sh', *arguments).stdout
    command = next(w for w in shlex.split(printed) if w.startswith('--command='))
    python = tmp_path / 'covseg_jax' / '.venv' / 'bin' / 'python'
    python.parent.mkdir(parents=True)
    python.write_text(
        f'#!/bin/bash\n[ "$1" != -c ] || exec {sys.executable} "$@"\n'
        f'echo "$@" >> {tmp_path}/runs\nmkdir -p {place}\nrm -f {place}/stopped\n'
        f'case $(wc -l < {tmp_path}/runs) in 1) exit 1 ;; 2) touch {place}/stopped ;; esac\n'
    )
    python.chmod(0o755)
    (tmp_path / 'bin' / 'sleep').write_text('#!/bin/bash\n')
    (tmp_path / 'bin' / 'sleep').chmod(0o755)

    def run():
        return subprocess.run(
            ['bash', '-c', command.removeprefix('--command=')],
            cwd=tmp_path,
            env=os.environ
            | {
                'PATH': f'{tmp_path / "bin"}:{os.environ["PATH"]}',
                'HOME': str(tmp_path),
                'PYTHONPATH': str(LAUNCH.parent),
                'XDG_CACHE_HOME': '',
            },
            check=False,
        ).returncode

    assert run() != 0  # stopped
    assert run() == 0
    runs = (tmp_path / 'runs').read_text().splitlines()
    assert runs == [f'-m covseg_jax.main {flags} --workdir={workdir}'] * 3


@pytest.mark.parametrize('attempts', ['0', 'three'])
def test_attempts_that_would_not_run_the_program_are_refused(cloud, attempts):
    done = launch(cloud, 'run_tpu_vm.sh', f'--attempts={attempts}')
    assert done.returncode == 2
    assert 'must be 1 or more' in done.stderr

"""The scripts for TPU VMs, with a gcloud that only writes down how it was called."""

import os
import pathlib
import shlex
import subprocess

import pytest

LAUNCH = pathlib.Path(__file__).parents[1] / 'launch'
# Every call is a line of `calls`. `describe` answers with the VM's state, `delete` and `create`
# change it, and running the program takes the next line of `plan` as its fate.
GCLOUD = r"""#!/usr/bin/env bash
cd "$FAKE" || exit 1
printf '%q ' "$@" >> calls
echo >> calls
shift 3
case "$1" in
  describe) [ -e state ] && cat state ;;
  delete) rm state ;;
  create)
    if [ -e scarce ]; then rm scarce; exit 1; fi
    echo READY > state ;;
  ssh)
    case "$*" in
      *covseg_jax.main*)
        fate=$(head -n 1 plan)
        sed -i 1d plan
        case "$fate" in
          preempted) echo PREEMPTED > state; exit 255 ;;
          gone) rm state; exit 255 ;;
          fails) exit 1 ;;
        esac ;;
    esac ;;
esac
"""


@pytest.fixture
def cloud(tmp_path):
    """A folder with the fake's `calls`, `state` and `plan`."""
    program = tmp_path / 'bin' / 'gcloud'
    program.parent.mkdir()
    program.write_text(GCLOUD)
    program.chmod(0o755)
    (tmp_path / 'calls').touch()
    return tmp_path


def launch(cloud, script, *flags):
    return subprocess.run(
        [LAUNCH / script, '--zone=us-west4-a', *flags],
        env=os.environ | {'PATH': f'{cloud / "bin"}:{os.environ["PATH"]}', 'FAKE': str(cloud)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def verbs(cloud):
    """What gcloud was called for, in order; ssh calls that run the program are 'run'."""
    calls = [shlex.split(line) for line in (cloud / 'calls').read_text().splitlines()]
    assert all(call[:3] == ['compute', 'tpus', 'tpu-vm'] for call in calls)
    assert all('--zone=us-west4-a' in call for call in calls)
    return ['run' if 'covseg_jax.main' in ' '.join(call) else call[3] for call in calls]


MADE = ['create', 'scp', 'ssh']  # a VM, this checkout, its requirements


def test_retry_goes_on_after_two_preemptions(cloud):
    (cloud / 'plan').write_text('preempted\ngone\ndone\n')
    done = launch(cloud, 'retry_tpu_vm.sh', '--wait=0', '--', '--config=configs/gan3d.py')
    assert done.returncode == 0, done.stderr
    assert 'done' in done.stdout
    assert verbs(cloud) == [
        'describe', *MADE, 'run', 'describe',
        'describe', 'delete', *MADE, 'run', 'describe',
        'describe', *MADE, 'run',
    ]  # fmt: skip
    runs = [line for line in (cloud / 'calls').read_text().splitlines() if 'main' in line]
    assert len(set(runs)) == 1  # the same command each time: the program itself knows where it was
    assert 'configs/gan3d.py' in runs[0]
    assert '--worker=all' in runs[0]


def test_retry_asks_again_where_no_vm_is_to_be_had(cloud):
    (cloud / 'plan').write_text('done\n')
    (cloud / 'scarce').touch()
    assert launch(cloud, 'retry_tpu_vm.sh', '--wait=0').returncode == 0
    assert verbs(cloud) == ['describe', 'create', 'describe', *MADE, 'run']


def test_retry_gives_up_on_a_run_that_fails_on_a_vm_that_is_there(cloud):
    (cloud / 'state').write_text('READY\n')
    (cloud / 'plan').write_text('fails\nfails\nfails\ndone\n')
    done = launch(cloud, 'retry_tpu_vm.sh', '--wait=0', '--failures=3')
    assert done.returncode == 1
    assert 'failed 3 times' in done.stderr
    assert verbs(cloud).count('run') == 3
    assert 'create' not in verbs(cloud)


def run_with_fakes(folder, script, *arguments):
    """The words of each call that a script makes of local.sh and of Python."""
    launch_folder = folder / 'launch'
    launch_folder.mkdir()
    (launch_folder / script).write_bytes((LAUNCH / script).read_bytes())
    for program in (launch_folder / 'local.sh', folder / 'bin' / 'python'):
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


def test_every_row_of_the_ablation_is_of_phantoms_that_no_choice_was_made_on(tmp_path):
    (tmp_path / 'runs').mkdir()
    (tmp_path / 'runs' / 'table.md').touch()
    calls = run_with_fakes(tmp_path, 'ablation.sh', tmp_path / 'runs')
    rows = [call for call in calls if call[0] == 'run']
    assert len(rows) > 10
    for row in rows:
        assert [flag for flag in row if 'phantom.seed' in flag] == ['--config.phantom.seed=2026']


def test_model_that_comes_with_the_code_is_trained_exported_and_packed(tmp_path):
    flags = '--config.train.num_steps=9', '--config.seed=7', '--config=configs/transunet.py:tiny'
    run, export, pack = run_with_fakes(tmp_path, 'make_model.sh', 'made', *flags)
    # Each once, --config before its fields.
    *given, stages = run
    assert stages == '--stages=prepare,synthesize,train,evaluate'
    assert given[:4] == ['run', flags[2], flags[1], '--config.phantom.seed=0']
    assert flags[0] in given
    assert given[-1] == f'--workdir={tmp_path}/made'
    names = [flag.split('=')[0] for flag in given]
    assert len(set(names)) == len(names)
    assert export == [*given, '--stages=export', f'--output={tmp_path}/made/export']
    assert pack == ['-m', 'launch.pack_model', f'{tmp_path}/made/export',
                    'covseg_jax/default_model']  # fmt: skip


SCRIPTS = (
    'create_tpu_vm.sh',
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
        assert {'--zone=us-west4-a', '--project=lab'} <= set(words)
        assert any(word.startswith('mine') for word in words)
    assert not (cloud / 'calls').read_text()


@pytest.mark.parametrize('script', SCRIPTS)
def test_a_flag_that_does_not_exist_is_named(cloud, script):
    done = launch(cloud, script, '--zones=a')
    assert done.returncode == 2
    assert done.stderr.startswith('error: --zones=a is not a flag')


def test_the_program_runs_again_where_it_fails_and_a_stop_is_no_end(cloud, tmp_path):
    """The remote command itself, with a program that fails once, is stopped once, then is done."""
    printed = launch(cloud, 'run_tpu_vm.sh', '--dry_run', f'--workdir={tmp_path}').stdout
    command = next(w for w in shlex.split(printed) if w.startswith('--command='))
    python = tmp_path / 'covseg_jax' / '.venv' / 'bin' / 'python'
    python.parent.mkdir(parents=True)
    python.write_text(
        f'#!/bin/bash\necho "$@" >> {tmp_path}/runs\nrm -f {tmp_path}/stopped\n'
        f'case $(wc -l < {tmp_path}/runs) in 1) exit 1 ;; 2) touch {tmp_path}/stopped ;; esac\n'
    )
    python.chmod(0o755)
    (tmp_path / 'bin' / 'sleep').write_text('#!/bin/bash\n')
    (tmp_path / 'bin' / 'sleep').chmod(0o755)

    def run():
        return subprocess.run(
            ['bash', '-c', command.removeprefix('--command=')],
            cwd=tmp_path,
            env=os.environ | {'PATH': f'{tmp_path / "bin"}:{os.environ["PATH"]}'},
            check=False,
        ).returncode

    assert run() != 0  # stopped
    assert run() == 0
    runs = (tmp_path / 'runs').read_text().splitlines()
    assert runs == [f'-m covseg_jax.main --config=configs/transunet.py --workdir={tmp_path}'] * 3

"""The steps of launch/rehearse.sh, commands as a person types them, with their time and memory.

What is overridden of the default variant is how many steps there are and of which phase, how often
they are logged, how large a batch is, and where files lie; sizes and types of data and networks are
the default's.
"""

import json
import os
import pathlib
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

import safetensors.numpy
from tabulate import tabulate

from configs import transunet
from covseg_jax import atomic
from covseg_jax.phantom.studies import write_phantom_data_set
from tests.reference_weights import make_torch_state

NUM_STUDIES, NUM_HEALTHY, NUM_MASKED = 12, 4, 3
SEVERE_SHARES = (0.125, 0.125, 0.125)  # a study of each category
SHAPE, SPACING_MM = (512, 512, 41), (0.7, 0.7, 8.0)
MOSMED_STUDIES, MOSMED_MASKED, MOSMED_HEALTHY = 1110, 50, 254
GAN_STEPS, TRAIN_STEPS = 4, 10
GAN_BATCH, TRAIN_BATCH = 1, 4
STEPS = (
    f'--config.gan.num_steps={GAN_STEPS}',
    f'--config.gan.batch_size={GAN_BATCH}',
    '--config.gan.log_every=1',
    f'--config.train.num_steps={TRAIN_STEPS}',
    f'--config.train.batch_size={TRAIN_BATCH}',
    '--config.train.epoch_steps=5',
    '--config.train.contrastive_steps=2',
    '--config.train.log_every=1',
)
_PAUSE_SECONDS = 2  # between two looks at a step's memory


def list_steps(folder: pathlib.Path) -> dict[str, list[str]]:
    """Step -> the program's flags."""
    run, studies = folder / 'run', folder / 'studies'
    config = '--config=configs/transunet.py'
    default = [config, f'--config.data.folder={studies}', *STEPS, f'--workdir={run}']
    scan = studies / 'studies' / 'CT-1' / f'study_{NUM_HEALTHY + 1:04d}.nii.gz'
    attention = '--config.network.published_attention=true'
    imported = [config, attention, f'--workdir={folder / "imported"}']
    stages = ('prepare', 'gan', 'synthesize', 'train', 'evaluate')
    return {stage: [*default, f'--stages={stage}'] for stage in stages} | {
        'export': [*default, '--stages=export', f'--output={folder / "export"}'],
        'predict': [
            f'--model={folder / "export"}', f'--input={scan}', f'--output={folder / "masks"}',
            '--preview', '--probability',
        ],
        'import_weights': [
            *imported, '--stages=import_weights', f'--input={folder / "weights.safetensors"}'
        ],
        'predict, imported': [
            *imported, '--stages=predict', f'--input={scan}',
            f'--output={folder / "masks_of_imported"}',
        ],
    }  # fmt: skip


def run_step(flags: Sequence[str], log: pathlib.Path) -> tuple[float, float | None]:
    """Runs the program; its seconds, and the most memory of all its processes together in GB (None
    where the system does not tell).

    Raises:
      SystemExit: it failed; its last lines are printed.
    """
    began, peaks = time.monotonic(), [0]
    with log.open('w') as file:
        command = [sys.executable, '-m', 'covseg_jax.main', *flags]
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)

        def watch() -> None:
            while process.poll() is None:
                peaks.append(sum(map(_proportional_bytes, _process_tree(process.pid))))
                time.sleep(_PAUSE_SECONDS)

        watcher = threading.Thread(target=watch)
        watcher.start()
        code = process.wait()
        watcher.join()
    if code:
        sys.exit(f'{log}:\n{log.read_text()[-3000:]}')
    return time.monotonic() - began, max(peaks) / 1e9 or None


def _process_tree(root: int) -> list[int]:
    """The process and those that it started, as /proc has them."""
    parents = {}
    for path in pathlib.Path('/proc').glob('[0-9]*/stat'):
        try:
            fields = path.read_text().rsplit(')', 1)[1].split()
        except OSError:  # it has ended meanwhile
            continue
        parents[int(path.parent.name)] = int(fields[1])
    tree = [root]
    for process in tree:
        tree += [child for child, parent in parents.items() if parent == process]
    return tree


def _proportional_bytes(process: int) -> int:
    """The process's memory, of what it shares with others its part."""
    try:
        lines = pathlib.Path(f'/proc/{process}/smaps_rollup').read_text().splitlines()
    except OSError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith('Pss:'))


def seconds_for_mosmed(folder: pathlib.Path, step: str, seconds: float) -> float | None:
    """What a step would take for MosMedData's 1,110 studies with the default's steps, on this
    machine, from what it took here; None for what does not depend on them."""
    config = transunet.get_config()
    studies = {
        'prepare': MOSMED_STUDIES / NUM_STUDIES,
        'synthesize': (MOSMED_STUDIES - MOSMED_HEALTHY) / (NUM_STUDIES - NUM_HEALTHY),
        'evaluate': MOSMED_MASKED / NUM_MASKED,
    }
    if step in studies:
        return seconds * studies[step]
    trained = {
        'gan': ('gan', config.gan, GAN_BATCH),
        'train': ('transunet', config.train, TRAIN_BATCH),
    }
    if step not in trained:
        return None
    name, settings, batch_size = trained[step]
    log = atomic.read_json_lines(folder / 'run' / name / 'metrics.jsonl')
    # The last ones: at first the feed has no batch ready. What compiling took is in none.
    speeds = [row['speed/steps_per_s'] for row in log if 'speed/steps_per_s' in row][-3:]
    each = len(speeds) / sum(speeds) * settings.batch_size / batch_size
    return settings.num_steps * each


def main(folder: pathlib.Path) -> None:
    """Runs the steps that are not done yet, and prints the table."""
    done_path = folder / 'rehearsal.json'
    done = json.loads(done_path.read_text()) if done_path.exists() else {}
    weights = folder / 'weights.safetensors'
    if not weights.exists():
        with atomic.new_file(weights) as temporary:
            temporary.write_bytes(safetensors.numpy.save(make_torch_state()))
    (folder / 'logs').mkdir(exist_ok=True)
    print('rehearse: studies', flush=True)
    write_phantom_data_set(
        folder / 'studies',
        num_healthy=NUM_HEALTHY,
        num_covid=NUM_STUDIES - NUM_HEALTHY,
        num_masked=NUM_MASKED,
        severe_shares=SEVERE_SHARES,
        seed=0,
        shape=SHAPE,
        spacing_mm=SPACING_MM,
        num_workers=os.cpu_count() or 1,
    )
    for step, flags in list_steps(folder).items():
        if step not in done:
            print(f'rehearse: {step}', flush=True)
            log = folder / 'logs' / f'{step.replace(", ", "_")}.log'
            seconds, gigabytes = run_step(flags, log)
            for_mosmed = seconds_for_mosmed(folder, step, seconds)
            done[step] = {'seconds': seconds, 'gb': gigabytes, 'mosmed_seconds': for_mosmed}
            atomic.write_text(done_path, json.dumps(done, indent=2))
    rows = [
        (step, f'{each["seconds"]:.0f}', _format(each['gb'], 1),
         _format(each['mosmed_seconds'] and each['mosmed_seconds'] / 3600, 2))
        for step, each in done.items()
    ]  # fmt: skip
    total = sum(each['seconds'] for each in done.values())
    most = max((each['gb'] or 0 for each in done.values()), default=0)
    rows.append(('all', f'{total:.0f}', _format(most or None, 1), ''))
    head = ('step', 'seconds', 'GB at most', f'hours for {MOSMED_STUDIES} studies')
    print(tabulate(rows, head, tablefmt='simple', disable_numparse=True))
    print(
        f'on {os.cpu_count()} CPU cores; {NUM_STUDIES} studies, {GAN_STEPS} steps of the GAN with '
        f'batch {GAN_BATCH} and {TRAIN_STEPS} of the network with batch {TRAIN_BATCH}; the hours '
        "are for the default's steps and batches on this machine"
    )
    print(f'report: {folder / "run" / "evaluation" / "report.html"}')


def _format(value: float | None, digits: int) -> str:
    return '' if value is None else f'{value:.{digits}f}'


if __name__ == '__main__':
    main(pathlib.Path(sys.argv[1]))

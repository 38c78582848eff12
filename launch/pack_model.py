"""Exports that are averaged, in the form in which a model comes with the code; finest grid first:
`python -m launch.pack_model EXPORT [EXPORT ...] covseg_jax/default_model`.
"""

import pathlib
import shutil
import sys
from collections.abc import Sequence

from covseg_jax.errors import InputError
from covseg_jax.predict.export import refuse_other_contents, write_compact

MOST_BYTES = 8_000_000  # of the folder: it is in every clone and every installation


def main(sources: Sequence[pathlib.Path], folder: pathlib.Path) -> None:
    """Writes each export as `folder`/network_N, removes those that were there beside, and prints
    what they weigh. The model card beside them stays."""
    members = [folder / f'network_{number}' for number in range(len(sources))]
    before = sorted(folder.glob('network_*'))
    for member in before:
        refuse_other_contents(member)
    for source, member in zip(sources, members, strict=True):
        write_compact(member, source)
    for member in before:
        if member not in members:
            shutil.rmtree(member)
    sizes = {path: path.stat().st_size for member in members for path in sorted(member.iterdir())}
    for path, size in sizes.items():
        print(f'{size:>9} {path}')
    if sum(sizes.values()) > MOST_BYTES:
        raise InputError(
            f'{folder}: has {sum(sizes.values())} bytes, and at most {MOST_BYTES} should come with '
            'the code; put the old model back, and train a smaller network, or fewer'
        )


if __name__ == '__main__':
    if len(sys.argv) < 3:
        sys.exit('usage: python -m launch.pack_model EXPORT [EXPORT ...] FOLDER')
    try:
        main([pathlib.Path(each) for each in sys.argv[1:-1]], pathlib.Path(sys.argv[-1]))
    except InputError as error:
        sys.exit(f'error: {error}')

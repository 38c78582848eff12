"""An export, in the form in which a model comes with the code:
`python -m launch.pack_model EXPORT covseg_jax/default_model`.
"""

import pathlib
import sys

from covseg_jax.errors import InputError
from covseg_jax.predict.export import write_compact

MOST_BYTES = 8_000_000  # of the folder: it is in every clone and every installation


def main(source: pathlib.Path, folder: pathlib.Path) -> None:
    """Writes the folder and prints what it weighs."""
    write_compact(folder, source)
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    for name, size in sizes.items():
        print(f'{size:>9} {folder / name}')
    if sum(sizes.values()) > MOST_BYTES:
        raise InputError(
            f'{folder}: has {sum(sizes.values())} bytes, and at most {MOST_BYTES} should come with '
            'the code; put the old model back, and train a smaller network'
        )


if __name__ == '__main__':
    if len(sys.argv) != 3:
        sys.exit('usage: python -m launch.pack_model EXPORT FOLDER')
    try:
        main(*map(pathlib.Path, sys.argv[1:]))
    except InputError as error:
        sys.exit(f'error: {error}')

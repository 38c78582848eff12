"""`python -m covseg_jax` and the console command `covseg`: both are `python -m covseg_jax.main`."""

import os
import runpy
import sys


def run() -> None:
    """Runs covseg_jax.main as the program, which then is what worker processes start from."""
    # Configs import each other from the current folder, where `python -m` looks too.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    runpy.run_module('covseg_jax.main', run_name='__main__', alter_sys=True)


if __name__ == '__main__':
    run()

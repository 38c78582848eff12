"""The stages: each takes its settings from the config and calls what does the work.

What needs JAX or Matplotlib is imported inside the stages: the processes that prepare studies
import this package too.
"""

from covseg_jax.stages.inputs import Request
from covseg_jax.stages.on_request import AFTER, BEFORE, ON_INPUT, STOPPED
from covseg_jax.stages.outcome import show_table
from covseg_jax.stages.pipeline import PIPELINE, TRAINED
from covseg_jax.stages.settings import (
    newest_step,
    refuse_foreign_workdir,
    refuse_other_settings,
    stage_settings,
)

__all__ = [
    'AFTER',
    'BEFORE',
    'ON_INPUT',
    'PIPELINE',
    'STOPPED',
    'TRAINED',
    'Request',
    'newest_step',
    'refuse_foreign_workdir',
    'refuse_other_settings',
    'show_table',
    'stage_settings',
]

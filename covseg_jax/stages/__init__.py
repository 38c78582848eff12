"""The stages: each takes its settings from the config and calls what does the work.

What needs JAX or Matplotlib is imported inside the stages: the processes that prepare studies
import this package too.
"""

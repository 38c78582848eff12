"""What people are told of models, and where the one that comes with the program lies; `export.load`
reads it. No import of JAX."""

import pathlib

DEFAULT = 'default'  # its name, in place of an export's folder
FOLDER = pathlib.Path(__file__).parents[1] / 'default_model'
# Its networks, each an export, averaged; the finest grid first, with which a training goes on.
MEMBERS = tuple(sorted(path.parent for path in FOLDER.glob('network_*/model.json')))
CARD = 'MODEL_CARD.md'
INTENDED_USE = (
    'Research only. Not a medical device: not for diagnosis, nor for decisions about patients.'
)

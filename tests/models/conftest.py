"""The published models' weights, which tests/reference has numbers for."""

import numpy as np
import pytest

from tests import reference_weights


@pytest.fixture(scope='session')
def torch_state() -> dict[str, np.ndarray]:
    """The TransUNet's weights under PyTorch's names and in its layout."""
    return reference_weights.make_torch_state()


@pytest.fixture(scope='session')
def keras_weights() -> dict[str, dict[str, np.ndarray]]:
    """{'generator': …, 'discriminator': …}: weights under Keras's names and in its layout."""
    return reference_weights.make_keras_weights()

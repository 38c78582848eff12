"""A network and its fields: there and back."""

import json

import pytest

from configs import transunet
from covseg_jax.errors import InputError
from covseg_jax.segmentation.network import build_network, describe_network
from covseg_jax.segmentation.train import make_network


@pytest.mark.parametrize('name', ['transunet', 'unet'])
def test_network_is_built_again_from_its_fields_as_json(name):
    config = transunet.get_config('mosmed').unlock()  # in bfloat16
    config.network.name = name
    network = make_network(config)
    fields = describe_network(network)
    assert fields['dtype'] == 'bfloat16'
    assert build_network(json.loads(json.dumps(fields))) == network


def test_network_of_another_name_is_refused():
    with pytest.raises(InputError, match="'mamba' is not one of 'transunet', 'unet'"):
        build_network({'name': 'mamba', 'dtype': 'float32'})

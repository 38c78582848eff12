"""What was done to scans, as a paragraph for the methods section of a paper."""

from collections.abc import Mapping, Sequence
from typing import Any

from covseg_jax.predict.default import DEFAULT

_METHOD = (
    'Shabani et al. Self-supervised region-aware segmentation of COVID-19 CT images using 3D GAN '
    'and contrastive learning. Computers in Biology and Medicine 149:106033, 2022.'
)
_SEVERITY = 'Morozov et al. MosMedData. arXiv 2005.06465, 2020.'
_LUNGS = {
    'threshold': 'Lungs were found by their density and by morphology',
    'network': (
        'Lungs were found by their density and by morphology, and a small U-Net added those parts '
        'of them that are dense'
    ),
    'file': 'Lung masks were given with the scans',
    'lungmask': 'Lungs were found by the lungmask package',
}
# Of a network's volumes, by the field that says how far.
_SMOOTHED = {
    'smoothing_pixels': 'Before the network slices were smoothed in their plane',
    'smoothing_slices': 'Outputs were smoothed from slice to slice',
}
_NETWORKS = {'transunet': 'TransUNet', 'unet': 'U-Net'}


def describe_methods(records: Sequence[Mapping[str, Any]], num_set_aside: int) -> tuple[str, str]:
    """The paragraph, and the references that it names, a line each.

    Args:
      records: of each study, what `record.write_record` wrote; of one model and its settings.
      num_set_aside: scans that could not be used.
    """
    if not records:
        return f'None of {_count(num_set_aside, "scan")} could be used.', ''
    last = records[-1]
    settings, networks = last['settings'], last['model']['networks']
    programs = sorted({_name_program(record['software']) for record in records})
    opening = (
        f'Lesions of COVID-19 were segmented in {_count(len(records), "chest CT scan")} with '
        f'covseg_jax {", ".join(programs)} [1], a re-implementation of the method of Shabani et '
        'al. [2] with changes.'
    )
    if num_set_aside:
        opening += f' {_count(num_set_aside, "more scan")} could not be used and were left out.'
    sentences = [
        opening,
        f'{_describe_preparation(settings["preparation"])}.',
        *_describe_networks(networks),
        f'{_describe_masks(settings["masks"])}.',
        'Infection is the volume of the lesions in percent of the volume of the lungs; categories '
        'of severity are those of MosMedData [3], by this percentage alone.',
    ]
    references = [f'covseg_jax, {", ".join(programs)}.', _METHOD, _SEVERITY]
    return ' '.join(sentences), ''.join(
        f'[{number}] {text}\n' for number, text in enumerate(references, 1)
    )


def _count(number: int, what: str) -> str:
    return f'{number} {what}{"s" * (number != 1)}'


def _name_program(software: Mapping[str, Any]) -> str:
    revision = software['git_revision']
    return f'version {software["covseg_jax"]}' + (f' (revision {revision[:12]})' * bool(revision))


def _describe_preparation(preparation: Mapping[str, Any]) -> str:
    grid = ' × '.join(str(length) for length in preparation['grid'])
    low, high = preparation['window_hu']
    return (
        f'{_LUNGS[preparation["lungs_source"]]}. The box around the lungs, with a margin of '
        f'{preparation["margin_mm"]:g} mm, was resampled to {grid} voxels (slices, rows, columns), '
        f'and densities from {low:g} to {high:g} HU were mapped to 0 to 1'
    )


def _describe_networks(networks: Sequence[Mapping[str, Any]]) -> list[str]:
    names = '; '.join(map(_describe_network, networks))
    if len(networks) == 1:
        sentences = [f'The network, which sees axial slices, was {names}.']
    elif networks:
        sentences = [
            f'The outputs of {len(networks)} networks of axial slices were averaged: {names}.'
        ]
    else:
        sentences = []
    sides = [tuple(network.get('pixels') or ()) for network in networks]
    if len(set(sides)) > 1:
        sentences.append(
            'Slices of the finest grid were resampled to the pixels of the other networks, and '
            'their outputs back, linearly.'
        )
    ways = [network['volumes'] for network in networks]
    if any(way['flip'] for way in ways):
        sentences.append("Each slice's output was averaged with that of its mirror image.")
    for field, what in _SMOOTHED.items():
        if widths := _name_values(ways, field, without=0):
            unit = field.removeprefix('smoothing_')
            sentences.append(f'{what} by a Gaussian with a standard deviation of {widths} {unit}.')
    if factors := _name_values(ways, 'border_factor', without=1):
        sentences.append(
            f"Outputs of the lungs' outermost pixels in each slice were multiplied by {factors}, "
            'and those of the next ones by its root.'
        )
    return sentences


def _name_values(ways: Sequence[Mapping[str, Any]], field: str, without: float) -> str:
    """The networks' values of a field, such as '0.5 or 0.7', but for the one that changes nothing,
    which records from before the field are of; '' where there is no other."""
    values = sorted({way.get(field, without) for way in ways} - {without})
    return ' or '.join(f'{value:g}' for value in values)


def _describe_network(network: Mapping[str, Any]) -> str:
    kind = _NETWORKS.get(network['network'], network['network'] or 'network')
    details = []
    if network['config']:
        details.append(f'configuration {network["config"]}')
    if network['checkpoint_step'] is not None:
        details.append(f'step {network["checkpoint_step"]}')
    if network.get('pixels'):  # records from before the field have none
        details.append('slices of {} × {} pixels'.format(*network['pixels']))
    weights = network['sha256'].get('weights.safetensors')
    if weights:
        details.append(f'SHA-256 of its weights {weights[:12]}…')
    text = f'a {kind}'
    if network['name'] == DEFAULT:
        text = f'the {kind} that comes with covseg_jax'
    if details:
        text += f' ({", ".join(details)})'
    data = network['training_data']
    if data:
        with_masks = 'with' if data['human_masks'] else 'without'
        named = {'phantoms': 'synthetic scans (phantoms)'}
        sets = ' and '.join(named.get(each, each) for each in data['data_sets'])
        if data.get('covid_studies') == 0:
            sets = f'synthetic opacities, painted into scans without lesions of {sets},'
        text += f', trained on {sets} {with_masks} human lesion masks'
    if network['name'] == DEFAULT:
        text += ', as the model card of covseg_jax describes'
    return text


def _describe_masks(masks: Mapping[str, Any]) -> str:
    low, high = masks['threshold'], masks['seed_threshold']
    if masks['share_of_max']:
        text = (
            'Within the lungs, voxels were marked whose output exceeds '
            f"{100 * masks['share_of_max']:g} % of the study's highest"
        )
    elif high > low:
        text = (
            f'Within the lungs, connected voxels with a probability of at least {low:.3g} were '
            f'marked where one of them reaches {high:.3g}'
        )
    else:
        text = f'Within the lungs, voxels with a probability of at least {low:.3g} were marked'
    if masks['min_component_ml']:
        text += f', and lesions of less than {masks["min_component_ml"]:g} ml were dropped'
    return f"{text}, on the scan's own grid"

"""Every field there is, with its unit, at the values of the variant `mosmed`.

First what one turns: data, steps, batches, rates, losses. Below the line, fine tuning. Most groups
are the dataclass that is named beside them, field by field; it says more of each.
"""

import ml_collections


def get_base() -> ml_collections.ConfigDict:
    """The configuration that all variants start from; not locked."""
    config = ml_collections.ConfigDict()
    config.name = 'transunet'  # the config's file
    config.variant = 'mosmed'  # of that file
    config.seed = 0  # of all random numbers but the phantoms'
    config.stages = 'prepare,gan,synthesize,train,evaluate'  # without --stages
    config.data = _data()
    config.gan = _gan()
    config.train = _train()
    config.network = _network()
    config.predict = _predict()
    config.masks = _masks()
    # --- fine tuning
    config.prepare = _prepare()
    config.opacities = _opacities()
    config.lungs = _lungs()
    config.synthesize = _synthesize()
    config.unet = _unet()
    config.phantom = _phantom()
    config.export = _export()
    config.distributed = _distributed()
    config.compile_check = _compile_check()
    return config


def _data() -> ml_collections.ConfigDict:
    data = ml_collections.ConfigDict()
    data.folder = 'data/MosMedData'  # '' with phantom.make: <workdir>/studies
    data.layout = 'auto'  # or one of imaging/studies.py, such as 'zenodo'
    data.subject_pattern = '(.*)'  # regex on a study id; its first group is the subject
    # Regex: studies whose whole id it matches are healthy, beside those of category CT-0.
    data.healthy_pattern = ''
    data.evaluation_pattern = '.*'  # regex: subjects with a mask that are kept for evaluation
    # Chance of each healthy subject to be held out, one at least: thresholds are found on these,
    # and painted rounds validated.
    data.calibration_fraction = 0.15
    data.validation_fraction = 0.1  # the same of other COVID subjects: other rounds are validated
    data.on_bad_study = 'skip'  # or 'stop'
    data.num_workers = 0  # processes that prepare, verify, predict; 0: one a core, as memory allows
    data.prepared = ''  # '' means <workdir>/prepared
    data.pseudo_masks = ''  # '' means <workdir>/pseudo_masks
    return data


def _gan() -> ml_collections.ConfigDict:
    gan = ml_collections.ConfigDict()
    gan.num_steps = 10_000  # in the published recipe iterations
    gan.batch_size = 8  # crops of healthy scans, and as many of COVID scans
    gan.learning_rate = 1e-3  # of the generator, at its highest
    gan.discriminator_learning_rate = 2e-4  # throughout
    gan.learning_rate_batch_size = 0  # as train.learning_rate_batch_size, of both rates
    gan.schedule = 'cosine'  # or 'constant'
    gan.warmup_steps = 200  # in which the generator's rate rises from 0, half of all at most
    gan.adversarial_every = 2  # the other steps learn the reconstruction alone
    gan.losses = losses = ml_collections.ConfigDict()  # gan/steps.py: GANLosses
    losses.reconstruction = 1.0  # weights
    losses.adversarial = 0.1
    losses.identity = 1.0
    losses.aerated_below = 0.16  # image value under which a voxel counts as aerated
    losses.error_floor = 5e-4  # squared image value: of a clean sample's error
    gan.generator = generator = ml_collections.ConfigDict()  # models/gan3d.py: Generator
    generator.filters = (8, 16, 32, 64)  # channels of its levels
    generator.bottleneck_filters = 128  # channels below its levels
    generator.noise_channels = 10  # of its random input
    generator.patch = 1  # in-plane voxels that enter as channels of one; 2 or 4 is cheaper
    generator.use_norm = True  # group normalisation; the published network has none
    generator.head = 'blend'  # or 'relu', the published one
    # The networks see (x - shift) * scale: lungs fill a narrow band of x.
    generator.input_shift = 0.12
    generator.input_scale = 6.0  # as input_shift
    generator.input_clip = 1.3  # of the scaled input: -529 HU and more look alike
    gan.discriminator = discriminator = ml_collections.ConfigDict()
    discriminator.filters = (16, 32, 64)  # channels of its levels
    # Or 'published', see gan/published_step.py; or 'none' (leave out the stage gan): the
    # pseudo-masks are then a threshold on the density.
    gan.recipe = 'default'
    gan.depth = 32  # slices of a training crop, a multiple of 16
    gan.clip_norm = 1.0  # of the gradient; 0 leaves it
    gan.ema_decay = 0.999  # a step, of the averaged weights that are used in the end
    gan.compute_dtype = 'bfloat16'  # or 'float32'; weights are float32 in any case
    _add_run(gan)
    return gan


def _train() -> ml_collections.ConfigDict:
    train = ml_collections.ConfigDict()
    # A model to go on from: 'default', or the folder of an export; '': from new weights. Several
    # with commas: a training goes on from the first, and synthesize.source='model' averages all.
    train.init = ''
    train.num_steps = 20_000  # updates of the network, in all rounds
    train.batch_size = 32  # half high-, half low-infection slices
    train.micro_batches = 1  # parts of a batch, one after the other where memory is short
    train.learning_rate = 3e-4  # at its highest
    # The batch size that the rate is of: for another one it is scaled by the square root of their
    # ratio, see training/parts.py; 0 takes it as it is.
    train.learning_rate_batch_size = 0
    train.schedule = 'cosine'  # or 'plateau', 'constant'
    train.warmup_steps = 500  # as gan.warmup_steps
    train.plateau_patience = 5  # evaluations, as PyTorch counts them
    train.plateau_factor = 0.5  # of the rate after that
    # Or 'combined': the losses as one sum, in every step. Or 'published': num_epochs epochs
    # in two phases, contrastive and then MSE alone, and after them the sum.
    train.mode = 'two_phase'
    train.num_epochs = 100  # in mode 'published'
    train.epoch_steps = 500  # in the modes 'two_phase' and 'published'
    train.contrastive_steps = 50  # of an epoch's steps, the first, in the same modes
    train.losses = losses = ml_collections.ConfigDict()  # segmentation/steps.py: SegmentationLosses
    losses.contrastive = 0.1  # weights; a loss of weight 0 is not computed
    losses.mse = 1.0
    losses.sensitivity = 1.0
    losses.beta = 2.0  # extra weight of missed lesion in the BCE
    losses.temperature = 0.1  # of the contrastive loss
    losses.positive_weight = 1.5  # w of the contrastive loss, of pairs of one label
    losses.contrastive_features = 'projection'  # or, as published, 'logits', the flattened map
    losses.contrastive_labels = 'infection'  # high or low; or, as published, 'one': all are 1
    losses.include_self = False  # published True: a slice and itself are a positive pair
    losses.mse_on = 'probability'  # or, as published, 'logits'
    losses.clip_targets = True  # to [0, 1]; published False, a target is a signed difference
    losses.binary_targets = True  # cut the pseudo-masks at 0.5
    # Soft targets between these have no weight: there GAN and network disagree, and there run the
    # borders of exact masks once a slice is zoomed and shifted; () weighs all.
    losses.doubtful = (0.25, 0.75)
    train.rounds = ('synthetic', 'refined')  # and 'targets', see segmentation/targets.py
    train.round_shares = (0.7, 0.3)  # of num_steps
    train.targets = 'pseudo'  # or 'human', or 'human_else_pseudo'
    train.labels = 'quartiles'  # high- and low-infection slices; or 'infection'
    train.high_percent = 1.0  # of a slice's lungs, from which on 'infection' calls it high
    train.use_healthy = True  # healthy training scans join the low group with empty targets
    train.synthetic_share = 0.5  # of the slices that get opacities with exact masks
    # In a healthy scan on average: a cut is refused that held-out healthy scans show to mark more,
    # with 95 % confidence, or that marks three times this in them.
    train.max_healthy_ml = 15.0
    train.augment = augment = ml_collections.ConfigDict()  # data/augment.py: Augmentation
    augment.enabled = True  # with mirror images, and the next, each at most
    augment.zoom = 0.1  # relative
    augment.shift = 0.05  # of the image's side
    augment.gain = 0.1  # of image values, relative
    augment.bias = 0.02  # image value
    augment.noise = 0.01  # standard deviation, image value
    augment.smoothing_pixels = 0.0  # standard deviation, before noise is added
    train.projection_dim = 128  # of the contrastive loss
    train.clip_norm = 1.0  # as gan.clip_norm
    train.ema_decay = 0.999  # as gan.ema_decay
    # Batch statistics of what predicts: the training's, averaged as the weights are; or 'scans',
    # those of its scans without painted opacities and augmentation, see docs/own_scans.md.
    train.statistics = 'training'
    train.compute_dtype = 'bfloat16'  # as gan.compute_dtype
    _add_run(train)
    return train


def _add_run(group: ml_collections.ConfigDict) -> None:
    group.log_every = 20  # steps
    group.evaluate_every = 500  # steps
    group.save_every = 500  # steps
    group.max_skipped_steps = 10  # in a row, for a loss or gradient that is not finite
    group.profile_steps = ()  # or (first, last): those steps are traced into the folder's profile/


def _network() -> ml_collections.ConfigDict:
    network = ml_collections.ConfigDict()  # models/transunet.py: TransUNet
    network.name = 'transunet'  # or 'unet', see `unet`; or 'none', to evaluate pseudo-masks alone
    network.width = 128  # channels of the first level
    network.final_width = 0  # channels at full resolution; 0 means width / 8, as published
    network.num_heads = 4  # of the transformer's attention
    network.mlp_dim = 512  # of the transformer's blocks
    network.num_blocks = 8  # of the transformer
    network.dropout_rate = 0.1  # in the transformer
    network.published_attention = False  # scores times sqrt(d), as in published weights
    network.initial_logit = -3.0  # of every pixel before training; published 0
    return network


def _predict() -> ml_collections.ConfigDict:
    predict = ml_collections.ConfigDict()  # segmentation/volumes.py: VolumeSettings
    predict.batch_size = 32  # slices
    predict.output = 'sigmoid'  # or 'linear', the raw output
    # Slices are smoothed in their plane, as those of the training were by the interpolation of
    # zooms and shifts: standard deviation in pixels of the model's grid; 0 leaves them.
    predict.smoothing_pixels = 0.5
    predict.flip = True  # average with the prediction of the mirrored slices
    # The network sees single slices and a lesion spans several: standard deviation, in slices of
    # the model's grid, that probabilities are smoothed by from slice to slice; 0 leaves them.
    predict.smoothing_slices = 0.7
    # In each slice, of the lungs' outermost pixels, which hold some of the wall as well: what their
    # probabilities are multiplied by, and those of the next ones by its root; 1 leaves them.
    predict.border_factor = 0.8
    return predict


def _masks() -> ml_collections.ConfigDict:
    masks = ml_collections.ConfigDict()  # imaging/masks.py: MaskSettings, without its thresholds
    masks.min_component_ml = 0.1  # smaller lesions are dropped
    # Published 0.2: a mask is what exceeds this share of the output's maximum over the study; 0:
    # the thresholds that train finds.
    masks.share_of_max = 0.0
    return masks


def _prepare() -> ml_collections.ConfigDict:
    prepare = ml_collections.ConfigDict()  # prepare/prepare_studies.py: PrepareSettings
    prepare.grid = (32, 128, 128)  # D, H, W of the prepared arrays, multiples of 16
    prepare.window_hu = (-1000.0, 400.0)  # HU of image values 0 and 1
    prepare.margin_mm = 4.0  # around the lungs' bounding box
    prepare.lungs_source = 'network'  # or 'threshold', 'file' or 'lungmask'
    prepare.lung_network = (
        ''  # a file of --stages=lungs in place of the one that comes with the code
    )
    prepare.lesion_labels = (1,)  # values of a human mask that are lesion; (255,) for 0/255 masks
    return prepare


def _opacities() -> ml_collections.ConfigDict:
    # data/opacities.py: OpacityModel. Ranges (low, high) that each sample draws from.
    opacities = ml_collections.ConfigDict()
    opacities.target_hu = (-680.0, -380.0)  # density that a blob is blended towards
    opacities.opacity = (0.6, 1.0)  # blending weight at a blob's core
    # Standard deviations: -0.2 covers more than half of the lungs, 2.9 little.
    opacities.coverage_threshold = (-0.2, 2.9)
    opacities.grain_voxels = (4.0, 20.0)  # finest and coarsest, in plane
    opacities.grain_slices = (1.5, 4.0)  # the same along depth
    opacities.edge = (0.1, 0.4)  # softness of borders, standard deviations
    opacities.texture = 0.25  # relative
    opacities.periphery = (0.0, 2.0)  # standard deviations more at the pleura than deep inside
    opacities.dependence = (-0.5, 2.0)  # the same at the back
    opacities.core_share = 0.4  # of samples with consolidated cores
    opacities.core_hu = (-250.0, 50.0)  # their density
    # Of an opacity, at most: density that is added, so that most of the noise stays; the rest is
    # blended, and smoother than the lung around it.
    opacities.added_share = 0.0
    opacities.clean_fraction = 0.1  # of samples that stay as they are
    opacities.dependent_density = 0.5  # at most, of the way to -370 HU at the back: healthy lungs
    return opacities


def _lungs() -> ml_collections.ConfigDict:
    # covseg_jax/lungs: the network that finds lungs where they are dense; trained on request alone,
    # for its weights come with the code.
    lungs = ml_collections.ConfigDict()
    lungs.num_phantoms = 60  # that it learns from
    lungs.num_validation = 5  # phantoms beside them
    lungs.widths = (16, 32, 64, 96)  # channels of its levels; models/unet.py
    lungs.num_steps = 4500  # updates
    lungs.batch_size = 8  # slices
    lungs.learning_rate = 3e-3  # at its highest
    lungs.learning_rate_batch_size = 0  # as train.learning_rate_batch_size
    lungs.schedule = 'cosine'  # as gan.schedule
    lungs.warmup_steps = 50  # as gan.warmup_steps
    lungs.clip_norm = 1.0  # as gan.clip_norm
    lungs.ema_decay = 0.995  # as gan.ema_decay
    _add_run(lungs)
    # What is painted here and not as in `opacities`: consolidation up to whole lobes.
    lungs.opacities = opacities = ml_collections.ConfigDict()
    opacities.target_hu = (-600.0, 80.0)
    opacities.opacity = (0.7, 1.0)
    opacities.coverage_threshold = (-1.2, 2.0)
    opacities.grain_voxels = (8.0, 50.0)
    opacities.grain_slices = (1.5, 3.0)
    opacities.periphery = (0.0, 2.5)
    opacities.dependence = (0.0, 3.5)
    opacities.core_share = 0.75
    opacities.core_hu = (-80.0, 80.0)
    opacities.added_share = 0.0  # consolidation hides vessels
    opacities.clean_fraction = 0.25
    lungs.lobe_share = 0.25  # of the samples, into which `lobes` are painted instead
    # as opacities, but lobes without air except in their airways, mostly the lower ones.
    lungs.lobes = lobes = ml_collections.ConfigDict()
    lobes.target_hu = (0.0, 80.0)
    lobes.opacity = (0.9, 1.0)
    lobes.coverage_threshold = (-0.5, 1.6)
    lobes.grain_voxels = (25.0, 60.0)
    lobes.grain_slices = (1.5, 3.0)
    lobes.edge = (0.02, 0.15)
    lobes.texture = 0.05
    lobes.periphery = (0.0, 1.5)
    lobes.dependence = (0.5, 4.0)
    lobes.core_share = 0.0
    lobes.added_share = 0.0
    lobes.clean_fraction = 0.1
    return lungs


def _synthesize() -> ml_collections.ConfigDict:
    synthesize = ml_collections.ConfigDict()  # gan/synthesize.py: PseudoMaskSettings
    synthesize.source = 'gan'  # or 'model', what train.init names; the rest is the GAN's
    synthesize.difference = 'opacity'  # or 'published'
    # Published 0.2: the pseudo-mask is the difference as it is, and its mask what exceeds this
    # share of the study's maximum; 0: a threshold is found in healthy lungs, see the percentile.
    synthesize.share_of_max = 0.0
    synthesize.smoothing_mm = 2.0  # standard deviation, in plane
    synthesize.erosion_mm = 2.0  # from the lungs' edge, in plane, within which nothing counts
    synthesize.percentile = 99.5  # of the score in held-out healthy lungs: the threshold
    synthesize.min_component_ml = 0.1  # smaller components are dropped
    synthesize.num_noise = 1  # noise inputs that the healthy version is averaged over
    return synthesize


def _unet() -> ml_collections.ConfigDict:
    unet = ml_collections.ConfigDict()  # models/unet.py: UNet, the network of network.name='unet'
    unet.widths = (32, 64, 128, 256)  # channels of its levels
    unet.initial_logit = -3.0  # as network.initial_logit
    return unet


def _phantom() -> ml_collections.ConfigDict:
    phantom = ml_collections.ConfigDict()  # phantom/studies.py: write_phantom_data_set
    phantom.make = False  # make studies in data.folder first
    phantom.num_healthy = 20  # studies
    phantom.num_covid = 40  # with lesions
    phantom.num_masked = 12  # of the COVID studies: these are for evaluation
    phantom.shape = (192, 192, 40)  # voxels, x y z
    phantom.spacing_mm = (1.75, 1.75, 8.0)  # x y z
    phantom.seed = 0  # another one is other chests
    return phantom


def _export() -> ml_collections.ConfigDict:
    export = ml_collections.ConfigDict()
    # What model.json says of it.
    export.licence = 'not stated; ask who trained it, and see the licence of its training data'
    export.onnx = False  # network.onnx too; needs `pip install jax2onnx==0.13.0`
    return export


def _compile_check() -> ml_collections.ConfigDict:
    check = ml_collections.ConfigDict()
    check.topology = 'v5e:1x1'  # or 'v5e:2x4', 'v4:2x2x1', 'v5p:2x2x1', ...; several: 'A,B'
    check.batch_per_device = False  # True: batch sizes are one device's, not those of all together
    check.price_per_chip_hour = 0.0  # in any currency; 0: no sum
    return check


def _distributed() -> ml_collections.ConfigDict:
    # For runs on several hosts; a Cloud TPU VM finds all three itself.
    distributed = ml_collections.ConfigDict()
    distributed.coordinator = ''  # host:port of the first host; '' means one host
    distributed.num_processes = 1  # hosts
    distributed.process_id = 0  # of this host, from 0
    return distributed

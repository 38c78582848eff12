"""The whole pipeline: studies -> prepared cases -> GAN -> pseudo-masks -> TransUNet -> evaluation.

Variants, chosen as `--config=configs/transunet.py:VARIANT`:
  mosmed   MosMedData COVID19_1110 in data/MosMedData; the published sizes; for a TPU or GPU.
  phantom  the same stages on studies it makes itself, sized for a laptop CPU.
  tiny     the same again, as small as it goes: for tests. Its masks mean nothing.
  published          the recipe of the public code, as `_publish` lists it, on mosmed's studies.
  phantom_published  the same on phantoms, in networks of the phantom variant's size.

Any field can be set on the command line: `--config.train.batch_size=16`.
"""

import ml_collections

VARIANTS = ('mosmed', 'phantom', 'tiny', 'published', 'phantom_published')


def get_config(variant: str = 'mosmed') -> ml_collections.ConfigDict:
    """The locked configuration of one variant."""
    if variant not in VARIANTS:
        raise ValueError(f'variant {variant!r} is not one of {", ".join(VARIANTS)}')
    config = _mosmed()
    config.variant = variant
    if variant.startswith('phantom'):
        _shrink_to_phantom(config)
    if variant == 'tiny':
        _shrink_to_tiny(config)
    if variant.endswith('published'):
        _publish(config)
    if variant == 'phantom_published':
        _shrink_published_to_phantom(config)
    return config.lock()


def _mosmed() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.name = 'transunet'
    config.variant = 'mosmed'
    config.seed = 0
    config.stages = 'prepare,gan,synthesize,train,evaluate'

    # For runs on several hosts; a Cloud TPU VM finds all three itself.
    config.distributed = distributed = ml_collections.ConfigDict()
    distributed.coordinator = ''  # host:port of the first host; '' means one host
    distributed.num_processes = 1
    distributed.process_id = 0  # of this host, from 0

    config.data = data = ml_collections.ConfigDict()
    data.folder = 'data/MosMedData'  # '' with phantom.make: <workdir>/studies
    data.prepared = ''  # '' means <workdir>/prepared
    data.pseudo_masks = ''  # '' means <workdir>/pseudo_masks
    data.layout = 'auto'  # or one of imaging/studies.py, such as 'zenodo'
    data.num_workers = 0  # processes that prepare, verify, predict; 0 means one a core
    data.on_bad_study = 'skip'  # or 'stop'
    data.subject_pattern = '(.*)'  # regex on a study id; its first group is the subject
    # Regex: studies whose whole id it matches are healthy, beside those of category CT-0.
    data.healthy_pattern = ''
    data.evaluation_pattern = '.*'  # regex: subjects with a mask that are kept for evaluation
    data.calibration_fraction = 0.15  # of the healthy subjects: thresholds are found on them
    data.validation_fraction = 0.1  # of the other COVID subjects

    config.phantom = phantom = ml_collections.ConfigDict()
    phantom.make = False  # make studies in data.folder first
    phantom.num_healthy = 20
    phantom.num_covid = 40
    phantom.num_masked = 12  # of the COVID studies: these are for evaluation
    phantom.shape = (192, 192, 40)  # voxels, x y z
    phantom.spacing_mm = (1.75, 1.75, 8.0)
    phantom.seed = 0

    config.prepare = prepare = ml_collections.ConfigDict()
    prepare.grid = (32, 128, 128)  # D, H, W of the prepared arrays, multiples of 16
    prepare.window_hu = (-1000.0, 400.0)  # HU of image values 0 and 1
    prepare.margin_mm = 4.0  # around the lungs' bounding box
    prepare.lungs_source = 'threshold'  # 'threshold', 'file' or 'lungmask'
    prepare.lesion_labels = (1,)  # values of a human mask that are lesion; (255,) for 0/255 masks

    config.gan = gan = ml_collections.ConfigDict()
    gan.filters = (8, 16, 32, 64)  # channels of the generator's levels
    gan.bottleneck_filters = 128  # patch² + sum(filters) + this: a multiple of 3
    gan.noise_channels = 10  # of the generator's random input
    gan.patch = 1  # in-plane voxels that enter as channels of one; 2 or 4 is cheaper
    gan.use_norm = True  # group normalisation; the published network has none
    gan.head = 'blend'  # or 'relu', the published one; see models/gan3d.py
    gan.input_shift = 0.12  # the networks see (x - shift) * scale: lungs fill a narrow band of x
    gan.input_scale = 6.0
    gan.input_clip = 1.3  # of the scaled input: -529 HU and more look alike
    gan.discriminator_filters = (16, 32, 64)  # channels of its levels
    # Or 'published', see gan/published_step.py; or 'none' (leave out the stage gan): the
    # pseudo-masks are then a threshold on the density.
    gan.recipe = 'default'
    gan.depth = 32  # slices of a training crop, a multiple of 16
    gan.batch_size = 8  # crops of healthy scans, and as many of COVID scans
    gan.num_steps = 10_000
    gan.learning_rate = 1e-3  # of the generator, at its highest
    gan.discriminator_learning_rate = 2e-4
    gan.schedule = 'cosine'  # or 'constant'
    gan.warmup_steps = 200
    gan.clip_norm = 1.0  # of the gradient; 0 leaves it
    gan.ema_decay = 0.999  # a step, of the averaged weights that are used in the end
    gan.adversarial_every = 2  # the other steps learn the reconstruction alone
    gan.reconstruction = 1.0  # weights of the losses
    gan.adversarial = 0.1
    gan.identity = 1.0
    gan.aerated_below = 0.16  # image value under which a voxel counts as aerated
    gan.error_floor = 5e-4  # squared image value: what a clean sample's error is measured against
    gan.dependent_density = 0.5  # at most, of the way to -370 HU at the back: healthy variation
    gan.opacities = opacities = ml_collections.ConfigDict()
    # Ranges (low, high) that each sample draws from; data/opacities.py says more of each.
    opacities.target_hu = (-680.0, -380.0)  # density that a blob is blended towards
    opacities.opacity = (0.6, 1.0)  # blending weight at a blob's core
    opacities.coverage_threshold = (0.9, 2.9)  # standard deviations: 0.9 covers much, 2.9 little
    opacities.grain_voxels = (4.0, 20.0)  # finest and coarsest, in plane
    opacities.grain_slices = (1.5, 4.0)  # the same along depth
    opacities.edge = (0.1, 0.4)  # softness of borders, standard deviations
    opacities.texture = 0.25  # relative
    opacities.periphery = (0.0, 2.0)  # standard deviations more at the pleura than deep inside
    opacities.dependence = (-0.5, 2.0)  # the same at the back
    opacities.core_share = 0.4  # of samples with consolidated cores
    opacities.core_hu = (-250.0, 50.0)
    opacities.clean_fraction = 0.1  # of samples that stay as they are
    gan.compute_dtype = 'bfloat16'  # or 'float32'; weights are float32 in any case
    gan.max_skipped_steps = 10  # in a row, for a loss or gradient that is not finite
    gan.log_every = 20  # steps
    gan.evaluate_every = 500
    gan.save_every = 500
    gan.profile_steps = ()  # or (first, last): those steps are traced into gan/profile

    config.synthesize = synthesize = ml_collections.ConfigDict()
    synthesize.difference = 'opacity'  # or 'published', see gan/synthesize.py
    # Published 0.2: the pseudo-mask is the difference as it is, and its mask what exceeds this
    # share of the study's maximum; 0: a threshold is found in healthy lungs, see the percentile.
    synthesize.share_of_max = 0.0
    synthesize.smoothing_mm = 2.0  # standard deviation, in plane
    synthesize.erosion_mm = 2.0
    synthesize.percentile = 99.5  # of the score in held-out healthy lungs: the threshold
    synthesize.min_component_ml = 0.1
    synthesize.num_noise = 1  # noise inputs that the healthy version is averaged over

    config.network = network = ml_collections.ConfigDict()
    network.name = 'transunet'  # or 'unet'; or 'none', to evaluate pseudo-masks alone
    network.width = 128  # channels of the first level
    network.final_width = 0  # channels at full resolution; 0 means width / 8, as published
    network.num_heads = 4
    network.mlp_dim = 512  # of the transformer's blocks
    network.num_blocks = 8
    network.dropout_rate = 0.1
    network.published_attention = False  # scores times sqrt(d), as in published weights
    network.initial_logit = -3.0  # of every pixel before training; published 0
    network.unet_widths = (32, 64, 128, 256)  # channels of the U-Net's levels
    network.projection_dim = 128  # of the contrastive loss

    config.train = train = ml_collections.ConfigDict()
    # Or 'combined': the three losses as one sum, in every step. Or 'published': num_epochs epochs
    # in two phases, contrastive and then MSE alone, and after them the sum.
    train.mode = 'two_phase'
    train.num_epochs = 100  # in mode 'published'
    train.epoch_steps = 500  # in the modes 'two_phase' and 'published'
    train.contrastive_steps = 50  # of an epoch's steps, the first, in the same modes
    train.batch_size = 32  # half high-, half low-infection slices
    train.micro_batches = 1  # parts of a batch, one after the other where memory is short
    train.num_steps = 20_000
    train.rounds = ('synthetic', 'refined')  # and 'targets', see segmentation/targets.py
    train.round_shares = (0.7, 0.3)  # of num_steps
    train.targets = 'pseudo'  # or 'human', or 'human_else_pseudo'
    train.labels = 'quartiles'  # high- and low-infection slices; or 'infection'
    train.high_percent = 1.0  # of a slice's lungs, from which on 'infection' calls it high
    train.use_healthy = True  # healthy training scans join the low group with empty targets
    train.synthetic_share = 0.5  # of the slices that get opacities with exact masks
    train.binary_targets = True  # cut the pseudo-masks at 0.5
    # Soft targets between these have no weight: there GAN and network disagree; () weighs all.
    train.doubtful = (0.25, 0.75)
    train.learning_rate = 3e-4  # at its highest
    train.schedule = 'cosine'  # or 'plateau', 'constant'
    train.warmup_steps = 500
    train.plateau_patience = 5  # evaluations, as PyTorch counts them
    train.plateau_factor = 0.5
    train.clip_norm = 1.0  # as gan.clip_norm
    train.ema_decay = 0.999  # as gan.ema_decay
    train.contrastive = 0.1  # weights of the losses
    train.mse = 1.0
    train.sensitivity = 1.0
    train.beta = 2.0  # extra weight of missed lesion in the BCE
    train.temperature = 0.1  # of the contrastive loss
    train.positive_weight = 1.5  # w of the contrastive loss, of pairs of high-infection slices
    train.contrastive_features = 'projection'  # or, as published, 'logits', the flattened map
    train.contrastive_labels = 'infection'  # high or low; or, as published, 'one': all are the same
    train.include_self = False  # published True: a slice and itself are a positive pair
    train.max_healthy_ml = 15.0  # that the threshold may mark in healthy scans, on average
    train.mse_on = 'probability'  # or, as published, 'logits'
    train.clip_targets = True  # to [0, 1]; published False, a target is a signed difference
    train.augment = True  # with mirror images, and the next, each at most
    train.zoom = 0.1  # relative
    train.shift = 0.05  # of the image's side
    train.gain = 0.1  # of image values, relative
    train.bias = 0.02  # image value
    train.noise = 0.01  # standard deviation, image value
    train.compute_dtype = 'bfloat16'  # as gan.compute_dtype
    train.max_skipped_steps = 10  # as gan.max_skipped_steps
    train.log_every = 20  # steps
    train.evaluate_every = 500
    train.save_every = 500
    train.profile_steps = ()  # or (first, last): those steps are traced into transunet/profile

    config.compile_check = compile_check = ml_collections.ConfigDict()
    compile_check.topology = 'v5e:1x1'  # or 'v5e:2x4', 'v4:2x2x1', 'v5p:2x2x1', ...

    config.export = export = ml_collections.ConfigDict()
    export.licence = 'not stated; ask who trained it, and see the licence of its training data'

    export.onnx = False  # network.onnx too; needs `pip install jax2onnx==0.13.0`

    config.predict = predict = ml_collections.ConfigDict()
    predict.batch_size = 32  # slices
    predict.output = 'sigmoid'  # or 'linear', the raw output, see segmentation/volumes.py
    # Published 0.2: a mask is what exceeds this share of the output's maximum over the study; 0:
    # the thresholds that train finds.
    predict.share_of_max = 0.0
    predict.flip = True  # average with the prediction of the mirrored slices
    # The network sees single slices and a lesion spans several: standard deviation, in slices of
    # the model's grid, that probabilities are smoothed by from slice to slice; 0 leaves them.
    predict.smoothing_slices = 0.7
    predict.min_component_ml = 0.1
    return config


def _shrink_to_phantom(config: ml_collections.ConfigDict) -> None:
    config.data.folder = ''
    config.phantom.make = True
    config.data.calibration_fraction = 0.3
    config.data.validation_fraction = 0.15
    config.gan.patch = 4
    config.gan.filters = (8, 16, 32, 48)
    config.gan.bottleneck_filters = 48
    config.gan.depth = 16
    config.gan.batch_size = 2
    config.gan.num_steps = 700
    config.gan.learning_rate = 2e-3
    config.gan.discriminator_learning_rate = 2e-3
    config.gan.warmup_steps = 20
    config.gan.ema_decay = 0.98
    config.gan.adversarial_every = 8
    config.gan.compute_dtype = 'float32'
    config.gan.log_every = 10
    config.gan.evaluate_every = 200
    config.gan.save_every = 100
    config.network.width = 16
    config.network.final_width = 8
    config.network.mlp_dim = 256
    config.network.num_blocks = 4
    config.network.dropout_rate = 0.0  # so short a run underfits, and random numbers cost time
    config.network.projection_dim = 64
    config.train.mode = 'combined'  # one compiled step less than two phases
    config.train.batch_size = 8
    config.train.num_steps = 3000
    config.train.learning_rate = 2.5e-3
    config.train.warmup_steps = 40
    config.train.ema_decay = 0.98
    config.train.compute_dtype = 'float32'
    config.train.log_every = 10
    config.train.evaluate_every = 200
    config.train.save_every = 200


def _shrink_to_tiny(config: ml_collections.ConfigDict) -> None:
    _shrink_to_phantom(config)
    config.phantom.num_healthy = 4
    config.phantom.num_covid = 6
    config.phantom.num_masked = 2
    config.phantom.shape = (64, 64, 20)
    config.phantom.spacing_mm = (5.25, 5.25, 16.0)
    config.prepare.grid = (16, 32, 32)
    config.gan.patch = 2
    config.gan.filters = (4,)  # compile time is what counts here
    config.gan.bottleneck_filters = 4
    config.gan.discriminator_filters = (4,)
    config.gan.num_steps = 8
    config.gan.adversarial_every = 1
    config.gan.log_every = 2
    config.gan.evaluate_every = 4
    config.gan.save_every = 4
    config.gan.opacities.grain_voxels = (3.0, 8.0)
    config.network.width = 8
    config.network.num_heads = 2
    config.network.mlp_dim = 16
    config.network.num_blocks = 1
    config.network.initial_logit = 0.0  # a few steps do not lift it: refined targets would be empty
    config.network.unet_widths = (4, 8)
    config.network.projection_dim = 8
    config.train.batch_size = 8
    config.train.num_steps = 8
    config.train.log_every = 2
    config.train.evaluate_every = 4
    config.train.save_every = 4
    config.predict.batch_size = 8


def _publish(config: ml_collections.ConfigDict) -> None:
    """The recipe of the public code, METHOD.md sections 2 to 5, with the faults named there.

    As published:
      networks    both GAN networks (7,861,643 and 282,378 parameters) and the TransUNet
                  (66,870,129), its attention, dropout 0.1 and corner alignment, logits from 0 on.
      GAN         mean squared errors alone; reconstruction, discriminator, adversarial update in
                  each of 10,000 iterations of batch 5; Adam 5e-5 and 1e-3 with Keras's epsilon;
                  Perlin noise on 8 of 32 slices; no averaged weights.
      targets     the raw signed difference of the two volumes, each scaled by its own extremes, not
                  thresholded, smoothed, eroded or clipped. Losses take it unclipped, because the
                  public code does: it regresses the raw output on the difference itself.
      slices      ranked by the sum of the difference: high above the third quartile, low between
                  the first and the third; a batch is 4 + 4.
      losses      the contrastive one on the flattened logit map, self pairs included, temperature
                  1, w 1.5; MSE on logits; BCE with beta 2; the sum unweighted. All its contrastive
                  labels are 1, so that no pair is negative: the loss is 0, and a contrastive step
                  moves batch statistics and Adam's moments alone. train.contrastive_labels =
                  'infection' is what was meant.
      schedule    100 x (2 contrastive + 1 MSE batches), then 500 x 2 batches of the sum: 1,300
                  steps of Adam at 5e-5, constant; the newest weights, not averaged.
      prediction  the raw output, no mirror images, no smoothing, no least component; a lesion is
                  what exceeds 0.2 of the output's maximum over the study. A pseudo-mask's mask is
                  cut in the same way.

    Not as published, here as in the default recipe:
      preparation    lungs by threshold in place of lungmask's U-Net (prepare.lungs_source =
                     'lungmask' has it), in-plane aspect kept, clipped after resampling, no lost
                     row, column and slice (METHOD.md section 1).
      who trains     evaluation subjects are in no training set, and healthy (15 %) and COVID (10 %)
                     subjects are held out, for the learning curves alone.
      masks          brought back to the study's own grid, inside the lungs alone; an output above 1
                     is scaled so that the study's maximum is 1, which moves no mask.
      biases         of the TransUNet's convolutions start at 0, not at PyTorch's random values.
      ties           what METHOD.md leaves open: the discriminator's loss is the mean of that on
                     real and on generated scans, and 2D slices without lung are not trained on.
      safety         a step whose loss is not finite is skipped.
    """
    config.gan.recipe = 'published'
    config.gan.filters = (8, 16, 32, 64)
    config.gan.bottleneck_filters = 128
    config.gan.noise_channels = 10
    config.gan.patch = 1
    config.gan.use_norm = False
    config.gan.head = 'relu'
    config.gan.input_shift = 0.0
    config.gan.input_scale = 1.0
    config.gan.input_clip = None
    config.gan.discriminator_filters = (32, 64, 128)
    config.gan.depth = 32
    config.gan.batch_size = 5
    config.gan.num_steps = 10_000
    config.gan.learning_rate = 5e-5
    config.gan.discriminator_learning_rate = 1e-3
    config.gan.schedule = 'constant'
    config.gan.warmup_steps = 0
    config.gan.clip_norm = 0.0
    config.gan.ema_decay = 0.0
    config.gan.compute_dtype = 'float32'
    config.synthesize.difference = 'published'
    config.synthesize.share_of_max = 0.2
    config.synthesize.smoothing_mm = 0.0
    config.synthesize.erosion_mm = 0.0
    config.synthesize.min_component_ml = 0.0
    config.synthesize.num_noise = 1
    config.network.name = 'transunet'
    config.network.dropout_rate = 0.1
    config.network.published_attention = True
    config.network.initial_logit = 0.0
    config.train.mode = 'published'
    config.train.num_epochs = 100
    config.train.epoch_steps = 3
    config.train.contrastive_steps = 2
    config.train.num_steps = 1300
    config.train.batch_size = 8
    config.train.rounds = ('targets',)
    config.train.round_shares = (1.0,)
    config.train.targets = 'pseudo'
    config.train.labels = 'quartiles'
    config.train.use_healthy = False
    config.train.synthetic_share = 0.0
    config.train.binary_targets = False
    config.train.clip_targets = False
    config.train.doubtful = ()
    config.train.learning_rate = 5e-5
    config.train.schedule = 'constant'
    config.train.warmup_steps = 0
    config.train.clip_norm = 0.0
    config.train.ema_decay = 0.0
    config.train.contrastive = 1.0
    config.train.mse = 1.0
    config.train.sensitivity = 1.0
    config.train.beta = 2.0
    config.train.temperature = 1.0
    config.train.positive_weight = 1.5
    config.train.contrastive_features = 'logits'
    config.train.contrastive_labels = 'one'
    config.train.include_self = True
    config.train.mse_on = 'logits'
    config.train.augment = False
    config.train.compute_dtype = 'float32'
    config.predict.output = 'linear'
    config.predict.share_of_max = 0.2
    config.predict.flip = False
    config.predict.smoothing_slices = 0.0
    config.predict.min_component_ml = 0.0


def _shrink_published_to_phantom(config: ml_collections.ConfigDict) -> None:
    # Narrow networks, and minutes in place of 10,000 iterations: larger rates. The schedule of the
    # TransUNet is the published one, step for step.
    config.gan.patch = 4
    config.gan.filters = (8, 16, 32, 48)
    config.gan.bottleneck_filters = 48
    config.gan.discriminator_filters = (8, 16, 32)
    config.gan.batch_size = 1
    config.gan.num_steps = 300
    config.gan.learning_rate = 1e-3
    config.train.learning_rate = 1e-3

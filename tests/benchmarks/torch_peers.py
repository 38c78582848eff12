"""The networks in PyTorch, as one would write them there: what ours are timed against.

Sizes and layers as method.md gives them; weights are PyTorch's own, since only time is compared.
Batches are (B, C, ...) float32 tensors on PyTorch's default device.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn import functional


def _conv_norm(inputs: int, features: int, kernel: int, stride: int = 1, bias: bool = False):
    conv = nn.Conv2d(inputs, features, kernel, stride, kernel // 2, bias=bias)
    return nn.Sequential(conv, nn.BatchNorm2d(features))


class EncoderBottleneck(nn.Module):
    def __init__(self, inputs: int, features: int):
        super().__init__()
        self.shortcut = _conv_norm(inputs, features, 1, 2)
        self.first = _conv_norm(inputs, features, 1)
        self.second = _conv_norm(features, features, 3, 2)
        self.third = _conv_norm(features, features, 1)

    def forward(self, x):
        y = functional.relu(self.first(x), inplace=True)
        y = functional.relu(self.second(y), inplace=True)
        return functional.relu(self.third(y) + self.shortcut(x), inplace=True)


class DecoderBottleneck(nn.Module):
    def __init__(self, inputs: int, features: int):
        super().__init__()
        self.first = _conv_norm(inputs, features, 3, bias=True)
        self.second = _conv_norm(features, features, 3, bias=True)

    def forward(self, x, skip=None):
        x = functional.interpolate(x, scale_factor=2, mode='bilinear', align_corners=True)
        if skip is not None:
            x = torch.cat([skip, x], dim=1)
        x = functional.relu(self.first(x), inplace=True)
        return functional.relu(self.second(x), inplace=True)


class TransformerBlock(nn.Module):
    def __init__(self, features: int, num_heads: int, mlp_dim: int, dropout: float):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(features, 3 * features, bias=False)
        self.out = nn.Linear(features, features, bias=False)
        self.norm_1, self.norm_2 = nn.LayerNorm(features), nn.LayerNorm(features)
        self.drop = nn.Dropout(dropout)
        self.mlp = nn.Sequential(
            nn.Linear(features, mlp_dim),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(mlp_dim, features),
            nn.Dropout(dropout),
        )

    def forward(self, x):
        batch, count, features = x.shape
        fused = self.qkv(x).reshape(batch, count, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(*fused.unbind())
        mixed = mixed.transpose(1, 2).reshape(batch, count, features)
        x = self.norm_1(x + self.drop(self.out(mixed)))
        return self.norm_2(x + self.mlp(x))


class TransUNet(nn.Module):
    """(B, 1, H, W) -> logits (B, 1, H, W) and the mean patch token (B, 8 width)."""

    def __init__(self, size=128, width=128, final_width=0, num_heads=4, mlp_dim=512, num_blocks=8,
                 dropout=0.1):  # fmt: skip
        super().__init__()
        self.stem = _conv_norm(1, width, 7, 2)
        self.encoder = nn.ModuleList(
            [EncoderBottleneck(2**level * width, 2 ** (level + 1) * width) for level in range(3)]
        )
        features = 8 * width
        self.projection = nn.Linear(features, features)
        self.positions = nn.Parameter(torch.rand(1 + (size // 16) ** 2, features))
        self.class_token = nn.Parameter(torch.randn(1, 1, features))
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.Sequential(
            *[TransformerBlock(features, num_heads, mlp_dim, dropout) for _ in range(num_blocks)]
        )
        self.neck = _conv_norm(features, 4 * width, 3, bias=True)
        final = final_width or width // 8
        self.decoder = nn.ModuleList(
            [
                DecoderBottleneck(8 * width, 2 * width),
                DecoderBottleneck(4 * width, width),
                DecoderBottleneck(2 * width, width // 2),
                DecoderBottleneck(width // 2, final),
            ]
        )
        self.head = nn.Conv2d(final, 1, 1)

    def forward(self, image):
        x = functional.relu(self.stem(image), inplace=True)
        skips = [x]
        for block in self.encoder:
            x = block(x)
            skips.append(x)
        batch, features, height, width = x.shape
        tokens = self.projection(x.flatten(2).transpose(1, 2))
        tokens = torch.cat([self.class_token.expand(batch, -1, -1), tokens], dim=1) + self.positions
        tokens = self.blocks(self.drop(tokens))[:, 1:]
        x = tokens.transpose(1, 2).reshape(batch, features, height, width)
        x = functional.relu(self.neck(x), inplace=True)
        for block, skip in zip(self.decoder, (*skips[2::-1], None), strict=True):
            x = block(x, skip)
        return self.head(x), tokens.mean(1)


class Generator(nn.Module):
    """(B, 1, D, H, W) and noise (B, 10, D/s, H/ps, W/ps) -> (B, 1, D, H, W), s = 2 ** number of
    levels and p the patch. As published, or with patches as channels, group normalisation and the
    head 'blend'."""

    def __init__(self, filters=(8, 16, 32, 64), bottleneck=128, patch=1, norm=False, head='relu'):
        super().__init__()
        self.patch, self.norm, self.blend = patch, norm, head == 'blend'
        self.encoder, self.decoder = nn.ModuleList(), nn.ModuleList()
        channels, skips = patch**2, []
        for features in filters:
            self.encoder.append(self._pair(channels, features))
            channels += features
            skips.append(features)
        skips[-1] = channels
        self.before = self._conv(channels, bottleneck)
        joined = channels + bottleneck
        self.branches = nn.ModuleList(
            [self._conv(joined + 10, joined // 3, size) for size in (1, 3, 5)]
        )
        self.after = self._conv(joined, bottleneck)
        channels = joined
        for features, skip in reversed(list(zip(filters, skips, strict=True))):
            up = nn.ConvTranspose3d(channels, 4 * features, 2, 2)
            channels = 4 * features + skip
            self.decoder.append(nn.ModuleList([up, *self._pair(channels, features)]))
            channels += features
        self.head = nn.Conv3d(channels, patch**2 * (2 if self.blend else 1), 1)

    def _conv(self, inputs: int, features: int, size: int = 3) -> nn.Module:
        layers = [nn.Conv3d(inputs, features, size, padding=size // 2)]
        if self.norm:
            groups = max(n for n in range(1, features // 4 + 1) if features % n == 0)
            layers.append(nn.GroupNorm(groups, features, 1e-3))
        return nn.Sequential(*layers, nn.LeakyReLU(0.3, inplace=True))

    def _pair(self, channels: int, features: int) -> nn.ModuleList:
        second = self._conv(channels + features, features)
        return nn.ModuleList([self._conv(channels, features), second])

    def forward(self, volume, noise):
        x, skips = volume, []
        if self.blend:
            x = ((x - 0.12) * 6).clamp(max=1.3)
        x = self._to_channels(x)
        for first, second in self.encoder:
            y = second(torch.cat([x, first(x)], 1))
            joined = torch.cat([x, y], 1)
            skips.append(y)
            x = functional.max_pool3d(joined, 2)
        skips[-1] = joined
        y = torch.cat([x, self.before(x)], 1)
        noisy = torch.cat([y, noise], 1)
        y = y + torch.cat([branch(noisy) for branch in self.branches], 1)
        x = torch.cat([x, self.after(y)], 1)
        for (up, first, second), skip in zip(self.decoder, reversed(skips), strict=True):
            x = torch.cat([up(x), skip], 1)
            x = torch.cat([x, second(torch.cat([x, first(x)], 1))], 1)
        x = self.head(x)
        if not self.blend:
            return functional.relu(self._to_patches(x))
        opacity, lung = (self._to_patches(each) for each in x.chunk(2, 1))
        return volume - torch.sigmoid(opacity - 2) * functional.relu(volume - 0.12 - lung / 6)

    def _to_channels(self, x):
        batch, _, depth, height, width = x.shape
        p = self.patch
        x = x.reshape(batch, depth, height // p, p, width // p, p).permute(0, 3, 5, 1, 2, 4)
        return x.reshape(batch, p * p, depth, height // p, width // p)

    def _to_patches(self, x):
        batch, _, depth, height, width = x.shape
        p = self.patch
        x = x.reshape(batch, p, p, depth, height, width).permute(0, 3, 4, 1, 5, 2)
        return x.reshape(batch, 1, depth, height * p, width * p)


class Discriminator(nn.Module):
    """(B, 1, D, H, W) -> (B, 2) softmax; as published."""

    def __init__(self, filters=(32, 64, 128), dropout=0.5):
        super().__init__()
        sizes = (1, *filters)
        self.convs = nn.ModuleList(
            [nn.Conv3d(a, b, 3) for a, b in zip(sizes, filters, strict=False)]
        )
        self.dense = nn.Sequential(
            nn.Linear(filters[-1], 32), nn.ReLU(), nn.Dropout(dropout),
            nn.Linear(32, 16), nn.ReLU(), nn.Dropout(dropout),
            nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2), nn.Softmax(1),
        )  # fmt: skip

    def forward(self, volume):
        x = volume
        for conv in self.convs:
            x = functional.max_pool3d(functional.relu(conv(x), inplace=True), 2)
        return self.dense(x.mean((2, 3, 4)))


class PatchDiscriminator(nn.Module):
    """(B, 1, D, H, W) -> one logit a patch, spectrally normalised."""

    def __init__(self, filters: Sequence[int]):
        super().__init__()
        layers, sizes = [], (1, *filters)
        for inputs, features in zip(sizes, filters, strict=False):
            conv = nn.Conv3d(inputs, features, 4, 2, padding=1)
            layers += [nn.utils.parametrizations.spectral_norm(conv), nn.LeakyReLU(0.2)]
        head = nn.Conv3d(filters[-1], 1, 3, padding=1)
        self.layers = nn.Sequential(*layers, nn.utils.parametrizations.spectral_norm(head))

    def forward(self, volume):
        return self.layers(volume)


# --- the work that is timed

_PUBLISHED = {'filters': (8, 16, 32, 64), 'patch': 1}


def transunet_forward(batch_size: int, fields: dict, size: int) -> Callable[[], None]:
    network = TransUNet(size, **fields).eval()
    image = torch.rand(batch_size, 1, size, size)

    def run() -> None:
        with torch.inference_mode():
            network(image)

    return run


def transunet_step(
    batch_size: int, fields: dict, size: int, projection_dim: int, contrastive_weight: float
) -> Callable[[], None]:
    """The combined step: MSE + sensitivity-enhanced BCE, and where it has a weight the contrastive
    loss, clipped Adam, averaged weights."""
    network = TransUNet(size, **fields).train()
    features = network.class_token.shape[-1]
    project = nn.Sequential(
        nn.Linear(features, features), nn.ReLU(), nn.Linear(features, projection_dim)
    )
    parameters = [*network.parameters(), *project.parameters()]
    averaged = [each.detach().clone() for each in network.parameters()]
    optimizer = torch.optim.Adam(parameters, 3e-4)
    image = torch.rand(batch_size, 1, size, size)
    target = (torch.rand(batch_size, 1, size, size) > 0.9).float()
    label = torch.arange(batch_size) % 2
    same = label[:, None] == label
    itself = torch.eye(batch_size, dtype=torch.bool)

    def contrastive(tokens: torch.Tensor) -> torch.Tensor:
        standardised = (tokens - tokens.mean(0)) / tokens.std(0, correction=0).clamp(min=1e-4)
        unit = functional.normalize(project(standardised), dim=1)
        scores = unit @ unit.T / 0.1
        positive = scores.masked_fill(~same | itself, -torch.inf).logsumexp(1)
        negative = scores.masked_fill(same, -torch.inf).logsumexp(1)
        return functional.softplus(negative - positive).mean()

    def run() -> None:
        logits, tokens = network(image)
        probability = torch.sigmoid(logits)
        mse = functional.mse_loss(probability, target)
        bce = functional.binary_cross_entropy_with_logits(logits, target, reduction='none')
        sensitivity = (bce * (1 + 2 * (1 - probability) * target)).mean()
        loss = mse + sensitivity
        if contrastive_weight:
            loss = loss + contrastive_weight * contrastive(tokens)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(averaged, list(network.parameters()), 0.001)

    return run


def gan_forward(batch_size: int, shape: tuple[int, int, int], fields: dict) -> Callable[[], None]:
    generator = Generator(**fields).eval()
    volume, noise = _volume(batch_size, shape), _noise(batch_size, shape, fields)

    def run() -> None:
        with torch.inference_mode():
            generator(volume, noise)

    return run


def gan_iteration(batch_size: int, shape: tuple[int, int, int]) -> Callable[[], None]:
    """The published iteration: reconstruction, discriminator, adversarial; the corrupting noise
    stands ready."""
    generator, discriminator = Generator().train(), Discriminator().train()
    generator_optimizer = torch.optim.Adam(generator.parameters(), 5e-5)
    discriminator_optimizer = torch.optim.Adam(discriminator.parameters(), 1e-3)
    healthy, covid = _volume(batch_size, shape), _volume(batch_size, shape)
    corrupted = (healthy + 0.1 * _volume(batch_size, shape)).clamp(0, 1)

    def one_hot(judged: torch.Tensor, kind: int) -> torch.Tensor:
        return functional.mse_loss(judged, torch.eye(2)[kind].expand_as(judged))

    def update(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def run() -> None:
        restored = generator(corrupted, _noise(batch_size, shape, _PUBLISHED))
        update(generator_optimizer, functional.mse_loss(restored, healthy))
        with torch.no_grad():
            fake = generator(covid, _noise(batch_size, shape, _PUBLISHED))
        judged = discriminator(torch.cat([healthy, fake]))
        real_loss = one_hot(judged[:batch_size], 1)
        fake_loss = one_hot(judged[batch_size:], 0)
        update(discriminator_optimizer, (real_loss + fake_loss) / 2)
        discriminator.requires_grad_(False)
        fake = generator(covid, _noise(batch_size, shape, _PUBLISHED))
        update(generator_optimizer, one_hot(discriminator(fake), 1))
        discriminator.requires_grad_(True)

    return run


def default_gan_step(
    batch_size: int,
    shape: tuple[int, int, int],
    fields: dict,
    filters: Sequence[int],
    adversarial: bool,
) -> Callable[[], None]:
    """The default recipe's step: reconstruction and, where adversarial, the pull of a patch
    discriminator and its own update; painted opacities stand ready, lungs fill the volume."""
    generator, discriminator = Generator(**fields).train(), PatchDiscriminator(filters).train()
    averaged = [each.detach().clone() for each in generator.parameters()]
    generator_optimizer = torch.optim.Adam(generator.parameters(), 1e-3)
    discriminator_optimizer = torch.optim.Adam(discriminator.parameters(), 2e-4, (0.5, 0.999))
    healthy, covid = _volume(batch_size, shape), _volume(batch_size, shape)
    corrupted = (healthy + 0.1 * _volume(batch_size, shape)).clamp(0, 1)

    def update(network: nn.Module, optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()

    def run() -> None:
        volumes = torch.cat([corrupted, covid]) if adversarial else corrupted
        generated = generator(volumes, _noise(len(volumes), shape, fields))
        axes = (1, 2, 3, 4)
        error = (generated[:batch_size] - healthy).square().mean(axes)
        loss = (error / ((corrupted - healthy).square().mean(axes) + 1e-4)).mean()
        if adversarial:
            fake = generated[batch_size:]
            discriminator.requires_grad_(False)
            loss = loss + (discriminator(fake) - 1).square().mean()
            loss = loss + (6 * (fake - covid) * (covid < 0.16)).square().mean()
        update(generator, generator_optimizer, loss)
        if adversarial:
            discriminator.requires_grad_(True)
            on_real, on_fake = discriminator(torch.cat([healthy, fake.detach()])).chunk(2)
            loss = ((on_real - 1).square().mean() + on_fake.square().mean()) / 2
            update(discriminator, discriminator_optimizer, loss)
        with torch.no_grad():
            torch._foreach_lerp_(averaged, list(generator.parameters()), 0.01)

    return run


def _volume(batch_size: int, shape: tuple[int, int, int]) -> torch.Tensor:
    return torch.rand(batch_size, 1, *shape)


def _noise(batch_size: int, shape: tuple[int, int, int], fields: dict) -> torch.Tensor:
    step = 2 ** len(fields['filters'])
    steps = (step, step * fields['patch'], step * fields['patch'])
    sizes = (size // each for size, each in zip(shape, steps, strict=True))
    return torch.rand(batch_size, 10, *sizes) - 0.5

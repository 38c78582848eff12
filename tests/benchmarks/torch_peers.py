"""The networks in PyTorch, as one would write them there: what ours are timed against.

Sizes and layers as METHOD.md gives them; weights are PyTorch's own, since only time is compared.
Batches are (B, C, ...) float32 tensors.
"""

from collections.abc import Callable

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


def _leaky(conv: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return functional.leaky_relu(conv(x), 0.3, inplace=True)


class Generator(nn.Module):
    """(B, 1, D, H, W) and noise (B, 10, D/16, H/16, W/16) -> (B, 1, D, H, W); as published."""

    def __init__(self, filters=(8, 16, 32, 64), bottleneck=128):
        super().__init__()
        self.encoder, self.decoder = nn.ModuleList(), nn.ModuleList()
        channels, skips = 1, []
        for features in filters:
            self.encoder.append(self._pair(channels, features))
            channels += features
            skips.append(features)
        skips[-1] = channels
        self.before = nn.Conv3d(channels, bottleneck, 3, padding=1)
        joined = channels + bottleneck
        self.branches = nn.ModuleList(
            [nn.Conv3d(joined + 10, joined // 3, size, padding=size // 2) for size in (1, 3, 5)]
        )
        self.after = nn.Conv3d(joined, bottleneck, 3, padding=1)
        channels = joined
        for features, skip in reversed(list(zip(filters, skips, strict=True))):
            up = nn.ConvTranspose3d(channels, 4 * features, 2, 2)
            channels = 4 * features + skip
            self.decoder.append(nn.ModuleList([up, *self._pair(channels, features)]))
            channels += features
        self.head = nn.Conv3d(channels, 1, 1)

    @staticmethod
    def _pair(channels: int, features: int) -> nn.ModuleList:
        first = nn.Conv3d(channels, features, 3, padding=1)
        return nn.ModuleList([first, nn.Conv3d(channels + features, features, 3, padding=1)])

    def forward(self, volume, noise):
        x, skips = volume, []
        for first, second in self.encoder:
            y = _leaky(second, torch.cat([x, _leaky(first, x)], 1))
            joined = torch.cat([x, y], 1)
            skips.append(y)
            x = functional.max_pool3d(joined, 2)
        skips[-1] = joined
        y = torch.cat([x, _leaky(self.before, x)], 1)
        noisy = torch.cat([y, noise], 1)
        y = y + torch.cat([_leaky(branch, noisy) for branch in self.branches], 1)
        x = torch.cat([x, _leaky(self.after, y)], 1)
        for (up, first, second), skip in zip(self.decoder, reversed(skips), strict=True):
            x = torch.cat([up(x), skip], 1)
            x = torch.cat([x, _leaky(second, torch.cat([x, _leaky(first, x)], 1))], 1)
        return functional.relu(self.head(x))


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


# --- the work that is timed


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
    """The combined step: contrastive + MSE + sensitivity-enhanced BCE, clipped Adam."""
    network = TransUNet(size, **fields).train()
    features = network.class_token.shape[-1]
    project = nn.Sequential(
        nn.Linear(features, features), nn.ReLU(), nn.Linear(features, projection_dim)
    )
    parameters = [*network.parameters(), *project.parameters()]
    optimizer = torch.optim.Adam(parameters, 3e-4)
    image = torch.rand(batch_size, 1, size, size)
    target = (torch.rand(batch_size, 1, size, size) > 0.9).float()
    label = torch.arange(batch_size) % 2
    same = label[:, None] == label
    itself = torch.eye(batch_size, dtype=torch.bool)

    def run() -> None:
        logits, tokens = network(image)
        standardised = (tokens - tokens.mean(0)) / tokens.std(0, correction=0).clamp(min=1e-4)
        unit = functional.normalize(project(standardised), dim=1)
        scores = unit @ unit.T / 0.1
        positive = scores.masked_fill(~same | itself, -torch.inf).logsumexp(1)
        negative = scores.masked_fill(same, -torch.inf).logsumexp(1)
        contrastive = functional.softplus(negative - positive).mean()
        probability = torch.sigmoid(logits)
        mse = functional.mse_loss(probability, target)
        bce = functional.binary_cross_entropy_with_logits(logits, target, reduction='none')
        sensitivity = (bce * (1 + 2 * (1 - probability) * target)).mean()
        loss = contrastive_weight * contrastive + mse + sensitivity
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    return run


def gan_forward(batch_size: int, shape: tuple[int, int, int]) -> Callable[[], None]:
    generator = Generator().eval()
    volume, noise = _volume(batch_size, shape), _noise(batch_size, shape)

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
        restored = generator(corrupted, _noise(batch_size, shape))
        update(generator_optimizer, functional.mse_loss(restored, healthy))
        with torch.no_grad():
            fake = generator(covid, _noise(batch_size, shape))
        judged = discriminator(torch.cat([healthy, fake]))
        real_loss = one_hot(judged[:batch_size], 1)
        fake_loss = one_hot(judged[batch_size:], 0)
        update(discriminator_optimizer, (real_loss + fake_loss) / 2)
        discriminator.requires_grad_(False)
        fake = generator(covid, _noise(batch_size, shape))
        update(generator_optimizer, one_hot(discriminator(fake), 1))
        discriminator.requires_grad_(True)

    return run


def _volume(batch_size: int, shape: tuple[int, int, int]) -> torch.Tensor:
    return torch.rand(batch_size, 1, *shape)


def _noise(batch_size: int, shape: tuple[int, int, int]) -> torch.Tensor:
    return torch.rand(batch_size, 10, *(size // 16 for size in shape)) - 0.5

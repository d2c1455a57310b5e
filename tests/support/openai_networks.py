"""The UNet and the classifier of improved- and guided-diffusion, written from their description, to compare with.

Small and slow on purpose: one function a formula. Names of parameters are those of OpenAI's checkpoints.
"""

import math

import torch
from torch import nn


def group_norm(channels):
    return nn.GroupNorm(32, channels)


def embed(t, width):
    """cos and sin of t at `width / 2` frequencies from 1 down to nearly 1/10000, in float32 as there."""
    half = width // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
    angles = t[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class Residual(nn.Module):
    def __init__(self, channels, out, time, scale_shift, resample=None):
        super().__init__()
        self.scale_shift, self.resample = scale_shift, resample
        self.in_layers = nn.Sequential(group_norm(channels), nn.SiLU(), nn.Conv2d(channels, out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(time, 2 * out if scale_shift else out))
        self.out_layers = nn.Sequential(group_norm(out), nn.SiLU(), nn.Identity(), nn.Conv2d(out, out, 3, padding=1))
        self.skip_connection = nn.Conv2d(channels, out, 1) if out != channels else nn.Identity()

    def resampled(self, x):
        if self.resample == "up":
            return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        if self.resample == "down":
            return nn.functional.avg_pool2d(x, 2)
        return x

    def forward(self, x, emb):
        h = self.in_layers[2](self.resampled(self.in_layers[1](self.in_layers[0](x))))
        e = self.emb_layers(emb)[:, :, None, None]
        if self.scale_shift:
            scale, shift = e.chunk(2, dim=1)
            h = self.out_layers[0](h) * (1 + scale) + shift
        else:
            h = self.out_layers[0](h + e)
        return self.skip_connection(self.resampled(x)) + self.out_layers[3](self.out_layers[1](h))


def attend(qkv, heads, legacy):
    """[N, 3C, L] -> [N, C, L]: head by head, with the rows of each where the layout has them."""
    width = qkv.shape[1] // 3
    size = width // heads
    outputs = []
    for head in range(heads):
        if legacy:
            q, k, v = qkv[:, 3 * size * head : 3 * size * (head + 1)].split(size, dim=1)
        else:
            q, k, v = (qkv[:, part * width + size * head : part * width + size * (head + 1)] for part in range(3))
        weights = (q.transpose(1, 2) @ k / math.sqrt(size)).softmax(dim=-1)  # [N, L, L]
        outputs.append((weights @ v.transpose(1, 2)).transpose(1, 2))
    return torch.cat(outputs, dim=1)


class Attention(nn.Module):
    def __init__(self, channels, heads, head_channels, legacy):
        super().__init__()
        self.heads = heads if head_channels == -1 else channels // head_channels
        self.legacy = legacy
        self.norm, self.qkv = group_norm(channels), nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x, emb):
        flat = x.flatten(2)
        return (flat + self.proj_out(attend(self.qkv(self.norm(flat)), self.heads, self.legacy))).reshape(x.shape)


class Down(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x, emb):
        return self.op(x)


class Up(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x, emb):
        return self.conv(x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))


class First(nn.Conv2d):
    def forward(self, x, emb):
        return super().forward(x)


class Network(nn.Module):
    """What UNet and classifier share: the encoder and the middle.

    Args:
        levels: factors of `width`, one a level.
        attention: the levels that attend.
    """

    def __init__(
        self,
        *,
        width,
        levels,
        layers,
        attention,
        in_channels=3,
        heads=4,
        head_channels=-1,
        legacy=True,
        resnet=False,
        scale_shift=True,
        classes=None,
    ):
        super().__init__()
        self.width, time = width, 4 * width
        self.time_embed = nn.Sequential(nn.Linear(width, time), nn.SiLU(), nn.Linear(time, time))
        if classes:
            self.label_emb = nn.Embedding(classes, time)
        self.widths = [int(width * factor) for factor in levels]

        def residual(channels, out, resample=None):
            return Residual(channels, out, time, scale_shift, resample)

        def attending(channels):
            return Attention(channels, heads, head_channels, legacy)

        channels = self.widths[0]
        self.input_blocks = nn.ModuleList([nn.ModuleList([First(in_channels, channels, 3, padding=1)])])
        skips = [channels]
        for level, out in enumerate(self.widths):
            for _ in range(layers):
                block = [residual(channels, out)] + ([attending(out)] if level in attention else [])
                self.input_blocks.append(nn.ModuleList(block))
                channels = out
                skips.append(channels)
            if level < len(self.widths) - 1:
                down = residual(channels, channels, "down") if resnet else Down(channels)
                self.input_blocks.append(nn.ModuleList([down]))
                skips.append(channels)
        self.middle_block = nn.ModuleList(
            [residual(channels, channels), attending(channels), residual(channels, channels)]
        )
        self.built = channels, skips, residual, attending, resnet

    def encode(self, x, t, y):
        emb = self.time_embed(embed(t, self.width).to(x.dtype))
        if y is not None:
            emb = emb + self.label_emb(y)
        skips = []
        for block in self.input_blocks:
            for layer in block:
                x = layer(x, emb)
            skips.append(x)
        for layer in self.middle_block:
            x = layer(x, emb)
        return x, skips, emb


class UNet(Network):
    def __init__(self, *, out_channels=6, layers, attention, t_scale=1.0, **options):
        super().__init__(layers=layers, attention=attention, **options)
        self.t_scale = t_scale
        channels, skips, residual, attending, resnet = self.__dict__.pop("built")
        self.output_blocks = nn.ModuleList()
        for level, out in reversed(list(enumerate(self.widths))):
            for layer in range(layers + 1):
                block = [residual(channels + skips.pop(), out)] + ([attending(out)] if level in attention else [])
                channels = out
                if level and layer == layers:
                    block.append(residual(channels, channels, "up") if resnet else Up(channels))
                self.output_blocks.append(nn.ModuleList(block))
        self.out = nn.Sequential(group_norm(channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1))

    def forward(self, x, t, y=None):
        h, skips, emb = self.encode(x, t.float() * self.t_scale, y)
        for block in self.output_blocks:
            h = torch.cat([h, skips.pop()], dim=1)
            for layer in block:
                h = layer(h, emb)
        return self.out(h)


class Pool(nn.Module):
    def __init__(self, positions, channels, classes, head_channels):
        super().__init__()
        self.heads = channels // head_channels
        self.positional_embedding = nn.Parameter(torch.randn(channels, positions + 1) / channels**0.5)
        self.qkv_proj, self.c_proj = nn.Conv1d(channels, 3 * channels, 1), nn.Conv1d(channels, classes, 1)

    def forward(self, x):
        x = x.flatten(2)
        x = torch.cat([x.mean(dim=2, keepdim=True), x], dim=2) + self.positional_embedding
        return self.c_proj(attend(self.qkv_proj(x), self.heads, legacy=False))[:, :, 0]


class Classifier(Network):
    def __init__(self, *, image_size, classes, head_channels=64, **options):
        super().__init__(head_channels=head_channels, resnet=True, **options)
        channels, *_ = self.__dict__.pop("built")
        positions = (image_size // 2 ** (len(self.widths) - 1)) ** 2
        self.out = nn.Sequential(group_norm(channels), nn.SiLU(), Pool(positions, channels, classes, head_channels))

    def forward(self, x, t):
        return self.out(self.encode(x, t, None)[0])


def randomized(network, seed=0):
    """The network with random weights of a size that keeps activations near 1, so that no layer is silent."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in network.named_parameters():
            noise = torch.randn(value.shape, generator=generator, dtype=value.dtype)
            if value.ndim > 1:
                value.copy_(noise / max(1, value[0].numel()) ** 0.5)
            else:
                value.copy_((1 if "weight" in name else 0) + 0.1 * noise)
    return network.eval()

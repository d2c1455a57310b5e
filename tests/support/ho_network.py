"""Ho et al.'s network in numpy, and TensorFlow's checkpoint format, from their descriptions, to compare with."""

import struct

import numpy as np

from ddpm_hf.models.converters.tensor_bundle import MAGIC, crc32c, masked


def variables(channels=32, factors=(1, 2), layers=1, attends=(False, True), out=3, seed=0):
    """Random weights by TensorFlow's names."""
    rng, made = np.random.default_rng(seed), {}

    def dense(name, *shape):
        made[f"model/{name}/W"] = (rng.normal(size=shape) / np.sqrt(np.prod(shape[:-1]))).astype(np.float32)
        made[f"model/{name}/b"] = (0.1 * rng.normal(size=shape[-1])).astype(np.float32)

    def norm(name, width):
        made[f"model/{name}/gamma"] = (1 + 0.1 * rng.normal(size=width)).astype(np.float32)
        made[f"model/{name}/beta"] = (0.1 * rng.normal(size=width)).astype(np.float32)

    def block(name, width, new):
        norm(f"{name}/norm1", width)
        dense(f"{name}/conv1", 3, 3, width, new)
        dense(f"{name}/temb_proj", 4 * channels, new)
        norm(f"{name}/norm2", new)
        dense(f"{name}/conv2", 3, 3, new, new)
        if width != new:
            dense(f"{name}/nin_shortcut", width, new)

    def attention(name, width):
        norm(f"{name}/norm", width)
        for part in ("q", "k", "v", "proj_out"):
            dense(f"{name}/{part}", width, width)

    dense("temb/dense0", channels, 4 * channels)
    dense("temb/dense1", 4 * channels, 4 * channels)
    dense("conv_in", 3, 3, 3, channels)
    width, skips = channels, [channels]
    for level, factor in enumerate(factors):
        for layer in range(layers):
            block(f"down_{level}/block_{layer}", width, channels * factor)
            width = channels * factor
            if attends[level]:
                attention(f"down_{level}/attn_{layer}", width)
            skips.append(width)
        if level < len(factors) - 1:
            dense(f"down_{level}/downsample/conv", 3, 3, width, width)
            skips.append(width)
    block("mid/block_1", width, width)
    attention("mid/attn_1", width)
    block("mid/block_2", width, width)
    for level in reversed(range(len(factors))):
        for layer in range(layers + 1):
            block(f"up_{level}/block_{layer}", width + skips.pop(), channels * factors[level])
            width = channels * factors[level]
            if attends[level]:
                attention(f"up_{level}/attn_{layer}", width)
        if level:
            dense(f"up_{level}/upsample/conv", 3, 3, width, width)
    norm("norm_out", width)
    dense("conv_out", 3, 3, width, out)
    return made


def forward(weights, x, t, layers=1):
    """The network's output for x [N, H, W, C] and t [N], in float64 but for the sinusoids, as there."""
    w = {name.removeprefix("model/"): value.astype(np.float64) for name, value in weights.items()}

    def dense(name, value):
        return value @ w[f"{name}/W"] + w[f"{name}/b"]

    def conv(name, value, stride=1):
        kernel, (height, width) = w[f"{name}/W"], value.shape[1:3]
        before = 1 if stride == 1 else 0  # "SAME" pads evenly, or on the right and at the bottom
        value = np.pad(value, ((0, 0), (before, 1), (before, 1), (0, 0)))
        taps = (
            value[:, i : i + height : stride, j : j + width : stride] @ kernel[i, j]
            for i in range(3)
            for j in range(3)
        )
        return sum(taps) + w[f"{name}/b"]

    def norm(name, value):
        groups = value.reshape(len(value), -1, 32, value.shape[-1] // 32)
        mean, variance = groups.mean(axis=(1, 3), keepdims=True), groups.var(axis=(1, 3), keepdims=True)
        scaled = ((groups - mean) / np.sqrt(variance + 1e-6)).reshape(value.shape)
        return scaled * w[f"{name}/gamma"] + w[f"{name}/beta"]

    def silu(value):
        return value / (1 + np.exp(-value))

    def block(name, value):
        h = conv(f"{name}/conv1", silu(norm(f"{name}/norm1", value)))
        h = h + dense(f"{name}/temb_proj", silu(temb))[:, None, None]
        h = conv(f"{name}/conv2", silu(norm(f"{name}/norm2", h)))
        return h + (dense(f"{name}/nin_shortcut", value) if f"{name}/nin_shortcut/W" in w else value)

    def attention(name, value):
        if f"{name}/q/W" not in w:
            return value
        flat = norm(f"{name}/norm", value).reshape(len(value), -1, value.shape[-1])
        q, k, v = (dense(f"{name}/{part}", flat) for part in "qkv")
        scores = q @ k.transpose(0, 2, 1) / np.sqrt(value.shape[-1])
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        mixed = (weights / weights.sum(axis=-1, keepdims=True)) @ v
        return value + dense(f"{name}/proj_out", mixed).reshape(value.shape)

    half = w["temb/dense0/W"].shape[0] // 2
    exponents = np.arange(half, dtype=np.float32) * np.float32(-np.log(10000.0)) / np.float32(half - 1)
    angles = t[:, None].astype(np.float32) * np.exp(exponents)
    temb = np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float64)
    temb = dense("temb/dense1", silu(dense("temb/dense0", temb)))
    levels = 1 + max(int(name[5]) for name in w if name.startswith("down_"))
    hs = [conv("conv_in", x)]
    for level in range(levels):
        for layer in range(layers):
            hs.append(attention(f"down_{level}/attn_{layer}", block(f"down_{level}/block_{layer}", hs[-1])))
        if level < levels - 1:
            hs.append(conv(f"down_{level}/downsample/conv", hs[-1], stride=2))
    h = block("mid/block_2", attention("mid/attn_1", block("mid/block_1", hs[-1])))
    for level in reversed(range(levels)):
        for layer in range(layers + 1):
            h = block(f"up_{level}/block_{layer}", np.concatenate([h, hs.pop()], axis=-1))
            h = attention(f"up_{level}/attn_{layer}", h)
        if level:
            h = conv(f"up_{level}/upsample/conv", h.repeat(2, axis=1).repeat(2, axis=2))
    return conv("conv_out", silu(norm("norm_out", h)))


# TensorFlow's format


def varint(value):
    groups = []
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*groups, value])


def field(number, value):
    """A field of a protocol buffer: a number, or bytes."""
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    return varint(number << 3) + varint(value)


def block(pairs, interval):
    """A block of sorted (key, value) pairs, with its type and checksum."""
    content, restarts, last = b"", [], b""
    for index, (key, value) in enumerate(pairs):
        shared = 0
        if index % interval == 0:
            restarts.append(len(content))
        else:
            while shared < min(len(key), len(last)) and key[shared] == last[shared]:
                shared += 1
        content += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
        last = key
    restarts = restarts or [0]
    content += struct.pack(f"<{len(restarts) + 1}I", *restarts, len(restarts)) + b"\0"
    return content[:-1], content + struct.pack("<I", masked(crc32c(np.frombuffer(content, np.uint8))))


def write_bundle(prefix, arrays, shards=1, block_size=512):
    """Write arrays as TensorFlow's checkpoint `prefix`, over several data files and blocks of the index."""
    types = {"float32": 1, "float64": 2, "int32": 3, "int64": 9, "float16": 19}
    data, pairs = [b""] * shards, [(b"", field(1, shards) + field(3, field(1, 1)))]
    for index, (name, array) in enumerate(sorted(arrays.items(), key=lambda item: item[0].encode())):
        shard, raw = index % shards, np.ascontiguousarray(array).tobytes()
        shape = b"".join(field(2, field(1, side)) for side in array.shape)
        entry = field(1, types[str(array.dtype)]) + field(2, shape)
        entry += (field(3, shard) if shard else b"") + field(4, len(data[shard])) + field(5, len(raw))
        checksum = masked(crc32c(np.frombuffer(raw, np.uint8)))
        pairs.append((name.encode(), entry + varint(6 << 3 | 5) + struct.pack("<I", checksum)))
        data[shard] += raw
    index, handles = b"", []
    while pairs:
        size, taken = 0, []
        while pairs and size < block_size:
            taken.append(pairs.pop(0))
            size += sum(map(len, taken[-1]))
        inner, whole = block(taken, 16)
        handles.append((taken[-1][0], varint(len(index)) + varint(len(inner))))
        index += whole
    footer = b""
    for pairs_of, interval in (([], 1), (handles, 1)):
        inner, whole = block(pairs_of, interval)
        footer += varint(len(index)) + varint(len(inner))
        index += whole
    index += footer.ljust(40, b"\0") + struct.pack("<Q", MAGIC)
    prefix.with_name(f"{prefix.name}.index").write_bytes(index)
    for shard, raw in enumerate(data):
        prefix.with_name(f"{prefix.name}.data-{shard:05d}-of-{shards:05d}").write_bytes(raw)

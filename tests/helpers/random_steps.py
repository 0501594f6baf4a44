"""Steps of random networks over (batch, units) tensors.

A step is called with the network, its random numbers, a name for its weights, the tensor to work on, and all tensors
that are still in use.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

__all__ = ["FLAT", "factor"]


def linear(net, rng, name, h, live):
    n = rng.choice([6, 8, 12, 24])
    return torch.tanh(F.linear(h, net.weight(name, n, h.shape[1])))


def scaled(net, rng, name, h, live):
    return h * net.weight(name, h.shape[1])


def added(net, rng, name, h, live):
    others = [t for t in live if t.shape == h.shape]
    return h + rng.choice(others)


def joined(net, rng, name, h, live):
    other = rng.choice(live)
    return torch.cat([h, other], 1) if h.shape[1] + other.shape[1] <= 48 else torch.relu(h)


def sliced(net, rng, name, h, live):
    at = rng.randrange(h.shape[1] // 2 + 1)
    return h[:, at : at + max(2, h.shape[1] // 2)]


def halves(net, rng, name, h, live):
    if h.shape[1] % 2:
        return h.sigmoid()
    a, b = h.chunk(2, 1)
    return a * torch.sigmoid(b)


def factor(rng, n):
    """Return a divisor."""
    return rng.choice([f for f in range(1, n + 1) if n % f == 0])


def blocks(net, rng, name, h, live):
    f = factor(rng, h.shape[1])
    cube = h.view(len(h), f, -1) if h.is_contiguous() else h.reshape(len(h), f, -1)
    if rng.random() < 0.5:
        cube = cube * net.weight(name, cube.shape[2])
    elif rng.random() < 0.5:
        cube = cube + net.weight(name, cube.shape[1])[:, None]
    if rng.random() < 0.5:
        cube = cube.softmax(rng.choice([1, 2]))
    return cube.flatten(1)


def turned(net, rng, name, h, live):
    f = factor(rng, h.shape[1])
    return h.reshape(len(h), f, -1).transpose(1, 2).flatten(1)


def mixed(net, rng, name, h, live):
    f = factor(rng, h.shape[1])
    cube = h.reshape(len(h), f, -1)
    return torch.tanh(cube @ net.weight(name, cube.shape[2], 4)).flatten(1)


def pooled(net, rng, name, h, live):
    f = factor(rng, h.shape[1])
    cube = h.reshape(len(h), f, -1)
    other = cube.mean(1) if rng.random() < 0.5 else cube.amax(2)
    return other if other.shape[1] > 1 else torch.exp(-h * h)


def written(net, rng, name, h, live):
    out = torch.zeros_like(h)
    at = rng.randrange(1, h.shape[1]) if h.shape[1] > 1 else 1
    out[:, :at] = h[:, :at]
    out[:, at:].copy_(h[:, at:].relu())
    return out


def in_place(net, rng, name, h, live):
    h = h.clone()
    half = h[:, : h.shape[1] // 2 + 1]
    half.mul_(2.0)
    return h.relu_()


def grouped(net, rng, name, h, live):
    f = factor(rng, h.shape[1])
    return torch.tanh(F.conv1d(h[:, :, None], net.weight(name, 2 * f, h.shape[1] // f, 1), groups=f)[:, :, 0])


def back(net, rng, name, h, live):
    f = factor(rng, h.shape[1])
    weight = net.weight(name, h.shape[1], 3, 1)
    return torch.tanh(F.conv_transpose1d(h[:, :, None], weight, groups=f)[:, :, 0])


def repeated(net, rng, name, h, live):
    return h.repeat(1, 2) if h.shape[1] <= 24 else h.abs()


def normed(net, rng, name, h, live):
    f = factor(rng, h.shape[1])
    if h.shape[1] == 1:
        return h.tanh()
    if h.shape[1] == f:
        return F.layer_norm(h, (f,), net.weight(name, f))
    return F.group_norm(h, f, net.weight(name, h.shape[1]))


def again(net, rng, name, h, live):
    square = net.weight(f"square{h.shape[1]}", h.shape[1], h.shape[1])
    return torch.tanh(F.linear(h, square if rng.random() < 0.5 else square.t()))


def running(net, rng, name, h, live):
    return h.cumsum(1) if rng.random() < 0.3 else F.pad(h, (1, 1))[:, 1:-1]


def outer(net, rng, name, h, live):
    other = rng.choice(live)
    return (h[:, :, None] * other[:, None, :]).flatten(1) if h.shape[1] * other.shape[1] <= 64 else h.sin()


def ranked(net, rng, name, h, live):
    """Positions along the units: taken where they point, returned as numbers, or counted."""
    way = rng.randrange(6)
    if way == 0:
        return h.gather(1, h.argsort(1)[:, : max(2, h.shape[1] // 2)])
    if way == 1:
        return torch.tanh(net.weight(name, h.shape[1], 6)[h.argmax(1)])
    if way == 2:
        return h * h.argmax(1, keepdim=True).to(h)
    if way == 3:
        values, places = h.softmax(1).topk(2, 1)
        return torch.zeros_like(h).scatter(1, places, values) + h
    if way == 4:
        return h * torch.relu(h).argmax(1, keepdim=True) / h.shape[1]
    return h.sort(1)[0] if rng.random() < 0.5 else h * (h == h.amax(1, keepdim=True))


def looked_up(net, rng, name, h, live):
    """Values turned into places of a table."""
    places = (h.sigmoid() * 8).long().clamp(0, 7)
    table = net.weight(name, 8, 3)
    way = rng.randrange(4)
    if way == 0:
        return table[places].mean(2)
    if way == 1:
        return table[:, 0][places] * h
    if way == 2:
        return h.index_put((h > 0,), torch.zeros((), dtype=h.dtype))
    return table[places, places % 3] + h


def statistics(net, rng, name, h, live):
    way = rng.randrange(5)
    if way == 0:
        variance, mean = torch.var_mean(h, 1, keepdim=True)
        return (h - mean) / (variance + 1).sqrt()
    if way == 1:
        return torch.logaddexp(h, net.weight(name, h.shape[1]))
    if way == 2:
        low, high = h.aminmax(dim=1, keepdim=True)
        return (h - low) / (high - low + 1)
    if way == 3:
        return h - h.median(1, keepdim=True)[0]
    return torch.cdist(h[:, None], net.weight(name, 4, h.shape[1]).expand(len(h), -1, -1))[:, 0]


def shuffled(net, rng, name, h, live):
    f = factor(rng, h.shape[1])
    way = rng.randrange(4)
    if way == 0:
        return F.channel_shuffle(h[:, :, None, None], f)[:, :, 0, 0]
    if way == 1 and h.shape[1] % 4 == 0 and h.shape[1] > 4:
        return F.pixel_shuffle(h[:, :, None, None], 2).flatten(2).mean(2)
    if way == 2:
        return F.unfold(h.reshape(len(h), f, -1, 1), (1, 1)).flatten(1)
    return h.roll(1, 1) if rng.random() < 0.3 else h.diag_embed().sum(2)


def bilinear(net, rng, name, h, live):
    other = rng.choice(live)
    if h.shape[1] * other.shape[1] > 200:
        return h.erf()
    return torch.tanh(F.bilinear(h, other, net.weight(name, 4, h.shape[1], other.shape[1])))


def attended(net, rng, name, h, live):
    """Heads or positions made of units."""
    f = factor(rng, h.shape[1])
    cube = h.reshape(len(h), 1, f, -1)
    if rng.random() < 0.5:
        cube = cube.transpose(1, 2)
    value = cube * net.weight(name, cube.shape[3])
    return F.scaled_dot_product_attention(cube, cube * 0.5, value).flatten(1)


def outside(net, rng, name, h, live):
    """Values that leave torch, other views of the memory, positions past the end of what is read."""
    way = rng.randrange(5)
    if way == 0:
        return h * h.tolist()[0][0]
    if way == 1:
        return h * float(h.numpy()[0].mean())
    if way == 2:
        flat = h.contiguous()
        return flat.as_strided((len(h), h.shape[1] // 2 + 1), (h.shape[1], 1))
    if way == 3:
        # As many for every batch: that no pass reads others is the word of those who trace with unread="ignore".
        return h + net.weight(name, 64, h.shape[1])[:5].mean(0)
    return net.weight(name, 2, h.shape[1])[int(h.square().sum() > len(h))] * h


def unique(net, rng, name, h, live):
    return (
        h * torch.unique((h * 2).long(), return_inverse=True)[1].flatten()[0]
        if rng.random() < 0.5
        else h.sign()
    )


FLAT = [
    linear, linear, linear, linear, linear, linear, scaled, added, added, joined, sliced, halves, blocks, turned, mixed,
    pooled, written, in_place, grouped, back, repeated, normed, again, running, outer, ranked, looked_up, statistics,
    shuffled, bilinear, attended, outside, unique,
]  # fmt: skip

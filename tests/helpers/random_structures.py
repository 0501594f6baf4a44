"""Steps of random networks with structure: images, attention, mixtures, recurrence, shared and complex weights."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from helpers.random_steps import factor

__all__ = ["STRUCTURES"]


def convolved(net, rng, name, h, live):
    """Channels by places; convolved in groups, normalized in one of many ways, pooled.

    Nothing is normalized by itself alone: it would be zero but for rounding, which later steps can make large.
    """
    f = factor(rng, h.shape[1])
    places = h.shape[1] // f
    groups = factor(rng, f)
    width = groups * rng.choice([2, 3])
    kernel = rng.choice([1, 3])
    x = h.reshape(len(h), f, 1, places)
    x = F.conv2d(x, net.weight(name, width, f // groups, 1, kernel), padding=(0, kernel // 2), groups=groups)
    way = rng.randrange(6)
    if way == 0:
        x = F.batch_norm(
            x, *net.running(name, width), net.weight(f"{name}w", width), net.weight(f"{name}b", width)
        )
    elif way == 1:
        x = F.layer_norm(x, x.shape[1:], net.weight(f"{name}w", *x.shape[1:]))
    elif way == 2:
        x = F.group_norm(x, factor(rng, width) if places > 1 else 1, net.weight(f"{name}w", width))
    elif way == 3 and places > 1:
        x = F.instance_norm(x, weight=net.weight(f"{name}w", width))
    elif way == 4:
        x = F.layer_norm(x.movedim(1, -1), (width,), net.weight(f"{name}w", width)).movedim(-1, 1)
    x = rng.choice([F.relu, F.silu, torch.sin])(x)
    way = rng.randrange(4)
    if way == 0:
        return x.mean((2, 3))
    if way == 1:
        return F.adaptive_avg_pool2d(x, (1, 2)).flatten(1)
    if way == 2:
        return x.transpose(1, 3).flatten(1) if x[0].numel() <= 48 else x.amax((2, 3))
    return x.flatten(1) if x[0].numel() <= 48 else x.logsumexp((2, 3))


def heads(net, rng, name, h, live):
    """Attention over positions, with heads, grouped keys, rotary positions, masks, fused or written out."""
    count, size, length = rng.choice([1, 2, 4]), rng.choice([2, 4]), 3
    keys = rng.choice([k for k in (1, 2, 4) if count % k == 0])
    tokens = h[:, None] * net.weight(f"{name}p", length, 1) + net.weight(f"{name}t", length, h.shape[1])
    fused = net.weight(name, (count + 2 * keys) * size, h.shape[1])
    mixed = F.linear(tokens, fused)
    if keys == count and rng.random() < 0.5:
        q, k, v = mixed.view(len(h), length, 3, count, size).permute(2, 0, 3, 1, 4)
    else:
        parts = mixed.split([count * size, keys * size, keys * size], -1)
        q, k, v = (t.unflatten(-1, (-1, size)).transpose(1, 2) for t in parts)
    if rng.random() < 0.4:
        angle = torch.arange(length, dtype=h.dtype)[:, None] * torch.tensor(
            [1.0, 0.3] * (size // 2), dtype=h.dtype
        )
        q, k = (
            t * angle.cos() + torch.cat([-t[..., size // 2 :], t[..., : size // 2]], -1) * angle.sin()
            for t in (q, k)
        )
    if rng.random() < 0.3:
        q = F.rms_norm(q, (size,), net.weight(f"{name}n", size))
    way = rng.randrange(3)
    if way == 0:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=rng.random() < 0.5, enable_gqa=True)
    else:
        k, v = (t.repeat_interleave(count // keys, 1) for t in (k, v))
        scores = q @ k.mT / math.sqrt(size)
        if way == 1:
            scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), float("-inf"))
        out = scores.softmax(-1) @ v
    out = out.transpose(1, 2).flatten(2)
    return torch.tanh(out[:, -1] if rng.random() < 0.5 else out.mean(1))


def einsums(net, rng, name, h, live):
    f = factor(rng, h.shape[1])
    cube = h.reshape(len(h), f, -1)
    way = rng.randrange(5)
    if way == 0:
        return torch.tanh(torch.einsum("bfn,nm->bfm", cube, net.weight(name, cube.shape[2], 3)).flatten(1))
    if way == 1:
        return torch.tanh(torch.einsum("bfn,fnm->bm", cube, net.weight(name, f, cube.shape[2], 6)))
    if way == 2:
        return torch.tanh(torch.einsum("bfn,fm->bnm", cube, net.weight(name, f, 2)).flatten(1))
    if way == 3:
        square = net.weight(name, h.shape[1], h.shape[1])
        return torch.einsum("bi,ii->bi", h, square)
    return torch.einsum("bi,bj->bij", h, h).diagonal(dim1=1, dim2=2) if h.shape[1] <= 24 else h.tan().tanh()


def complexes(net, rng, name, h, live):
    n = h.shape[1]
    way = rng.randrange(5)
    if way == 0:
        return (torch.complex(h, h.cos()) * net.weight(name, n, kind=torch.complex128)).abs()
    if way == 1:
        weight = net.weight(name, 6, n, kind=torch.complex128)
        return torch.view_as_real(torch.complex(h, -h) @ weight.t()).flatten(1).tanh()
    if way == 2:
        return (
            torch.fft.rfft(h).abs()
            if rng.random() < 0.4
            else torch.fft.fft(h[:, :, None].repeat(1, 1, 3)).real.mean(2)
        )
    if way == 3:
        return torch.polar(h.abs() + 0.1, net.weight(name, n).expand_as(h)).imag
    return (
        torch.view_as_complex(h.reshape(len(h), -1, 2).clone()).conj().angle()
        if n % 2 == 0 and n > 2
        else h.cosh().tanh()
    )


def masks(net, rng, name, h, live):
    n = h.shape[1]
    way = rng.randrange(6)
    if way == 0:
        return torch.where(h > 0, h, net.weight(name, n))
    if way == 1:
        return h.masked_fill(h > h.mean(1, keepdim=True), 0.0)
    if way == 2:
        kept = torch.ones(n, dtype=torch.bool)
        kept[rng.randrange(n)] = n <= 2
        return h[:, kept]
    if way == 3:
        return h * (h >= h.topk(min(2, n), 1).values[:, -1:]) + 0.1 * h
    if way == 4:
        return h * (torch.arange(n) < rng.randrange(1, n + 1))
    return h.clamp(net.weight(name, n) - 1, net.weight(name, n) + 1)


def shared(net, rng, name, h, live):
    """Weights of all steps in one memory: slices, transposes and views of one table."""
    table, n = net.weight("shared", 48, 48), h.shape[1]
    if n > 48:
        return h.tanh()
    way = rng.randrange(5)
    if way == 0:
        return torch.tanh(F.linear(h, table[:8, :n]))
    if way == 1:
        return torch.tanh(h @ table[:n, :12])
    if way == 2:
        return h * table[rng.randrange(4), :n]
    if way == 3:
        return h + table.view(-1)[: 2 * n : 2]
    return torch.tanh(F.linear(h, table.t()[:12, :n]))


def mixture(net, rng, name, h, live):
    """Experts chosen by a router: weights gathered, or every expert once."""
    n, experts = h.shape[1], 4
    scores = F.linear(h, net.weight(f"{name}r", experts, n)).softmax(1)
    up, down = net.weight(name, experts, 6, n), net.weight(f"{name}d", experts, 8, 6)
    way = rng.randrange(3)
    if way == 0:
        values, chosen = scores.topk(2, 1)
        hidden = torch.einsum("bkmn,bn->bkm", up[chosen], h).relu()
        return torch.einsum("bkm,bkom,bk->bo", hidden, down[chosen], values).tanh()
    hidden = torch.einsum("bn,emn->ebm", h, up).relu()
    out = torch.bmm(hidden, down.mT)
    if way == 1:
        return (out * scores.t()[:, :, None]).sum(0).tanh()
    return out.gather(0, scores.argmax(1)[None, :, None].expand(1, -1, 8))[0].tanh()


def recurrent(net, rng, name, h, live):
    n, m = h.shape[1], 4
    memory = h.new_zeros(len(h), m)
    if rng.random() < 0.5:
        weights = [net.weight(f"{name}{k}", 3 * m, size) for k, size in enumerate((n, m))]
        for _ in range(2):
            memory = torch.gru_cell(h, memory, *weights)
        return memory
    weights = [net.weight(f"{name}{k}", 4 * m, size) for k, size in enumerate((n, m))]
    cell = memory
    for _ in range(2):
        memory, cell = torch.lstm_cell(h, (memory, cell), *weights)
    return memory * cell.tanh()


def positions(net, rng, name, h, live):
    """The order of units counts, or only seems to."""
    n = h.shape[1]
    way = rng.randrange(8)
    if way == 0:
        return h.flip(1) if rng.random() < 0.5 else h.diff(dim=1) if n > 2 else h.tanh()
    if way == 1:
        order = h.argsort(1)
        return h.gather(1, order).gather(1, order.argsort(1))
    if way == 2:
        return torch.zeros_like(h).scatter(1, h.argsort(1), h.tanh())
    if way == 3:
        return torch.bucketize(h, net.weight(name, 6).sort().values).to(h) * h
    if way == 4:
        return torch.stack([torch.histc(row, 4, -2, 2) for row in h]) + net.weight(name, 4)
    if way == 5:
        return h.unfold(1, 2, 1).amax(2) if n > 2 else h.sin()
    if way == 6:
        return h.index_add(1, torch.tensor([0, n - 1]), torch.ones(len(h), 2, dtype=h.dtype))
    return F.one_hot(F.relu(h).topk(1, 1).indices[:, 0], n).to(h) * h + 0.3 * h


def branches(net, rng, name, h, live):
    """Both sides computed, one chosen by values; or a side, or a number of rounds, that Python chooses by a number."""
    way = rng.randrange(7)
    a, b = torch.tanh(F.linear(h, net.weight(name, 8, h.shape[1]))), net.weight(f"{name}b", 8)
    if way == 0:
        return torch.where((h.sum(1) > 0)[:, None], a, b)
    if way == 1:
        return torch.lerp(a, b.expand_as(a), h.square().mean(1, keepdim=True).tanh())
    if way == 2:
        return a if bool((h.norm() > 0).all()) else a * b
    if way == 4:
        other = rng.choice([a + b.flip(0), a * b.cos()])
        return a * b if h.norm().item() > 3 else other
    square = net.weight(f"{name}s", 8, 8)
    if way == 5:
        for _ in range(int((h > 0).sum()) % 3):
            a = torch.sin(F.linear(a, square))
        return a
    if way == 6:
        while a.norm() > 1:
            a = 0.6 * torch.tanh(F.linear(a, square))
        return a
    return a * torch.vmap(lambda row: (row * row).sum())(h).tanh()[:, None]


def normalized(net, rng, name, h, live):
    f = factor(rng, h.shape[1])
    cube = h.reshape(len(h), f, -1)
    way = rng.randrange(5)
    if way == 0 and h.shape[1] > 1:
        return F.layer_norm(cube, cube.shape[1:], net.weight(name, *cube.shape[1:])).flatten(1)
    if way == 1:
        return F.rms_norm(cube, cube.shape[2:], net.weight(name, *cube.shape[2:])).flatten(1)
    if way == 2:
        return F.normalize(cube, dim=rng.choice([1, 2])).flatten(1)
    if way == 3:
        return F.local_response_norm(h[:, :, None], 3)[:, :, 0]
    weight = net.weight(name, 8, h.shape[1])
    return torch.tanh(F.linear(h, torch._weight_norm(weight, net.weight(f"{name}g", 8, 1), 0)))


STRUCTURES = [
    convolved, convolved, heads, heads, einsums, complexes, masks, masks, shared, shared, mixture, recurrent, positions,
    positions, branches, normalized,
]  # fmt: skip

"""Where the batch is: folded, second, last, or not there at all."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from .checks import RULES, check, labels, randn

N = 3
CLASSES = labels(N)
IMAGES = randn(N, 2, 8, 8)


def loss(out):
    return F.cross_entropy(out, CLASSES)


class Windows(nn.Module):
    """Attention in windows that are folded into the batch, with a bias made by a small network from a table."""

    def __init__(self, channels=6, window=4):
        super().__init__()
        self.window = window
        self.embed = nn.Conv2d(2, channels, 1)
        self.qkv, self.proj = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        self.bias1, self.bias2 = nn.Linear(2, 8), nn.Linear(8, 2, bias=False)
        self.norm = nn.LayerNorm(channels)
        self.head = nn.Linear(channels, 4)
        steps = torch.arange(window)
        table = torch.stack(torch.meshgrid(steps, steps, indexing="ij"), -1).reshape(-1, 2)
        self.register_buffer("table", (table[:, None] - table[None, :]).double() / window)

    def forward(self, x):
        x = self.embed(x).permute(0, 2, 3, 1)
        n, h, w, c = x.shape
        k = self.window
        parts = x.reshape(n, h // k, k, w // k, k, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, k * k, c)
        bias = self.bias2(torch.relu(self.bias1(self.table))).permute(2, 0, 1)
        q, key, v = self.qkv(self.norm(parts)).reshape(len(parts), k * k, 3, 2, c // 2).permute(2, 0, 3, 1, 4)
        a = (q @ key.transpose(-2, -1) + bias).softmax(-1)
        parts = parts + self.proj((a @ v).transpose(1, 2).reshape(len(parts), k * k, c))
        x = parts.reshape(n, h // k, w // k, k, k, c).permute(0, 1, 3, 2, 4, 5).reshape(n, h, w, c)
        return self.head(x.mean((1, 2)))


@pytest.mark.parametrize("rule", RULES)
def test_windows_and_a_bias_without_a_batch(rule):
    warned = ("'bias2'",) if rule == "dfa" else ()
    check(Windows, IMAGES, loss, rule, outputs=["head"], warned=warned)


class Patches(nn.Module):
    """Patches as rows: (N, P, F) to (N * P, F) before a linear layer, and back."""

    def __init__(self):
        super().__init__()
        self.first, self.mid, self.head = nn.Linear(8, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x):
        n = len(x)
        rows = x.reshape(n, -1, 8).flatten(0, 1)
        rows = torch.tanh(self.mid(torch.tanh(self.first(rows))))
        return self.head(rows.reshape(n, -1, 6).mean(1))


@pytest.mark.parametrize("rule", RULES)
def test_patches_as_rows(rule):
    check(Patches, IMAGES, loss, rule, outputs=["head"])


class PerToken(nn.Module):
    """(N, T, F) folded for the middle; an output for each token."""

    def __init__(self, fold_output=False):
        super().__init__()
        self.first, self.mid, self.head = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 4)
        self.fold_output = fold_output

    def forward(self, x):
        n, t, _ = x.shape
        h = torch.tanh(self.first(x)).reshape(n * t, -1)
        h = torch.tanh(self.mid(h))
        return self.head(h if self.fold_output else h.reshape(n, t, -1))


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_tokens_folded_into_the_batch(rule, fold):
    x, y = randn(N, 7, 5), labels(N, 7)
    check(
        lambda: PerToken(fold), x, lambda out: F.cross_entropy(out.reshape(-1, 4), y.flatten()), rule, outputs=["head"]
    )


class SequenceFirst(nn.Module):
    """(T, N, F) throughout, the output (T, N, n) or pooled."""

    def __init__(self, pooled):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.q, self.k, self.v = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.out, self.head = nn.Linear(6, 6), nn.Linear(6, 4)
        self.pooled = pooled

    def forward(self, ids):
        h = self.embed(ids.t())
        q, k, v = (f(h).transpose(0, 1) for f in (self.q, self.k, self.v))
        a = (q @ k.transpose(1, 2)).softmax(-1) @ v
        h = h + torch.tanh(self.out(a.transpose(0, 1)))
        return self.head(h.mean(0) if self.pooled else h)


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_sequence_first(rule, pooled):
    ids = labels(N, 7, classes=11)
    y = CLASSES if pooled else labels(7, N).flatten()
    check(
        lambda: SequenceFirst(pooled), ids, lambda out: F.cross_entropy(out.reshape(-1, 4), y), rule, outputs=["head"]
    )


class ConvNeXt(nn.Module):
    """Depthwise convolution, then channels last for norm and linear layers, and back."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 2, stride=2)
        self.dw, self.norm = nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.LayerNorm(6)
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 6)
        self.gamma = nn.Parameter(torch.full((6,), 0.1))
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x = self.stem(x)
        h = self.norm(self.dw(x).permute(0, 2, 3, 1))
        x = x + (self.gamma * self.down(F.gelu(self.up(h)))).permute(0, 3, 1, 2)
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("feedback", ["dense", "channel"])
@pytest.mark.parametrize("rule", RULES)
def test_channels_last_and_back(rule, feedback):
    check(ConvNeXt, IMAGES, loss, rule, outputs=["head"], feedback=feedback)


class Text(nn.Module):
    """Conv1d over time with transposes, linear layers on (N, T, C), an answer from the first token."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.conv = nn.Conv1d(6, 6, 3, padding=1)
        self.mix, self.pool, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, ids):
        h = self.embed(ids)
        h = h + torch.relu(self.conv(h.transpose(1, 2))).transpose(1, 2)
        h = h + torch.tanh(self.mix(h.mean(1, keepdim=True) + h))
        return self.head(torch.tanh(self.pool(h[:, 0])))


@pytest.mark.parametrize("rule", RULES)
def test_an_answer_from_the_first_token(rule):
    check(Text, labels(N, 7, classes=11), loss, rule, outputs=["head"])


class Video(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv3d(2, 4, 3, padding=1, stride=(1, 2, 2))
        self.spatial = nn.Conv3d(4, 4, (1, 3, 3), padding=(0, 1, 1))
        self.temporal = nn.Conv3d(4, 4, (3, 1, 1), padding=(1, 0, 0), groups=2)
        self.norm = nn.BatchNorm3d(4)
        self.head = nn.Linear(4, 4)

    def forward(self, x):
        h = torch.relu(self.norm(self.temporal(torch.relu(self.spatial(self.stem(x))))))
        return self.head(h.mean((2, 3, 4)))


@pytest.mark.parametrize("feedback", ["dense", "channel"])
@pytest.mark.parametrize("rule", RULES)
def test_video(rule, feedback):
    check(Video, randn(N, 2, 4, 6, 6), loss, rule, outputs=["head"], feedback=feedback)


class FramesFolded(nn.Module):
    """Frames of a video as images: (N, T, C, H, W) to (N * T, C, H, W)."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.time, self.head = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        n, t = x.shape[:2]
        h = torch.relu(self.b(torch.relu(self.a(x.flatten(0, 1))))).mean((2, 3)).reshape(n, t, -1)
        return self.head(torch.tanh(self.time(h)).mean(1))


@pytest.mark.parametrize("rule", RULES)
def test_frames_folded_into_the_batch(rule):
    check(FramesFolded, randn(N, 4, 2, 6, 6), loss, rule, outputs=["head"])


class Crossed(nn.Module):
    """Encoder and decoder with cross-attention; memory and target of different lengths."""

    def __init__(self):
        super().__init__()
        self.source, self.target = nn.Embedding(11, 6), nn.Embedding(11, 6)
        self.enc1, self.enc2 = nn.Linear(6, 8), nn.Linear(8, 6)
        self.q, self.k, self.v, self.o = (nn.Linear(6, 6) for _ in range(4))
        self.dec1, self.dec2, self.head = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 11)

    def forward(self, source, target):
        memory = self.source(source)
        memory = memory + self.enc2(torch.relu(self.enc1(memory)))
        h = self.target(target)
        a = (self.q(h) @ self.k(memory).transpose(1, 2)).softmax(-1) @ self.v(memory)
        h = h + self.o(a)
        h = h + self.dec2(torch.relu(self.dec1(h)))
        return {"logits": self.head(h)}


@pytest.mark.parametrize("rule", RULES)
def test_encoder_decoder(rule):
    inputs = {"source": labels(N, 5, classes=11), "target": labels(N, 4, classes=11, seed=1)}
    y = labels(N, 4, classes=11, seed=2)
    check(
        Crossed, inputs, lambda out: F.cross_entropy(out["logits"].flatten(0, 1), y.flatten()), rule, outputs=["head"]
    )


class UNet(nn.Module):
    """Down, up with skips that are concatenated, an output for each pixel."""

    def __init__(self):
        super().__init__()
        self.d1, self.d2 = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.mid = nn.Conv2d(8, 8, 3, padding=1)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.u1, self.out = nn.Conv2d(8, 4, 3, padding=1), nn.Conv2d(4, 3, 1)

    def forward(self, x):
        a = torch.relu(self.d1(x))
        b = torch.relu(self.mid(torch.relu(self.d2(a))))
        return self.out(torch.relu(self.u1(torch.cat([a, self.up(b)], 1))))


class Segmentation(nn.Module):
    """A map of a quarter of the size, upsampled; and an auxiliary one in training."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 4, 3, 2, 1), nn.Conv2d(4, 6, 3, 2, 1)
        self.neck, self.head = nn.Conv2d(6, 6, 3, padding=2, dilation=2), nn.Conv2d(6, 3, 1)
        self.aux = nn.Conv2d(4, 3, 1)

    def forward(self, x):
        a = torch.relu(self.a(x))
        y = self.head(torch.relu(self.neck(torch.relu(self.b(a)))))
        out = {"out": F.interpolate(y, x.shape[-2:], mode="bilinear")}
        if self.training:
            out["aux"] = F.interpolate(self.aux(a), x.shape[-2:], mode="bilinear")
        return out


class PixelShuffle(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 12, 3, padding=1)
        self.up, self.out = nn.PixelShuffle(2), nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x):
        return self.out(torch.relu(self.up(self.b(torch.relu(self.a(x))))))


class ShuffledLast(PixelShuffle):
    """The last layer's output goes through the shuffle: e is of the layer's own shape."""

    def forward(self, x):
        return self.up(self.b(torch.relu(self.a(x))))


def maps(out):
    y = out["out"] if isinstance(out, dict) else out
    total = F.cross_entropy(y, labels(len(y), *y.shape[2:], classes=3))
    return total + 0.4 * F.cross_entropy(out["aux"], labels(N, 8, 8, classes=3)) if isinstance(out, dict) else total


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("make", "outputs"),
    [(UNet, ["out"]), (Segmentation, ["head", "aux"]), (PixelShuffle, ["out"]), (ShuffledLast, ["b"])],
)
def test_maps(make, outputs, rule):
    unused = ["out"] if make is ShuffledLast else []
    check(make, IMAGES, maps, rule, outputs=outputs, not_run=unused)


class AutoEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(2, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, 2, 1), nn.Flatten())
        self.mu, self.logvar = nn.Linear(16, 3), nn.Linear(16, 3)
        self.up = nn.Sequential(
            nn.Linear(3, 16), nn.ReLU(), nn.Unflatten(1, (4, 2, 2)), nn.ConvTranspose2d(4, 4, 4, 2, 1), nn.ReLU()
        )
        self.out = nn.ConvTranspose2d(4, 2, 4, 2, 1)

    def forward(self, x):
        h = self.down(x)
        mu, logvar = self.mu(h), self.logvar(h)
        z = mu + torch.randn_like(mu) * (logvar / 2).exp()
        return self.out(self.up(z)), mu, logvar


@pytest.mark.parametrize("rule", RULES)
def test_a_variational_autoencoder(rule):
    def elbo(out):
        y, mu, logvar = out
        return F.mse_loss(y, IMAGES) + 0.1 * (mu.square() + logvar.exp() - logvar).mean()

    check(AutoEncoder, IMAGES, elbo, rule, outputs=["out"])


class Excited(nn.Module):
    """Squeeze-and-excitation on pooled features: 1x1 convolutions, or linear layers."""

    def __init__(self, linear):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1, groups=3)
        self.linear = linear
        self.squeeze, self.excite = (
            (nn.Linear(6, 3), nn.Linear(3, 6)) if linear else (nn.Conv2d(6, 3, 1), nn.Conv2d(3, 6, 1))
        )
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        h = torch.relu(self.conv(x))
        s = h.mean((2, 3), keepdim=not self.linear)
        s = torch.sigmoid(self.excite(torch.relu(self.squeeze(s))))
        return self.head((x + h * (s[..., None, None] if self.linear else s)).mean((2, 3)))


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("feedback", ["dense", "channel"])
@pytest.mark.parametrize("rule", RULES)
def test_squeeze_and_excitation(rule, feedback, linear):
    check(lambda: Excited(linear), IMAGES, loss, rule, outputs=["head"], feedback=feedback)


class Dense(nn.Module):
    """Each layer sees all features before it; a random depth-wise order of groups between them."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 1)
        self.layers = nn.ModuleList(nn.Conv2d(4 + 2 * i, 2, 3, padding=1) for i in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(4 + 2 * i) for i in range(3))
        self.head = nn.Linear(10, 4)

    def forward(self, x):
        x = self.stem(x)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = torch.cat([x, layer(torch.relu(norm(x)))], 1)
            x = x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("rule", RULES)
def test_dense_connections_and_channel_shuffles(rule):
    check(Dense, IMAGES, loss, rule, outputs=["head"])

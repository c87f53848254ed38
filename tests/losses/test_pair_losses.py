"""Losses between images against slow loops in float64: values, gradients, edge cases; the registry and its errors."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_vit_config
from torch import nn

from vptsp import VPTSPConfig, VPTSPForMetricLearning
from vptsp.losses.loss_registry import LOSSES, Criterion, check_loss, register_loss
from vptsp.losses.pair_losses import HyperbolicLoss, RecallAtKLoss, poincare_distance, to_poincare_ball


LABELS = {
    "pairs": [0, 0, 1, 1, 2, 2],
    "uneven": [4, 1, 4, 1, 4, 1, 7],  # the last is alone
    "one_class": [3, 3, 3, 3],
}


def recall_at_k_loops(embeddings, labels, ks, tau_1, tau_2):
    """The equations, image by image."""
    count = len(labels)
    losses = []
    for q in range(count):
        positives = [x for x in range(count) if x != q and labels[x] == labels[q]]
        if not positives:
            continue
        ranks = []
        for x in positives:
            rank = 1.0
            for z in range(count):
                if z not in (q, x):
                    gap = (embeddings[q] * embeddings[z]).sum() - (embeddings[q] * embeddings[x]).sum()
                    rank = rank + 1 / (1 + torch.exp(-gap / tau_2))
            ranks.append(rank)
        for k in ks:
            losses.append(1 - sum(1 / (1 + torch.exp(-(k - rank) / tau_1)) for rank in ranks) / len(ranks))
    return sum(losses) / len(losses)


def moebius_add(x, y, c):
    """Ermolov et al., equation 1."""
    xy, xx, yy = (x * y).sum(), (x * x).sum(), (y * y).sum()
    return ((1 + 2 * c * xy + c * yy) * x + (1 - c * xx) * y) / (1 + 2 * c * xy + c * c * xx * yy)


def distance_by_hand(x, y, c):
    """Ermolov et al., equation 2."""
    return 2 / math.sqrt(c) * torch.atanh(math.sqrt(c) * moebius_add(-x, y, c).norm())


def hyperbolic_loops(features, labels, tau, c, radius):
    count = len(labels)
    points = []
    for x in features:
        v = x * (radius / x.norm()) if x.norm() > radius else x
        points.append(torch.tanh(math.sqrt(c) * v.norm()) * v / (math.sqrt(c) * v.norm()))
    losses = []
    for i in range(count):
        shares = {m: torch.exp(-distance_by_hand(points[i], points[m], c) / tau) for m in range(count) if m != i}
        losses += [-torch.log(shares[j] / sum(shares.values())) for j in shares if labels[j] == labels[i]]
    return sum(losses) / len(losses)


def value_and_gradient(function, inputs):
    inputs = inputs.clone().requires_grad_()
    value = function(inputs)
    value.backward()
    return value.detach(), inputs.grad


def assert_same(function, oracle, inputs):
    for found, expected in zip(value_and_gradient(function, inputs), value_and_gradient(oracle, inputs), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
@pytest.mark.parametrize("options", [{}, {"ks": [1, 3], "recall_temperature": 0.5, "rank_temperature": 0.2}])
def test_recall_at_k_is_the_loops(labels, options):
    embeddings = F.normalize(torch.randn(len(labels), 5, dtype=torch.float64), dim=-1)
    loss = RecallAtKLoss(**options)
    assert_same(
        lambda x: loss(x, torch.tensor(labels)),
        lambda x: recall_at_k_loops(x, labels, loss.ks, loss.recall_temperature, loss.rank_temperature),
        embeddings,
    )


def test_recall_at_k_in_parts_is_the_same():
    embeddings, labels = F.normalize(torch.randn(8, 5, dtype=torch.float64), dim=-1), torch.arange(8) // 4
    whole, parts = RecallAtKLoss(), RecallAtKLoss()
    parts.max_comparisons = 8 * 5  # 24 pairs, 5 at a time
    assert_same(lambda x: parts(x, labels), lambda x: whole(x, labels), embeddings)


def test_recall_at_k_becomes_recall_as_the_temperatures_vanish():
    embeddings, labels = F.normalize(torch.randn(12, 4, dtype=torch.float64), dim=-1), torch.arange(12) // 2
    order = (embeddings @ embeddings.T).fill_diagonal_(-2).argsort(dim=1, descending=True)
    for k in (1, 3):
        hits = (labels[order[:, :k]] == labels[:, None]).any(dim=1)  # there is one to find
        # ranks are whole numbers: half of one more than k is still within
        loss = RecallAtKLoss(ks=[k], recall_temperature=1e-3, rank_temperature=1e-7)
        at_rank_k = (labels[order[:, k - 1]] == labels).double()  # the sigmoid of 0
        assert loss(embeddings, labels).item() == pytest.approx((1 - hits.double() + at_rank_k / 2).mean().item())


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "curvature": 0.5, "clip_radius": 1.0}])
def test_hyperbolic_is_the_loops(labels, options):
    features = torch.randn(len(labels), 5, dtype=torch.float64)  # some norms below the radius, some above
    loss = HyperbolicLoss(**options)
    assert_same(
        lambda x: loss(x, torch.tensor(labels)),
        lambda x: hyperbolic_loops(x, labels, loss.temperature, loss.curvature, loss.clip_radius),
        features,
    )


def test_poincare_distance_is_that_of_moebius_addition():
    points = to_poincare_ball(torch.randn(6, 4, dtype=torch.float64) * 3, 0.1, 2.3)
    expected = torch.tensor([[distance_by_hand(x, y, 0.1) for y in points] for x in points], dtype=torch.float64)
    torch.testing.assert_close(poincare_distance(points, 0.1), expected.nan_to_num(), rtol=1e-10, atol=1e-10)


def test_distance_from_the_origin_is_twice_the_norm():
    features = torch.tensor([[0.0, 0.0], [0.6, 0.8], [30.0, 40.0]], dtype=torch.float64)
    distance = poincare_distance(to_poincare_ball(features, 0.1, 2.3), 0.1)
    torch.testing.assert_close(distance[0], torch.tensor([0.0, 2.0, 4.6], dtype=torch.float64))


def test_near_points_are_told_apart_in_float32():
    features = torch.randn(1, 64).repeat(2, 1) * 5
    features[1] += 1e-4 * torch.randn(64)
    single, double = (
        poincare_distance(to_poincare_ball(x, 0.1, 2.3), 0.1)[0, 1] for x in (features, features.double())
    )
    assert single.item() == pytest.approx(double.item(), rel=1e-2)


def test_clipped_features_rank_by_cosine_as_by_distance():
    features = torch.randn(30, 8, dtype=torch.float64) * 10
    assert features.norm(dim=1).min() > 2.3
    cosine = F.normalize(features, dim=-1) @ F.normalize(features, dim=-1).T
    distance = poincare_distance(to_poincare_ball(features, 0.1, 2.3), 0.1)
    assert torch.equal(cosine.argsort(dim=1, descending=True)[:, 1:], distance.argsort(dim=1)[:, 1:])


@pytest.mark.parametrize("loss", [RecallAtKLoss(), HyperbolicLoss()])
@pytest.mark.parametrize("labels", [[0, 1, 2], [0]], ids=["no_positives", "one_image"])
def test_nothing_to_find_is_no_loss(loss, labels):
    value, gradient = value_and_gradient(lambda x: loss(x, torch.tensor(labels)), torch.randn(len(labels), 4))
    assert value == 0
    assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("loss", [RecallAtKLoss(), HyperbolicLoss()])
def test_duplicates_and_zeros_keep_gradients_finite(loss):
    embeddings = F.normalize(torch.randn(3, 4), dim=-1).repeat(2, 1)
    embeddings[2] = 0
    value, gradient = value_and_gradient(lambda x: loss(x, torch.tensor([0, 1, 2, 0, 2, 1])), embeddings)
    assert torch.isfinite(value)
    assert torch.isfinite(gradient).all()


def test_embeddings_that_are_all_the_same_tie():
    embeddings = F.normalize(torch.ones(6, 4, dtype=torch.float64), dim=-1)
    labels = torch.arange(6) // 2
    expected = 1 - 1 / (1 + math.exp(-(1 - 3)))  # 4 rivals count half each: rank 3
    assert RecallAtKLoss(ks=[1])(embeddings, labels).item() == pytest.approx(expected)
    assert HyperbolicLoss()(embeddings, labels).item() == pytest.approx(math.log(5))


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: RecallAtKLoss(ks=[]), r"ks must hold integers >= 1, got \[\]"),
        (lambda: RecallAtKLoss(ks=[0, 1]), r"ks must hold integers >= 1, got \[0, 1\]"),
        (lambda: RecallAtKLoss(rank_temperature=0), "rank_temperature must be > 0, got 0"),
        (lambda: HyperbolicLoss(temperature=-1), "temperature must be > 0, got -1"),
        (lambda: HyperbolicLoss(clip_radius=20), r"sqrt\(curvature\) \* clip_radius must be at most 3, got 6.32"),
    ],
)
def test_bad_values_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def config_of(loss, **fields):
    values = {"backbone_config": tiny_vit_config(), "num_classes": 4, "embedding_dim": 6, "proxy_update": "none"}
    return VPTSPConfig(loss=loss, **{**values, **fields})


@pytest.mark.parametrize(
    "loss, fields, message",
    [
        ("recal_at_k", {}, r"loss must be one of proxy_anchor, .*, got 'recal_at_k'; did you mean 'recall_at_k'\?"),
        ("recall_at_k", {"loss_kwargs": {"kss": [1]}}, r"recall_at_k has no keyword 'kss'; did you mean 'ks'\?"),
        ("recall_at_k", {"loss_kwargs": {"ks": [0]}}, "recall_at_k: ks must hold integers >= 1"),
        ("recall_at_k", {"loss_kwargs": {"ks": 1}}, "recall_at_k: "),
        ("hyperbolic", {"proxy_update": "gru_relu"}, "'hyperbolic' has no proxies: proxy_update must be none"),
        ("hyperbolic", {"miner": "pml.MultiSimilarityMiner"}, "miner needs a loss pml.<Name>, got the loss 'hyper"),
        ("proxy_anchor", {"loss_kwargs": {"alpha": 3}}, "'proxy_anchor' is set by loss_alpha and loss_delta"),
        ("hyperbolic", {"miner_kwargs": {"epsilon": 1}}, "miner_kwargs needs a miner, got None"),
    ],
)
def test_what_does_not_go_together_is_refused(loss, fields, message):
    with pytest.raises(ValueError, match=message):
        check_loss(config_of(loss, **fields))
    with pytest.raises(ValueError, match=message):
        VPTSPForMetricLearning(config_of(loss, **fields))


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("loss", 3, "loss must be the name of a loss, got 3"),
        ("loss_kwargs", [1], r"loss_kwargs must be None or a mapping, got \[1\]"),
        ("miner", "MultiSimilarityMiner", "miner must be None or pml.<Name>, got 'MultiSimilarityMiner'"),
    ],
)
def test_fields_of_a_wrong_kind_are_named(field, value, message):
    with pytest.raises(ValueError, match=message):
        VPTSPConfig(**{field: value})


@pytest.mark.parametrize("loss", ["recall_at_k", "hyperbolic"])
def test_model_gives_the_loss_what_it_takes(loss):
    model = VPTSPForMetricLearning(config_of(loss)).double()
    assert not hasattr(model, "proxies")
    pixel_values, labels = torch.randn(4, 3, 16, 16, dtype=torch.float64), torch.tensor([2, 2, 0, 0])
    pooled = model.vptsp.encode(model.vptsp.embed_patches(pixel_values), model.vptsp.prompts())
    head = model.vptsp.head
    features = F.linear(head.norm(pooled), head.projection.weight, head.projection.bias)
    embeddings = F.normalize(features, dim=-1)
    if loss == "hyperbolic":
        expected = hyperbolic_loops(features, labels.tolist(), 0.2, 0.1, 2.3)
    else:
        expected = recall_at_k_loops(embeddings, labels.tolist(), (1, 2, 4, 8, 16), 1.0, 0.01)
    output = model(pixel_values, labels, images_per_class=2)
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(output.embeddings, embeddings)
    assert output.proxy_rows is None
    model.commit_proxies(output)
    with pytest.raises(ValueError, match=r"labels must be in 0\.\.3, got 0\.\.4"):
        model(pixel_values, torch.tensor([4, 4, 0, 0]))


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(LOSSES, "entries", dict(LOSSES))


def test_own_loss_between_images_with_parameters(registry, tmp_path, backbone_folder):
    @register_loss("class_centres")
    class ClassCentres(nn.Module):
        def __init__(self, num_classes, embedding_dim, scale=2.0):
            super().__init__()
            self.centres = nn.Parameter(torch.full((num_classes, embedding_dim), 0.5))
            self.offsets = torch.arange(num_classes)  # a plain tensor
            self.scale = scale

        def forward(self, embeddings, labels):
            return self.scale * (embeddings - self.centres[self.offsets[labels]]).square().mean()

    fields = {"loss": "class_centres", "loss_kwargs": {"scale": 3.0}, "num_classes": 4, "embedding_dim": 6}
    model = VPTSPForMetricLearning.from_backbone(backbone_folder, proxy_update="none", **fields)
    pixel_values, labels = torch.randn(4, 3, 16, 16), torch.tensor([2, 2, 0, 0])
    output = model(pixel_values, labels)
    torch.testing.assert_close(output.loss, 3 * (output.embeddings - 0.5).square().mean())
    output.loss.backward()
    assert model.criterion.function.centres.grad.abs().sum() > 0

    model.criterion.function.centres.data.normal_()
    model.save_pretrained(tmp_path / "training")
    loaded = VPTSPForMetricLearning.from_pretrained(tmp_path / "training")
    assert torch.equal(loaded.criterion.function.centres, model.criterion.function.centres)
    assert torch.equal(loaded.criterion.function.offsets, torch.arange(4))
    torch.testing.assert_close(loaded(pixel_values, labels).loss, model(pixel_values, labels).loss)

    model.retriever.save_pretrained(tmp_path / "retriever")
    fresh = VPTSPForMetricLearning.from_pretrained(tmp_path / "retriever")
    assert torch.equal(fresh.criterion.function.centres, torch.full((4, 6), 0.5))
    assert torch.equal(fresh.criterion.function.offsets, torch.arange(4))


def test_own_loss_between_embeddings_and_proxies(registry):
    @register_loss("normalized_softmax", takes="proxies")
    class NormalizedSoftmax(nn.Module):
        def __init__(self, scale=16.0):
            super().__init__()
            self.scale = scale

        def forward(self, similarity, targets):
            return F.cross_entropy(self.scale * similarity, targets)

    for proxy_range, columns in {"all": [2, 2, 0, 0], "batch": [0, 0, 1, 1]}.items():
        config = config_of("normalized_softmax", proxy_update="gru_relu", proxy_range=proxy_range)
        model = VPTSPForMetricLearning(config)
        output = model(torch.randn(4, 3, 16, 16), torch.tensor([2, 2, 0, 0]), images_per_class=2)
        torch.testing.assert_close(output.loss, F.cross_entropy(16 * output.similarity, torch.tensor(columns)))
        assert output.proxy_rows.shape == (2, 6)


def test_names_are_not_taken_twice(registry):
    with pytest.raises(ValueError, match="there is a loss 'hyperbolic' already"):
        register_loss("hyperbolic")(RecallAtKLoss)
    with pytest.raises(ValueError, match=r"there is a loss 'pml\.Mine' already"):
        register_loss("pml.Mine")(RecallAtKLoss)
    with pytest.raises(ValueError, match="takes must be one of embeddings, features, proxies, got 'logits'"):
        register_loss("mine", takes="logits")


def test_criterion_draws_its_parameters_once_more_where_none_were_saved(registry):
    @register_loss("drawn")
    class Drawn(nn.Module):
        def __init__(self, embedding_dim):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(embedding_dim))
            self.layer = nn.Linear(embedding_dim, 1)
            nn.init.constant_(self.layer.bias, 7)

        def forward(self, embeddings, labels):
            return self.layer(embeddings * self.weight).mean()

    criterion = Criterion(config_of("drawn"))
    with torch.no_grad():
        for parameter in criterion.parameters():
            parameter.fill_(torch.nan)
    criterion.init_weights()
    assert torch.isfinite(criterion.function.weight).all()
    assert criterion.function.layer.bias.item() == 7

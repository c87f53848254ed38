"""Losses and miners of pytorch-metric-learning by name: as the library has them; trained, saved and resumed."""

import inspect
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_vit_config
from torch import nn


pytest.importorskip("pytorch_metric_learning")

from pytorch_metric_learning import distances, losses, miners

from vptsp import VPTSPConfig, VPTSPForMetricLearning, VPTSPModel, VPTSPTrainer, VPTSPTrainingArguments
from vptsp.losses.loss_registry import Criterion, check_loss
from vptsp.modeling_vptsp import VPTSPModelOutput


NUM_CLASSES, WIDTH = 5, 6
# Losses that need more than embeddings and labels, or are no losses.
NOT_USABLE = {
    "BaseLossWrapper",
    "BaseMetricLossFunction",
    "GenericPairLoss",
    "ManifoldLoss",
    "SelfSupervisedLoss",
    "VICRegLoss",
}
NEEDED = {
    "CrossBatchMemory": {"loss": "pml.ContrastiveLoss", "memory_size": 20},
    "MultipleLosses": {"losses": ["pml.ContrastiveLoss", {"pml.MarginLoss": {"learn_beta": True}}]},
    "RankedListLoss": {"margin": 0.4, "Tn": 1.0},
}
MODULES = {name for name, cls in vars(losses).items() if inspect.isclass(cls) and issubclass(cls, nn.Module)}


def config_of(loss, **fields):
    values = {"backbone_config": tiny_vit_config(), "num_classes": NUM_CLASSES, "embedding_dim": WIDTH}
    return VPTSPConfig(loss=loss, proxy_update="none", **{**values, **fields})


def batch(seed=0, size=8):
    generator = torch.Generator().manual_seed(seed)
    embeddings = F.normalize(torch.randn(size, WIDTH, generator=generator), dim=-1)
    return embeddings.requires_grad_(), torch.arange(size) // 2


@pytest.mark.parametrize("name", sorted(MODULES - NOT_USABLE))
def test_every_loss_takes_steps_and_goes_on_from_its_state_dict(name):
    config = config_of(f"pml.{name}", loss_kwargs=NEEDED.get(name))
    check_loss(config)
    criterion, resumed = Criterion(config), Criterion(config)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1)), *criterion.parameters()], lr=0.1)
    moved = 0
    for step in range(4):
        if step == 3:
            resumed.load_state_dict(criterion.state_dict())
        embeddings, labels = batch(step)
        optimizer.zero_grad()
        torch.manual_seed(step)
        loss = criterion(embeddings, labels)
        loss.backward()
        optimizer.step()
        assert torch.isfinite(loss)
        moved += embeddings.grad.abs().sum()
    assert moved > 0
    torch.manual_seed(3)
    again, labels = batch(3)
    assert torch.equal(resumed(again, labels), loss)


@pytest.mark.parametrize("name", sorted(NOT_USABLE))
def test_losses_that_need_more_are_refused(name):
    kwargs = {"loss": "pml.ContrastiveLoss"} if name in ("SelfSupervisedLoss", "BaseLossWrapper") else None
    with pytest.raises(ValueError, match=f"pml.{name}"):
        check_loss(config_of(f"pml.{name}", loss_kwargs=kwargs))


def test_pair_loss_with_miner_is_the_library(backbone_folder):
    model = VPTSPForMetricLearning.from_backbone(
        backbone_folder,
        proxy_update="none",
        num_classes=NUM_CLASSES,
        embedding_dim=WIDTH,
        loss="pml.MultiSimilarityLoss",
        loss_kwargs={"alpha": 3, "distance": {"pml.SNRDistance": {"power": 2}}},
        miner="pml.MultiSimilarityMiner",
        miner_kwargs={"epsilon": 0.3},
    )
    pixel_values, labels = torch.randn(8, 3, 16, 16), torch.arange(8) // 2
    output = model(pixel_values, labels)
    pairs = miners.MultiSimilarityMiner(epsilon=0.3)(output.embeddings, labels)
    every_pair = sum(map(len, miners.BatchEasyHardMiner("all", "all")(output.embeddings, labels)))
    assert 0 < sum(map(len, pairs)) < every_pair
    function = losses.MultiSimilarityLoss(alpha=3, distance=distances.SNRDistance(power=2))
    expected = function(output.embeddings, labels, pairs)
    torch.testing.assert_close(output.loss, expected, rtol=0, atol=0)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for found, wanted in zip(
        torch.autograd.grad(output.loss, parameters, retain_graph=True),
        torch.autograd.grad(expected, parameters),
        strict=True,
    ):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    "loss, fields, shapes",
    [
        ("pml.ArcFaceLoss", {}, [(WIDTH, NUM_CLASSES)]),
        ("pml.CosFaceLoss", {"loss_kwargs": {"scale": 8}}, [(WIDTH, NUM_CLASSES)]),
        ("pml.ProxyAnchorLoss", {}, [(NUM_CLASSES, WIDTH)]),
        ("pml.ProxyAnchorLoss", {"loss_kwargs": {"num_classes": 9}}, [(9, WIDTH)]),
        ("pml.P2SGradLoss", {}, [(WIDTH, NUM_CLASSES)]),
        ("pml.MarginLoss", {"loss_kwargs": {"learn_beta": True}}, [(1,)]),
    ],
)
def test_classes_and_width_are_filled_in(loss, fields, shapes):
    assert [tuple(p.shape) for p in Criterion(config_of(loss, **fields)).parameters()] == shapes


def test_proxy_anchor_of_the_library_is_ours():
    """Two implementations of one formula: theirs with its own proxies, ours with `batch_positives`."""
    theirs = VPTSPForMetricLearning(config_of("pml.ProxyAnchorLoss")).double()
    ours = VPTSPForMetricLearning(config_of("proxy_anchor", proxy_anchor_reduction="batch_positives")).double()
    ours.vptsp.load_state_dict(theirs.vptsp.state_dict())
    with torch.no_grad():
        ours.proxies.original_proxies.copy_(theirs.criterion.function.loss.proxies)
    pixel_values, labels = torch.randn(6, 3, 16, 16, dtype=torch.float64), torch.tensor([0, 0, 3, 3, 1, 1])
    torch.testing.assert_close(theirs(pixel_values, labels).loss, ours(pixel_values, labels).loss)


def test_parameters_without_pairs_get_a_gradient():
    criterion = Criterion(config_of("pml.MarginLoss", loss_kwargs={"learn_beta": True}))
    embeddings, _ = batch()
    criterion(embeddings, torch.arange(8) % 5 * 0 + 1).backward()  # one class: no triplets
    assert [p.grad.abs().sum().item() for p in criterion.parameters()] == [0]


@pytest.mark.parametrize(
    "loss, fields, message",
    [
        ("pml.MultiSimilartyLoss", {}, r"no 'MultiSimilartyLoss' in its losses; did you mean 'MultiSimilarityLoss'"),
        ("pml.MultiSimilarityMiner", {}, "no 'MultiSimilarityMiner' in its losses"),
        ("pml.TripletMarginLoss", {"loss_kwargs": {"margn": 1}}, r"has no keyword 'margn'; did you mean 'margin'\?"),
        ("pml.RankedListLoss", {}, r"pml\.RankedListLoss: .*missing 2 required .* 'margin' and 'Tn'"),
        ("pml.ArcFaceLoss", {"proxy_update": "mean"}, r"'pml\.ArcFaceLoss' has no proxies: proxy_update must be none"),
        ("pml.NCALoss", {"miner": "pml.NoMiner"}, "no 'NoMiner' in its miners"),
        (
            "pml.NCALoss",
            {"miner": "pml.PairMarginMiner", "miner_kwargs": {"m": 1}},
            "PairMarginMiner has no keyword 'm'",
        ),
        ("pml.NCALoss", {"loss_kwargs": {"distance": "pml.LpDistanse"}}, "no 'LpDistanse' in its modules"),
        ("pml.NPairsLoss", {"miner": "pml.BaseMiner"}, r"pml\.NPairsLoss with pml\.BaseMiner can't be computed"),
    ],
)
def test_what_can_not_work_is_refused(loss, fields, message):
    with pytest.raises(ValueError, match=message):
        check_loss(VPTSPConfig(loss=loss, **{"proxy_update": "none", **fields}))


def test_without_the_library(monkeypatch, backbone_folder, tmp_path):
    model = VPTSPForMetricLearning.from_backbone(
        backbone_folder, proxy_update="none", num_classes=NUM_CLASSES, loss="pml.ArcFaceLoss"
    )
    model.retriever.save_pretrained(tmp_path)
    for name in [name for name in sys.modules if name.startswith("pytorch_metric_learning")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pytorch_metric_learning", None)
    with pytest.raises(ImportError, match=r"pml\.ArcFaceLoss needs .* pip install 'vptsp\[losses\]'"):
        check_loss(config_of("pml.ArcFaceLoss"))
    output = VPTSPModel.from_pretrained(tmp_path)(torch.randn(1, 3, 16, 16))  # a retriever needs none of it
    assert isinstance(output, VPTSPModelOutput)


class Images(torch.utils.data.Dataset):
    """Random images of five classes of four, each always the same."""

    labels = tuple(i // 4 for i in range(4 * NUM_CLASSES))

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, key):
        pixel_values = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(key.index))
        return {"pixel_values": pixel_values, "labels": self.labels[key.index]}


@pytest.mark.parametrize(
    "loss, loss_kwargs",
    [
        ("pml.ProxyAnchorLoss", None),
        ("pml.CrossBatchMemory", {"loss": "pml.ContrastiveLoss", "memory_size": 12}),
        ("recall_at_k", None),
    ],
)
def test_training_resumes_bit_for_bit(backbone_folder, tmp_path, loss, loss_kwargs):
    args = VPTSPTrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=4,
        max_steps=8,
        learning_rate=1e-2,
        proxy_learning_rate=0.5,
        save_strategy="steps",
        save_steps=5,
        eval_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    models, trainers = [], []
    for resume in (None, str(tmp_path / "checkpoint-5")):
        torch.manual_seed(0)
        model = VPTSPForMetricLearning.from_backbone(
            backbone_folder,
            proxy_update="none",
            num_classes=NUM_CLASSES,
            embedding_dim=WIDTH,
            loss=loss,
            loss_kwargs=loss_kwargs,
        )
        before = {name: p.detach().clone() for name, p in model.criterion.named_parameters()}
        trainer = VPTSPTrainer(model=model, args=args, train_dataset=Images())
        trainer.train(resume_from_checkpoint=resume)
        assert all(not torch.equal(p, before[name]) for name, p in model.criterion.named_parameters())
        models.append(model)
        trainers.append(trainer)
    for name, tensor in models[0].state_dict().items():
        assert torch.equal(models[1].state_dict()[name], tensor), name
    groups = trainers[0].optimizer.param_groups
    rates = {id(p): group["initial_lr"] for group in groups for p in group["params"]}
    assert {rates[id(p)] for p in models[0].criterion.parameters()} <= {0.5}
    assert {rates[id(p)] for p in models[0].vptsp.parameters() if p.requires_grad} == {1e-2}

    trainers[0].save_model(str(tmp_path / "shared"))
    shared = VPTSPModel.from_pretrained(tmp_path / "shared")
    assert not any("criterion" in name for name in shared.state_dict())


def test_single_images_of_classes_are_refused_where_pairs_are_needed(backbone_folder, tmp_path):
    args = VPTSPTrainingArguments(
        str(tmp_path), per_device_train_batch_size=4, images_per_class=1, use_cpu=True, eval_strategy="no"
    )
    fields = {"proxy_update": "none", "num_classes": NUM_CLASSES}
    model = VPTSPForMetricLearning.from_backbone(backbone_folder, loss="hyperbolic", **fields)
    with pytest.raises(ValueError, match="images_per_class must be >= 2 with the loss 'hyperbolic', got 1"):
        VPTSPTrainer(model=model, args=args, train_dataset=Images())
    model = VPTSPForMetricLearning.from_backbone(backbone_folder, loss="pml.ArcFaceLoss", **fields)
    VPTSPTrainer(model=model, args=args, train_dataset=Images())

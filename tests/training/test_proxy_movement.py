"""What ProxyMovement records, against the proxies of every step."""

import pytest
import torch
import torch.nn.functional as F
from transformers import TrainerCallback

from vptsp import VPTSPForMetricLearning, VPTSPTrainer, VPTSPTrainingArguments
from vptsp.training.proxy_movement import FILE_NAME, ProxyMovement, read_proxy_movement


class ReadyImages(torch.utils.data.Dataset):
    labels = torch.arange(24) % 4

    def __init__(self):
        self.pixels = torch.randn(24, 3, 16, 16)

    def __len__(self):
        return 24

    def __getitem__(self, key):
        return {"pixel_values": self.pixels[key.index], "labels": int(self.labels[key.index])}


class Snapshots(TrainerCallback):
    """Q, S and O of the start and of every step."""

    def __init__(self):
        self.taken = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        proxies = model.proxies
        original, row = proxies.original_proxies.detach(), getattr(proxies, "state", None)
        mixed = original if row is None else (1 - proxies.bias_ratio) * row + proxies.bias_ratio * original
        self.taken.append((F.normalize(mixed, dim=-1), None if row is None else row.clone(), original.clone()))

    on_step_end = on_train_begin


def train(backbone_folder, folder, proxy_update="gru_relu", resume=None, **fields):
    torch.manual_seed(0)
    model = VPTSPForMetricLearning.from_backbone(
        backbone_folder, num_classes=4, embedding_dim=8, num_prompts=2, num_class_prompts=2, proxy_update=proxy_update
    )
    values = {"per_device_train_batch_size": 4, "num_train_epochs": 1, "logging_steps": 2, "learning_rate": 1e-2}
    args = VPTSPTrainingArguments(
        str(folder), use_cpu=True, disable_tqdm=True, eval_strategy="no", **{"save_strategy": "no", **values, **fields}
    )
    snapshots = Snapshots()
    dataset = ReadyImages()
    trainer = VPTSPTrainer(model=model, args=args, train_dataset=dataset, callbacks=[ProxyMovement(), snapshots])
    trainer.train(resume_from_checkpoint=resume)
    return snapshots.taken, read_proxy_movement(folder / FILE_NAME)


def summary(first, second):
    cosines = [float(a @ b / a.norm() / b.norm()) for a, b in zip(first.double(), second.double(), strict=True)]
    low, middle, high = torch.tensor(cosines).quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
    return [sum(cosines) / len(cosines), low, middle, high]


def test_records_equal_what_the_proxies_did(backbone_folder, tmp_path):
    taken, records = train(backbone_folder, tmp_path)
    assert [record["step"] for record in records] == [2, 4, 6]
    assert [record["epoch"] for record in records] == pytest.approx([1 / 3, 2 / 3, 1])
    for record in records:
        step = record["step"]
        now, before, start = taken[step], taken[step - 2], taken[0]
        assert record["proxy_start"] == pytest.approx(summary(now[0], start[0]), abs=1e-5)
        assert record["proxy_before"] == pytest.approx(summary(now[0], before[0]), abs=1e-5)
        assert record["state_before"] == pytest.approx(summary(now[1], before[1]), abs=1e-5)
        assert record["state_original"] == pytest.approx(summary(now[1], now[2]), abs=1e-5)
    assert records[-1]["proxy_start"][0] < 0.999  # they do move


def test_without_semantic_proxies_there_is_no_state(backbone_folder, tmp_path):
    taken, records = train(backbone_folder, tmp_path, proxy_update="none")
    assert set(records[0]) == {"step", "epoch", "proxy_start", "proxy_before"}
    assert records[-1]["proxy_start"] == pytest.approx(summary(taken[-1][0], taken[0][0]), abs=1e-5)


def test_resuming_goes_on_with_the_records(backbone_folder, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 3}
    _, whole = train(backbone_folder, tmp_path, **saving)
    _, resumed = train(backbone_folder, tmp_path, resume=str(tmp_path / "checkpoint-3"), **saving)
    assert resumed[0] == whole[0]
    assert [record["step"] for record in resumed] == [2, 4, 6]
    assert resumed[2]["state_before"] == pytest.approx(whole[2]["state_before"], abs=1e-6)
    assert resumed[2]["proxy_start"] != whole[2]["proxy_start"]  # from where it resumed


def test_a_file_of_another_kind_is_refused(tmp_path):
    with pytest.raises(OSError):
        read_proxy_movement(tmp_path / FILE_NAME)

"""Trainers on seeded noise, for tests of what arguments do."""

import torch

from vptsp import VPTSPForMetricLearning, VPTSPTrainer, VPTSPTrainingArguments


class Images(torch.utils.data.Dataset):
    """Seeded noise of three classes, as ready float images."""

    labels = (0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2)

    def __len__(self):
        return 12

    def __getitem__(self, key):
        index = getattr(key, "index", key)
        generator = torch.Generator().manual_seed(index)
        return {"pixel_values": torch.randn(3, 16, 16, generator=generator), "labels": self.labels[index]}

    def evaluation_batches(self, batch_size):
        return (list(range(start, min(start + batch_size, 12))) for start in range(0, 12, batch_size))


def make_args(folder, **fields):
    values = {"per_device_train_batch_size": 4, "eval_strategy": "no", "save_strategy": "no", "use_cpu": True}
    return VPTSPTrainingArguments(**{**values, "output_dir": str(folder), "disable_tqdm": True, **fields})


def make_model(backbone_folder, **fields):
    torch.manual_seed(0)
    fields = {"num_classes": 3, "embedding_dim": 8, "num_prompts": 2, "num_class_prompts": 1, **fields}
    return VPTSPForMetricLearning.from_backbone(backbone_folder, **fields)


def make_trainer(model, folder, trainer=None, **fields):
    options = {"train_dataset": Images(), "eval_dataset": Images(), **(trainer or {})}
    return VPTSPTrainer(model, make_args(folder, **fields), **options)

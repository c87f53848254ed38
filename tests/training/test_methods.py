"""Every configuration of `configs/`: what it says, what it tunes and ships at full size, and real training steps.

The published counts of tuned parameters are in `docs/methods.md`, whose table is checked here against the models.
"""

import functools
import gc
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import tiny_vit_config
from transformers import SiglipVisionConfig, ViTConfig

from vptsp import VPTSPConfig, VPTSPForMetricLearning, VPTSPTrainer, train
from vptsp.training.run import build_model, describe_backbone, print_summary
from vptsp.training.run_arguments import parse_arguments
from vptsp.training.run_errors import ConfigError
from vptsp.training.tuned_counts import tuned_counts


ROOT = Path(__file__).resolve().parents[2]
CONFIGS = {str(p.relative_to(ROOT / "configs").with_suffix("")): p for p in sorted(ROOT.glob("configs/**/*.yaml"))}
METHODS = [name for name in CONFIGS if name.startswith("table1/")]
SMALL = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
BACKBONES = {
    "timm/vit_small_patch16_224.augreg_in21k": SMALL,
    "timm/vit_base_patch16_224.augreg_in21k": {},
    "google/vit-base-patch16-224-in21k": {},
    "runs/quickstart/backbone": {
        "hidden_size": 64,
        "num_attention_heads": 2,
        "num_hidden_layers": 4,
        "image_size": 32,
    },
}
TRAIN_CLASSES = {
    "cub": 100,
    "cars": 98,
    "sop": 11_318,
    "inshop": 3_997,
    "inaturalist": 5_690,
    "digits": 4,
    "folder": 9,
    "table": 9,
}

PUBLISHED_SETTINGS = """
                     CUB S   CUB B   Cars S  Cars B  SOP S   SOP B   In-S S  In-S B  iNat B
optim                sgd     sgd     adamw   adamw   adamw   adamw   adamw   adamw   adamw
learning_rate        5e-3    1e-3    5e-4    5e-4    1e-4    1e-4    1e-4    1e-4    1e-4
proxy_learning_rate  0.1     0.01    0.01    0.01    0.05    0.05    0.05    0.05    0.05
cosine_epochs        50      100     50      50      120     120     100     100     50
min_learning_rate    1e-8    1e-7    1e-6    1e-6    5e-5    1e-7    5e-6    1e-6    1e-6
weight_decay         1e-6    1e-6    0       0       1e-4    1e-4    1e-7    0       0
num_train_epochs     15      60      50      60      120     120     80      75      40
batch                64/2    64/2    64/2    64/2    32/1    32/1    32/1    32/1    64/1
prompts              10,12,0 20,12,0 80,11,2 80,10,2 90,12,0 90,12,5 90,12,0 90,12,0 90,12,5
class_prompts        3,12,0  5,4,5   50,8,2  50,8,2  5,12,0  5,8,0   80,12,0 60,12,0 10,12,0
proxy_bias_ratio     0.5     0.4     0.7     0.1     0.2     0.2     0.2     0.3     0.2
rnn_dropout          0       0       0       0       0.1     0.5     0.1     0       0
checkpointing        no      no      no      no      yes     yes     yes     yes     yes
embedding_dim        384     512     384     512     384     512     384     512     512
"""
PUBLISHED_NAMES = [f"{name}_vit{size}16" for name in ("cub", "cars", "sop", "inshop") for size in "sb"]
PUBLISHED_NAMES += ["inaturalist_vitb16"]


def parsed(name):
    """Model, training and data arguments of a configuration, as `train.py` reads them; on the CPU."""
    model_fields, training_args, data_args, _ = parse_arguments([str(CONFIGS[name]), "--use_cpu"])
    return model_fields, training_args, data_args


def full_size(name, num_classes=None):
    """The `VPTSPConfig` of a configuration, with its real backbone's shape and the data set's number of classes."""
    model_fields, _, data_args = parsed(name)
    backbone_config = ViTConfig(**BACKBONES[model_fields["backbone"]])
    num_classes = num_classes or TRAIN_CLASSES[data_args.dataset_name]
    return VPTSPConfig(**{**model_fields, "backbone_config": backbone_config, "num_classes": num_classes})


class Noise(torch.utils.data.Dataset):
    """As many images as two batches need."""

    def __init__(self, training_args, image_size):
        num_classes = training_args.per_device_train_batch_size // training_args.images_per_class
        self.num_classes = max(num_classes, 2)
        self.labels = torch.arange(self.num_classes).repeat_interleave(2 * training_args.images_per_class)
        self.image_size = image_size

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, key):
        pixel_values = torch.randint(256, (3, self.image_size, self.image_size), dtype=torch.uint8)
        return {"pixel_values": pixel_values, "labels": int(self.labels[int(key.index)])}


def train_steps(model, training_args, dataset, folder, steps):
    """Real steps of the configuration's own training: its optimiser, schedule and (if any) gradient checkpointing."""
    training_args.output_dir = str(folder)
    training_args.max_steps = steps
    training_args.eval_strategy = training_args.save_strategy = "no"
    training_args.load_best_model_at_end = False
    training_args.disable_tqdm = True
    trainer = VPTSPTrainer(model=model, args=training_args, train_dataset=dataset)
    trainer.train()
    return trainer


@pytest.mark.parametrize("name", CONFIGS)
def test_parses_to_what_it_says(name):
    given = yaml.safe_load(CONFIGS[name].read_text())
    model_fields, training_args, data_args, run_args = parse_arguments([str(CONFIGS[name])])
    values = {**vars(training_args), **vars(data_args), **vars(run_args), **model_fields}
    for field, value in given.items():
        assert values[field] == value or values[field] == pytest.approx(value), field
    assert full_size(name).num_classes == TRAIN_CLASSES[data_args.dataset_name]
    recall_at = {"sop": [1, 10, 100, 1000], "inshop": [1, 10, 20, 30, 40, 50]}
    assert training_args.recall_at == recall_at.get(data_args.dataset_name, [1, 2, 4, 8])


@pytest.mark.parametrize("column", range(9), ids=PUBLISHED_NAMES)
def test_published_setting(column):
    rows = [re.split(r"\s{2,}|(?<=\d)\s(?=\d)", line.strip()) for line in PUBLISHED_SETTINGS.strip().splitlines()[1:]]
    expected = {row[0]: row[1 + column] for row in rows}
    model_fields, training_args, data_args = parsed(PUBLISHED_NAMES[column])
    config = full_size(PUBLISHED_NAMES[column])
    assert training_args.optim == {"sgd": "sgd", "adamw": "adamw_torch"}[expected["optim"]]
    assert training_args.lr_scheduler_type == "cosine"
    for field in ("learning_rate", "proxy_learning_rate", "cosine_epochs", "min_learning_rate", "weight_decay"):
        assert getattr(training_args, field) == float(expected[field]), field
    assert training_args.num_train_epochs == int(expected["num_train_epochs"])
    batch = (training_args.per_device_train_batch_size, training_args.images_per_class)
    assert batch == tuple(map(int, expected["batch"].split("/")))
    assert (config.num_prompts, config.prompt_depth, config.prompt_step) == ints(expected["prompts"])
    class_prompts = (config.num_class_prompts, config.class_prompt_depth, config.class_prompt_step)
    assert class_prompts == ints(expected["class_prompts"])
    for field in ("proxy_bias_ratio", "rnn_dropout", "embedding_dim"):
        assert getattr(config, field) == float(expected[field]), field
    assert training_args.gradient_checkpointing == (expected["checkpointing"] == "yes")
    offloaded = "class_prompt_store: offloaded" in CONFIGS[PUBLISHED_NAMES[column]].read_text()
    assert offloaded == (expected["checkpointing"] == "yes")
    assert (config.proxy_update, config.proxy_normalization, config.bitfit) == ("gru_relu", "per_batch", True)
    assert (config.proxy_range, config.proxy_head, config.loss) == ("all", "own", "proxy_anchor")
    assert (config.loss_alpha, config.loss_delta, config.proxy_anchor_reduction) == (32, 0.1, "all_classes")
    assert data_args.image_size == 224
    size = {"s": "small", "b": "base"}[PUBLISHED_NAMES[column][-3]]
    assert model_fields["backbone"] == f"timm/vit_{size}_patch16_224.augreg_in21k"


def ints(text):
    return tuple(map(int, text.split(",")))


def test_the_last_row_of_table_1_is_the_published_setting():
    row, setting = full_size("table1/vptsp_g_bitfit").to_dict(), full_size("cub_vits16").to_dict()
    assert row == setting


def closed_form(name):
    """Tuned and training-only parameters of a row of table 1 at ViT-S/16, E = 384, C = 100, by arithmetic."""
    d, e, layers, classes, hidden = 384, 384, 12, 100, 1536
    head = 2 * d + d * e + e
    biases = d + layers * (d + 3 * d + d + d + hidden + d) + d  # patches; norm, qkv, out, norm, MLP; final norm
    weights = 3 * 16 * 16 * d + d + 197 * d + layers * (d + 4 * d * d + d + 2 * d * hidden) + d
    adapter = d * 256 + 256 + 256 * d + d + 2 * d
    parts = {
        "full": biases + weights,
        "linear_probe": 0,
        "bitfit": biases,
        "adapter": 7 * adapter,
        "adapter_bitfit": adapter + biases,
        "vpt": layers * 10 * d,
        "vpt_shallow": 10 * d,
        "lora": layers * 2 * 8 * (d + d),
    }
    semantic = classes * layers * 3 * d + head  # class prompts and the proxy head
    training_only = {"vptsp_m": semantic, "vptsp_g": semantic + 6 * e * e + 3 * e}
    row = name.removeprefix("table1/")
    method = row if row in parts else row.removesuffix("_bitfit")
    tuned = parts["vpt"] if method.startswith("vptsp") else parts[method]
    if row not in parts and row.endswith("_bitfit"):
        tuned += biases
    return head + tuned, classes * e + training_only.get(method, 0)


@functools.cache
def counts(name):
    with torch.device("meta"):
        model = VPTSPForMetricLearning(full_size(name))
    model.config.backbone = "named"  # as it is when the weights come from a repository
    return tuned_counts(model)


@pytest.mark.parametrize("name", METHODS)
def test_counts_at_full_size(name):
    summary = counts(name)
    tuned, training_only = closed_form(name)
    assert summary["tuned_parameters"] == tuned
    assert summary["training_only_parameters"] == training_only
    assert summary["shipped_parameters"] == tuned  # with full fine-tuning that is everything
    assert summary["shipped_megabytes"] == pytest.approx(4e-6 * tuned)
    assert (summary["tuned_share"] == 1) == (name == "table1/full")


def test_summary_says_what_is_shipped(capsys):
    _, training_args, _ = parsed("table1/vptsp_m")
    print_summary(counts("table1/vptsp_m"), {"train": range(5), "test": range(7)}, training_args, "none")
    assert capsys.readouterr().out.splitlines() == [
        "images            train 5, test 7",
        "tuned             194,688 of 21,860,352 parameters (0.89%)",
        "to ship           194,688 parameters, 0.78 MB",
        "for training only 1,569,408 parameters (proxies, and what updates them)",
        "class prompts     none",
        f"results           {training_args.output_dir}",
    ]


def test_a_backbone_is_described():
    config = VPTSPConfig(backbone_config=SiglipVisionConfig(), backbone="google/siglip-base-patch16-224")
    config.backbone_config.image_size = 384
    assert describe_backbone(config) == (
        "google/siglip-base-patch16-224: siglip_vision_model, 12 layers of width 768, patches of 16, images of 384 "
        "pixels, pooling head"
    )
    config = VPTSPConfig(backbone_config=tiny_vit_config(), pooling="mean")
    assert describe_backbone(config).startswith("random weights: vit, 4 layers of width 24, patches of 8, ")


def test_a_backbone_without_a_name_is_shipped_too():
    model = VPTSPForMetricLearning(VPTSPConfig(backbone_config=tiny_vit_config(), num_classes=3))
    summary = tuned_counts(model)
    assert summary["shipped_parameters"] == summary["retriever_parameters"] > summary["tuned_parameters"]


def test_documented_counts_are_the_real_ones():
    """The table in `docs/methods.md`: shipped, for training only, in all."""
    text = (ROOT / "docs" / "methods.md").read_text()
    rows = dict(re.findall(r"^\| `(table1/\w+)` \|([^\n]*)\|$", text, flags=re.MULTILINE))
    assert set(rows) == set(METHODS)
    for name, cells in rows.items():
        shipped, training_only, total = (int(cell.replace(",", "")) for cell in cells.split("|")[:3])
        summary = counts(name)
        assert (shipped, training_only) == (summary["shipped_parameters"], summary["training_only_parameters"]), name
        assert total == shipped + training_only, name


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in METHODS])
def test_builds_at_full_size(name):
    summary = counts(name)
    assert 0 < summary["tuned_share"] < 0.08
    if name in PUBLISHED_NAMES:
        config = full_size(name)
        prompts = sum(config.class_prompt_lengths) * config.backbone_config.hidden_size * config.num_classes
        head, e = config.pooled_dim * (config.embedding_dim + 2) + config.embedding_dim, config.embedding_dim
        assert summary["training_only_parameters"] == prompts + head + 6 * e * e + 3 * e + config.num_classes * e


@pytest.fixture(scope="module")
def quick_collection():
    """Every run of the Trainer collects garbage; this spares it looking at all that the imports have brought."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def twelve_layers(tmp_path_factory):
    """A tiny backbone, pretrained as far as anyone can tell, with as many layers as the real ones."""
    from transformers import ViTModel

    torch.manual_seed(2)
    folder = tmp_path_factory.mktemp("twelve")
    ViTModel(tiny_vit_config(num_hidden_layers=12, hidden_size=12)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", CONFIGS)
def test_trains_a_small_model(name, twelve_layers, tmp_path, quick_collection):
    """Two steps of the configuration's own training on a backbone of its depth, scaled down in width and image."""
    model_fields, training_args, _ = parsed(name)
    training_args.per_device_train_batch_size = 4 * training_args.images_per_class
    small = {"backbone": str(twelve_layers), "backbone_config": None, "embedding_dim": 10, "adapter_dim": 6}
    dataset = Noise(training_args, image_size=16)
    model = build_model({**model_fields, **small}, dataset.num_classes, 16)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    trainer = train_steps(model, training_args, dataset, tmp_path, steps=2)
    assert trainer.state.global_step == 2
    tuned, prompted = model.tuned_names(), model.config.num_prompts > 0
    for key, tensor in model.state_dict().items():
        if key not in tuned:
            assert torch.equal(tensor, before[key]), f"{key} is frozen"
        elif "k_proj" not in key:  # the bias of keys has no effect
            assert not torch.equal(tensor, before[key]), f"{key} is tuned"
    assert ("vptsp.prompts.tokens" in before) == prompted
    assert model.config.changes_backbone == any(".backbone." in key for key in tuned)
    if model.config.changes_backbone:
        with pytest.raises(ValueError, match="the backbone itself has been tuned"):
            trainer.evaluate_backbone()


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_trains_at_full_size(name, tmp_path):
    """One step at full size, on random weights; the batch has two classes, and the tables of classes are as long."""
    _, training_args, data_args = parsed(name)
    training_args.per_device_train_batch_size = 2 * training_args.images_per_class
    dataset = Noise(training_args, data_args.image_size)
    model = VPTSPForMetricLearning(full_size(name, num_classes=2))
    before = model.vptsp.head.projection.weight.clone()
    trainer = train_steps(model, training_args, dataset, tmp_path, steps=1)
    assert trainer.state.global_step == 1
    assert not torch.equal(model.vptsp.head.projection.weight, before)


def test_any_backbone_and_any_option(twelve_layers):
    options = [
        "--backbone",
        str(twelve_layers),
        "--num_prompts",
        "4",
        "--bitfit",
        "true",
        "--adapter_mode",
        "sequential",
    ]
    model_fields, *_ = parse_arguments([str(CONFIGS["table1/adapter"]), *options, "--lora_targets", "fc1", "fc2"])
    model = build_model(model_fields, num_classes=3, image_size=16)
    config = model.config
    assert (config.num_prompts, config.prompt_depth, config.bitfit) == (4, 12, True)
    assert (config.adapter_layers, config.adapter_mode, config.lora_targets) == (7, "sequential", ["fc1", "fc2"])


def test_presets_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    by_name, *_ = parse_arguments(["table1/vpt"])
    by_path, *_ = parse_arguments([str(CONFIGS["table1/vpt"])])
    assert by_name == by_path
    with pytest.raises(ConfigError, match=r"no configuration table1/vtp, .* did you mean 'table1/vpt'"):
        parse_arguments(["table1/vtp"])


def test_a_missing_package_is_one_line(twelve_layers, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "peft", None)
    options = ["--data_cache_dir", str(tmp_path), "--output_dir", str(tmp_path / "run"), "--image_size", "16"]
    options += ["--backbone", str(twelve_layers), "--lora_rank", "2", "--use_cpu"]
    with pytest.raises(SystemExit):
        train.main(["quickstart", *options])
    assert "error: lora_rank is 2, which needs the package peft: pip install peft" in capsys.readouterr().err

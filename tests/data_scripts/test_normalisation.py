"""What becomes of pixels: the same in training, in what is saved and in embedding, or it is refused."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import tiny_vit_config
from hub_stand_in import HubStandIn, Repository
from PIL import Image
from transformers import AutoImageProcessor, ViTModel
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from vptsp import (
    Embedder,
    EvalTransform,
    VPTSPForMetricLearning,
    VPTSPModel,
    VPTSPTrainer,
    VPTSPTrainingArguments,
    train,
)
from vptsp.data_scripts.preprocessing import build_image_processor, load_image_processor, normalisation_for
from vptsp.deploy.export import export_metadata
from vptsp.training.run import prepare
from vptsp.training.run_arguments import parse_arguments


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
COMMIT = "1234567890" * 4
PROCESSORS = {
    "mean and std": {"image_mean": MEAN, "image_std": STD},
    "numbers": {"image_mean": 0.4, "image_std": 0.25},
    "arrays": {"image_mean": np.array(MEAN), "image_std": np.array(STD, dtype=np.float32)},
    "no normalisation": {"do_normalize": False},
    "no rescaling": {"do_rescale": False, "image_mean": (123.7, 116.3, 103.5), "image_std": (58.4, 57.1, 57.4)},
    "another factor": {"rescale_factor": 1 / 127.5, "image_mean": 1.0, "image_std": 1.0},
}


@pytest.fixture
def pixels():
    """Every value of every channel, as an image of the model's size would have them."""
    values = np.arange(3 * 256, dtype=np.int64).reshape(16, 16, 3) * 7 % 256
    return values.astype(np.uint8)


def processed(processor, pixels):
    return processor(images=Image.fromarray(pixels), do_resize=False, return_tensors="pt").pixel_values[0]


def save_processor(folder, **values):
    ViTImageProcessorPil(**values).save_pretrained(folder)


def backbone_with(folder, **values):
    ViTModel(tiny_vit_config()).save_pretrained(folder)
    save_processor(folder, **values)
    return folder


def make_trainer(backbone, folder, **options):
    model = VPTSPForMetricLearning.from_backbone(backbone, num_classes=3, num_prompts=2, embedding_dim=6)
    args = VPTSPTrainingArguments(str(folder), use_cpu=True, eval_strategy="no", save_strategy="no")
    return VPTSPTrainer(model, args, **options)


def normalised_by(trainer, pixels):
    batch = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    return trainer.on_device({"pixel_values": batch})["pixel_values"][0]


# ---- One way for all


@pytest.mark.parametrize("values", PROCESSORS.values(), ids=PROCESSORS)
def test_training_does_what_the_processor_does(values, pixels, tmp_path, backbone_folder):
    processor = ViTImageProcessorPil(**values)
    trainer = make_trainer(backbone_folder, tmp_path, processing_class=processor)
    got, expected = normalised_by(trainer, pixels), processed(processor, pixels)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=3e-7, atol=3e-7)
    if processor.do_rescale and processor.rescale_factor == 1 / 255:
        assert torch.equal(got, expected)


@pytest.mark.parametrize("values", PROCESSORS.values(), ids=PROCESSORS)
def test_what_is_saved_does_what_the_backbones_does(values, pixels, tmp_path):
    backbone = backbone_with(tmp_path / "backbone", **values)
    expected = processed(AutoImageProcessor.from_pretrained(backbone, backend="pil"), pixels)
    build_image_processor(16, 18, backbone).save_pretrained(tmp_path / "saved")
    saved = AutoImageProcessor.from_pretrained(tmp_path / "saved", backend="pil")
    torch.testing.assert_close(processed(saved, pixels), expected, rtol=3e-7, atol=3e-7)
    without_one = make_trainer(backbone, tmp_path / "run")
    torch.testing.assert_close(normalised_by(without_one, pixels), expected, rtol=3e-7, atol=3e-7)
    embedder = Embedder.from_pretrained(backbone, resize_size=16, device="cpu")
    torch.testing.assert_close(embedder.preprocess(Image.fromarray(pixels)), expected, rtol=3e-7, atol=3e-7)


def test_exported_files_say_what_is_done(backbone_folder):
    model = VPTSPModel.from_backbone(backbone_folder)
    processor = build_image_processor(16, 18)
    assert json.loads(export_metadata(model, processor)["rescale_factor"]) == 1 / 255
    processor.image_mean, processor.do_rescale = 127.5, False
    metadata = export_metadata(model, processor)
    assert json.loads(metadata["image_mean"]) == [127.5] * 3
    assert json.loads(metadata["rescale_factor"]) == 1
    assert metadata["resample"] == "bilinear"
    processor.do_center_crop = False
    with pytest.raises(ValueError, match="must scale the short side and crop the centre"):
        export_metadata(model, processor)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"do_rescale": False, "do_normalize": False}, "must rescale or normalise"),
        ({"image_mean": (0.5, 0.5)}, r"image_mean must be a number or three of them, got \(0.5, 0.5\)"),
        ({"image_std": (0.2, 0, 0.2)}, "image_std must not hold 0"),
        ({"image_std": float("nan")}, "image_std must be a number"),
        ({"image_mean": "grey"}, "image_mean must be a number"),
        ({"rescale_factor": 0}, "rescale_factor must be a number > 0, got 0"),
        ({"do_flip_channel_order": True}, "has do_flip_channel_order, which training does not do"),
    ],
)
def test_what_can_not_be_done_is_refused(values, message, tmp_path, backbone_folder):
    processor = build_image_processor(16, 18)
    vars(processor).update(values)
    with pytest.raises(ValueError, match=message):
        make_trainer(backbone_folder, tmp_path, processing_class=processor)
    with pytest.raises(ValueError, match=message):
        Embedder(VPTSPModel.from_backbone(backbone_folder), processor, "name")


def test_processing_class_of_another_kind_is_refused(tmp_path, backbone_folder):
    with pytest.raises(ValueError, match="the image processor object must rescale or normalise"):
        make_trainer(backbone_folder, tmp_path, processing_class=object())


@pytest.mark.parametrize("sets", ["one", "query and gallery"])
@pytest.mark.parametrize(
    "values, message",
    [
        ({}, None),
        ({"resample": 3}, r"short side 18, centre \(16, 16\), bicubic"),
        ({"size": {"shortest_edge": 20}}, "short side 20, centre"),
        ({"size": {"height": 16, "width": 16}}, "short side None, centre"),
        ({"do_resize": False}, "short side None, centre"),
        ({"crop_size": {"height": 16, "width": 8}}, r"centre \(16, 8\)"),
        ({"do_center_crop": False}, "short side 18, centre None"),
    ],
)
def test_what_is_saved_cuts_as_evaluation_does(values, message, sets, tmp_path, backbone_folder):
    shipped = {"size": {"shortest_edge": 18}, "do_center_crop": True, "crop_size": {"height": 16, "width": 16}}
    images = SimpleNamespace(transform=EvalTransform(18, 16))
    options = {
        "processing_class": ViTImageProcessorPil(**{**shipped, **values}),
        "eval_dataset": images if sets == "one" else {"query": images, "gallery": images},
    }
    if message is None:
        make_trainer(backbone_folder, tmp_path, **options)
        return
    with pytest.raises(ValueError, match=r"in another way than EvalTransform\(resize=18, size=16\).*" + message):
        make_trainer(backbone_folder, tmp_path, **options)


# ---- Only "there is none" means a default


def test_no_image_processor_is_said(backbone_folder, tmp_path, caplog, pixels):
    assert build_image_processor(16, 18, backbone_folder).image_mean == (0.5, 0.5, 0.5)
    assert f"the backbone '{backbone_folder}' has no image processor: mean and std of images are 0.5" in caplog.text
    caplog.clear()
    trainer = make_trainer(backbone_folder, tmp_path)
    assert not caplog.records, "images may come normalised"
    normalised_by(trainer, pixels)
    assert "has no image processor" in caplog.text
    assert "there is no processing_class: images get the backbone's Normalisation(mean=(0.5, 0.5, 0.5)" in caplog.text


def test_a_trainer_without_processor_takes_the_backbones(tmp_path, pixels, caplog):
    trainer = make_trainer(backbone_with(tmp_path / "backbone", image_mean=MEAN, image_std=STD), tmp_path / "run")
    expected = (torch.from_numpy(pixels).permute(2, 0, 1) / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(
        STD
    )[:, None, None]
    torch.testing.assert_close(normalised_by(trainer, pixels), expected)
    assert "mean=(0.485, 0.456, 0.406)" in caplog.text


def test_a_trainer_takes_a_random_backbone_with_a_word(caplog):
    model = VPTSPModel(VPTSPModel.config_class(backbone_config=tiny_vit_config()))
    with caplog.at_level(logging.WARNING):
        assert normalisation_for(None, model.config).mean == (0.5, 0.5, 0.5)
    assert "neither an image processor nor the name of a backbone" in caplog.text


@pytest.mark.parametrize("text", ['{"image_mean": [0.1, 0.2', "", "[1, 2]", '{"image_processor_type": "Unheard"}'])
def test_an_image_processor_that_can_not_be_read(text, tmp_path, pixels):
    backbone = backbone_with(tmp_path / "backbone", image_mean=MEAN, image_std=STD)
    (backbone / "preprocessor_config.json").write_text(text)
    message = r"the image processor of '.*backbone' can't be (read|used)"
    with pytest.raises((OSError, ValueError), match=message):
        build_image_processor(16, 18, backbone)
    with pytest.raises((OSError, ValueError), match=message):
        Embedder.from_pretrained(backbone)
    with pytest.raises((OSError, ValueError), match=message):
        normalised_by(make_trainer(backbone, tmp_path / "run"), pixels)


def test_a_run_says_what_it_takes(tmp_path, capsys, caplog, monkeypatch):
    for label in "abcd":
        for i in range(2):
            path = tmp_path / "images" / label / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (20, 18), (40 * i, 90, 30)).save(path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    backbone = backbone_with(tmp_path / "backbone")
    data = [
        "--data_dir",
        str(tmp_path / "images"),
        "--image_size",
        "16",
        "--use_cpu",
        "--per_device_train_batch_size",
        "4",
    ]
    command = [*data, "--backbone", str(backbone), "--output_dir", str(tmp_path / "run")]
    (backbone / "preprocessor_config.json").write_text("{")
    with pytest.raises(SystemExit) as stopped:
        train.main(command)
    assert stopped.value.code == 2
    assert "train.py: error: the image processor of" in capsys.readouterr().err
    (backbone / "preprocessor_config.json").unlink()
    prepare(*parse_arguments(command)[:3])
    assert f"the backbone '{backbone}' has no image processor: mean and std of images are 0.5" in caplog.text


def test_unreadable_processor_of_a_retriever(backbone_folder, tmp_path, capsys):
    from vptsp.deploy import export

    VPTSPModel.from_backbone(backbone_folder).save_pretrained(tmp_path / "retriever")
    with pytest.raises(OSError, match="has no image processor"):
        Embedder.from_pretrained(tmp_path / "retriever")
    (tmp_path / "retriever" / "preprocessor_config.json").write_text("{")
    with pytest.raises(OSError, match=r"the image processor of '.*retriever' can't be read"):
        Embedder.from_pretrained(tmp_path / "retriever")
    with pytest.raises(SystemExit):
        export.main([str(tmp_path / "retriever"), "--format", "torch", "--output", str(tmp_path / "a.pt2")])
    assert "can't be read" in capsys.readouterr().err
    assert not (tmp_path / "a.pt2").exists()


def test_custom_code_of_a_processor_is_never_offered(backbone_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("offered to run the processor's code"))
    backbone = backbone_with(tmp_path / "backbone")
    (backbone / "evil.py").write_text("raise SystemExit('ran')")
    values = {"auto_map": {"AutoImageProcessor": "evil.Evil"}, "image_processor_type": "Evil"}
    (backbone / "preprocessor_config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"the image processor of .* can't be used: .*custom code"):
        build_image_processor(16, 18, backbone)
    VPTSPModel.from_backbone(backbone_folder).save_pretrained(tmp_path / "retriever")
    (tmp_path / "retriever" / "preprocessor_config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"the image processor of .* can't be used: .*custom code"):
        Embedder.from_pretrained(tmp_path / "retriever")


def cached_repository(cache, files, absent=()):
    """A repository `ann/backbone` as the Hub's cache holds it; `absent` files are known not to exist."""
    folder = cache / "models--ann--backbone"
    for name, content in {"refs/main": COMMIT, **{f"snapshots/{COMMIT}/{n}": c for n, c in files.items()}}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    for name in absent:
        (folder / ".no_exist" / COMMIT).mkdir(parents=True, exist_ok=True)
        (folder / ".no_exist" / COMMIT / name).touch()


@pytest.mark.parametrize("revision", [None, COMMIT])
def test_offline_cache(tmp_path, caplog, revision):
    """The tests run offline: a file that nobody fetched may exist for all that is known."""
    config = tiny_vit_config().to_json_string(use_diff=False)
    cached_repository(tmp_path / "unknown", {"config.json": config})
    with pytest.raises(OSError, match="the image processor of 'ann/backbone' can't be read"):
        build_image_processor(16, 18, "ann/backbone", revision, cache_dir=tmp_path / "unknown")
    files = ("preprocessor_config.json", "processor_config.json")
    cached_repository(tmp_path / "half", {"config.json": config}, absent=files[1:])
    with pytest.raises(OSError, match="the image processor of 'ann/backbone' can't be read"):
        load_image_processor("ann/backbone", revision, cache_dir=tmp_path / "half")
    assert not caplog.records
    cached_repository(tmp_path / "none", {"config.json": config}, absent=files)
    processor = build_image_processor(16, 18, "ann/backbone", revision, cache_dir=tmp_path / "none")
    assert processor.image_mean == (0.5, 0.5, 0.5)
    assert "the backbone 'ann/backbone' has no image processor" in caplog.text
    saved = ViTImageProcessorPil(image_mean=MEAN, image_std=STD).to_json_string()
    cached_repository(tmp_path / "there", {"config.json": config, files[0]: saved})
    assert build_image_processor(16, 18, "ann/backbone", revision, cache_dir=tmp_path / "there").image_mean == MEAN


READ = """
import logging, sys
logging.basicConfig(stream=sys.stdout, format="%(message)s")
from vptsp.data_scripts.preprocessing import build_image_processor
for name, options in (("ann/open", {}), ("ann/bare", {}), ("ann/closed", {}), ("ann/closed", {"token": sys.argv[1]})):
    try:
        print(name, build_image_processor(16, 18, name, **options).image_mean)
    except OSError as error:
        print(name, str(error).partition(":")[0])
"""


def test_private_repository_needs_its_token(tmp_path):
    config = tiny_vit_config().to_json_string(use_diff=False).encode()
    saved = ViTImageProcessorPil(image_mean=MEAN, image_std=STD).to_json_string().encode()
    with HubStandIn({"ann": "hf_ann"}) as hub:
        for name in ("open", "bare", "closed"):
            files = {"config.json": config} | ({} if name == "bare" else {"preprocessor_config.json": saved})
            hub.repositories[f"ann/{name}"] = repository = Repository(private=name == "closed")
            repository.add_commit("main", {path: hub.keep(content) for path, content in files.items()})
        names = ("HF_", "TRANSFORMERS_")
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(names)}
        environment = {**inherited, **hub.environment(tmp_path), "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[3])
        finished = subprocess.run(
            [sys.executable, "-c", READ, "hf_ann"], env=environment, capture_output=True, text=True, cwd=tmp_path
        )
    assert finished.returncode == 0, finished.stderr
    lines = [line for line in finished.stdout.splitlines() if line.startswith(("ann/", "the backbone"))]
    assert lines[0] == f"ann/open {MEAN}"
    assert lines[1].startswith("the backbone 'ann/bare' has no image processor")
    assert lines[2] == "ann/bare (0.5, 0.5, 0.5)"
    assert lines[3].startswith("ann/closed ann/closed is not a local folder and is not a valid model identifier")
    assert lines[4] == f"ann/closed {MEAN}"

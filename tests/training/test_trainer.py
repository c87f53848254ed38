"""VPTSPTrainer against a plain training loop, and what it saves, loads, evaluates and refuses."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import TrainerCallback

from vptsp import (
    ClassBalancedBatchSampler,
    EvalTransform,
    ImageDataset,
    StreamedImages,
    TrainTransform,
    VPTSPForMetricLearning,
    VPTSPModel,
    VPTSPTrainer,
    VPTSPTrainingArguments,
    retrieval_metrics,
)
from vptsp.data_scripts.preprocessing import build_image_processor


TRAIN_CLASSES = 5


def make_model(backbone_folder, **fields):
    values = {"num_classes": TRAIN_CLASSES, "embedding_dim": 12, "num_prompts": 3, "num_class_prompts": 2}
    torch.manual_seed(0)
    return VPTSPForMetricLearning.from_backbone(backbone_folder, **{**values, **fields})


def make_args(folder, **fields):
    values = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "images_per_class": 2,
        "num_train_epochs": 2,
        "learning_rate": 1e-2,
        "proxy_learning_rate": 1e-1,
        "eval_strategy": "no",
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1,
    }
    return VPTSPTrainingArguments(**{**values, **fields})


def plain_loop(model, args, dataset, epochs=2, stop_after=None):
    """The same training, written out: sampler, normalisation, loss, backward, commit, optimiser, schedule."""
    slow = [p for n, p in model.named_parameters() if p.requires_grad and n != "proxies.original_proxies"]
    groups = [
        {"params": slow, "lr": args.learning_rate},
        {"params": [model.proxies.original_proxies], "lr": args.proxy_learning_rate},
    ]
    if args.optim == "sgd":
        optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=args.weight_decay)
    else:
        optimizer = torch.optim.AdamW(groups, weight_decay=args.weight_decay)
    bases = [group["lr"] for group in optimizer.param_groups]
    sampler = ClassBalancedBatchSampler(dataset.labels, 4, args.images_per_class, seed=args.seed)
    accumulation = args.gradient_accumulation_steps
    steps_per_epoch = math.ceil(len(sampler) / accumulation)
    decay_steps = (args.cosine_epochs or epochs) * steps_per_epoch
    model.train()
    losses, step = [], 0
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        for start in range(0, len(batches), accumulation):
            chunk = batches[start : start + accumulation]
            total = 0.0
            for keys in chunk:
                examples = [dataset[key] for key in keys]
                pixel_values = torch.stack([e["pixel_values"] for e in examples]).float() / 255
                labels = torch.tensor([e["labels"] for e in examples])
                output = model((pixel_values - 0.5) / 0.5, labels, images_per_class=args.images_per_class)
                (output.loss / len(chunk)).backward()
                model.commit_proxies(output)
                total += output.loss.item() / len(chunk)
            fraction = min(step / decay_steps, 1)
            for group, base in zip(optimizer.param_groups, bases, strict=True):
                floor = args.min_learning_rate
                group["lr"] = floor + (base - floor) * (1 + math.cos(math.pi * fraction)) / 2
            optimizer.step()
            optimizer.zero_grad()
            losses.append(total)
            step += 1
    return losses


def assert_same_state(actual, expected, **tolerance):
    for name, tensor in expected.state_dict().items():
        if name.endswith("k_proj.bias"):  # their gradients are rounding errors, which AdamW scales up to full steps
            continue
        torch.testing.assert_close(actual.state_dict()[name], tensor, msg=lambda m, n=name: f"{n}: {m}", **tolerance)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"optim": "sgd", "weight_decay": 0.01, "learning_rate": 1e-3},
        {"cosine_epochs": 1, "min_learning_rate": 2e-3},
        {"gradient_accumulation_steps": 3},
        {"gradient_checkpointing": True},
        {"images_per_class": 1},
    ],
    ids=lambda fields: "-".join(fields) or "default",
)
def test_training_is_the_plain_loop(backbone_folder, tmp_path, train_dataset, fields):
    args = make_args(tmp_path, **fields)
    model = make_model(backbone_folder)
    trainer = VPTSPTrainer(model=model, args=args, train_dataset=train_dataset)
    trainer.train()
    expected = make_model(backbone_folder)
    losses = plain_loop(expected, args, train_dataset)
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx(losses, rel=1e-4)
    assert_same_state(model, expected, rtol=2e-4, atol=1e-5)


def test_frozen_weights_are_bit_for_bit_the_same(backbone_folder, tmp_path, train_dataset):
    model = make_model(backbone_folder, bitfit=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    VPTSPTrainer(model=model, args=make_args(tmp_path, weight_decay=0.1), train_dataset=train_dataset).train()
    frozen = set(before) - model.tuned_names()
    assert len(frozen) > 20
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in frozen)
    assert not torch.equal(model.proxies.state, before["proxies.state"])


def test_learning_rates_of_both_groups(backbone_folder, tmp_path, train_dataset):
    trainer = VPTSPTrainer(
        model=make_model(backbone_folder),
        args=make_args(tmp_path, cosine_epochs=1, min_learning_rate=1e-3, warmup_steps=2, num_train_epochs=2),
        train_dataset=train_dataset,
    )
    steps = len(trainer.get_train_dataloader())
    trainer.create_optimizer_and_scheduler(2 * steps)
    rates = []
    for _ in range(2 * steps):
        rates.append([group["lr"] for group in trainer.optimizer.param_groups])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    assert rates[0] == pytest.approx([0.5e-2, 0.5e-1])
    assert rates[1] == pytest.approx([1e-2, 1e-1])
    middle = 2 + (steps - 2) // 2
    cosine = (1 + math.cos(math.pi * (middle - 2) / (steps - 2))) / 2
    assert rates[middle] == pytest.approx([1e-3 + 9e-3 * cosine, 1e-3 + 99e-3 * cosine])
    assert rates[steps:] == [pytest.approx([1e-3, 1e-3])] * steps


def test_other_schedules_are_transformers_own(backbone_folder, tmp_path, train_dataset):
    trainer = VPTSPTrainer(
        model=make_model(backbone_folder),
        args=make_args(tmp_path, lr_scheduler_type="constant"),
        train_dataset=train_dataset,
    )
    trainer.train()
    rates = {entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry}
    assert rates == {1e-2}


def test_bfloat16_autocast_is_close(backbone_folder, tmp_path, train_dataset):
    losses = {}
    for bf16 in (False, True):
        model = make_model(backbone_folder)
        args = make_args(tmp_path, bf16=bf16, learning_rate=1e-3)
        trainer = VPTSPTrainer(model=model, args=args, train_dataset=train_dataset)
        frozen, seen = model.vptsp.backbone.layers[0].mlp.fc1.weight, set()
        model.register_forward_pre_hook(lambda *_, frozen=frozen, seen=seen: seen.add(frozen.dtype))
        trainer.train()
        assert seen == {torch.bfloat16 if bf16 else torch.float32}
        assert frozen.dtype == torch.float32
        losses[bf16] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert model.proxies.state.dtype == torch.float32
        assert model.vptsp.prompts.tokens.dtype == torch.float32
    assert losses[True] != losses[False]
    assert losses[True][0] == pytest.approx(losses[False][0], rel=0.01)
    assert losses[True][:5] == pytest.approx(
        losses[False][:5], rel=0.1
    )  # each step magnifies the rounding of those before


def test_evaluation_is_retrieval_on_the_given_classes(backbone_folder, tmp_path, eval_dataset):
    model = make_model(backbone_folder)
    trainer = VPTSPTrainer(
        model=model,
        args=make_args(tmp_path, per_device_eval_batch_size=5, recall_at=[1, 3]),
        eval_dataset=eval_dataset,
    )
    metrics = trainer.evaluate()
    pixel_values = torch.stack([eval_dataset[i]["pixel_values"] for i in range(len(eval_dataset))])
    labels = torch.tensor(eval_dataset.labels)
    with torch.no_grad():
        embeddings = model.retriever.eval()((pixel_values / 255 - 0.5) / 0.5).embeddings
    expected = retrieval_metrics(embeddings, labels, recall_at=(1, 3))
    assert {f"eval_{name}": pytest.approx(value) for name, value in expected.items()}.items() <= metrics.items()
    found, found_labels = trainer.embed(eval_dataset)
    torch.testing.assert_close(found, embeddings)
    assert torch.equal(found_labels, labels)

    frozen = trainer.evaluate_backbone()
    with torch.no_grad():
        alone = model.retriever.embed_with_backbone((pixel_values / 255 - 0.5) / 0.5)
    assert frozen["frozen_map_at_r"] == pytest.approx(retrieval_metrics(alone, labels)["map_at_r"])


def test_query_against_gallery(backbone_folder, tmp_path, eval_dataset):
    trainer = VPTSPTrainer(model=make_model(backbone_folder), args=make_args(tmp_path))
    metrics = trainer.evaluate({"query": eval_dataset, "gallery": eval_dataset})
    assert metrics["eval_num_in_gallery"] == len(eval_dataset)  # every query is in the gallery, and excluded there
    alone = trainer.evaluate(eval_dataset)
    for name in ("recall_at_1", "recall_at_2", "map_at_r", "r_precision"):
        assert metrics[f"eval_{name}"] == pytest.approx(alone[f"eval_{name}"])
    for wrong in ({"query": eval_dataset}, {"query": eval_dataset, "gallery": eval_dataset, "test": eval_dataset}):
        with pytest.raises(ValueError, match=r"must have query and gallery, or other names, got \[.*'query'"):
            trainer.evaluate(wrong)
    with pytest.raises(ValueError, match=r"birds of the eval datasets must have query and gallery, got \['test'\]"):
        trainer.evaluate({"birds": {"test": eval_dataset}})
    with pytest.raises(ValueError, match=r"must have names that are text, got \[1\]"):
        trainer.evaluate({1: eval_dataset})


def test_several_test_sets_by_name(backbone_folder, tmp_path, train_dataset, eval_dataset, splits):
    """Each has the metrics that it has alone; the best checkpoint and early stopping go by those of one."""
    other = ImageDataset(splits["train"], EvalTransform(18, 16))
    sets = {"new": eval_dataset, "both": {"query": eval_dataset, "gallery": other}}
    events = []

    class Notes(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, **kwargs):
            events.append(set(metrics))

    trainer = VPTSPTrainer(
        model=make_model(backbone_folder),
        args=make_args(tmp_path, eval_strategy="epoch", save_strategy="epoch", metric_for_best_model="both_map_at_r"),
        train_dataset=train_dataset,
        eval_dataset=sets,
        callbacks=[Notes()],
    )
    trainer.train()
    assert trainer.state.best_metric == max(
        entry["eval_both_map_at_r"] for entry in trainer.state.log_history if "eval_both_map_at_r" in entry
    )
    assert len(events) == 2 and {"eval_new_recall_at_1", "eval_both_recall_at_1"} <= events[0]
    together = trainer.evaluate()
    assert trainer.last_evaluated.keys() == sets.keys()
    for name, part in sets.items():
        alone = trainer.evaluate(part, metric_key_prefix=f"eval_{name}")
        times = ("runtime", "per_second")
        assert {k: v for k, v in alone.items() if not k.endswith(times)}.items() <= together.items()


def test_arguments_of_methods_that_would_be_ignored(backbone_folder, tmp_path, eval_dataset, train_dataset):
    trainer = VPTSPTrainer(make_model(backbone_folder), make_args(tmp_path), train_dataset, eval_dataset)
    batch = trainer.data_collator([eval_dataset[0]])
    for refused in (
        lambda keys: trainer.evaluate(ignore_keys=keys),
        lambda keys: trainer.predict(eval_dataset, keys),
        lambda keys: trainer.prediction_step(trainer.model, batch, False, keys),
        lambda keys: trainer.train(ignore_keys_for_eval=keys),
    ):
        with pytest.raises(
            ValueError, match=r"ignore_keys(_for_eval)? must be left out, got \['loss'\]: embeddings are"
        ):
            refused(["loss"])
    with pytest.raises(ValueError, match="prediction_loss_only must be false, got true"):
        trainer.evaluation_loop(trainer.get_test_dataloader(eval_dataset), "Prediction", prediction_loss_only=True)
    with pytest.raises(ValueError, match="trial must be left out, got 'one': a search for hyperparameters"):
        trainer.train(trial="one")
    assert trainer.state.global_step == 0


def test_images_are_normalised_as_the_image_processor_does(backbone_folder, tmp_path, eval_dataset):
    processor = build_image_processor(16, 18)
    processor.image_mean, processor.image_std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    trainer = VPTSPTrainer(
        model=make_model(backbone_folder), args=make_args(tmp_path), processing_class=processor, train_dataset=None
    )
    batch = trainer.on_device(trainer.data_collator([eval_dataset[i] for i in range(5)]))
    images = [eval_dataset.open_image(i) for i in range(5)]
    assert torch.equal(batch["pixel_values"], processor(images, return_tensors="pt").pixel_values)


def test_predict_embeds_too(backbone_folder, tmp_path, eval_dataset):
    trainer = VPTSPTrainer(model=make_model(backbone_folder), args=make_args(tmp_path), eval_dataset=eval_dataset)
    output = trainer.predict(eval_dataset)
    embeddings, labels = trainer.embed(eval_dataset)
    torch.testing.assert_close(torch.from_numpy(output.predictions), embeddings)
    assert torch.equal(torch.from_numpy(output.label_ids), labels)


def test_own_metrics_are_added(backbone_folder, tmp_path, eval_dataset):
    trainer = VPTSPTrainer(
        model=make_model(backbone_folder),
        args=make_args(tmp_path),
        eval_dataset=eval_dataset,
        compute_metrics=lambda prediction: {"width": prediction.predictions.shape[1]},
    )
    assert trainer.evaluate()["eval_width"] == 12
    assert trainer.predict(eval_dataset).metrics["test_width"] == 12


def test_training_improves_retrieval(backbone_folder, tmp_path, train_dataset, splits):
    trainer = VPTSPTrainer(
        model=make_model(backbone_folder),
        args=make_args(tmp_path, num_train_epochs=12, per_device_train_batch_size=8),
        train_dataset=train_dataset,
        eval_dataset=ImageDataset(splits["train"], EvalTransform(18, 16)),
    )
    before = trainer.evaluate()["eval_map_at_r"]
    trainer.train()
    assert trainer.evaluate()["eval_map_at_r"] > before + 0.1


def test_best_checkpoint_is_loaded_at_the_end(backbone_folder, tmp_path, train_dataset, eval_dataset):
    scores = iter([0.1, 0.9, 0.2])
    trainer = VPTSPTrainer(
        model=make_model(backbone_folder),
        args=make_args(
            tmp_path,
            num_train_epochs=3,
            eval_strategy="epoch",
            save_strategy="epoch",
            metric_for_best_model="chosen",
            save_total_limit=None,
        ),
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        compute_metrics=lambda prediction: {"chosen": next(scores)},
    )
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    steps = len(trainer.get_train_dataloader())
    assert best.name == f"checkpoint-{2 * steps}"
    for name, tensor in load_file(best / "model.safetensors").items():
        assert torch.equal(trainer.model.state_dict()[name], tensor), name


def test_resume_goes_on_bit_for_bit(backbone_folder, tmp_path, train_dataset):
    fields = {"num_train_epochs": 3, "save_strategy": "steps", "save_steps": 10, "save_total_limit": None}
    uninterrupted = make_model(backbone_folder, rnn_dropout=0.2)
    args = make_args(tmp_path, **fields)
    VPTSPTrainer(model=uninterrupted, args=args, train_dataset=train_dataset).train()
    checkpoint = tmp_path / "checkpoint-10"
    assert 10 % len(ClassBalancedBatchSampler(train_dataset.labels, 4, 2, 0)), "must be in the middle of an epoch"
    resumed = make_model(backbone_folder, rnn_dropout=0.2)
    trainer = VPTSPTrainer(model=resumed, args=args, train_dataset=train_dataset)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    for name, tensor in uninterrupted.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


@pytest.fixture
def streams(splits, tmp_path):
    """The same images as streams of three shards."""
    return {name: split.to_iterable_dataset(num_shards=3) for name, split in splits.items()}


@pytest.mark.parametrize("workers", [0, 2])
def test_training_from_a_stream_resumes_bit_for_bit(backbone_folder, tmp_path, streams, workers):
    images = StreamedImages(streams["train"], TrainTransform(16), num_rows=30)
    fields = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 9, "dataloader_num_workers": workers}
    args = make_args(tmp_path, **fields)
    uninterrupted = make_model(backbone_folder)
    VPTSPTrainer(model=uninterrupted, args=args, train_dataset=images).train()
    resumed = make_model(backbone_folder)
    trainer = VPTSPTrainer(model=resumed, args=args, train_dataset=images)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))
    assert trainer.state.global_step == 2 * 7
    for name, tensor in uninterrupted.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


def test_evaluation_of_a_stream_is_that_of_the_table(backbone_folder, tmp_path, eval_dataset, streams):
    trainer = VPTSPTrainer(model=make_model(backbone_folder), args=make_args(tmp_path, per_device_eval_batch_size=5))
    stream = StreamedImages(streams["test"], EvalTransform(18, 16))
    for of_table, of_stream in zip(trainer.embed(eval_dataset), trainer.embed(stream), strict=True):
        assert torch.equal(of_table, of_stream)


def test_streams_that_do_not_fit_are_refused_at_once(backbone_folder, tmp_path, streams):
    images = StreamedImages(streams["train"], TrainTransform(16))
    with pytest.raises(ValueError, match="max_steps has to be specified"):
        VPTSPTrainer(model=make_model(backbone_folder), args=make_args(tmp_path), train_dataset=images)
    VPTSPTrainer(model=make_model(backbone_folder), args=make_args(tmp_path, max_steps=3), train_dataset=images)
    model = make_model(backbone_folder, num_classes=3)
    with pytest.raises(ValueError, match=r"must be in 0\.\.2 .* but it has 5 classes"):
        VPTSPTrainer(model=model, args=make_args(tmp_path, max_steps=3), train_dataset=images)


def test_unreadable_images_are_left_out_of_the_scores(backbone_folder, tmp_path, splits):
    rows = splits["test"].select(range(12))
    names = [row["image"]["path"] for row in rows]
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    table = {"image": [str(broken) if i == 4 else name for i, name in enumerate(names)], "label": rows["label"]}
    with_broken = ImageDataset(
        Dataset.from_dict(table, features=rows.features), EvalTransform(18, 16), skip_corrupt=True
    )
    without = ImageDataset(rows.select([i for i in range(12) if i != 4]), EvalTransform(18, 16))
    trainer = VPTSPTrainer(model=make_model(backbone_folder), args=make_args(tmp_path))
    metrics, expected = trainer.evaluate(with_broken), trainer.evaluate(without)
    assert metrics["eval_num_unreadable"] == 1
    assert with_broken.skipped == [str(broken)]
    assert metrics["eval_map_at_r"] == expected["eval_map_at_r"]
    assert metrics["eval_num_queries"] == expected["eval_num_queries"] == 11
    for of_all, of_readable in zip(trainer.embed(with_broken), trainer.embed(without), strict=True):
        assert torch.equal(of_all, of_readable)
    predicted = trainer.predict(with_broken)
    assert predicted.label_ids.tolist() == rows["label"]
    assert np.isnan(predicted.predictions).all(1).tolist() == [i == 4 for i in range(12)]


def test_workers_do_not_change_the_batches(backbone_folder, tmp_path, train_dataset):
    batches = {}
    for workers in (0, 2):
        trainer = VPTSPTrainer(
            model=make_model(backbone_folder),
            args=make_args(tmp_path, dataloader_num_workers=workers),
            train_dataset=train_dataset,
        )
        loader = trainer.get_train_dataloader()
        loader.set_epoch(1)
        batches[workers] = list(loader)
    for alone, parallel in zip(batches[0], batches[2], strict=True):
        assert torch.equal(alone["pixel_values"], parallel["pixel_values"])
        assert torch.equal(alone["labels"], parallel["labels"])


def test_what_is_saved(backbone_folder, tmp_path, train_dataset, eval_dataset):
    processor = build_image_processor(16, 18)
    trainer = VPTSPTrainer(
        model=make_model(backbone_folder),
        args=make_args(tmp_path, num_train_epochs=1, save_strategy="epoch"),
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=processor,
    )
    trainer.train()
    trainer.save_model()
    assert set(load_file(tmp_path / "model.safetensors")) == trainer.model.retriever.tuned_names()
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["auto_map"]["AutoModel"] == "modeling_vptsp.VPTSPModel"
    assert (tmp_path / "preprocessor_config.json").is_file()
    assert not list(tmp_path.rglob("training_args.bin"))
    checkpoint = next(tmp_path.glob("checkpoint-*"))
    saved = set(load_file(checkpoint / "model.safetensors"))
    assert saved == trainer.model.tuned_names()
    assert {"proxies.state", "proxies.original_proxies", "class_prompts.tokens"} <= saved

    loaded = VPTSPModel.from_pretrained(tmp_path)
    pixel_values = torch.randn(3, 3, 16, 16)
    expected = trainer.model.retriever.eval()(pixel_values).embeddings
    assert torch.equal(loaded(pixel_values).embeddings, expected)


class FloatImages(torch.utils.data.Dataset):
    """Ready float images, of which one has a NaN."""

    labels = np.array([0, 0, 1, 1])

    def __len__(self):
        return 4

    def __getitem__(self, key):
        pixel_values = torch.randn(3, 16, 16)
        pixel_values[0, 0, 0] = torch.nan if key.index == 2 else 0.0
        return {"pixel_values": pixel_values, "labels": int(self.labels[key.index])}


def test_nan_pixels_end_the_run_before_they_reach_the_weights(backbone_folder, tmp_path):
    model = make_model(backbone_folder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = VPTSPTrainer(model=model, args=make_args(tmp_path), train_dataset=FloatImages())
    with pytest.raises(FloatingPointError, match="the loss is nan at step 0: an image is not finite"):
        trainer.train()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_data_that_does_not_fit_is_refused_at_once(backbone_folder, tmp_path, train_dataset):
    model = make_model(backbone_folder, num_classes=3)
    with pytest.raises(
        ValueError, match=r"must be in 0\.\.2 \(num_classes of the model\): row \d+ has the label [34];"
    ):
        VPTSPTrainer(model=model, args=make_args(tmp_path), train_dataset=train_dataset)
    model = make_model(backbone_folder)
    args = make_args(tmp_path, per_device_train_batch_size=12)
    with pytest.raises(ValueError, match="asks for 6 different classes in a batch, but there are 5"):
        VPTSPTrainer(model=model, args=args, train_dataset=train_dataset)
    with pytest.raises(ValueError, match="train_dataset must have `labels`"):
        VPTSPTrainer(model=model, args=make_args(tmp_path), train_dataset=[1, 2])


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"per_device_train_batch_size": 5}, "must be divisible by images_per_class, got 5 and 2"),
        ({"images_per_class": 0}, "images_per_class must be an integer >= 1, got 0"),
        ({"recall_at": [0, 1]}, r"recall_at must be a list of integers >= 1, got \[0, 1\]"),
        ({"cosine_epochs": 0}, "cosine_epochs must be > 0, got 0"),
        ({"proxy_learning_rate": -1.0}, r"proxy_learning_rate must be >= 0, got -1\.0"),
    ],
)
def test_bad_arguments_are_named(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        make_args(tmp_path, **fields)


def test_backbone_alone_is_not_evaluated_after_its_biases_were_tuned(
    backbone_folder, tmp_path, train_dataset, eval_dataset
):
    trainer = VPTSPTrainer(
        model=make_model(backbone_folder),
        args=make_args(tmp_path, num_train_epochs=1),
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
    )
    trainer.train()
    with pytest.raises(ValueError, match="must come before training"):
        trainer.evaluate_backbone()


def test_compiled_training_is_the_same(backbone_folder, tmp_path, train_dataset):
    """Of the compiler, everything but the code generator, which takes minutes: one graph, and the same steps."""
    final = {}
    for compiled in (False, True):
        model = make_model(backbone_folder)
        options = {"torch_compile": True, "torch_compile_backend": "aot_eager"} if compiled else {}
        args = make_args(tmp_path, optim="sgd", learning_rate=1e-3, num_train_epochs=1, **options)
        torch._dynamo.utils.counters.clear()
        VPTSPTrainer(model=model, args=args, train_dataset=train_dataset).train()
        assert not torch._dynamo.utils.counters["graph_break"]
        assert (torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1) == compiled
        final[compiled] = model
    assert_same_state(final[True], final[False], rtol=1e-4, atol=1e-5)

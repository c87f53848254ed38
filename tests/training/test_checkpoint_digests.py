"""Damage at the same size, checkpoints of before there were digests, and what a resumed run must have the same."""

import dataclasses
import json
import shutil

import checkpoint_runs
import pytest
import torch

from vptsp import DataArguments, EvalTransform, ImageDataset, StreamedImages, TrainTransform, VPTSPTrainingArguments
from vptsp.data_scripts.preprocessing import build_image_processor
from vptsp.training.checkpoints import check_checkpoint, check_files, last_checkpoint, load_tree, save_tree
from vptsp.training.run_errors import CheckpointError
from vptsp.training.run_record import FREE_DATA_ARGUMENTS, is_free_setting, record_data_arguments, run_differences


TRAINING = {"num_train_epochs": 1, "save_steps": 4, "eval_strategy": "steps", "eval_steps": 4}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return checkpoint_runs.write_colours(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="module")
def splits(images, tmp_path_factory):
    return checkpoint_runs.make_splits(images, tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def build(splits, backbone_folder):
    def make(output, stream=None, data_settings=None, **training):
        request = {"output": str(output), "training": {**TRAINING, **training}, "stream": stream}
        request["data_settings"] = data_settings
        return checkpoint_runs.build_trainer(splits, backbone_folder, request)

    return make


@pytest.fixture(scope="module")
def finished(build, tmp_path_factory):
    """The folder of a run, with checkpoints 4 and 7."""
    output = tmp_path_factory.mktemp("finished") / "run"
    build(output).train()
    return output


@pytest.fixture
def output(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def flip(path):
    """Change one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def files_of(checkpoint):
    return sorted(json.loads((checkpoint / "run.json").read_text())["files"])


def test_one_bit_in_any_file_is_noticed(output, build, caplog):
    names = files_of(output / "checkpoint-7")
    assert {"config.json", "model.safetensors", "optimizer.safetensors", "progress.json"} <= set(names)
    for name in names:
        flip(output / "checkpoint-7" / name)
        with pytest.raises(CheckpointError, match=rf"checkpoint-7/{name} has another content than was written"):
            check_checkpoint(output / "checkpoint-7")
        flip(output / "checkpoint-7" / name)
    check_checkpoint(output / "checkpoint-7")

    flip(output / "checkpoint-7" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors has another content"):
        build(output).train(resume_from_checkpoint=str(output / "checkpoint-7"))
    assert last_checkpoint(output) == output / "checkpoint-4"
    assert "model.safetensors has another content than was written" in caplog.text


def test_a_damaged_best_checkpoint_is_noticed_before_training_goes_on_and_when_it_is_loaded(output, build):
    state = json.loads((output / "checkpoint-7/trainer_state.json").read_text())
    best = output / state["best_model_checkpoint"].rsplit("/", 1)[1]
    other = output / "checkpoint-7" if best.name == "checkpoint-4" else None
    flip(best / "model.safetensors")
    trainer = build(output)
    if other is not None:
        with pytest.raises(CheckpointError, match=rf"{best.name}/model.safetensors has another content"):
            trainer.checkpoint_to_resume(str(other))
    trainer.state.best_model_checkpoint = str(best)
    with pytest.raises(CheckpointError, match=rf"{best.name}/model.safetensors has another content"):
        trainer._load_best_model()


def as_of_format_1(checkpoint):
    record = json.loads((checkpoint / "run.json").read_text())
    sizes = {name: entry["bytes"] for name, entry in record["files"].items()}
    (checkpoint / "run.json").write_text(json.dumps({**record, "format_version": 1, "files": sizes}))


def test_checkpoints_with_sizes_alone_are_still_read(output, build):
    for name in ("checkpoint-4", "checkpoint-7"):
        as_of_format_1(output / name)
    last = output / "checkpoint-7"
    trainer = build(output)
    trainer.train(resume_from_checkpoint=str(output / "checkpoint-4"))
    assert trainer.state.global_step == 7
    assert set(files_of(last)) == set(json.loads((last / "run.json").read_text())["files"])

    as_of_format_1(last)
    (last / "progress.safetensors").write_bytes(b"\xff" * (last / "progress.safetensors").stat().st_size)
    with pytest.raises(CheckpointError, match=r"progress.safetensors is damaged"):
        check_files(last)
    (last / "trainer_state.json").write_bytes(b"{" * (last / "trainer_state.json").stat().st_size)
    (last / "progress.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"checkpoint-7 lacks progress.safetensors"):
        check_files(last)


def test_numbers_that_json_has_not_come_back(output, tmp_path):
    save_tree(tmp_path, "tree", {"best": [float("-inf"), float("inf"), float("nan"), 0.5]})
    json.loads((tmp_path / "tree.json").read_text(), parse_constant=pytest.fail)
    low, high, none, half = load_tree(tmp_path, "tree")["best"]
    assert (low, high, half) == (float("-inf"), float("inf"), 0.5) and none != none
    for path in output.rglob("*.json"):
        json.loads(path.read_text(), parse_constant=lambda text, path=path: pytest.fail(f"{path}: {text}"))


# ---- What must be the same


def test_a_stream_in_place_of_a_table_is_refused(build, finished):
    with pytest.raises(CheckpointError, match=r"train_data.kind: checkpoint 'table', now 'stream'"):
        build(finished, stream=30).train(resume_from_checkpoint=True)


def test_it_is_refused_by_checkpoints_of_before_too(build, output, splits):
    for name in ("checkpoint-4", "checkpoint-7"):
        record = json.loads((output / name / "run.json").read_text())
        del record["train_data"]["kind"], record["eval_data"]["kind"]
        (output / name / "run.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=r"train_data.contents: only in the checkpoint"):
        build(output, stream=30).train(resume_from_checkpoint=True)
    trainer = build(output)
    trainer.eval_dataset = {"query": trainer.eval_dataset, "gallery": trainer.eval_dataset}
    with pytest.raises(CheckpointError, match=r"eval_data.images: only in the checkpoint"):
        trainer.train(resume_from_checkpoint=True)
    assert build(output).checkpoint_to_resume(True)


def test_a_table_in_place_of_a_stream_is_refused(build, tmp_path):
    build(tmp_path, stream=30, max_steps=4, eval_strategy="no", load_best_model_at_end=False).train()
    trainer = build(tmp_path, max_steps=4, eval_strategy="no", load_best_model_at_end=False)
    with pytest.raises(CheckpointError, match=r"train_data.kind: checkpoint 'stream', now 'table'"):
        trainer.train(resume_from_checkpoint=True)


FREE_TRAINING_ARGUMENTS = {  # and why none of them changes what is trained
    "when to log, evaluate and save, and what to keep": """
        do_eval do_predict do_train eval_delay eval_metrics eval_on_start eval_steps eval_strategy bootstrap_samples
        load_best_model_at_end log_level log_level_replica log_on_each_node logging_first_step logging_nan_inf_filter
        logging_steps logging_strategy recall_at save_on_each_node save_only_model save_steps save_strategy
        save_total_limit restore_callback_states_from_checkpoint""",
    "where things are, and who is told": """
        class_prompt_folder disable_tqdm hub_always_push hub_model_id hub_private_repo hub_revision hub_strategy
        hub_token output_dir project push_to_hub report_to run_name trackio_bucket_id trackio_space_id
        trackio_static_space_id""",
    "what computes the same, to rounding": """
        activation_checkpointing activation_checkpointing_kwargs dataloader_multiprocessing_context
        dataloader_num_workers dataloader_persistent_workers dataloader_pin_memory dataloader_prefetch_factor
        ddp_backend ddp_bucket_cap_mb ddp_find_unused_parameters ddp_static_graph ddp_timeout debug
        eval_accumulation_steps gradient_checkpointing gradient_checkpointing_kwargs local_rank
        average_tokens_across_devices per_device_eval_batch_size per_device_train_batch_size torch_compile
        torch_compile_backend torch_compile_mode torch_empty_cache_steps use_cpu""",
    "refused when not at their defaults": """
        accelerator_config batch_eval_metrics bf16_full_eval dataloader_drop_last dataloader_in_order
        ddp_broadcast_buffers eval_do_concat_batches eval_use_gather_object fp16_full_eval include_for_metrics
        include_num_input_tokens_seen label_names length_column_name prediction_loss_only remove_unused_columns
        skip_memory_metrics train_sampling_strategy""",
    "about going on itself": "resume_from_checkpoint",
    "said by bf16 and fp16": "dtype",
}


def test_every_other_training_argument_is_compared(tmp_path):
    args = VPTSPTrainingArguments(str(tmp_path), use_cpu=True)
    free = {name for names in FREE_TRAINING_ARGUMENTS.values() for name in names.split()}
    fields = {item.name for item in dataclasses.fields(args)}
    assert {name for name in fields if is_free_setting(name, args)} == free & fields
    by_score = VPTSPTrainingArguments(str(tmp_path), use_cpu=True, lr_scheduler_type="reduce_lr_on_plateau")
    assert not is_free_setting("eval_steps", by_score)


OTHER_DATA = {
    "dataset_name": "cub",
    "layout": "classes",
    "train_split": "a",
    "test_split": "b",
    "query_split": "c",
    "gallery_split": "d",
    "test_share": 0.25,
    "class_split": "random",
    "split_seed": 1,
    "digit_size": 48,
    "dataset_repo": "owner/birds",
    "dataset_config": "small",
    "dataset_revision": "abc",
    "test_repo": "owner/test",
    "query_repo": "owner/queries",
    "gallery_repo": "owner/gallery",
    "image_column": "picture",
    "label_column": "class",
    "split_column": "part",
    "streaming": True,
    "image_size": 32,
    "resize_size": 300,
    "crop_scale_min": 0.5,
    "horizontal_flip": False,
    "labels": "none",
    "test_labels": True,
    "group_column": "listing",
    "validation_share": 0.25,
}
NEEDS = {
    "test_labels": {"labels": "none"},
    "group_column": {"labels": "none"},
    "split_seed": {"class_split": "random"},
}


def test_every_other_data_argument_is_compared(build, output):
    names = {item.name for item in dataclasses.fields(DataArguments)}
    assert names == set(OTHER_DATA) | set(FREE_DATA_ARGUMENTS)
    settings = record_data_arguments(DataArguments())
    for name in names:
        assert (name in settings) == (name in OTHER_DATA)
    short = {"max_steps": 1, "save_steps": 1, "eval_strategy": "no", "load_best_model_at_end": False}
    build(output / "new", data_settings=settings, **short).train()
    for name, value in OTHER_DATA.items():
        changed = DataArguments(**{"resize_size": 256, **NEEDS.get(name, {}), name: value})
        other = build(output / "new", data_settings=record_data_arguments(changed), **short)
        with pytest.raises(CheckpointError, match=rf"data.{name}: checkpoint .*, now {value!r}"):
            other.train(resume_from_checkpoint=True)


def test_another_normalisation_is_refused(build, output):
    folder = output / "new"
    short = {"max_steps": 1, "save_steps": 1, "eval_strategy": "no", "load_best_model_at_end": False}
    trainer = build(folder, **short)
    trainer.processing_class = build_image_processor(16, 18)
    trainer.train()
    other = build(folder, **short)
    other.processing_class = build_image_processor(16, 18)
    other.processing_class.image_mean = [0.4, 0.4, 0.4]
    with pytest.raises(CheckpointError, match=r"image_mean: only in the checkpoint 0.5, .*only now 0.4"):
        other.train(resume_from_checkpoint=True)


def test_another_optimiser_is_refused(build, output):
    folder = output / "new"
    short = {"max_steps": 1, "save_steps": 1, "eval_strategy": "no", "load_best_model_at_end": False}

    def trainer(rate):
        found = build(folder, **short)
        found.optimizer_cls_and_kwargs = (torch.optim.Adagrad, {"lr_decay": rate})
        return found

    trainer(0.1).train()
    assert trainer(0.1).checkpoint_to_resume(True)
    with pytest.raises(CheckpointError, match=r"optimizer.options.lr_decay: checkpoint '0.1', now '0.2'"):
        trainer(0.2).train(resume_from_checkpoint=True)


def test_what_a_transform_does_is_in_its_name():
    assert repr(TrainTransform(16)) != repr(TrainTransform(16, decode_margin=1.5))


def test_a_record_tells_tables_from_streams(splits):
    from vptsp.training.run_record import _data_record

    table = _data_record(ImageDataset(splits["test"], EvalTransform(18, 16)))
    stream = _data_record(StreamedImages(splits["test"].to_iterable_dataset(), EvalTransform(18, 16)))
    assert run_differences({"train_data": table}, {"train_data": stream, "versions": {}})

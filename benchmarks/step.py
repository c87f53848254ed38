"""Training step: this project against the naive prompted ViT and against full fine-tuning, at full size.

    python benchmarks/step.py --output step.json                              # all published settings
    python benchmarks/step.py --settings cub_vits16 --batch_size 8            # one, with smaller batches
    python benchmarks/step.py --device cuda --precision bf16

A step is forward, backward, optimiser and proxies of one batch. Contenders take turns in one process, so that whatever
slows the machine down hits all alike; given are medians. Peak memory is that of a process of each contender's own.
`useful` counts the operations that the fast path needs (not recomputation) per second, as a share of the fastest
matrix product that this device was seen to do. Weights are random: speed does not depend on them.

Beside ours, the naive step and full fine-tuning there are `compiled`, ours through `torch.compile`, and `blas`, ours
with the matrix products of `torch.nn.functional.linear` on CPUs: what the layout of the computation alone brings.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import naive
import torch
from machine_report import peak_host_megabytes, write_report
from transformers import ViTConfig

from vptsp import VPTSPConfig, VPTSPForMetricLearning
from vptsp.backbones_vptsp import fast_linear, linear_products
from vptsp.files.yaml_files import read_yaml
from vptsp.losses.proxy_losses import proxy_anchor_loss
from vptsp.training.half_precision import frozen_weights_in


CONFIGS = Path(__file__).resolve().parents[1] / "configs"
# Training classes of the published splits.
CLASSES = {"cub": 100, "cars": 98, "sop": 11_318, "inshop": 3_997, "inaturalist": 5_690}
SETTINGS = [f"{name}_vit{size}16" for name in ("cub", "cars", "sop", "inshop") for size in "sb"]
SETTINGS.append("inaturalist_vitb16")
SIZES = {"s": {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}, "b": {}}
LINEAR = linear_products.library
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Contender:
    """One way to do the step of a setting; calling it does one."""

    def __init__(self, kind, setting, args):
        fields = read_yaml(CONFIGS / f"{setting}.yaml")
        self.kind, self.device, self.dtype = kind, args.device, PRECISIONS[args.precision]
        batch = args.batch_size or fields["per_device_train_batch_size"]
        self.images_per_class = fields["images_per_class"]
        num_classes = min(CLASSES[setting.partition("_")[0]], args.max_classes)
        torch.manual_seed(0)
        self.model = self._model(setting, fields, num_classes, args)
        self.pixel_values = torch.randn(batch, 3, 224, 224, device=self.device)
        self.labels = torch.arange(batch, device=self.device) // self.images_per_class
        tuned = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD if fields["optim"] == "sgd" else torch.optim.AdamW
        options = {"momentum": 0.9} if fields["optim"] == "sgd" else {}
        self.optimizer = optimizer(tuned, lr=1e-4, fused=True, **options)
        scaled = args.precision == "fp16" and self.device != "cpu"
        self.scaler = torch.amp.GradScaler(self.device, enabled=scaled)
        self.forward = torch.compile(self.model) if kind == "compiled" else self.model
        self.precision = nullcontext()
        if kind not in ("naive", "full"):
            self.precision = frozen_weights_in(self.dtype, self.model)
        self.precision.__enter__()

    def _model(self, setting, fields, num_classes, args):
        model_fields = {name: value for name, value in fields.items() if name in VPTSPConfig.__dataclass_fields__}
        model_fields.pop("backbone")
        if self.kind == "naive":
            model_fields["class_prompt_store"] = "dense"
        size = setting.partition("_vit")[2][0]
        config = VPTSPConfig(**model_fields, num_classes=num_classes, backbone_config=ViTConfig(**SIZES[size]))
        if self.kind == "full":
            config = VPTSPConfig(
                backbone_config=config.backbone_config,
                embedding_dim=config.embedding_dim,
                num_prompts=0,
                tune_backbone=True,
                proxy_update="none",
                num_classes=num_classes,
            )
        model = VPTSPForMetricLearning(config)
        if fields.get("gradient_checkpointing") and args.checkpointing and self.kind != "naive":
            model.gradient_checkpointing_enable()
        return model.to(self.device).train()

    def __call__(self):
        """One step."""
        linear_products.library = "torch" if self.kind == "blas" else LINEAR
        self.optimizer.zero_grad(set_to_none=True)
        device = torch.device(self.device).type
        with torch.autocast(device, self.dtype, enabled=self.dtype is not None):
            output = self._output()
        self.scaler.scale(output.loss).backward()
        scale = self.scaler.get_scale()  # 1 where nothing is scaled
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.model.offloaded_class_prompts is not None:
            self.model.offloaded_class_prompts.reduce_gradients(scale=scale)
            self.model.offloaded_class_prompts.step(self.optimizer)
        self.model.commit_proxies(output)

    def _output(self):
        if self.kind == "naive":
            return naive.forward(self.model, self.pixel_values, self.labels, self.images_per_class)
        if self.kind == "full":  # transformers' own forward pass
            return naive.forward_without_prompts(self.model, self.pixel_values, self.labels, proxy_anchor_loss)
        return self.forward(self.pixel_values, self.labels, images_per_class=self.images_per_class)


def useful_operations(model, batch, images_per_class):
    """Floating-point operations of a step that the fast path can't do without."""
    config, vit = model.config, model.config.backbone_config
    tokens = (vit.image_size // vit.patch_size) ** 2 + 1
    width, inner, layers = vit.hidden_size, vit.intermediate_size, vit.num_hidden_layers
    total = 0
    passes = [(config.prompt_lengths, 1)]
    if config.proxy_update != "none":
        passes.append((config.class_prompt_lengths, batch // images_per_class))
    for index, (lengths, sets) in enumerate(passes):
        for layer in range(layers):
            prompts = lengths[layer] if layer < len(lengths) else 0
            queries = 1 if layer == layers - 1 else tokens
            keys_values = 0 if layer == 0 and index == 1 else 2 * tokens  # shared by both passes
            query = 0 if layer == 0 and index == 1 else queries
            linear = 2 * batch * width * ((keys_values + query + queries) * width + 2 * queries * inner)
            linear += 2 * 2 * sets * prompts * width * width
            attention = 2 * 2 * batch * queries * (tokens + prompts) * width
            total += 2 * linear + 3 * attention  # backward: one product a frozen matrix, two an attention product
    return total


def peak_operations(device, dtype, clock):
    """Operations a second of the fastest of some large matrix products."""
    x = torch.randn(4096, 1536, device=device, dtype=dtype or torch.float32)
    layer = torch.nn.Linear(1536, 1536, bias=False, device=device, dtype=dtype).requires_grad_(False)
    best = float("inf")
    for library in linear_products.available if device == "cpu" and dtype is None else ("torch",):
        linear_products.library = library
        best = min(best, *(seconds(lambda: fast_linear(layer, x), device, clock) for _ in range(10)))
    linear_products.library = LINEAR
    return 2 * x.numel() * 1536 / best


def seconds(function, device, clock):
    if device != "cpu":
        torch.cuda.synchronize()
    start = clock()
    function()
    if device != "cpu":
        torch.cuda.synchronize()
    return clock() - start


def peak_megabytes(kind, setting, args):
    """Peak memory of two steps, in a process of their own; of the device, or above what imports take."""
    command = [sys.executable, __file__, "--memory_of", kind, setting, "--device", args.device]
    command += ["--precision", args.precision, "--max_classes", str(args.max_classes)]
    command += ["--checkpointing"] if args.checkpointing else []
    command += ["--batch_size", str(args.batch_size)] if args.batch_size else []
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def print_memory(kind, setting, args):
    before = peak_host_megabytes()
    contender = Contender(kind, setting, args)
    contender()
    contender()
    if args.device == "cpu":
        print(peak_host_megabytes() - before)
    else:
        print(torch.cuda.max_memory_allocated() / 1e6)


def compare(setting, args):
    """A row of the table."""
    contenders = {kind: Contender(kind, setting, args) for kind in args.contenders}
    clock = time.process_time if args.process_time else time.perf_counter
    for contender in contenders.values():
        for _ in range(args.warmup):
            contender()
    times = {kind: [] for kind in contenders}
    for _ in range(args.rounds):
        for kind, contender in contenders.items():
            times[kind].append(seconds(contender, args.device, clock))
    ours = contenders["ours"]
    row = {"setting": setting, "batch": len(ours.labels), "classes": ours.model.config.num_classes}
    row |= {f"{kind} s": statistics.median(values) for kind, values in times.items()}
    for kind in args.contenders:
        if kind != "ours":
            ratios = [theirs / mine for theirs, mine in zip(times[kind], times["ours"], strict=True)]
            row[f"{kind} / ours"] = statistics.median(ratios)
    operations = useful_operations(ours.model, len(ours.labels), ours.images_per_class)
    row["useful GFLOP/s"] = operations / row["ours s"] / 1e9
    row["share of peak"] = operations / row["ours s"] / peak_operations(args.device, PRECISIONS[args.precision], clock)
    del contenders, contender, ours
    if args.memory:
        row |= {f"{kind} MB": peak_megabytes(kind, setting, args) for kind in args.contenders}
        for kind in args.contenders:
            if kind != "ours":
                row[f"memory ours / {kind}"] = row["ours MB"] / row[f"{kind} MB"]
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", default=SETTINGS, choices=SETTINGS)
    kinds = ("ours", "naive", "full", "blas", "compiled")
    parser.add_argument("--contenders", nargs="+", default=kinds[:3], choices=kinds, help="ours must be among them")
    parser.add_argument("--batch_size", type=int, help="images; default: as published")
    parser.add_argument("--max_classes", type=int, default=1000, help="dense class prompts grow with the classes")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--precision", default="fp32", choices=PRECISIONS)
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing where published, of ours")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--process_time", action="store_true", help="processor time of one thread; for a busy machine")
    parser.add_argument("--no_memory", dest="memory", action="store_false", help="skip the memory of each contender")
    parser.add_argument("--memory_of", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help="JSON file")
    args = parser.parse_args()
    if args.process_time:
        torch.set_num_threads(1)  # several wait for each other by running
    if args.memory_of:
        print_memory(*args.memory_of, args)
        return
    write_report([compare(setting, args) for setting in args.settings], args.device, args.output)


if __name__ == "__main__":
    main()

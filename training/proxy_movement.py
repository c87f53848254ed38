"""How far the proxies move in training: a callback that measures it at every logging step, cheaply."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import TrainerCallback

from ..files.atomic import write_json
from ..files.json_files import read_json_object


FILE_NAME = "proxy_movement.json"
QUANTILES = (0.1, 0.5, 0.9)


class ProxyMovement(TrainerCallback):
    """Records how far the proxies of all classes have moved, into `proxy_movement.json` in `output_dir`.

    At every logging step, cosines of each class's

        proxy_start    proxy Q with itself at the start of training
        proxy_before   proxy Q with itself at the logging step before
        state_before   state S with itself at the logging step before
        state_original state S with the original proxy O

    the latter two only where there are semantic proxies. What is kept is their mean and quantiles over the classes. It
    takes a pass over the proxies per logging step, and two copies of them; nothing waits for the device before the
    file is written, at each save and at the end.

    Resuming reads the file and goes on, with the start from then on being where it resumed.
    """

    def __init__(self):
        self.records = []  # (step, epoch, {name: tensor of mean and quantiles})
        self._start = self._before = None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        path = Path(args.output_dir) / FILE_NAME
        self.records = []
        if state.global_step and path.is_file():
            earlier = read_proxy_movement(path)
            self.records = [record for record in earlier if record["step"] <= state.global_step]
        self._start = self._before = _proxies(model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if control.should_log:
            now = _proxies(model)
            cosines = {"proxy_start": (now["Q"], self._start["Q"]), "proxy_before": (now["Q"], self._before["Q"])}
            if "S" in now:
                cosines |= {"state_before": (now["S"], self._before["S"]), "state_original": (now["S"], now["O"])}
            summary = {name: _summary(F.cosine_similarity(*pair)) for name, pair in cosines.items()}
            self.records.append({"step": state.global_step, "epoch": state.epoch, **summary})
            self._before = now

    def on_classes_moved(self, source, model):
        """Compare each class with what it was under its earlier number; a new one with what it is now."""
        now = _proxies(model)
        taken = torch.full((len(now["Q"]),), -1, dtype=torch.int64)
        taken[: len(source)] = torch.as_tensor(source)

        def followed(name, rows):
            kept = (taken >= 0).to(rows.device)[:, None]
            return torch.where(kept, rows[taken.clamp(min=0).to(rows.device)], now[name])

        self._start = {name: followed(name, rows) for name, rows in self._start.items()}
        self._before = {name: followed(name, rows) for name, rows in self._before.items()}

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self._write(Path(args.output_dir))

    on_train_end = on_save

    def _write(self, folder):
        self.records = [
            {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in record.items()}
            for record in self.records
        ]
        folder.mkdir(parents=True, exist_ok=True)
        content = {"columns": ["mean", *QUANTILES], "records": self.records}
        write_json(folder / FILE_NAME, content, indent=None)


def read_proxy_movement(path):
    """What [`ProxyMovement`] wrote.

    Args:
        path: The file.

    Returns:
        List of dicts, one per logging step: `step`, `epoch`, and for each cosine its mean and its quantiles over the
        classes at 0.1, 0.5 and 0.9.

    Raises:
        OSError: there is no such file.
        ValueError: it is not one of these.
    """
    try:
        content = read_json_object(path)
        columns, records = content["columns"], content["records"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} must be the JSON file that ProxyMovement writes: {error!r}") from error
    if columns != ["mean", *QUANTILES]:
        raise ValueError(f"{path}: columns must be mean and quantiles {QUANTILES}, got {columns}")
    return records


@torch.no_grad()
def _proxies(model):
    """Copies of Q, and of S and O where there is an S; `(C, E)` each."""
    proxies = model.proxies
    if getattr(proxies, "state", None) is None:
        return {"Q": F.normalize(proxies.original_proxies, dim=-1)}
    state, original = proxies.state.clone(), proxies.original_proxies.detach().clone()
    return {"Q": F.normalize(torch.lerp(state, original, proxies.bias_ratio), dim=-1), "S": state, "O": original}


def _summary(cosines):
    quantiles = torch.quantile(cosines.float(), torch.tensor(QUANTILES, device=cosines.device))
    return torch.cat([cosines.float().mean()[None], quantiles])


__all__ = ["ProxyMovement", "read_proxy_movement"]

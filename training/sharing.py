"""How a trainer shares the retriever that it tunes: what it saves for use, the model card, what goes to the Hub."""

from __future__ import annotations

import logging
import shutil
import tempfile
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

from huggingface_hub import HfApi, ModelCard
from transformers.trainer_utils import HubStrategy
from transformers.utils.hub import PushInProgress

from ..data_scripts.split_record import SPLITS_NAME
from ..files.atomic import atomic_path, write_json
from ..files.json_files import read_json_object
from ..files.marks import RESULTS_NAME
from .checkpoints import STATE_NAME
from .model_card import TAGS, retriever_card
from .output_folder import output_of, refuse_other_model, replaced_together
from .resumable_trainer import ResumableTrainer


logger = logging.getLogger(__name__)


class SharingTrainer(ResumableTrainer):
    """A [`ResumableTrainer`] that saves and uploads the retriever of its model.

    The Trainer would upload all of `output_dir`, checkpoints and pickled arguments (with the token in them) included.

    Where a method takes `results`, these are scores and more, as `train.py` writes them into `all_results.json`, for
    that file and the model card; None as long as they aren't known. `picture` in it names a file in `output_dir` that
    is uploaded along.
    """

    split_record = None
    """What `splits.json` of the saved retriever holds, see `record_splits`; it is not uploaded."""

    def shared_weights(self):
        """The weights to evaluate and to share in the model while a block runs, where training goes on with others."""
        return nullcontext()

    def save_model(self, output_dir=None, _internal_call=False, results=None):
        """`save_retriever`; with `push_to_hub`, upload as well, as `Trainer.save_model` does."""
        self.save_retriever(output_dir, results)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", results=results)

    def save_retriever(self, folder=None, results=None):
        """Save what is shared, all of it at once: the retriever, its image processor, `results` and model card.

        Args:
            folder: Where to, whatever it is called; None for `output_dir`. A `README.md` there that is no retriever's
                model card stays.
            results: See the class.

        Raises:
            InUseError: another run uses `output_dir`, which is where to.
            OutputFolderError: the folder holds something else than a retriever, or is `output_dir`, in which another
                run has trained since this one has, or was made.
        """
        if self.args.should_save:
            folder = Path(self.args.output_dir if folder is None else folder)
            refuse_other_model(folder, self.model.config.backbone)
            is_own = folder.resolve() == Path(self.args.output_dir).resolve()
            with self._own_output() if is_own else nullcontext(), replaced_together(folder) as staged:
                if self.split_record is None:  # one that is there speaks of another run
                    (folder / SPLITS_NAME).unlink(missing_ok=True)
                self._write_retriever(staged, results, place=folder)

    def _own_output(self):
        """`output_dir`, held while the block writes to it; an error where another run has trained there since."""
        return output_of(self._run, self.args.output_dir)

    def save_metrics(self, split, metrics, combined=True):
        """As `Trainer.save_metrics`, in whole files of JSON: numbers that are none are `null`, and it is said.

        Raises:
            InUseError, OutputFolderError: as for `save_retriever`.
        """
        if self.is_world_process_zero():
            folder = Path(self.args.output_dir)
            with self._own_output():
                write_json(folder / f"{split}_results.json", dict(sorted(metrics.items())), indent=4)
                if combined:
                    path = folder / RESULTS_NAME
                    earlier = read_json_object(path) if path.is_file() else {}
                    write_json(path, dict(sorted({**earlier, **metrics}.items())), indent=4)

    def save_state(self):
        """As `Trainer.save_state`, as `save_metrics` writes."""
        if self.is_world_process_zero():
            with self._own_output():
                write_json(Path(self.args.output_dir) / STATE_NAME, asdict(self.state))

    def create_model_card(self, model_name=None, results=None, **metadata):
        """Write `README.md` into `output_dir`, unless there is one that is no retriever's model card.

        Args:
            model_name: Name on the Hub; None for `hub_model_id`.
            results: See the class.
            **metadata: Fields of `huggingface_hub.ModelCardData`, such as `license`.
        """
        path = Path(self.args.output_dir, "README.md")
        if self.is_world_process_zero():
            with self._own_output():
                if not _is_foreign_card(path):
                    with atomic_path(path) as temporary:
                        self._card(results, model_name, folder=path.parent, **metadata).save(temporary)

    def push_to_hub(
        self,
        commit_message="End of training",
        blocking=True,
        token=None,
        revision=None,
        private=None,
        results=None,
        **kwargs,
    ):
        """Upload the retriever, its image processor and model card and, where they are given, scores and picture.

        Nothing else that lies in `output_dir` goes along; checkpoints never do.

        Args:
            commit_message: Of the commit.
            blocking: Return only when all is uploaded.
            token: Token of the Hub; None for `hub_token`, or the one that `hf auth login` keeps.
            revision: Branch; None for `hub_revision`, or the default branch.
            private: Whether a new repository is private; None for `hub_private_repo`.
            results: See the class.
            **kwargs: For `create_model_card`.

        Returns:
            `huggingface_hub.CommitInfo`, or a `Future` of it without `blocking`; None on all processes but the first.

        Raises:
            ValueError: the backbone is a folder of this machine, which nobody else has.
        """
        self.model.require_shareable()
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = self.args.hub_token if token is None else token
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_retriever(results=results)
        if not self.is_world_process_zero():
            return None
        if self.push_in_progress is not None:
            self.push_in_progress.wait_until_done()
        upload = self._upload(commit_message, token, revision, results, **kwargs)
        return upload.result() if blocking else upload

    def save_checkpoint(self):
        """A checkpoint; with `hub_strategy` `every_save`, the retriever as it is now is uploaded in the background."""
        super().save_checkpoint()
        if not (self.args.push_to_hub and self.is_world_process_zero()) or self.args.hub_strategy == HubStrategy.END:
            return
        under_way = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if under_way and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        job = self._upload(f"Training in progress, step {self.state.global_step}", self.args.hub_token)
        self.push_in_progress = PushInProgress([*self.push_in_progress.jobs, job] if under_way else [job])

    def _upload(self, commit_message, token, revision=None, results=None, **metadata):
        """Begin to upload what is shared, out of a folder of its own, so that nothing else can slip in."""
        staging = tempfile.TemporaryDirectory()
        folder = Path(staging.name)
        self._write_retriever(folder, results, token=token, **metadata)
        if picture := (results or {}).get("picture"):
            (folder / picture).parent.mkdir(exist_ok=True)
            shutil.copy(Path(self.args.output_dir, picture), folder / picture)
        upload = HfApi().upload_folder(
            repo_id=self.hub_model_id,
            folder_path=folder,
            commit_message=commit_message,
            token=token,
            revision=self.args.hub_revision if revision is None else revision,
            run_as_future=True,
        )
        upload.add_done_callback(lambda future: _uploaded(future, staging))
        return upload

    def _write_retriever(self, folder, results, place=None, **metadata):
        """Retriever, image processor, results and card into a folder; `place` is where they will be moved to."""
        with self.shared_weights():
            self.model.retriever.save_pretrained(folder, place=place)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        if results is not None:
            write_json(folder / RESULTS_NAME, results)
        if place is not None and self.split_record is not None:
            write_json(folder / SPLITS_NAME, self.split_record)
        if place is None or not _is_foreign_card(place / "README.md"):
            self._card(results, folder=place, **metadata).save(folder / "README.md")

    def _card(self, results, model_name=None, **metadata):
        name = model_name or self.hub_model_id or self.args.hub_model_id
        return retriever_card(self.model, name, results, self.args, processor=self.processing_class, **metadata)


def _is_foreign_card(path):
    """Whether a file is there that is no model card of a retriever; it is said."""
    if not path.is_file() or set(TAGS) <= set(ModelCard.load(path).data.tags or ()):
        return False
    logger.warning(f"{path} is left as it is: it is no model card of a retriever")
    return True


def _uploaded(future, staging):
    staging.cleanup()
    if error := future.exception():
        logger.warning(f"the upload to the Hub failed: {error}")


__all__ = ["SharingTrainer"]

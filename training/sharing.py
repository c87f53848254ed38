"""How a trainer shares the retriever that it tunes: the model card, and what goes to the Hub."""

from __future__ import annotations

import logging
import shutil
import tempfile
from pathlib import Path

from huggingface_hub import ModelCard
from transformers.trainer_utils import HubStrategy
from transformers.utils.hub import PushInProgress, hf_api

from ..data_scripts.image_files import RESULTS_NAME
from ..files.atomic import atomic_path, write_json
from .model_card import TAGS, retriever_card


logger = logging.getLogger(__name__)


class SharesRetriever:
    """Part of [`VPTSPTrainer`]: model cards and uploads, in place of those of `transformers.Trainer`.

    The Trainer would upload all of `output_dir`, checkpoints and pickled arguments (with the token in them) included.

    Attributes:
        results: Scores and more, as `train.py` writes them into `all_results.json`; None as long as they aren't known.
            Model cards and uploads tell them. `picture` in it names a file in `output_dir` that goes along.
    """

    results: dict | None = None

    def create_model_card(self, model_name=None, **metadata):
        """Write `README.md` into `output_dir`, from the model, the arguments and `results`.

        Args:
            model_name: Name on the Hub; None for `hub_model_id`.
            **metadata: Fields of `huggingface_hub.ModelCardData`, such as `license`.
        """
        if self.is_world_process_zero():
            self.write_card(Path(self.args.output_dir), model_name, **metadata)

    def write_card(self, folder, model_name=None, **metadata):
        """`create_model_card` for any folder. A `README.md` that is no retriever's model card is left as it is."""
        if not _is_foreign_card(folder / "README.md"):
            with atomic_path(folder / "README.md") as temporary:
                self._card(model_name, **metadata).save(temporary)

    def _card(self, model_name=None, **metadata):
        name = model_name or self.hub_model_id or self.args.hub_model_id
        return retriever_card(self.model, name, self.results, self.args, **metadata)

    def write_shared(self, folder, place=None, **metadata):
        """Write the retriever, its image processor, `results` (once they are set) and model card.

        Args:
            folder: Existing folder to write to.
            place: Folder that the files will be moved to; None for `folder`. A `README.md` there that is no
                retriever's model card stays.
            **metadata: As for `create_model_card`.
        """
        self.model.retriever.save_pretrained(folder, place=place)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        if self.results is not None:
            write_json(folder / RESULTS_NAME, self.results)
        if place is None or not _is_foreign_card(place / "README.md"):
            self._card(**metadata).save(folder / "README.md")

    def push_to_hub(
        self, commit_message="End of training", blocking=True, token=None, revision=None, private=None, **kwargs
    ):
        """Upload the retriever, its image processor and model card and, once `results` is set, scores and picture.

        Nothing else that lies in `output_dir` goes along; checkpoints never do.

        Args:
            commit_message: Of the commit.
            blocking: Return only when all is uploaded.
            token: Token of the Hub; None for `hub_token`, or the one that `hf auth login` keeps.
            revision: Branch; None for `hub_revision`, or the default branch.
            private: Whether a new repository is private; None for `hub_private_repo`.
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
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        return self._upload(commit_message, blocking, token, revision, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder):
        """Upload the retriever as it is now, in the background, if `hub_strategy` is `every_save`."""
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        under_way = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if under_way and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        job = self._upload(f"Training in progress, step {self.state.global_step}", False, self.args.hub_token)
        jobs = [*self.push_in_progress.jobs, job] if under_way else [job]
        self.push_in_progress = PushInProgress(jobs)

    def _upload(self, commit_message, blocking, token, revision=None, **card_options):
        """Write what is shared into a folder of its own, so that nothing else can slip in, and upload that."""
        staging = tempfile.TemporaryDirectory()
        folder = Path(staging.name)
        self.write_shared(folder, **card_options)
        if picture := (self.results or {}).get("picture"):
            (folder / picture).parent.mkdir(exist_ok=True)
            shutil.copy(Path(self.args.output_dir, picture), folder / picture)
        upload = hf_api().upload_folder(
            repo_id=self.hub_model_id,
            folder_path=folder,
            commit_message=commit_message,
            token=token,
            revision=self.args.hub_revision if revision is None else revision,
            run_as_future=True,
        )
        upload.add_done_callback(lambda future: _uploaded(future, staging))
        return upload.result() if blocking else upload


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


__all__ = ["SharesRetriever"]

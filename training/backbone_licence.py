"""The licence of a retriever's backbone, as the backbone's own model card has it; the retriever's passes it on."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import NamedTuple

import yaml
from huggingface_hub import RepoCard, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError


logger = logging.getLogger(__name__)

CARD_NAME = "README.md"

# Binds whoever passes these weights, or what is derived from them, on; so it is named whatever a copy's card says.
DINOV3_LICENCE = {
    "license": "other",
    "license_name": "dinov3-license",
    "license_link": "https://ai.meta.com/resources/models-and-libraries/dinov3-license",
}


class BackboneLicence(NamedTuple):
    """What is known of a backbone's licence.

    Attributes:
        metadata: `license`, and where they are given `license_name` and `license_link`, for the front of a model card;
            empty where the licence is not known.
        text: Sentences about it, in Markdown, without paths of this machine.
    """

    metadata: dict[str, str | list[str]]
    text: str


def backbone_licence(config, hub_name=None, token=None) -> BackboneLicence:
    """Licence of the backbone of a configuration, out of its model card; nothing is assumed where there is none.

    Args:
        config: A `VPTSPConfig`.
        hub_name: The backbone's name on the Hub; None where it is a local folder, or saved along without a name.
        token: Token of the Hub, for private backbones; None for the one that `hf auth login` keeps.
    """
    found, problem = _of_card(config, hub_name, token)
    if config.backbone_config.model_type == "dinov3_vit":
        text = (
            f"The backbone is a DINOv3. {_link(DINOV3_LICENCE)} passes on to what is derived from its weights, this "
            "retriever among it: read it, and pass it on with every copy."
        )
        if found and not _same_licence(found, DINOV3_LICENCE):
            text += f" The model card of this copy of the backbone names another, {_link(found)}."
        return BackboneLicence(dict(DINOV3_LICENCE), text)
    if found:
        text = (
            f"The backbone's licence, by its own model card, is {_link(found)}. It applies to what is made of it too."
        )
        return BackboneLicence(found, text)
    return BackboneLicence(
        {}, f"The backbone's licence applies to it and to what is made of it. Which one that is, {problem}."
    )


def _of_card(config, hub_name, token):
    """Fields of the licence in the model card of the backbone, and why there are none."""
    if config.backbone is None:
        return {}, "is not known: the backbone is saved along, without a name"
    try:
        path = Path(config.backbone, CARD_NAME)
        if hub_name is not None:
            path = hf_hub_download(hub_name, CARD_NAME, revision=config.backbone_revision, token=token)
        elif path.parent.is_dir() and not path.exists():
            return {}, "is not known: there is no model card beside the backbone"
        data = RepoCard.load(path).data  # not ModelCard, which also refuses what does not concern the licence
        return _checked(data, config, hub_name)
    except LocalEntryNotFoundError as error:  # neither in the cache nor to be had
        return _unread(config.backbone, error)
    except EntryNotFoundError:
        return {}, "is not known: the backbone has no model card"
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        return _unread(config.backbone, error)


def _checked(data, config, hub_name):
    fields = {name: data.get(name) for name in DINOV3_LICENCE if data.get(name) is not None}
    if "license" not in fields:
        return {}, "its model card does not say"
    names = fields["license"] if isinstance(fields["license"], list) else [fields["license"]]
    values = [*names, *(value for name, value in fields.items() if name != "license")]
    if not names or not all(isinstance(value, str) and value.strip() for value in values):
        raise ValueError(f"{', '.join(DINOV3_LICENCE)} must be names, got {fields}")
    if "://" not in (link := fields.get("license_link", "://")):  # a file of the backbone's repository
        del fields["license_link"]
        if hub_name is not None:
            fields["license_link"] = (
                f"https://huggingface.co/{hub_name}/blob/{config.backbone_revision or 'main'}/{link}"
            )
    return fields, None


def _unread(backbone, reason):
    logger.warning(
        f"the licence of the backbone {backbone} is left out of the model card: it can't be read ({reason})"
    )
    return {}, "could not be read from its model card when this one was written"


def _same_licence(one, other):
    return one.get("license_name", one["license"]) == other["license_name"]


def _link(fields) -> str:
    names = fields["license"] if isinstance(fields["license"], list) else [fields["license"]]
    shown = ", ".join(f"`{name}`" for name in names)
    if "license_name" in fields:
        shown = f"`{fields['license_name']}`"
    return f"[{shown}]({fields['license_link']})" if "license_link" in fields else shown


__all__ = ["BackboneLicence", "backbone_licence"]

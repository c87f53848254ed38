"""Which repositories or folders a data set on the Hub is made of: one, or others for what tests.

Nothing here imports torch or `datasets`.
"""

import re
from pathlib import Path
from typing import NamedTuple

from .class_folders import existing_folder
from .data_errors import DataError
from .dataset_options import HubOptions
from .table_files import is_saved_folder


__all__ = ["TEST_REPOS", "HubPlace", "hub_places", "is_folder"]

TEST_REPOS = {"test": "test_repo", "query": "query_repo", "gallery": "gallery_repo"}
"""Per split that tests, the option that says where it comes from."""
_REPOSITORY = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(@(?P<revision>[^@\s]+))?", re.ASCII)


class HubPlace(NamedTuple):
    """A repository or a local folder.

    Attributes:
        name: Of the repository; of a folder, its absolute path.
        config: Configuration of the repository; None for its only one.
        revision: Branch, tag or commit; None for the newest.
        is_folder: Whether it is a folder.
    """

    name: str
    config: str | None = None
    revision: str | None = None
    is_folder: bool = False


def hub_places(options: HubOptions, data_dir: str | None) -> dict[str, HubPlace]:
    """Where the splits come from.

    Args:
        options: Options of the data set.
        data_dir: A local copy of `dataset_repo`, in its place.

    Returns:
        `train` alone, of which all splits come, or with `test`, or with `query` and `gallery`.

    Raises:
        DataError: options contradict each other, one is no name of a repository, or a folder is not there.
    """
    if (options.dataset_repo is None) == (data_dir is None):
        got = "neither" if data_dir is None else "both"
        raise DataError(f"give either dataset_repo (a repository) or data_dir (a local copy of one), got {got}")
    given = {role: value for role, option in TEST_REPOS.items() if (value := getattr(options, option)) is not None}
    if set(given) not in (set(), {"test"}, {"query", "gallery"}):
        raise DataError(
            "what tests comes from test_repo, or from query_repo and gallery_repo; got "
            f"{' and '.join(TEST_REPOS[role] for role in given)}"
        )
    for role, option in TEST_REPOS.items():
        if given and role not in given and getattr(options, f"{role}_split") is not None:
            raise DataError(f"{role}_split is a split of {option}, got {' and '.join(TEST_REPOS[x] for x in given)}")
    places = {"train": _training_place(options, data_dir)}
    for role, value in given.items():
        if is_folder(value):
            places[role] = HubPlace(str(existing_folder(value)), is_folder=True)
        else:
            places[role] = _repository(value, TEST_REPOS[role])
    return places


def is_folder(value: str | None) -> bool:
    """Whether `test_repo` and the like name a local folder, and not a repository."""
    return value is not None and (value.startswith((".", "~")) or Path(value).is_absolute())


def _training_place(options: HubOptions, data_dir: str | None) -> HubPlace:
    if data_dir is None:
        place = _repository(options.dataset_repo, "dataset_repo")
        if None not in (place.revision, options.dataset_revision):
            raise DataError(f"dataset_repo {options.dataset_repo!r} names a revision, and so does dataset_revision")
        return place._replace(config=options.dataset_config, revision=place.revision or options.dataset_revision)
    folder = existing_folder(data_dir)
    if options.dataset_revision is not None:
        raise DataError(
            f"dataset_revision {options.dataset_revision!r} is of a repository, but {folder} is a local folder"
        )
    if options.dataset_config is not None and is_saved_folder(folder):
        raise DataError(
            f"dataset_config {options.dataset_config!r} is of a repository, but {folder} is what save_to_disk wrote, "
            "which has no configurations"
        )
    return HubPlace(str(folder), options.dataset_config, is_folder=True)


def _repository(value: str, option: str) -> HubPlace:
    match = _REPOSITORY.fullmatch(value)
    folder = "data_dir" if option == "dataset_repo" else "./ or / before it"
    if match is None or value.startswith("."):
        raise DataError(f"{option} must be a repository, as owner/name or owner/name@revision, got {value!r}")
    if Path(match["name"]).exists():  # which `datasets` would read in its place
        raise DataError(
            f"{option} {match['name']!r} is a repository, but there is a folder of that name here, which would be "
            f"read in its place: give the folder with {folder}, or start elsewhere"
        )
    return HubPlace(match["name"], revision=match["revision"])

"""The backbone's licence in a retriever's model card: passed on where it can be read, never made up."""

import copy
import logging

import httpx
import pytest
from conftest import tiny_vit_config
from huggingface_hub import ModelCard
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
)
from transformers import DINOv3ViTConfig

from vptsp import VPTSPConfig, VPTSPModel
from vptsp.training import backbone_licence as module
from vptsp.training.model_card import retriever_card


KEYS = ("license", "license_name", "license_link")
DINOV3_LINK = "https://ai.meta.com/resources/models-and-libraries/dinov3-license"
DINOV3 = ("other", "dinov3-license", DINOV3_LINK)
COMMIT = "c0ffee" * 6 + "c0ff"


def model_on(backbone, kind="vit", revision=None):
    configs = {
        "vit": tiny_vit_config,
        "dinov3_vit": lambda: DINOv3ViTConfig(
            hidden_size=48,
            num_hidden_layers=2,
            num_attention_heads=3,
            intermediate_size=40,
            patch_size=8,
            image_size=16,
        ),
    }
    model = VPTSPModel(VPTSPConfig(backbone_config=configs[kind](), num_prompts=2, embedding_dim=10))
    model.config.backbone, model.config.backbone_revision = backbone, revision
    return model


def front(card):
    """The three keys of a card, as a reader of it parses them; None where there is none."""
    data = ModelCard(str(card)).data.to_dict()
    return tuple(data.get(key) for key in KEYS)


def write_card(folder, metadata, text="# Backbone\n"):
    (folder / "README.md").write_text(f"---\n{metadata}\n---\n{text}" if metadata is not None else text)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The Hub's answer to a request for a backbone's card: a text, or an error. And what was asked for."""
    answer, asked = {}, []

    def download(name, file, revision=None, token=None):
        asked.append((name, file, revision, token))
        if isinstance(answer["is"], Exception):
            raise answer["is"]
        path = tmp_path / "cached.md"
        path.write_text(answer["is"])
        return str(path)

    monkeypatch.setattr(module, "hf_hub_download", download)
    return answer, asked


@pytest.mark.parametrize(
    "metadata, expected",
    [
        ("license: apache-2.0", ("apache-2.0", None, None)),
        ("license: cc-by-nc-4.0\nmodel-index: 3", ("cc-by-nc-4.0", None, None)),  # damaged elsewhere
        ("license: [mit, apache-2.0]", (["mit", "apache-2.0"], None, None)),
        (
            "license: other\nlicense_name: birds\nlicense_link: https://a.org/b",
            ("other", "birds", "https://a.org/b"),
        ),
        # a file of that folder, which nobody else has
        ("license: other\nlicense_name: birds\nlicense_link: LICENSE", ("other", "birds", None)),
    ],
)
def test_licence_beside_a_local_backbone_is_passed_on(tmp_path, metadata, expected):
    write_card(tmp_path, metadata)
    card = retriever_card(model_on(str(tmp_path)))
    assert front(card) == expected
    shown = expected[1] or (", ".join(f"`{name}`" for name in expected[0]) if expected[0][0] == "mit" else expected[0])
    assert shown in card.text.partition("## Licence")[2]
    assert str(tmp_path) not in str(card)


@pytest.mark.parametrize(
    "metadata, why",
    [
        (None, "its model card does not say"),
        ("tags: [vision]", "its model card does not say"),
        ("license: 3", "could not be read"),
        ("license: []", "could not be read"),
        ("license: mit\nlicense_name: {a: 1}", "could not be read"),
        ("license: [unclosed", "could not be read"),
        ("- a\n- list", "could not be read"),
    ],
)
def test_no_licence_is_made_up(tmp_path, caplog, metadata, why):
    write_card(tmp_path, metadata)
    with caplog.at_level(logging.WARNING, logger="vptsp"):
        card = retriever_card(model_on(str(tmp_path)))
    assert front(card) == (None, None, None)
    assert "The backbone's licence applies to it and to what is made of it" in card.text
    assert why in card.text
    assert str(tmp_path) not in str(card)
    assert (str(tmp_path) in caplog.text) == (why == "could not be read")


def test_a_backbone_without_card_or_name_or_that_is_gone(tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for backbone, why in ((bare, "there is no model card beside"), (tmp_path / "gone", "could not be read")):
        card = retriever_card(model_on(str(backbone)))
        assert front(card) == (None, None, None)
        assert why in card.text
        assert str(tmp_path) not in str(card)
    card = retriever_card(model_on(None))
    assert front(card) == (None, None, None)
    assert "saved along, without a name" in card.text


def test_licence_of_a_backbone_on_the_hub_is_that_of_its_commit(hub):
    answer, asked = hub
    answer["is"] = "---\nlicense: other\nlicense_name: birds\nlicense_link: LICENSE\n---\n"
    card = retriever_card(model_on("ann/backbone", revision=COMMIT), token="hf_secret")
    link = f"https://huggingface.co/ann/backbone/blob/{COMMIT}/LICENSE"
    assert front(card) == ("other", "birds", link)
    assert f"[`birds`]({link})" in card.text
    assert asked == [("ann/backbone", "README.md", COMMIT, "hf_secret")]
    assert "hf_secret" not in str(card)


def http_error(kind):
    return kind("not for you", response=httpx.Response(403, request=httpx.Request("GET", "https://hub/secret-path")))


@pytest.mark.parametrize(
    "error, why, warned",
    [
        (LocalEntryNotFoundError("no network"), "could not be read", True),
        (OfflineModeIsEnabled("offline"), "could not be read", True),
        (http_error(GatedRepoError), "could not be read", True),
        (http_error(RemoteEntryNotFoundError), "the backbone has no model card", False),
    ],
)
def test_hub_that_does_not_answer(hub, caplog, error, why, warned):
    hub[0]["is"] = error
    with caplog.at_level(logging.WARNING, logger="vptsp"):
        card = retriever_card(model_on("ann/backbone", revision=COMMIT))
    assert front(card) == (None, None, None)
    assert why in card.text
    assert "secret-path" not in str(card)
    assert ("ann/backbone" in caplog.text) == warned


def test_dinov3_names_its_licence_in_any_case(hub, tmp_path):
    answer, _ = hub
    answer["is"] = f"---\nlicense: other\nlicense_name: dinov3-license\nlicense_link: {DINOV3_LINK}\n---\n"
    own = model_on("facebook/dinov3-vits16-pretrain-lvd1689m", "dinov3_vit", COMMIT)
    texts = [retriever_card(own)]
    answer["is"] = LocalEntryNotFoundError("no network")
    texts += [retriever_card(own), retriever_card(model_on(str(tmp_path), "dinov3_vit"))]
    texts.append(retriever_card(model_on(None, "dinov3_vit")))
    for card in texts:
        assert front(card) == DINOV3
        assert f"[`dinov3-license`]({DINOV3_LINK}) passes on to what is derived" in card.text
        assert "names another" not in card.text
    write_card(tmp_path, "license: mit")
    card = retriever_card(model_on(str(tmp_path), "dinov3_vit"))
    assert front(card) == DINOV3
    assert "names another, `mit`" in card.text


def test_a_licence_that_is_given_wins_and_leaves_nothing_of_the_other(tmp_path):
    model = model_on(str(tmp_path), "dinov3_vit")
    card = retriever_card(model, license="cc-by-4.0")
    assert front(card) == ("cc-by-4.0", None, None)
    assert "dinov3-license" in card.text  # it binds all the same
    given = copy.deepcopy(dict(zip(KEYS, ("other", "ours", "https://a.org/ours"), strict=True)))
    assert front(retriever_card(model, **given)) == tuple(given.values())

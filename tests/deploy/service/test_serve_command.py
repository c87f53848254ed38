"""`vptsp serve`."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import torch

from vptsp import RetrievalIndex
from vptsp.deploy import search_page
from vptsp.deploy.service.command import KEY_VARIABLE, main, read_key
from vptsp.search import commands, inputs


@pytest.fixture
def place(tmp_path):
    RetrievalIndex.build(["a", "b"], torch.eye(4)[:2], {"class_name": ["x", "y"]}).save(tmp_path / "index")
    return tmp_path / "index"


def refused(capsys, *words, run=main):
    with pytest.raises(SystemExit) as error:
        run([str(word) for word in words])
    assert error.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_what_cannot_be_served_is_said(place, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    assert "no index" in refused(capsys, "--index", tmp_path / "nothing")
    assert "--model or --no_model" in refused(capsys, "--index", place)
    assert "timeout must be > 0" in refused(capsys, "--index", place, "--timeout", "0")
    assert "--decoders" in refused(capsys, "--index", place, "--decoders", "0")
    assert "--port" in refused(capsys, "--index", place, "--port", "70000")
    assert "can't be read" in refused(capsys, "--index", place, "--api_key_file", tmp_path / "key")
    (tmp_path / "key").write_text("\n")
    assert "printable" in refused(capsys, "--index", place, "--api_key_file", tmp_path / "key")


@pytest.mark.parametrize("app", [False, True])
def test_a_port_in_use_is_found_before_anything_is_opened(tmp_path, capsys, monkeypatch, app):
    """The index is not even there."""
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    run = search_page.main if app else main
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        expected = f"--port {port} of 127.0.0.1 is in use by another program: stop that, or give another --port"
        assert expected in refused(capsys, "--index", tmp_path, "--port", port, run=run)
    assert "--port" not in refused(capsys, "--index", tmp_path, "--port", port, run=run)
    assert "--port must be in" in refused(capsys, "--index", tmp_path, "--port", "70000", run=run)
    message = refused(capsys, "--index", tmp_path, "--host", "192.0.2.1", "--port", port, run=run)
    assert "--host must be a name or an address of this machine, got '192.0.2.1'" in message


def test_what_is_not_installed_is_said(place, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "gradio", None)
        message = refused(capsys, "--index", tmp_path, run=search_page.main)
        assert message == "error: vptsp app needs gradio: pip install 'vptsp[app]'"

    def load(*_, **__):
        raise ImportError("lora_rank is 2, which needs the package peft: pip install peft")

    monkeypatch.setattr(inputs, "embedder_of", load)
    monkeypatch.setattr(inputs.Embedder, "from_pretrained", load)
    (tmp_path / "model").mkdir()
    (tmp_path / "a.png").touch()
    words = ("--index", place, "--model", tmp_path / "model")
    for run, more in ((main, ("--port", "0")), (search_page.main, ("--image_root", tmp_path))):
        assert "error: lora_rank is 2, which needs the package peft" in refused(capsys, *words, *more, run=run)
    words = ["search", *words, "--image", tmp_path / "a.png"]
    assert commands.main(list(map(str, words))) == 2
    assert capsys.readouterr().err == "error: lora_rank is 2, which needs the package peft: pip install peft\n"


def test_keys(tmp_path, monkeypatch):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    assert read_key(None) is None
    monkeypatch.setenv(KEY_VARIABLE, "abc")
    assert read_key(None) == "abc"
    (tmp_path / "key").write_text("secret\n")
    assert read_key(tmp_path / "key") == "secret"


@pytest.mark.slow
def test_a_service_that_is_told_to_stop_saves_and_ends(place, tmp_path):
    log = (tmp_path / "log").open("w")
    command = [sys.executable, "-m", "vptsp.cli", "serve", "--index", str(place), "--no_model", "--port", "0"]
    process = subprocess.Popen(command, stderr=log, env={**os.environ, KEY_VARIABLE: "k"})
    try:
        deadline, address = time.monotonic() + 120, None
        while address is None and time.monotonic() < deadline:
            lines = [line for line in (tmp_path / "log").read_text().splitlines() if "running on" in line]
            address = lines[0].partition("running on ")[2].split()[0] if lines else None
            time.sleep(0.1)
        body = json.dumps({"items": [{"id": "c", "vector": [0, 0, 1, 0]}]}).encode()
        headers = {"X-API-Key": "k", "Content-Type": "application/json"}
        request = urllib.request.Request(f"{address}/vectors", body, headers)
        with urllib.request.urlopen(request) as response:
            assert json.load(response)["added"] == 1
        assert (place / "journal.jsonl").exists()
    finally:
        process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    assert not (place / "journal.jsonl").exists()
    assert RetrievalIndex.open(place).ids == ["a", "b", "c"]

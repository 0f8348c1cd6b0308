"""Small things that a user of the command line meets: values in messages, notes, pipes, races."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from chat_decoder import edit, save_chat_decoder
from tiny_encoder import save_tiny

from pocketglm.artifacts.manifest import CommandGrammar
from pocketglm.artifacts.output import output_folder
from pocketglm.artifacts.schemas import CompressResult, InspectResult
from pocketglm.cli._main import main
from pocketglm.stages import compress as compress_stage
from pocketglm.stages import export as export_stage
from pocketglm.stages.compress import compress
from pocketglm.stages.plan import Plan
from pocketglm.text.tokenizer import Tokenizer

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("details") / "encoder")


def run(capsys: Capture, *arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `pocketglm ...` in this process."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    code, captured = stop.value.code, capsys.readouterr()
    return code if isinstance(code, int) else 0, captured.out, captured.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("run", "x", "text", "--threads", "0"), "'--threads': Input should be greater"),
        (("run", "x", "text", "--threads", "0"), ", got '0'\n"),
        (("run", "x", "text", "--temperature=-1"), ", got '-1'\n"),
        (("run", "x", "text", "--threads", "abc"), ", got 'abc'\n"),
        (("export", "x", "--out", "y", "--logits", "some"), "'some' is not one of"),
    ],
)
def test_a_usage_error_names_option_and_value(
    arguments: tuple[str, ...], words: str, capsys: Capture
) -> None:
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert words in err
    assert "try: pocketglm" in err


def test_a_failed_target_reads_like_any_error(
    encoder: Path, tmp_path: Path, capsys: Capture
) -> None:
    scheme = ["--method", "quantize_rtn", "--out", tmp_path / "q"]
    assert run(capsys, "compress", encoder, *scheme)[0] == 0
    out = tmp_path / "e"
    code, _, err = run(capsys, "export", tmp_path / "q", "--opset", 13, "--out", out)
    assert code == 2
    assert f"\nerror: onnx: onnx cannot carry {tmp_path / 'q'}\n  - " in err
    assert not out.exists()
    (out / "onnx").mkdir(parents=True)
    (out / "onnx" / "mine").touch()
    code, words, err = run(capsys, "export", encoder, "--out", out, "--json")
    assert code == 2
    assert f"error: onnx: {out / 'onnx'} exists and is not an output" in err
    assert "\n  try: choose another --out" in err
    (entry,) = json.loads(words)["targets"]
    assert entry["hint"].startswith("choose another --out")


def test_predict_keeps_its_inputs(encoder: Path, tmp_path: Path, capsys: Capture) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a b"}\n')
    (tmp_path / "link.jsonl").symlink_to(rows)
    for out in (rows, tmp_path / "link.jsonl"):
        code, _, err = run(capsys, "predict", encoder, rows, "--out", out, "--force")
        assert (code, f"{out} would overwrite {rows}" in err) == (2, True)
    code, _, err = run(capsys, "predict", encoder, rows, "--out", encoder / "rows.csv")
    assert (code, f"{encoder / 'rows.csv'} lies in {encoder}" in err) == (2, True)
    code, _, err = run(capsys, "predict", encoder, rows, "--out", rows / "rows.csv")
    assert (code, "is a file, not a folder" in err) == (2, True)
    assert rows.read_text() == '{"text": "a b"}\n'


def test_a_reader_that_has_read_enough(encoder: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("a b\n" * 6000)
    files = [str(encoder), str(tmp_path / "texts.txt")]
    command = [sys.executable, "-m", "pocketglm", "predict", *files]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stderr
        assert process.stdout.readline().startswith(b"label")
        process.stdout.close()
        assert b"rror" not in process.stderr.read()
    assert process.returncode == 0


def test_run_tells_how_much_of_a_text_it_cut(encoder: Path, capsys: Capture) -> None:
    """48 tokens: 46 letters and two special tokens."""
    _, _, err = run(capsys, "run", encoder, "a " * 46)
    assert err == ""
    _, _, err = run(capsys, "run", encoder, "a " * 50)
    assert err == "the text is longer than 48 tokens: its last 4 were cut\n"
    code, out, err = run(capsys, "run", encoder, "a " * 50, "--max-length", 10, "--json")
    assert (code, json.loads(out)["label"][:5]) == (0, "label")
    assert "longer than 10 tokens: its last 42 were" in err


def test_remote_code_of_a_known_architecture(
    encoder: Path, tmp_path: Path, capsys: Capture, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "remote"
    shutil.copytree(encoder, folder)
    edit(folder / "config.json", auto_map={"AutoModel": "modeling_x.X"})
    code, out, _ = run(capsys, "inspect", folder, "--json")
    (note,) = InspectResult.model_validate_json(out).notes
    assert code == 0
    assert note.startswith(f"{folder} asks for its own Python code (auto_map in config.json)")
    assert "never run" in note
    assert [r.getMessage() for r in caplog.records if r.name.startswith("pocketglm")] == [note]
    assert f"note                     {note}" in run(capsys, "inspect", folder)[1]
    compress(folder, Plan.single("quantize_rtn"), tmp_path / "q")
    assert "auto_map" not in (tmp_path / "q" / "config.json").read_text()


def test_the_note_on_remote_code_goes_to_stderr_once(encoder: Path, tmp_path: Path) -> None:
    shutil.copytree(encoder, tmp_path / "remote")
    edit(tmp_path / "remote" / "config.json", auto_map={"AutoModel": "modeling_x.X"})
    command = [sys.executable, "-m", "pocketglm", "run", "remote", "a b"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stderr.startswith("remote asks for its own Python code (auto_map")
    assert done.stderr.count("\n") == 1
    assert "auto_map" not in done.stdout


def test_a_folder_without_a_tokenizer(encoder: Path, tmp_path: Path, capsys: Capture) -> None:
    folder = tmp_path / "bare"
    shutil.copytree(encoder, folder)
    (folder / "tokenizer.json").unlink()
    assert "there is no tokenizer.json, which train" in run(capsys, "inspect", folder)[1]
    assert "tokenizer.json" not in run(capsys, "inspect", encoder)[1]
    compress(folder, Plan.single("quantize_rtn"), tmp_path / "q")
    code, _, err = run(capsys, "export", tmp_path / "q", "--out", tmp_path / "e")
    assert (code, "has no tokenizer.json" in err) == (2, True)
    assert "writing" not in err  # before the work
    assert not (tmp_path / "e").exists()


def test_an_equal_command_that_was_quicker(
    encoder: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends between our look and our lock."""
    quicker: list[Path] = []

    def late(out: Path, *arguments: Any) -> Any:
        if not quicker:
            quicker.append(out)
            compress(encoder, Plan.single("quantize_rtn"), out)
        return output_folder(out, *arguments)

    monkeypatch.setattr(compress_stage, "output_folder", late)
    arguments = ["compress", encoder, "--method", "quantize_rtn", "--out", tmp_path / "q"]
    code, out, err = run(capsys, *arguments, "--json")
    assert (code, CompressResult.model_validate_json(out).already_done) == (0, True), err
    assert quicker == [tmp_path / "q"]
    shutil.rmtree(tmp_path / "q")
    quicker.clear()
    monkeypatch.setenv("WORLD_SIZE", "2")  # of several processes none may begin anew
    code, _, err = run(capsys, *arguments)
    assert (code, "has just finished" in err) == (4, True)


def test_inspect_shows_what_a_decoder_needs(tmp_path: Path, capsys: Capture) -> None:
    folder = save_chat_decoder(tmp_path / "ckpt", positions=96)
    assert "end of text              no token" in run(capsys, "inspect", folder)[1]
    eos = Tokenizer.load(folder).inner.token_to_id("<|user|>")
    edit(folder / "config.json", eos_token_id=[eos])
    grammar = CommandGrammar(intents={"alarm": ["time"], "music": []})
    edit(folder / "pocketglm.json", command=grammar.model_dump())
    entry = export_stage.export(folder, ["onnx"], tmp_path / "e").targets[0]
    assert entry.ok, entry.error
    for path, own in ((folder, "0.5 KiB a token in fp16"), (entry.out, "1 KiB a token in float32")):
        _, shown, _ = run(capsys, "inspect", path)
        rows = {line[2:].split("  ")[0]: line.split("  ")[-1] for line in shown.splitlines()[1:]}
        assert rows["parameters"].strip() == "120,640"
        assert rows["context"].strip() == "96 tokens, prompt and answer together"
        assert own in rows["key/value heads"]
        assert rows["end of text"].strip() == f"token {eos}"
        assert rows["intents"].strip() == "2: alarm, music"
        assert ("logits" in rows) == (path != folder)
    _, out, _ = run(capsys, "inspect", entry.out or "", "--json")
    assert InspectResult.model_validate_json(out).parameters == 120_640

"""The command line as a user types it: the whole path on a tiny model, and what goes wrong."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tiny_encoder import save_tiny

from pocketglm import registry
from pocketglm.artifacts.schemas import RESULTS
from pocketglm.cli._main import help_line, main

WORDS = {"music": "abc", "alarm": "xyz", "oos": "kmo"}


@dataclass
class Done:
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        value: dict[str, Any] = json.loads(self.out)
        return value


class Shell:
    """Runs `pocketglm` in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *arguments: object) -> Done:
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(a) for a in arguments])
        captured = self.capsys.readouterr()
        code = stop.value.code
        return Done(code if isinstance(code, int) else 0, captured.out, captured.err)

    def ok(self, verb: str, *arguments: object) -> dict[str, Any]:
        """Runs with --json; the one object on stdout must fit the verb's schema."""
        done = self(verb, *arguments, "--json")
        assert done.code == 0, done.err
        RESULTS[verb].model_validate_json(done.out)
        return done.json


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny embedding model and a data folder whose labels are letters."""
    folder = tmp_path_factory.mktemp("cli")
    save_tiny(folder / "base", head="embedding", num_labels=0)
    (folder / "data").mkdir()
    for split, count in (("train", 30), ("validation", 10), ("test", 20)):
        rows = [
            {
                "text": f"{letters[i % 3]} {letters[(i // 3) % 3]}{'q' * (i % 5)} {split[0]}",
                "label": label,
            }
            for label, letters in WORDS.items()
            for i in range(count)
        ]
        (folder / "data" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


@pytest.fixture(scope="module")
def trained(world: Path) -> Path:
    with pytest.raises(SystemExit) as stop:
        main(["train", str(world / "base"), "--task", "intent", "--data", str(world / "data"),
              "--epochs", "3", "--lr", "1e-3", "--out", str(world / "ckpt")])  # fmt: skip
    assert stop.value.code == 0
    return world / "ckpt"


@pytest.fixture(scope="module")
def exported(trained: Path, world: Path) -> Path:
    for command in (
        ["compress", trained, "--method", "quantize_rtn", "--set", "bits=8", "--out", world / "q"],
        ["export", world / "q", "--target", "onnx", "--out", world / "e"],
    ):
        with pytest.raises(SystemExit) as stop:
            main([str(a) for a in command])
        assert stop.value.code == 0
    return world / "e" / "onnx"


def test_the_whole_path(
    shell: Shell, world: Path, trained: Path, exported: Path, tmp_path: Path
) -> None:
    data = world / "data"
    assert shell.ok("inspect", trained)["labels"] == ["alarm", "music", "oos"]
    assert shell.ok("inspect", world / "q")["precision"] == "int8"
    assert shell.ok("inspect", exported, "--verify")["kind"] == "export"
    for path in (trained, exported):
        scores = shell.ok("eval", path, "--task", "intent", "--data", data)
        assert scores["metrics"]["accuracy"]["n"] == 40
        assert scores["metrics"]["accuracy"]["value"] > 0.8
    answer = shell.ok("run", exported, "a b")
    assert answer["label"] == "music"
    assert len(answer["top"]) == 3
    texts = tmp_path / "texts.txt"
    texts.write_text("a b\nx y\n")
    assert [p["label"] for p in shell.ok("predict", exported, texts)["predictions"]] == [
        "music", "alarm",
    ]  # fmt: skip
    speed = shell.ok("bench", exported, "--runs", 5, "--threads", 1, "--tokens", 8)
    assert 0 < speed["p50_ms"] <= speed["p99_ms"]
    prove = ["prove", exported, "--baseline", trained, "--task", "intent", "--data", data]
    proof = shell.ok(*map(str, prove), "--pairs", 7, "--threads", 1, "--out", tmp_path / "p")
    assert proof["verdict"] == "stated"
    assert Path(proof["report"]).read_text().startswith("<!")
    assert shell.ok("inspect", tmp_path / "p")["kind"] == "proof"
    gate = shell(*prove, "--pairs", 7, "--threads", 1, "--min-speedup", 99, "--out", tmp_path / "g")
    assert gate.code == 1
    assert "fail" in gate.out
    assert (tmp_path / "g" / "proof.json").is_file()


def test_words_for_people(shell: Shell, trained: Path, exported: Path, world: Path) -> None:
    assert "alarm" in shell("inspect", trained).out
    assert "MB" in shell("inspect", exported).out
    assert "music" in shell("run", exported, "a b").out
    assert "values" in shell("run", world / "base", "a b").out
    evaluated = shell("eval", trained, "--task", "intent", "--data", world / "data", "--limit", 30)
    assert "accuracy" in evaluated.out
    assert "p50" in shell("bench", exported, "--duration", 0.2, "--tokens", 4).out
    dry = shell("compress", trained, "--method", "quantize_rtn", "--out", world / "x", "--dry-run")
    assert "nothing written" in dry.out
    assert not (world / "x").exists()


def test_doing_it_again_is_already_done(
    shell: Shell, world: Path, trained: Path, exported: Path
) -> None:
    rtn = ["--method", "quantize_rtn", "--set"]
    assert shell.ok("compress", trained, *rtn, "bits=8", "--out", world / "q")["already_done"]
    again = shell.ok("export", world / "q", "--out", world / "e")
    assert again["targets"][0]["already_done"]
    other = shell("compress", trained, *rtn, "bits=4", "--out", world / "q")
    assert other.code == 2
    assert "--force" in other.err


def test_a_crash_is_no_failed_gate(shell: Shell, trained: Path, tmp_path: Path) -> None:
    """A broken config that nobody foresaw: exit code 4 and JSON, no traceback."""
    model = bad("", trained, tmp_path)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"architectures": 5}))
    done = shell("inspect", model, "--json")
    assert (done.code, done.json["error"]["exit_code"]) == (4, 4)
    assert "--debug" in done.err
    with pytest.raises(TypeError):
        main(["inspect", str(model), "--debug"])


def test_stdin_is_answered_line_by_line(exported: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pocketglm", "run", str(exported), "--top", "1"],
        input="a b\n\nx y\n", capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["music", "alarm"]
    command = [sys.executable, "-m", "pocketglm", "run", str(exported), "--json"]
    one = subprocess.run(command, input="a b\n", capture_output=True, text=True, check=True)
    assert json.loads(one.stdout)["label"] == "music"
    none = subprocess.run(command, input="", capture_output=True, text=True, check=False)
    assert (none.returncode, "--json needs one text" in none.stderr) == (2, True)


def test_cache(shell: Shell, trained: Path, tmp_path: Path) -> None:
    shell("compress", trained, "--method", "quantize_rtn", "--out", tmp_path / "q")
    assert shell.ok("cache")["entries"] == 1
    assert shell.ok("cache", "--clear")["cleared"] is True
    assert shell.ok("cache")["entries"] == 0
    assert "0 steps" in shell("cache").out


@pytest.mark.parametrize("verb", sorted(set(registry.names("cli")) - {"schema"}))
def test_every_verb_has_help_and_a_schema(verb: str, shell: Shell) -> None:
    assert help_line(verb)
    assert shell(verb, "--help").code == 0
    assert json.loads(shell("schema", verb).out)["properties"]


def test_usage(shell: Shell) -> None:
    assert shell().code == 2
    assert "Verbs:" in shell("--help").out
    assert shell("--version").out.startswith("pocketglm 0.")
    wrong = shell("evl")
    assert (wrong.code, wrong.out) == (2, "")
    assert "unknown verb 'evl'" in wrong.err
    assert "did you mean 'eval'?" in wrong.err
    assert shell("schema", "x").code == 2
    missing = shell("eval", "--json")
    assert (missing.code, missing.json["error"]["type"]) == (2, "UsageError")
    assert "pocketglm eval --help" in missing.err


# --- bad input: the value, the way out, the exit code, nothing half-written ----------------------


def bad(kind: str, base: Path, folder: Path) -> Path:
    """A copy of `base` with one thing wrong."""
    model = folder / "model"
    shutil.copytree(base, model)
    weights = model / "model.safetensors"
    config = json.loads((model / "config.json").read_text())
    if kind == "missing weights":
        weights.unlink()
    elif kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif kind == "corrupt":
        weights.write_bytes(weights.read_bytes()[:8] + b"x" * 50_000)
    elif kind == "shapes":
        config["intermediate_size"] = 333
    elif kind == "architecture":
        config["model_type"] = "frobnet"
    elif kind == "pickle":
        weights.rename(model / "pytorch_model.bin")
    elif kind == "remote code":
        weights.unlink()
        config["auto_map"] = {"AutoModel": "modeling_x.X"}
    elif kind == "no tokenizer":
        (model / "tokenizer.json").unlink()
    elif kind == "ids":
        tokenizer = json.loads((model / "tokenizer.json").read_text())
        tokenizer["model"]["vocab"]["zzz"] = 999
        (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    (model / "config.json").write_text(json.dumps(config))
    return model


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing weights", "no *.safetensors"),
        ("truncated", "truncated"),
        ("corrupt", "not JSON"),
        ("shapes", "333"),
        ("architecture", "frobnet"),
        ("pickle", "pickled"),
        ("remote code", "remote code"),
        ("no tokenizer", "tokenizer.json"),
        ("ids", "999"),
    ],
)
def test_bad_checkpoints(
    kind: str, words: str, trained: Path, tmp_path: Path, shell: Shell
) -> None:
    done = shell("export", bad(kind, trained, tmp_path), "--out", tmp_path / "out", "--json")
    assert done.code == 2
    error = done.json["error"]
    assert words in error["message"]
    assert error["hint"]
    assert words in done.err
    assert "Traceback" not in done.err
    assert sorted(p.name for p in tmp_path.iterdir()) in (["model"], ["model", "step-cache"])


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.jsonl", "", "empty.jsonl"),
        ("bad.jsonl", '{"text": "a", "label": "music"}\n{"text": \n', "bad.jsonl:2"),
        ("label.jsonl", '{"text": "a", "label": "zebra"}\n', "zebra"),
        ("column.csv", "words,label\na,music\n", "words"),
    ],
)
def test_bad_data(
    name: str, content: str, words: str, trained: Path, tmp_path: Path, shell: Shell
) -> None:
    file = tmp_path / name
    file.write_text(content)
    done = shell("eval", trained, "--task", "intent", "--data", file)
    assert done.code == 2
    assert words in done.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--method", "quantize_rtm"], "did you mean 'quantize_rtn'?"),
        (["--method", "quantize_rtn", "--set", "bitz=8"], "bitz"),
        (["--method", "quantize_rtn", "--set", "bits=5"], "bits"),
        (["--method", "quantize_rtn", "--set", "bits"], "key=value"),
        ([], "--plan"),
        (["--plan", "PLAN"], "plan.yaml:3"),
        (["--plan", "PLAN", "--set", "bits=8"], "--set"),
    ],
)
def test_bad_plans(
    arguments: list[str], words: str, trained: Path, tmp_path: Path, shell: Shell
) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text("steps:\n  - quantize_rtn:\n      bitz: 8\n")
    given = [str(plan) if a == "PLAN" else a for a in arguments]
    done = shell("compress", trained, *given, "--out", tmp_path / "out")
    assert done.code == 2
    assert words in done.err
    assert not list(tmp_path.glob("out*"))


def test_a_group_that_does_not_divide(shell: Shell, tmp_path: Path) -> None:
    save_tiny(tmp_path / "m", hidden_size=96, num_heads=4)
    rtn = ["--method", "quantize_rtn", "--set", "bits=4", "--set", "group_size=128"]
    done = shell("compress", tmp_path / "m", *rtn, "--out", tmp_path / "out")
    assert done.code == 2
    assert "K = 96" in done.err
    assert "32" in done.err


def test_other_bad_usage(shell: Shell, trained: Path, world: Path, tmp_path: Path) -> None:
    data = world / "data"
    hub = shell("inspect", "THUDM/glm-edge-1.5b-chat")
    assert hub.code == 2
    assert "hf download THUDM/glm-edge-1.5b-chat" in hub.err
    target = shell("export", trained, "--target", "onyx", "--out", tmp_path / "e")
    assert target.code == 2
    assert "did you mean 'onnx'?" in target.err
    task = shell("eval", trained, "--task", "intend", "--data", data)
    assert (task.code, "intent" in task.err) == (2, True)
    empty = shell("run", trained, " ")
    assert (empty.code, "empty" in empty.err) == (2, True)
    rate = shell("train", world / "base", "--task", "intent", "--data", data, "--lr", 0,
                 "--out", tmp_path / "t")  # fmt: skip
    assert (rate.code, "--learning-rate" in rate.err) == (2, True)
    gate = shell("prove", trained, "--baseline", trained, "--task", "intent", "--data", data,
                 "--min-speedup", "nan", "--out", tmp_path / "p")  # fmt: skip
    assert (gate.code, "finite" in gate.err) == (2, True)


def test_a_missing_package_names_the_pip_command(world: Path, tmp_path: Path) -> None:
    """accelerate is hidden from a fresh interpreter, as if it were not installed."""
    code = (
        "import sys; sys.modules['accelerate'] = None\n"
        "from pocketglm.cli._main import main\n"
        f"main(['train', {str(world / 'base')!r}, '--task', 'intent', '--data', "
        f"{str(world / 'data')!r}, '--out', {str(tmp_path / 'out')!r}])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    assert "pip install 'pocketglm[train]'" in done.stderr
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_training_resumes(how: signal.Signals, world: Path, tmp_path: Path) -> None:
    def command(out: Path) -> list[str]:
        return [sys.executable, "-m", "pocketglm", "train", str(world / "base"), "--task", "intent",
                "--data", str(world / "data"), "--epochs", "40", "--patience", "40",
                "--out", str(out)]  # fmt: skip

    out = tmp_path / "out"
    process = subprocess.Popen(
        command(out), stderr=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "out.partial" / "training.pt").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    os.kill(process.pid, how)
    _, err = process.communicate()
    assert not out.exists()
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert b"resumes" in err
    subprocess.run(command(out), check=True, capture_output=True)
    subprocess.run(command(tmp_path / "whole"), check=True, capture_output=True)
    for name in ("model.safetensors", "training.json"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()

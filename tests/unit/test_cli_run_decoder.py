"""`run` with decoders as a user types it: streams, chat, stdin, a terminal, and bad input."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_decoder import edit, save_chat_decoder
from safetensors.torch import load_file, save_file
from tiny_encoder import save_tiny
from transformers import AutoModelForCausalLM

from pocketglm.artifacts.manifest import CommandGrammar
from pocketglm.artifacts.schemas import RunResult
from pocketglm.cli._main import main
from pocketglm.contracts import RunOptions
from pocketglm.runtimes import open_decoder
from pocketglm.stages.export import export
from pocketglm.text.frame import mark_names
from pocketglm.text.tokenizer import Tokenizer

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny chat model and its ONNX export."""
    folder = tmp_path_factory.mktemp("run")
    save_chat_decoder(folder / "ckpt")
    assert export(folder / "ckpt", ["onnx"], folder / "out").targets[0].ok
    return folder


def run(capsys: Capture, *arguments: object, verb: str = "run") -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([verb, *map(str, arguments)])
    code, captured = stop.value.code, capsys.readouterr()
    return code if isinstance(code, int) else 0, captured.out, captured.err


def ok(capsys: Capture, *arguments: object) -> RunResult:
    code, out, err = run(capsys, *arguments, "--json")
    assert code == 0, err
    assert out.count("\n") == 1
    return RunResult.model_validate_json(out)


def refused(capsys: Capture, words: list[str], *arguments: object, verb: str = "run") -> str:
    """Exit 2, every word in the message or hint, and a hint; returns stderr."""
    code, out, err = run(capsys, *arguments, verb=verb)
    assert code == 2, err
    assert not out
    for word in words:
        assert word in err
    assert "  try: " in err
    assert "Traceback" not in err
    return err


def greedy(folder: Path, ids: list[int], count: int) -> list[int]:
    """transformers' own choice, one token at a time, without a cache."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    model.eval()
    new: list[int] = []
    with torch.inference_mode():
        for _ in range(count):
            new.append(int(model(torch.tensor([ids + new])).logits[0, -1].argmax()))
    return new


# --- one answer ----------------------------------------------------------------------------------


def test_the_answer_is_that_of_transformers_after_the_chat_template(
    world: Path, capsys: Capture
) -> None:
    tokenizer = Tokenizer.load(world / "ckpt")
    ids = tokenizer.encode_prompt("[gMASK]<sop><|user|>\nhi<|assistant|>\n", special=False)
    assert len(ids) == 8
    expected = tokenizer.decode(greedy(world / "ckpt", ids, 12))
    for path, runtime in ((world / "ckpt", "torch"), (world / "out/onnx", "onnx"),
                          (world / "out/onnx", "genai")):  # fmt: skip
        own = () if runtime != "genai" else ("--runtime", "genai")
        result = ok(capsys, path, "hi", "--max-new-tokens", 12, *own)
        assert (result.runtime, result.text, result.answer) == (runtime, "hi", expected)
        assert (result.prompt_tokens, result.new_tokens, result.finish) == (8, 12, "length")
        assert result.prefill_per_second
        assert result.decode_per_second
        assert 0 < (result.first_token_ms or 0) < result.milliseconds
    code, out, err = run(capsys, world / "ckpt", "hi", "--max-new-tokens", 12)
    assert (code, out) == (0, expected + "\n")
    assert "[8 prompt tokens at " in err
    assert "12 new tokens at " in err
    assert "stopped at --max-new-tokens 12" in err


def test_raw_leaves_the_template_out_and_system_goes_into_it(world: Path, capsys: Capture) -> None:
    path = world / "ckpt"
    few = ("--max-new-tokens", 3)
    assert ok(capsys, path, "hi", "--raw", *few).prompt_tokens == 2
    with_system = ok(capsys, path, "hi", "--system", "Be brief", *few)
    assert with_system.prompt_tokens == 8 + len("|\nBe brief")
    refused(capsys, ["--system has no place", "--raw"], path, "hi", "--system", "x", "--raw")


def test_every_stop_id_ends_it(world: Path, tmp_path: Path, capsys: Capture) -> None:
    ids = Tokenizer.load(world / "ckpt").encode_prompt("go")
    new = greedy(world / "ckpt", ids, 16)
    place = max(new.index(token) for token in new)
    assert place > 3
    other = next(token for token in range(8, 264) if token not in new)
    for number, file in enumerate(("config.json", "generation_config.json")):
        model = Path(shutil.copytree(world / "ckpt", tmp_path / str(number)))
        edit(model / file, eos_token_id=[other, new[place]])
        result = ok(capsys, model, "go", "--raw")
        assert (result.finish, result.new_tokens) == ("stop", place)
        assert "end of text" in run(capsys, model, "go", "--raw")[2]


def test_a_beginning_token_comes_before_raw_text(
    world: Path, tmp_path: Path, capsys: Capture
) -> None:
    model = Path(shutil.copytree(world / "ckpt", tmp_path / "m"))
    edit(model / "tokenizer_config.json", bos_token="<sop>", add_bos_token=True)
    assert ok(capsys, model, "hi", "--raw", "--max-new-tokens", 2).prompt_tokens == 3
    # The template writes its own.
    assert ok(capsys, model, "hi", "--max-new-tokens", 2).prompt_tokens == 8


def test_the_seed_and_the_temperature(world: Path, capsys: Capture) -> None:
    def text(*options: object) -> str | None:
        return ok(capsys, world / "ckpt", "hi", "--max-new-tokens", 12, *options).answer

    warm = ("--temperature", 1.5)
    assert text(*warm, "--seed", 1) == text(*warm, "--seed", 1) != text(*warm, "--seed", 2)
    assert text(*warm, "--top-p", 1e-6) == text()


@pytest.mark.parametrize(
    ("options", "word"),
    [(("--top-p", 0), "top_p 0"), (("--top-p", "nan"), "top_p nan"),
     (("--temperature", "nan"), "--temperature"), (("--temperature", -1), "--temperature"),
     (("--max-new-tokens", 0), "--max-new-tokens"), (("--seed", -1), "--seed")],
)  # fmt: skip
def test_numbers_out_of_range(
    options: tuple[object, ...], word: str, world: Path, capsys: Capture
) -> None:
    refused(capsys, [word], world / "ckpt", "hi", *options)


# --- the context ---------------------------------------------------------------------------------


def test_a_prompt_longer_than_the_context(world: Path, capsys: Capture) -> None:
    words = ["the prompt has 106 tokens, the context holds 64", "shorten"]
    refused(capsys, words, world / "ckpt", "x" * 100)
    refused(capsys, ["70 tokens"], world / "out/onnx", "x" * 70, "--raw", "--runtime", "genai")
    refused(capsys, ["no room for an answer"], world / "ckpt", "x" * 64, "--raw")


def test_less_room_than_was_asked_for_is_told(world: Path, capsys: Capture) -> None:
    code, out, err = run(capsys, world / "ckpt", "x" * 60, "--raw", "--max-new-tokens", 100)
    assert code == 0
    assert out
    assert "context of 64 tokens has room for 4 new ones" in err
    assert "--max-new-tokens asks for 100" in err
    code, out, err = run(capsys, world / "ckpt", "x" * 60, "--raw")
    assert "has room" not in err
    assert "4 new tokens" in err
    assert "stopped: the context of 64 tokens is full" in err
    result = ok(capsys, world / "ckpt", "x" * 60, "--raw")
    assert (result.finish, result.new_tokens) == ("context", 4)


@pytest.mark.parametrize("path", ["ckpt", "out/onnx"])
def test_the_size_of_the_cache(path: str, world: Path, capsys: Capture) -> None:
    result = ok(capsys, world / path, "x", "--raw", "--context", 10)
    assert (result.finish, result.new_tokens) == ("context", 9)
    refused(capsys, ["context of 65 tokens", "64"], world / path, "x", "--context", 65)


# --- stdin ---------------------------------------------------------------------------------------


def pocketglm(*arguments: object, given: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pocketglm", *map(str, arguments)]
    return subprocess.run(command, input=given, capture_output=True, text=True, check=False)


def test_each_line_of_stdin_has_its_own_answer(world: Path) -> None:
    path = world / "out" / "onnx"
    done = pocketglm("run", path, "--max-new-tokens", 4, "--raw", given="hi\n\nhi\n")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("[2 prompt tokens") == 2
    first = done.stdout[: len(done.stdout) // 2]
    assert done.stdout == first + first
    one = pocketglm("run", path, "--json", "--max-new-tokens", 4, "--raw", given="hi\n")
    assert json.loads(one.stdout)["answer"] + "\n" == first
    several = pocketglm("run", path, "--json", given="hi\nho\n")
    assert several.returncode == 2
    assert "stdin has several lines" in several.stderr
    assert json.loads(several.stdout)["error"]["hint"]


def test_a_reader_that_has_read_enough_is_no_error(world: Path) -> None:
    lines = "hi\n" * 300
    command = f"{sys.executable} -m pocketglm run {world / 'out/onnx'} --max-new-tokens 8 | head -1"
    done = subprocess.run(
        ["bash", "-c", f"{command}; echo codes ${{PIPESTATUS[0]}}"],
        input=lines, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "codes 0"
    assert "error" not in done.stderr.lower()
    assert done.stderr.count("prompt tokens") < 300


# --- a terminal ----------------------------------------------------------------------------------


class Terminal:
    """`pocketglm run PATH` on a pseudo-terminal."""

    def __init__(self, *arguments: object) -> None:
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-X", "faulthandler", "-m", "pocketglm", *map(str, arguments)],
            stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
            preexec_fn=_take_terminal,
        )  # fmt: skip
        os.close(slave)
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def until(self, words: str, seconds: float = 60.0) -> str:
        """What is printed up to `words`, which are taken too."""
        self._read(lambda: words in self.seen, repr(words), seconds)
        before, _, self.seen = self.seen.partition(words)
        return before

    def answers(self, seconds: float = 60.0) -> None:
        """Wait for a first piece of an answer, which is not taken."""
        self._read(lambda: bool(self.seen.strip()), "answer", seconds)

    def _read(self, done: Callable[[], bool], what: str, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not done():
            if time.monotonic() > end:
                self.process.send_signal(signal.SIGABRT)  # and where it is
                time.sleep(1)
                where = os.read(self.master, 65536).decode(errors="replace")
                pytest.fail(f"no {what} in {self.seen!r}\n{where}")
            if select.select([self.master], [], [], 0.2)[0]:
                try:
                    self.seen += os.read(self.master, 65536).decode(errors="replace")
                except OSError:  # the other side is closed
                    pytest.fail(f"it ended: {self.seen!r}")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)


def _take_terminal() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    modes = termios.tcgetattr(0)
    modes[3] |= termios.NOFLSH  # Ctrl-C drops nothing of what was printed
    termios.tcsetattr(0, termios.TCSANOW, modes)


def test_a_conversation_on_a_terminal(tmp_path: Path) -> None:
    model = save_chat_decoder(tmp_path / "m", "llama", positions=4096)
    terminal = Terminal("run", model, "--max-new-tokens", 4000, "--threads", 1)
    try:
        assert "/reset" in terminal.until("> ")
        terminal.type("hi\n")
        terminal.until("hi\r\n")
        terminal.answers()
        terminal.type("\x03")  # stops the answer and not the program
        terminal.until("[8 prompt tokens")
        cost = terminal.until("]\r\n")
        assert "interrupted" in cost
        first = int(cost.split(";")[1].split()[0])
        assert 0 < first < 4000
        terminal.until("> ")
        time.sleep(0.2)  # it reads: a signal just before that would wait for the next line
        terminal.type("\x03")  # at the prompt: nothing
        terminal.until("> ")
        terminal.type("ho\n")
        terminal.until("ho\r\n")
        terminal.answers()
        terminal.type("\x03")
        # The second question sees the first answer.
        shown = terminal.until(" prompt tokens")
        assert int(shown.rpartition("[")[2]) > 8  # the answer itself may have brackets
        terminal.until("interrupted]\r\n")
        terminal.until("> ")
        terminal.type("/reset\n")
        terminal.until("> ")
        terminal.type("ha\n")
        terminal.until("ha\r\n")
        terminal.answers()
        terminal.type("\x03")
        terminal.until("[8 prompt tokens")
        terminal.until("interrupted]\r\n")
        terminal.until("> ")
        terminal.type("\x04")
        assert terminal.process.wait(20) == 0
    finally:
        terminal.close()


def test_an_error_does_not_end_a_conversation(world: Path) -> None:
    terminal = Terminal("run", world / "out/onnx", "--max-new-tokens", 10)
    try:
        terminal.until("> ")
        terminal.type("x" * 70 + "\n")
        terminal.until("error: the prompt has 76 tokens, the context holds 64")
        terminal.until("> ")
        terminal.type("hi\n")
        terminal.until("[8 prompt tokens")
        for _ in range(6):  # until the conversation is too long
            terminal.until("> ")
            terminal.type("hi\n")
        terminal.until("with what was said before")
        terminal.until("try: /reset")
    finally:
        terminal.close()


# --- commands ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that says it was trained for commands (it was not, so it answers nonsense)."""
    grammar = CommandGrammar(intents={"alarm": ["time"], "music": []})
    folder = tmp_path_factory.mktemp("commands") / "ckpt"
    model = save_chat_decoder(folder, marks=mark_names(grammar), eos_token_id=[1])
    edit(model / "pocketglm.json", format=1, task="command", command=grammar.model_dump())
    assert export(model, ["onnx"], model.parent / "out").targets[0].ok
    return model


def test_a_command_model_prints_an_action_of_its_grammar(commands: Path, capsys: Capture) -> None:
    for path in (commands, commands.parent / "out/onnx"):
        result = ok(capsys, path, "wake me at 7")
        assert result.intent in ("alarm", "music")
        assert result.prompt_tokens == len(" wake me at 7\n")
        assert result.slots is not None
        for slot in result.slots:
            assert slot.keys() == {"name", "value"}
            assert slot["value"] in "wake me at 7"
        assert result.action
        assert result.action.startswith("do(")
        assert result.answer is None
        code, out, _ = run(capsys, path, "wake me at 7")
        assert (code, out) == (0, f"{result.action}\n")
        assert ok(capsys, path, "wake me", "--raw", "--max-new-tokens", 3).new_tokens == 3


def test_bad_commands(commands: Path, capsys: Capture) -> None:
    refused(capsys, ["the text is empty"], commands, " ")
    refused(
        capsys, ["the command and its answer have", "the context holds 64"], commands, "x" * 100
    )
    err = refused(capsys, ["--temperature, --system"], commands, "x", "--temperature", 1,
                  "--system", "y")  # fmt: skip
    assert "command parser" in err


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('no roles') }}", "{% for %}", "{{ messages[7].content }}"]
)
def test_a_template_that_fails_to_render(
    template: str, world: Path, tmp_path: Path, capsys: Capture
) -> None:
    model = Path(shutil.copytree(world / "ckpt", tmp_path / "m"))
    (model / "chat_template.jinja").write_text(template)
    refused(capsys, ["the chat template fails to render", "--raw"], model, "hi")
    assert ok(capsys, model, "hi", "--raw", "--max-new-tokens", 2).new_tokens == 2


def test_options_of_the_other_kind_of_model(world: Path, tmp_path: Path, capsys: Capture) -> None:
    refused(capsys, ["--top, --max-length", "is a decoder"], world / "ckpt", "hi", "--top", 2,
            "--max-length", 9)  # fmt: skip
    encoder = save_tiny(tmp_path / "m")
    words = ["--temperature, --system, --raw, --context", "is an encoder"]
    refused(capsys, words, encoder, "hi", "--temperature", 0, "--system", "x", "--raw",
            "--context", 8)  # fmt: skip


def test_an_empty_text(world: Path, capsys: Capture) -> None:
    refused(capsys, ["the text is empty"], world / "ckpt", " ")


def test_an_unknown_runtime(world: Path, capsys: Capture) -> None:
    refused(capsys, ["unknown runtime 'genia'", "did you mean 'genai'?"], world / "out/onnx", "x",
            "--runtime", "genia")  # fmt: skip


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", ""])
@pytest.mark.parametrize("verb", ["run", "inspect", "export", "compress"])
def test_checkpoints_that_others_quantized(
    method: str, verb: str, world: Path, tmp_path: Path, capsys: Capture
) -> None:
    model = Path(shutil.copytree(world / "ckpt", tmp_path / "m"))
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    weight = tensors.pop(f"{name}.weight")
    if method == "bitsandbytes":
        tensors[f"{name}.weight"] = torch.zeros((weight.numel() // 2, 1), dtype=torch.uint8)
    else:
        tensors[f"{name}.qweight"] = torch.zeros((8, len(weight)), dtype=torch.int32)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    if method:
        edit(model / "config.json", quantization_config={"quant_method": method})
    options: dict[str, list[object]] = {
        "run": ["hi"],
        "export": ["--out", tmp_path / "o"],
        "compress": ["--method", "quantize_rtn", "--out", tmp_path / "o"],
    }
    own = options.get(verb, [])
    words = [f"quantized by {method or 'another tool'}", "float weights", "original repository"]
    refused(capsys, words, model, *own, verb=verb)


def test_gguf(world: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "glm-q4.gguf").write_bytes(b"GGUF")
    for path in (tmp_path, tmp_path / "glm-q4.gguf"):
        words = ["GGUF", "already quantized", "safetensors: the original repository"]
        refused(capsys, words, path, "hi")
        refused(capsys, words, path, verb="inspect")


CHATGLM: dict[str, Any] = {
    "model_type": "chatglm",
    "architectures": ["ChatGLMModel"],
    "auto_map": {"AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration"},
}


@pytest.mark.parametrize("verb", ["run", "inspect"])
@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin", "none"])
@pytest.mark.parametrize("sign", ["all", "model_type"])
def test_chatglm_folders(
    verb: str, weights: str, sign: str, world: Path, tmp_path: Path, capsys: Capture
) -> None:
    model = tmp_path / "chatglm3-6b"
    model.mkdir()
    config = CHATGLM if sign == "all" else {"model_type": "chatglm"}
    edit(model / "config.json", **config)
    if sign == "all":
        (model / "modeling_chatglm.py").write_text("raise SystemExit('it ran')")
    if weights != "none":
        shutil.copy(world / "ckpt" / "model.safetensors", model / weights)
    names = ["zai-org/glm-4-9b-chat-hf", "zai-org/GLM-4-9B-0414", "zai-org/glm-edge-1.5b-chat"]
    refused(capsys, ["remote code", *names], model, *(["hi"] if verb == "run" else []), verb=verb)


def test_the_twin_of_a_chatglm_repository_is_named(
    world: Path, tmp_path: Path, capsys: Capture
) -> None:
    by_folder, by_config = tmp_path / "glm-4-9b-chat", tmp_path / "m"
    named = CHATGLM | {"_name_or_path": "THUDM/glm-4-9b-chat"}
    for model, config in ((by_folder, CHATGLM), (by_config, named)):
        model.mkdir()
        edit(model / "config.json", **config)
        shutil.copy(world / "ckpt" / "model.safetensors", model)
        refused(capsys, ["use zai-org/glm-4-9b-chat-hf, the same model"], model, "hi")


def test_an_older_glm_with_its_own_code(world: Path, tmp_path: Path, capsys: Capture) -> None:
    """glm-10b calls itself model_type glm, too."""
    model = Path(shutil.copytree(world / "ckpt", tmp_path / "m"))
    edit(
        model / "config.json", architectures=["GLMModel"], auto_map={"AutoModel": "modeling_glm.G"}
    )
    refused(capsys, ["'GLMModel'", "remote code", "zai-org/glm-edge-1.5b-chat"], model, "hi")


def test_a_missing_folder_is_no_hub_id_where_its_parent_exists(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs" / "assistent").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    err = refused(capsys, ["runs/assistant does not exist", "assistent"], "runs/assistant", "hi")
    assert "hf download" not in err
    assert "hf download zai-org/none" in refused(capsys, [], "zai-org/none", "hi")


@pytest.mark.parametrize("verb", ["run", "inspect", "bench"])
def test_the_folder_above_the_exports(verb: str, world: Path, capsys: Capture) -> None:
    words = [
        f"{world / 'out'} is no model folder itself; it holds onnx",
        f"use {world / 'out/onnx'}",
    ]
    own = ["hi"] if verb == "run" else []
    refused(capsys, words, world / "out", *own, verb=verb)
    if verb == "run":
        refused(capsys, [f"use {world / 'out/onnx'}"], world / "out", "hi", "--runtime", "genai")


def test_inspect_tells_a_decoders_export(world: Path, commands: Path, capsys: Capture) -> None:
    code, out, _ = run(capsys, world / "out/onnx", "--json", verb="inspect")
    told = json.loads(out)
    assert code == 0
    assert (told["layers"], told["kv_heads"], told["logits"], told["max_length"]) == (
        2, 2, "last", 64,
    )  # fmt: skip
    assert told["opens_in"] == {"onnx": "yes", "genai": "yes"}
    assert told["command"] is None
    assert told["kv_bytes_per_token"] == 2 * 4 * 2 * 2 * 32
    words = run(capsys, world / "out/onnx", verb="inspect")[1]
    assert "cache 1 KiB a token in float32" in words
    assert "of the last token" in words
    told = json.loads(run(capsys, commands, "--json", verb="inspect")[1])
    assert told["command"] == {"alarm": ["time"], "music": []}
    assert "2: alarm, music" in run(capsys, commands, verb="inspect")[1]


def test_the_session_of_the_export_has_the_models_ends(commands: Path) -> None:
    for path in (commands, commands.parent / "out/onnx"):
        assert open_decoder(path, RunOptions(threads=1)).info.eos_ids == (1,)

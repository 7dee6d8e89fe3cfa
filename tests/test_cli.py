"""The command as a person or a program meets it: help, JSON lines, one-line errors, Ctrl-C, files.

`TEMPLORA_UPDATE_SNAPSHOTS=1 pytest tests/test_cli.py` writes tests/snapshots/ anew.
"""

import json
import os
import resource
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook
from transformers import (
    BertConfig,
    BertLMHeadModel,
    LlamaModel,
    MambaConfig,
    MambaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from typer.testing import CliRunner, Result

import templora
from templora import cli, report
from templora.cli import app
from templora.events import EVENTS, Event
from templora.testing import ByteTokenizer, tiny_llama

SNAPSHOTS = Path(__file__).parent / "snapshots"
UPDATE = os.environ.get("TEMPLORA_UPDATE_SNAPSHOTS") == "1"
PROMPT = "The lighthouse keeper climbed the stairs."
SIZES = ["--window", "40", "--chunk", "16", "--context", "40"]


def same_as_snapshot(name: str, text: str) -> None:
    path = SNAPSHOTS / name
    if UPDATE:
        path.write_text(text, "utf-8")
    assert text == path.read_text("utf-8"), "if this change is meant, see the top of this file"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tiny model that writes any bytes at all."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_llama(initializer_range=0.2).save_pretrained(folder)
    ByteTokenizer().save_pretrained(folder)
    return str(folder)


def templora_write(*args: object) -> Result:
    """`templora write …` in this process."""
    return CliRunner().invoke(app, ["write", *map(str, args)])


def command(*args: object) -> list[str]:
    """`templora …` as another process would start it."""
    return [sys.executable, "-m", "templora", *map(str, args)]


def plain_screen() -> dict[str, str]:
    """A terminal of 100 columns that knows no colour."""
    return {
        **os.environ,
        "TERMINAL_WIDTH": "100",
        "COLUMNS": "100",
        "NO_COLOR": "1",
        "_TYPER_FORCE_DISABLE_TERMINAL": "1",
    }


def said(*args: object) -> str:
    """What `templora …` prints in a process of its own."""
    done = subprocess.run(command(*args), env=plain_screen(), capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return "\n".join(line.rstrip() for line in done.stdout.splitlines()) + "\n"


@pytest.mark.parametrize("name", ["", "write", "read", "score", "sessions"])
def test_the_help_is_as_it_was(name: str) -> None:
    help_ = said(*name.split(), "--help")
    assert max(map(len, help_.splitlines())) <= 100
    same_as_snapshot(f"help{name and '-'}{name}.txt", help_)


def test_the_version_is_the_packages() -> None:
    assert said("--version") == f"templora {templora.__version__}\n"


def schema() -> dict[str, dict[str, str]]:
    """Keys and types of each event, as a program that reads JSON lines must know them."""
    known: dict[str, dict[str, str]] = {}
    for event in EVENTS:
        hints = get_type_hints(event)
        types = {f.name: getattr(hints[f.name], "__name__", str(hints[f.name])) for f in fields(event)}
        known[event.kind] = {"event": "str", **types}
    return known


def test_the_schema_of_the_events_is_as_it_was() -> None:
    same_as_snapshot("events.json", json.dumps(schema(), indent=2) + "\n")


def fits(value: object, type_: str) -> bool:
    names = {"str": str, "int": int, "float": (int, float), "None": type(None)}
    return any(isinstance(value, names[n]) and not isinstance(value, bool) for n in type_.split(" | "))


def test_json_lines_are_one_event_each_and_as_the_schema_says(tiny: str, tmp_path: Path) -> None:
    out = tmp_path / "out.txt"
    done = templora_write(
        PROMPT, "--model", tiny, "--recipe", "paper", "--tokens", 150, "--out", out, "--json"
    )
    assert done.exit_code == 0
    known = schema()
    events = [json.loads(line) for line in done.stdout_bytes.decode().removesuffix("\n").split("\n")]
    for event in events:
        types = known[event["event"]]
        assert list(event) == list(types)
        assert all(fits(event[key], types[key]) for key in types), event
    kinds = [e["event"] for e in events]
    assert set(kinds) == {"warning", "token", "chunk_written", "chunk_scored", "chunk_learned", "end"}
    assert kinds[-1] == "end"
    assert kinds.count("token") == 150
    text = "".join(e["text"] for e in events if e["event"] == "token")
    assert out.read_bytes().decode() == PROMPT + text


def test_the_text_that_is_streamed_is_the_text_in_the_file_and_always_utf_8(
    tiny: str, tmp_path: Path
) -> None:
    out = tmp_path / "out.txt"
    prompt = "naïve – “字” 👧 "
    done = templora_write(prompt, "--model", tiny, *SIZES, "--tokens", 300, "--out", out)
    assert done.exit_code == 0
    streamed = done.stdout_bytes.decode("utf-8")
    assert streamed == out.read_bytes().decode("utf-8")
    assert streamed.startswith(prompt)
    assert len(streamed) > 100


def test_the_same_seed_writes_the_same_file_whatever_is_shown(tiny: str, tmp_path: Path) -> None:
    texts: list[bytes] = []
    for number, flags in enumerate([[], ["--quiet"], ["--json"]]):
        out = tmp_path / f"{number}.txt"
        done = templora_write(
            PROMPT, "--model", tiny, *SIZES, "--tokens", 60, "--seed", 5, "--out", out, *flags
        )
        assert done.exit_code == 0
        texts.append(out.read_bytes())
    assert texts[0] == texts[1] == texts[2]


def test_quiet_shows_no_text_and_the_last_lines_say_where_it_is_and_how_to_go_on(
    tiny: str, tmp_path: Path
) -> None:
    out = tmp_path / "a novel.txt"
    done = templora_write(PROMPT, "--model", tiny, *SIZES, "--tokens", 60, "--out", out, "--quiet")
    assert (done.exit_code, done.stdout) == (0, "")
    perplexity, saved, go_on = done.stderr.splitlines()
    assert perplexity.startswith("perplexity of ")
    assert saved == f"saved to '{out}'"
    assert go_on.startswith(f"go on with: templora write --read '{out}' --out '{out}'")


def test_a_text_is_read_and_continued_in_its_own_file(tiny: str, tmp_path: Path) -> None:
    out = tmp_path / "novel.txt"
    out.write_text(PROMPT, "utf-8")
    done = templora_write("--read", out, "--out", out, "--model", tiny, *SIZES, "--tokens", 40)
    assert done.exit_code == 0
    text = out.read_bytes().decode()
    assert text == PROMPT + done.stdout_bytes.decode()
    done = templora_write("--read", out, "--out", out, "--model", tiny, *SIZES, "--tokens", 40)
    assert out.read_bytes().decode() == text + done.stdout_bytes.decode()


def exported(folder: Path) -> str:
    """The text of a session."""
    return CliRunner().invoke(app, ["sessions", "export", str(folder)]).stdout


def test_a_session_that_read_a_file_goes_on_in_it(tiny: str, tmp_path: Path) -> None:
    out, folder = tmp_path / "novel.txt", tmp_path / "my-novel"
    out.write_text(PROMPT, "utf-8")
    text = PROMPT
    for options in (["--model", tiny, *SIZES], [], []):
        done = templora_write("--session", folder, "--read", out, "--out", out, *options, "--tokens", 20)
        assert done.exit_code == 0
        assert out.read_bytes().decode().startswith(text), "nothing stands there twice"
        assert len(out.read_bytes().decode()) < len(text) + 60
        text = out.read_bytes().decode()
        assert exported(folder) == text, "nor in the session"
    out.write_text(text + " The tide turned.", "utf-8", newline="")
    done = templora_write("--session", folder, "--read", out, "--out", out, "--tokens", 20)
    assert exported(folder) == out.read_bytes().decode(), "what was added by hand is read, and that alone"
    assert exported(folder).startswith(text + " The tide turned.")
    text = out.read_text("utf-8")
    out.write_text(text[:-4], "utf-8", newline="")  # as a power failure may leave it
    done = templora_write("--session", folder, "--read", out, "--out", out, "--tokens", 20)
    assert "lacks the last 4 characters" in done.stderr
    assert exported(folder) == out.read_bytes().decode()
    assert exported(folder).startswith(text)


def test_what_is_said_to_go_on_with_goes_on(tiny: str, tmp_path: Path) -> None:
    out = tmp_path / "out.txt"
    wishes = [
        "--recipe",
        "paper",
        "--set",
        "epochs=1",
        "--chunk",
        16,
        "--top-k",
        5,
        "--no-base",
        "--stop",
        "a b'c",
    ]
    first = templora_write(PROMPT, "--model", tiny, "--tokens", 20, "--out", out, "--seed", 1, *wishes)
    before = out.read_bytes().decode()
    *_, go_on = first.stderr.splitlines()
    program, *args = shlex.split(go_on.removeprefix("go on with: "))
    assert program == "templora"
    second = CliRunner().invoke(app, args)
    assert second.exit_code == 0
    assert out.read_bytes().decode() == before + second.stdout_bytes.decode()
    again = ["--model", tiny, "--seed", "1", *map(str, wishes)]
    assert sorted(args[args.index("--tokens") + 2 :]) == sorted(again), "it would go on with another text"


def test_several_texts_may_be_read_and_a_prompt_file_given(tiny: str, tmp_path: Path) -> None:
    files = [tmp_path / f"{name}.txt" for name in "abc"]
    for file in files:
        file.write_text(PROMPT * 2, "utf-8")
    out = tmp_path / "out.txt"
    args = ["--read", files[0], "--read", files[1], "--prompt-file", files[2], "--out", out, "--tokens", 5]
    done = templora_write(*args, "--model", tiny, *SIZES)
    assert done.exit_code == 0
    assert out.read_text("utf-8").startswith(PROMPT * 2)


def refusal(done: Result) -> str:
    """The one line that an error is."""
    assert done.exit_code == 2, done.output
    assert done.stdout == ""
    assert done.stderr.endswith("\n")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


def in_folder(tmp_path: Path, kind: str) -> str:
    """A model that is no causal LM with keys and values, saved as any other."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 257, "hidden_size": 16}
    if kind == "bert":
        config = BertConfig(**sizes, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
        model = BertLMHeadModel(config)
    elif kind == "mamba":
        model = MambaForCausalLM(MambaConfig(**sizes, state_size=4, num_hidden_layers=1))
    else:
        config = T5Config(vocab_size=257, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
        model = T5ForConditionalGeneration(config)
    model.save_pretrained(tmp_path / kind)
    ByteTokenizer().save_pretrained(tmp_path / kind)
    return str(tmp_path / kind)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("bert", "is not causal"),
        ("t5", "is a t5 model, not a causal LM; choose one that writes text"),
        ("mamba", "keeps a recurrent state"),
    ],
)
def test_a_model_that_cannot_work_is_one_line(kind: str, reason: str, tmp_path: Path) -> None:
    done = templora_write(PROMPT, "--model", in_folder(tmp_path, kind), "--out", tmp_path / "o")
    assert reason in refusal(done)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (["--model", "{tmp}/nothing"], "no folder {tmp}/nothing; give a folder that holds config.json"),
        (["--model", "{tmp}"], "{tmp} holds no config.json"),
        (["--model", "{tmp}/broken"], "cannot load {tmp}/broken: "),
        (["--model", "{tmp}/weightless"], "cannot load {tmp}/weightless: "),
        (["--recipe", "papr"], "no recipe 'papr'; named recipes are default, paper"),
        (["--set", "learning_rat=1"], "the nearest known one is 'learning_rate'"),
        (["--set", "foo=3"], "unknown recipe key 'foo'; known are name, window, chunk"),
        (["--out-dir", "{tmp}/texts"], "--out-dir goes with --prompts"),
        (["--window", "5000"], "window 5000 + chunk 64 + sinks 4 exceed the 128 positions"),
        (["--set", "epochs=many"], "recipe key epochs: "),
        (["--set", "epochs"], "--set takes key=value, not 'epochs'"),
        (["--set", "targets=nothing"], "no layers of LlamaForCausalLM can carry LoRA"),
        (
            ["--window", "120", "--chunk", "16"],
            "window 120 + chunk 16 + sinks 4 exceed the 128 positions of this base; the largest window is "
            "108",
        ),
        (["--window", "0"], "recipe key window: "),
        (["--temperature", "-1"], "temperature is -1.0; it must be 0, or between 1e-12 and 1e+12"),
        (["--temperature", "1e-45"], "temperature is 1e-45; it must be 0, or between"),
        (["--repetition-penalty", "1e-40"], "repetition_penalty is 1e-40; it must be between"),
        (["--stop", ""], "a string to stop at is empty"),
        (["--read", "{tmp}/book.epub"], "{tmp}/book.epub is a book, not plain text; `templora read`"),
        (["--top-p", "2"], "top_p is 2.0; it must be above 0 and at most 1"),
        (["--dtype", "float99"], "no dtype 'float99'; choose float32"),
        (["--device", "nowhere"], "cannot use device 'nowhere' ("),
        (["--out", "{tmp}/there.txt"], "{tmp}/there.txt exists and is never overwritten"),
        (["--out", "{tmp}/no/folder/out.txt"], "cannot write to {tmp}/no/folder/out.txt: No such file"),
        (["--out", "{tmp}"], "{tmp} exists and is never overwritten"),
        (["--prompt-file", "{tmp}/there.txt"], "a prompt and --prompt-file were both given"),
        (["--out", "{tmp}/new.txt.xz"], "{tmp}/new.txt.xz would hold plain text"),
        (["--read", "{tmp}/missing.txt"], "cannot read {tmp}/missing.txt: No such file"),
        (["--read", "{tmp}"], "cannot read {tmp}: Is a directory"),
        (["--read", "{tmp}/binary"], "binary"),
        (["--read", "{tmp}/utf16.txt"], "{tmp}/utf16.txt is not UTF-8 text"),
        (["--read", "{tmp}/empty.txt"], "{tmp}/empty.txt is empty"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_error_is_one_line_with_cause_and_cure(
    args: list[str], reason: str, tiny: str, tmp_path: Path
) -> None:
    (tmp_path / "there.txt").write_text("here first", "utf-8")
    (tmp_path / "utf16.txt").write_text(PROMPT, "utf-16")
    (tmp_path / "binary").write_bytes(b"PK\x03\x04\x00\x00text")
    (tmp_path / "empty.txt").write_text(" \n", "utf-8")
    (tmp_path / "book.epub").write_bytes(b"PK")
    for name, config in (("broken", "{not json"), ("weightless", '{"model_type": "llama"}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(config)
    out = tmp_path / "out.txt"
    # A later option of the same name wins.
    done = templora_write(
        PROMPT, "--model", tiny, "--tokens", 5, "--out", out, *(a.format(tmp=tmp_path) for a in args)
    )
    assert reason.format(tmp=tmp_path) in refusal(done)
    assert (tmp_path / "there.txt").read_text() == "here first"
    assert not out.exists()


@pytest.mark.parametrize("prompt", [[], [""], [" \n "]])
def test_an_empty_prompt_is_refused(prompt: list[str], tmp_path: Path) -> None:
    assert 'the prompt is empty; say for example: templora write "' in refusal(templora_write(*prompt))
    (tmp_path / "empty.txt").write_text("\n", "utf-8")
    assert "is empty" in refusal(templora_write("--prompt-file", tmp_path / "empty.txt"))


@pytest.mark.skipif(sys.platform != "linux", reason="torch has another OpenMP elsewhere")
@pytest.mark.parametrize(
    ("own", "spins"),
    [({}, "3000"), ({"GOMP_SPINCOUNT": "77"}, "77"), ({"OMP_WAIT_POLICY": "active"}, "30000000000")],
    ids=str,
)
def test_threads_wait_asleep_unless_someone_says_how(own: dict[str, str], spins: str, tiny: str) -> None:
    """On few cores; as OpenMP itself says when it is loaded, which is with torch."""
    few = set(sorted(os.sched_getaffinity(0))[:2])
    others = {
        name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    }
    done = subprocess.run(
        command("score", Path(__file__).parent.parent / "LICENSE", "--tokens", 20, "--model", tiny),
        env=others | own | {"OMP_DISPLAY_ENV": "verbose"},
        preexec_fn=lambda: os.sched_setaffinity(0, few),
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"GOMP_SPINCOUNT = '{spins}'" in done.stderr


@pytest.mark.parametrize(
    ("says", "threads"),
    [("100000 100000\n", "1"), ("50000 100000\n", "1"), ("max 100000\n", None), ("", None), (None, None)],
)
def test_a_containers_share_of_the_cores_is_all_that_it_takes(
    says: str | None, threads: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "cpu.max"
    if says is not None:
        file.write_text(says, "ascii")
    own = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    monkeypatch.setattr(cli, "CPU_MAX", file)
    monkeypatch.setattr(os, "environ", own)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    cli._share_machine()  # pyright: ignore[reportPrivateUsage]
    assert own.get("OMP_NUM_THREADS") == threads


@pytest.mark.slow
def test_a_hub_id_without_a_network_is_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        command("write", PROMPT, "--model", "nobody/nothing", "--out", tmp_path / "out.txt"),
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: cannot load nobody/nothing: ")
    assert "local folder" in line


@contextmanager
def failing_passes(error: Exception, *, longer_than: int) -> Iterator[None]:
    """Every pass of a Llama over more than that many tokens fails."""

    def fail(module: object, _inputs: object, output: Any) -> None:
        if isinstance(module, LlamaModel) and output.last_hidden_state.shape[1] > longer_than:
            raise error

    handle = register_module_forward_hook(fail)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nGPU 0 has a total…"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
    ids=["gpu", "cpu", "python"],
)
def test_out_of_memory_says_what_to_lower(error: Exception, tiny: str, tmp_path: Path) -> None:
    out = tmp_path / "out.txt"
    with failing_passes(error, longer_than=8):
        done = templora_write(PROMPT, "--model", tiny, *SIZES, "--out", out, "--quiet")
    message = refusal(done)
    assert "out of memory at window 40, chunk 16, context 40; lower" in message
    assert out.read_text("utf-8") == PROMPT


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The disk takes files of up to so many bytes, for this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_is_full_loses_nothing_that_was_written(tiny: str, tmp_path: Path) -> None:
    out, whole = tmp_path / "out.txt", tmp_path / "whole.txt"
    args = [PROMPT, "--model", tiny, *SIZES, "--tokens", 200, "--quiet"]
    with largest_file(100):
        done = templora_write(*args, "--out", out)
    assert f"cannot write to {out}: File too large; free some space" in refusal(done)
    assert templora_write(*args, "--out", whole).exit_code == 0
    kept = out.read_text("utf-8")  # no half of a character, with which it could not go on
    assert 96 < len(kept.encode()) <= 100
    assert whole.read_text("utf-8").startswith(kept)


@contextmanager
def started(*args: object) -> Iterator["subprocess.Popen[bytes]"]:
    """`templora …` in a process of its own, at work until something stops it."""
    with subprocess.Popen(
        command(*args), stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def first_bytes(process: "subprocess.Popen[bytes]", number: int) -> bytes:
    """At least so many bytes of what it prints."""
    assert process.stdout is not None
    data = b""
    while len(data) < number:
        piece = process.stdout.read(number)
        assert piece, "it ended early"
        data += piece
    return data


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_ctrl_c_stops_after_the_token_and_the_last_line_says_how_to_go_on(
    number: int, tiny: str, tmp_path: Path
) -> None:
    out = tmp_path / "out.txt"
    with started("write", PROMPT, "--model", tiny, *SIZES, "--tokens", 1_000_000, "--out", out) as process:
        first = first_bytes(process, len(PROMPT) + 50)
        assert out.read_bytes().startswith(first), "what was shown must be safe, even from a power cut"
        process.send_signal(number)
        rest, errors = process.communicate()
    assert process.returncode == 130
    assert out.read_bytes() == first + rest
    assert out.read_bytes().decode().startswith(PROMPT)
    *_, where, last = errors.decode().splitlines()
    assert where == f"interrupted; all that was written is in {out}"
    assert last.startswith(f"go on with: templora write --read {out} --out {out}")
    assert "Traceback" not in errors.decode()


def test_a_file_that_got_nothing_is_taken_away_and_what_is_said_goes_on_without_it(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    novel, out = tmp_path / "novel.txt", tmp_path / "out.txt"
    novel.write_text(PROMPT, "utf-8")
    real = report.send

    def interrupted(*args: Any) -> Iterator[Event]:
        for event in real(*args):
            signal.raise_signal(signal.SIGINT)
            yield event

    with monkeypatch.context() as patched:
        patched.setattr(report, "send", interrupted)
        done = templora_write("--read", novel, "--out", out, "--model", tiny, *SIZES, "--tokens", 20)
    where, go_on = done.stderr.splitlines()
    assert (done.exit_code, where) == (130, "interrupted before anything was written")
    assert not out.exists()
    again = CliRunner().invoke(app, shlex.split(go_on.removeprefix("go on with: templora ")))
    assert again.exit_code == 0
    assert out.read_bytes() == again.stdout_bytes != b""


def test_without_a_stream_the_program_has_one_that_leads_nowhere(tiny: str, tmp_path: Path) -> None:
    out = tmp_path / "out.txt"
    line = shlex.join(command("write", PROMPT, "--model", tiny, *SIZES, "--tokens", 5, "--out", out))
    done = subprocess.run(f"{line} >&- 2>&-", shell=True, check=False)
    assert done.returncode == 0
    assert out.read_text("utf-8").startswith(PROMPT)


@pytest.mark.slow
def test_a_reader_that_goes_away_ends_the_text_without_a_complaint(tiny: str, tmp_path: Path) -> None:
    out = tmp_path / "out.txt"
    with started("write", PROMPT, "--model", tiny, *SIZES, "--tokens", 1_000_000, "--out", out) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        first = first_bytes(process, len(PROMPT) + 20)
        process.stdout.close()
        errors = process.stderr.read()
        assert process.wait() == 1
    assert errors == b""
    assert out.read_bytes().startswith(first)


@pytest.mark.parametrize(
    "line",
    [
        "write --prompts {tmp}/file --out-dir {tmp}/file",
        "bench pg19 {tmp} --out {tmp}/file",
        "translate {tmp}/file --from de --to en --out {tmp}/o --corrections {tmp}/file",
    ],
)
def test_a_folder_that_cannot_be_made_is_one_line(line: str, tmp_path: Path) -> None:
    for name in ("file", "book.txt"):
        (tmp_path / name).write_text("It was dark.\n", "utf-8")
    done = CliRunner().invoke(app, line.format(tmp=tmp_path).split())
    assert f"cannot make {tmp_path / 'file'}: File exists; choose another --" in refusal(done)


def test_a_terminal_without_a_width_gets_help_all_the_same() -> None:
    command = [sys.executable, "-m", "templora", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"COLUMNS": "0"})
    assert "translate" in done.stdout

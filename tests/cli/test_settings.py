"""Options of adapt and predict are the fields of their settings, one for one, and a YAML file gives the same ones."""

from contextlib import suppress

import pytest
import typer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rankfold.cli.entry import app
from rankfold.cli.settings import from_settings, read_config
from rankfold.errors import FileError, OptionError, RankfoldError, UnknownName
from rankfold.jobs.adapt.settings import AdaptSettings, PredictSettings

COMMANDS = {"adapt": AdaptSettings, "predict": PredictSettings}


def caught(model, *arguments: str):
    """The settings that a command line makes."""
    seen = []
    one = typer.Typer()
    one.command()(from_settings(model, "job", "A job.", seen.append))
    with typer.main.get_command(one).make_context("job", list(arguments)) as context:
        context.command.invoke(context)
    return seen[0]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_field_has_its_option_and_every_option_its_field(name):
    command = typer.main.get_command(app).commands[name]
    options = {p.name: set(p.opts) for p in command.params}
    fields = {f: {"--" + f.replace("_", "-")} for f in COMMANDS[name].model_fields}
    assert options == {**fields, "config": {"--config"}}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_says_what_it_is_and_its_default(name):
    command = typer.main.get_command(app).commands[name]
    for option in command.params:
        assert option.help, f"--{option.name} has no help"
        default = COMMANDS[name].model_fields[option.name].default if option.name != "config" else None
        if isinstance(default, int | float) and not isinstance(default, bool):
            assert f"[default: {default}]" in option.help


NEEDED = ("--model", "m", "--data", "d", "--task", "classify", "--out", "o")


def test_options_arrive_as_they_are_meant():
    s = caught(
        AdaptSettings, *NEEDED, "--rank", "8", "--lr", "1e-3", "--valid", "0.2", "--targets", "query,value", "--set", "alpha=16",
        "--set", "init.iterations=4", "--bf16", "--no-regex",
    )  # fmt: skip
    assert (s.rank, s.lr, s.valid, s.targets, s.bf16, s.regex) == (8, 1e-3, 0.2, ("query", "value"), True, False)
    assert s.set == {"alpha": "16", "init.iterations": "4"}
    assert caught(AdaptSettings, *NEEDED, "--valid", "held.csv").valid == "held.csv"


def test_what_is_not_said_keeps_its_default():
    said = caught(AdaptSettings, *NEEDED)
    assert said == AdaptSettings.of(model="m", data="d", task="classify", out="o")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rank", "0"], r"rank: got '0'.*greater than or equal to 1"),
        (["--rank", "eight"], r"rank: got 'eight'.*integer"),
        (["--task", "clasify"], r"task: got 'clasify'.*'classify', 'lm', 'sft' or 'embed'"),
        (["--set", "alpha"], r"'alpha'.*option=value"),
        (["--lr", "nan"], r"lr: got 'nan'"),
    ],
)
def test_a_value_outside_its_bounds_is_refused_with_value_and_bound(arguments, said):
    with pytest.raises(RankfoldError, match=said):
        caught(AdaptSettings, *NEEDED, *arguments)


def test_what_is_missing_is_listed_at_once():
    with pytest.raises(OptionError, match="--data, --task, --out"):
        caught(AdaptSettings, "--model", "m")


# --config


def test_a_file_gives_options_and_the_command_line_wins(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "model: m\ndata: d\ntask: classify\nout: o\nrank: 4\nbatch-size: 2\ngrad_accum: 3\nbf16: true\n"
        "set: {alpha: 8, power: 0.5}\n"
    )
    s = caught(AdaptSettings, "--config", str(file), "--rank", "9", "--no-bf16", "--set", "alpha=1")
    assert (s.rank, s.batch_size, s.grad_accum, s.bf16, s.model) == (9, 2, 3, False, "m")
    assert s.set == {"alpha": "1", "power": 0.5}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rnk: 8\n", r"unknown option 'rnk'; nearest: rank"),
        ("- rank\n", "must be a mapping"),
        ("", "must be a mapping"),
        ("rank: [1\n", "is not YAML"),
        ("rank: !!python/object/apply:os.system [true]\n", "is not YAML"),
        ("1: 2\n", "must be a mapping"),
    ],
)
def test_a_file_that_can_not_be_meant_is_refused(text, said, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises((FileError, UnknownName), match=said):
        read_config(file, AdaptSettings)


def test_a_file_that_is_not_text_is_refused(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_bytes(b"\xff\xfe\x00rank")
    with pytest.raises(FileError, match="can't be read"):
        read_config(file, AdaptSettings)


TOKENS = [
    "rank",
    "batch-size",
    ":",
    " ",
    "\n",
    "- ",
    "[",
    "]",
    "{",
    "}",
    "&a",
    "*a",
    "!!",
    "2001-99-99",
    "1e999",
    "'",
    '"',
    "|",
    "~",
    "%",
    "\x00",
]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.one_of(st.binary(max_size=60), st.lists(st.sampled_from(TOKENS), max_size=20).map(lambda t: "".join(t).encode())))
def test_any_file_is_a_mapping_of_known_options_or_refused(tmp_path, content):
    file = tmp_path / "run.yaml"
    file.write_bytes(content)
    with suppress(RankfoldError):
        assert read_config(file, AdaptSettings).keys() <= AdaptSettings.model_fields.keys()


def test_a_file_of_endless_depth_is_refused(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("[" * 20_000)
    with pytest.raises(FileError, match="is not YAML"):
        read_config(file, AdaptSettings)

"""What the doctor prints is what the engine decides by."""

import json

import pytest
from typer.testing import CliRunner

from cachedattn_jax.cli import app
from cachedattn_jax.engine.cost_constants import Constants

SMALL = ["--model", "tiny", "--chunk_tokens", "16,64"]


def test_the_doctor_measures_links_programs_and_what_follows(tmp_path):
    arguments = ["doctor", *SMALL, "--disk_root", str(tmp_path)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    for words in (
        "host to device",
        "disk write",
        "prefill of 64 tokens",
        "decode step",
    ):
        assert words in done.output
    assert "recomputed" in done.output
    assert list(tmp_path.iterdir()) == []


def test_json_is_the_constants_of_the_cost_model(tmp_path):
    done = CliRunner().invoke(app, ["doctor", *SMALL, "--json"])
    assert done.exit_code == 0, done.output
    text = done.stdout[done.stdout.index("{") :]
    constants = Constants.from_description(json.loads(text))
    assert set(constants.prefill) == {16, 64}
    assert constants.disk_read is not None and constants.disk_read.bytes_per_s > 0
    assert 0 < constants.decode_step_s < 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "smal"], "did you mean 'small'"),
        (["--chunk_tokens", "many"], "chunk_tokens='many' must look like"),
        (
            ["--disk_root", "no/such/folder"],
            "disk_root='no/such/folder' cannot be used",
        ),
        (["--model", "tiny", "--page_tokens", "0"], "page_tokens=0 must be"),
    ],
)
def test_a_mistake_gets_a_sentence(arguments, message):
    done = CliRunner().invoke(app, ["doctor", *arguments])
    assert done.exit_code == 2
    assert message in done.output.replace("\n", " ")

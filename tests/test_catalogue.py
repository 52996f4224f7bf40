"""The catalogue: what is shipped, and what users add to it."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pft_arch.catalogue import BUNDLED, CATALOGUE, catalogue, default_folder
from pft_arch.config import preset

PUBLISHED = ("pft_x2", "pft_x3", "pft_x4", "pft_light_x2", "pft_light_x3", "pft_light_x4")
GOOD = '[mine_x4]\nscale = 4\nrepo_id = "me/mine"\nfile = "mine.safetensors"\n'

Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a catalogue.toml; returns its folder."""

    def write_text(text: str) -> Path:
        (tmp_path / "catalogue.toml").write_text(text, "utf-8")
        return tmp_path

    return write_text


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_entry_says_what_it_is(name: str) -> None:
    variant = CATALOGUE[name]
    assert variant.name == name
    assert preset(variant.preset, variant.scale).scale == variant.scale
    assert variant.licence and variant.training
    if variant.source == "bundled":
        assert (BUNDLED / variant.file).stat().st_size == variant.size
        assert variant.sha256


def test_the_published_variants_are_listed_without_a_repo_that_nobody_vouches_for() -> None:
    assert set(PUBLISHED) <= set(CATALOGUE)
    assert {CATALOGUE[name].repo_id for name in PUBLISHED} == {""}
    assert all(CATALOGUE[name].origin and CATALOGUE[name].citation for name in PUBLISHED)


def test_without_a_file_of_the_user_the_shipped_ones_are_all(tmp_path: Path) -> None:
    assert catalogue(tmp_path / "absent") is CATALOGUE


def test_users_add_variants(write: Write) -> None:
    variants = catalogue(write(GOOD + 'revision = "v1"\nsha256 = "' + "0" * 64 + '"\ntraining = "my photos"\n'))
    assert list(variants) == [*CATALOGUE, "mine_x4"]
    mine = variants["mine_x4"]
    assert (mine.source, mine.repo_id, mine.revision, mine.scale) == ("hub", "me/mine", "v1", 4)


def test_users_name_a_repo_for_a_published_variant(write: Write) -> None:
    mine = catalogue(write('[pft_x4]\nrepo_id = "me/pft"\n'))["pft_x4"]
    assert (mine.repo_id, mine.preset, mine.file) == ("me/pft", "pft", "pft_x4.safetensors")


def test_a_changed_file_is_read_anew(write: Write) -> None:
    assert "mine_x4" in catalogue(write(GOOD))
    assert "yours_x4" in catalogue(write(GOOD.replace("mine_x4", "yours_x4")))


def test_a_byte_order_mark_does_no_harm(write: Write) -> None:
    assert "mine_x4" in catalogue(write("\ufeff" + GOOD))


BROKEN = {
    "no TOML": ("[", "catalogue.toml is left out"),
    "scale of no model": (GOOD.replace("mine", "bad").replace("= 4", "= 7"), r"\[bad_x4\] .* scale must be 2, 3 or 4"),
    "scale as text": (GOOD.replace("mine", "bad").replace("= 4", '= "4"'), "scale must be a whole number"),
    "no repo": ('[bad_x4]\nscale = 4\nfile = "a.safetensors"\n', "lacks repo_id"),
    "repo without user": (GOOD.replace("me/mine", "mine"), "repo_id must be user/repo"),
    "unknown field": (GOOD.replace("mine", "bad") + "colour = 1\n", "unknown colour; known are citation, file"),
    "no table": ("bad = 1\n", "it must be a table"),
    "file of another kind": (GOOD.replace(".safetensors", ".exe"), "file must be a name in"),
    "checksum too short": (GOOD + 'sha256 = "00"\n', "sha256 must be 64"),
    "name that is a path": (GOOD.replace("[mine_x4]", '["../x"]'), "name must be letters"),
    "nested without end": ("a = " + "[" * 100_000, "catalogue.toml is left out"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_what_is_wrong_is_told_once_and_left_out(write: Write, caplog: pytest.LogCaptureFixture, fault: str) -> None:
    text, match = BROKEN[fault]
    folder = write(text)
    with caplog.at_level(logging.WARNING, "pft_sr"):
        assert dict(catalogue(folder)) == dict(CATALOGUE)
        catalogue(folder)
    [message] = caplog.messages
    assert re.search(match, message)


def test_python_3_10_without_tomli_is_told_what_it_lacks(
    write: Write, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("tomllib", "tomli"):
        monkeypatch.setitem(sys.modules, module, None)
    assert dict(catalogue(write(GOOD))) == dict(CATALOGUE)
    assert "pip install tomli" in caplog.text


def test_one_bad_entry_does_not_cost_the_others(write: Write, caplog: pytest.LogCaptureFixture) -> None:
    assert "mine_x4" in catalogue(write('[bad_x4]\nscale = 4\nfile = "a.pth"\n' + GOOD))
    assert len(caplog.messages) == 1


def test_a_folder_in_place_of_the_file_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "catalogue.toml").mkdir()
    assert catalogue(tmp_path) is CATALOGUE
    assert len(caplog.messages) == 1


def test_the_folder_of_the_command_line_can_be_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PFT_SR_MODELS", str(tmp_path))
    assert default_folder() == tmp_path

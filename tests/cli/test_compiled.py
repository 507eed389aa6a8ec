"""Where compiled programs are kept, and where not."""

import os

import jax
import pytest

from chatpose_jax.cli.compiled import VARIABLE, keep_compiled, no_other_caches, processor, prune


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch):
    """A home of its own, and a JAX that was told nothing."""
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    names = ("jax_compilation_cache_dir", "jax_enable_compilation_cache")
    before = [getattr(jax.config, name) for name in names]
    for name, value in zip(names, (None, True)):
        jax.config.update(name, value)
    yield
    for name, value in zip(names, before):
        jax.config.update(name, value)


def test_the_users_cache_folder_is_taken_and_closed_to_others(tmp_path, monkeypatch):
    folder = keep_compiled()
    assert folder == tmp_path / "home" / ".cache" / "chatpose-jax" / "compiled" / processor()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert jax.config.jax_compilation_cache_dir == str(folder)
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert keep_compiled() == tmp_path / "cache" / "chatpose-jax" / "compiled" / processor()


@pytest.mark.parametrize("value", ["", "elsewhere"])
def test_the_variable_decides(tmp_path, monkeypatch, value):
    monkeypatch.setenv(VARIABLE, value)
    assert keep_compiled() is None
    assert list(tmp_path.iterdir()) == []
    assert not jax.config.jax_compilation_cache_dir  # JAX itself has read it, or not


def test_jaxs_own_switch_decides(tmp_path):
    jax.config.update("jax_enable_compilation_cache", False)
    assert keep_compiled() is None
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_others_may_write_is_not_run_from(capsys):
    folder = keep_compiled()
    jax.config.update("jax_compilation_cache_dir", None)
    folder.chmod(0o777)
    assert keep_compiled() is None
    assert "others may write there" in capsys.readouterr().err


def test_a_home_that_cannot_be_written_is_told(tmp_path, capsys):
    (tmp_path / "home").touch()
    assert keep_compiled() is None
    assert "not kept for the next run" in capsys.readouterr().err
    assert jax.config.jax_compilation_cache_dir is None


def test_another_processor_has_another_folder(tmp_path):
    def named(text):
        (tmp_path / "cpuinfo").write_text(text)
        return processor(tmp_path / "cpuinfo")

    one = named("model name\t: A\nflags\t\t: sse avx2\nbogomips\t: 1\n\nmodel name\t: A\nflags\t\t: sse avx2\n")
    assert one == named("model name\t: A\nflags\t\t: sse avx2\nbogomips\t: 2\n")
    assert (
        len({one, named("model name\t: A\nflags\t\t: sse avx512f\n"), named("model name\t: B\nflags\t: sse avx2\n")})
        == 3
    )


def test_what_was_not_read_for_longest_goes_first(tmp_path):
    for age, name in enumerate(("new", "middle", "old")):
        (tmp_path / name).write_bytes(bytes(100))
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    prune(tmp_path, 300)
    assert len(list(tmp_path.iterdir())) == 3
    prune(tmp_path, 250)
    assert {file.name for file in tmp_path.iterdir()} == {"new", "middle"}


@pytest.mark.parametrize(("folder", "caches"), [("gs://mine/compiled", "none"), ("/tmp/compiled", "as before")])
def test_xla_makes_no_folder_of_an_address(monkeypatch, folder, caches):
    found = {"jax_persistent_cache_enable_xla_caches": "as before"}
    monkeypatch.setattr(jax.config, "update", found.__setitem__)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", folder)
    no_other_caches()
    assert found == {"jax_persistent_cache_enable_xla_caches": caches}

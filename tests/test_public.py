"""What a user imports: the names, their types, the errors."""

from __future__ import annotations

import pytest
import typer

from specdec import errors
from specdec.cli.common import user_errors


def test_every_error_is_a_specdec_error_and_what_it_was_before() -> None:
    bases = {
        errors.CheckpointError: Exception,
        errors.KernelsUnavailableError: RuntimeError,
        errors.NotEnoughMemoryError: ValueError,
        errors.CacheFullError: RuntimeError,
        errors.QueueFullError: RuntimeError,
        errors.ModelError: RuntimeError,
    }
    assert set(errors.SpecdecError.__subclasses__()) >= set(bases)
    for error, base in bases.items():
        assert issubclass(error, errors.SpecdecError)
        assert issubclass(error, base)
        assert f" {error.__name__} " in errors.__doc__, "the tree of errors has it"


def test_the_command_line_exits_with_the_code_of_the_error(capsys: pytest.CaptureFixture[str]) -> None:
    class Unusual(errors.SpecdecError):
        exit_code = 7

    for error, code in ((Unusual("odd"), 7), (errors.QueueFullError("full"), 1), (ValueError("no"), 1)):
        with pytest.raises(typer.Exit) as raised, user_errors():
            raise error
        assert raised.value.exit_code == code
        assert capsys.readouterr().err == f"specdec: {error}\n"
    with pytest.raises(RuntimeError, match="ours"), user_errors():
        raise RuntimeError("ours")

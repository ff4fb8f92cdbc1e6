import pytest

from downslope.errors import BadInput, DownslopeError, UserCodeError, nearest, redact, under


def test_bad_input_is_a_value_error_and_ours() -> None:
    assert issubclass(BadInput, ValueError)
    assert issubclass(BadInput, DownslopeError)
    assert not issubclass(UserCodeError, ValueError)


def test_bad_input_stays_on_one_line_whatever_was_given() -> None:
    assert str(BadInput("no file 'a\nb\x1b[31m\u2028\u202eé–'.")) == r"no file 'a\nb\x1b[31m\u2028\u202eé–'."


def test_bad_input_knows_its_key() -> None:
    assert BadInput("x").key == ()
    with pytest.raises(BadInput) as caught, under("chain", 1), under("lr"):
        raise BadInput("x", key=("peak",))
    assert caught.value.key == ("chain", 1, "lr", "peak")


def test_nothing_is_suggested_for_what_nobody_meant() -> None:
    assert nearest("momentum" * 50_000, ["momentum"]) == ""


def test_exit_codes_tell_whose_fault_it_is() -> None:
    assert (BadInput.exit_code, UserCodeError.exit_code) == (2, 1)


@pytest.mark.parametrize(
    ("word", "allowed", "tail"),
    [
        ("weight_deacy", ("lr", "weight_decay"), " Did you mean 'weight_decay'?"),
        ("adm", ("adam", "adamw", "sgd"), " Did you mean 'adam'?"),
        ("zzz", ("adam", "sgd"), ""),
        ("adam", (), ""),
    ],
)
def test_nearest_suggests_one_word_or_nothing(word: str, allowed: tuple[str, ...], tail: str) -> None:
    assert nearest(word, allowed) == tail


def test_nearest_takes_any_iterable() -> None:
    assert nearest("lrr", {"lr": 0.1}) == nearest("lrr", iter(["lr"])) == " Did you mean 'lr'?"


def test_the_value_of_a_variable_that_names_a_secret_is_hidden_wherever_it_stands(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WAREHOUSE_PASSWORD", "swordfish-9")
    monkeypatch.setenv("API_KEY", "on")  # too short to be told from a word
    monkeypatch.setenv("PLACE", "a harbour")
    assert redact("no swordfish-9 in a harbour, come on") == "no [hidden] in a harbour, come on"

"""The synthetic tasks: every answer is right, no test sequence was trained on."""

from __future__ import annotations

import numpy as np
import pytest

from algokit.nn.tasks import Task, brackets, copying, exact_match, key_value_recall, modular_arithmetic, sorting

EXAMPLES = {
    "exact_match": dict(
        predicted=np.ones((2, 3), int), tokens=np.ones((2, 3), int), answers=np.array([False, True, True])
    ),
    "modular_arithmetic": dict(modulus=5, operation="+", train_fraction=0.5, rng=0),
    "copying": dict(length=6, n_symbols=5, n_train=10, n_test=5, rng=0),
    "sorting": dict(length=6, n_symbols=5, n_train=10, n_test=5, rng=0),
    "brackets": dict(length=6, n_kinds=2, n_train=10, n_test=5, rng=0),
    "key_value_recall": dict(n_pairs=2, n_keys=6, n_values=6, n_train=10, n_test=5, rng=0),
    "Task.text": (lambda: modular_arithmetic(5), dict(tokens=np.array([1, 2]))),
}
ACCEPTS = {
    "exact_match.predicted": {"negative", "zero", "huge"},
    "exact_match.tokens": {"negative", "zero", "huge"},
    "exact_match.answers": {"zero"},
    "Task.text.tokens": {"empty", "zero"},
    **{
        f"{name}.rng": {"none", "zero"}
        for name in ("modular_arithmetic", "copying", "sorting", "brackets", "key_value_recall")
    },
}
TASKS = {
    "modular": modular_arithmetic(13, operation="*"),
    "copying": copying(),
    "sorting": sorting(),
    "brackets": brackets(),
    "recall": key_value_recall(),
}


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_split_has_no_overlap_and_tokens_are_in_range(task: Task) -> None:
    train, test = ({row.tobytes() for row in part} for part in (task.train, task.test))
    assert len(train) == len(task.train) and len(test) == len(task.test) and not train & test
    both = np.concatenate([task.train, task.test])
    assert both.min() >= 0 and both.max() < task.vocab_size == len(task.symbols)
    assert task.answers.shape == both.shape[1:] and task.answers[-1]


@pytest.mark.parametrize("operation", ["+", "-", "*"])
def test_modular_answers(operation: str) -> None:
    task = modular_arithmetic(11, operation=operation)
    both = np.concatenate([task.train, task.test])
    assert len(both) == 121 and len({tuple(r[:2]) for r in both.tolist()}) == 121
    for a, b, sign, c in both.tolist():
        assert sign == 11 and c == {"+": (a + b) % 11, "-": (a - b) % 11, "*": (a * b) % 11}[operation]


def test_copying_and_sorting_answers() -> None:
    for task, f in ((TASKS["copying"], list), (TASKS["sorting"], sorted)):
        for row in task.train.tolist():
            assert row[9:] == f(row[:8]) and row[8] == 16


def test_bracket_answers() -> None:
    task, yes = TASKS["brackets"], 0
    for row in np.concatenate([task.train, task.test]):
        *string, _, answer = task.text(row).split(" ")
        word = "".join(string)
        while word != (word := word.replace("()", "").replace("[]", "").replace("{}", "")):
            pass
        assert (answer == "yes") == (word == "")
        yes += answer == "yes"
    assert 0.4 < yes / 2500 < 0.6


def test_bracket_depths_are_uniform_paths() -> None:
    """Length 6 has five paths of depths, each with eight ways to choose kinds of two."""
    task = brackets(6, n_kinds=1, n_train=1, n_test=1)
    assert task.vocab_size == 5
    from algokit.nn.tasks import _bracket_string, _chance_up

    rng, up = np.random.default_rng(0), _chance_up(6)
    words = [tuple(_bracket_string(6, 1, up, rng)) for _ in range(5000)]
    _, counts = np.unique(words, axis=0, return_counts=True)
    assert len(counts) == 5 and np.abs(counts / 1000 - 1).max() < 5 * np.sqrt(0.8 / 1000)


def test_recall_answers() -> None:
    task = TASKS["recall"]
    for row in task.train.tolist():
        pairs = dict(zip(row[0:12:2], row[1:12:2], strict=True))
        assert len(pairs) == 6 and pairs[row[-2]] == row[-1] and row[12] == 32


def test_too_many_sequences_are_refused() -> None:
    with pytest.raises(ValueError, match="n_train"):
        copying(2, n_symbols=3, n_train=8, n_test=1)


def test_same_seed_same_task() -> None:
    np.testing.assert_array_equal(brackets(rng=4).train, brackets(rng=4).train)
    assert (brackets(rng=4).train != brackets(rng=5).train).any()


def test_exact_match_counts_whole_answers() -> None:
    tokens = np.array([[1, 2, 3], [1, 2, 3], [1, 2, 3], [1, 2, 3]])
    said = np.array([[0, 2, 3], [0, 2, 9], [0, 9, 3], [7, 2, 3]])
    assert exact_match(said, tokens, np.array([False, True, True])) == 0.5
